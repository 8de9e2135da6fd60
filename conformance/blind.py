"""A subject that shows no states over time, judged by its spikes: the oracle follows it from the initial state.

The oracle takes the spikes that the subject emitted in the place of its own, so both stand at the same state but for
rounding, and every spike can be judged. What rounding adds up to by step t is at most

    E_i[t] = |a_s| E_i[t-1] + bound of the current
    E_w[t] = |a| E_v[t-1] + |b| E_i[t] + bound of w
    E_v[t] = |a| E_v[t-1] + |b| E_i[t] + bound of v     (the latter alone, where the reset sets the membrane)

with the oracle's bounds of one step. A clamp brings two membranes no further apart. A reset in the residual depends on
a membrane that the subject does not show: where that is within E_v of the threshold, its neuron is judged no further.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracetorch import oracle
from tracetorch.core.spec import NeuronSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class Followed:
    """The oracle's trajectory along a subject's spikes, float64 [T, B, N].

    Attributes:
        recording: the trajectory as a recording in float64, stored as the spec says.
        trace: the same as the oracle has it.
        w_error, v_error: how far rounding may have taken the subject from it, before and after the reset.
        judged: where it can be judged.
    """

    recording: oracle.Recording
    trace: oracle.Trace
    w_error: Array
    v_error: Array
    judged: NDArray[np.bool_]


def _follow(eq: oracle.Equations, x: Array, spikes: Array | None) -> oracle.Trace:
    i = v = np.zeros(x.shape[1:])
    before: list[tuple[Array, Array]] = []
    steps: list[oracle.Step] = []
    for t, x_t in enumerate(x):
        before.append((i, v))
        steps.append(oracle.advance(eq, x_t, i, v, None if spikes is None else spikes[t]))
        i, v = steps[-1].i, steps[-1].v
    columns = [np.stack([getattr(step, name) for step in steps]) for name in ("i", "w", "r", "s", "v")]
    return oracle.Trace(x, np.stack([b[0] for b in before]), np.stack([b[1] for b in before]), oracle.Step(*columns))


def _errors(eq: oracle.Equations, trace: oracle.Trace, outputs: Array) -> tuple[Array, Array]:
    w_bound, v_bound = oracle.bounds(eq, trace, np.dtype(np.float32), outputs.dtype)
    a, a_s = np.abs(eq.a), np.zeros(()) if eq.a_s is None else np.abs(eq.a_s)
    i_bound = 2.0**-24 * (4 + eq.a_s_error) * a_s * (np.abs(trace.i_before) + np.abs(trace.x))
    sets = trace.step.s > 0 if eq.choices.reset in ("value", "add_value") else np.zeros(trace.x.shape, dtype=bool)
    w_error, v_error = np.zeros(trace.x.shape), np.zeros(trace.x.shape)
    e_i = e_v = np.zeros(trace.x.shape[1:])
    for t in range(len(trace.x)):
        e_i = a_s * e_i + i_bound[t]
        carried = a * e_v + np.abs(eq.b) * e_i
        w_error[t] = carried + w_bound[t]
        e_v = np.where(sets[t], 0.0, carried) + v_bound[t]
        v_error[t] = e_v
    return w_error, v_error


def follow(spec: NeuronSpec, x: Array, outputs: Array) -> Followed:
    """Follow the spikes of a float32 subject. x, outputs: [T, B, N]."""
    eq = oracle.equations(spec)
    spikes = None if spec.spike_count == "none" else outputs.astype(np.float64) / eq.g
    x = x.astype(np.float64)
    with np.errstate(all="ignore"):
        trace = _follow(eq, x, spikes)
        w_error, v_error = _errors(eq, trace, outputs)
        judged = np.ones(x.shape, dtype=bool)
        if eq.residual:
            before = np.concatenate([np.zeros_like(v_error[:1]), v_error[:-1]])
            unknown = np.abs(trace.v_before - eq.theta) <= before
            judged = ~np.logical_or.accumulate(unknown, axis=0)
    states = {"v_mem": trace.step.w if spec.stores_before_reset else trace.step.v}
    if "i_syn" in spec.states:
        states["i_syn"] = trace.step.i
    emitted = trace.step.w if spikes is None else outputs.astype(np.float64)
    return Followed(oracle.Recording(x, emitted, states, spec), trace, w_error, v_error, judged)
