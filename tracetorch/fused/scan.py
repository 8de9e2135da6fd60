"""A layer's whole sequence as one kernel call, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tracetorch.core.once import first_only
from tracetorch.fused import memory
from tracetorch.fused.kernel import Kernel, layout
from tracetorch.fused.signature import Signature


def forward(
    kernel: Kernel, time_dim: int, record: bool, save: bool, given: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """One call of the forward kernel, without autograd.

    Args:
        record: whether to give the states after every step.
        save: whether to keep what the backward kernel needs.
        given: the inputs, the states before the first step (None is zero) and the parameters, contiguous, as `prepared`
            gives them.

    Returns:
        The outputs and the states after the last step; the recorded states; the saved ones, if any.
    """
    signature = kernel.signature
    inputs, states, parameters = _cut(given, len(signature.inputs), len(signature.states))
    xs = inputs[0]
    shape, row = layout(xs.shape, time_dim)
    chunks = kernel.saved(shape.T) if save else 0
    results = [memory.empty_like(xs) for _ in signature.outputs]
    recorded: list[Tensor] = []
    saved: list[Tensor] = []
    pointers: list[Tensor | None] = [*inputs, *results]
    for state in states:
        last = memory.new_empty(xs, row)
        pointers += (state, last, None, None)
        results.append(last)
        if chunks:
            saved.append(memory.new_empty(xs, (chunks, *row)))
            pointers[-2] = saved[-1]
        if record:
            recorded.append(memory.empty_like(xs))
            pointers[-1] = recorded[-1]
    pointers += parameters
    kernel.call("forward", pointers, shape, tuple([p.numel() for p in parameters]))
    return results, recorded, saved


def backward(
    kernel: Kernel,
    time_dim: int,
    wanted: Sequence[bool],
    grads: Sequence[Tensor | None],
    given: Sequence[Any],
    saved: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """One call of the backward kernel.

    Args:
        wanted: for each input that has one and each state, whether its gradient is wanted.
        grads: of the outputs, of each state after the last step and, if there are more, of the recorded states; None
            is zero.
        given, saved: as `forward` took and gave them.

    Returns:
        Gradients of `given`: of the inputs and the states before the first step where wanted, and of the learned
        parameters, each reduced to the parameter's shape; else None.
    """
    signature = kernel.signature
    inputs, states, parameters = _cut(given, len(signature.inputs), len(signature.states))
    xs = inputs[0]
    shape, row = layout(xs.shape, time_dim)
    d_outputs, d_last, d_recorded = _cut(grads, len(signature.outputs), len(states))
    rows = [_row_or_all(kernel, d, xs, time_dim, row) for d in d_outputs]
    count = len(signature.differentiable_inputs)
    d_inputs = [memory.empty_like(xs) if want else None for want in wanted[:count]]
    d_first = [memory.new_empty(xs, row) if want else None for want in wanted[count:]]
    pointers: list[Tensor | None] = [*inputs, *[d for d, _ in rows], *d_inputs]
    for k, first in enumerate(states):
        pointers += (first, saved[k] if saved else None, _whole(d_last[k]))
        pointers += (_whole(d_recorded[k]) if d_recorded else None, d_first[k])
    sums = [memory.new_empty(xs, row) for _ in signature.learned]
    pointers += (*parameters, *sums)
    still = tuple([same for _, same in rows])
    kernel.call("backward", pointers, shape, tuple([p.numel() for p in parameters]), still)
    # A gradient per element, summed to the shape in which the parameter was given.
    places = dict(zip(signature.learned, sums, strict=True))
    d_parameters = [
        _summed(places[name], parameter.shape) if name in places else None
        for name, parameter in zip(signature.parameters, parameters, strict=True)
    ]
    return [*d_inputs, *[None] * len(signature.draws), *d_first, *d_parameters]


def _cut(sequence: Sequence[Any], first: int, second: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    return sequence[:first], sequence[first : first + second], sequence[first + second :]


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _summed(gradient: Tensor, shape: torch.Size) -> Tensor:
    return gradient.view(shape) if gradient.numel() == shape.numel() else gradient.sum_to_size(shape)


def _row_or_all(
    kernel: Kernel, gradient: Tensor | None, xs: Tensor, time_dim: int, row: torch.Size
) -> tuple[Tensor, bool]:
    """A sequence's gradient as the kernel takes it, and whether it is one row [B, ...], the same at every step."""
    if gradient is None:
        return (xs.new_zeros(row), True) if kernel.frugal else (torch.zeros_like(xs), False)
    if kernel.frugal and gradient.numel() and not gradient.is_contiguous() and gradient.stride(time_dim) == 0:
        return gradient.select(time_dim, 0).contiguous(), True
    return gradient.contiguous(), False


class _Scan(torch.autograd.Function):
    """Inputs: kernel, time_dim, whether to record, and what `forward` takes as `given`."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, time_dim: int, record: bool, *given: Tensor | None) -> tuple[Tensor, ...]:
        results, recorded, saved = forward(kernel, time_dim, record, True, given)
        ctx.kernel, ctx.time_dim, ctx.count = kernel, time_dim, len(given)
        ctx.save_for_backward(*given, *saved)
        ctx.set_materialize_grads(False)
        return (*results, *recorded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _once(ctx, *grads)
        with torch.no_grad():  # under create_graph=True
            found = _once(ctx, *grads)
        return first_only("a compiled kernel", found, [*ctx.saved_tensors[: ctx.count], *grads])


def _once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, count = [_whole(tensor) for tensor in ctx.saved_tensors], ctx.count
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not ctx.kernel.dtype:
            raise RuntimeError(
                f"a compiled kernel saved {ctx.kernel.dtype}, and a saved-tensor hook gave back {tensor.dtype}"
            )
    if not all(torch._C._has_storage(grad) for grad in grads if grad is not None):
        raise RuntimeError(
            "a compiled kernel takes one gradient of its outputs at a time, no batch of them (is_grads_batched, "
            "vectorize=True); use tt.backend('eager')"
        )
    signature = ctx.kernel.signature
    inputs, states, _ = _cut(ctx.needs_input_grad[3:], len(signature.inputs), len(signature.states))
    wanted = (*inputs[: len(signature.differentiable_inputs)], *states)
    found = backward(ctx.kernel, ctx.time_dim, wanted, grads, tensors[:count], tensors[count:])
    xs: Any = tensors[0]
    there = ctx.kernel.gradients(tuple([grad is not None for grad in grads]), xs.shape[ctx.time_dim])
    return (None, None, None, *(_those(signature, found, there) if there else found))


def _those(signature: Signature, found: Sequence[Tensor | None], there: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that the step loop has too; None, as there, for what reaches no result that has a gradient."""
    places = (*signature.differentiable_inputs, *signature.states, *signature.learned)
    missing = {name for name, is_there in zip(places, there, strict=True) if not is_there}
    names = (*signature.inputs, *signature.states, *signature.parameters)
    return [None if name in missing else each for name, each in zip(names, found, strict=True)]


def expanded(parameter: Tensor, row: torch.Size, time_dim: int, frugal: bool) -> Tensor:
    """A parameter as the kernel takes it: of one element, one for each neuron, or one for each element [B, ...]."""
    if parameter.numel() == 1:
        return parameter if parameter.ndim <= len(row) else parameter.reshape(())
    if frugal:
        shape = row[len(row) - parameter.ndim :]
    else:
        shape = row[1:] if time_dim == 1 and parameter.ndim < len(row) else row
    return (parameter if parameter.shape == shape else parameter.expand(shape)).contiguous()


def prepared(
    inputs: Sequence[Tensor],
    states: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    time_dim: int,
    row: torch.Size,
    frugal: bool = False,
) -> list[Tensor | None]:
    """The tensors as the kernels take them. row: the shape of one step; frugal: the kernel's."""
    return [
        *[xs.contiguous() for xs in inputs],
        *[None if state is None else state.contiguous() for state in states],
        *[expanded(parameter, row, time_dim, frugal) for parameter in parameters],
    ]


def drawn(kernel: Kernel, xs: Tensor, time_dim: int, dim: int = -1) -> list[Tensor]:
    """The random numbers that a kernel takes, in the order in which the step loop would draw them.

    Args:
        xs: the first input as it was given, in its own layout: torch.rand_like draws in the order of memory.
        dim: the dimension of a step that is the step's last one: torch.bernoulli draws in the order of its dimensions.
    """
    draws = kernel.signature.draws
    found = [xs.new_empty(xs.shape) for _ in draws]
    for x, *rows in zip(xs.unbind(time_dim), *(series.unbind(time_dim) for series in found), strict=True):
        for name, row in zip(draws, rows, strict=True):
            if name.startswith("chance"):
                given = row.movedim(dim, -1)
                given.copy_(torch.rand_like(given, memory_format=torch.contiguous_format))
            else:
                row.copy_(torch.rand_like(x))
    return found


def scan(
    kernel: Kernel,
    inputs: Sequence[Tensor],
    time_dim: int,
    states: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    record: bool = False,
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Run a sequence: outputs, states after the last step, and, with `record`, states after every step.

    Args:
        inputs: each [T, B, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`), all of one shape, on the kernel's device,
            in its dtype.
        states: before the first step, [B, ...]; None is zero.
        parameters: each of one element, or broadcastable against [B, ...].

    Returns:
        The outputs, of the inputs' shape, each in the dtype that the step gives it; the last states, [B, ...]; the
        recorded states, of the inputs' shape. Differentiable once.
    """
    given = prepared(inputs, states, parameters, time_dim, layout(inputs[0].shape, time_dim)[1], kernel.frugal)
    results: Sequence[Tensor]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        results = _Scan.apply(kernel, time_dim, record, *given)
    else:
        results, series, _ = forward(kernel, time_dim, record, False, given)
        results += series
    outputs, last, recorded = _cut(results, len(kernel.output_dtypes), len(states))
    if kernel.converts:
        outputs = [ys.to(kind) for ys, kind in zip(outputs, kernel.output_dtypes, strict=True)]
    return outputs, last, recorded
