"""brainpy.state: `LIF` and `IF` as source and target (brainpy 2.8.2, brainpy_state 0.1.0, brainstate 0.5.4).

Equations, e = exp(-dt/tau), H(u) = [u >= 0], rho = V_th - V_reset, s' the spikes of the membrane left by the last step:

    soft:  V = V - rho*s'                  hard:  V = V - (stop(V) - V_reset)*s'
    V = e*V + (1 - e)*(V_rest + R*I)       s = H((V - V_th) / rho), its gradient that of spk_fun at that argument

`IF` is the same with V_rest = V_reset = 0: it does leak, with tau. A layer is one of brainpy's own, or a `JaxStage`
around one; what is built is a `JaxStage`, whose `to_jax()` is brainpy's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import brainpy.state as bp
import numpy as np
import saiunit
import torch
from braintools import init
from braintools.surrogate import ReluGrad
from torch import Tensor, nn

from tracetorch.adapters.base import Building
from tracetorch.adapters.brainpy import surrogates
from tracetorch.adapters.jax.module import is_neuron as is_brainpy_neuron
from tracetorch.adapters.jax.module import is_quantity, number
from tracetorch.adapters.jax.stage import JaxStage
from tracetorch.adapters.losses import neutral
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks.modules import nested
from tracetorch.adapters.simplify import simplified
from tracetorch.adapters.stateful import SeamError
from tracetorch.core.raw import from_raw, to_raw
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError

NAME = "brainpy"
STEPPED = False
# Why a class cannot be read; it still runs in a pipeline.
_REFUSED = {
    "LIFRef": "its refractory time is counted in brainstate's own clock t, whose rounding decides the last held step",
    "ALIF": "its adaptation decays after the spike was added to it, and is kept in a state of its own",
}


def _neuron(layer: Any) -> Any:
    return layer.held.module if isinstance(layer, JaxStage) else layer


def is_neuron(module: Any) -> bool:
    """A neuron of brainpy.state, or a `JaxStage` around one."""
    return is_brainpy_neuron(_neuron(module))


def _stage(layer: Any, dt: float | None) -> JaxStage:
    return layer if isinstance(layer, JaxStage) else JaxStage(layer, dt=dt, time_dim=1)


def _check_class(neuron: Any) -> None:
    name = type(neuron).__name__
    if type(neuron) not in (bp.LIF, bp.IF):
        why = _REFUSED.get(name, "of brainpy.state's neurons LIF and IF can be read")
        raise SpecError(f"brainpy.state.{name}: {why}; adapters.JaxStage runs it, in a pipeline too")
    for attribute in ("_current_inputs", "_delta_inputs", "_before_updates", "_after_updates"):
        if getattr(neuron, attribute, None):
            found = f"{attribute.strip('_')}={getattr(neuron, attribute)!r:.80}"
            raise SpecError(f"{found}: inputs and updates beside the call have no place in a spec")
    if neuron.spk_reset not in ("soft", "hard"):
        raise SpecError(f"spk_reset={neuron.spk_reset!r}: must be 'soft' or 'hard'")


def _units(stage: JaxStage) -> None:
    """Raises `SpecError` for a mixture of numbers with and without units."""
    units = stage.units
    voltages = {name: units[name] for name in ("V_th", "V_reset", "V_rest") if name in units}
    if len(set(voltages.values())) > 1:
        raise SpecError(f"V_th={units['V_th']}: a mixture of units, {voltages}; give all voltages a unit, or none")
    if units["V"] != units["V_th"]:
        raise SpecError(f"V_initializer={units['V']}: V_th has the unit {units['V_th']}; give both a unit, or neither")
    time = stage.held.time_unit
    if time is not None and time.dim != saiunit.second.dim:
        raise SpecError(f"tau={units['tau']}: no unit of time; give tau in ms, or no unit at all")
    if units["V_th"] == "1" and units["R"] != "1":
        raise SpecError(f"R={units['R']}: it has a unit and V_th has none; give R without a unit too")


def _start(stage: JaxStage, values: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray | None]:
    """`initial_state`, and the number where it is none of its choices."""
    neuron = stage.held.module
    source = neuron.V_initializer
    constant = source.value if type(source) is init.Constant else source
    if not is_quantity(constant) and not isinstance(constant, (int, float, np.ndarray)):
        raise SpecError(f"V_initializer={source!r:.80}: only a constant can be read")
    unit = next(slot.unit for slot in stage.held.slots if slot.name == "V")
    first = np.asarray(number(constant, unit), dtype=values["V_th"].dtype)
    if not first.any():
        return "zero", None
    for name, field in (("V_rest", "leak"), ("V_reset", "reset_value")):
        there = name in values and (name == "V_rest" or neuron.spk_reset == "hard")
        if there and first.shape in ((), values[name].shape) and np.all(first == values[name]):
            return field, None
    return "zero", first


def spec(layer: Any, dt: float | None = None) -> NeuronSpec:
    """Read a `brainpy.state.LIF` or `IF`, or a `JaxStage` around one. Numbers are in V_th's unit, time in tau's.

    Args:
        dt: the time step, in the unit of tau; None: the stage's own, or `brainstate.environ`'s.

    Raises:
        SpecError: another class; no dt; units mixed with none; a `spk_fun` that is not one of braintools.surrogate; a
            V_initializer that is no constant; inputs or updates beside the call.
    """
    _check_class(_neuron(layer))
    try:
        stage = _stage(layer, dt)
        _units(stage)
        step = dt if dt is not None and stage.dt is None else stage.step_length()
    except (SeamError, TypeError) as error:
        raise SpecError(f"units: {error}") from error
    if step is None:
        why = "brainpy.state's neurons hold no time step; give dt=..., or brainstate.environ.set(dt=...)"
        raise SpecError(f"dt=None: {why}")
    neuron, values = stage.held.module, _values(stage)
    learned = [name for name in ("V_th", "V_reset") if isinstance(getattr(stage, name, None), nn.Parameter)]
    if learned:
        why = "it also sets the width of the surrogate and the reset, which stay constant"
        raise SpecError(f"{learned[0]}=learned: {why}")
    reset = values.get("V_reset", np.zeros_like(values["V_th"]))
    rho = (values["V_th"] - reset).astype(values["V_th"].dtype)
    surrogate, scale, strict = surrogates.read(neuron.spk_fun, rho)
    hard = neuron.spk_reset == "hard"
    own = attributes(stage)
    parameters = {
        "mem_decay": Parameter(values["tau"], _learns(stage, "tau"), "exp_dt_tau"),
        "resistance": Parameter(values["R"], _learns(stage, "R")),
        "threshold": Parameter(values["V_th"]),
        "surrogate_scale": Parameter(scale),
        ("reset_value" if hard else "reset_amount"): Parameter(reset if hard else rho),
    }
    if "leak" in own:
        parameters["leak"] = Parameter(values["V_rest"], _learns(stage, "V_rest"))
    start, first = _start(stage, values)
    if first is not None:
        parameters["initial_v"] = Parameter(first)
    return NeuronSpec(
        form="brainpy.LIF",
        input_gain="one_minus_decay",
        comparison=">" if strict else ">=",
        reset="value" if hard else "subtract",
        reset_amount="threshold" if hard else "value",
        reset_timing="next_step_before_decay",
        reset_gradient="membrane_stopped" if hard else "attached",
        initial_state=start,
        surrogate=surrogate,
        dt=step,
        time_unit=stage.units["tau"],
        value_unit=stage.units["V_th"],
        parameters=parameters,
    )


def _values(stage: JaxStage) -> dict[str, np.ndarray]:
    return {name: getattr(stage, name).detach().cpu().numpy() for name in stage.value_names}


def _learns(stage: JaxStage, name: str) -> bool:
    return bool(getattr(stage, name).requires_grad)


def attributes(layer: Any) -> Mapping[str, str]:
    """tau, R, V_rest, V_th and, with a hard reset, V_reset."""
    stage, neuron = layer, _neuron(layer)
    names = {"mem_decay": "tau", "resistance": "R", "leak": "V_rest", "threshold": "V_th"}
    if neuron.spk_reset == "hard":
        names["reset_value"] = "V_reset"
    return {name: own for name, own in names.items() if hasattr(stage, own)}


def states(layer: JaxStage) -> tuple[str, ...]:
    """The membrane V."""
    return layer.state_names


def reset(layer: JaxStage) -> None:
    """Back to V_initializer."""
    layer.reset_states()


def trace(layer: JaxStage, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole sequence at once from the initial state, as one compiled scan."""
    layer.reset_states()
    outputs, recorded = layer.trace(xs)
    return outputs, {"v_mem": recorded["V"]}


# ---- building --------------------------------------------------------------------------------------------------------


def _refuse(spec: NeuronSpec, building: Building) -> None:
    """What brainpy.state.LIF does not compute."""
    remedy = "to='tracetorch'"
    for field, has in (
        ("synapse", ("none",)),
        ("output", ("spikes",)),
        ("clamp", ("none",)),
        ("refractory", ("none",)),
        ("spike_count", ("single",)),
        ("reset", ("subtract", "value", "add_value")),
        ("reset_timing", ("same_step", "next_step_before_decay", "next_step_after_decay")),
    ):
        if getattr(spec, field) not in has:
            why = f"brainpy.state.LIF has {', '.join(map(repr, has))} there"
            raise building.impossible(field, getattr(spec, field), why, remedy)
    if spec.reset == "add_value" and not neutral(spec, "reset_value", 0.0):
        raise building.impossible("reset", spec.reset, "brainpy.state.LIF sets V_reset where it fired", remedy)
    if spec.reset == "value" and spec.reset_timing == "next_step_after_decay":
        raise building.impossible("reset_timing", spec.reset_timing, "brainpy resets before the decay", remedy)
    if spec.adaptive:
        raise building.impossible("adapt_scale", str(spec.parameters["adapt_scale"]), "V_th is constant", remedy)
    for name, nothing in (("bias", 0.0), ("spike_scale", 1.0)):
        if not neutral(spec, name, nothing):
            raise building.impossible(name, str(spec.parameters[name]), "brainpy.state.LIF has none", remedy)


def _float64(spec: NeuronSpec, name: str, default: float) -> np.ndarray:
    if name not in spec.parameters:
        return np.asarray(default)
    parameter = spec.parameters[name]
    raw = torch.from_numpy(parameter.value.astype(np.float64))
    return np.asarray(from_raw(parameter.raw, raw, spec.dt).numpy())


def _tau(spec: NeuronSpec, dt: float, building: Building) -> np.ndarray:
    """tau in the unit of dt; the source's own numbers where they are one."""
    if spec.decay != "geometric":
        raise building.impossible("decay", spec.decay, "brainpy.state.LIF decays by its tau", "a decay below 1")
    parameter = spec.parameters["mem_decay"]
    if parameter.raw == "exp_dt_tau" and spec.dt == dt:
        return parameter.value
    a = _float64(spec, "mem_decay", 1.0)
    if not ((a > 0) & (a < 1)).all():
        value = float(a[(a <= 0) | (a >= 1)].reshape(-1)[0]) if a.ndim else float(a)
        raise building.impossible("mem_decay", value, "exp(-dt/tau) lies between 0 and 1", "a decay between 0 and 1")
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
            "input_gain", spec.input_gain, "R holds 1/(1-a), which would not follow its training", "a constant decay"
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


def build(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `JaxStage` [B, T, ...] around a `brainpy.state.LIF`; learnable numbers are its parameters.

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
        raise building.impossible("reset_value", str(below), "V_th must lie above V_reset", "to='tracetorch'")
    numbers = {
        "tau": _tau(spec, dt, building),
        "R": _resistance(spec, building),
        "V_th": threshold,
        "V_reset": below,
        "V_rest": _float64(spec, "leak", 0.0),
    }
    numbers = {name: np.asarray(value, dtype=dtype) for name, value in numbers.items()}
    rho = numbers["V_th"] - numbers["V_reset"]
    assert spec.surrogate is not None
    scale = _float64(spec, "surrogate_scale", 1.0).astype(dtype)
    function = surrogates.write(spec.surrogate, scale, rho, numbers["V_th"], spec.comparison == ">")
    if isinstance(function, surrogates.SpikeFunction):
        if building.stock and spec.comparison == ">":
            building.cannot("comparison", ">", "braintools.surrogate fires at the threshold too", "stock=False")
        if building.stock:
            building.note("surrogate", f"{spec.surrogate} is not braintools.surrogate's; ReluGrad", gradient="differs")
            function = ReluGrad()
        else:
            building.note("spk_fun", f"custom callable: {function}")
    elif function is None:
        why = f"{spec.surrogate} has no counterpart in JAX; ReluGrad in its place"
        building.note("surrogate", why, gradient="differs")
        function = ReluGrad()
    _note_gradients(spec, building)
    first = {"leak": "leak", "reset_value": "reset_value"}.get(spec.initial_state, "initial_v")
    start = _float64(spec, first, 0.0).astype(dtype)
    return _made(spec, numbers, start, function, dt)


def _made(spec: NeuronSpec, numbers: Mapping[str, np.ndarray], start: np.ndarray, function: Any, dt: float) -> JaxStage:
    voltage = _unit(spec.value_unit, "mV")
    time = _unit(spec.time_unit, "ms")
    ohm = None if voltage is None else saiunit.ohm
    units = {"R": ohm, "tau": time, "V_th": voltage, "V_reset": voltage, "V_rest": voltage}
    sizes = np.broadcast_shapes(*(value.shape for value in (*numbers.values(), start)))

    def quantity(value: np.ndarray, unit: Any) -> Any:
        plain = value.item() if value.ndim == 0 else value
        return plain if unit is None else plain * unit

    layer = bp.LIF(
        sizes or (1,),
        **{name: quantity(value, units[name]) for name, value in numbers.items()},
        V_initializer=init.Constant(quantity(start, voltage)),
        spk_fun=function,
        spk_reset="soft" if spec.reset == "subtract" else "hard",
    )
    names = {"mem_decay": "tau", "resistance": "R", "leak": "V_rest"}
    learn = [own for name, own in names.items() if name in spec.parameters and spec.parameters[name].learnable]
    dtype = torch.from_numpy(np.zeros((), dtype=numbers["V_th"].dtype)).dtype
    return JaxStage(layer, dt=dt, time_dim=1, learn=learn, dtype=dtype, any_size=not sizes)


def _unit(name: str | None, default: str) -> Any:
    """A unit by its name; None for "1"."""
    if name == "1":
        return None
    found = getattr(saiunit, {"s": "second", "V": "volt"}.get(name or default, name or default), None)
    return getattr(saiunit, default) if found is None else found


class PerStep(nn.Module):
    """Calls a stateless module once per time step of [B, T, ...]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, ...] -> [B, T, ...]."""
        return torch.stack([self.module(step) for step in x.unbind(1)], 1)


def wrap(module: nn.Module) -> nn.Module:
    """Linear and elementwise modules as they are, others once per step."""
    return module if type(module) in (nn.Linear, *known.ELEMENTWISE) else PerStep(module)


def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """An `nn.Sequential` over [B, T, ...] of torch modules and `JaxStage`s."""
    return nested(modules, nn.Sequential)
