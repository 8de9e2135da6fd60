"""The equations of a spec in float64, in one canonical form for all frameworks.

A framework that resets in the next step and one that resets in the same step can be the same neuron. So the oracle
computes with the membrane *after* its reset, v, whatever the source stores:

    i = x | a_s*(i + x)                       synapse
    u = a*v + b*i + c                         b = 1, 1-a or a parameter; c = (1-a)*leak
    s = count(u)                              u > theta, u >= theta or trunc(u / theta); theta = threshold - bias
    v = u - s*rho | s ? v_reset : u | u*(s==0) + v_reset | u
    v = max(v, v_min)
    output = g*s | u

A reset by theta applied after the next decay is, in these coordinates, rho = theta / a (with a = 0, a tiny a stands in
for it, so that a*rho is theta still). snnTorch's `reset_delay=False`
("same_step_residual") subtracts r*theta before the spike test, r = (v above theta), and (s - r)*theta after it; with a
reset to zero, v is set to 0 before the decay where r, and (s - r)*u subtracted after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tracetorch.oracle.raw import RAW, Array
from tracetorch.oracle.surrogates import DERIVATIVES


class OracleError(ValueError):
    """The oracle has no equations for a choice, or cannot judge what it was given."""


# What the oracle has equations for; a spec with another choice is refused by name.
_COVERED: dict[str, tuple[str, ...]] = {
    "synapse": ("none", "add_then_decay"),
    "spike_count": ("none", "single", "multiple", "limited"),
    "reset_timing": ("same_step", "same_step_residual", "next_step_before_decay", "next_step_after_decay"),
    "reset_gradient": ("attached", "detached"),
    "refractory": ("none",),
    "initial_state": ("zero",),
}


@dataclass(frozen=True)
class Equations:
    """Numbers (float64, broadcastable against the neurons) and choices of the canonical form; see the module."""

    choices: Any  # the NeuronSpec, for its choices
    a: Array
    a_error: Array  # relative, in unit roundoffs
    a_s: Array | None
    a_s_error: Array
    b: Array
    c: Array
    threshold: Array
    bias: Array
    rho: Array
    divided: bool  # rho = theta / a: the reset is worth theta after the next decay
    v_reset: Array
    v_min: Array | None
    g: Array

    @property
    def theta(self) -> Array:
        """The membrane at which a spike fires."""
        return self.threshold - self.bias

    @property
    def residual(self) -> bool:
        """Whether the spike test first subtracts a reset for a membrane still above the threshold."""
        return bool(self.choices.reset_timing == "same_step_residual" and self.choices.reset != "none")

    def count(self, u: Array) -> Array:
        """Spikes of a membrane."""
        kind = self.choices.spike_count
        if kind == "none":
            return np.zeros_like(u)
        if kind == "single":
            return np.where(u > self.theta if self.choices.comparison == ">" else u >= self.theta, 1.0, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            n = np.where(u > 0, np.trunc(u / self.theta), 0.0)
        return n if kind == "multiple" else np.asarray(np.minimum(n, float(self.choices.max_spikes)))

    def surrogate(self, u: Array) -> Array:
        """Derivative that stands in for ds/du."""
        chosen = self.choices.surrogate
        with np.errstate(over="ignore"):
            value = DERIVATIVES[chosen.name](u - self.theta, self.threshold, **dict(chosen.parameters))
        return np.asarray(value, dtype=np.float64)

    def after_reset(self, stored: Array, spikes: Array) -> Array:
        """The canonical membrane of one stored before its reset: applies the pending reset."""
        if self.choices.reset == "subtract":
            return stored - spikes * self.rho
        return stored if self.choices.reset == "none" else np.where(spikes > 0, self.v_reset, stored)

    def before_reset(self, v: Array, spikes: Array) -> Array:
        """The inverse of `after_reset` for a subtractive reset: what a source that stores it before the reset shows."""
        if self.choices.reset != "subtract":
            raise OracleError(f"reset={self.choices.reset!r} loses the membrane before the reset")
        return v + spikes * self.rho


def equations(spec: Any) -> Equations:
    """The canonical equations of a `NeuronSpec`.

    Raises:
        OracleError: a choice the oracle has no equations for; names the field and its value.
    """
    for name, covered in _COVERED.items():
        choice = getattr(spec, name)
        if choice not in covered:
            raise OracleError(f"{name}={choice!r}: the oracle has no equations for it; it has: {', '.join(covered)}")

    for name, parameter in spec.parameters.items():
        if parameter.raw not in RAW:
            raise OracleError(f"{name}: the oracle has no equations for the raw form {parameter.raw!r}")

    def value(name: str, default: float) -> Array:
        if name not in spec.parameters:
            return np.float64(default) * np.ones(())
        parameter = spec.parameters[name]
        return np.asarray(RAW[parameter.raw].value(parameter.value.astype(np.float64)), dtype=np.float64)

    def error(name: str) -> Array:
        if name not in spec.parameters:
            return np.zeros(())
        parameter = spec.parameters[name]
        return np.asarray(RAW[parameter.raw].error(parameter.value.astype(np.float64)), dtype=np.float64)

    a = value("mem_decay", 1.0)
    divided = spec.reset == "subtract" and (
        spec.reset_amount == "threshold_over_decay" or spec.reset_timing == "next_step_after_decay"
    )
    a = np.where(a == 0, 1e-30, a) if divided else a
    threshold = value("threshold", 0.0)
    gain = {"one": np.ones(()), "one_minus_decay": 1 - a, "value": value("input_gain", 1.0)}[spec.input_gain]
    rho = value("reset_amount", 0.0) if spec.reset_amount == "value" else threshold
    rho = rho / a if divided else rho
    return Equations(
        choices=spec,
        a=a,
        a_error=error("mem_decay"),
        a_s=value("syn_decay", 0.0) if spec.synapse != "none" else None,
        a_s_error=error("syn_decay"),
        b=gain,
        c=(1 - a) * value("leak", 0.0),
        threshold=threshold,
        bias=value("bias", 0.0),
        rho=rho,
        divided=divided,
        v_reset=value("reset_value", 0.0),
        v_min=value("min_v_mem", 0.0) if spec.clamp == "after_reset" else None,
        g=value("spike_scale", 1.0),
    )
