"""The orders of operations of those of the 32 native layers that a spec can describe (`tracetorch.snn.composed`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tracetorch.core.forms.form import Form, Values
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.quantizers import round_to_step
from tracetorch.functional.spikes import heaviside, sigmoid4x
from tracetorch.functional.surrogates import SURROGATES, Surrogate

# Surrogates whose width scales with the threshold, of which a `spike_fn` is told a number.
BY_THRESHOLD = ("single_exponential", "heaviside_window", "periodic_exponential")


def _integrate(spec: NeuronSpec, p: Values, x: Tensor, states: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The synaptic trace, if there is one, and the membrane: (syn,), beta*mem + x or beta*mem + (1-beta)*x."""
    *synapse, mem = states
    if synapse:
        x = p["syn_decay"] * synapse[0] + (1 - p["syn_decay"]) * x
    decay = p["mem_decay"]
    drive = (1 - decay) * x if spec.input_gain == "one_minus_decay" else x
    return ((x,) if synapse else ()), decay * mem + drive


def _fire(spec: NeuronSpec, z: Tensor, p: Values) -> Tensor:
    """Spikes of the distance z to a threshold.

    Those of the surrogate "logistic", slope 4, are round(sigmoid(4 z)) with the gradient of the sigmoid, and smooth
    ones sigmoid(4 z); those of another surrogate are 1 where z > 0, or z >= 0.
    """
    assert spec.surrogate is not None
    if spec.spike_count == "smooth":
        return sigmoid4x(z)
    strict = spec.comparison == ">"
    if spec.surrogate == Surrogate("logistic") and strict:
        return round_to_step(sigmoid4x(z))
    one = torch.ones_like(z)
    width = one * p["threshold"].detach() if spec.surrogate.name in BY_THRESHOLD else one
    return heaviside(z, width, spec.surrogate, strict=strict, dtype=z.dtype)


def _lib(spec: NeuronSpec, p: Values, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """mem = beta*mem + x; s = spikes of z = mem - theta + bias; mem = mem - s*theta."""
    synapse, mem = _integrate(spec, p, x, states)
    z = mem - p["threshold"]
    spikes = _fire(spec, z + p["bias"] if "bias" in p else z, p)
    return (spikes, *synapse, mem - spikes * p["threshold"])


def _lit(spec: NeuronSpec, p: Values, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """mem = beta*mem + x; up, down = spikes of mem - theta + bias, of -neg_theta - mem - bias, down with its sign.

    The output is up + down, each times its scale if it has one; mem = mem - up*theta - down*neg_theta.
    """
    synapse, mem = _integrate(spec, p, x, states)
    above, below = mem - p["threshold"], -p["neg_threshold"] - mem
    if "bias" in p:
        above, below = above + p["bias"], below - p["bias"]
    up, down = _fire(spec, above, p), -_fire(spec, below, p)
    scaled_up = up * p["spike_scale"] if "spike_scale" in p else up
    scaled_down = down * p["neg_scale"] if "neg_scale" in p else down
    after = mem - up * p["threshold"] - down * p["neg_threshold"]
    return (scaled_up + scaled_down, *synapse, after)


def _li(spec: NeuronSpec, p: Values, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """mem = beta*mem + x, or beta*mem + (1-beta)*x; the output is mem."""
    synapse, mem = _integrate(spec, p, x, states)
    return (mem, *synapse, mem)


def _check_lit(spec: NeuronSpec) -> None:
    if not spec.signed:
        raise SpecError(f"neg_threshold: the form {spec.form!r} needs one beside the threshold")
    _check_lib(spec)


def _check_lib(spec: NeuronSpec) -> None:
    chosen = spec.surrogate
    if spec.spike_count == "smooth" and chosen != Surrogate("logistic"):
        raise SpecError(f"surrogate={chosen}: in the form {spec.form!r} a smooth spike is logistic(slope=4)")
    if spec.spike_count == "smooth" and spec.comparison != ">":
        raise SpecError(f"comparison={spec.comparison!r}: in the form {spec.form!r} a smooth spike has '>'")
    why = refusal_of_surrogate(spec)
    if why:
        raise SpecError(f"surrogate={chosen}: {spec.form!r}: {why}")


def refusal_of_surrogate(spec: NeuronSpec) -> str:
    """Why a native layer cannot have the surrogate of a spec; empty if it can."""
    chosen, threshold = spec.surrogate, spec.parameters["threshold"]
    if chosen is None or chosen.name not in SURROGATES:
        return f"a spike_fn of a native layer has one of {', '.join(SURROGATES)}"
    if chosen.name in BY_THRESHOLD and (spec.signed or threshold.learnable or threshold.value.size != 1):
        return "a spike_fn is told one number as the threshold that scales it: a constant, the same for all neurons"
    return ""


_COMMON: Mapping[str, tuple[object, ...]] = {
    "decay": ("geometric",),
    "synapse": ("none", "moving_average"),
    "clamp": ("none",),
    "refractory": ("none",),
    "initial_state": ("zero",),
    "dt": (None,),
}

_FIRING: Mapping[str, tuple[object, ...]] = {
    **_COMMON,
    "input_gain": ("one",),
    "comparison": (">", ">="),
    "spike_count": ("single", "smooth"),
    "reset": ("subtract",),
    "reset_amount": ("threshold",),
    "reset_timing": ("same_step",),
    "reset_gradient": ("attached",),
    "threshold_gradient": (True,),
}
_THRESHOLD = ("mem_decay", "syn_decay", "threshold", "bias")

NATIVE: Mapping[str, Form] = {
    "tracetorch.LIB": Form(_lib, _FIRING, _THRESHOLD, "tracetorch.snn.LIB, SLIB", check=_check_lib),
    "tracetorch.LIT": Form(
        _lit,
        _FIRING,
        (*_THRESHOLD, "neg_threshold", "spike_scale", "neg_scale"),
        "tracetorch.snn.LIT, SLIT, LITS, SLITS",
        check=_check_lit,
    ),
    "tracetorch.LI": Form(
        _li,
        {**_COMMON, "output": ("membrane",), "input_gain": ("one", "one_minus_decay")},
        ("mem_decay", "syn_decay"),
        "tracetorch.snn.LI, LIEMA, SLI, SLIEMA",
    ),
}
