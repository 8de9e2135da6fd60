"""The float64 reference of the leaky integrate-and-fire family, forward and hand-derived backward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracetorch.oracle.equations import Equations
from tracetorch.oracle.raw import Array


@dataclass(frozen=True)
class Step:
    """One step (or many independent ones): synapse i, tested membrane w, residual reset r, spikes s, membrane v."""

    i: Array
    w: Array
    r: Array
    s: Array
    v: Array


def advance(eq: Equations, x: Array, i: Array, v: Array, spikes: Array | None = None) -> Step:
    """One time step from the state (i, v): the equations of `oracle.equations`, line by line.

    With `spikes` given, those are taken instead of the oracle's own decision, as a subject took them.
    """
    reset = eq.choices.reset
    i = x if eq.a_s is None else eq.a_s * (i + x)
    r = eq.count(v) if eq.residual else np.zeros_like(v)
    if eq.residual and reset == "value":
        v = (1 - r) * v
    w = eq.a * v + eq.b * i + eq.c
    if eq.residual and reset == "subtract":
        w = w - r * eq.rho
    s = eq.count(w) if spikes is None else spikes
    if reset == "subtract":
        v = w - (s - r) * eq.rho
    elif reset == "value":
        v = w - (s - r) * w if eq.residual else np.where(s > 0, eq.v_reset, w)
    elif reset == "add_value":
        v = w * (s == 0) + eq.v_reset
    else:
        v = w
    if eq.v_min is not None:
        v = np.maximum(v, eq.v_min)
    return Step(i, w, r, s, v)


@dataclass(frozen=True)
class Trace:
    """A run over time, each [T, ...]: inputs, the state *before* each step, and the step."""

    x: Array
    i_before: Array
    v_before: Array
    step: Step


def run(eq: Equations, x: Array) -> Trace:
    """The oracle on its own from the zero state. x: float64 [T, ...]."""
    i = v = np.zeros(x.shape[1:])
    before, steps = [], []
    for x_t in x:
        before.append((i, v))
        steps.append(advance(eq, x_t, i, v))
        i, v = steps[-1].i, steps[-1].v
    columns = [np.stack([getattr(step, name) for step in steps]) for name in ("i", "w", "r", "s", "v")]
    return Trace(x, np.stack([b[0] for b in before]), np.stack([b[1] for b in before]), Step(*columns))


def backward(eq: Equations, trace: Trace, grad_output: Array) -> dict[str, Array]:
    """Gradients along a trajectory, the adjoint of `advance` with the surrogate in the place of ds/dw. Derived by hand.

    Writing l for dL/dv after the step, k for dL/dw, e for dL/ds, sg for the surrogate at w:

        v = w - (s-r)*rho:   e = g*G - l*rho (attached) or g*G (detached);  k = l + e*sg;  dL/drho -= l*(s-r)
        v = s ? v_reset : w: e = g*G + l*(v_reset - w) or g*G;              k = l*(1-s) + e*sg
        residual:            w = a*v + b*i + c - r*rho:  dL/drho -= k*r;  r carries no gradient
        w = a*v + b*i + c:   dL/dv = a*k, dL/da += k*v, dL/di = b*k, dL/db += k*i, dL/dc += k
        rho = theta / a:     a*v is a*w_before - theta*s_before, so there dL/da += k*w_before and dL/dtheta_pending -=
                             k*s_before, in the place of the way through rho (nothing of it where v was clamped)
        theta:               dL/dtheta -= e*sg, if the surrogate reaches it

    Args:
        grad_output: G, dL/doutput, [T, ...].

    Returns:
        Element-wise gradients, not yet summed to the parameters' shapes: `x` [T, ...] and, [...] each, `a`, `a_s`, `b`,
        `c`, `theta`, `rho`, `pending`, `v_reset`, `v_min`, `g`.
    """
    choices, attached = eq.choices, eq.choices.reset_gradient == "attached"
    names = ("a", "a_s", "b", "c", "theta", "rho", "pending", "v_reset", "v_min", "g")
    total = {name: np.zeros(trace.x.shape[1:]) for name in names}
    grad_x = np.zeros_like(trace.x)
    l = np.zeros(trace.x.shape[1:])  # noqa: E741 - the notation above
    l_i = np.zeros(trace.x.shape[1:])
    for t in range(len(trace.x) - 1, -1, -1):
        v_before, i_before = trace.v_before[t], trace.i_before[t]
        i, w, r, s = trace.step.i[t], trace.step.w[t], trace.step.r[t], trace.step.s[t]
        grad = grad_output[t]
        if eq.v_min is not None:
            free = advance(eq, trace.x[t], i_before, v_before, s).v > eq.v_min
            total["v_min"] += l * ~free
            l = l * free  # noqa: E741
        if choices.output == "membrane":
            k = l + grad
        else:
            e = eq.g * grad
            total["g"] += grad * s
            if choices.reset == "subtract":
                e = e - l * eq.rho if attached else e
                total["rho"] -= l * (s - r)
                k = l
            elif choices.reset == "value" and eq.residual:
                e = e - l * w
                k = l * (1 - (s - r))
            elif choices.reset == "value":
                e = e + l * (eq.v_reset - w) if attached else e
                total["v_reset"] += l * (s > 0)
                k = l * (s == 0)
            elif choices.reset == "add_value":
                total["v_reset"] += l
                k = l * (s == 0)
            else:
                k = l
            through = e * eq.surrogate(w)
            k = k + through
            if choices.threshold_gradient:
                total["theta"] -= through
        if eq.residual and choices.reset == "subtract":
            total["rho"] -= k * r
        kept = (1 - r) * v_before if eq.residual and choices.reset == "value" else v_before
        if eq.divided and t > 0:
            w_before, s_before = trace.step.w[t - 1], trace.step.s[t - 1]
            free = np.ones_like(w) if eq.v_min is None else (w_before - s_before * eq.rho > eq.v_min) * 1.0
            kept = np.where(free, w_before, kept)
            total["pending"] -= k * s_before * free
        total["a"] += k * kept
        total["b"] += k * i
        total["c"] += k
        l = eq.a * k * ((1 - r) if eq.residual and choices.reset == "value" else 1.0)  # noqa: E741
        if eq.a_s is None:
            grad_x[t] = eq.b * k
        else:
            l_i = l_i + eq.b * k
            total["a_s"] += l_i * (i_before + trace.x[t])
            l_i = eq.a_s * l_i
            grad_x[t] = l_i
    return {"x": grad_x, **total}
