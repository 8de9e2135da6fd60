"""The three gradients of an online layer: from the average input, per step from eligibility traces, and exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tracetorch.core.layer import Layer
from tracetorch.core.raw import from_raw

if TYPE_CHECKING:
    from tracetorch.nn.online import Online


def scan(layer: Layer, xs: Tensor) -> Tensor:
    """A part over a whole sequence [B, T, n], as one kernel where one fits, or one step [B, n]."""
    return layer.unroll(xs, time_dim=1) if xs.ndim == 3 else layer(xs)


def advance(layer: Layer, xs: Tensor) -> Tensor:
    """`scan` where no graph is made: one step is the step's arithmetic and nothing else."""
    if xs.ndim == 3:
        return layer.unroll(xs, time_dim=1)
    before: dict[str, Any] = layer._buffers
    output, *after = layer.step(xs, *(before[name] for name in layer.state_names))
    before.update(zip(layer.state_names, after, strict=True))
    return output


# ---- average ---------------------------------------------------------------------------------------------------------


class Latest:
    """The trace of one stream and its sensitivity, as they stand after its last call.

    The outputs of all calls of a stream hold this one object, so that they keep nothing of their own.
    """

    __slots__ = ("sensitivity", "trace")

    def __init__(self, trace: Tensor, sensitivity: Tensor) -> None:
        self.trace, self.sensitivity = trace, sensitivity


def _first_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that refuses `create_graph=True`.

    What a rule gives is no derivative of what was computed, so a second derivative would mean nothing; torch's own
    `once_differentiable` leaves it out without a word where the incoming gradient is a constant.
    """

    @wraps(backward)
    def refusing(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the learning rules average and ottt have no second derivatives: backward with create_graph=True needs "
                "rule='bptt'"
            )
        return backward(ctx, *grads)

    return refusing


class _FromAverage(torch.autograd.Function):
    """Forward: what `run` computes. Backward: through the stationary response to the average input.

    Nothing is saved: the trace is that of the stream when backward runs, and so are the parameters.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[], tuple[Tensor, Latest]], layer: Online, *inputs: Tensor | None) -> Tensor:
        outputs, ctx.latest = run()
        ctx.respond, ctx.forms = layer.respond, [form for _, form in layer.raw_values()]
        ctx.inputs = inputs[1:]
        ctx.steps = outputs.shape[1] if outputs.ndim == 3 else None
        return outputs

    @staticmethod
    @_first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        signal = grads[0] if ctx.steps is None else grads[0].sum(1)
        _, _, below, *wanted = ctx.needs_input_grad
        found = _average_gradients(ctx.latest, ctx.respond, ctx.forms, ctx.inputs, [*wanted, below], signal)
        passed = found.pop()
        if passed is not None and ctx.steps is not None:
            passed = (passed / max(ctx.steps, 1)).unsqueeze(1).expand(-1, ctx.steps, -1)
        return None, None, passed, *found


def _average_gradients(
    latest: Latest,
    respond: Callable[..., Tensor],
    forms: Sequence[str],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    signal: Tensor,
) -> list[Tensor | None]:
    """Of `signal` [B, out] times the response, with respect to weight, bias, the raw decays..., and the average input.

    The average input is trace*(1 - d). Its derivative with respect to d is sensitivity*(1 - d) - trace.
    """
    with torch.enable_grad():
        weight, bias, *raws = [None if t is None else t.detach().requires_grad_() for t in inputs]
        assert weight is not None
        d, *others = [from_raw(form, raw) for form, raw in zip(forms, raws, strict=True) if raw is not None]
        trace = latest.trace + latest.sensitivity * (d - d.detach())
        average = trace * (1 - d)
        response = respond(F.linear(average, weight, bias), *others)
        candidates = [weight, bias, *raws, average]
        chosen = [t for t, asked in zip(candidates, wanted, strict=True) if asked and t is not None]
        grads = iter(torch.autograd.grad(response, chosen, signal))
    return [next(grads) if asked and t is not None else None for t, asked in zip(candidates, wanted, strict=True)]


def average(layer: Online, x: Tensor) -> Tensor:
    """Outputs whose gradient is that of the stationary response to the average input."""

    def run() -> tuple[Tensor, Latest]:
        latest = layer.latest()
        outputs = advance(layer.membrane, F.linear(x, layer.weight, layer.bias))
        advance(layer.input_trace, x)
        latest.trace, latest.sensitivity = layer.input_trace.presynaptic, layer.input_trace.sensitivity
        return outputs, latest

    raws = [raw for raw, _ in layer.raw_values()]
    return _FromAverage.apply(run, layer, x, layer.weight, layer.bias, *raws)


# ---- ottt ------------------------------------------------------------------------------------------------------------


class _Carried(torch.autograd.Function):
    """The membrane before a call as a function of the parameters, by its eligibility; no earlier step is kept."""

    @staticmethod
    def forward(ctx: Any, mem: Tensor, kept: Mapping[str, Tensor], *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(*kept.values())
        ctx.shapes = [None if p is None else p.shape for p in parameters]
        return mem.clone()

    @staticmethod
    @_first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        by_weight, *others = ctx.saved_tensors
        shared = by_weight.shape[1] == 1
        weight = grad.t() @ by_weight[:, 0] if shared else torch.einsum("bo,boi->oi", grad, by_weight)
        pairs = zip(others, ctx.shapes[1:], strict=False)  # a membrane without a threshold has no shape for the last
        sized = [None if shape is None else (grad * other).sum(0).sum_to_size(shape) for other, shape in pairs]
        return None, None, weight, *sized


class _Instantly(torch.autograd.Function):
    """The identity of `value`, which passes x its gradient too, through the weight and no further back in time."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return value.clone()

    @staticmethod
    @_first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grads[0], grads[0] @ weight, None


def ottt(layer: Online, x: Tensor) -> Tensor:
    """Outputs whose gradient at each step goes to that step alone, and to the parameters by eligibility traces.

    Within a call the parameters' part is computed in reverse through the call's steps, from one call to the next by
    `Eligibility`; both are the same sum.
    """
    membrane, eligibility = layer.membrane, layer.eligibility
    start = membrane.mem
    kept = eligibility.save_states()
    if torch.is_grad_enabled() and kept["by_weight"] is not None:
        membrane.mem = _Carried.apply(start, kept, layer.weight, layer.bias, *layer.membrane_values())
    values = scan(membrane, F.linear(x.detach(), layer.weight, layer.bias))
    outputs = layer.emit(_Instantly.apply(values, x, layer.weight) if x.requires_grad else values)
    membrane.detach_states()
    with torch.no_grad():
        advance(layer.input_trace, x)
        after, spikes = layer.after(values)
        sequence = after if after.ndim == 3 else after.unsqueeze(1)
        before = torch.cat([start.unsqueeze(1), sequence], 1)[:, :-1]
        fired = spikes if spikes is None or spikes.ndim == 3 else spikes.unsqueeze(1)
        eligibility.advance(x if x.ndim == 3 else x.unsqueeze(1), before, fired, layer.mem_decay)
    return outputs


# ---- bptt ------------------------------------------------------------------------------------------------------------


def bptt(layer: Online, x: Tensor) -> Tensor:
    """Outputs with the exact gradient, through all steps since the states were reset or detached."""
    outputs = scan(layer.membrane, F.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        advance(layer.input_trace, x.detach())
    return outputs


RULES: Mapping[str, Callable[[Online, Tensor], Tensor]] = {"average": average, "ottt": ottt, "bptt": bptt}
