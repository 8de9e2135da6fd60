"""A native layer's `unroll` as one kernel: which tensors its step reads, and the kernel for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracetorch.fused import executor, launch_triton
from tracetorch.fused.scan import Kernel, build, scan

if TYPE_CHECKING:
    from tracetorch.core.layer import Layer

_DTYPES = (torch.float32, torch.float64)
_PLAIN = (bool, int, float, str, type(None))


class FuseError(RuntimeError):
    """A layer or an input that the chosen executor cannot run; names both."""


def _tensors(layer: Layer) -> dict[str, Tensor]:
    """What the step reads: the values of the declared parameters, and every other parameter and buffer, by path."""
    found = {name: layer.value(name) for name in layer.raw_forms}
    hidden = {layer.raw_attribute(name) for name in layer.raw_forms} | set(layer.state_names)
    for path, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if path not in hidden:
            found[path] = tensor
    return found


@contextmanager
def _replaced(layer: Layer, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of those of `_tensors`, for tracing, and back."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    layer.overrides = {name: tensors[name] for name in layer.raw_forms}
    try:
        for path, tensor in tensors.items():
            if path in layer.raw_forms:
                continue
            owner, _, name = path.rpartition(".")
            module = layer.get_submodule(owner)
            store: Any = module._parameters if name in module._parameters else module._buffers
            saved.append((store, name, store[name]))
            store[name] = tensor
        yield
    finally:
        layer.overrides = {}
        for store, name, tensor in saved:
            store[name] = tensor


def _guard(layer: Layer) -> tuple[Any, ...]:
    """Every Python value that a step can read from its modules: plain ones by value, others by identity."""
    seen: list[Any] = []
    for module in layer.modules():
        seen.append(type(module))
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules", "overrides", "kernels"):
                seen.append((name, value if isinstance(value, _PLAIN) else id(value)))
    return tuple(seen)


def _kernel(
    layer: Layer, tensors: Mapping[str, Tensor], dtype: torch.dtype, backward: bool, backend: str, device: str
) -> Kernel:
    learned = tuple(name for name, tensor in tensors.items() if tensor.requires_grad and backward)
    key = (backend, device, dtype, tuple(tensors), learned, backward, _guard(layer))
    if key not in layer.kernels:

        def step(given: Mapping[str, Tensor]) -> Sequence[Tensor]:
            with _replaced(layer, {name: given[name] for name in tensors}):
                return layer.step(given["x"], *(given[name] for name in layer.state_names))

        layer.kernels[key] = build(step, layer.state_names, tuple(tensors), learned, dtype, backward, backend, device)
    return layer.kernels[key]


def _aligned(tensor: Tensor, layer: Layer, ndim: int) -> Tensor:
    """A parameter of one value per neuron, shaped to broadcast against [B, ...] with the neurons at `layer.dim`."""
    if layer.num_neurons is None or tensor.ndim != 1:
        return tensor
    after = -1 - layer.dim if layer.dim < 0 else ndim - 1 - layer.dim
    return tensor.reshape(-1, *([1] * after))


def _check(name: str, xs: Tensor, time_dim: int, tensors: Mapping[str, Tensor], backend: str) -> None:
    """Raises `FuseError` unless the backend runs this input with these tensors."""
    device = "cpu" if backend == "cpu" or launch_triton.interpreted() else "cuda"
    if xs.device.type != device or xs.dtype not in _DTYPES:
        raise FuseError(
            f"{name}: the {backend} backend runs float32 and float64 tensors on {device.upper()} here, not {xs.dtype} "
            f"on {xs.device}"
        )
    if time_dim not in (0, 1) or xs.ndim < 2 + time_dim:
        raise FuseError(
            f"{name}: time_dim={time_dim} with an input of shape {list(xs.shape)}; [T, B, ...] or [B, T, ...]"
        )
    for path, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype is not xs.dtype:
            raise FuseError(f"{name}: {path} is {tensor.dtype}, the input {xs.dtype}; convert one of them")
        if tensor.device != xs.device:
            raise FuseError(f"{name}: {path} is on {tensor.device}, the input on {xs.device}; move one of them")


def unroll(layer: Layer, xs: Tensor, time_dim: int, record: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """`layer.unroll` through one kernel; states carry on. Returns outputs and, with `record`, states after every step.

    Raises:
        FuseError: not on the backend's device, not float32 or float64, parameters of another dtype or device, or no
            such time dimension.
        GraphError: a step that is not pointwise; names the operation.
    """
    name = type(layer).__name__
    backend, tensors = executor.current(), _tensors(layer)
    _check(name, xs, time_dim, tensors, backend)
    example = (
        xs.select(time_dim, 0)
        if xs.shape[time_dim]
        else xs.new_zeros([s for k, s in enumerate(xs.shape) if k != time_dim])
    )
    layer.check_input(example)
    states = [layer.state(state, example) for state in layer.state_names]
    needed = any(tensor.requires_grad for tensor in (xs, *states, *tensors.values()))
    kernel = _kernel(layer, tensors, xs.dtype, needed and torch.is_grad_enabled(), backend, xs.device.type)
    aligned = [_aligned(tensor, layer, example.ndim) for tensor in tensors.values()]
    ys, last, recorded = scan(kernel, xs, time_dim, states, aligned, record)
    for state, value in zip(layer.state_names, last, strict=True):
        setattr(layer, state, value)
    return ys, dict(zip(layer.state_names, recorded, strict=False))


def source(layer: nn.Module, backend: str, backward: bool = False, dtype: torch.dtype = torch.float32) -> str:
    """The generated kernel of a native layer, as text; deterministic.

    Args:
        layer: a native layer.
        backend: "cpu" for C, or "triton" for Triton on CUDA, which needs neither Triton nor a GPU.
        backward: the backward kernel too.
        dtype: of its tensors.

    Raises:
        ValueError: another backend.
        GraphError: a step that is not pointwise; names the operation.
    """
    from tracetorch.core.layer import Layer

    if backend not in executor.COMPILED:
        raise ValueError(f"source: backend {backend!r} has no source; use one of {', '.join(executor.COMPILED)}")
    if not isinstance(layer, Layer):
        raise ValueError(f"source: {type(layer).__name__} is not a native layer")
    device = "cuda" if backend == "triton" else "cpu"
    return _kernel(layer, _tensors(layer), dtype, backward, backend, device).source
