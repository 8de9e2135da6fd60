"""What a `NeuronSpec` must fulfil beside the choices of each field; every check raises `SpecError`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tracetorch.core.choices import CHOICES, PARAMETERS
from tracetorch.core.parameter import SpecError, is_number

if TYPE_CHECKING:
    from tracetorch.core.spec import NeuronSpec


def check_numbers(spec: NeuronSpec) -> None:
    """Fields that are numbers, names or units."""
    for number, choice in (
        ("max_spikes", ("spike_count", "limited")),
        ("refractory_steps", ("refractory", "hold")),
    ):
        value, needed = getattr(spec, number), getattr(spec, choice[0]) == choice[1]
        if number == "refractory_steps" and "refractory_time" in spec.parameters:
            needed = False
        if needed and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise SpecError(f"{number}={value!r}: {choice[0]}={choice[1]!r} needs an integer of at least 1")
        if not needed and value is not None:
            raise SpecError(f"{number}={value!r}: only with {choice[0]}={choice[1]!r}")
    if (spec.dt is None) != (spec.time_unit is None):
        raise SpecError(f"dt={spec.dt!r}, time_unit={spec.time_unit!r}: give both or neither")
    if spec.dt is not None and not (is_number(spec.dt) and spec.dt > 0):
        raise SpecError(f"dt={spec.dt!r:.60}: must be a finite number above 0")
    if spec.state_levels is not None:
        levels = spec.state_levels
        if not isinstance(levels, tuple) or not levels or not all(map(is_number, levels)):
            raise SpecError(f"state_levels={levels!r:.60}: must be a tuple of finite numbers, or None")
    for unit in ("time_unit", "value_unit"):
        name = getattr(spec, unit)
        if name is not None and not isinstance(name, str):
            raise SpecError(f"{unit}={name!r:.60}: must be the name of a unit")
    if spec.name is not None and not isinstance(spec.name, str):
        raise SpecError(f"name={spec.name!r:.60}: must be a string or None")
    if not isinstance(spec.threshold_gradient, bool):
        raise SpecError(f"threshold_gradient={spec.threshold_gradient!r}: must be True or False")
    timed = [name for name, p in spec.parameters.items() if p.raw in ("exp_dt_tau", "one_minus_dt_rate")]
    if "refractory_time" in spec.parameters and spec.dt is None:
        raise SpecError("dt=None: refractory_time is a time, which needs a dt")
    if timed and spec.dt is None:
        raise SpecError(f"dt=None: {timed[0]} has the raw form {spec.parameters[timed[0]].raw!r}, which needs a dt")


def check_consistency(spec: NeuronSpec) -> None:
    """Choices that contradict each other."""
    spiking = spec.spike_count != "none"
    if (spec.output == "spikes") != spiking:
        raise SpecError(f"output={spec.output!r} contradicts spike_count={spec.spike_count!r}")
    if not spiking and (spec.reset != "none" or spec.surrogate is not None):
        raise SpecError("reset and surrogate need spikes, and spike_count='none'")
    if spec.reset_amount != "threshold" and spec.reset != "subtract":
        raise SpecError(f"reset_amount={spec.reset_amount!r} needs reset='subtract', not {spec.reset!r}")
    if spec.spike_count in ("multiple", "limited") and spec.comparison != ">=":
        raise SpecError(f"comparison={spec.comparison!r}: trunc(u / theta) counts from u >= theta")
    for name, neutral in (("spike_test", "membrane"), ("inhibition", "none")):
        if getattr(spec, name) != neutral and spec.spike_count != "single":
            raise SpecError(f"{name}={getattr(spec, name)!r} needs spike_count='single', not {spec.spike_count!r}")
    if spec.clamp == "before_spikes" and spec.reset != "none":
        raise SpecError(f"clamp='before_spikes' needs reset='none', not {spec.reset!r}")
    if spec.spike_test == "change" and spec.reset != "none":
        raise SpecError(f"spike_test='change' needs reset='none', not {spec.reset!r}")
    if spec.input_gain.startswith("one_minus_decay") and spec.decay == "none":
        raise SpecError(f"input_gain={spec.input_gain!r} needs a decay; with decay='none' it is 0")
    if spec.reset_amount == "threshold_over_decay" and spec.decay == "none":
        raise SpecError("reset_amount='threshold_over_decay' needs a decay; with decay='none' it is 'threshold'")


def needed_parameters(choices: Mapping[str, str]) -> dict[str, bool]:
    """Whether choices, by field, need a parameter; others they may have or not."""
    return {
        "mem_decay": choices["decay"] == "geometric",
        "syn_decay": choices["synapse"] != "none",
        "input_gain": choices["input_gain"] == "value",
        "threshold": choices["spike_count"] != "none",
        "reset_amount": choices["reset_amount"] == "value",
        "reset_value": choices["reset"] in ("value", "add_value") or choices["initial_state"] == "reset_value",
        "min_v_mem": choices["clamp"] != "none",
    }


def check_parameters(spec: NeuronSpec) -> None:
    """Parameters that are missing, or have no part in the choices."""
    spiking = spec.spike_count != "none"
    needed = needed_parameters({name: getattr(spec, name) for name in CHOICES})
    allowed = {"leak": True, "bias": spiking, "spike_scale": spiking}
    allowed |= {"adapt_decay": spiking, "adapt_scale": spiking}
    allowed |= {"resistance": spec.input_gain == "one_minus_decay", "surrogate_scale": spiking}
    allowed |= {"initial_v": spec.initial_state == "zero", "refractory_time": spec.refractory == "hold"}
    allowed |= {"neg_threshold": _may_be_signed(spec), "neg_scale": spec.signed}
    if ("adapt_decay" in spec.parameters) != ("adapt_scale" in spec.parameters):
        raise SpecError("parameters: an adaptive threshold needs both 'adapt_decay' and 'adapt_scale'")
    for name in PARAMETERS:
        if needed.get(name) and name not in spec.parameters:
            raise SpecError(f"parameters: {name!r} is missing, which these choices need")
        if name in spec.parameters and not (needed.get(name) or allowed.get(name)):
            raise SpecError(f"parameters: {name!r} has no part in these choices")

    scale, residual = spec.parameters.get("spike_scale"), spec.reset_timing == "same_step_residual"
    scaled = scale is not None and (scale.learnable or bool((scale.value != 1).any()))
    if spec.inhibition == "winner" and residual and spec.reset != "none" and scaled:
        raise SpecError(
            f"spike_scale={scale}: with inhibition='winner' a spike is not scaled, but snnTorch divides a reset in "
            "its own step by the scale; use graded_spikes_factor=1, or reset_delay=True"
        )


def _may_be_signed(spec: NeuronSpec) -> bool:
    """Choices for which the equations of two signs say what happens."""
    tested = (spec.spike_test, spec.inhibition) == ("membrane", "none") and not spec.adaptive
    taken = spec.reset == "none" or (spec.reset, spec.reset_amount) == ("subtract", "threshold")
    return tested and taken and spec.spike_count in ("single", "smooth")
