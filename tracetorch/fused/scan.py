"""A layer's whole sequence as one kernel call, differentiable."""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tracetorch.fused import compiler, kernel_c, memory
from tracetorch.fused.emit_c import BLOCK
from tracetorch.fused.graph import GraphError
from tracetorch.fused.trace import StepFunction, Traced, trace

_PROCESS = os.getpid()
_EXAMPLES = ((8,), (2, 5))  # shapes on which a step is traced
_SMALL = 2**14  # elements of a sequence up to which one thread runs it: waking others takes as long
_STREAMED = 2**19  # elements of a sequence from which outputs are written past the caches


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
    # Whether the backward function takes gradients of the states recorded after every step.
    differentiates_records: ClassVar[bool] = False
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
    differentiates_records: ClassVar[bool] = True

    def call(
        self, function: str, layout: kernel_c.Layout, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, int]
    ) -> None:
        """As `Kernel.call`."""
        given = [tensors[name] for name in layout.pointers]
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in given]
        values = [numbers[name] for name in layout.integers]
        # The arrays are freed when the call has returned; ctypes keeps one type for each length.
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
    names = ("x", *states, *parameters)
    one, other = ({name: torch.full(shape, 0.5, dtype=dtype) for name in names} for shape in _EXAMPLES)
    wanted = ("x", *states, *learned) if backward else ()
    traced = trace(step, one, states, wanted, carried=learned)
    # A size read in Python (x.shape, x.numel()) would become a number in the kernel, right for the example alone.
    if trace(step, other, states, wanted, carried=learned) != traced:
        raise GraphError("the step's arithmetic depends on the shape of its input, so it is no function of one element")
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
class Geometry:
    """How a sequence is addressed: T steps of B times N elements."""

    T: int
    B: int
    N: int
    x_t: int
    x_b: int
    y_t: int
    y_b: int

    def numbers(self, parameters: Mapping[str, Tensor]) -> dict[str, int]:
        """The integers that a kernel takes, by name."""
        work = self.T * self.B * self.N
        threads = 1 if work < _SMALL else _threads()
        # Where there are fewer blocks than threads, narrower ones: whole strips, so that vectors stay full.
        share = -(-self.B * self.N // threads) // max(1, self.B)
        width = min(BLOCK, max(kernel_c.STRIP, -(-share // kernel_c.STRIP) * kernel_c.STRIP))
        values = {
            "T": self.T, "B": self.B, "N": self.N, "x_t": self.x_t, "x_b": self.x_b, "y_t": self.y_t, "y_b": self.y_b,
            "threads": threads, "stream": int(work >= _STREAMED), "width": width,
        }  # fmt: skip
        for name, tensor in parameters.items():
            size = tensor.numel()
            values[f"{name}_b"] = self.N if self.B > 1 and 1 < size == self.B * self.N else 0
            values[f"{name}_n"] = 0 if size == 1 else 1
        return values


def geometry(xs: Tensor, time_dim: int) -> Geometry:
    """Of a contiguous sequence, [T, B, ...] or [B, T, ...]."""
    steps = xs.shape[time_dim]
    if time_dim == 0:
        n = xs.numel() // max(1, steps)
        return Geometry(steps, 1, n, n, 0, n, 0)
    batch = xs.shape[0]
    n = xs.numel() // max(1, batch * steps)
    return Geometry(steps, batch, n, n, steps * n, n, steps * n)


def forward(
    kernel: Kernel, time_dim: int, record: bool, save: bool, xs: Tensor, rest: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """One call of the forward kernel, without autograd.

    Args:
        record: whether to give the states after every step.
        save: whether to keep what the backward kernel needs.
        xs: contiguous.
        rest: the states before the first step, then the parameters, contiguous, as `expanded` gives them.

    Returns:
        The outputs and the states after the last step; the recorded states; the saved ones.
    """
    shape = geometry(xs, time_dim)
    count = len(kernel.states)
    chunks = -(-shape.T // kernel.chunk)
    parameters = dict(zip(kernel.parameters, rest[count:], strict=True))
    tensors: dict[str, Tensor | None] = {"x": xs, "y": memory.empty_like(xs), **parameters}
    for name, state in zip(kernel.states, rest, strict=False):
        tensors[f"first_{name}"] = state
        tensors[f"last_{name}"] = memory.empty_like(state)
        tensors[f"saved_{name}"] = memory.empty_like(state, chunks) if save else None
        tensors[f"record_{name}"] = memory.empty_like(xs) if record else None
    kernel.call("forward", kernel.forward_layout, tensors, shape.numbers(parameters))

    def of(*kinds: str) -> list[Tensor]:
        return [t for kind in kinds for name in kernel.states if (t := tensors[f"{kind}_{name}"]) is not None]

    ys = tensors["y"]
    assert ys is not None
    return [ys, *of("last")], of("record"), of("saved")


def backward(
    kernel: Kernel,
    time_dim: int,
    want_x: bool,
    grads: Sequence[Tensor | None],
    xs: Tensor,
    rest: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """One call of the backward kernel.

    Args:
        want_x: whether the gradient of the input is wanted.
        grads: of the outputs, of each state after the last step and, if there are more, of the recorded states; None
            is zero.
        xs, rest, saved: as `forward` took and gave them.

    Returns:
        Gradients of the input, of the states before the first step, and of the parameters, each reduced to the
        parameter's shape and None where none is learned.
    """
    shape = geometry(xs, time_dim)
    count = len(kernel.states)
    first, parameters = rest[:count], dict(zip(kernel.parameters, rest[count:], strict=True))
    d_y = torch.zeros_like(xs) if grads[0] is None else grads[0].contiguous()
    d_x = memory.empty_like(xs) if want_x else None
    tensors: dict[str, Tensor | None] = {"x": xs, "d_y": d_y, "d_x": d_x, **parameters}
    for k, name in enumerate(kernel.states):
        d_last, d_record = grads[1 + k], grads[1 + count + k] if len(grads) > 1 + count else None
        tensors[f"saved_{name}"] = saved[k]
        tensors[f"d_last_{name}"] = torch.zeros_like(first[k]) if d_last is None else d_last.contiguous()
        tensors[f"d_record_{name}"] = None if d_record is None else d_record.contiguous()
        tensors[f"d_first_{name}"] = memory.empty_like(first[k])
    for name in kernel.learned:
        tensors[f"d_{name}"] = memory.empty_like(first[0])
    kernel.call("backward", kernel.backward_layout, tensors, shape.numbers(parameters))
    d_first = [gradient for name in kernel.states if (gradient := tensors[f"d_first_{name}"]) is not None]
    d_parameters = [
        _reduced(tensors[f"d_{name}"], parameters[name], first[0]) if name in kernel.learned else None
        for name in kernel.parameters
    ]
    return d_x, d_first, d_parameters


class _Scan(torch.autograd.Function):
    """Inputs: kernel, time_dim, whether to record, x, the states, the expanded parameters."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, time_dim: int, record: bool, xs: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        results, recorded, saved = forward(kernel, time_dim, record, True, xs, rest)
        ctx.kernel, ctx.time_dim, ctx.count = kernel, time_dim, len(rest)
        ctx.save_for_backward(xs, *rest, *saved)
        if not kernel.differentiates_records:
            ctx.mark_non_differentiable(*recorded)
        ctx.set_materialize_grads(False)
        return (*results, *recorded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        xs, *others = ctx.saved_tensors
        rest, saved = others[: ctx.count], others[ctx.count :]
        d_x, d_first, d_parameters = backward(
            ctx.kernel, ctx.time_dim, ctx.needs_input_grad[3], grads, xs, rest, saved
        )
        return (None, None, None, d_x, *d_first, *d_parameters)


def _reduced(gradient: Tensor | None, parameter: Tensor, element: Tensor) -> Tensor:
    """A gradient per element, summed to the shape in which the parameter was given."""
    assert gradient is not None
    return gradient.reshape(element.shape).sum_to_size(parameter.shape)


def expanded(parameter: Tensor, element: torch.Size, time_dim: int) -> Tensor:
    """A parameter as the kernel takes it: of no dimension, one for each neuron, or one for each element [B, ...]."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    shape = element[1:] if time_dim == 1 and parameter.ndim < len(element) else element
    return parameter.expand(shape).contiguous()


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
    rest = [state.contiguous() for state in states]
    rest += [expanded(parameter, element, time_dim) for parameter in parameters]
    count = len(kernel.states)
    if torch.is_grad_enabled() and (xs.requires_grad or any(tensor.requires_grad for tensor in rest)):
        results = _Scan.apply(kernel, time_dim, record, xs, *rest)
        ys, last, recorded = results[0], results[1 : 1 + count], results[1 + count :]
    else:
        (ys, *last), recorded, _ = forward(kernel, time_dim, record, False, xs, rest)
    if kernel.output_dtype is not xs.dtype:
        ys = ys.to(kernel.output_dtype)
    return ys, tuple(last), tuple(recorded)
