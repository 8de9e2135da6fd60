"""The orders of operations of snnTorch's neurons (snntorch 1.0.0).

r is the spike of the membrane that the previous step stored, a constant in the backward pass. With `state_levels` every
new state is rounded to the nearest of them, Q, before the spike test; of a winner's inhibition see `_winner`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tracetorch.core.forms.form import Form, Values, beside
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.quantizers import nearest_level
from tracetorch.functional.spikes import heaviside


def _pending(spec: NeuronSpec, p: Values, mem: Tensor) -> Tensor:
    """r: `SpikingNeuron.mem_reset`."""
    assert spec.surrogate is not None
    threshold = p["threshold"]
    return heaviside(mem - threshold, threshold, spec.surrogate, strict=spec.comparison == ">").detach()


def _rounded(spec: NeuronSpec, state: Tensor) -> Tensor:
    """Q: `state_quant`. A state that is rounded stays so when the class rounds it again for its spike test."""
    return state if spec.state_levels is None else nearest_level(state, spec.state_levels)


def _winner(z: Tensor) -> Tensor:
    """1 for the first neuron of each sample with the largest z, 0 for the others: `SpikingNeuron.fire_inhibition`."""
    if z.ndim > 2:
        raise ValueError(f"inhibition='winner': one neuron of [B, N] wins; a step has shape {list(z.shape)}")
    return torch.zeros_like(z).scatter(-1, z.argmax(-1, keepdim=True), 1.0)


def _fire(spec: NeuronSpec, p: Values, u: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the membrane after what `reset_delay=False` takes from it."""
    assert spec.surrogate is not None
    threshold = p["threshold"]
    z = u - threshold
    spikes = heaviside(z, threshold, spec.surrogate, strict=spec.comparison == ">", v=u)
    scale = beside(spec, spikes, p["spike_scale"], "spike_scale") if "spike_scale" in p else None
    if spec.inhibition == "winner":
        output = spikes * _winner(z.detach()).to(spikes.dtype)
    else:
        output = spikes if scale is None else spikes * scale
    if spec.reset_timing == "same_step_residual":
        change = (output if scale is None else output / scale) - r
        if spec.reset == "subtract":
            u = u - change * beside(spec, change, p["threshold"], "threshold")
        elif spec.reset == "value":
            u = u - change * u
    return output, u


def _leaky(spec: NeuronSpec, p: Values, x: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """u = beta*mem + x with the reset r; s = H(u - theta); a same-step reset by s - r."""
    r = _pending(spec, p, mem)
    if spec.reset == "value":
        mem = (1 - r) * mem
    u = p["mem_decay"] * mem + x
    if spec.reset == "subtract":
        u = u - r * beside(spec, r, p["threshold"], "threshold")
    return _fire(spec, p, _rounded(spec, u), r)


def _fed(p: Values, drive: Tensor) -> Tensor:
    """With what a recurrent layer's own spikes of the step before give, where there is one."""
    return drive + p["feedback"] if "feedback" in p else drive


def _rleaky(spec: NeuronSpec, p: Values, x: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """u = beta*mem + x + feedback; minus r*theta, or minus r*u."""
    r = _pending(spec, p, mem)
    u = _fed(p, p["mem_decay"] * mem + x)
    if spec.reset == "subtract":
        u = u - r * beside(spec, r, p["threshold"], "threshold")
    elif spec.reset == "value":
        u = u - r * _fed(p, p["mem_decay"] * mem + x)
    return _fire(spec, p, _rounded(spec, u), r)


def _synaptic(spec: NeuronSpec, p: Values, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """syn = alpha*syn + x; u = beta*mem + syn; minus r*theta, or minus r*u. u is computed twice, as in the class."""

    def base() -> tuple[Tensor, Tensor]:
        current = _fed(p, p["syn_decay"] * syn + x)
        return current, p["mem_decay"] * mem + current

    r = _pending(spec, p, mem)
    current, u = base()
    if spec.reset == "subtract":
        u = u - r * beside(spec, r, p["threshold"], "threshold")
    elif spec.reset == "value":
        u = u - base()[1] * r
    output, u = _fire(spec, p, _rounded(spec, u), r)
    return output, _rounded(spec, current), u


def _lapicque(spec: NeuronSpec, p: Values, x: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """u = gain*x + a*mem, a = 1 - dt/(R C), gain = R (1/(R C)) dt; minus r*theta, or minus r*u."""

    def base() -> Tensor:
        return x * p["input_gain"] + p["mem_decay"] * mem

    r, u = _pending(spec, p, mem), base()
    if spec.reset == "subtract":
        u = u - r * beside(spec, r, p["threshold"], "threshold")
    elif spec.reset == "value":
        u = u - r * base()
    return _fire(spec, p, _rounded(spec, u), r)


def _alpha(spec: NeuronSpec, p: Values, x: Tensor, exc: Tensor, inh: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """e = alpha*e + x; i = beta*i - x; u = k*(e + i), k = ln alpha / (ln beta - ln alpha) + 1; resets of all three."""
    a_s, a = p["syn_decay"], p["mem_decay"]

    def base() -> tuple[Tensor, Tensor, Tensor]:
        e, i = a_s * exc + x, a * inh - x
        k = torch.log(a_s) / (torch.log(a) - torch.log(a_s)) + 1
        return e, i, k * (e + i)

    r = _pending(spec, p, mem)
    e, i, u = base()
    if spec.reset == "value":
        e2, i2, u2 = base()
        e, i, u = e - e2 * r, i - i2 * r, u - u2 * r
    elif spec.reset == "subtract":
        e, i, u = e - beside(spec, r, p["threshold"], "threshold") * r, i - (a * inh - x) * r, u - (-inh) * r
    output, u = _fire(spec, p, _rounded(spec, u), r)
    return output, _rounded(spec, e), _rounded(spec, i), u


def _state_leaky(spec: NeuronSpec, p: Values, x: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """mem = exp(-1/tau)*mem + x, step by step what the class convolves; s = H(mem - theta), or mem itself."""
    u = p["mem_decay"] * mem + x
    return (u, u) if spec.spike_count == "none" else _fire(spec, p, u, torch.zeros_like(u))


def _delta_leaky(spec: NeuronSpec, p: Values, x: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """u = beta*mem + x; s = H(abs(u - mem) - theta); nothing resets it."""
    assert spec.surrogate is not None
    u = p["mem_decay"] * mem + x
    change, threshold = (u - mem).abs(), p["threshold"]
    return heaviside(change - threshold, threshold, spec.surrogate, strict=spec.comparison == ">", v=change), u


def _leaky_parallel(spec: NeuronSpec, p: Values, x: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """u = relu(beta*mem + x); s = H(u - theta); nothing resets it."""
    u = torch.relu(p["mem_decay"] * mem + x)
    return _fire(spec, p, u, torch.zeros_like(u))


def _bounded_by_zero(spec: NeuronSpec) -> None:
    low = spec.parameters["min_v_mem"]
    if low.learnable or low.value.any():
        raise SpecError(f"min_v_mem={low}: the form {spec.form!r} has a lower bound of 0")


# (reset, reset_timing) -> the only reset_gradient of this pair
_RESIDUAL = {("subtract", "same_step_residual"): "attached", ("value", "same_step_residual"): "attached"}
_DELAYED = {("subtract", "next_step_after_decay"): "detached", ("value", "next_step_discards_input"): "detached"}
_LEAKY = {("subtract", "next_step_after_decay"): "detached", ("value", "next_step_before_decay"): "detached"}


def _pairs(allowed: Mapping[tuple[str, str], str]) -> Callable[[NeuronSpec], None]:
    """A check that a reset is one of the class's."""

    def check(spec: NeuronSpec) -> None:
        if spec.reset == "none":
            return
        if allowed.get((spec.reset, spec.reset_timing)) != spec.reset_gradient:
            raise SpecError(
                f"reset={spec.reset!r}, reset_timing={spec.reset_timing!r}, reset_gradient={spec.reset_gradient!r} "
                f"is not a combination of {spec.form}"
            )
        value = spec.parameters.get("reset_value")
        if value is not None and value.learnable:
            raise SpecError(f"reset_value is learnable, but the form {spec.form!r} resets to 0 and never reads it")
        if value is not None and value.value.any():
            raise SpecError(f"reset_value={value}: {spec.form} resets to 0")

    return check


def _timings(allowed: Mapping[tuple[str, str], str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(timing for _, timing in allowed))


_COMMON: Mapping[str, tuple[object, ...]] = {
    "output": ("spikes",),
    "decay": ("geometric",),
    "synapse": ("none",),
    "input_gain": ("one",),
    "spike_count": ("single",),
    "reset": ("none", "subtract", "value"),
    "reset_amount": ("threshold",),
    "clamp": ("none",),
    "refractory": ("none",),
    "initial_state": ("zero",),
    "threshold_gradient": (True,),
    "dt": (None,),
}
# Of the classes that can also round their states and inhibit their neurons.
_INHIBITED: Mapping[str, tuple[object, ...]] = {**_COMMON, "inhibition": ("none", "winner")}
_PARAMETERS = ("mem_decay", "threshold", "spike_scale", "reset_value")

SNNTORCH: Mapping[str, Form] = {
    "snntorch.Leaky": Form(
        _leaky,
        {**_INHIBITED, "reset_timing": _timings({**_RESIDUAL, **_LEAKY})},
        _PARAMETERS,
        "snntorch.Leaky 1.0.0, leaky.py forward, _base_sub, _base_zero, _base_int; neurons.py fire, mem_reset",
        check=_pairs({**_RESIDUAL, **_LEAKY}),
        rounds=True,
    ),
    "snntorch.RLeaky": Form(
        _rleaky,
        {**_INHIBITED, "reset_timing": _timings({**_RESIDUAL, **_DELAYED})},
        _PARAMETERS,
        "snntorch.RLeaky 1.0.0, rleaky.py forward, _base_sub, _base_zero, _base_int",
        check=_pairs({**_RESIDUAL, **_DELAYED}),
        rounds=True,
    ),
    "snntorch.Synaptic": Form(
        _synaptic,
        {**_INHIBITED, "synapse": ("decay_then_add",), "reset_timing": _timings({**_RESIDUAL, **_DELAYED})},
        ("syn_decay", *_PARAMETERS),
        "snntorch.Synaptic 1.0.0, synaptic.py forward, _base_sub, _base_zero, _base_int",
        check=_pairs({**_RESIDUAL, **_DELAYED}),
        rounds=True,
    ),
    "snntorch.Lapicque": Form(
        _lapicque,
        {**_INHIBITED, "input_gain": ("value",), "reset_timing": _timings(_DELAYED)},
        ("input_gain", *_PARAMETERS),
        "snntorch.Lapicque 1.0.0, lapicque.py forward, _base_state_function",
        check=_pairs(_DELAYED),
        rounds=True,
    ),
    "snntorch.Alpha": Form(
        _alpha,
        {**_INHIBITED, "synapse": ("difference_of_exponentials",), "reset_timing": _timings(_DELAYED)},
        ("syn_decay", *_PARAMETERS),
        "snntorch.Alpha 1.0.0, alpha.py forward, _base_sub, _base_zero, _base_int",
        check=_pairs(_DELAYED),
        rounds=True,
    ),
    "snntorch.DeltaLeaky": Form(
        _delta_leaky,
        {**_COMMON, "reset": ("none",), "spike_test": ("change",)},
        ("mem_decay", "threshold"),
        "snntorch.DeltaLeaky 1.0.0, deltaleaky.py forward",
    ),
    "snntorch.LeakyParallel": Form(
        _leaky_parallel,
        {**_COMMON, "reset": ("none",), "clamp": ("before_spikes",)},
        ("mem_decay", "threshold", "spike_scale", "min_v_mem"),
        "snntorch.LeakyParallel 1.0.0, leakyparallel.py forward: a torch.nn.RNN, whose sums are in another order",
        check=_bounded_by_zero,
    ),
    "snntorch.StateLeaky": Form(
        _state_leaky,
        {
            **_COMMON,
            "output": ("spikes", "membrane"),
            "spike_count": ("single", "none"),
            "reset": ("none",),
            "threshold_gradient": (True, False),
        },
        ("mem_decay", "threshold", "spike_scale"),
        "snntorch.StateLeaky 1.0.0, stateleaky.py _base_state_function, whose sums are in another order",
    ),
}
