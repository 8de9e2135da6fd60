"""Any spec on its own, in float64, from the initial state, by its own spikes or by given ones.

`oracle.run` is that of the leaky integrate-and-fire family. A threshold that adapts is run here step by step; the
difference of exponentials in `oracle.alpha`, spikes of two signs in `oracle.signed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tracetorch.oracle import alpha, composed, signed
from tracetorch.oracle.adaptive import adapted, along
from tracetorch.oracle.equations import Equations, equations
from tracetorch.oracle.judge import Recording, trajectory
from tracetorch.oracle.lif import Step, Trace, advance, run
from tracetorch.oracle.raw import Array
from tracetorch.oracle.rounding import bounds, roundoff


@dataclass(frozen=True)
class Expected:
    """What the oracle expects of every step of a recording, restarted from the recorded states; arrays [T, ...].

    Attributes:
        eq: the equations of the spike test.
        w: the membrane of the spike test, or its change where that is tested.
        w_bound: its rounding bound.
        states: by name, as the subject stores them.
    """

    eq: Equations
    w: Array
    w_bound: Array
    states: dict[str, Array]


def expected(spec: Any, recording: Recording) -> Expected:
    """See `Expected`.

    Raises:
        OracleError: as `judge` does.
    """
    with np.errstate(all="ignore"):
        if alpha.covers(spec):
            found = alpha.rerun(spec, recording)
            own = found.bounds(*roundoff(recording.x.dtype))
            return Expected(found.eq, found.w, own["v_mem"], _alpha_states(found))
        if composed.covers(spec):
            rerun = composed.rerun(spec, recording, *roundoff(recording.x.dtype))
            truth = {composed.STATES[name]: state for name, state in rerun.tape.new.items()}
            return Expected(signed.two_signs(spec), rerun.tape.m, np.maximum(*rerun.z_bounds), truth)
        eq, trace, _ = trajectory(spec, recording)
        w_bound, _ = bounds(eq, trace, recording.x.dtype, recording.outputs.dtype)
        states = {"v_mem": trace.step.w if recording.spec.stores_before_reset else trace.step.v}
        if eq.a_s is not None:
            states["i_syn"] = trace.step.i
        if eq.adaptation is not None:
            states["adaptation"] = eq.adaptation.after(trace.step.s)
    return Expected(eq, eq.tested(trace.step.w, trace.v_before), w_bound, states)


def simulate(spec: Any, x: Array, spikes: Array | None = None) -> tuple[Recording, Equations, Trace]:
    """What a spec emits and, as it says, stores, for x.

    Args:
        x: float64 [T, ...].
        spikes: those to follow in the place of its own, [T, ...].

    Returns:
        The recording; the equations, of an adaptive threshold with one of [T, ...]; the trajectory. In that of a
        difference of exponentials i is the excitatory current, and w and v are both the membrane as it is tested.

    Raises:
        OracleError: a choice without equations.
    """
    if composed.covers(spec):
        return _signed(spec, x, spikes)
    with np.errstate(all="ignore"):
        states: dict[str, Array] = {}
        if alpha.covers(spec):
            found = alpha.follow(spec, x, spikes)
            eq, trace, states = found.eq, _alpha_trace(found), _alpha_states(found)
        elif spec.adaptive:
            eq, trace, states["adaptation"] = _adaptive(spec, x, spikes)
        else:
            eq = equations(spec)
            trace = run(eq, x, spikes)
        emitted = trace.step.s
        if eq.inhibited and not alpha.covers(spec):
            emitted = eq.emitted(trace.step.w) if spikes is None else spikes
        outputs = trace.step.w if spec.output == "membrane" else eq.g * emitted
    states["v_mem"] = trace.step.w if spec.stores_before_reset else trace.step.v
    states.setdefault("i_syn", trace.step.i)
    return Recording(x, outputs, {name: states[name] for name in spec.states}, spec), eq, trace


def _signed(spec: Any, x: Array, spikes: Array | None) -> tuple[Recording, Equations, Trace]:
    """As `simulate`; `spikes` of either sign."""
    with np.errstate(all="ignore"):
        eq, trace, outputs = signed.simulate(spec, x, spikes)
    states = {"v_mem": trace.step.v, "i_syn": trace.step.i}
    return Recording(x, outputs, {name: states[name] for name in spec.states}, spec), eq, trace


def _adaptive(spec: Any, x: Array, spikes: Array | None) -> tuple[Equations, Trace, Array]:
    """The equations and the trajectory, and the adaptation after every step."""
    n = i = np.zeros(x.shape[1:])
    last = np.full(x.shape[1:], -1)
    first = along(spec, n[None]).at(0)
    v = np.broadcast_to(first.v_first, n.shape).astype(np.float64)
    kept, fired = [], []
    for t, x_t in enumerate(x):
        eq = along(spec, n[None]).at(0)
        step = advance(eq, x_t, i, v, None if spikes is None else spikes[t], eq.held_in(t, last))
        i, v, n = step.i, step.v, eq.adaptation.after(step.s)[0]
        last = np.where(step.s > 0, t, last)
        kept.append(n)
        fired.append(step.s)
    eq = adapted(spec, {"adaptation": np.stack(kept)})
    return eq, run(eq, x, np.stack(fired)), np.stack(kept)


def _alpha_states(found: alpha.Run) -> dict[str, Array]:
    return {"i_exc": found.e, "i_inh": found.n, "v_mem": found.w}


def _alpha_trace(found: alpha.Run) -> Trace:
    zero = np.zeros_like(found.x)
    before = np.concatenate([zero[:1], found.w[:-1]])
    step = Step(found.e, found.x, found.w, zero, found.spikes, found.w)
    return Trace(found.x, found.e_before, before, step, zero > 0)


__all__ = ["Expected", "expected", "simulate"]
