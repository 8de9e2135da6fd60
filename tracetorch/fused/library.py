"""The scan as operations of torch's library, for `torch.compile` and `torch.export`: opaque there, with a known shape.

In eager mode the engine calls its kernels directly. Under the compiler, which cannot look into a kernel, a layer's
sequence is the operation `tracetorch::scan`, whose kernel is named by the digest of its source and built while the
compiler looks at the layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tracetorch.fused import scan as _scan
from tracetorch.fused.scan import Kernel

# By digest: what compiled programs call. As many as there are different kernels in them.
_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> str:
    """Make a kernel known to the operations; returns its name."""
    name = hashlib.sha256(f"{kernel.source}{kernel.learned}".encode()).hexdigest()[:32]
    _KERNELS[name] = kernel
    return name


@contextmanager
def outside_tracing() -> Iterator[None]:
    """For real tensors while `torch.compile` or `torch.export` traces with others that only stand for them."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        yield


def _kernel(name: str) -> Kernel:
    if name not in _KERNELS:
        raise RuntimeError(
            f"tracetorch::scan: the kernel {name} is not known in this process; a compiled or exported program runs "
            "where its layers were compiled"
        )
    return _KERNELS[name]


def _states(name: str) -> int:
    return len(_kernel(name).states)


@torch.library.custom_op("tracetorch::scan", mutates_args=())
def scan(name: str, time_dim: int, xs: Tensor, rest: list[Tensor]) -> list[Tensor]:
    """Outputs, states after the last step, and the saved states, of a sequence; see `fused.scan.forward`."""
    kernel = _kernel(name)
    (ys, *last), _, saved = _scan.forward(kernel, time_dim, False, True, xs, rest)
    return [ys.to(kernel.output_dtype), *last, *saved]


@scan.register_fake
def _scan_shapes(name: str, time_dim: int, xs: Tensor, rest: list[Tensor]) -> list[Tensor]:
    kernel, count = _kernel(name), _states(name)
    chunks = (xs.shape[time_dim] + kernel.chunk - 1) // kernel.chunk
    last = [torch.empty_like(state) for state in rest[:count]]
    ys = torch.empty_like(xs, dtype=kernel.output_dtype)
    return [ys, *last, *(state.new_empty((chunks, *state.shape)) for state in rest[:count])]


@torch.library.custom_op("tracetorch::scan_backward", mutates_args=())
def scan_backward(
    name: str, time_dim: int, grads: list[Tensor], xs: Tensor, rest: list[Tensor], saved: list[Tensor]
) -> list[Tensor]:
    """Gradients of the input, the first states and the learned parameters; see `fused.scan.backward`."""
    d_x, d_first, d_parameters = _scan.backward(_kernel(name), time_dim, True, grads, xs, rest, saved)
    assert d_x is not None
    return [d_x, *d_first, *(gradient.clone() for gradient in d_parameters if gradient is not None)]


@scan_backward.register_fake
def _backward_shapes(
    name: str, time_dim: int, grads: list[Tensor], xs: Tensor, rest: list[Tensor], saved: list[Tensor]
) -> list[Tensor]:
    kernel, count = _kernel(name), _states(name)
    learned = [p for own, p in zip(kernel.parameters, rest[count:], strict=True) if own in kernel.learned]
    return [torch.empty_like(xs), *(torch.empty_like(t) for t in (*rest[:count], *learned))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    name, time_dim, xs, rest = inputs
    ctx.name, ctx.time_dim, ctx.count = name, time_dim, len(rest)
    ctx.save_for_backward(xs, *rest, *output[1 + _states(name) :])


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    kernel, count = _kernel(ctx.name), _states(ctx.name)
    xs, *others = ctx.saved_tensors
    rest, saved = others[: ctx.count], others[ctx.count :]
    wanted = zip(grads, [xs, *rest[:count]], strict=False)  # the saved states get none
    given = [torch.zeros_like(like) if g is None else g.to(like.dtype) for g, like in wanted]
    d_x, *found = scan_backward(ctx.name, ctx.time_dim, given, xs, rest, saved)
    learned = iter(found[count:])
    d_parameters = [next(learned) if name in kernel.learned else None for name in kernel.parameters]
    return None, None, d_x, [*found[:count], *d_parameters]


scan.register_autograd(_differentiate, setup_context=_setup)
