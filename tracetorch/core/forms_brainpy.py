"""The order of operations of brainpy.state's LIF and IF (brainpy 2.8.2, brainpy_state 0.1.0, brainstate 0.5.4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tracetorch.core.form import Form, Taken, Values
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.spikes import heaviside


def _fire(spec: NeuronSpec, p: Values, v: Tensor) -> Tensor:
    """H((v - theta) / scale): the surrogate's argument is scaled, so its gradient is divided by the scale."""
    assert spec.surrogate is not None
    threshold, strict = p["threshold"], spec.comparison == ">"
    z = (v - threshold) / p["surrogate_scale"] if "surrogate_scale" in p else v - threshold
    return heaviside(z, threshold, spec.surrogate, strict=strict, v=v, dtype=v.dtype)


def _lif(spec: NeuronSpec, p: Values, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """s' = H(v - theta); v = v - rho*s' or v - (stop(v) - v_reset)*s'; v = v + k*(R*x + leak - v).

    k = 1 - exp(-dt/tau). The output is H(v - theta) of the new membrane, which is stored before its reset.
    """
    last = _fire(spec, p, v)
    if spec.reset == "subtract":
        v = v - (p["reset_amount"] if spec.reset_amount == "value" else p["threshold"]) * last
    elif spec.reset == "value":
        v = v - (v.detach() - p["reset_value"]) * last
    drive = p["resistance"] * x if "resistance" in p else x
    rest = -v + p["leak"] if "leak" in p else -v
    v = v + p["mem_decay"] * (rest + drive)
    return _fire(spec, p, v), v


def _check(spec: NeuronSpec) -> None:
    wanted = {"subtract": "attached", "value": "membrane_stopped"}.get(spec.reset, spec.reset_gradient)
    if spec.reset_gradient != wanted:
        raise SpecError(
            f"reset={spec.reset!r}, reset_gradient={spec.reset_gradient!r} is not a combination of brainpy.state.LIF"
        )
    for name in ("surrogate_scale", "initial_v"):
        if name in spec.parameters and spec.parameters[name].learnable:
            raise SpecError(f"{name} is learnable, but the form {spec.form!r} keeps it constant")
    scale = spec.parameters.get("surrogate_scale")
    if scale is not None and not (scale.value > 0).all():
        raise SpecError(f"surrogate_scale={scale}: must be above 0; V_th must lie above V_reset")


# What is lost of the membrane in one step.
_LOST: Mapping[str, Taken] = {
    "exp_dt_tau": lambda raw, dt: -torch.expm1(-dt / raw),
    "exp_tau": lambda raw, dt: -torch.expm1(-1.0 / raw),
}

BRAINPY: Mapping[str, Form] = {
    "brainpy.LIF": Form(
        _lif,
        {
            "output": ("spikes",),
            "synapse": ("none",),
            "decay": ("geometric",),
            "input_gain": ("one_minus_decay",),
            "spike_count": ("single",),
            "reset": ("none", "subtract", "value"),
            "reset_amount": ("threshold", "value"),
            "reset_timing": ("next_step_before_decay",),
            "clamp": ("none",),
            "refractory": ("none",),
            "threshold_gradient": (True,),
        },
        (
            *("mem_decay", "resistance", "leak", "threshold", "reset_amount", "reset_value"),
            *("surrogate_scale", "initial_v"),
        ),
        "brainpy.state.LIF, IF, brainpy_state 0.1.0 _brainpy/lif.py update, brainstate 0.5.4 nn/_exp_euler.py",
        {"mem_decay": _LOST},
        _check,
    ),
}
