"""The orders of operations of those of the 32 native layers that a spec can describe (`tracetorch.snn.composed`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tracetorch.core.form import Form, Values
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.quantizers import round_to_step
from tracetorch.functional.spikes import heaviside, sigmoid4x
from tracetorch.functional.surrogates import Surrogate

# Surrogates that see the distance to the threshold alone, as a `spike_fn` does.
OF_DISTANCE = (
    *("atan", "fast_sigmoid", "sigmoid", "logistic", "straight_through", "triangular", "heaviside", "zero"),
    *("spike_rate_escape", "sparse_fast_sigmoid", "gaussian", "multi_gaussian"),
)


def _integrate(spec: NeuronSpec, p: Values, x: Tensor, states: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The synaptic trace, if there is one, and the membrane: (syn,), beta*mem + x or beta*mem + (1-beta)*x."""
    *synapse, mem = states
    if synapse:
        x = p["syn_decay"] * synapse[0] + (1 - p["syn_decay"]) * x
    decay = p["mem_decay"]
    drive = (1 - decay) * x if spec.input_gain == "one_minus_decay" else x
    return ((x,) if synapse else ()), decay * mem + drive


def _lib(spec: NeuronSpec, p: Values, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """mem = beta*mem + x; s = spikes of z = mem - theta + bias; mem = mem - s*theta.

    Spikes of the surrogate "logistic", slope 4, are round(sigmoid(4 z)) with the gradient of the sigmoid, and smooth
    ones sigmoid(4 z); those of another surrogate are 1 where z > 0.
    """
    synapse, mem = _integrate(spec, p, x, states)
    z = mem - p["threshold"]
    z = z + p["bias"] if "bias" in p else z
    assert spec.surrogate is not None
    if spec.spike_count == "smooth":
        spikes = sigmoid4x(z)
    elif spec.surrogate == Surrogate("logistic"):
        spikes = round_to_step(sigmoid4x(z))
    else:
        spikes = heaviside(z, torch.ones_like(z), spec.surrogate).to(z.dtype)
    return (spikes, *synapse, mem - spikes * p["threshold"])


def _li(spec: NeuronSpec, p: Values, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """mem = beta*mem + x, or beta*mem + (1-beta)*x; the output is mem."""
    synapse, mem = _integrate(spec, p, x, states)
    return (mem, *synapse, mem)


def _check_lib(spec: NeuronSpec) -> None:
    chosen = spec.surrogate
    if spec.spike_count == "smooth" and chosen != Surrogate("logistic"):
        raise SpecError(f"surrogate={chosen}: in the form {spec.form!r} a smooth spike is logistic(slope=4)")
    if chosen is None or chosen.name not in OF_DISTANCE:
        known = ", ".join(OF_DISTANCE)
        raise SpecError(f"surrogate={chosen}: {spec.form!r} has those of the distance to the threshold: {known}")


_COMMON: Mapping[str, tuple[object, ...]] = {
    "decay": ("geometric",),
    "synapse": ("none", "moving_average"),
    "clamp": ("none",),
    "refractory": ("none",),
    "initial_state": ("zero",),
    "dt": (None,),
}

NATIVE: Mapping[str, Form] = {
    "tracetorch.LIB": Form(
        _lib,
        {
            **_COMMON,
            "input_gain": ("one",),
            "comparison": (">",),
            "spike_count": ("single", "smooth"),
            "reset": ("subtract",),
            "reset_amount": ("threshold",),
            "reset_timing": ("same_step",),
            "reset_gradient": ("attached",),
            "threshold_gradient": (True,),
        },
        ("mem_decay", "syn_decay", "threshold", "bias"),
        "tracetorch.snn.LIB, SLIB",
        check=_check_lib,
    ),
    "tracetorch.LI": Form(
        _li,
        {**_COMMON, "output": ("membrane",), "input_gain": ("one", "one_minus_decay")},
        ("mem_decay", "syn_decay"),
        "tracetorch.snn.LI, LIEMA, SLI, SLIEMA",
    ),
}
