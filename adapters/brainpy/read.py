"""Neurons of brainpy.state read into specs: `LIF`, `IF`, `LIFRef`, `ALIF` (brainpy 2.8.2, brainpy_state 0.1.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import brainpy.state as bp
import numpy as np
import saiunit
from braintools import init
from torch import nn

from tracetorch.adapters.brainpy import surrogates
from tracetorch.adapters.jax.module import is_quantity, number
from tracetorch.adapters.jax.stage import JaxStage
from tracetorch.adapters.stateful import SeamError
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError

CLASSES = (bp.LIF, bp.IF, bp.LIFRef, bp.ALIF)
_ATTRIBUTES = {"mem_decay": "tau", "resistance": "R", "leak": "V_rest", "threshold": "V_th"}


def neuron_of(layer: Any) -> Any:
    """brainpy's own layer, of a stage a private one."""
    return layer.held.module if isinstance(layer, JaxStage) else layer


def _stage(layer: Any, dt: float | None) -> JaxStage:
    return layer if isinstance(layer, JaxStage) else JaxStage(layer, dt=dt, time_dim=1)


def _check_class(neuron: Any) -> None:
    name = type(neuron).__name__
    if type(neuron) not in CLASSES:
        why = f"of brainpy.state's neurons {', '.join(cls.__name__ for cls in CLASSES)} can be read"
        raise SpecError(f"brainpy.state.{name}: {why}; adapters.JaxStage runs it, in a pipeline too")
    for attribute in ("_current_inputs", "_delta_inputs", "_before_updates", "_after_updates"):
        if getattr(neuron, attribute, None):
            found = f"{attribute.strip('_')}={getattr(neuron, attribute)!r:.80}"
            raise SpecError(f"{found}: inputs and updates beside the call have no place in a spec")
    if neuron.spk_reset not in ("soft", "hard"):
        raise SpecError(f"spk_reset={neuron.spk_reset!r}: must be 'soft' or 'hard'")


def _check_units(stage: JaxStage) -> None:
    """Raises `SpecError` for a mixture of numbers with and without units."""
    units = stage.units
    voltages = {name: units[name] for name in ("V_th", "V_reset", "V_rest", "beta") if name in units}
    if len(set(voltages.values())) > 1:
        raise SpecError(f"V_th={units['V_th']}: a mixture of units, {voltages}; give all voltages a unit, or none")
    if units["V"] != units["V_th"]:
        raise SpecError(f"V_initializer={units['V']}: V_th has the unit {units['V_th']}; give both a unit, or neither")
    time = stage.held.time_unit
    if time is not None and time.dim != saiunit.second.dim:
        raise SpecError(f"tau={units['tau']}: no unit of time; give tau in ms, or no unit at all")
    if units["V_th"] == "1" and units["R"] != "1":
        raise SpecError(f"R={units['R']}: it has a unit and V_th has none; give R without a unit too")
    for name, what in (("tau_ref", "tau"), ("tau_a", "tau"), ("last_spike_time", "tau")):
        if units.get(name, units["tau"]) != units["tau"]:
            why = "brainpy compares its times in every step, and another unit rounds otherwise"
            raise SpecError(f"{what}={units[what]}: {name} is in {units[name]}; {why}; give both in ms")
    if units.get("a", "1") != "1":
        raise SpecError(f"a_initializer={units['a']}: the adaptation counts spikes; give it without a unit")


def _constant(stage: JaxStage, state: str, attribute: str, dtype: Any) -> np.ndarray:
    """What a state starts from."""
    source = getattr(stage.held.module, attribute)
    constant = source.value if type(source) is init.Constant else source
    if not is_quantity(constant) and not isinstance(constant, (int, float, np.ndarray)):
        raise SpecError(f"{attribute}={source!r:.80}: only a constant can be read")
    unit = next(slot.unit for slot in stage.held.slots if slot.name == state)
    return np.asarray(number(constant, unit), dtype=dtype)


def _start(stage: JaxStage, values: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray | None]:
    """`initial_state`, and the number where it is none of its choices."""
    first = _constant(stage, "V", "V_initializer", values["V_th"].dtype)
    if not first.any():
        return "zero", None
    for name, field in (("V_rest", "leak"), ("V_reset", "reset_value")):
        there = name in values and (name == "V_rest" or stage.held.module.spk_reset == "hard")
        if there and first.shape in ((), values[name].shape) and np.all(first == values[name]):
            return field, None
    return "zero", first


def _step_length(stage: JaxStage, dt: float | None) -> float:
    try:
        _check_units(stage)
        step = dt if dt is not None and stage.dt is None else stage.step_length()
    except (SeamError, TypeError) as error:
        raise SpecError(f"units: {error}") from error
    if step is None:
        why = "brainpy.state's neurons hold no time step; give dt=..., or brainstate.environ.set(dt=...)"
        raise SpecError(f"dt=None: {why}")
    return step


def _learns(stage: JaxStage, name: str) -> bool:
    return bool(getattr(stage, name).requires_grad)


def _check_learned(stage: JaxStage) -> None:
    surrogate = "it also sets the width of the surrogate and the reset, which stay constant"
    adaptation = "adapt_scale is beta / (exp(dt/tau_a) - 1), which could not follow it"
    reasons = {"V_th": surrogate, "V_reset": surrogate, "beta": adaptation, "tau_a": adaptation}
    reasons["tau_ref"] = "no gradient reaches it"
    for name, why in reasons.items():
        if isinstance(getattr(stage, name, None), nn.Parameter):
            raise SpecError(f"{name}=learned: {why}; give a constant {name}")


def adaptation(values: Mapping[str, np.ndarray], dt: float) -> np.ndarray:
    """1 - exp(-dt/tau_a), float64: what the adaptation loses in a step."""
    return np.asarray(-np.expm1(-dt / values["tau_a"].astype(np.float64)))


def _adapting(stage: JaxStage, values: Mapping[str, np.ndarray], dt: float) -> dict[str, Parameter]:
    """adapt_scale*n of the spec is beta*a of the class, n = a*(exp(dt/tau_a) - 1) before the spike test."""
    dtype = values["V_th"].dtype
    if _constant(stage, "a", "a_initializer", dtype).any():
        raise SpecError(f"a_initializer={stage.held.module.a_initializer!r:.80}: an adaptation starts at 0")
    if np.any(_constant(stage, "V", "V_initializer", dtype) >= values["V_th"]):
        why = "at or above V_th: it would count as a spike before the first step"
        raise SpecError(f"V_initializer={stage.held.module.V_initializer!r:.80}: {why}; start below V_th")
    scale = values["beta"].astype(np.float64) / np.expm1(dt / values["tau_a"].astype(np.float64))
    return {
        "adapt_decay": Parameter(values["tau_a"], False, "exp_dt_tau"),
        "adapt_scale": Parameter(np.asarray(scale, dtype=dtype)),
    }


def spec(layer: Any, dt: float | None = None) -> NeuronSpec:
    """Read a `brainpy.state` neuron, or a `JaxStage` around one. Numbers are in V_th's unit, times in tau's.

    Args:
        dt: the time step, in the unit of tau; None: the stage's own, or `brainstate.environ`'s.

    Raises:
        SpecError: another class; no dt; units mixed with none; a `spk_fun` that is not one of braintools.surrogate; a
            V_initializer that is no constant; inputs or updates beside the call.
    """
    _check_class(neuron_of(layer))
    try:
        stage = _stage(layer, dt)
    except (SeamError, TypeError) as error:
        raise SpecError(f"units: {error}") from error
    step = _step_length(stage, dt)
    _check_learned(stage)
    neuron = stage.held.module
    values = {name: getattr(stage, name).detach().cpu().numpy() for name in stage.value_names}
    hard, adapts = neuron.spk_reset == "hard", type(neuron) is bp.ALIF
    reset = values.get("V_reset", np.zeros_like(values["V_th"]))
    rho = (values["V_th"] - reset).astype(values["V_th"].dtype)
    surrogate, scale, strict = surrogates.read(neuron.spk_fun, rho)
    parameters = {
        "mem_decay": Parameter(values["tau"], _learns(stage, "tau"), "exp_dt_tau"),
        "resistance": Parameter(values["R"], _learns(stage, "R")),
        "threshold": Parameter(values["V_th"]),
        "surrogate_scale": Parameter(scale),
        ("reset_value" if hard else "reset_amount"): Parameter(reset if hard else rho),
    }
    if "V_rest" in values:
        parameters["leak"] = Parameter(values["V_rest"], _learns(stage, "V_rest"))
    start, first = _start(stage, values)
    if first is not None:
        parameters["initial_v"] = Parameter(first)
    if "tau_ref" in values:
        parameters["refractory_time"] = Parameter(values["tau_ref"])
    return NeuronSpec(
        form=f"brainpy.{'LIF' if type(neuron) is bp.IF else type(neuron).__name__}",
        name=neuron.name,
        input_gain="one_minus_decay",
        comparison=">" if strict else ">=",
        reset="value" if hard else "subtract",
        reset_amount="threshold" if hard else "value",
        reset_timing="same_step" if adapts else "next_step_before_decay",
        reset_gradient="membrane_stopped" if hard else "attached",
        refractory="hold" if "tau_ref" in values else "none",
        initial_state=start,
        surrogate=surrogate,
        dt=step,
        time_unit=stage.units["tau"],
        value_unit=stage.units["V_th"],
        parameters={**parameters, **(_adapting(stage, values, step) if adapts else {})},
    )


def attributes(layer: Any) -> Mapping[str, str]:
    """tau, R, V_rest, V_th and, with a hard reset, V_reset."""
    names = dict(_ATTRIBUTES)
    if neuron_of(layer).spk_reset == "hard":
        names["reset_value"] = "V_reset"
    return {name: own for name, own in names.items() if hasattr(layer, own)}
