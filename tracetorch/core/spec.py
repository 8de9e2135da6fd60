"""`NeuronSpec`: everything in which two frameworks' neurons can differ, as one frozen record.

Notation of the equations below, for one neuron and one time step: x input, i synaptic current, v membrane, a decay of
the membrane, a_s of the synapse, b input gain, theta threshold, rho reset amount, s spikes, r the reset signal.

    i = synapse(i, x)                          x itself, if there is no synapse
    u = a*v + b*i + (1-a)*leak                 membrane before the reset
    s = count(u - theta + bias)
    v = reset(u, s)                            in the same step or in the next one
    v = clamp(v)
    output = spike_scale * s                   or v, for a layer without spikes

With the parameters adapt_decay and adapt_scale the threshold adapts: theta above, also as a reset amount, is then
threshold + adapt_scale*n, and after the step n = adapt_decay*n + (1 - adapt_decay)*s, from 0. With the parameter
resistance b is that many times what input_gain says; with surrogate_scale the surrogate is a function of
(u - theta) / surrogate_scale; with initial_v that is the stored membrane before the first step. With `state_levels` u,
and a current that is kept, are rounded to the nearest of them before the spike test.

With the parameter neg_threshold spikes have two signs: p = count(u - theta + bias), n = -count(-neg_threshold - u -
bias); the reset subtracts p*theta + n*neg_threshold, the output is spike_scale*p + neg_scale*n (traceTorch LIT, LITS).

With the parameter refractory_time a membrane is held while t - t_last < refractory_time, t = k*dt in step k and t_last
that of the last spike, all in the layer's own floats (brainpy LIFRef): where it is a whole number of steps, rounding
decides the last one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from tracetorch.functional.surrogates import OpaqueSurrogate, Surrogate

JSON_VERSION = 1

# field -> choice -> what it means. The specification page of the documentation is generated from this table.
CHOICES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "output": {"spikes": "spike_scale * s", "membrane": "the membrane after the step"},
        "synapse": {
            "none": "i = x",
            "decay_then_add": "i = a_s*i + x (snnTorch Synaptic)",
            "add_then_decay": "i = a_s*(i + x) (sinabs tau_syn)",
            "read_then_decay": "the drive is i + x, stored is i = a_s*(i + x) (Norse LIF)",
            "moving_average": "i = a_s*i + (1-a_s)*x (traceTorch S layers)",
            "difference_of_exponentials": "e = a_s*e + x, i = a*i - x, u = k*(e + i), "
            "k = 1 + ln(a_s) / (ln(a) - ln(a_s)); its resets change e and i too (snnTorch Alpha)",
        },
        "decay": {"none": "a = 1", "geometric": "a = the parameter mem_decay, through its raw form"},
        "input_gain": {
            "one": "b = 1",
            "one_minus_decay": "b = 1 - a",
            "one_minus_decay_kept": "b = 1 - a, and the synapse keeps b*i in the place of i (sinabs ALIF)",
            "value": "b = the parameter input_gain",
        },
        "comparison": {">": "a spike where u > theta", ">=": "a spike where u >= theta"},
        "spike_count": {
            "none": "no spikes",
            "single": "at most one spike a step",
            "multiple": "trunc(u / theta) spikes a step where u > 0",
            "limited": "trunc(u / theta), at most max_spikes",
            "smooth": "a differentiable spike function, not a step",
        },
        "reset": {
            "none": "v = u",
            "subtract": "v = u - s*rho",
            "value": "v = reset_value where s > 0, else u",
            "add_value": "v = u*(s == 0) + reset_value for every neuron (sinabs MembraneReset)",
        },
        "reset_amount": {
            "threshold": "rho = theta (without the bias)",
            "threshold_over_decay": "rho = theta / a: what is left after a decay is exactly theta less",
            "value": "rho = the parameter reset_amount",
        },
        "reset_timing": {
            "same_step": "applied in the step of the spike; the state is stored after the reset",
            "same_step_residual": "in the step of the spike, but the spike test of a step first subtracts a reset for "
            "a stored membrane that is still above theta (snnTorch reset_delay=False)",
            "next_step_before_decay": "applied at the start of the next step; stored before the reset",
            "next_step_after_decay": "applied in the next step to the decayed membrane; stored before the reset",
            "next_step_discards_input": "the step after a spike yields the reset value whatever the input is",
        },
        "reset_gradient": {
            "attached": "the gradient flows through the spikes of the reset",
            "detached": "the spikes of the reset are constants in the backward pass",
            "membrane_stopped": "the membrane in the reset is a constant, the spike is not (brainpy hard reset)",
        },
        "clamp": {
            "none": "no lower bound",
            "after_reset": "v = max(v, min_v_mem) after the reset",
            "before_spikes": "u = max(u, min_v_mem) before the spikes are counted (snnTorch LeakyParallel)",
        },
        "spike_test": {
            "membrane": "s = count(u - theta)",
            "change": "s = count(abs(u - v) - theta), v the membrane of the step before (snnTorch DeltaLeaky)",
        },
        "inhibition": {
            "none": "every neuron spikes by itself",
            "winner": "of the neurons of a sample [B, N] only the first with the largest u - theta may emit, and its "
            "spike is not scaled; a reset in the next step takes all that were above theta (snnTorch inhibition=True)",
        },
        "refractory": {
            "none": "none",
            "hold": "the membrane is held for refractory_steps after a spike, or for the parameter refractory_time",
        },
        "initial_state": {"zero": "v = 0", "leak": "v = leak", "reset_value": "v = reset_value"},
    }
)

# How a raw (stored, trainable) number becomes the value in the equations. `tracetorch.core.raw` computes them in torch,
# `tracetorch.oracle.raw` in float64.
RAW_FORMS: Mapping[str, str] = MappingProxyType(
    {
        "value": "the number itself",
        "clamped": "min(max(raw, 0), 1)",
        "exp_tau": "exp(-1 / raw), raw in time steps",
        "exp_dt_tau": "exp(-dt / raw), raw and dt in the spec's time unit",
        "one_minus_inverse_tau": "1 - 1 / raw, raw in time steps",
        "one_minus_dt_rate": "1 - dt * raw",
        "one_minus_sigmoid": "1 - sigmoid(raw)",
        "sigmoid": "sigmoid(raw)",
        "softplus": "softplus(raw)",
    }
)

PARAMETERS = (
    "mem_decay",
    "syn_decay",
    "input_gain",
    "leak",
    "threshold",
    "bias",
    "reset_amount",
    "reset_value",
    "min_v_mem",
    "spike_scale",
    "adapt_decay",
    "adapt_scale",
    "resistance",
    "surrogate_scale",
    "initial_v",
    "neg_threshold",
    "neg_scale",
    "refractory_time",
)


# Fields that were not there from the beginning, with what a file from before means.
_LATER: Mapping[str, Any] = MappingProxyType(
    {"name": None, "value_unit": None, "state_levels": None, "spike_test": "membrane", "inhibition": "none"}
)


class SpecError(ValueError):
    """A `NeuronSpec` that contradicts itself, or that cannot be read from a layer."""


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _refuse_all_but_numbers(value: Any) -> None:
    """NumPy would read a string or a bool as a number."""
    if isinstance(value, list):
        for item in value:
            _refuse_all_but_numbers(item)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"{value!r:.60} is not a number")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a neuron: the raw numbers as the source stores them.

    Args:
        value: float32 or float64, scalar (shape `()`) or any shape that broadcasts against the layer's neurons. Copied
            and made read-only.
        learnable: whether the source trains it.
        raw: a key of `RAW_FORMS`.
    """

    value: np.ndarray
    learnable: bool = False
    raw: str = "value"

    def __post_init__(self) -> None:
        if not isinstance(self.value, (np.ndarray, np.generic)):
            raise SpecError(f"a parameter must be a float32 or float64 array, not {self.value!r:.60}")
        value = np.array(self.value, order="C")
        if value.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise SpecError(f"a parameter must be float32 or float64, not {value.dtype}")
        if not np.isfinite(value).all():
            raise SpecError(f"a parameter holds a value that is not finite ({value})")
        if value.size == 0:
            raise SpecError("a parameter is empty")
        if self.raw not in RAW_FORMS:
            raise SpecError(f"raw form {self.raw!r} is not known; known: {', '.join(RAW_FORMS)}")
        if not isinstance(self.learnable, bool):
            raise SpecError(f"learnable={self.learnable!r}: must be True or False")
        value.setflags(write=False)
        object.__setattr__(self, "value", value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parameter):
            return NotImplemented
        return (
            self.value.dtype == other.value.dtype
            and self.value.shape == other.value.shape
            and self.value.tobytes() == other.value.tobytes()
            and (self.learnable, self.raw) == (other.learnable, other.raw)
        )

    def __hash__(self) -> int:
        return hash((self.value.tobytes(), self.value.shape, self.learnable, self.raw))

    def __reduce__(self) -> Any:
        return type(self).from_dict, (self.to_dict(),)

    def __str__(self) -> str:
        if self.value.size == 1:
            text = f"{self.value.reshape(()).item():.9g}"
        else:
            text = f"{self.value.min():.6g} .. {self.value.max():.6g}"
        shape = "" if self.value.ndim == 0 else f", shape {list(self.value.shape)}"
        raw = "" if self.raw == "value" else f", {RAW_FORMS[self.raw]}"
        return f"{text}{shape}{raw}{', learnable' if self.learnable else ''}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; exact, since float64 holds every float32 and `repr` of a float64 is exact."""
        return {
            "value": self.value.astype(np.float64).tolist(),
            "dtype": str(self.value.dtype),
            "learnable": self.learnable,
            "raw": self.raw,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Parameter:
        """The inverse of `to_dict`. Raises `SpecError` on anything else."""
        try:
            extra = set(data) - {"value", "dtype", "learnable", "raw"}
            if extra or data["dtype"] not in ("float32", "float64") or not isinstance(data["learnable"], bool):
                raise SpecError(f"not a parameter: {dict(data)!r:.200}")
            _refuse_all_but_numbers(data["value"])
            with np.errstate(over="ignore"):  # what overflows float32 is infinite, and refused as that
                value = np.array(data["value"], dtype=data["dtype"])
            return cls(value, data["learnable"], data["raw"])
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise SpecError(f"not a parameter ({error}): {data!r:.200}") from error


@dataclass(frozen=True)
class NeuronSpec:
    """What a neuron layer computes. Every semantic choice is a field; `CHOICES` says what each value means.

    Args:
        form: the named order of operations in which the source computes it, a key of `tracetorch.core.forms.FORMS`.
        output, synapse, decay, input_gain, comparison, spike_count, reset, reset_amount, reset_timing, reset_gradient,
            clamp, spike_test, inhibition, refractory, initial_state: keys of `CHOICES[field]`.
        max_spikes: with `spike_count="limited"`, the most spikes a step.
        refractory_steps: with `refractory="hold"`, its length in time steps; None where refractory_time gives it.
        state_levels: the values that the states are rounded to in every step, the nearest, of two as near the first of
            the tuple, with a gradient of 1; `None`: not rounded. The membrane is rounded before the spike test (what a
            reset in the same step leaves is not), a synaptic current after the membrane has taken it.
        surrogate: the surrogate gradient; `None` if there are no spikes, or if no gradient flows.
        threshold_gradient: whether the surrogate's gradient also reaches the threshold.
        dt, time_unit: the time step and its unit, where the source has one; `None` means that time is in steps.
        value_unit: the unit of the membrane's numbers, where the source has one: that of its threshold.
        name: of the layer, where the source gives it one; two specs that differ in it are equal.
        parameters: by the names of `PARAMETERS`.

    Raises:
        SpecError: an unknown choice, a missing or unused parameter, a contradiction. Names the field and its value.
    """

    form: str
    output: str = "spikes"
    synapse: str = "none"
    decay: str = "geometric"
    input_gain: str = "one"
    comparison: str = ">="
    spike_count: str = "single"
    max_spikes: int | None = None
    reset: str = "subtract"
    reset_amount: str = "threshold"
    reset_timing: str = "same_step"
    reset_gradient: str = "attached"
    clamp: str = "none"
    spike_test: str = "membrane"
    inhibition: str = "none"
    refractory: str = "none"
    refractory_steps: int | None = None
    initial_state: str = "zero"
    state_levels: tuple[float, ...] | None = None
    surrogate: Surrogate | None = None
    threshold_gradient: bool = True
    dt: float | None = None
    time_unit: str | None = None
    value_unit: str | None = None
    name: str | None = field(default=None, compare=False)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.parameters, Mapping):
            raise SpecError(f"parameters={self.parameters!r:.60}: must be a mapping from names to Parameter")
        parameters = {name: self.parameters[name] for name in PARAMETERS if name in self.parameters}
        for name, parameter in parameters.items():
            if not isinstance(parameter, Parameter):
                raise SpecError(f"parameters: {name}={parameter!r:.60} must be a tracetorch.Parameter")
        unknown = set(self.parameters) - set(PARAMETERS)
        if unknown:
            raise SpecError(f"parameters: {sorted(unknown)} are not known; known: {', '.join(PARAMETERS)}")
        object.__setattr__(self, "parameters", MappingProxyType(parameters))
        if not isinstance(self.form, str) or not self.form:
            raise SpecError(f"form={self.form!r}: must be the name of an order of operations")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise SpecError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")
        if self.surrogate is not None and not isinstance(self.surrogate, Surrogate):
            raise SpecError(f"surrogate={self.surrogate!r}: must be a tracetorch.functional.Surrogate or None")
        self._check_numbers()
        self._check_consistency()
        self._check_parameters()

    def _check_numbers(self) -> None:
        for number, choice in (
            ("max_spikes", ("spike_count", "limited")),
            ("refractory_steps", ("refractory", "hold")),
        ):
            value, needed = getattr(self, number), getattr(self, choice[0]) == choice[1]
            if number == "refractory_steps" and "refractory_time" in self.parameters:
                needed = False
            if needed and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise SpecError(f"{number}={value!r}: {choice[0]}={choice[1]!r} needs an integer of at least 1")
            if not needed and value is not None:
                raise SpecError(f"{number}={value!r}: only with {choice[0]}={choice[1]!r}")
        if (self.dt is None) != (self.time_unit is None):
            raise SpecError(f"dt={self.dt!r}, time_unit={self.time_unit!r}: give both or neither")
        if self.dt is not None and not (_is_number(self.dt) and self.dt > 0):
            raise SpecError(f"dt={self.dt!r:.60}: must be a finite number above 0")
        if self.dt is not None:
            object.__setattr__(self, "dt", float(self.dt))
        if self.state_levels is not None:
            levels = self.state_levels
            if not isinstance(levels, tuple) or not levels or not all(map(_is_number, levels)):
                raise SpecError(f"state_levels={levels!r:.60}: must be a tuple of finite numbers, or None")
            object.__setattr__(self, "state_levels", tuple(float(level) for level in levels))
        for unit in ("time_unit", "value_unit"):
            name = getattr(self, unit)
            if name is not None and not isinstance(name, str):
                raise SpecError(f"{unit}={name!r:.60}: must be the name of a unit")
        if self.name is not None and not isinstance(self.name, str):
            raise SpecError(f"name={self.name!r:.60}: must be a string or None")
        if not isinstance(self.threshold_gradient, bool):
            raise SpecError(f"threshold_gradient={self.threshold_gradient!r}: must be True or False")
        timed = [name for name, p in self.parameters.items() if p.raw in ("exp_dt_tau", "one_minus_dt_rate")]
        if "refractory_time" in self.parameters and self.dt is None:
            raise SpecError("dt=None: refractory_time is a time, which needs a dt")
        if timed and self.dt is None:
            raise SpecError(f"dt=None: {timed[0]} has the raw form {self.parameters[timed[0]].raw!r}, which needs a dt")

    def _check_consistency(self) -> None:
        spiking = self.spike_count != "none"
        if (self.output == "spikes") != spiking:
            raise SpecError(f"output={self.output!r} contradicts spike_count={self.spike_count!r}")
        if not spiking and (self.reset != "none" or self.surrogate is not None):
            raise SpecError("reset and surrogate need spikes, and spike_count='none'")
        if self.reset_amount != "threshold" and self.reset != "subtract":
            raise SpecError(f"reset_amount={self.reset_amount!r} needs reset='subtract', not {self.reset!r}")
        if self.spike_count in ("multiple", "limited") and self.comparison != ">=":
            raise SpecError(f"comparison={self.comparison!r}: trunc(u / theta) counts from u >= theta")
        for name, neutral in (("spike_test", "membrane"), ("inhibition", "none")):
            if getattr(self, name) != neutral and self.spike_count != "single":
                raise SpecError(f"{name}={getattr(self, name)!r} needs spike_count='single', not {self.spike_count!r}")
        if self.clamp == "before_spikes" and self.reset != "none":
            raise SpecError(f"clamp='before_spikes' needs reset='none', not {self.reset!r}")
        if self.spike_test == "change" and self.reset != "none":
            raise SpecError(f"spike_test='change' needs reset='none', not {self.reset!r}")
        if self.reset_amount == "threshold_over_decay" and self.decay == "none":
            raise SpecError("reset_amount='threshold_over_decay' needs a decay; with decay='none' it is 'threshold'")

    def _check_parameters(self) -> None:
        spiking = self.spike_count != "none"
        needed = {
            "mem_decay": self.decay == "geometric",
            "syn_decay": self.synapse != "none",
            "input_gain": self.input_gain == "value",
            "threshold": spiking,
            "reset_amount": self.reset_amount == "value",
            "reset_value": self.reset in ("value", "add_value") or self.initial_state == "reset_value",
            "min_v_mem": self.clamp != "none",
        }
        allowed = {"leak": True, "bias": spiking, "spike_scale": spiking}
        allowed |= {"adapt_decay": spiking, "adapt_scale": spiking}
        allowed |= {"resistance": self.input_gain == "one_minus_decay", "surrogate_scale": spiking}
        allowed |= {"initial_v": self.initial_state == "zero", "refractory_time": self.refractory == "hold"}
        allowed |= {"neg_threshold": self._may_be_signed, "neg_scale": self.signed}
        if ("adapt_decay" in self.parameters) != ("adapt_scale" in self.parameters):
            raise SpecError("parameters: an adaptive threshold needs both 'adapt_decay' and 'adapt_scale'")
        for name in PARAMETERS:
            if needed.get(name) and name not in self.parameters:
                raise SpecError(f"parameters: {name!r} is missing, which these choices need")
            if name in self.parameters and not (needed.get(name) or allowed.get(name)):
                raise SpecError(f"parameters: {name!r} has no part in these choices")

        scale, residual = self.parameters.get("spike_scale"), self.reset_timing == "same_step_residual"
        scaled = scale is not None and (scale.learnable or bool((scale.value != 1).any()))
        if self.inhibition == "winner" and residual and self.reset != "none" and scaled:
            raise SpecError(
                f"spike_scale={scale}: with inhibition='winner' a spike is not scaled, but snnTorch divides a reset in "
                "its own step by the scale; use graded_spikes_factor=1, or reset_delay=True"
            )

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state variables, in the order in which a step takes them."""
        synapse = {"none": (), "difference_of_exponentials": ("i_exc", "i_inh")}.get(self.synapse, ("i_syn",))
        return (*synapse, "v_mem", *(("adaptation",) if self.adaptive else ()))

    @property
    def adaptive(self) -> bool:
        """Whether every spike raises the threshold: theta + adapt_scale*n, n the state `adaptation`."""
        return "adapt_decay" in self.parameters

    @property
    def signed(self) -> bool:
        """Whether spikes have two signs, by a threshold for each: `threshold` and `neg_threshold`."""
        return "neg_threshold" in self.parameters

    @property
    def _may_be_signed(self) -> bool:
        """Choices for which the equations of two signs say what happens."""
        tested = (self.spike_test, self.inhibition) == ("membrane", "none") and not self.adaptive
        taken = self.reset == "none" or (self.reset, self.reset_amount) == ("subtract", "threshold")
        return tested and taken and self.spike_count in ("single", "smooth")

    @property
    def stores_before_reset(self) -> bool:
        """Whether the stored membrane is the one before its reset (the reset then belongs to the next step)."""
        return self.reset != "none" and self.reset_timing.startswith("next_step")

    def replace(self, **changes: Any) -> NeuronSpec:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def differences(self, other: NeuronSpec) -> dict[str, tuple[Any, Any]]:
        """Fields (not parameters, not `form`) in which the two differ: `{field: (mine, theirs)}`."""
        names = [f.name for f in fields(self) if f.name not in ("form", "parameters", "name")]
        return {n: (getattr(self, n), getattr(other, n)) for n in names if getattr(self, n) != getattr(other, n)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, exact."""
        data: dict[str, Any] = {"version": JSON_VERSION}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "parameters":
                value = {name: parameter.to_dict() for name, parameter in value.items()}
            elif f.name == "surrogate" and isinstance(value, OpaqueSurrogate):
                raise SpecError(
                    f"surrogate={value}: a callable of your own has no name that a file could hold; use one of "
                    "tracetorch.functional.surrogates.SURROGATES, or pickle the module"
                )
            elif f.name == "surrogate" and value is not None:
                value = {"name": value.name, "parameters": dict(value.parameters)}
            if f.name not in _LATER or value != _LATER[f.name]:
                data[f.name] = list(value) if isinstance(value, tuple) else value
        return data

    def to_json(self) -> str:
        """One JSON object, exact; `from_json` gives an equal spec."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NeuronSpec:
        """The inverse of `to_dict`. Raises `SpecError` on a missing or unknown field or a wrong type."""
        if not isinstance(data, Mapping) or data.get("version") != JSON_VERSION:
            found = data.get("version") if isinstance(data, Mapping) else data
            raise SpecError(f"not a NeuronSpec of version {JSON_VERSION}: {found!r:.100}")
        values = {name: value for name, value in data.items() if name != "version"}
        names = {f.name for f in fields(cls)}
        values = {**_LATER, **values}
        if isinstance(values["state_levels"], list):
            _refuse_all_but_numbers(values["state_levels"])
            values["state_levels"] = tuple(values["state_levels"])
        if set(values) != names:
            raise SpecError(f"fields missing: {sorted(names - set(values))}; unknown: {sorted(set(values) - names)}")
        try:
            values["parameters"] = {n: Parameter.from_dict(p) for n, p in values["parameters"].items()}
            if values["surrogate"] is not None:
                given = values["surrogate"]
                if set(given) != {"name", "parameters"} or not isinstance(given["name"], str):
                    raise SpecError(f"surrogate={given!r:.100}: must have a name and parameters")
                values["surrogate"] = Surrogate(given["name"], tuple(sorted(given["parameters"].items())))
            return cls(**values)
        except (AttributeError, KeyError, OverflowError, TypeError) as error:
            raise SpecError(f"not a NeuronSpec: {error}") from error
        except ValueError as error:
            raise error if isinstance(error, SpecError) else SpecError(str(error)) from error

    @classmethod
    def from_json(cls, text: str) -> NeuronSpec:
        """The inverse of `to_json`. Raises `SpecError` on anything else."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"not JSON: {error}") from error
        return cls.from_dict(data)

    def __hash__(self) -> int:
        return hash(self.replace(name=None)._named()[0])

    def __reduce__(self) -> Any:
        return _restored, self._named()

    def _named(self) -> tuple[str, OpaqueSurrogate | None]:
        """As JSON, and beside it the surrogate that JSON cannot hold."""
        if isinstance(self.surrogate, OpaqueSurrogate):
            return self.replace(surrogate=None).to_json(), self.surrogate
        return self.to_json(), None

    def __str__(self) -> str:
        lines = [f"NeuronSpec, computed as {self.form}"]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("form", "parameters") or value is None:
                continue
            meaning = CHOICES.get(f.name, {}).get(value) if isinstance(value, str) else None
            lines.append(f"  {f.name:<18} {value}" + (f"   ({meaning})" if meaning else ""))
        lines += [f"  {name:<18} {parameter}" for name, parameter in self.parameters.items()]
        return "\n".join(lines)


def _restored(text: str, surrogate: OpaqueSurrogate | None) -> NeuronSpec:
    """For pickle and copy."""
    spec = NeuronSpec.from_json(text)
    return spec if surrogate is None else spec.replace(surrogate=surrogate)
