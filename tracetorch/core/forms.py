"""The step built from a `NeuronSpec`: one function per `form`, the order of a framework's operations.

A form is a row of `FORMS`: which choices it can compute, and `step(spec, p, x, *states) -> output, *new_states` in
ordinary torch operations. `p` holds the values in the equations (raw forms applied) by parameter name, broadcastable
against x. Same operations in the same order as the source, so outputs, states and gradients are bit-identical to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from tracetorch.core.raw import COMPUTED
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.quantizers import round_to_step
from tracetorch.functional.spikes import heaviside, sigmoid4x, spike_count
from tracetorch.functional.surrogates import Surrogate

Values: TypeAlias = Mapping[str, Tensor]
Step: TypeAlias = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Form:
    """A named order of operations: its step, and for each field the choices it can compute (a field left out: any)."""

    step: Step
    choices: Mapping[str, tuple[object, ...]]
    parameters: tuple[str, ...]
    source: str


def _snntorch_leaky(spec: NeuronSpec, p: Values, x: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """r = H(mem - theta) detached; u = beta*mem + x with the reset r; s = H(u - theta); a same-step reset by s - r."""
    assert spec.surrogate is not None
    threshold, strict = p["threshold"], spec.comparison == ">"
    r = heaviside(mem - threshold, threshold, spec.surrogate, strict=strict).detach()
    if spec.reset == "value":
        mem = (1 - r) * mem
    u = p["mem_decay"] * mem + x
    if spec.reset == "subtract":
        u = u - r * threshold
    spikes = heaviside(u - threshold, threshold, spec.surrogate, strict=strict, v=u)
    scale = p.get("spike_scale")
    output = spikes if scale is None else spikes * scale
    if spec.reset_timing == "same_step_residual":
        change = (output if scale is None else output / scale) - r
        if spec.reset == "subtract":
            u = u - change * threshold
        elif spec.reset == "value":
            u = u - change * u
    return output, u


def _sinabs_spikes(spec: NeuronSpec, threshold: Tensor, v: Tensor) -> Tensor:
    assert spec.surrogate is not None
    z = v - (threshold if spec.threshold_gradient else threshold.detach())
    if spec.spike_count == "single":
        return heaviside(z, threshold, spec.surrogate, strict=spec.comparison == ">", v=v)
    return spike_count(v, threshold, z, spec.surrogate, limit=spec.max_spikes)


def _sinabs_reset(spec: NeuronSpec, p: Values, v: Tensor, spikes: Tensor) -> Tensor:
    if spec.reset == "none":
        return v
    if spec.reset == "add_value":
        return v * (spikes == 0).float() + p["reset_value"]
    if spec.reset_gradient == "detached":
        spikes = spikes.detach()
    if spec.reset == "value":
        # Several spikes reset once; the gradient is that of the spikes.
        once = spikes if spec.spike_count == "single" else spikes + (spikes.clamp(max=1) - spikes).detach()
        return v - once * v
    if spec.reset_amount == "threshold":
        return v - spikes * p["threshold"]
    if spec.reset_amount == "threshold_over_decay":
        return v - spikes * (p["threshold"] / p["mem_decay"])
    return v - spikes * p["reset_amount"]


def _sinabs_lif(spec: NeuronSpec, p: Values, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """i = alpha_syn*(i + x); v = alpha*v + (1-alpha)*i; spikes; reset in the same step; relu clamp."""
    *synapse, v = states
    drive = p["syn_decay"] * (synapse[0] + x) if synapse else x
    new_synapse = (drive,) if synapse else ()
    if spec.input_gain == "one_minus_decay":
        drive = (1 - p["mem_decay"]) * drive
    v = p["mem_decay"] * v + drive
    if spec.spike_count == "none":
        output = v
    else:
        output = _sinabs_spikes(spec, p["threshold"], v)
        v = _sinabs_reset(spec, p, v, output)
    if spec.clamp == "after_reset":
        v = torch.nn.functional.relu(v - p["min_v_mem"]) + p["min_v_mem"]
    return (output, *new_synapse, v)


def _tracetorch_lib(spec: NeuronSpec, p: Values, x: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """mem = beta*mem + x; s = round(sigmoid(4 (mem - theta + bias))), gradient of the sigmoid; mem = mem - s*theta."""
    mem = p["mem_decay"] * mem + x
    z = mem - p["threshold"]
    spikes = round_to_step(sigmoid4x(z + p["bias"] if "bias" in p else z))
    return spikes, mem - spikes * p["threshold"]


def _tracetorch_li(spec: NeuronSpec, p: Values, x: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
    """mem = beta*mem + x; the output is mem."""
    mem = p["mem_decay"] * mem + x
    return mem, mem


_COMMON: Mapping[str, tuple[object, ...]] = {
    "decay": ("geometric",),
    "refractory": ("none",),
    "initial_state": ("zero",),
    "dt": (None,),
}

FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "snntorch.Leaky": Form(
            _snntorch_leaky,
            {
                **_COMMON,
                "output": ("spikes",),
                "synapse": ("none",),
                "input_gain": ("one",),
                "spike_count": ("single",),
                "reset": ("none", "subtract", "value"),
                "reset_amount": ("threshold",),
                "reset_timing": ("same_step_residual", "next_step_before_decay", "next_step_after_decay"),
                "clamp": ("none",),
                "threshold_gradient": (True,),
            },
            ("mem_decay", "threshold", "spike_scale", "reset_value"),
            "snntorch.Leaky 1.0.0, leaky.py forward, _base_sub, _base_zero, _base_int; neurons.py fire, mem_reset",
        ),
        "sinabs.LIF": Form(
            _sinabs_lif,
            {
                **_COMMON,
                "synapse": ("none", "add_then_decay"),
                "input_gain": ("one", "one_minus_decay"),
                "spike_count": ("none", "single", "multiple", "limited"),
                "reset_timing": ("same_step",),
                "reset_gradient": ("attached", "detached"),
            },
            ("mem_decay", "syn_decay", "threshold", "reset_amount", "reset_value", "min_v_mem"),
            "sinabs.layers.LIF 3.1.3, layers/functional/lif.py lif_forward_single",
        ),
        "tracetorch.LIB": Form(
            _tracetorch_lib,
            {
                **_COMMON,
                "synapse": ("none",),
                "input_gain": ("one",),
                "comparison": (">",),
                "spike_count": ("single",),
                "reset": ("subtract",),
                "reset_amount": ("threshold",),
                "reset_timing": ("same_step",),
                "reset_gradient": ("attached",),
                "clamp": ("none",),
                "surrogate": (Surrogate("logistic"),),
                "threshold_gradient": (True,),
            },
            ("mem_decay", "threshold", "bias"),
            "tracetorch.snn.LIB with quant_fn=round_ste()",
        ),
        "tracetorch.LI": Form(
            _tracetorch_li,
            {**_COMMON, "output": ("membrane",), "synapse": ("none",), "input_gain": ("one",), "clamp": ("none",)},
            ("mem_decay",),
            "tracetorch.snn.LI",
        ),
    }
)


def check_form(spec: NeuronSpec) -> Form:
    """The form of a spec, after checking that it can compute every choice of the spec.

    Raises:
        SpecError: no such form, or a choice or parameter that it does not compute; names the field and its value.
    """
    if spec.form not in FORMS:
        raise SpecError(f"form={spec.form!r} is not known; known: {', '.join(FORMS)}")
    form = FORMS[spec.form]
    for name, allowed in form.choices.items():
        value = getattr(spec, name)
        if value not in allowed:
            raise SpecError(
                f"{name}={value!r} cannot be computed in the form {spec.form!r}; it can: "
                f"{', '.join(repr(a) for a in allowed)}"
            )
    for name, parameter in spec.parameters.items():
        if parameter.raw not in COMPUTED:
            raise SpecError(f"{name}: the raw form {parameter.raw!r} is not computed in this version")
    unused = [name for name in spec.parameters if name not in form.parameters]
    if unused:
        raise SpecError(f"parameters {unused} have no place in the form {spec.form!r}")
    if spec.spike_count != "none" and spec.surrogate is None:
        raise SpecError(f"surrogate=None: the form {spec.form!r} needs a surrogate gradient for its spikes")
    _check_pairs(spec)
    return form


def _check_pairs(spec: NeuronSpec) -> None:
    """Combinations of choices that a form has no order of operations for."""
    if spec.reset == "value" and spec.parameters["reset_value"].learnable:
        raise SpecError(f"reset_value is learnable, but the form {spec.form!r} resets to 0 and never reads it")
    if spec.form == "snntorch.Leaky":
        timing = {
            ("subtract", "same_step_residual"): "attached",
            ("value", "same_step_residual"): "attached",
            ("subtract", "next_step_after_decay"): "detached",
            ("value", "next_step_before_decay"): "detached",
        }
        gradient = timing.get((spec.reset, spec.reset_timing))
        if spec.reset != "none" and gradient != spec.reset_gradient:
            raise SpecError(
                f"reset={spec.reset!r}, reset_timing={spec.reset_timing!r}, reset_gradient={spec.reset_gradient!r} "
                "is not a combination of snntorch.Leaky"
            )
        if spec.reset == "value" and spec.parameters["reset_value"].value.any():
            raise SpecError(f"reset_value={spec.parameters['reset_value']}: snntorch.Leaky resets to 0")
    if spec.form != "sinabs.LIF":
        return
    if spec.reset == "value" and spec.parameters["reset_value"].value.any():
        raise SpecError("reset='value' in the form 'sinabs.LIF' resets to 0; a reset value needs 'add_value'")
    if spec.reset == "add_value" and spec.reset_gradient != "detached":
        raise SpecError("reset='add_value': its mask carries no gradient, so reset_gradient must be 'detached'")
