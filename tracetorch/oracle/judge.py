"""Judging a subject: is every step it took a correctly rounded step of the oracle, from the subject's own state?

The oracle is restarted from the subject's own state at every step, so an early tie that sends a neuron another way is
judged once, where it happened, and never again. All steps are therefore independent and computed at once.

Rounding bound. A subject computes w, the membrane of the spike test, in floating point with unit roundoff e (2^-24 for
float32), in the order of its own form. No form takes more than 8 roundings, each of a magnitude of at most

    M = |a||v| + |a||rho s_before| + |b||j| + |c| + |rho r|,

(the second term for a source that stores its membrane before the reset), so |w_subject - w| <= 8 e M + parameter error:
a parameter that is itself computed (exp(-1/tau)), be it by the subject alone, is off by a_error roundoffs, which adds
e a_error (|a||v| + |a||j|), the latter where the gain is 1-a. Frameworks whose raw form is that of 1-a compute
v - (1-a)*(v - ...), which rounds at the size of |1-a||v| too: |a| + 2|1-a| stands in M for their |a|. A synapse takes
up to 4 roundings of |a_s||i| + |x|, which reach the drive j. A smooth spike is within slope*|w_subject - w| and 8
roundoffs of its function's range. A division by theta in a spike count adds e|w|. A stored membrane takes up to 4 more
roundings, of |w| + |rho s| + |v_min|: the bound of the state. Underflow adds the smallest subnormal a few times.

Where every intermediate result is exactly representable in float32, no rounding happens in any order of
operations and the bound is 0: an exact tie at the threshold must then be decided as the spec says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracetorch.oracle import alpha
from tracetorch.oracle.adaptive import adapted, threshold_slack
from tracetorch.oracle.equations import Equations, OracleError, equations, keeps_gain
from tracetorch.oracle.lif import Step, Trace, advance, backward
from tracetorch.oracle.raw import RAW, Array

_ROUNDINGS = 8
_STORE_ROUNDINGS = 4


def roundoff(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The unit roundoff of a dtype, and a few of its smallest subnormals."""
    info = np.finfo(dtype)
    return float(info.eps) / 2, 16 * float(info.smallest_subnormal)


def _representable(value: Array) -> NDArray[np.bool_]:
    """In float32: then no rounding happened, in the subject's float32 or float64 as in the oracle's float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(value == value.astype(np.float32).astype(np.float64))


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


def _before(after: Array, first: Array | float = 0.0) -> Array:
    return np.concatenate([np.broadcast_to(first, after[:1].shape), after[:-1]])


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
    # How it is stored is the subject's own choice; the numbers of the reset are those it is judged by.
    v = eq.after_reset(stored, spikes) if recording.spec.stores_before_reset else stored
    if eq.v_min is not None and recording.spec.stores_before_reset:
        v = np.maximum(v, eq.v_min)
    i = recording.states["i_syn"].astype(np.float64) if "i_syn" in recording.states else np.zeros_like(v)
    x = recording.x.astype(np.float64)
    i_before, v_before, held = _before(i), _before(v, eq.v_first), eq.held(spikes)
    with np.errstate(invalid="ignore", over="ignore"):
        step = advance(eq, x, i_before, v_before, spikes if eq.choices.spike_count != "none" else None, held)
    return eq, Trace(x, i_before, v_before, step, held), v


def current_bound(eq: Equations, trace: Trace, dtype: np.dtype[Any]) -> Array:
    """The rounding bound of one step of the synaptic current, [T, ...], as derived above."""
    e, tiny = roundoff(dtype)
    a_s = np.zeros(()) if eq.a_s is None else np.abs(eq.a_s)
    through = 1.0 if eq.choices.synapse in ("decay_then_add", "moving_average") else a_s
    magnitude = a_s * np.abs(trace.i_before) + through * np.abs(trace.x)
    if eq.choices.synapse == "read_then_decay":
        magnitude = magnitude + np.abs(trace.i_before) + np.abs(trace.x)
    return np.asarray(e * (4 + eq.a_s_error) * magnitude + tiny)


def convolution_bound(eq: Equations, trace: Trace, dtype: np.dtype[Any]) -> Array:
    """What a subject that sums a kernel over its whole past may be off, [T, ...], in this step and the one before.

    Its sum of T products rounds T times at the size of c = sum of a^k |x[t-k]|; its kernel is exp(-k/tau), off by k/tau
    roundoffs and a few, which a^k makes no more than another T of c.
    """
    size, c = np.zeros(trace.x.shape[1:]), []
    for x in trace.x:
        size = np.abs(eq.a) * size + np.abs(x)
        c.append(size)
    return np.asarray(roundoff(dtype)[0] * (4 * len(c) + 32) * np.stack(c))


def bounds(eq: Equations, trace: Trace, dtype: np.dtype[Any], spikes: np.dtype[Any]) -> tuple[Array, Array]:
    """The rounding bounds of one step of w and of the stored membrane, [T, ...], as derived above.

    Args:
        dtype: of the subject's states.
        spikes: of its outputs.
    """
    e, tiny = roundoff(dtype)
    step = trace.step
    av, bi = np.abs(eq.a_size * trace.v_before), np.abs(eq.b * step.j)
    if eq.a_s is not None:
        bi = bi + np.abs(eq.b) * np.maximum(np.abs(eq.a_s * trace.i_before), np.abs(trace.x))
    pending = eq.a * eq.rho * _before(step.s) if eq.choices.reset == "subtract" else np.zeros(())
    magnitude = av + np.abs(pending) + bi + np.abs(eq.c) + np.abs(eq.rho * step.r)
    gain = np.abs(eq.a_size * eq.resistance * step.j) if eq.choices.input_gain.startswith("one_minus_decay") else 0.0
    w = e * (_ROUNDINGS * magnitude + eq.a_error * (av + gain) + eq.a_s_error * bi + np.abs(step.w)) + tiny
    low = 0.0 if eq.v_min is None else np.abs(eq.v_min)
    v = w + e * _STORE_ROUNDINGS * (np.abs(step.w) + np.abs(eq.rho * step.s) + low + np.abs(eq.v_reset)) + tiny
    if eq.choices.reset == "subtract" and np.any(eq.a_error):
        v = v + e * eq.a_error * np.abs(eq.rho * step.s)
    if spikes != dtype and eq.choices.reset == "subtract":
        # Spikes are float32 in snnTorch and sinabs, also under a float64 membrane, and torch computes their product
        # with a threshold of no dimension in float32.
        coarse = roundoff(spikes)[0]
        w = w + coarse * (np.abs(pending) + np.abs(eq.rho * step.r))
        v = v + w + coarse * np.abs(eq.rho * step.s)
    if eq.adaptation is not None:
        of_test, of_reset = threshold_slack(eq, step.w, step.s, roundoff(spikes)[0])
        return w + of_test, v + of_reset
    decayed, drive = eq.a * trace.v_before, eq.b * step.j
    parts = [eq.a, eq.b, eq.c, eq.rho, eq.theta, trace.v_before, decayed, step.j, drive, decayed + drive, step.w]
    parts += [step.w - eq.theta, eq.rho * step.s, step.v, decayed + pending, decayed + pending + drive]
    parts += [step.w + eq.rho * step.r, *_of_complement(eq, trace)]
    exact = np.ones(step.w.shape, dtype=bool)
    for part in parts:
        exact &= _representable(np.asarray(part))
    # Lapicque multiplies by R, 1/(R C) and dt one after the other, which rounds where the product would not.
    if np.any(eq.a_error) or eq.a_s is not None or eq.v_min is not None or eq.choices.form == "snntorch.Lapicque":
        exact[...] = False
    return np.where(exact, 0.0, w), np.where(exact, 0.0, v)


def _of_complement(eq: Equations, trace: Trace) -> list[Array]:
    """What a step rounds that computes with 1 - a: v - q*(v - leak) + j or v + q*(j - (v - leak)), q = 1 - a."""
    q, v, j = 1 - eq.a, trace.v_before, trace.step.j
    fall, away = q * v - eq.c, v - trace.step.w
    with np.errstate(invalid="ignore", divide="ignore"):
        below = np.where(q == 0, v, fall / np.where(q == 0, 1.0, q))
    return [q * v, fall, v - fall, below, j - v, j - below, j + (v - below), away]


def _off(value: Array, truth: Array, bound: Array) -> NDArray[np.bool_]:
    """Where value is further than bound from truth; NaN and infinity must agree in place and kind."""
    with np.errstate(invalid="ignore"):
        near = (np.abs(value - truth) <= bound) & np.isfinite(bound) & np.isfinite(truth)
    return ~(near | (value == truth) | (np.isnan(value) & np.isnan(truth)))


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
        return (_judge_alpha if alpha.covers(spec) else _judge)(spec, recording)


def explained(eq: Equations, spikes: Array, w: Array, bound: Array, dtype: np.dtype[Any]) -> NDArray[np.bool_]:
    """Where spikes are those of a membrane within the bound of w; `dtype`: of the subject's outputs."""
    low, high = eq.count(w - bound), eq.count(w + bound)
    if eq.choices.spike_count == "smooth":
        slack = 8 * roundoff(dtype)[0] * np.maximum(np.maximum(np.abs(low), np.abs(high)), 1.0)
        return np.asarray((spikes >= low - slack) & (spikes <= high + slack))
    return np.asarray((spikes >= low) & (spikes <= high) & (spikes == np.trunc(spikes)))


def _joined(eq: Equations, recording: Recording) -> Array:
    """What the sum that makes the input rounds, in the membrane or the current: as `bounds`, at its terms' size."""
    if recording.terms is None:
        return np.zeros(())
    e, tiny = roundoff(recording.x.dtype)
    gain = np.maximum(np.abs(eq.b), 1.0)
    return np.asarray(e * _ROUNDINGS * gain * recording.terms.astype(np.float64) + tiny)


def _judge(spec: Any, recording: Recording) -> Judgement:
    eq, trace, _ = trajectory(spec, recording)
    step = trace.step
    w_bound, v_bound = bounds(eq, trace, recording.x.dtype, recording.outputs.dtype)
    joined = _joined(eq, recording)
    w_bound, v_bound = w_bound + joined, v_bound + joined
    if recording.spec.form == "snntorch.StateLeaky":
        summed = convolution_bound(eq, trace, recording.x.dtype)
        w_bound, v_bound = w_bound + summed, v_bound + summed
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
        mismatch = ~(spikes == eq.count(step.w))
        unexplained = mismatch & ~explained(eq, spikes, step.w, w_bound, recording.outputs.dtype)
    return _judgement(spikes, mismatch, unexplained, state_off, error)


def _judge_alpha(spec: Any, recording: Recording) -> Judgement:
    """Of snnTorch's Alpha: see `oracle.alpha`."""
    run = alpha.rerun(spec, recording)
    bounds = run.bounds(*roundoff(recording.x.dtype))
    state_off = np.zeros(run.x.shape, dtype=bool)
    for name, truth in (("i_exc", run.e), ("i_inh", run.n), ("v_mem", run.w)):
        state_off |= _off(recording.states[name].astype(np.float64), truth, bounds[name])
    mismatch = ~(run.spikes == run.eq.count(run.w))
    unexplained = mismatch & ~explained(run.eq, run.spikes, run.w, bounds["v_mem"], recording.outputs.dtype)
    error = np.abs(recording.states["v_mem"].astype(np.float64) - run.w)
    return _judgement(run.spikes, mismatch, unexplained, state_off, error)


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


def _sum_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    extra = gradient.ndim - len(shape)
    gradient = gradient.sum(tuple(range(extra))) if extra else gradient
    kept = tuple(k for k, size in enumerate(shape) if size == 1 and gradient.shape[k] != 1)
    return gradient.sum(kept, keepdims=True) if kept else gradient


def gradients(spec: Any, recording: Recording, grad_output: NDArray[Any]) -> dict[str, Array]:
    """Gradients along the subject's own trajectory: of `x` [T, ...], and of the raw parameters of `spec` by name.

    Args:
        spec: whose gradient: its reset path, its surrogate, its raw forms.
        recording: what the subject did, from the initial state on.
        grad_output: dL/doutput, [T, ...].
    """
    if grad_output.shape != recording.x.shape:
        raise OracleError(f"grad_output has shape {list(grad_output.shape)}, the output {list(recording.x.shape)}")
    with np.errstate(all="ignore"):
        if alpha.covers(spec):
            return alpha.gradients(spec, recording, grad_output.astype(np.float64), _sum_to)
        eq, trace, _ = trajectory(spec, recording)
        g = backward(eq, trace, grad_output.astype(np.float64))
        leak: Any = 0.0
        if "leak" in spec.parameters:
            leak = RAW[spec.parameters["leak"].raw].value(spec.parameters["leak"].value.astype(np.float64), spec.dt)
        of_reset = 0.0 if spec.reset_amount == "value" else g["pending"] if eq.divided else g["rho"]
        of_gain = g["b"] * eq.resistance if spec.input_gain.startswith("one_minus_decay") else 0.0
        if keeps_gain(spec):  # eq.a_s = (1-a)*a_s
            own = spec.parameters["syn_decay"]
            a_s = RAW[own.raw].value(own.value.astype(np.float64), spec.dt)
            of_gain, g["a_s"] = a_s * g["a_s"], (1 - eq.a) * g["a_s"]
        by_name = {
            "mem_decay": g["a"] - of_gain - leak * g["c"],
            "syn_decay": g["a_s"],
            "adapt_decay": g["adapt_decay"],
            "adapt_scale": g["adapt_scale"],
            "resistance": g["b"] * (1 - eq.a),
            "surrogate_scale": np.zeros_like(g["b"]),
            "initial_v": np.zeros_like(g["b"]),
            "input_gain": g["b"],
            "leak": (1 - eq.a) * g["c"],
            "threshold": g["theta"] + of_reset,
            "bias": -g["theta"],
            "reset_amount": g["rho"],
            "reset_value": g["v_reset"],
            "min_v_mem": g["v_min"],
            "spike_scale": g["g"],
        }
        result = {"x": g["x"]}
        for name, parameter in spec.parameters.items():
            slope = RAW[parameter.raw].slope(parameter.value.astype(np.float64), spec.dt)
            result[name] = np.asarray(_sum_to(by_name[name], parameter.value.shape) * slope)
    return result


def gradient_error(subject: NDArray[Any], truth: Array) -> float:
    """max|difference| / max|truth| of one tensor; infinite where the subject has NaN and the truth has not.

    Raises:
        OracleError: shapes that differ, or an empty tensor.
    """
    if subject.shape != truth.shape:
        raise OracleError(f"a gradient of shape {list(subject.shape)} against one of {list(truth.shape)}")
    if truth.size == 0:
        raise OracleError("an empty gradient proves nothing")
    both_nan = np.isnan(subject) & np.isnan(truth)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(both_nan | (subject == truth), 0.0, np.abs(subject.astype(np.float64) - truth))
    if np.isnan(difference).any():
        return float("inf")
    scale = float(np.max(np.where(np.isfinite(truth), np.abs(truth), 0.0)))
    largest = float(difference.max())
    return 0.0 if largest == 0 else largest / scale if scale > 0 else float("inf")


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
    "Step",
    "bounds",
    "current_bound",
    "explained",
    "gradient_error",
    "gradients",
    "judge",
    "same_bits",
    "trajectory",
]
