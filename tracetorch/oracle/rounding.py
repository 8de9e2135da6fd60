"""What rounding may do to one step of a subject: the bounds by which it is judged.

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

Of states that are rounded to levels the bounds above are those of the state before it is rounded: see `oracle.levels`.
The level itself is exact, and a spike is then that of the level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracetorch.oracle.adaptive import threshold_slack
from tracetorch.oracle.equations import Equations
from tracetorch.oracle.lif import Trace
from tracetorch.oracle.raw import Array

_ROUNDINGS = 8
_STORE_ROUNDINGS = 4


@dataclass(frozen=True)
class FormRounding:
    """In what a form (an order of operations) rounds otherwise than the others.

    Attributes:
        factors_apart: it multiplies by the factors of a parameter one after the other, which rounds where their product
            would not: no step of it is exact.
        convolves: it sums a kernel over its whole past: see `convolution_bound`.
    """

    factors_apart: bool = False
    convolves: bool = False


# Lapicque: R, 1 / (R C) and dt.
FORM_ROUNDINGS: Mapping[str, FormRounding] = MappingProxyType(
    {
        "snntorch.Lapicque": FormRounding(factors_apart=True),
        "snntorch.StateLeaky": FormRounding(convolves=True),
    }
)
_PLAIN = FormRounding()


def form_rounding(spec: Any) -> FormRounding:
    """Of the form of a spec."""
    return FORM_ROUNDINGS.get(spec.form, _PLAIN)


def roundoff(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The unit roundoff of a dtype, and a few of its smallest subnormals."""
    info = np.finfo(dtype)
    return float(info.eps) / 2, 16 * float(info.smallest_subnormal)


def representable(value: Array) -> NDArray[np.bool_]:
    """In float32: then no rounding happened, in the subject's float32 or float64 as in the oracle's float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(value == value.astype(np.float32).astype(np.float64))


def shifted(after: Array, first: Array | float = 0.0) -> Array:
    """Of every step, what was there after the one before."""
    return np.concatenate([np.broadcast_to(first, after[:1].shape), after[:-1]])


def current_bound(eq: Equations, trace: Trace, dtype: np.dtype[Any]) -> Array:
    """The rounding bound of one step of the synaptic current, [T, ...], as derived above."""
    e, tiny = roundoff(dtype)
    if eq.levels is not None:
        return np.zeros(trace.step.i.shape)
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
    pending = eq.a * eq.rho * shifted(step.s) if eq.choices.reset == "subtract" else np.zeros(())
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
        exact &= representable(np.asarray(part))
    computed = bool(np.any(eq.a_error)) or form_rounding(eq.choices).factors_apart
    if computed or eq.a_s is not None or eq.v_min is not None:
        exact[...] = False
    kept = exact
    if eq.choices.reset == "value":  # some forms compute it as u - s*(u - v_reset)
        kept = exact & ((step.s == 0) | representable(step.w - eq.v_reset))
    w, v = np.where(exact, 0.0, w), np.where(kept, 0.0, v)
    if eq.levels is None:
        return w, v
    return np.zeros_like(w), v - w + np.where(exact, 0.0, e * _STORE_ROUNDINGS * np.abs(eq.rho * step.r))


def _of_complement(eq: Equations, trace: Trace) -> list[Array]:
    """What a step rounds that computes with 1 - a: v - q*(v - leak) + j or v + q*(j - (v - leak)), q = 1 - a."""
    q, v, j = 1 - eq.a, trace.v_before, trace.step.j
    fall, away = q * v - eq.c, v - trace.step.w
    with np.errstate(invalid="ignore", divide="ignore"):
        below = np.where(q == 0, v, fall / np.where(q == 0, 1.0, q))
    return [q * v, fall, v - fall, below, j - v, j - below, j + (v - below), away]


def of_sum(eq: Equations, recording: Any) -> Array:
    """What the sum that makes the input rounds, in the membrane or the current: as `bounds`, at its terms' size."""
    if recording.terms is None:
        return np.zeros(())
    e, tiny = roundoff(recording.x.dtype)
    gain = np.maximum(np.abs(eq.b), 1.0)
    return np.asarray(e * _ROUNDINGS * gain * recording.terms.astype(np.float64) + tiny)


def slack(eq: Equations, trace: Trace, recording: Any) -> tuple[Array, Array]:
    """The bounds of w and of the stored membrane as `bounds` has them, with what a subject's own sums add."""
    w, v = bounds(eq, trace, recording.x.dtype, recording.outputs.dtype)
    more = of_sum(eq, recording) if eq.levels is None else np.zeros(())
    if form_rounding(recording.spec).convolves:
        more = more + convolution_bound(eq, trace, recording.x.dtype)
    return w + more, v + more
