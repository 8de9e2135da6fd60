"""Specs built as neurons of brainpy.state: `LIF`, `LIFRef`, `ALIF`, in a `JaxStage`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import brainpy.state as bp
import numpy as np
import saiunit
import torch
from braintools import init
from braintools.surrogate import ReluGrad
from torch import nn

from tracetorch.adapters.base import Building
from tracetorch.adapters.brainpy import surrogates
from tracetorch.adapters.jax.stage import JaxStage
from tracetorch.adapters.losses import neutral
from tracetorch.adapters.simplify import simplified
from tracetorch.core.raw import from_raw, to_raw
from tracetorch.core.spec import NeuronSpec

_NATIVE = "to='tracetorch'"
_KNOWN = (
    *("mem_decay", "syn_decay", "input_gain", "resistance", "leak", "threshold", "bias", "spike_scale", "min_v_mem"),
    *("reset_amount", "reset_value", "surrogate_scale", "initial_v", "adapt_decay", "adapt_scale", "refractory_time"),
)
# Surrogates whose width is that of the threshold.
_BY_THRESHOLD = ("single_exponential", "heaviside_window")


def _refuse(spec: NeuronSpec, building: Building) -> None:
    """What no neuron of brainpy.state computes."""
    for field, has in (
        ("synapse", ("none",)),
        ("output", ("spikes",)),
        ("clamp", ("none",)),
        ("spike_test", ("membrane",)),
        ("inhibition", ("none",)),
        ("spike_count", ("single",)),
        ("reset", ("subtract", "value", "add_value")),
        ("reset_timing", ("same_step", "next_step_before_decay", "next_step_after_decay")),
    ):
        if getattr(spec, field) not in has:
            why = f"brainpy.state.LIF has {', '.join(map(repr, has))} there"
            raise building.impossible(field, getattr(spec, field), why, _NATIVE)
    if spec.reset == "add_value" and not neutral(spec, "reset_value", 0.0):
        raise building.impossible("reset", spec.reset, "brainpy.state.LIF sets V_reset where it fired", _NATIVE)
    if spec.reset == "value" and spec.reset_timing == "next_step_after_decay":
        raise building.impossible("reset_timing", spec.reset_timing, "brainpy resets before the decay", _NATIVE)
    for name, nothing in (("bias", 0.0), ("spike_scale", 1.0)):
        if not neutral(spec, name, nothing):
            raise building.impossible(name, str(spec.parameters[name]), "brainpy.state.LIF has none", _NATIVE)
    for name in spec.parameters:
        if name not in _KNOWN:
            raise building.impossible(name, str(spec.parameters[name]), "brainpy.state.LIF has none", _NATIVE)
    if spec.state_levels is not None:
        raise building.impossible(
            "state_levels", f"{len(spec.state_levels)} levels", "brainpy rounds no state", _NATIVE
        )
    if spec.adaptive:
        _refuse_adapting(spec, building)
    if spec.refractory == "hold":
        _refuse_holding(spec, building)


def _refuse_adapting(spec: NeuronSpec, building: Building) -> None:
    """What brainpy.state.ALIF does not compute."""
    if spec.reset == "subtract" and spec.reset_amount != "value":
        why = "brainpy.state.ALIF subtracts V_th - V_reset, and not as much as the threshold has risen to"
        raise building.impossible("reset_amount", spec.reset_amount, why, f"reset_amount='value'; or {_NATIVE}")
    if spec.reset != "none" and spec.reset_timing == "next_step_after_decay":
        raise building.impossible("reset_timing", spec.reset_timing, "brainpy resets before the decay", _NATIVE)
    if spec.refractory != "none":
        raise building.impossible("refractory", spec.refractory, "brainpy.state.ALIF has no refractory time", _NATIVE)
    assert spec.surrogate is not None
    if spec.surrogate.name in _BY_THRESHOLD:
        why = f"{spec.surrogate} is as wide as the threshold, here as V_th without what it rises by"
        building.note("surrogate", why, gradient="differs")
    learned = [name for name in ("adapt_decay", "adapt_scale") if spec.parameters[name].learnable]
    if learned:
        why = "learnable in the source, constant here: beta holds adapt_scale*(exp(dt/tau_a) - 1)"
        building.note(learned[0], why, gradient="differs")


def _refuse_holding(spec: NeuronSpec, building: Building) -> None:
    """What brainpy.state.LIFRef does not compute."""
    if spec.comparison != ">=":
        why = "brainpy.state.LIFRef takes V = V_th for a spike in its refractory time"
        raise building.impossible("comparison", spec.comparison, why, _NATIVE)
    if spec.time_unit not in (None, "ms"):
        why = "brainpy.state.LIFRef keeps the time of the last spike in ms"
        raise building.impossible("time_unit", spec.time_unit, why, f"a spec in ms; or {_NATIVE}")


def _float64(spec: NeuronSpec, name: str, default: float) -> np.ndarray:
    if name not in spec.parameters:
        return np.asarray(default)
    parameter = spec.parameters[name]
    raw = torch.from_numpy(parameter.value.astype(np.float64))
    return np.asarray(from_raw(parameter.raw, raw, spec.dt).numpy())


def _tau(spec: NeuronSpec, name: str, dt: float, building: Building) -> np.ndarray:
    """The time constant of a decay in the unit of dt; the source's own numbers where they are one."""
    if name not in spec.parameters:
        raise building.impossible("decay", spec.decay, "brainpy.state.LIF decays by its tau", "a decay below 1")
    parameter = spec.parameters[name]
    if parameter.raw == "exp_dt_tau" and spec.dt == dt:
        return parameter.value
    a = _float64(spec, name, 1.0)
    if not ((a > 0) & (a < 1)).all():
        value = float(a[(a <= 0) | (a >= 1)].reshape(-1)[0]) if a.ndim else float(a)
        raise building.impossible(name, value, "exp(-dt/tau) lies between 0 and 1", "a decay between 0 and 1")
    if parameter.raw == "exp_tau":
        return np.asarray(parameter.value * dt, dtype=parameter.value.dtype)
    return np.asarray(to_raw("exp_dt_tau", torch.from_numpy(a), dt).numpy(), dtype=parameter.value.dtype)


def _resistance(spec: NeuronSpec, building: Building) -> np.ndarray:
    """R: what the drive must be multiplied with beside 1 - a."""
    own = _float64(spec, "resistance", 1.0)
    if spec.input_gain.startswith("one_minus_decay"):
        return own
    gain, a = _float64(spec, "input_gain", 1.0), _float64(spec, "mem_decay", 1.0)
    if any(spec.parameters[n].learnable for n in ("mem_decay", "input_gain") if n in spec.parameters):
        building.cannot(
            "input_gain",
            spec.input_gain,
            "R holds 1/(1-a), which would not follow the decay's training",
            "a constant decay in the source, requires_grad_(False)",
        )
    building.note("input_gain", "R = gain / (1 - a)")
    return np.asarray(gain / (1 - a))


def _reset_number(spec: NeuronSpec, threshold: np.ndarray, building: Building) -> np.ndarray:
    """V_reset."""
    if spec.reset in ("value", "add_value"):
        return _float64(spec, "reset_value", 0.0)
    over = spec.reset_amount == "threshold_over_decay" or spec.reset_timing == "next_step_after_decay"
    if over:
        building.note("reset_amount", "V_reset = V_th - V_th/a, which stays when the decay is trained")
        return np.asarray(threshold - threshold / _float64(spec, "mem_decay", 1.0))
    amount = _float64(spec, "reset_amount", 0.0) if spec.reset_amount == "value" else threshold
    return np.asarray(threshold - amount)


def _note_gradients(spec: NeuronSpec, building: Building) -> None:
    soft = spec.reset == "subtract"
    wanted = "attached" if soft else "membrane_stopped"
    if spec.reset_gradient != wanted:
        text = f"brainpy.state.LIF's {'soft' if soft else 'hard'} reset is {wanted}, the source's {spec.reset_gradient}"
        building.note("reset_gradient", text, gradient="differs")
    if spec.spike_count != "none" and not spec.threshold_gradient and spec.parameters["threshold"].learnable:
        building.note("threshold", "its gradient also comes through the spikes", gradient="differs")
    learned = [n for n, p in spec.parameters.items() if p.learnable]
    fixed = [n for n in ("threshold", "reset_value", "reset_amount") if n in learned]
    if fixed:
        why = "learnable in the source, constant here: it sets brainpy's surrogate too"
        building.note(fixed[0], why, gradient="differs")
    decay = spec.parameters["mem_decay"]
    if decay.learnable and decay.raw != "exp_dt_tau":
        building.note("mem_decay", f"learned as tau, in the source as {decay.raw}", gradient="reparametrised")


def _surrogate(spec: NeuronSpec, rho: np.ndarray, threshold: np.ndarray, building: Building) -> Any:
    """`spk_fun`."""
    assert spec.surrogate is not None
    scale = _float64(spec, "surrogate_scale", 1.0).astype(threshold.dtype)
    function = surrogates.write(spec.surrogate, scale, rho, threshold, spec.comparison == ">")
    if isinstance(function, surrogates.SpikeFunction):
        if not building.stock:
            building.note("spk_fun", f"custom callable: {function}")
            return function
        if spec.comparison == ">":
            building.cannot("comparison", ">", "braintools.surrogate fires at the threshold too", "stock=False")
        building.note("surrogate", f"{spec.surrogate} is not braintools.surrogate's; ReluGrad", gradient="differs")
        return ReluGrad()
    if function is None:
        why = f"{spec.surrogate} has no counterpart in JAX; ReluGrad in its place"
        building.note("surrogate", why, gradient="differs")
        return ReluGrad()
    return function


def _rare(spec: NeuronSpec, dt: float, building: Building) -> dict[str, np.ndarray]:
    """tau_ref of a `LIFRef`; tau_a and beta of an `ALIF`."""
    if spec.refractory == "hold":
        if "refractory_time" in spec.parameters:
            return {"tau_ref": spec.parameters["refractory_time"].value}
        assert spec.refractory_steps is not None
        building.note("refractory_steps", "tau_ref = (refractory_steps + 1/2)*dt: no rounding of t decides")
        return {"tau_ref": np.asarray((spec.refractory_steps + 0.5) * dt)}
    if spec.adaptive:
        tau = _tau(spec, "adapt_decay", dt, building)
        building.note("adapt_scale", "beta = adapt_scale * (exp(dt/tau_a) - 1)")
        return {"tau_a": tau, "beta": _float64(spec, "adapt_scale", 0.0) * np.expm1(dt / tau.astype(np.float64))}
    return {}


def build(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `JaxStage` [B, T, ...] around a `brainpy.state` neuron; learnable numbers are its parameters.

    Voltages get the spec's `value_unit` (mV, if it has none), times its `time_unit` (ms, and a dt of 1), R is in ohm.
    With `value_unit="1"` there are no units but that of time. A scalar spec has no size: it takes any input.
    """
    spec = simplified(spec)
    _refuse(spec, building)
    dtype = spec.parameters["threshold"].value.dtype
    dt = 1.0 if spec.dt is None else spec.dt
    threshold = _float64(spec, "threshold", 0.0)
    below = _reset_number(spec, threshold, building)
    if not (threshold > below).all():
        raise building.impossible("reset_value", str(below), "V_th must lie above V_reset", _NATIVE)
    numbers = {
        "tau": _tau(spec, "mem_decay", dt, building),
        "R": _resistance(spec, building),
        "V_th": threshold,
        "V_reset": below,
        "V_rest": _float64(spec, "leak", 0.0),
        **_rare(spec, dt, building),
    }
    numbers = {name: np.asarray(value, dtype=dtype) for name, value in numbers.items()}
    function = _surrogate(spec, numbers["V_th"] - numbers["V_reset"], numbers["V_th"], building)
    _note_gradients(spec, building)
    first = {"leak": "leak", "reset_value": "reset_value"}.get(spec.initial_state, "initial_v")
    start = _float64(spec, first, 0.0).astype(dtype)
    if spec.adaptive and not (start < numbers["V_th"]).all():
        why = "brainpy.state.ALIF takes it for a spike before the first step"
        raise building.impossible(first, str(start), why, f"a start below the threshold; or {_NATIVE}")
    return _made(spec, numbers, start, function, dt)


def _made(spec: NeuronSpec, numbers: Mapping[str, np.ndarray], start: np.ndarray, function: Any, dt: float) -> JaxStage:
    voltage = unit(spec.value_unit, "mV")
    time = unit(spec.time_unit, "ms")
    ohm = None if voltage is None else saiunit.ohm
    units = {"R": ohm, "tau": time, "tau_ref": time, "tau_a": time}
    sizes = np.broadcast_shapes(*(value.shape for value in (*numbers.values(), start)))

    def quantity(value: np.ndarray, unit: Any) -> Any:
        plain = value.item() if value.ndim == 0 else value
        return plain if unit is None else plain * unit

    cls = bp.LIFRef if "tau_ref" in numbers else bp.ALIF if "tau_a" in numbers else bp.LIF
    layer = cls(
        sizes or (1,),
        **{name: quantity(value, units.get(name, voltage)) for name, value in numbers.items()},
        V_initializer=init.Constant(quantity(start, voltage)),
        spk_fun=function,
        spk_reset="soft" if spec.reset == "subtract" else "hard",
        name=spec.name,
    )
    names = {"mem_decay": "tau", "resistance": "R", "leak": "V_rest"}
    learn = [own for name, own in names.items() if name in spec.parameters and spec.parameters[name].learnable]
    dtype = torch.from_numpy(np.zeros((), dtype=numbers["V_th"].dtype)).dtype
    return JaxStage(layer, dt=dt, time_dim=1, learn=learn, dtype=dtype, any_size=not sizes)


def unit(name: str | None, default: str) -> Any:
    """A unit by its name; None for "1"."""
    if name == "1":
        return None
    found = getattr(saiunit, {"s": "second", "V": "volt"}.get(name or default, name or default), None)
    return getattr(saiunit, default) if found is None else found
