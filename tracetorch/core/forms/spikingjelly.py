"""The orders of operations of SpikingJelly's nodes (spikingjelly 2.0.0)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tracetorch.core.forms.form import Form, Values
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.spikes import heaviside


def _charge(spec: NeuronSpec, p: Values, x: Tensor, v: Tensor) -> Tensor:
    if spec.decay == "none":
        return v + x
    above = v - p["leak"] if "leak" in p else v
    # q is tau, by which LIFNode divides, or sigmoid(w), with which ParametricLIFNode multiplies.
    q, divides = p["mem_decay"], spec.parameters["mem_decay"].raw == "one_minus_inverse_tau"
    if spec.input_gain == "one_minus_decay":
        return v + (x - above) / q if divides else v + (x - above) * q
    return v - above / q + x if divides else v - above * q + x


def _node(spec: NeuronSpec, p: Values, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """h = v + (x - (v - leak)) / tau or v - (v - leak) / tau + x; s = H(h - theta); h - s*theta or s*v_reset + (1-s)*h.

    ParametricLIFNode multiplies by sigmoid(w) instead; IFNode has h = v + x.
    """
    assert spec.surrogate is not None
    h = _charge(spec, p, x, v)
    strict = spec.comparison == ">"
    z = h - p["threshold"]
    spikes = heaviside(z, p["threshold"], spec.surrogate, strict=strict, v=h, dtype=h.dtype)
    s = spikes.detach() if spec.reset_gradient == "detached" else spikes
    if spec.reset == "subtract":
        return spikes, h - s * p["threshold"]
    if spec.reset == "value":
        return spikes, s * p["reset_value"] + (1.0 - s) * h
    return spikes, h


def _check(spec: NeuronSpec) -> None:
    leak = spec.parameters.get("leak")
    if spec.decay == "none" and (leak is not None or spec.input_gain != "one"):
        raise SpecError(f"input_gain={spec.input_gain!r}, leak={leak}: decay='none' has input_gain='one' and no leak")


SPIKINGJELLY: Mapping[str, Form] = {
    "spikingjelly.LIF": Form(
        _node,
        {
            "output": ("spikes",),
            "synapse": ("none",),
            "input_gain": ("one", "one_minus_decay"),
            "spike_count": ("single",),
            "reset": ("none", "subtract", "value"),
            "reset_amount": ("threshold",),
            "reset_timing": ("same_step",),
            "reset_gradient": ("attached", "detached"),
            "clamp": ("none",),
            "refractory": ("none",),
        },
        ("mem_decay", "leak", "threshold", "reset_value"),
        "spikingjelly.activation_based.neuron LIFNode, ParametricLIFNode, IFNode 2.0.0, _ops/lif/reference.py step, "
        "_ops/plif/reference.py step, _ops/if_/reference.py step, _ops/reset.py voltage",
        {
            "mem_decay": {
                "one_minus_inverse_tau": lambda raw, dt: raw,
                "one_minus_sigmoid": lambda raw, dt: torch.sigmoid(raw),
            }
        },
        _check,
    ),
}
