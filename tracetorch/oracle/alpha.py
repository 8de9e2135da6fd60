"""The float64 reference of snnTorch's `Alpha` (1.0.0): a membrane that is the difference of two exponentials.

e and n are the states `i_exc` and `i_inh`, w the membrane, which is stored as it is tested; r = [w[t-1] > theta], a
constant in the backward pass; k = 1 + ln(a_s) / (ln(a) - ln(a_s)):

    e1 = a_s*e + x;   n1 = a*n - x;   m1 = k*(e1 + n1)
    reset none:      e = e1;            n = n1;          w = m1
    reset to zero:   e = (1-r)*e1;      n = (1-r)*n1;    w = (1-r)*m1
    subtract:        e = e1 - r*theta;  n = (1-r)*n1;    w = m1 + r*n, n before the step
    s = count(w);    output = g*s    (inhibited: one winner's, not scaled)
    with levels, e, n and w are rounded to them after the step

Backward, K for dL/dw = g*G*surrogate(w), l_e and l_n for dL/de and dL/dn after the step, q and p what is left of e1 and
n1 (1-r or 1):

    dL/dm1 = q*K;  dL/de1 = q*l_e + k*dL/dm1;  dL/dn1 = p*l_n + k*dL/dm1;  dL/dk += (e1+n1)*dL/dm1
    dL/dx = dL/de1 - dL/dn1;  dL/da_s += e*dL/de1;  dL/da += n*dL/dn1
    l_e = a_s*dL/de1;  l_n = a*dL/dn1, subtract: and r*K
    dL/dtheta -= K (if the surrogate reaches it), subtract: and r*l_e
    dk/da_s = ln(a) / (ln(a) - ln(a_s))^2 / a_s;  dk/da = -ln(a_s) / (ln(a) - ln(a_s))^2 / a
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tracetorch.oracle.equations import Equations, OracleError, equations
from tracetorch.oracle.levels import taken
from tracetorch.oracle.lif import Feedback
from tracetorch.oracle.raw import RAW, Array
from tracetorch.oracle.winner import winner

_RESETS = {
    ("subtract", "next_step_after_decay"),
    ("value", "next_step_discards_input"),
}
_ROUNDINGS = 8


def covers(spec: Any) -> bool:
    """Whether this is the neuron of this file."""
    return bool(spec.synapse == "difference_of_exponentials")


@dataclass(frozen=True)
class Run:
    """A subject's run, every step restarted from its own states: the equations above, each [T, ...].

    Attributes:
        eq: for its spike test and surrogate.
        q: 1-r of a reset to zero, else 1; `r` of a subtraction, else 0; `kept`: what is left of n1.
        k_error: of k, absolute, in unit roundoffs.
    """

    eq: Equations
    a_s: Array
    a: Array
    k: Array
    k_error: Array
    x: Array
    e_before: Array
    n_before: Array
    q: Array
    r: Array
    kept: Array
    e: Array
    n: Array
    w: Array
    spikes: Array

    def bounds(self, roundoff: float, tiny: float) -> dict[str, Array]:
        """Rounding bounds of one step of every state."""
        size_e = np.abs(self.a_s * self.e_before) + np.abs(self.x)
        size_n = np.abs(self.a * self.n_before) + np.abs(self.x)
        both = size_e + size_n
        if self.eq.levels is not None:
            return {name: np.zeros(both.shape) for name in ("i_exc", "i_inh", "v_mem")}
        at_w = _ROUNDINGS * (np.abs(self.k) * both + np.abs(self.n_before * self.r)) + self.k_error * both
        return {
            "i_exc": roundoff * 4 * (size_e + np.abs(self.r * self.eq.threshold)) + tiny,
            "i_inh": roundoff * 4 * size_n + tiny,
            "v_mem": roundoff * at_w + tiny,
        }

    def drift(self, roundoff: float, tiny: float) -> dict[str, Array]:
        """What rounding adds up to in a run of its own along the same spikes, of every state, [T, ...]."""
        own = self.bounds(roundoff, tiny)
        e = n = np.zeros(self.x.shape[1:])
        found: dict[str, list[Array]] = {name: [] for name in own}
        for t, (q, r, kept) in enumerate(zip(self.q, self.r, self.kept, strict=True)):
            decayed_e, decayed_n = np.abs(self.a_s) * e, np.abs(self.a) * n
            found["v_mem"].append(q * np.abs(self.k) * (decayed_e + decayed_n) + r * n + own["v_mem"][t])
            e, n = q * decayed_e + own["i_exc"][t], kept * decayed_n + own["i_inh"][t]
            found["i_exc"].append(e)
            found["i_inh"].append(n)
        return {name: np.stack(errors) for name, errors in found.items()}


def _value(spec: Any, name: str) -> Array:
    parameter = spec.parameters[name]
    return np.asarray(RAW[parameter.raw].value(parameter.value.astype(np.float64), spec.dt))


def _before(after: Array) -> Array:
    return np.concatenate([np.zeros_like(after[:1]), after[:-1]])


def _numbers(spec: Any) -> dict[str, Any]:
    """The equations, the decays, k and its error, as `Run` has them."""
    unknown = spec.reset != "none" and (spec.reset, spec.reset_timing) not in _RESETS
    if unknown or spec.clamp != "none" or spec.input_gain != "one":
        raise OracleError(
            f"synapse={spec.synapse!r}: the oracle has equations for it with the resets of snntorch.Alpha, no clamp "
            f"and no gain, not for reset={spec.reset!r}, reset_timing={spec.reset_timing!r}, clamp={spec.clamp!r}"
        )
    own = {name: p for name, p in spec.parameters.items() if name != "syn_decay"}
    a_s, a = _value(spec, "syn_decay"), _value(spec, "mem_decay")
    log_s, log_a = np.log(a_s), np.log(a)
    ratio = log_s / (log_a - log_s)
    spread = (np.abs(log_s) + np.abs(np.where(np.isfinite(log_a), log_a, 0.0))) / np.abs(log_a - log_s)
    k_error = np.abs(ratio) * (8 + 8 * spread) + 2 * np.abs(1 + ratio)
    eq = equations(spec.replace(synapse="none", parameters=own))
    return {"eq": eq, "a_s": a_s, "a": a, "k": 1 + ratio, "k_error": k_error}


def _advance(spec: Any, numbers: dict[str, Any], x: Array, e: Array, n: Array, fired: Array) -> dict[str, Any]:
    """One step, or many independent ones, from (e, n) after the spikes `fired`: the equations of the module."""
    to_zero = spec.reset == "value"
    r = np.zeros_like(x) if to_zero or spec.reset == "none" else fired
    q = 1 - fired if to_zero else np.ones_like(x)
    kept = q * (1 - r)
    e1, n1 = numbers["a_s"] * e + x, numbers["a"] * n - x
    after = {"e": q * e1 - r * numbers["eq"].threshold, "n": kept * n1, "w": q * numbers["k"] * (e1 + n1) + r * n}
    return {"x": x, "e_before": e, "n_before": n, "q": q, "r": r, "kept": kept, **after}


def rerun(spec: Any, recording: Any) -> Run:
    """The equations along a recording.

    Raises:
        OracleError: a reset, clamp, gain or comparison that snnTorch's Alpha has not.
    """
    numbers = _numbers(spec)
    eq, x = numbers["eq"], recording.x.astype(np.float64)
    e, n, w = (_before(recording.states[name].astype(np.float64)) for name in ("i_exc", "i_inh", "v_mem"))
    spikes = recording.outputs.astype(np.float64)
    spikes = spikes if not np.any(eq.g != 1) else spikes / eq.g
    plain = eq.unrounded() if eq.levels is not None else eq
    run = Run(**{**numbers, "eq": plain}, **_advance(spec, numbers, x, e, n, eq.count(w)), spikes=spikes)
    if eq.levels is None and not eq.inhibited:
        return run
    info = np.finfo(recording.x.dtype)
    bounds, own = run.bounds(float(info.eps) / 2, 16 * float(info.smallest_subnormal)), recording.states
    if eq.levels is None:  # of equal membranes the subject's roundings decide which one wins
        stored = own["v_mem"].astype(np.float64)
        return replace(run, w=np.where(np.abs(stored - run.w) <= bounds["v_mem"], stored, run.w))
    after = {
        short: taken(getattr(run, short), bounds[name], eq.levels, own[name].astype(np.float64), float(info.eps) / 2)
        for short, name in (("e", "i_exc"), ("n", "i_inh"), ("w", "v_mem"))
    }
    return replace(run, eq=eq, **after)


def follow(spec: Any, x: Array, spikes: Array | None = None) -> Run:
    """The equations on their own from the initial state, by their own spikes or by those given. x: float64 [T, ...].

    Raises:
        OracleError: as `rerun`.
    """
    numbers = _numbers(spec)
    e = n = fired = np.zeros(x.shape[1:])
    steps = []
    for t, x_t in enumerate(x):
        eq = numbers["eq"]
        steps.append(_advance(spec, numbers, x_t, e, n, fired))
        steps[-1].update({name: eq.rounded(steps[-1][name]) for name in ("e", "n", "w")})
        e, n, w = (steps[-1][name] for name in ("e", "n", "w"))
        fired = eq.resetting(w, None if spikes is None else spikes[t])
        steps[-1]["spikes"] = eq.emitted(w) if spikes is None else spikes[t]
    series: dict[str, Any] = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    return Run(**numbers, **series)


def gradients(
    spec: Any,
    recording: Any,
    grad_output: Array,
    sum_to: Callable[[Array, tuple[int, ...]], Array],
    feedback: Feedback | None = None,
) -> dict[str, Array]:
    """As `oracle.gradients`: of `x`, and of the raw parameters by name."""
    run = rerun(spec, recording)
    eq, names = run.eq, ("k", "a_s", "a", "theta", "g")
    total = {name: np.zeros(run.x.shape[1:]) for name in names}
    grad_x, l_e, l_n = np.zeros_like(run.x), np.zeros(run.x.shape[1:]), np.zeros(run.x.shape[1:])
    back = np.zeros(run.x.shape[1:])
    for t in range(len(run.x) - 1, -1, -1):
        e, n, r, q = run.e_before[t], run.n_before[t], run.r[t], run.q[t]
        grad = grad_output[t] + back
        at_w = eq.g * grad * eq.surrogate(run.w[t])
        if eq.inhibited:
            at_w = at_w * winner(run.w[t] - eq.theta)
        else:
            total["g"] += grad * run.spikes[t]
        total["theta"] -= (at_w if spec.threshold_gradient else 0.0) + r * l_e
        at_m = q * at_w
        at_e, at_n = q * l_e + run.k * at_m, run.kept[t] * l_n + run.k * at_m
        total["k"] += (run.a_s * e + run.a * n) * at_m
        total["a_s"] += e * at_e
        total["a"] += n * at_n
        grad_x[t] = at_e - at_n
        if feedback is not None:
            back = feedback(t, grad_x[t])
        l_e, l_n = run.a_s * at_e, run.a * at_n + r * at_w
    log_s, log_a = np.log(run.a_s), np.log(run.a)
    squared = (log_a - log_s) ** 2
    by_name = {
        "syn_decay": total["a_s"] + total["k"] * log_a / squared / run.a_s,
        "mem_decay": total["a"] - total["k"] * log_s / squared / run.a,
        "threshold": total["theta"],
        "spike_scale": total["g"],
        "reset_value": np.zeros_like(l_e),
    }
    found = {"x": grad_x}
    for name, parameter in spec.parameters.items():
        slope = RAW[parameter.raw].slope(parameter.value.astype(np.float64), spec.dt)
        found[name] = np.asarray(sum_to(by_name[name], parameter.value.shape) * slope)
    return found
