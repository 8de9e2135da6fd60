"""Which tensors a native layer's step reads, and the kernel for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracetorch.fused.build import build
from tracetorch.fused.callers import untouched
from tracetorch.fused.graph import GraphError
from tracetorch.fused.kernel import Kernel
from tracetorch.fused.reads import Reads, read

if TYPE_CHECKING:
    from tracetorch.core.layer import Layer

_OURS = ("kernels", "overrides", "baked", "trail")  # attributes of `Layer` that no step reads
_KEPT = 64  # kernels of one layer


def others_of(layer: Layer) -> dict[str, Tensor]:
    """Every parameter and buffer beside the states and the declared parameters, by path.

    Without those of integers: a kernel reads floating point alone, so a step that reads one is refused by the tracer.
    """
    hidden = {layer.raw_attribute(name) for name in layer.raw_forms} | set(layer.state_names)
    # One tensor under two names stands twice: a step may read it by either.
    found = (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False))
    return {path: t for path, t in found if path not in hidden and t.is_floating_point()}


def tensors_of(layer: Layer) -> dict[str, Tensor]:
    """What the step reads: the values of the declared parameters, and every other parameter and buffer, by path."""
    return {**{name: layer.value(name) for name in layer.raw_forms}, **others_of(layer)}


@contextmanager
def _replaced(layer: Layer, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors where those of `tensors_of` are, for tracing, and back; `GraphError` if the step puts others."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    put: dict[tuple[int, str], Tensor] = {}  # the last one in each place: a module under two names has two paths
    layer.overrides.update((name, tensors[name]) for name in layer.raw_forms)
    try:
        for path, tensor in tensors.items():
            if path in layer.raw_forms:
                continue
            owner, _, name = path.rpartition(".")
            module = layer.get_submodule(owner)
            store: Any = module._parameters if name in module._parameters else module._buffers
            saved.append((store, name, store[name]))
            put[id(store), name] = store[name] = tensor
        yield
        changed = {name for store, name, _ in saved if store.get(name) is not put[id(store), name]}
        if changed:
            raise GraphError(
                f"the step changes {', '.join(sorted(changed))} of its layer, which is no state; define_state"
            )
    finally:
        layer.overrides.clear()
        for store, name, tensor in reversed(saved):
            store[name] = tensor


def reads_of(layer: Layer) -> Reads:
    """What a step can read, and so what a kernel depends on; the last walk's result as long as nothing changed."""
    reads: Reads | None = layer.kernels.get("reads")
    if reads is None or not reads.unchanged():
        reads = layer.kernels["reads"] = read(layer, (*layer.state_names, *_OURS))
        if reads.odd:
            raise GraphError(f"{type(layer).__name__}: {reads.odd}, which no kernel reads")
    return reads


def kernel_of(
    layer: Layer, tensors: Mapping[str, Tensor], dtype: torch.dtype, backward: bool, backend: str, device: str
) -> Kernel:
    """The kernel of a layer as it is configured now, built where there is none yet.

    Args:
        tensors: as `tensors_of` gives them; a gradient is wanted of those that require one.
        dtype: float32 or float64, of the sequences.
        backward: whether the backward kernel is needed too.
        backend, device: as of `build`.

    Raises:
        GraphError: a step that is not pointwise, changes an attribute, or reads what no kernel reads; names it.
        CompilerError: no C compiler.
    """
    learned = tuple(name for name, tensor in tensors.items() if backward and tensor.requires_grad)
    scalars = tuple(name for name, tensor in tensors.items() if not tensor.ndim)
    key = (backend, device, dtype, learned, scalars, backward, None if _exporting(layer) else reads_of(layer).guard)
    found: Kernel | None = layer.kernels.get(key)
    if found is not None:
        return found

    def step(given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        with _replaced(layer, {name: given[name] for name in tensors}):
            return layer.step(*(given[name] for name in (*inputs, *layer.state_names)))

    inputs = layer.input_names
    names = (layer.state_names, tuple(tensors), learned)
    with untouched(layer, _OURS):
        kernel = build(step, *names, dtype, backward, backend, device, inputs, layer.output_names, scalars)
    layer.kernels[key] = kernel
    built = [each for each, value in layer.kernels.items() if isinstance(value, Kernel)]
    if len(built) > _KEPT:  # a value that changes at every call, annealed for instance
        del layer.kernels[built[0]]
    return kernel


def _exporting(layer: Layer) -> bool:
    """Whether `torch.export` looks at the layer: its tensors stand for others then, and it changes no more."""
    return torch.compiler.is_compiling() and any(type(t) not in (Tensor, nn.Parameter) for t in layer.parameters())
