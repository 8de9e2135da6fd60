"""The orders of operations of sinabs's neurons (sinabs 3.1.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tracetorch.core.forms.form import Form, Values, beside
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.spikes import heaviside, spike_count


def _spikes(spec: NeuronSpec, threshold: Tensor, v: Tensor) -> Tensor:
    assert spec.surrogate is not None
    z = v - (threshold if spec.threshold_gradient else threshold.detach())
    if spec.spike_count == "single":
        return heaviside(z, threshold, spec.surrogate, strict=spec.comparison == ">", v=v)
    return spike_count(v, threshold, z, spec.surrogate, limit=spec.max_spikes)


def _amount(spec: NeuronSpec, p: Values, spikes: Tensor) -> Tensor:
    """What one spike takes from the membrane."""
    if spec.reset_amount == "threshold":
        return beside(spec, spikes, p["threshold"], "threshold")
    if spec.reset_amount == "threshold_over_decay":
        return beside(spec, spikes, p["threshold"] / p["mem_decay"], "threshold", "mem_decay")
    return beside(spec, spikes, p["reset_amount"], "reset_amount")


def _reset(spec: NeuronSpec, p: Values, v: Tensor, spikes: Tensor, moving: Tensor | None = None) -> Tensor:
    """The membrane after the spikes; `moving` is the threshold of a step, of a neuron whose threshold adapts."""
    if spec.reset == "none":
        return v
    if spec.reset == "add_value":
        return v * (spikes == 0).float() + p["reset_value"]
    if spec.reset_gradient == "detached":
        spikes = spikes.detach()
    if spec.reset == "value":
        # Several spikes reset once; the gradient is that of the spikes.
        once = spikes if spec.spike_count == "single" else spikes + (spikes.clamp(max=1) - spikes).detach()
        kept = v.detach() if spec.reset_gradient == "membrane_stopped" else v
        return v - once * (kept if spec.parameters["reset_value"].fixed_at(0.0) else kept - p["reset_value"])
    return v - spikes * (
        moving if spec.reset_amount == "threshold" and moving is not None else _amount(spec, p, spikes)
    )


def _clamped(spec: NeuronSpec, p: Values, v: Tensor) -> Tensor:
    if spec.clamp == "none":
        return v
    return torch.nn.functional.relu(v - p["min_v_mem"]) + p["min_v_mem"]


def _current(spec: NeuronSpec, p: Values, x: Tensor, i: Tensor) -> Tensor:
    """alpha_syn*(i + x); in a subclass of ours also alpha_syn*i + x and alpha_syn*i + (1-alpha_syn)*x."""
    alpha = p["syn_decay"]
    if spec.synapse == "add_then_decay":
        return alpha * (i + x)
    return alpha * i + (x if spec.synapse == "decay_then_add" else (1 - alpha) * x)


def _tested(spec: NeuronSpec, p: Values, v: Tensor) -> Tensor:
    """The membrane of the spike test; in a `spike_fn` of ours it may have the lower bound already."""
    return _clamped(spec, p, v) if spec.clamp == "before_spikes" else v


def _lif(spec: NeuronSpec, p: Values, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """i = alpha_syn*(i + x); v = alpha*v + (1-alpha)*i; spikes; reset in the same step; relu clamp."""
    *synapse, v = states
    drive = _current(spec, p, x, synapse[0]) if synapse else x
    new_synapse = (drive,) if synapse else ()
    if spec.input_gain == "one_minus_decay":
        drive = (1 - p["mem_decay"]) * drive
    elif spec.input_gain == "value":
        drive = p["input_gain"] * drive
    v = (p["mem_decay"] * v if "mem_decay" in p else v) + drive
    if spec.spike_count == "none":
        output = _tested(spec, p, v)
    else:
        output = _spikes(spec, p["threshold"], _tested(spec, p, v))
        v = _reset(spec, p, v, output)
    return (output, *new_synapse, _clamped(spec, p, v))


def _alif(spec: NeuronSpec, p: Values, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """i = alpha_syn*(i + x), times 1-alpha with norm_input; v = alpha*v + i; theta = b0 + A*n; spikes and reset with
    theta; n = alpha_adapt*n + (1-alpha_adapt)*s; relu clamp."""
    *synapse, v, n = states
    current = _current(spec, p, x, synapse[0]) if synapse else x
    if spec.input_gain != "one":
        current = (1 - p["mem_decay"]) * current
    v = p["mem_decay"] * v + current
    threshold = p["threshold"] + p["adapt_scale"] * n
    output = _spikes(spec, threshold, v)
    v = _reset(spec, p, v, output, threshold)
    n = p["adapt_decay"] * n + beside(spec, output, 1 - p["adapt_decay"], "adapt_decay") * output
    return (output, *((current,) if synapse else ()), _clamped(spec, p, v), n)


def _check_reset(spec: NeuronSpec) -> None:
    value = spec.parameters.get("reset_value")
    if spec.reset == "value" and value is not None and value.learnable:
        raise SpecError(f"reset_value is learnable, but the form {spec.form!r} holds it as a constant")
    if spec.reset_gradient == "membrane_stopped" and spec.reset != "value":
        raise SpecError(f"reset_gradient='membrane_stopped': a reset to a value has it, not reset={spec.reset!r}")
    if spec.reset == "add_value" and spec.reset_gradient != "detached":
        raise SpecError("reset='add_value': its mask carries no gradient, so reset_gradient must be 'detached'")


def _check_adaptation(spec: NeuronSpec) -> None:
    _check_reset(spec)
    if not spec.adaptive:
        raise SpecError(f"adapt_decay: the form {spec.form!r} needs adapt_decay and adapt_scale")
    kept = spec.input_gain == "one_minus_decay_kept"
    if spec.input_gain != "one" and kept != (spec.synapse != "none"):
        raise SpecError(f"input_gain={spec.input_gain!r}: sinabs.ALIF keeps the scaled current, where it has a synapse")


_COMMON: Mapping[str, tuple[object, ...]] = {
    "reset_timing": ("same_step",),
    "reset_gradient": ("attached", "detached", "membrane_stopped"),
    "refractory": ("none",),
    "initial_state": ("zero",),
    "dt": (None,),
}
_PARAMETERS = ("mem_decay", "syn_decay", "threshold", "reset_amount", "reset_value", "min_v_mem")

SINABS: Mapping[str, Form] = {
    "sinabs.LIF": Form(
        _lif,
        {
            **_COMMON,
            "synapse": ("none", "add_then_decay", "decay_then_add", "moving_average"),
            "input_gain": ("one", "one_minus_decay", "value"),
            "spike_count": ("none", "single", "multiple", "limited"),
        },
        ("input_gain", *_PARAMETERS),
        "sinabs.layers.LIF, IAF, ExpLeak 3.1.3, layers/functional/lif.py lif_forward_single",
        check=_check_reset,
    ),
    "sinabs.ALIF": Form(
        _alif,
        {
            **_COMMON,
            "output": ("spikes",),
            "decay": ("geometric",),
            "synapse": ("none", "add_then_decay"),
            "input_gain": ("one", "one_minus_decay", "one_minus_decay_kept"),
            "spike_count": ("single", "multiple", "limited"),
            "reset_amount": ("threshold", "value"),
            "clamp": ("none", "after_reset"),
        },
        (*_PARAMETERS, "adapt_decay", "adapt_scale"),
        "sinabs.layers.ALIF 3.1.3, layers/functional/alif.py alif_forward_single",
        check=_check_adaptation,
    ),
}
