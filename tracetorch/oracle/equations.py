"""The equations of a spec in float64, in one canonical form for all frameworks.

A framework that resets in the next step and one that resets in the same step can be the same neuron. So the oracle
computes with the membrane *after* its reset, v, whatever the source stores:

    j = x | ...                               synapse: the drive j and the current i that is kept, see `synapse`
    u = a*v + b*j + c                         b = 1, 1-a or a parameter; c = (1-a)*leak
    u = v                                     while it is held: see below
    s = count(u)                              u > theta, u >= theta or trunc(u / theta); theta = threshold - bias; or
                                              smooth, the function of u - theta whose derivative the surrogate is
    v = u - s*rho | s ? v_reset : u | u*(s==0) + v_reset | u
    v = max(v, v_min)
    output = g*s | u

With `clamp="before_spikes"` u is max(u, u_min) from the first line on. With `levels`, u is the nearest of them before
the spikes are counted, and so is the current that is kept, after the drive has taken it. With `spike_test="change"` the
spikes are those of abs(u - v). With a winner's inhibition only one neuron of the last dimension emits; a reset in the
next step is that of every neuron above theta, one in the same step that of the winner.

It starts at v = 0, leak or v_reset, a constant. After a spike it is held for `hold` steps: `refractory_steps`, or one
step where the step after a spike yields the reset value whatever the input is ("next_step_discards_input"); or while
t - t_last < `hold_time`, t = k*dt in step k, in floats of that number's own dtype.

A reset by theta applied after the next decay is, in these coordinates, rho = theta / a (with a = 0, a tiny a stands in
for it, so that a*rho is theta still). snnTorch's `reset_delay=False`
("same_step_residual") subtracts r*theta before the spike test, r = (v above theta), and (s - r)*theta after it; with a
reset to zero, v is set to 0 before the decay where r (of a neuron with a synapse, and of RLeaky, u is), and (s - r)*u
subtracted after it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tracetorch.oracle.levels import nearest
from tracetorch.oracle.raw import RAW, Array
from tracetorch.oracle.surrogates import DERIVATIVES, PRIMITIVES
from tracetorch.oracle.winner import winner


class OracleError(ValueError):
    """The oracle has no equations for a choice, or cannot judge what it was given."""


# What the oracle has equations for; a spec with another choice is refused by name.
_COVERED: dict[str, tuple[str, ...]] = {
    "synapse": ("none", "decay_then_add", "add_then_decay", "read_then_decay", "moving_average"),
}


@dataclass(frozen=True)
class Equations:
    """Numbers (float64, broadcastable against the neurons) and choices of the canonical form; see the module."""

    choices: Any  # the NeuronSpec, for its choices
    a: Array
    a_error: Array  # relative, in unit roundoffs
    a_size: Array  # |a|, and where frameworks compute 1 - a instead of a, |1 - a| beside it: what a step rounds at
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
    u_min: Array | None  # the bound of u itself, before the spikes
    v_first: Array  # at the start, after the reset that a source storing it before would still apply
    hold: int  # steps after a spike in which the membrane is held
    hold_time: Any  # or the time, float32 or float64 as the spec has it; None
    g: Array
    resistance: Array  # b is that many times 1 - a
    scale: Array  # of the surrogate's argument
    adaptation: Any = None  # an `oracle.adaptive.Adaptation`; then `threshold` and `rho` are [T, ...]

    @property
    def levels(self) -> Array | None:
        """The values that the states are rounded to."""
        given = self.choices.state_levels
        return None if given is None else np.asarray(given, dtype=np.float64)

    @property
    def inhibited(self) -> bool:
        """Whether one neuron of the last dimension alone emits."""
        return bool(self.choices.inhibition == "winner")

    @property
    def discards(self) -> bool:
        """Whether a residual reset to zero takes the whole of u away, its input too, and not v before the decay."""
        whole = self.choices.synapse != "none" or self.choices.form == "snntorch.RLeaky"
        return bool(self.residual and self.choices.reset == "value" and whole)

    def unrounded(self) -> Equations:
        """The same, its states not rounded."""
        return replace(self, choices=self.choices.replace(state_levels=None))

    def tested(self, u: Array, v: Array) -> Array:
        """What is held against theta, of a membrane u that was v before the step."""
        return np.abs(u - v) if self.choices.spike_test == "change" else u

    def emitted(self, test: Array) -> Array:
        """The spikes that the layer shows, of what is held against theta."""
        fired = self.count(test)
        return fired * winner(test - self.theta) if self.inhibited else fired

    def resetting(self, test: Array, emitted: Array | None) -> Array:
        """The spikes that reset: those emitted; of inhibited neurons that reset in the next step, all."""
        if self.inhibited and not self.residual:
            return self.count(test)
        return self.emitted(test) if emitted is None else emitted

    def at(self, t: int) -> Equations:
        """Those of one step."""
        if self.adaptation is None:
            return self
        return replace(self, threshold=self.threshold[t], rho=self.rho[t])

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
        if kind == "smooth":
            chosen = self.choices.surrogate
            with np.errstate(over="ignore"):
                smooth = PRIMITIVES[chosen.name](u - self.theta, **dict(chosen.parameters))
            return np.asarray(smooth, dtype=np.float64)
        if kind == "single":
            return np.where(u > self.theta if self.choices.comparison == ">" else u >= self.theta, 1.0, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            n = np.where(u > 0, np.trunc(u / self.theta), 0.0)
        return n if kind == "multiple" else np.asarray(np.minimum(n, float(self.choices.max_spikes)))

    def surrogate(self, u: Array) -> Array:
        """Derivative that stands in for ds/du."""
        chosen = self.choices.surrogate
        if hasattr(chosen, "derivative"):  # a callable of the user's own
            return np.asarray(chosen.derivative(u + self.bias, self.threshold), dtype=np.float64)
        with np.errstate(over="ignore"):
            z = (u - self.theta) / self.scale
            value = DERIVATIVES[chosen.name](z, self.threshold, **dict(chosen.parameters)) / self.scale
        return np.asarray(value, dtype=np.float64)

    def after_reset(self, stored: Array, spikes: Array) -> Array:
        """The canonical membrane of one stored before its reset: applies the pending reset."""
        if self.choices.reset == "subtract":
            return stored - spikes * self.rho
        return stored if self.choices.reset == "none" else self.to_value(stored, spikes)

    def to_value(self, u: Array, s: Array) -> Array:
        """A reset to v_reset: whole where it fired, in parts by a smooth spike."""
        if self.choices.spike_count == "smooth":
            return u + s * (self.v_reset - u)
        return np.where(s > 0, self.v_reset, u)

    def synapse(self, x: Array, i: Array) -> tuple[Array, Array]:
        """The drive j and the current that is kept, from the input and the current before."""
        kind = self.choices.synapse
        if self.a_s is None:
            return x, x
        if kind == "read_then_decay":
            return i + x, self.a_s * (i + x)
        if kind == "add_then_decay":
            kept = self.a_s * (i + x)
        elif kind == "moving_average":
            kept = self.a_s * i + (1 - self.a_s) * x
        else:
            kept = self.a_s * i + x
        return kept, kept

    def held_in(self, step: Any, last: Array) -> Any:
        """Where the membrane is held in a step; `last`: the step of the last spike before it, below 0 for none."""
        if self.hold_time is None:
            return (last >= 0) & (step - last <= self.hold)
        dtype = self.hold_time.dtype.type
        passed = np.asarray(step, dtype=dtype) * dtype(self.choices.dt) - last.astype(dtype) * dtype(self.choices.dt)
        return (last >= 0) & (passed < self.hold_time)

    def rounded(self, state: Array) -> Array:
        """The nearest level, where there are levels."""
        return state if self.levels is None else nearest(state, self.levels)

    def held(self, spikes: Array) -> Any:
        """Where, in a run with these spikes [T, ...], the membrane is held, by the last spike before every step."""
        steps = np.arange(len(spikes)).reshape(-1, *[1] * (spikes.ndim - 1))
        last = np.maximum.accumulate(np.where(spikes > 0, steps, -1), axis=0)
        return self.held_in(steps, np.concatenate([np.full_like(last[:1], -1), last[:-1]]))

    def before_reset(self, v: Array, spikes: Array) -> Array:
        """The inverse of `after_reset` for a subtractive reset: what a source that stores it before the reset shows."""
        if self.choices.reset != "subtract":
            raise OracleError(f"reset={self.choices.reset!r} loses the membrane before the reset")
        return v + spikes * self.rho


def _refuse(spec: Any) -> None:
    """Raises `OracleError` for what the oracle has no equations for; names the field and its value."""
    for name, covered in _COVERED.items():
        choice = getattr(spec, name)
        if choice not in covered:
            raise OracleError(f"{name}={choice!r}: the oracle has no equations for it; it has: {', '.join(covered)}")
    for name, parameter in spec.parameters.items():
        if parameter.raw not in RAW:
            raise OracleError(f"{name}: the oracle has no equations for the raw form {parameter.raw!r}")
    if spec.reset_timing == "next_step_discards_input" and spec.reset not in ("none", "value"):
        raise OracleError(f"reset={spec.reset!r}: reset_timing='next_step_discards_input' is a reset to a value")
    if spec.reset_gradient == "membrane_stopped" and spec.reset_timing == "same_step_residual":
        raise OracleError("reset_gradient='membrane_stopped' has no equations with 'same_step_residual'")
    if spec.spike_count == "smooth":
        if spec.surrogate is None or spec.surrogate.name not in PRIMITIVES:
            known = ", ".join(PRIMITIVES)
            raise OracleError(f"surrogate={spec.surrogate}: a smooth spike has no equations for it; it has: {known}")
        whole = spec.reset == "add_value" or spec.refractory == "hold" or not spec.reset_timing.startswith("same_step")
        if whole or spec.reset_timing == "same_step_residual":
            raise OracleError("spike_count='smooth': only with a reset in the same step, by subtraction or to a value")


def keeps_gain(spec: Any) -> bool:
    """Whether the synapse keeps b*i in the place of i."""
    return bool(spec.input_gain == "one_minus_decay_kept" and spec.synapse != "none")


def _hold(spec: Any) -> int:
    if spec.refractory == "hold":
        return int(spec.refractory_steps or 0)
    return 1 if spec.reset_timing == "next_step_discards_input" and spec.reset == "value" else 0


def equations(spec: Any) -> Equations:
    """The canonical equations of a `NeuronSpec`.

    Raises:
        OracleError: a choice the oracle has no equations for; names the field and its value.
    """
    _refuse(spec)
    if spec.signed:
        raise OracleError("neg_threshold: spikes of two signs have equations only along a recording; see `composed`")
    if spec.adaptive:
        raise OracleError("adapt_decay: a threshold that adapts has equations only along a recording; see `adapted`")

    def value(name: str, default: float) -> Array:
        if name not in spec.parameters:
            return np.float64(default) * np.ones(())
        parameter = spec.parameters[name]
        return np.asarray(RAW[parameter.raw].value(parameter.value.astype(np.float64), spec.dt), dtype=np.float64)

    def error(name: str) -> Array:
        if name not in spec.parameters:
            return np.zeros(())
        parameter = spec.parameters[name]
        return np.asarray(RAW[parameter.raw].error(parameter.value.astype(np.float64), spec.dt), dtype=np.float64)

    a = value("mem_decay", 1.0)
    divided = spec.reset == "subtract" and (
        spec.reset_amount == "threshold_over_decay" or spec.reset_timing == "next_step_after_decay"
    )
    a = np.where(a == 0, 1e-200, a) if divided else a  # far below the smallest float32
    complement = "mem_decay" in spec.parameters and RAW[spec.parameters["mem_decay"].raw].complement
    threshold = value("threshold", 0.0)
    gain = 1 - a if spec.input_gain.startswith("one_minus_decay") else value("input_gain", 1.0)
    resistance = value("resistance", 1.0)
    gain = gain * resistance
    a_s, a_s_error = value("syn_decay", 0.0), error("syn_decay")
    if keeps_gain(spec):  # i = b*a_s*(i + x): a synapse with the decay (1-a)*a_s, and b = 1
        with np.errstate(divide="ignore", invalid="ignore"):
            a_s_error = a_s_error + 2 + np.where(gain == 0, 0.0, error("mem_decay") * a / gain)
        a_s, gain = gain * a_s, np.ones(())
    rho = value("reset_amount", 0.0) if spec.reset_amount == "value" else threshold
    rho = rho / a if divided else rho
    first = {"zero": np.zeros(()), "leak": value("leak", 0.0), "reset_value": value("reset_value", 0.0)}
    first["zero"] = value("initial_v", 0.0)
    eq = Equations(
        choices=spec,
        a=a,
        a_error=error("mem_decay"),
        a_size=np.abs(a) + (2 * np.abs(1 - a) if complement else 0.0),
        a_s=a_s if spec.synapse != "none" else None,
        a_s_error=a_s_error,
        b=gain,
        c=(1 - a) * value("leak", 0.0),
        threshold=threshold,
        bias=value("bias", 0.0),
        rho=rho,
        divided=divided,
        v_reset=value("reset_value", 0.0),
        v_min=value("min_v_mem", 0.0) if spec.clamp == "after_reset" else None,
        u_min=value("min_v_mem", 0.0) if spec.clamp == "before_spikes" else None,
        v_first=first[spec.initial_state],
        hold=_hold(spec),
        hold_time=spec.parameters["refractory_time"].value if "refractory_time" in spec.parameters else None,
        g=value("spike_scale", 1.0) if spec.inhibition == "none" else np.ones(()),
        resistance=resistance,
        scale=value("surrogate_scale", 1.0),
    )
    if not spec.stores_before_reset:
        return eq
    return replace(eq, v_first=eq.after_reset(eq.v_first, eq.count(eq.v_first)))
