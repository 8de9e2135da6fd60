"""The order of operations of brainpy.state's LIF and IF (brainpy 2.8.2, brainpy_state 0.1.0, brainstate 0.5.4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tracetorch.core.forms.form import Form, Taken, Values
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.spikes import heaviside


def _fire(spec: NeuronSpec, p: Values, v: Tensor) -> Tensor:
    """H((v - theta) / scale): the surrogate's argument is scaled, so its gradient is divided by the scale."""
    assert spec.surrogate is not None
    threshold, strict = p["threshold"], spec.comparison == ">"
    z = (v - threshold) / p["surrogate_scale"] if "surrogate_scale" in p else v - threshold
    return heaviside(z, threshold, spec.surrogate, strict=strict, v=v, dtype=v.dtype)


def _after_reset(spec: NeuronSpec, p: Values, v: Tensor, spikes: Tensor) -> Tensor:
    """v - rho*s or v - (stop(v) - v_reset)*s."""
    if spec.reset == "subtract":
        return v - (p["reset_amount"] if spec.reset_amount == "value" else p["threshold"]) * spikes
    return v - (v.detach() - p["reset_value"]) * spikes if spec.reset == "value" else v


def _integrated(p: Values, x: Tensor, v: Tensor) -> Tensor:
    """v + k*(R*x + leak - v), k = 1 - exp(-dt/tau)."""
    drive = p["resistance"] * x if "resistance" in p else x
    rest = -v + p["leak"] if "leak" in p else -v
    return v + p["mem_decay"] * (rest + drive)


def _lif(spec: NeuronSpec, p: Values, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """s' = H(v - theta); v = v - rho*s' or v - (stop(v) - v_reset)*s'; v = v + k*(R*x + leak - v).

    k = 1 - exp(-dt/tau). The output is H(v - theta) of the new membrane, which is stored before its reset.
    """
    v = _integrated(p, x, _after_reset(spec, p, v, _fire(spec, p, v)))
    return _fire(spec, p, v), v


def _lif_ref(
    spec: NeuronSpec, p: Values, x: Tensor, v: Tensor, last_spike: Tensor, steps: Tensor
) -> tuple[Tensor, ...]:
    """The step of brainpy.LIF, but v stays as its reset left it while t - t_last < refractory_time, t = steps*dt.

    Without a refractory_time t is in steps, and v stays for refractory_steps. A spike inside that time prolongs it.
    """
    rested = _after_reset(spec, p, v, _fire(spec, p, v))
    if "refractory_time" in p:
        assert spec.dt is not None
        t, time = steps * spec.dt, p["refractory_time"]
    else:
        assert spec.refractory_steps is not None
        t, time = steps, torch.full_like(steps, spec.refractory_steps + 0.5)
    v = torch.where(t - last_spike < time, rested, _integrated(p, x, rested))
    spikes = _fire(spec, p, v)
    return spikes, v, torch.where(spikes.detach() > 0, t, last_spike), steps + 1


def _alif(spec: NeuronSpec, p: Values, x: Tensor, v: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    """v = v + k*(R*x + leak - v); theta = threshold + A*n; s = H(v - theta); v - rho*s or v - (stop(v) - v_reset)*s.

    Then n = n + k_a*(s - n), k_a = 1 - exp(-dt/tau_a). The class resets in the next step, and keeps the adaptation of
    the step before its spike, a = n / (exp(dt/tau_a) - 1).
    """
    v = _integrated(p, x, v)
    spikes = _fire(spec, {**p, "threshold": p["threshold"] + p["adapt_scale"] * n}, v)
    return spikes, _after_reset(spec, p, v, spikes), n + p["adapt_decay"] * (spikes - n)


def _check_alif(spec: NeuronSpec) -> None:
    if not spec.adaptive:
        raise SpecError(f"adapt_decay: the form {spec.form!r} needs adapt_decay and adapt_scale")
    if spec.reset == "subtract" and spec.reset_amount != "value":
        raise SpecError(f"reset_amount={spec.reset_amount!r}: the form {spec.form!r} subtracts a constant amount")
    _check(spec)


def _check(spec: NeuronSpec) -> None:
    wanted = {"subtract": "attached", "value": "membrane_stopped"}.get(spec.reset, spec.reset_gradient)
    if spec.reset_gradient != wanted:
        raise SpecError(
            f"reset={spec.reset!r}, reset_gradient={spec.reset_gradient!r} is not a combination of brainpy.state.LIF"
        )
    for name in ("surrogate_scale", "initial_v", "refractory_time"):
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

_COMMON: Mapping[str, tuple[object, ...]] = {
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
}
_PARAMETERS = (
    *("mem_decay", "resistance", "leak", "threshold", "reset_amount", "reset_value"),
    *("surrogate_scale", "initial_v"),
)
_NEVER = -1e7  # the time of the last spike before the first, in brainpy too

BRAINPY: Mapping[str, Form] = {
    "brainpy.LIF": Form(
        _lif,
        _COMMON,
        _PARAMETERS,
        "brainpy.state.LIF, IF, brainpy_state 0.1.0 _brainpy/lif.py update, brainstate 0.5.4 nn/_exp_euler.py",
        {"mem_decay": _LOST},
        _check,
    ),
    "brainpy.LIFRef": Form(
        _lif_ref,
        {**_COMMON, "comparison": (">=",), "refractory": ("hold",)},
        (*_PARAMETERS, "refractory_time"),
        "brainpy.state.LIFRef, brainpy_state 0.1.0 _brainpy/lif.py update, brainstate 0.5.4 nn/_exp_euler.py",
        {"mem_decay": _LOST},
        _check,
        memory={"last_spike": _NEVER, "steps": 0.0},
    ),
    "brainpy.ALIF": Form(
        _alif,
        {**_COMMON, "reset_timing": ("same_step",)},
        (*_PARAMETERS, "adapt_decay", "adapt_scale"),
        "brainpy.state.ALIF, brainpy_state 0.1.0 _brainpy/lif.py update, brainstate 0.5.4 nn/_exp_euler.py",
        {"mem_decay": _LOST, "adapt_decay": _LOST},
        _check_alif,
    ),
}
