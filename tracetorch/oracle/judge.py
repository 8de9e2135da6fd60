"""Judging a subject: is every step it took a correctly rounded step of the oracle, from the subject's own state?

The oracle is restarted from the subject's own state at every step, so an early tie that sends a neuron another way is
judged once, where it happened, and never again. All steps are therefore independent and computed at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracetorch.oracle import alpha, composed, winner
from tracetorch.oracle.adaptive import adapted
from tracetorch.oracle.equations import Equations, OracleError, equations
from tracetorch.oracle.levels import nearest, taken
from tracetorch.oracle.lif import Step, Trace, advance, after
from tracetorch.oracle.raw import RAW, Array
from tracetorch.oracle.rounding import bounds, current_bound, of_sum, representable, roundoff, shifted, slack


@dataclass(frozen=True)
class Recording:
    """What a subject did over time: arrays [T, ...] of one float dtype, states by name, as the subject stores them.

    `spec` is the subject's own, and says only how it stores its membrane; what is judged against is given to `judge`.
    `terms`: where the input is itself a sum of the layer's (its input and its own spikes through a matrix), the sum of
    its terms' magnitudes: they round at that size, in whatever order they are added.

    Raises:
        OracleError: no step, no neuron, shapes or dtypes that differ, a state missing or surplus.
    """

    x: NDArray[Any]
    outputs: NDArray[Any]
    states: Mapping[str, NDArray[Any]]
    spec: Any
    terms: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if self.x.ndim < 1 or self.x.size == 0:
            raise OracleError(f"an empty trace proves nothing: the input has shape {list(self.x.shape)}")
        if self.x.dtype not in (np.float32, np.float64):
            raise OracleError(f"the input is {self.x.dtype}; the oracle judges float32 and float64")
        if set(self.states) != set(self.spec.states):
            raise OracleError(f"states {sorted(self.states)} recorded, expected {sorted(self.spec.states)}")
        for name, array in {"outputs": self.outputs, **self.states}.items():
            if array.shape != self.x.shape:
                raise OracleError(f"{name} has shape {list(array.shape)}, the input {list(self.x.shape)}")
            # Spikes are float32 in snnTorch and sinabs whatever the precision of the membrane.
            if array.dtype != self.x.dtype and not (name == "outputs" and array.dtype == np.float32):
                raise OracleError(f"{name} is {array.dtype}, the input {self.x.dtype}")


@dataclass(frozen=True)
class Judgement:
    """The result of `judge`; counts over all neuron-steps.

    Attributes:
        slots: neuron-steps judged.
        spikes: spikes the subject emitted: a trace without any proves little.
        mismatches: where the subject's spikes are not those of the oracle, restarted from the subject's own state.
        unexplained: those outside the rounding bound.
        state_violations: states further from the oracle's than the bound.
        max_state_error: largest distance of a state to the oracle's.
        first: (time step, index of the neuron) of the first unexplained mismatch or state violation, or None.
    """

    slots: int
    spikes: float
    mismatches: int
    unexplained: int
    state_violations: int
    max_state_error: float
    first: tuple[int, tuple[int, ...]] | None

    @property
    def explained(self) -> int:
        """Mismatches that lie where the distance to the threshold is within the rounding bound."""
        return self.mismatches - self.unexplained

    @property
    def ok(self) -> bool:
        """Whether every step is a correctly rounded step of the oracle."""
        return self.unexplained == 0 and self.state_violations == 0


def _spike_numbers(eq: Equations, recording: Recording) -> Array:
    if eq.choices.spike_count == "none":
        return np.zeros(recording.x.shape)
    spikes = recording.outputs.astype(np.float64)
    return spikes if not np.any(eq.g != 1) else spikes / eq.g


def _held_otherwise(spec: Any, recording: Recording, name: str) -> tuple[Array, float]:
    """Where the subject computes a decay from another raw form: what it may be off, in unit roundoffs, and 2 or 0.

    The error is that of its form, and of the raw number that it was given: a conversion rounds it like the form itself.
    With a form of 1 - a, a step rounds at the size of 2|1 - a| too.
    """
    mine, theirs = spec.parameters.get(name), recording.spec.parameters.get(name)
    if mine is None or theirs is None or (mine.raw, spec.dt) == (theirs.raw, recording.spec.dt):
        return np.zeros(()), 0.0
    form = RAW[theirs.raw]
    return 2 * form.error(theirs.value.astype(np.float64), recording.spec.dt), 2.0 if form.complement else 0.0


def trajectory(spec: Any, recording: Recording) -> tuple[Equations, Trace, Array]:
    """The subject's trajectory in canonical coordinates, and its recorded canonical membrane [T, ...]."""
    eq = adapted(spec, recording.states) if spec.adaptive else equations(spec)
    (error, lost), (error_s, _) = (_held_otherwise(spec, recording, name) for name in ("mem_decay", "syn_decay"))
    size = np.maximum(eq.a_size, np.abs(eq.a) + lost * np.abs(1 - eq.a))
    eq = replace(eq, a_error=eq.a_error + error, a_size=size, a_s_error=eq.a_s_error + error_s)
    for name, parameter in spec.parameters.items():
        neurons = recording.x.shape[1:]
        if np.broadcast_shapes(parameter.value.shape, neurons) != neurons:
            raise OracleError(f"{name} has shape {list(parameter.value.shape)}, the neurons {list(neurons)}")
    spikes = _spike_numbers(eq, recording)
    stored = recording.states["v_mem"].astype(np.float64)
    if eq.inhibited:
        spikes = eq.resetting(stored, spikes)
    # How it is stored is the subject's own choice; the numbers of the reset are those it is judged by.
    v = eq.after_reset(stored, spikes) if recording.spec.stores_before_reset else stored
    if eq.v_min is not None and recording.spec.stores_before_reset:
        v = np.maximum(v, eq.v_min)
    i = recording.states["i_syn"].astype(np.float64) if "i_syn" in recording.states else np.zeros_like(v)
    x = recording.x.astype(np.float64)
    i_before, v_before, held = shifted(i), shifted(v, eq.v_first), eq.held(spikes)
    with np.errstate(invalid="ignore", over="ignore"):
        plain = eq if eq.levels is None else eq.unrounded()
        step = advance(plain, x, i_before, v_before, spikes if eq.choices.spike_count != "none" else None, held)
        trace = Trace(x, i_before, v_before, step, held)
        if eq.levels is not None:
            trace = replace(trace, step=_on_levels(eq, trace, recording, stored, i))
        elif eq.inhibited or eq.choices.spike_test == "change":
            trace = replace(trace, step=_as_stored(eq, trace, recording, stored))
    return eq, trace, v


def _as_stored(eq: Equations, trace: Trace, recording: Recording, stored: Array) -> Step:
    """The step with the subject's own membrane before its reset, where that is within the bound and can be known.

    Where two neurons' membranes, or one's in two steps, are equal but for a rounding, it decides which one wins, and
    whether anything changed.
    """
    step = trace.step
    w_bound, v_bound = bounds(eq, trace, recording.x.dtype, recording.outputs.dtype)
    own, bound = stored, w_bound
    if not recording.spec.stores_before_reset and eq.choices.reset != "none":
        own, known = _before_reset(eq, step, stored)
        bound = np.where(known, v_bound, -1.0)
    w = np.where(np.abs(own - step.w) <= bound + of_sum(eq, recording), own, step.w)
    return replace(step, w=w, s=eq.resetting(eq.tested(w, trace.v_before), step.s))


def _before_reset(eq: Equations, step: Step, stored: Array) -> tuple[Array, NDArray[np.bool_]]:
    """The membrane before a reset in the same step, of the one after it; and where that is known."""
    change = step.s - step.r
    if eq.choices.reset == "subtract":
        return stored + change * eq.rho, np.ones(stored.shape, dtype=bool)
    return stored / np.where(change == 1, 1.0, 1 - change), change != 1


def _on_levels(eq: Equations, trace: Trace, recording: Recording, stored: Array, i: Array) -> Step:
    """The step with its states on the levels that the subject took, where these are within the bounds.

    Args:
        trace: with the states before they are rounded.
        stored, i: the subject's states after the step, as it stores them.
    """
    plain, step, levels = eq.unrounded(), trace.step, np.asarray(eq.levels)
    e, _ = roundoff(recording.x.dtype)
    bound, _ = bounds(plain, trace, recording.x.dtype, recording.outputs.dtype)
    joined = of_sum(eq, recording)
    w_bound = np.broadcast_to(bound + joined, step.w.shape)
    own = stored
    if not recording.spec.stores_before_reset and eq.choices.reset != "none":
        # A reset to 0 leaves nothing of the membrane; then any level that spiked, or did not, as the subject.
        own, known = _before_reset(eq, step, stored)
        low, high = step.w - w_bound, step.w + w_bound
        fits = eq.count(nearest(low, levels)) == step.s
        any_level = np.where(eq.count(nearest(step.w, levels)) == step.s, step.w, np.where(fits, low, high))
        own = np.where(known, own, any_level)
    w = taken(step.w, w_bound, levels, own, e)
    kept = step.i
    if eq.a_s is not None:
        i_bound = np.broadcast_to(current_bound(plain, trace, recording.x.dtype) + joined, step.i.shape)
        kept = taken(step.i, i_bound, levels, i, e)
    s = eq.resetting(w, step.s)
    return replace(step, w=w, i=kept, s=s, v=after(eq, w, step.r, s))


def _off(value: Array, truth: Array, bound: Array) -> NDArray[np.bool_]:
    """Where value is further than bound from truth; NaN and infinity must agree in place and kind."""
    with np.errstate(invalid="ignore"):
        near = (np.abs(value - truth) <= bound) & np.isfinite(bound) & np.isfinite(truth)
    return np.asarray(~(near | (value == truth) | (np.isnan(value) & np.isnan(truth))))


def judge(spec: Any, recording: Recording) -> Judgement:
    """Judge a recorded subject against the equations of `spec`.

    Args:
        spec: the `NeuronSpec` that the subject should compute (of the source, for a converted layer).
        recording: what it did, from the initial state on.

    Raises:
        OracleError: choices without equations, or a subject whose neurons have other states than the spec.
    """
    if spec.states != recording.spec.states:
        raise OracleError(f"the subject has the states {recording.spec.states}, the spec {spec.states}")
    with np.errstate(all="ignore"):  # NaN and infinity are judged, not warned of
        if composed.covers(spec):
            return _judge_composed(spec, recording)
        return (_judge_alpha if alpha.covers(spec) else _judge)(spec, recording)


def explained(eq: Equations, spikes: Array, w: Array, bound: Array, dtype: np.dtype[Any]) -> NDArray[np.bool_]:
    """Where spikes are those of a membrane within the bound of w; `dtype`: of the subject's outputs."""
    low, high = eq.count(w - bound), eq.count(w + bound)
    if eq.inhibited:
        return winner.explained(spikes, w - eq.theta, _of_distance(eq, w, bound, dtype), low, high)
    if eq.choices.spike_count == "smooth":
        slack = 8 * roundoff(dtype)[0] * np.maximum(np.maximum(np.abs(low), np.abs(high)), 1.0)
        return np.asarray((spikes >= low - slack) & (spikes <= high + slack))
    return np.asarray((spikes >= low) & (spikes <= high) & (spikes == np.trunc(spikes)))


def _of_distance(eq: Equations, w: Array, bound: Array, dtype: np.dtype[Any]) -> Array:
    """What a subject's w - theta may be off, where its w is within the bound."""
    z = w - eq.theta
    return np.asarray(bound + np.where((bound == 0) & representable(z), 0.0, roundoff(dtype)[0] * np.abs(z)))


def _judge(spec: Any, recording: Recording) -> Judgement:
    eq, trace, _ = trajectory(spec, recording)
    step = trace.step
    w_bound, v_bound = slack(eq, trace, recording)
    joined = of_sum(eq, recording) if eq.levels is None else np.zeros(())
    spikes = _spike_numbers(eq, recording)
    stored = recording.states["v_mem"].astype(np.float64)
    before = recording.spec.stores_before_reset
    state_off = _off(stored, step.w if before else step.v, w_bound if before else v_bound)
    with np.errstate(invalid="ignore"):
        error = np.abs(stored - (step.w if before else step.v))
    if eq.a_s is not None:
        i = recording.states["i_syn"].astype(np.float64)
        current = current_bound(eq, trace, recording.x.dtype) + joined
        state_off |= _off(i, step.i, np.broadcast_to(current, i.shape))
    if eq.adaptation is not None:
        bound = eq.adaptation.bound(spikes, *roundoff(recording.outputs.dtype))
        state_off |= _off(recording.states["adaptation"].astype(np.float64), eq.adaptation.after(spikes), bound)
    if eq.choices.output == "membrane":
        mismatch = np.zeros(spikes.shape, dtype=bool)
        unexplained = mismatch
        state_off |= _off(recording.outputs.astype(np.float64), step.w, w_bound)
    else:
        test = eq.tested(step.w, trace.v_before)
        if eq.choices.spike_test == "change":
            w_bound = w_bound + roundoff(recording.x.dtype)[0] * np.where(w_bound == 0, 0.0, np.abs(test))
        mismatch = ~(spikes == eq.emitted(test))
        unexplained = mismatch & ~explained(eq, spikes, test, w_bound, recording.outputs.dtype)
    return _judgement(spikes, mismatch, unexplained, state_off, error)


def _judge_alpha(spec: Any, recording: Recording) -> Judgement:
    """Of snnTorch's Alpha: see `oracle.alpha`."""
    run = alpha.rerun(spec, recording)
    bounds = run.bounds(*roundoff(recording.x.dtype))
    state_off = np.zeros(run.x.shape, dtype=bool)
    for name, truth in (("i_exc", run.e), ("i_inh", run.n), ("v_mem", run.w)):
        state_off |= _off(recording.states[name].astype(np.float64), truth, bounds[name])
    mismatch = ~(run.spikes == run.eq.emitted(run.w))
    unexplained = mismatch & ~explained(run.eq, run.spikes, run.w, bounds["v_mem"], recording.outputs.dtype)
    error = np.abs(recording.states["v_mem"].astype(np.float64) - run.w)
    return _judgement(run.spikes, mismatch, unexplained, state_off, error)


def _judge_composed(spec: Any, recording: Recording) -> Judgement:
    """Of spikes of two signs, pairs of traces and traces of the own output: see `oracle.composed`."""
    e, tiny = roundoff(recording.x.dtype)
    run = composed.rerun(spec, recording, e, tiny)
    truth = {composed.STATES.get(name, name): state for name, state in run.tape.new.items()}
    state_off = np.zeros(run.tape.x.shape, dtype=bool)
    error = np.zeros(run.tape.x.shape)
    for name, state in recording.states.items():
        state_off |= _off(state.astype(np.float64), truth[name], run.bounds[name])
        error = np.maximum(error, np.abs(state.astype(np.float64) - truth[name]))
    mismatch = unexplained = np.zeros(run.tape.x.shape, dtype=bool)
    if spec.spike_count == "single":
        mismatch = run.mismatch
        unexplained = mismatch & ~run.explained(e)
    else:
        state_off |= _off(recording.outputs.astype(np.float64), run.tape.output, run.bounds["output"])
    return _judgement(run.tape.up - run.tape.down, mismatch, unexplained, state_off, error)


def _judgement(
    spikes: Array,
    mismatch: NDArray[np.bool_],
    unexplained: NDArray[np.bool_],
    state_off: NDArray[np.bool_],
    error: Array,
) -> Judgement:
    bad = unexplained | state_off
    first = None
    if bad.any():
        t, *index = (int(k) for k in np.argwhere(bad)[0])
        first = (t, tuple(index))
    finite = error[np.isfinite(error)]
    return Judgement(
        slots=int(spikes.size),
        spikes=float(np.nansum(spikes)),
        mismatches=int(mismatch.sum()),
        unexplained=int(unexplained.sum()),
        state_violations=int(state_off.sum()),
        max_state_error=float(finite.max()) if finite.size else 0.0,
        first=first,
    )


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays are identical bit for bit (so -0.0 is not 0.0, and a NaN equals only itself).

    Raises:
        OracleError: shapes or dtypes that differ, or an empty array: those are no comparison at all.
    """
    if a.shape != b.shape:
        raise OracleError(f"shape {list(a.shape)} against {list(b.shape)}")
    if a.dtype != b.dtype:
        raise OracleError(f"dtype {a.dtype} against {b.dtype}")
    if a.size == 0:
        raise OracleError("an empty comparison proves nothing")
    return a.tobytes() == b.tobytes()


__all__ = [
    "Judgement",
    "OracleError",
    "Recording",
    "explained",
    "judge",
    "same_bits",
    "trajectory",
]
