"""The float64 reference of the leaky integrate-and-fire family, forward and hand-derived backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tracetorch.oracle.equations import Equations
from tracetorch.oracle.raw import Array
from tracetorch.oracle.winner import winner

Feedback: TypeAlias = Callable[[int, Array], Array]


@dataclass(frozen=True)
class Step:
    """One step (or many independent ones).

    Attributes:
        i: the synaptic current that is kept; x without a synapse.
        j: the drive of the membrane.
        w: the membrane of the spike test.
        r: the residual reset.
        s: spikes that reset; those that are emitted, but for inhibited neurons (`Equations.resetting`).
        v: the membrane after its reset.
    """

    i: Array
    j: Array
    w: Array
    r: Array
    s: Array
    v: Array


def advance(
    eq: Equations, x: Array, i: Array, v: Array, spikes: Array | None = None, held: NDArray[np.bool_] | None = None
) -> Step:
    """One time step from the state (i, v): the equations of `oracle.equations`, line by line.

    With `spikes` given, those are taken instead of the oracle's own decision, as a subject took them. `held`: where the
    membrane is held.
    """
    j, i = eq.synapse(x, i)
    r = eq.count(v) if eq.residual else np.zeros_like(v)
    if eq.residual and eq.choices.reset == "value" and not eq.discards:
        v = (1 - r) * v
    w = eq.a * v + eq.b * j + eq.c
    if eq.residual and eq.choices.reset == "subtract":
        w = w - r * eq.rho
    if eq.discards:
        w = (1 - r) * w
    if held is not None:
        w = np.where(held, v, w)
    if eq.u_min is not None:
        w = np.maximum(w, eq.u_min)
    w, i = eq.rounded(w), i if eq.a_s is None else eq.rounded(i)
    s = eq.resetting(eq.tested(w, v), spikes)
    return Step(i, j, w, r, s, after(eq, w, r, s))


def after(eq: Equations, w: Array, r: Array, s: Array) -> Array:
    """The membrane after its reset."""
    reset = eq.choices.reset
    if reset == "subtract":
        v = w - (s - r) * eq.rho
    elif reset == "value":
        v = w - (s - r) * w if eq.residual else eq.to_value(w, s)
    elif reset == "add_value":
        v = w * (s == 0) + eq.v_reset
    else:
        v = w
    if eq.v_min is not None:
        v = np.maximum(v, eq.v_min)
    return np.asarray(v)


@dataclass(frozen=True)
class Trace:
    """A run over time, each [T, ...]: inputs, the state *before* each step, where it was held, and the step."""

    x: Array
    i_before: Array
    v_before: Array
    step: Step
    held: Any


def run(eq: Equations, x: Array, spikes: Array | None = None) -> Trace:
    """The oracle on its own from the initial state. x: float64 [T, ...]; `spikes`: those that it follows."""
    i = np.zeros(x.shape[1:])
    v = np.broadcast_to(eq.v_first, x.shape[1:]).astype(np.float64)
    last = np.full(x.shape[1:], -1)
    before, steps, held = [], [], []
    for t, x_t in enumerate(x):
        before.append((i, v))
        held.append(eq.held_in(t, last))
        steps.append(advance(eq.at(t), x_t, i, v, None if spikes is None else spikes[t], held[-1]))
        i, v = steps[-1].i, steps[-1].v
        last = np.where(steps[-1].s > 0, t, last)
    columns = [np.stack([getattr(step, name) for step in steps]) for name in ("i", "j", "w", "r", "s", "v")]
    first = (np.stack([b[0] for b in before]), np.stack([b[1] for b in before]))
    return Trace(x, *first, Step(*columns), np.stack(held))


def _through_reset(eq: Equations, at: Step, l: Array, e: Array, total: dict[str, Array]) -> tuple[Array, Array]:  # noqa: E741
    """(k, e): dL/dw by way of the kept membrane, and dL/ds with the way through the reset; of one step."""
    choices, attached = eq.choices, eq.choices.reset_gradient != "detached"
    w, r, s = at.w, at.r, at.s
    if choices.reset == "subtract":
        total["rho"] -= l * (s - r)
        return l, e - l * eq.rho if attached else e
    if choices.reset == "value" and eq.residual:
        return l * (1 - (s - r)), e - l * w if attached else e
    if choices.reset == "value":
        once, left = (s, 1 - s) if choices.spike_count == "smooth" else (s > 0, s == 0)
        total["v_reset"] += l * once
        kept = l if choices.reset_gradient == "membrane_stopped" else l * left
        return kept, e + l * (eq.v_reset - w) if attached else e
    if choices.reset == "add_value":
        total["v_reset"] += l
        return l * (s == 0), e
    return l, e


def _through_spikes(
    eq: Equations, t: int, at: Step, v: Array, grad_v: Array, l_n: Array, grad: Array, total: dict[str, Array]
) -> tuple[Array, Array]:
    """(k, l_n): dL/dw, and dL/dn of an adaptation before the step; from dL/dv and dL/dn after it, and G. v: before."""
    of_step, adaptation, rho_so_far = eq.at(t), eq.adaptation, total["rho"].copy()
    if not eq.inhibited:
        total["g"] += grad * at.s
    k, e = _through_reset(of_step, at, grad_v, eq.g * grad, total)
    if adaptation is not None:
        e = e + (1 - adaptation.decay) * l_n
    test = of_step.tested(at.w, v)
    through = e * of_step.surrogate(test)
    if eq.inhibited:
        through = through * winner(test - of_step.theta)
    by_test = through if eq.choices.threshold_gradient else np.zeros_like(through)
    total["theta"] -= by_test
    if adaptation is not None:
        by_reset = total["rho"] - rho_so_far if eq.choices.reset_amount == "threshold" else 0.0
        l_n = adaptation.backward(t, by_reset - by_test, l_n, at.s, total)
    return k + (through * np.sign(at.w - v) if eq.choices.spike_test == "change" else through), l_n


def _through_synapse(
    eq: Equations, grad_j: Array, l_i: Array, x: Array, i: Array, total: dict[str, Array]
) -> tuple[Array, Array]:
    """(dL/dx, dL/di before the step), from dL/dj and dL/di after it; x and i before the step."""
    if eq.a_s is None:
        return grad_j, l_i
    kind, a_s = eq.choices.synapse, eq.a_s
    if kind == "read_then_decay":
        total["a_s"] += l_i * (i + x)
        both = grad_j + a_s * l_i
        return both, both
    l_i = l_i + grad_j
    if kind == "add_then_decay":
        total["a_s"] += l_i * (i + x)
        return a_s * l_i, a_s * l_i
    if kind == "moving_average":
        total["a_s"] += l_i * (i - x)
        return (1 - a_s) * l_i, a_s * l_i
    total["a_s"] += l_i * i
    return l_i, a_s * l_i


@dataclass
class Adjoints:
    """What `backward` meets in every step, each [T, ...]: dL/dv and dL/dn after it (v before its clamp), dL/di, dL/dw.

    Attributes:
        output: G, with what came back through a feedback.
    """

    v: Array
    n: Array
    i: Array
    w: Array
    output: Array


def backward(
    eq: Equations, trace: Trace, grad_output: Array, met: Adjoints | None = None, feedback: Feedback | None = None
) -> dict[str, Array]:
    """Gradients along a trajectory, the adjoint of `advance` with the surrogate in the place of ds/dw. Derived by hand.

    Writing l for dL/dv after the step, k for dL/dw, e for dL/ds, sg for the surrogate at w:

        v = w - (s-r)*rho:   e = g*G - l*rho (attached) or g*G (detached);  k = l + e*sg;  dL/drho -= l*(s-r)
        v = s ? v_reset : w: e = g*G + l*(v_reset - w) or g*G;              k = l*(1-s) + e*sg;  dL/dv_reset += l*s
                             with the membrane of the reset stopped, k = l + e*sg
        residual:            w = a*v + b*j + c - r*rho:  dL/drho -= k*r;  r carries no gradient
        w = a*v + b*j + c:   dL/dv = a*k, dL/da += k*v, dL/dj = b*k, dL/db += k*j, dL/dc += k
        held, w = v:         dL/dv = k, and nothing else
        rho = theta / a:     a*v is a*w_before - theta*s_before, so there dL/da += k*w_before and dL/dtheta_pending -=
                             k*s_before, in the place of the way through rho (nothing of it where v was clamped)
        theta:               dL/dtheta -= e*sg, if the surrogate reaches it
        s = count(abs(w - v)): sg at abs(w - v), times sign(w - v) in k, and the negative of that in dL/dv
        w = max(w, u_min):   k is dL/du_min where w is u_min, and nothing else
        one winner:          sg is 0 for the others
        w, i rounded:        as if they were not
        theta = threshold + A*n, n = a_n*n + (1-a_n)*s, l_n for dL/dn after the step: e += (1-a_n)*l_n;  dL/dA +=
                             n*dL/dtheta;  dL/da_n += l_n*(n - s), n before;  l_n = a_n*l_n + A*dL/dtheta
        synapse, l_i for dL/di after the step:
          j = i = a_s*i + x:           l_i += dL/dj;  dL/dx = l_i;          dL/da_s += l_i*i;      l_i = a_s*l_i
          j = i = a_s*(i + x):         l_i += dL/dj;  dL/dx = a_s*l_i;      dL/da_s += l_i*(i+x);  l_i = a_s*l_i
          j = i = a_s*i + (1-a_s)*x:   l_i += dL/dj;  dL/dx = (1-a_s)*l_i;  dL/da_s += l_i*(i-x);  l_i = a_s*l_i
          j = i + x, i = a_s*j:        dL/da_s += l_i*(i+x);  dL/dx = dL/dj + a_s*l_i = l_i before

    Args:
        grad_output: G, dL/doutput, [T, ...].
        met: filled in.
        feedback: of a recurrent layer, (t, dL/dx of step t) -> what dL/doutput of step t - 1 gets of it.

    Returns:
        Element-wise gradients, not yet summed to the parameters' shapes: `x` [T, ...] and, [...] each, `a`, `a_s`, `b`,
        `c`, `theta`, `rho`, `pending`, `v_reset`, `v_min`, `g`, `adapt_decay`, `adapt_scale`.
    """
    names = ("a", "a_s", "b", "c", "theta", "rho", "pending", "v_reset", "v_min", "g", "adapt_decay", "adapt_scale")
    total = {name: np.zeros(trace.x.shape[1:]) for name in names}
    grad_x = np.zeros_like(trace.x)
    l = l_i = l_n = fed_back = np.zeros(trace.x.shape[1:])  # noqa: E741 - the notation above
    for t in range(len(trace.x) - 1, -1, -1):
        at = Step(*(getattr(trace.step, name)[t] for name in ("i", "j", "w", "r", "s", "v")))
        v_before, i_before, held = trace.v_before[t], trace.i_before[t], trace.held[t]
        grad = grad_output[t] + fed_back
        if met is not None:
            met.v[t], met.n[t], met.i[t], met.output[t] = l, l_n, l_i, grad
        if eq.v_min is not None:
            free = advance(eq.at(t), trace.x[t], i_before, v_before, at.s, held).v > eq.v_min
            total["v_min"] += l * ~free
            l = l * free  # noqa: E741
        if eq.choices.output == "membrane":
            k = l + grad
        else:
            k, l_n = _through_spikes(eq, t, at, v_before, l, l_n, grad, total)
        if met is not None:
            met.w[t] = k
        moved = k * ~held * (1 - at.r if eq.discards else 1.0)
        if eq.u_min is not None:
            total["v_min"] += moved * (at.w <= eq.u_min)
            moved = moved * (at.w > eq.u_min)
        if eq.residual and eq.choices.reset == "subtract":
            total["rho"] -= moved * at.r
        whole = eq.residual and eq.choices.reset == "value" and not eq.discards
        passed = (1 - at.r) if whole else np.ones(())
        kept = passed * v_before
        if eq.divided and t > 0:
            w_before, s_before = trace.step.w[t - 1], trace.step.s[t - 1]
            unclamped = np.ones_like(at.w) if eq.v_min is None else (w_before - s_before * eq.rho > eq.v_min) * 1.0
            kept = np.where(unclamped, w_before, kept)
            total["pending"] -= moved * s_before * unclamped
        total["a"] += moved * kept
        total["b"] += moved * at.j
        total["c"] += moved
        by_change = l - k
        l = np.where(held, k, eq.a * moved * passed)  # noqa: E741
        if eq.choices.spike_test == "change":
            l = l + by_change  # noqa: E741
        grad_x[t], l_i = _through_synapse(eq, eq.b * moved, l_i, trace.x[t], i_before, total)
        if feedback is not None:
            fed_back = feedback(t, grad_x[t])
    return {"x": grad_x, **total}
