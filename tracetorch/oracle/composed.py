"""Judging layers with spikes of two signs, a pair of traces or a trace of the own output: `oracle.native`, restarted.

As in `oracle.judge`, every step starts from the states that the subject itself had stored, and is compared within a
bound of its rounding, with e the unit roundoff and E the error of a computed parameter in roundoffs:

    trace  d*t + in or d*t + (1-d)*in:   4 e (|d t| + |in|) + e E |d| (|t| + |in|), and what `in` is off
    in     u + w*r:                      2 e (|u| + |w r|), and what u and |w| r are off
    m      sum of the branches:          e sum |mem_b|, and what these are off
    z      m -+ theta +- bias:           3 e (|m| + |theta| + |bias|) + e E |theta|, and what m is off
    mem    m - up*theta - down*theta':   4 e (|m| + |up theta| + |down theta'|) + e E |..|, and what m is off

A smooth spike is off by its slope times what z is, and 8 e. A rounded sigmoid is 0 up to z = 2 e, where the sigmoid is
not yet above 1/2. Where one membrane without a synapse is computed with representable numbers, the bound is 0.

What a subject fired is read off its output; where the scales make two spikes look alike, off its membrane too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracetorch.oracle import native
from tracetorch.oracle.equations import OracleError
from tracetorch.oracle.lif import Feedback
from tracetorch.oracle.native import Native, Tape
from tracetorch.oracle.raw import RAW, Array

Bools = NDArray[np.bool_]

# Parameter and state of a spec -> of the layer.
_PARAMETERS = {
    "mem_decay": "beta",
    "syn_decay": "alpha",
    "threshold": "pos_threshold",
    "neg_threshold": "neg_threshold",
    "bias": "bias",
    "spike_scale": "pos_scale",
    "neg_scale": "neg_scale",
}
_STATES = {"v_mem": "mem", "i_syn": "syn"}
# State of a layer of one branch -> of a spec.
STATES = {own: name for name, own in _STATES.items()}
_NEUTRAL = {"bias": 0.0, "pos_scale": 1.0, "neg_scale": 1.0}
# Of a spec with spikes of two signs, the choices that these equations have.
_COVERED: Mapping[str, tuple[object, ...]] = {
    "synapse": ("none", "moving_average"),
    "decay": ("geometric",),
    "input_gain": ("one",),
    "comparison": (">", ">="),
    "spike_count": ("single", "smooth"),
    "reset": ("subtract",),
    "reset_amount": ("threshold",),
    "reset_timing": ("same_step",),
    "reset_gradient": ("attached",),
    "clamp": ("none",),
    "refractory": ("none",),
    "initial_state": ("zero",),
    "state_levels": (None,),
    "threshold_gradient": (True,),
}


def covers(spec: Any) -> bool:
    """Whether this is a neuron of this file: a `Composition`, or a `NeuronSpec` with spikes of two signs."""
    return hasattr(spec, "layer_states") or bool(spec.signed)


def refuse(spec: Any) -> None:
    """Raises `OracleError` for choices of a `NeuronSpec` with spikes of two signs that these equations have not."""
    if hasattr(spec, "layer_states"):
        raise OracleError(f"{spec.name}: a pair of traces, or one of the own output, is judged along a recording alone")
    for name, covered in _COVERED.items():
        choice = getattr(spec, name)
        if choice not in covered:
            has = ", ".join(map(repr, covered))
            raise OracleError(f"{name}={choice!r}: with neg_threshold the oracle has equations for {has}")
    for name in ("leak", "resistance", "surrogate_scale", "initial_v"):
        if name in spec.parameters:
            raise OracleError(f"{name}: the oracle has no equations for it with neg_threshold")


def _kind(spec: Any) -> tuple[Native, dict[str, str]]:
    """The layer, and its names of the spec's parameters."""
    chosen = None if spec.surrogate is None or spec.surrogate.name == "logistic" else spec.surrogate
    hard = spec.spike_count != "smooth"
    if chosen is None and spec.surrogate is not None and dict(spec.surrogate.parameters) != {"slope": 4.0}:
        chosen = spec.surrogate
    if hasattr(spec, "layer_states"):
        parts = (spec.family, spec.dual, spec.synapse, spec.recurrent, spec.ema)
        own = Native(*parts, hard, chosen, spec.comparison == ">=")
        return own, {name: name for name in spec.parameters}
    refuse(spec)
    inclusive = spec.comparison == ">="
    own = Native("LITS", synapse=spec.synapse != "none", hard=hard, surrogate=chosen, inclusive=inclusive)
    return own, {name: _PARAMETERS[name] for name in spec.parameters}


@dataclass(frozen=True)
class Numbers:
    """Of a layer: values by its own names, and how far a subject's may be off, relative, in unit roundoffs."""

    values: dict[str, Array]
    errors: dict[str, Array]

    def off(self, name: str) -> Array:
        """|value| times its error."""
        return np.asarray(np.abs(self.values[name]) * self.errors.get(name, np.zeros(())))


def _numbers(spec: Any, names: Mapping[str, str], subject: Any) -> Numbers:
    values: dict[str, Array] = {own: np.full((), number) for own, number in _NEUTRAL.items()}
    errors: dict[str, Array] = {}
    for name, own in names.items():
        parameter = spec.parameters[name]
        raw = parameter.value.astype(np.float64)
        values[own] = np.asarray(RAW[parameter.raw].value(raw, spec.dt))
        errors[own] = np.asarray(RAW[parameter.raw].error(raw, spec.dt))
        theirs = subject.parameters.get(name)
        if theirs is not None and theirs.raw != parameter.raw:
            errors[own] = errors[own] + 2 * RAW[theirs.raw].error(theirs.value.astype(np.float64), subject.dt)
    return Numbers(values, errors)


@dataclass(frozen=True)
class Run:
    """A subject's run, every step restarted from its own states; arrays [T, ...].

    Attributes:
        tape: the step with the spikes that the subject fired.
        own: the step with the oracle's own spikes.
        foreign: where the subject's output is none that its spikes could give.
        bounds: of the states, by the spec's names, and of `output`.
        z_bounds: of the distances to the two thresholds.
    """

    kind: Native
    numbers: Numbers
    tape: Tape
    own: Tape
    foreign: Bools
    bounds: dict[str, Array]
    z_bounds: tuple[Array, Array]

    @property
    def mismatch(self) -> Bools:
        """Where the subject fired otherwise than the oracle."""
        return np.asarray(self.foreign | (self.tape.up != self.own.up) | (self.tape.down != self.own.down))

    def explained(self, roundoff: float) -> Bools:
        """Where the spikes are those of a membrane within its bound."""
        inclusive = self.kind.inclusive
        late = 2 * roundoff if self.kind.hard and self.kind.surrogate is None and not inclusive else 0.0
        good = ~self.foreign
        for z, bound, fired in zip(_distances(self), self.z_bounds, (self.tape.up, self.tape.down), strict=True):
            high, low = z + bound, z - bound - late
            near = np.where(fired != 0, high >= 0, low < 0) if inclusive else np.where(fired != 0, high > 0, low <= 0)
            good = good & (near | np.isnan(z))
        return np.asarray(good)


def _distances(run: Run) -> tuple[Array, Array]:
    p, m = run.numbers.values, run.tape.m
    if run.kind.family == "LIB":
        return m - p["threshold"] + p["bias"], np.full_like(m, -np.inf)
    return m - p["pos_threshold"] + p["bias"], -p["neg_threshold"] - m - p["bias"]


def _fired(kind: Native, p: Mapping[str, Array], x: Array, old: Mapping[str, Array], own: Tape, seen: Any) -> Any:
    """(up, down, foreign): the spikes of the subject, read off its output and then its membranes."""
    outputs, after = seen
    best = np.full(x.shape, np.inf)
    up, down = own.up.copy(), own.down.copy()
    pairs: list[tuple[Any, Any]] = [(own.up, own.down), (0.0, 0.0), (1.0, 0.0)]
    pairs += [] if kind.family == "LIB" else [(0.0, -1.0), (1.0, -1.0)]
    for pair in pairs:
        fired = tuple(np.broadcast_to(np.asarray(f, dtype=np.float64), x.shape) for f in pair)
        tape = native.step(kind, p, x, old, (fired[0], fired[1]))
        distance = sum((np.abs(tape.new[name] - after[name]) for name in after), np.zeros(x.shape))
        alike = tape.output.astype(outputs.dtype) == outputs
        near = np.where(alike, np.nan_to_num(distance, nan=0.0, posinf=1e300), np.inf)
        better = near < best
        best, up, down = np.where(better, near, best), np.where(better, fired[0], up), np.where(better, fired[1], down)
    return up, down, ~np.isfinite(best)


def rerun(spec: Any, recording: Any, roundoff: float, tiny: float) -> Run:
    """The equations along a recording, and their rounding bounds.

    Args:
        roundoff, tiny: of the subject's dtype.

    Raises:
        OracleError: choices that these layers have not; names the field and its value.
    """
    kind, names = _kind(spec)
    numbers = _numbers(spec, names, recording.spec)
    p, x = numbers.values, recording.x.astype(np.float64)
    after = {_STATES.get(name, name): state.astype(np.float64) for name, state in recording.states.items()}
    old = {name: np.concatenate([np.zeros_like(state[:1]), state[:-1]]) for name, state in after.items()}
    own = tape = native.step(kind, p, x, old)
    foreign = np.zeros(x.shape, dtype=bool)
    if kind.family != "LI" and kind.hard:
        membranes = {name: state for name, state in after.items() if name.endswith("mem")}
        up, down, foreign = _fired(kind, p, x, old, own, (recording.outputs, membranes))
        tape = native.step(kind, p, x, old, (up, down))
    run = Run(kind, numbers, tape, own, foreign, {}, (np.zeros(()), np.zeros(())))
    bounds, z_bounds = _bounds(run, roundoff, tiny)
    return replace(run, bounds={STATES.get(n, n): b for n, b in bounds.items()}, z_bounds=z_bounds)


def _trace_bounds(
    run: Run, trace: str, decay: str, entered: Array, e: float, tiny: float
) -> tuple[dict[str, Array], Array]:
    """Of a moving average in each branch, and of their sum."""
    found, total = {}, np.zeros_like(entered)
    for b in run.kind.branches:
        d, t = np.abs(run.numbers.values[f"{b}{decay}"]), np.abs(run.tape.old[f"{b}{trace}"])
        taken = np.abs(entered) if not b else np.abs(np.where(entered > 0, entered, 0) if b == "pos_" else entered)
        found[f"{b}{trace}"] = e * (4 * (d * t + taken) + run.numbers.off(f"{b}{decay}") * (t + taken)) + tiny
        total = total + found[f"{b}{trace}"] + e * np.abs(run.tape.new[f"{b}{trace}"])
    return found, total


def _bounds(run: Run, e: float, tiny: float) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """Of every state after the step and of the output; of the distances to the thresholds."""
    kind, tape, numbers = run.kind, run.tape, run.numbers
    found: dict[str, Array] = {}
    zero = np.zeros_like(tape.x)
    of_u, of_r = zero, zero
    if kind.synapse:
        traces, of_u = _trace_bounds(run, "syn", "alpha", tape.x, e, tiny)
        found |= traces
    if kind.recurrent:
        traces, of_r = _trace_bounds(run, "rec", "gamma", tape.old["prev_output"], e, tiny)
        found |= traces
    of_m, before = zero, zero
    for b in kind.branches:
        d, old = np.abs(numbers.values[f"{b}beta"]), np.abs(tape.old[f"{b}mem"])
        taken, of_in = np.abs(tape.inputs[b]), of_u
        if kind.recurrent:
            w = np.abs(numbers.values[f"{b}rec_weight"])
            of_in = of_u + w * of_r + 2 * e * (np.abs(tape.u) + w * np.abs(tape.r))
        share = old + taken if kind.ema else old
        found[f"{b}mem"] = e * (4 * (d * old + taken) + numbers.off(f"{b}beta") * share) + of_in + tiny
        before = before + d * old + taken
        of_m = of_m + found[f"{b}mem"] + (e * (d * old + taken) if kind.dual else 0.0)
    if kind.family == "LI":
        return {**found, "prev_output": of_m, "output": of_m}, (zero, zero)
    return _after_spikes(run, found, of_m, before, e)


def _after_spikes(
    run: Run, found: dict[str, Array], of_m: Array, before: Array, e: float
) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """As `_bounds`, of a layer that fires: `of_m` of the membrane of the spike test, whose terms are `before`."""
    kind, tape, p = run.kind, run.tape, run.numbers.values
    of_z, of_spikes, reset, of_reset = [], [], np.zeros_like(tape.x), np.zeros_like(tape.x)
    names = ("threshold",) if kind.family == "LIB" else ("pos_threshold", "neg_threshold")
    for name, fired in zip(names, (tape.up, tape.down), strict=False):
        theta, off = np.abs(p[name]), run.numbers.off(name)
        of_z.append(of_m + e * (3 * (np.abs(tape.m) + theta + np.abs(p["bias"])) + off + run.numbers.off("bias")))
        of_spikes.append(np.zeros_like(of_m) if kind.hard else _steepest(kind) * of_z[-1] + 8 * e)
        reset = reset + np.abs(fired) * theta
        of_reset = of_reset + e * np.abs(fired) * off + of_spikes[-1] * theta
    scales = [np.abs(p[name]) for name in ("pos_scale", "neg_scale")] if kind.family == "LITS" else [np.ones(())] * 2
    of_output = sum((s * o for s, o in zip(scales, of_spikes, strict=False)), np.zeros_like(of_m))
    of_output = of_output + 4 * e * (sum(scales, np.zeros(())) if not kind.hard else 0.0)
    of_z += [np.zeros_like(of_m)] * (2 - len(of_z))
    exact = _exact(run)
    for b in kind.branches:
        after = found[f"{b}mem"] + of_reset + 4 * e * (before + reset)
        found[f"{b}mem"] = np.where(exact, 0.0, after)
    if kind.recurrent:
        found["prev_output"] = of_output
    return {**found, "output": of_output}, (np.where(exact, 0.0, of_z[0]), np.where(exact, 0.0, of_z[1]))


def _steepest(kind: Native) -> float:
    """The largest slope of a smooth spike."""
    return float(np.max(kind.slope(np.zeros(()))))


def _exact(run: Run) -> Bools:
    """Where no rounding happens in one membrane without a synapse, whatever the order of operations."""
    kind, tape, p = run.kind, run.tape, run.numbers.values
    computed = any(np.any(error) for error in run.numbers.errors.values())
    if computed or kind.dual or kind.synapse or kind.recurrent or kind.ema or not kind.hard:
        return np.zeros(tape.x.shape, dtype=bool)
    up, down = _distances(run)
    pos, neg = ("threshold", "threshold") if kind.family == "LIB" else ("pos_threshold", "neg_threshold")
    parts = [p["beta"], p[pos], p[neg], p["bias"], p["beta"] * tape.old["mem"], tape.m, tape.m - p[pos]]
    parts += [p[neg] + tape.m, up, down, tape.m - tape.up * p[pos], tape.new["mem"]]
    exact = np.ones(tape.x.shape, dtype=bool)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in parts:
            exact &= part == part.astype(np.float32).astype(np.float64)
    return exact


def gradients(
    spec: Any,
    recording: Any,
    grad_output: Array,
    roundoff: float,
    sum_to: Callable[[Array, tuple[int, ...]], Array],
    feedback: Feedback | None = None,
) -> dict[str, Array]:
    """As `oracle.gradients`: of `x`, and of the raw parameters by name."""
    run = rerun(spec, recording, roundoff, 0.0)
    tapes = [_at(run.tape, t) for t in range(len(run.tape.x))]
    kind, names = _kind(spec)
    own = native.backward(kind, run.numbers.values, tapes, grad_output, feedback)
    found = {"x": own["x"]}
    for name, parameter in spec.parameters.items():
        slope = RAW[parameter.raw].slope(parameter.value.astype(np.float64), spec.dt)
        found[name] = np.asarray(sum_to(own[names[name]], parameter.value.shape) * slope)
    return found


def _at(tape: Tape, t: int) -> Tape:
    """One step of a tape of all."""

    def one(values: Mapping[str, Array]) -> dict[str, Array]:
        return {name: value[t] for name, value in values.items()}

    single = Tape(tape.x[t], one(tape.old), one(tape.new), inputs=one(tape.inputs))
    for name in ("u", "r", "m", "up", "down", "output"):
        setattr(single, name, getattr(tape, name)[t])
    return single
