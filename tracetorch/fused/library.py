"""The scan as operations of torch's library, for `torch.compile` and `torch.export`: opaque there, with a known shape.

In eager mode the engine calls its kernels directly. Under the compiler, which cannot look into a kernel, a layer's
sequence is the operation `tracetorch::scan`, whose kernel is named by the digest of its source and built while the
compiler looks at the layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tracetorch.fused import scan as _scan
from tracetorch.fused.kernel import Kernel, geometry

# Quirk: torch 2.6 infers no schema from `list[Tensor]`, 2.7 and later do. Goes with torch 2.6.
_SCAN = "(str name, SymInt time_dim, Tensor[] given) -> Tensor[]"
_BACKWARD = "(str name, SymInt time_dim, Tensor[] grads, Tensor[] given, Tensor[] saved) -> Tensor[]"
# By digest: what compiled programs call. As many as there are different kernels in them.
_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> str:
    """Make a kernel known to the operations; returns its name."""
    name = hashlib.sha256(f"{kernel.source}{kernel.signature}".encode()).hexdigest()[:32]
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


def _as_kernels_take_them(kernel: Kernel, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors contiguous, which those of an exported program need not be.

    Raises:
        TypeError: one of another dtype than the kernel's, or on another device than the others.
    """
    for tensor in tensors:
        if tensor.dtype is not kernel.dtype or tensor.device != tensors[0].device:
            raise TypeError(
                f"tracetorch::scan: a tensor is {tensor.dtype} on {tensor.device}, the kernel computes in "
                f"{kernel.dtype} and here on {tensors[0].device}; convert the input, or compile or export anew"
            )
    return [tensor.contiguous() for tensor in tensors]


def _given(kernel: Kernel, time_dim: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the kernel takes. Raises `TypeError` as `_as_kernels_take_them` does, and for another number or size."""
    signature = kernel.signature
    inputs, states = len(signature.inputs), len(signature.states)
    if len(tensors) != inputs + states + len(signature.parameters):
        raise TypeError(f"tracetorch::scan: {len(tensors)} tensors given, not those of {signature}")
    shape = geometry(tensors[0].shape, time_dim)
    one, element, whole = {1}, {shape.N, shape.B * shape.N}, tensors[0].numel()
    allowed = [{whole}] * inputs + [{shape.B * shape.N}] * states + [one | element] * len(signature.parameters)
    for tensor, sizes in zip(tensors, allowed, strict=True):
        if tensor.numel() not in sizes:
            raise TypeError(
                f"tracetorch::scan: a tensor of shape {list(tensor.shape)} has not {sorted(sizes)} elements"
            )
    return _as_kernels_take_them(kernel, tensors)


@torch.library.custom_op("tracetorch::scan", mutates_args=(), schema=_SCAN)
def scan(name: str, time_dim: int, given: list[Tensor]) -> list[Tensor]:
    """Outputs, states after the last step, and the saved states, of a sequence; see `fused.scan.forward`."""
    kernel = _kernel(name)
    given = _given(kernel, time_dim, given)
    results, _, saved = _scan.forward(kernel, time_dim, False, True, given)
    count = len(kernel.output_dtypes)
    saved = saved or [state.new_empty((0, *state.shape)) for state in results[count:]]
    outputs = [ys.to(kind) for ys, kind in zip(results, kernel.output_dtypes, strict=False)]
    return [*outputs, *results[count:], *saved]


@scan.register_fake
def _scan_shapes(name: str, time_dim: int, given: list[Tensor]) -> list[Tensor]:
    kernel = _kernel(name)
    inputs = len(kernel.signature.inputs)
    xs, states = given[0], given[inputs : inputs + len(kernel.signature.states)]
    chunks = kernel.saved(xs.shape[time_dim])
    outputs = [torch.empty_like(xs, dtype=kind) for kind in kernel.output_dtypes]
    last = [torch.empty_like(state) for state in states]
    return [*outputs, *last, *(state.new_empty((chunks, *state.shape)) for state in states)]


def _differentiable(kernel: Kernel) -> list[bool]:
    """For each of `given`, whether `scan_backward` gives its gradient."""
    signature = kernel.signature
    before = len(signature.inputs) + len(signature.states)
    return [True] * before + [name in signature.learned for name in signature.parameters]


@torch.library.custom_op("tracetorch::scan_backward", mutates_args=(), schema=_BACKWARD)
def scan_backward(
    name: str, time_dim: int, grads: list[Tensor], given: list[Tensor], saved: list[Tensor]
) -> list[Tensor]:
    """Gradients of the inputs, the first states and the learned parameters; see `fused.scan.backward`."""
    kernel = _kernel(name)
    given = _given(kernel, time_dim, given)
    grads, saved = _as_kernels_take_them(kernel, grads), _as_kernels_take_them(kernel, saved)
    signature = kernel.signature
    wanted = [True] * (len(signature.differentiable_inputs) + len(signature.states))
    found = _scan.backward(kernel, time_dim, wanted, grads, given, saved)
    # What an operation returns may not be part of what it was given, as a sum over nothing would be.
    return [gradient.clone() for gradient in found if gradient is not None]


@scan_backward.register_fake
def _backward_shapes(
    name: str, time_dim: int, grads: list[Tensor], given: list[Tensor], saved: list[Tensor]
) -> list[Tensor]:
    return [torch.empty_like(t) for t, has in zip(given, _differentiable(_kernel(name)), strict=True) if has]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    name, time_dim, given = inputs
    signature = _kernel(name).signature
    ctx.name, ctx.time_dim, ctx.count = name, time_dim, len(given)
    ctx.save_for_backward(*given, *output[len(signature.outputs) + len(signature.states) :])


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    kernel = _kernel(ctx.name)
    signature = kernel.signature
    tensors = ctx.saved_tensors
    given, saved = tensors[: ctx.count], tensors[ctx.count :]
    inputs = len(signature.inputs)
    likes = [*[given[0]] * len(signature.outputs), *given[inputs : inputs + len(signature.states)]]
    dense = zip(grads, likes, strict=False)  # the saved states get none
    d_results = [torch.zeros_like(like) if g is None else g.to(like.dtype) for g, like in dense]
    found = iter(scan_backward(ctx.name, ctx.time_dim, d_results, given, saved))
    return None, None, [next(found) if has else None for has in _differentiable(kernel)]


scan.register_autograd(_differentiate, setup_context=_setup)
