"""A layer's whole sequence as one kernel call, differentiable."""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tracetorch.fused import compiler, kernel_c, memory
from tracetorch.fused.trace import StepFunction, Traced, trace

_PROCESS = os.getpid()
_STREAMED = 2**22  # elements of a sequence from which outputs are written past the caches


def _threads() -> int:
    # After a parallel region, a forked child hangs in the next one: it runs serially.
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


@dataclass(frozen=True)
class Kernel(ABC):
    """A step compiled for one dtype. `learned` are the parameters that get a gradient.

    `chunk` is the number of steps between two saved states; the layouts name what the two functions take, in order.
    """

    traced: Traced
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    learned: tuple[str, ...]
    dtype: torch.dtype
    output_dtype: torch.dtype
    source: str
    chunk: int
    forward_layout: kernel_c.Layout
    backward_layout: kernel_c.Layout

    @abstractmethod
    def call(
        self, function: str, layout: kernel_c.Layout, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, int]
    ) -> None:
        """Run "forward" or "backward". Tensors must stay referenced by the caller until it returns."""


@dataclass(frozen=True)
class CKernel(Kernel):
    """Of the C renderer."""

    library: ctypes.CDLL

    def call(
        self, function: str, layout: kernel_c.Layout, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, int]
    ) -> None:
        """As `Kernel.call`."""
        pointers = [0 if tensors[name] is None else tensors[name].data_ptr() for name in layout.pointers]  # type: ignore[union-attr]
        values = [numbers[name] for name in layout.integers]
        getattr(self.library, function)(
            (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(values))(*values)
        )


def build(
    step: StepFunction,
    states: Sequence[str],
    parameters: Sequence[str],
    learned: Sequence[str],
    dtype: torch.dtype,
    backward: bool = True,
    backend: str = "cpu",
    device: str = "cpu",
) -> Kernel:
    """Trace and compile a step.

    Args:
        step: takes `x`, the states and the parameters by name; returns the output and the new states.
        states, parameters: names, in order.
        learned: parameters whose gradients are wanted.
        dtype: float32 or float64, of all of them.
        backward: whether to build the backward kernel too. Without it nothing of autograd is used, which a process
            forked after a backward pass could not.
        backend: "cpu" (C) or "triton", which compiles at the first call.
        device: the device type of the tensors: "cpu", or with "triton" also "cuda".

    Raises:
        GraphError: a step that is not pointwise, or an operation without a form in the backend's language; names it.
        CompilerError: no C compiler.
    """
    example = {name: torch.full((8,), 0.5, dtype=dtype) for name in ("x", *states, *parameters)}
    wanted = ("x", *states, *learned) if backward else ()
    traced = trace(step, example, states, wanted, carried=learned)
    return compiled(traced, states, parameters, learned, dtype, backend, device)


def compiled(
    traced: Traced,
    states: Sequence[str],
    parameters: Sequence[str],
    learned: Sequence[str],
    dtype: torch.dtype,
    backend: str = "cpu",
    device: str = "cpu",
) -> Kernel:
    """The kernel of a traced step; arguments and errors as in `build`."""
    output = traced.forward.dtype(dict(traced.forward.outputs)["output"])
    common = (traced, tuple(states), tuple(parameters), tuple(learned), dtype, output)
    if backend == "triton":
        from tracetorch.fused import launch_triton

        return launch_triton.kernel(*common, device)
    text = kernel_c.source(traced, states, parameters, learned, dtype)
    layouts = (
        kernel_c.forward_layout(states, parameters),
        kernel_c.backward_layout(states, parameters, learned),
    )
    return CKernel(*common, text, kernel_c.CHUNK, *layouts, compiler.load(text))


@dataclass(frozen=True)
class _Shape:
    """How a sequence is addressed: T steps of B times N elements."""

    T: int
    B: int
    N: int
    x_t: int
    x_b: int
    y_t: int
    y_b: int

    def numbers(self, parameters: Mapping[str, Tensor]) -> dict[str, int]:
        values = {name: getattr(self, name) for name in ("T", "B", "N", "x_t", "x_b", "y_t", "y_b")}
        for name, tensor in parameters.items():
            whole = tensor.numel() == self.B * self.N and tensor.numel() > 1
            values[f"{name}_b"] = self.N if whole and self.B > 1 else 0
            values[f"{name}_n"] = 0 if tensor.numel() == 1 else 1
        return {**values, "threads": _threads(), "stream": int(self.T * self.B * self.N >= _STREAMED)}


def _shape(xs: Tensor, time_dim: int) -> _Shape:
    steps = xs.shape[time_dim]
    if time_dim == 0:
        n = xs[0].numel() if steps else 0
        return _Shape(steps, 1, n, n, 0, n, 0)
    batch = xs.shape[0]
    n = xs.numel() // max(1, batch * steps)
    return _Shape(steps, batch, n, n, steps * n, n, steps * n)


class _Scan(torch.autograd.Function):
    """Inputs: kernel, time_dim, whether to record and to save states, x, the states, the expanded parameters."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, time_dim: int, record: bool, save: bool, xs: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        shape = _shape(xs, time_dim)
        first = dict(zip(kernel.states, rest, strict=False))
        parameters = dict(zip(kernel.parameters, rest[len(kernel.states) :], strict=True))
        ys = memory.empty_like(xs)
        chunks = -(-shape.T // kernel.chunk)
        tensors: dict[str, Any] = {"x": xs, "y": ys, **parameters}
        for name, state in first.items():
            tensors[f"first_{name}"] = state
            tensors[f"last_{name}"] = memory.empty_like(state)
            tensors[f"saved_{name}"] = memory.empty_like(state, chunks) if save else None
            tensors[f"record_{name}"] = memory.empty_like(xs) if record else None
        kernel.call("forward", kernel.forward_layout, tensors, shape.numbers(parameters))
        ctx.kernel, ctx.shape, ctx.time_dim = kernel, shape, time_dim
        ctx.save_for_backward(xs, *rest, *(tensors[f"saved_{name}"] for name in kernel.states))
        recorded = [tensors[f"record_{name}"] for name in kernel.states] if record else []
        ctx.mark_non_differentiable(*recorded)
        ctx.set_materialize_grads(False)
        last = [tensors[f"last_{name}"] for name in kernel.states]
        return (ys, *last, *recorded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kernel, shape = ctx.kernel, ctx.shape
        xs, *rest = ctx.saved_tensors
        count = len(kernel.states)
        parameters = dict(zip(kernel.parameters, rest[count : len(rest) - count], strict=True))
        first = rest[:count]
        d_x = memory.empty_like(xs) if ctx.needs_input_grad[4] else None
        d_y = torch.zeros_like(xs) if grads[0] is None else grads[0].contiguous()
        tensors: dict[str, Tensor | None] = {"x": xs, "d_y": d_y, "d_x": d_x, **parameters}
        for k, name in enumerate(kernel.states):
            tensors[f"saved_{name}"] = rest[len(rest) - count + k]
            d_last = grads[1 + k]
            tensors[f"d_last_{name}"] = torch.zeros_like(first[k]) if d_last is None else d_last.contiguous()
            tensors[f"d_first_{name}"] = memory.empty_like(first[k])
        for name in kernel.learned:
            tensors[f"d_{name}"] = memory.empty_like(first[0])
        kernel.call("backward", kernel.backward_layout, tensors, shape.numbers(parameters))
        d_first = [tensors[f"d_first_{name}"] for name in kernel.states]
        d_parameters = [
            _reduced(tensors[f"d_{name}"], parameters[name], first[0]) if name in kernel.learned else None
            for name in kernel.parameters
        ]
        return (None, None, None, None, d_x, *d_first, *d_parameters)


def _reduced(gradient: Tensor | None, parameter: Tensor, element: Tensor) -> Tensor:
    """A gradient per element, summed to the shape in which the parameter was given."""
    assert gradient is not None
    return gradient.reshape(element.shape).sum_to_size(parameter.shape)


def scan(
    kernel: Kernel,
    xs: Tensor,
    time_dim: int,
    states: Sequence[Tensor],
    parameters: Sequence[Tensor],
    record: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run a sequence: outputs, states after the last step, and, with `record`, states after every step.

    Args:
        xs: [T, B, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`), on the kernel's device, in its dtype.
        states: before the first step, [B, ...].
        parameters: each of one element, or broadcastable against [B, ...].
    """
    xs = xs.contiguous()
    element = states[0].shape
    expanded = []
    for parameter in parameters:
        if parameter.numel() == 1:
            expanded.append(parameter.reshape(()))
        elif time_dim == 1 and parameter.ndim < len(element):
            expanded.append(parameter.expand(element[1:]).contiguous())
        else:
            expanded.append(parameter.expand(element).contiguous())
    inputs = (xs, *(state.contiguous() for state in states), *expanded)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    results = _Scan.apply(kernel, time_dim, record, save, *inputs)
    count = len(kernel.states)
    ys = results[0] if kernel.output_dtype is xs.dtype else results[0].to(kernel.output_dtype)
    return ys, tuple(results[1 : 1 + count]), tuple(results[1 + count :])
