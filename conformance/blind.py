"""A subject that shows no states over time, judged by its spikes: the oracle follows it from the initial state.

The oracle takes the spikes that the subject emitted in the place of its own, so both stand at the same state but for
rounding, and every spike can be judged. What rounding adds up to by step t is at most

    E_i[t] = |a_s| E_i[t-1] + bound of the current
    E_w[t] = |a| E_v[t-1] + |b| E_i[t] + bound of w
    E_v[t] = |a| E_v[t-1] + |b| E_i[t] + bound of v     (the latter alone, where the reset sets the membrane)

with the oracle's bounds of one step; a threshold that adapts is off by A times what its n is off, and the errors of a
difference of exponentials are `oracle.alpha.Run.drift`. A clamp brings two membranes no further apart. A reset in the
residual depends on a membrane that the subject does not show: where that is within E_v of the threshold, its neuron is
judged no further.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracetorch import oracle
from tracetorch.core.spec import NeuronSpec
from tracetorch.oracle import alpha
from tracetorch.oracle.raw import RAW

Array = NDArray[Any]


@dataclass(frozen=True)
class Followed:
    """The oracle's trajectory along a subject's spikes, float64 [T, B, N].

    Attributes:
        recording: the trajectory as a recording in float64, stored as the spec says.
        eq, trace: the same as the oracle has it.
        w_error, v_error: how far rounding may have taken the subject's membrane from it, before and after the reset.
        errors: and every other state, by name.
        judged: where it can be judged.
    """

    recording: oracle.Recording
    eq: oracle.Equations
    trace: oracle.Trace
    w_error: Array
    v_error: Array
    errors: Mapping[str, Array]
    judged: NDArray[np.bool_]


def _errors(
    eq: oracle.Equations, trace: oracle.Trace, outputs: Array, dtype: np.dtype[Any]
) -> tuple[Array, Array, Array]:
    """Of the current, and of the membrane before and after its reset."""
    w_bound, v_bound = oracle.bounds(eq, trace, dtype, outputs.dtype)
    a, a_s = np.abs(eq.a), np.zeros(()) if eq.a_s is None else np.abs(eq.a_s)
    i_bound = oracle.current_bound(eq, trace, dtype) if eq.a_s is not None else np.zeros(trace.x.shape)
    whole = eq.choices.reset in ("value", "add_value") and eq.choices.spike_count != "smooth"
    sets = trace.step.s > 0 if whole else np.zeros(trace.x.shape, dtype=bool)
    i_error, w_error, v_error = (np.zeros(trace.x.shape) for _ in range(3))
    e_i = e_v = np.zeros(trace.x.shape[1:])
    for t in range(len(trace.x)):
        e_j = e_i if eq.choices.synapse == "read_then_decay" else a_s * e_i + i_bound[t]
        e_i = a_s * e_i + i_bound[t]
        carried = np.where(trace.held[t], e_v, a * e_v + np.abs(eq.b) * e_j)
        w_error[t] = carried + w_bound[t]
        e_v = np.where(sets[t], 0.0, carried) + v_bound[t]
        i_error[t], v_error[t] = e_i, e_v
    return i_error, w_error, v_error


def _adaptation_errors(
    eq: oracle.Equations, trace: oracle.Trace, spikes_dtype: np.dtype[Any]
) -> tuple[Array, Array, Array]:
    """Of the adaptation; and what that adds to those of the membrane before and after its reset, in all steps after."""
    adaptation, spikes = eq.adaptation, trace.step.s
    bound = adaptation.bound(spikes, *oracle.roundoff(spikes_dtype))
    error, n_error, lag = np.zeros(trace.x.shape[1:]), [], []
    for t in range(len(trace.x)):
        lag.append(error)
        error = np.abs(adaptation.decay) * error + bound[t]
        n_error.append(error)
    of_theta = np.abs(adaptation.scale) * np.stack(lag)
    of_test = of_theta * np.maximum(np.abs(trace.step.w) / eq.theta, 1.0)
    of_reset, gone = [], np.zeros(trace.x.shape[1:])
    for t in range(len(trace.x)):
        of_test[t] += np.abs(eq.a) * gone
        gone = np.abs(eq.a) * gone + np.abs(spikes[t]) * of_theta[t]
        of_reset.append(gone)
    return np.stack(n_error), of_test, np.stack(of_reset)


def _follow_signed(spec: NeuronSpec, x: Array, outputs: Array) -> Followed:
    """Spikes of two signs: a smooth one is not followed; where two spikes give one output, no step is judged."""
    eq, shown = oracle.two_signs(spec), outputs.astype(np.float64)
    whole = spec.spike_count != "smooth"
    spikes = np.nan_to_num(eq.fired(shown), nan=0.0) if whole else None
    recording, _, trace = oracle.simulate(spec, x.astype(np.float64), spikes)
    with np.errstate(all="ignore"):
        w_error, v_error, errors = oracle.drift(spec, recording, eq, *oracle.roundoff(x.dtype))
    judged = np.full(x.shape, eq.readable or not whole)
    emitted = replace(recording, outputs=shown if whole else recording.outputs)
    return Followed(emitted, eq, trace, w_error, v_error, errors, judged)


def follow(spec: NeuronSpec, x: Array, outputs: Array) -> Followed:
    """Follow the spikes of a subject that computes in the dtype of x. x, outputs: [T, B, N]."""
    if spec.signed:
        return _follow_signed(spec, x, outputs)
    dtype, x = x.dtype, x.astype(np.float64)
    scale = spec.parameters.get("spike_scale")
    g = 1.0 if scale is None else RAW[scale.raw].value(scale.value.astype(np.float64), spec.dt)
    spikes = None if spec.spike_count == "none" else outputs.astype(np.float64) / g
    recording, eq, trace = oracle.simulate(spec, x, spikes)
    with np.errstate(all="ignore"):
        if alpha.covers(spec):
            errors = alpha.follow(spec, x, spikes).drift(*oracle.roundoff(dtype))
            w_error = v_error = errors.pop("v_mem")
        else:
            i_error, w_error, v_error = _errors(eq, trace, outputs, dtype)
            errors = {"i_syn": i_error} if "i_syn" in spec.states else {}
        if eq.adaptation is not None:
            errors["adaptation"], of_test, of_reset = _adaptation_errors(eq, trace, outputs.dtype)
            w_error, v_error = w_error + of_test, v_error + of_reset
        judged = np.ones(x.shape, dtype=bool)
        if eq.residual:
            before = np.concatenate([np.zeros_like(v_error[:1]), v_error[:-1]])
            unknown = np.abs(trace.v_before - eq.theta) <= before
            judged = ~np.logical_or.accumulate(unknown, axis=0)
    emitted = trace.step.w if spikes is None else outputs.astype(np.float64)
    return Followed(replace(recording, outputs=emitted), eq, trace, w_error, v_error, errors, judged)
