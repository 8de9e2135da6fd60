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
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from tracetorch.core.choices import CHOICES, PARAMETERS, RAW_FORMS
from tracetorch.core.consistency import check_consistency, check_numbers, check_parameters
from tracetorch.core.parameter import Parameter, SpecError, refuse_all_but_numbers
from tracetorch.functional.surrogates import OpaqueSurrogate, Surrogate

JSON_VERSION = 1

# Fields that were not there from the beginning, with what a file from before means.
_LATER: Mapping[str, Any] = MappingProxyType(
    {"name": None, "value_unit": None, "state_levels": None, "spike_test": "membrane", "inhibition": "none"}
)


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
        check_numbers(self)
        if self.dt is not None:
            object.__setattr__(self, "dt", float(self.dt))
        if self.state_levels is not None:
            object.__setattr__(self, "state_levels", tuple(float(level) for level in self.state_levels))
        check_consistency(self)
        check_parameters(self)

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
    def from_dict(cls, data: Mapping[str, Any], parameters: Mapping[str, Parameter] | None = None) -> NeuronSpec:
        """The inverse of `to_dict`.

        Args:
            data: what `to_dict` gave.
            parameters: in the place of those in the data, of which then only a mapping need be there.

        Raises:
            SpecError: a missing or unknown field, or a wrong type.
        """
        if not isinstance(data, Mapping) or data.get("version") != JSON_VERSION:
            found = data.get("version") if isinstance(data, Mapping) else data
            raise SpecError(f"not a NeuronSpec of version {JSON_VERSION}: {found!r:.100}")
        values = {name: value for name, value in data.items() if name != "version"}
        names = {f.name for f in fields(cls)}
        values = {**_LATER, **values}
        if isinstance(values["state_levels"], list):
            refuse_all_but_numbers(values["state_levels"])
            values["state_levels"] = tuple(values["state_levels"])
        if set(values) != names:
            raise SpecError(f"fields missing: {sorted(names - set(values))}; unknown: {sorted(set(values) - names)}")
        for name in ("parameters", "surrogate"):
            if not isinstance(values[name], Mapping) and not (name == "surrogate" and values[name] is None):
                raise SpecError(f"{name}={values[name]!r:.100}: must be a mapping of names, as to_dict gives it")
        try:
            if parameters is None:
                parameters = {n: Parameter.from_dict(p) for n, p in values["parameters"].items()}
            values["parameters"] = parameters
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


__all__ = ["CHOICES", "JSON_VERSION", "PARAMETERS", "RAW_FORMS", "NeuronSpec", "Parameter", "SpecError"]
