"""How far a gradient of the leaky integrate-and-fire family that is computed in floating point may be off.

The backward pass is a linear recursion, l before = J l after + its share of G, whose J is the product of a decay with
p + q*sg, the way through the kept membrane and through the spike of the reset (see `oracle.lif.backward`: p = 1 and
q = -rho for a subtraction, p = (s == 0) and q = v_reset - w for a reset to a value). With an attached reset and a
surrogate that is large everywhere, |J| may be above 1: gradients then grow over time, and so does every error in them;
and what grows may cancel in a sum. So an error bound E runs beside the recursion:

    E before = |J| E after + C e (sum of the magnitudes of the terms of J l + G) + |dJ| |l|

The errors are carried by |J| itself, in which what cancels has cancelled, not by its terms: a bound of them would grow
where the gradient does not. e is the unit roundoff, C = 8 as for the membrane (`oracle.rounding`), |dJ| what J is off
because the subject's w is off by its own rounding bound: the difference of the surrogate at both ends of it, which at
a jump of the surrogate is the whole jump. A parameter's gradient is a sum of n such terms over time and neurons: it
adds e sqrt(n) of the sum of their magnitudes (roundings of either sign, in whatever order they are added) to what its
terms are off. Frameworks that reset by (g*s) / g also send the reset's gradient through g twice, in terms that cancel:
they are among the magnitudes of the gradient of g.

Where a magnitude leaves the range of the dtype, the bound is infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tracetorch.oracle.equations import Equations
from tracetorch.oracle.lif import Adjoints, Step, Trace, advance
from tracetorch.oracle.raw import Array

ROUNDINGS = 8


@dataclass(frozen=True)
class Precision:
    """Of a dtype: unit roundoff, a few of its smallest subnormals, and the magnitude from which it may overflow."""

    e: float
    tiny: float
    largest: float

    @classmethod
    def of(cls, dtype: Any) -> Precision:
        """That of a NumPy dtype."""
        info = np.finfo(dtype)
        return cls(float(info.eps) / 2, 16 * float(info.smallest_subnormal), float(info.max) / 64)


@dataclass(frozen=True)
class Slack:
    """What a subject's numbers may be off in every step, [T, ...]: the tested membrane, the kept one, the current."""

    w: Array
    v: Array
    i: Array


@dataclass(frozen=True)
class Errors:
    """Element-wise, by the names of `oracle.lif.backward`: errors, and the sums of the magnitudes of all terms."""

    error: dict[str, Array]
    size: dict[str, Array]


@dataclass(frozen=True)
class _Reset:
    """The way of one step's gradient through the reset: p, q, the magnitudes of q's terms, and what q is off."""

    p: Array
    q: Array
    q_size: Array
    q_error: Array


@dataclass(frozen=True)
class _Theta:
    """The way of one step's gradient to an adapting threshold: see `_Run._spikes`."""

    s: Array
    q: Array
    slope: Array
    size: Array
    local: Array
    terms: Array


def _through_reset(eq: Equations, at: Step, slack: Array, e: float) -> _Reset:
    choices, nothing = eq.choices, np.zeros_like(at.w)
    attached = choices.reset_gradient != "detached"
    if choices.reset == "subtract":
        rho = np.broadcast_to(eq.rho, at.w.shape) if attached else nothing
        return _Reset(nothing + 1, -rho, np.abs(rho), 4 * e * np.abs(rho))
    if choices.reset == "value" and eq.residual:
        size = np.abs(at.w) * attached
        return _Reset(1 - (at.s - at.r), -at.w * attached, size, (slack + e * size) * attached)
    if choices.reset == "value":
        left = 1 - at.s if choices.spike_count == "smooth" else (at.s == 0) * 1.0
        p = nothing + 1 if choices.reset_gradient == "membrane_stopped" else left
        size = (np.abs(eq.v_reset) + np.abs(at.w)) * attached
        return _Reset(p, (eq.v_reset - at.w) * attached, size, (slack + 2 * e * size) * attached)
    if choices.reset == "add_value":
        return _Reset((at.s == 0) * 1.0, nothing, nothing, nothing)
    return _Reset(nothing + 1, nothing, nothing, nothing)


def surrogate_error(eq: Equations, w: Array, slack: Array, e: float) -> Array:
    """What the surrogate at w is off for a w within `slack`, with its own roundings."""
    middle = eq.surrogate(w)
    reach = slack + ROUNDINGS * e * np.abs(w - eq.theta) + 4 * e * np.abs(w) * (slack > 0)
    ends = [np.abs(eq.surrogate(w + side) - middle) for side in (-reach, reach)]
    return np.asarray(np.maximum(*ends) + 16 * e * np.abs(middle))


def errors(
    eq: Equations, trace: Trace, met: Adjoints, slack: Slack, dtype: Any, feedback: Callable[[int, Array], Array] | None
) -> Errors:
    """The bounds of what `backward` returns.

    Args:
        met: as `backward` filled it in.
        dtype: in which the subject computed its gradients.
        feedback: as that of `backward`, of magnitudes.
    """
    run = _Run(eq, trace, met, slack, Precision.of(dtype))
    back = np.zeros(trace.x.shape[1:])
    for t in range(len(trace.x) - 1, -1, -1):
        run.step(t, back)
        if feedback is not None:
            back = feedback(t, run.error["x"][t])
    return Errors(run.error, run.size)


class _Run:
    """The recursion of the module; `v`, `n` and `i` are the errors of dL/dv, dL/dn and dL/di after a step.

    `joint` is the covariance of the first two, where a threshold adapts.
    """

    def __init__(self, eq: Equations, trace: Trace, met: Adjoints, slack: Slack, precision: Precision) -> None:
        self.eq, self.trace, self.met, self.slack, self.precision = eq, trace, met, slack, precision
        self.v = self.n = self.i = self.joint = np.zeros(trace.x.shape[1:])
        names = ("a", "a_s", "b", "c", "theta", "rho", "pending", "v_reset", "v_min", "g", "adapt_decay", "adapt_scale")
        self.error = {name: np.zeros(trace.x.shape[1:]) for name in names}
        self.size = {name: np.zeros(trace.x.shape[1:]) for name in names}
        self.error["x"] = self.size["x"] = np.zeros_like(trace.x)

    def add(self, name: str, factor: Any, error: Array, size: Array) -> None:
        """A term `factor` times a number of that error and magnitude."""
        factor = np.abs(factor)
        self.error[name] += factor * (error + ROUNDINGS * self.precision.e * size)
        self.size[name] += factor * size

    def bounded(self, error: Array, size: Array) -> Array:
        """An error with what the roundings of that magnitude add; infinite beyond the dtype's range."""
        found = error + ROUNDINGS * self.precision.e * size + self.precision.tiny * (size > 0)  # 0 stays 0
        return np.where(np.isnan(found) | ~(size + error < self.precision.largest), np.inf, found)

    def step(self, t: int, back: Array) -> None:
        """One step back; `back`: the error of what came through a feedback."""
        eq, trace, of_step = self.eq, self.trace, self.eq.at(t)
        at = Step(*(getattr(trace.step, name)[t] for name in ("i", "j", "w", "r", "s", "v")))
        l, grad, k = self.met.v[t], self.met.output[t], self.met.w[t]  # noqa: E741 - as in `backward`
        if eq.v_min is not None:
            l = self._clamp(t, at, l)  # noqa: E741
        if eq.choices.output == "membrane":
            error_k = self.bounded(self.v + back, np.abs(l) + np.abs(grad))
        else:
            error_k = self._spikes(t, of_step, at, l, grad, back)
        held, size = trace.held[t], np.abs(k)
        error = np.where(held | ((at.r > 0) if eq.discards else False), 0.0, error_k)
        if eq.u_min is not None:
            raw = eq.a * trace.v_before[t] + eq.b * at.j + eq.c
            unsure = np.abs(raw - eq.u_min) <= self.slack.w[t]
            error = np.where(unsure, error + size, np.where(raw > eq.u_min, error, 0.0))
        if eq.residual and eq.choices.reset == "subtract":
            self.add("rho", at.r, error, size)
        whole = eq.residual and eq.choices.reset == "value" and not eq.discards
        passed = (1 - at.r) if whole else np.ones(())
        self._membrane(t, at, passed, size, error)
        e, decay = self.precision.e, np.abs(eq.a * passed)
        through = decay * error + e * eq.a_error * eq.a_size * size
        by_change = error_k - self.v if eq.choices.spike_test == "change" else np.zeros(())
        self.v = np.where(held, error_k, self.bounded(through, eq.a_size * np.abs(passed) * size)) + by_change
        self.joint = self.joint * np.where(held, 1.0, eq.a * passed)
        gain = np.abs(eq.resistance) * eq.a_size if eq.choices.input_gain.startswith("one_minus_decay") else 0.0
        drive = np.abs(eq.b) * error + e * eq.a_error * gain * size
        self._synapse(t, self.bounded(drive, (np.abs(eq.b) + gain) * size), np.abs(eq.b) * size)

    def _clamp(self, t: int, at: Step, l: Array) -> Array:  # noqa: E741
        """dL/dv before the clamp: where that is within the bound of v_min, either way may have been taken."""
        trace, low = self.trace, self.eq.v_min
        assert low is not None
        unclamped = replace(self.eq.at(t), v_min=None)
        v = advance(unclamped, trace.x[t], trace.i_before[t], trace.v_before[t], at.s, trace.held[t]).v
        free, unsure = v > low, np.abs(v - low) <= self.slack.v[t]
        error = np.where(unsure, self.v + np.abs(l), self.v)
        self.add("v_min", (~free | unsure) * 1.0, error, np.abs(l))
        self.v = np.where(free | unsure, error, 0.0)
        self.joint = np.where(free | unsure, self.joint, 0.0)
        return l * free

    def _spikes(self, t: int, eq: Equations, at: Step, l: Array, grad: Array, back: Array) -> Array:  # noqa: E741
        """The error of dL/dw; that of dL/dn is carried on."""
        e, adaptation, attached = self.precision.e, eq.adaptation, eq.choices.reset_gradient != "detached"
        test = eq.tested(at.w, self.trace.v_before[t])
        reset, slope = _through_reset(eq, at, self.slack.w[t], e), eq.surrogate(test)
        off = surrogate_error(eq, test, self.slack.w[t], e)
        rise = np.zeros(()) if adaptation is None else 1 - adaptation.decay
        l_n, size_l, size_s = self.met.n[t], np.abs(l), np.abs(slope)
        value = eq.g * grad + reset.q * l + rise * l_n
        terms = np.abs(eq.g * grad) + reset.q_size * size_l + np.abs(rise * l_n)
        beside = np.abs(eq.g) * back + reset.q_error * size_l
        error_e = np.abs(reset.q) * self.v + beside + np.abs(rise) * self.n + ROUNDINGS * e * terms
        unsure = off * (np.abs(value) + error_e)
        of_test = size_s * error_e + unsure if eq.choices.threshold_gradient else np.zeros_like(l)
        self.add("theta", np.ones(()), of_test, terms * size_s * eq.choices.threshold_gradient)
        self.add("g", at.s, back, np.abs(grad))
        if eq.choices.reset != "none" and attached:
            self.add("g", at.s / np.where(eq.g == 0, 1.0, eq.g), np.zeros_like(l), 2 * reset.q_size * size_l)
        if eq.choices.reset == "subtract":
            self.add("rho", at.s - at.r, self.v, size_l)
        elif eq.choices.reset in ("value", "add_value"):
            once = at.s if eq.choices.spike_count == "smooth" else (at.s > 0) * 1.0
            self.add("v_reset", once if eq.choices.reset == "value" else np.ones(()), self.v, size_l)
        of_l, local = reset.p + reset.q * slope, size_s * beside + unsure
        if adaptation is None:
            return self.bounded(np.abs(of_l) * self.v + local, np.abs(reset.p) * size_l + terms * size_s)
        way = _Theta(at.s, reset.q, slope, size_l, size_s * beside + unsure, terms)
        error, self.joint, self.n = self._adaptation(t, eq, way, of_l, slope * rise)
        return self.bounded(np.hypot(error, local), np.abs(reset.p) * size_l + terms * size_s)

    def _adaptation(self, t: int, eq: Equations, way: _Theta, of_l: Array, of_n: Array) -> tuple[Array, Array, Array]:
        """What dL/dw = of_l*dL/dv + of_n*dL/dn is off by these two, its covariance with dL/dn before, and that.

        dL/dn goes round to itself by way of the spikes of the reset, and with the sign that keeps it from growing. So
        the two errors are carried with their covariance, as those of independent roundings.
        """
        adaptation = eq.adaptation
        taken = eq.choices.reset == "subtract" and eq.choices.reset_amount == "threshold"
        tested = way.slope * eq.choices.threshold_gradient
        theta_l, theta_n = -way.s * taken - way.q * tested, -(1 - adaptation.decay) * tested
        size = np.abs(way.s) * taken * way.size + way.terms * np.abs(tested)
        l_n, before, scale = np.abs(self.met.n[t]), adaptation.before[t], np.abs(adaptation.scale)
        self.add("adapt_scale", before, np.abs(theta_l) * self.v + np.abs(theta_n) * self.n + way.local, size)
        self.add("adapt_decay", np.abs(before) + np.abs(way.s), self.n, l_n)
        n_l, n_n = adaptation.scale * theta_l, adaptation.decay + adaptation.scale * theta_n
        v, n, joint = self.v**2, self.n**2, self.joint
        of_k = of_l**2 * v + 2 * of_l * of_n * joint + of_n**2 * n
        own = n_l**2 * v + 2 * n_l * n_n * joint + n_n**2 * n
        both = of_l * n_l * v + (of_l * n_n + of_n * n_l) * joint + of_n * n_n * n
        local = scale * way.local + self.precision.e * adaptation.decay_error * l_n
        rounded = self.bounded(local, np.abs(adaptation.decay) * l_n + scale * size)
        return np.sqrt(np.maximum(of_k, 0.0)), both, np.hypot(np.sqrt(np.maximum(own, 0.0)), rounded)

    def _membrane(self, t: int, at: Step, passed: Array, size_k: Array, error: Array) -> None:
        """a, b and c: dL/dw times what they multiply, which is off itself. (Where held, terms of that size cancel.)"""
        eq, trace = self.eq, self.trace
        kept: Array = np.abs(passed * trace.v_before[t])
        size: Array = kept
        if t > 0:
            w, s = np.abs(trace.step.w[t - 1]), np.abs(trace.step.s[t - 1])
            size = np.asarray(size + w + (np.abs(eq.at(t - 1).rho) * s if eq.choices.reset == "subtract" else 0.0))
            if eq.divided:
                kept = np.maximum(kept, w)
                self.add("pending", s, error, size_k)
        self.error["a"] += kept * error
        self.add("a", size, np.zeros_like(error), size_k)
        self.add("b", at.j, error, size_k)
        self.error["b"] += self.slack.i[t] * size_k
        self.add("c", np.ones(()), error, size_k)

    def _synapse(self, t: int, error_j: Array, size_j: Array) -> None:
        eq, trace, l_i = self.eq, self.trace, np.abs(self.met.i[t])
        if eq.a_s is None:
            self.error["x"][t] = error_j
            return
        a_s, i, x = np.abs(eq.a_s), np.abs(trace.i_before[t]), np.abs(trace.x[t])
        computed = self.precision.e * eq.a_s_error
        if eq.choices.synapse == "read_then_decay":
            self.add("a_s", i + x, self.i, l_i)
            both = self.bounded(error_j + a_s * self.i + computed * a_s * l_i, size_j + a_s * l_i)
            self.error["x"][t] = self.i = both
            return
        error, size = self.bounded(self.i + error_j, l_i + size_j), l_i + size_j
        self.add("a_s", i if eq.choices.synapse == "decay_then_add" else i + x, error, size)
        factor: dict[str, Any] = {"decay_then_add": 1.0, "add_then_decay": a_s, "moving_average": np.abs(1 - eq.a_s)}
        drive = factor[eq.choices.synapse]
        self.error["x"][t] = self.bounded(drive * error + computed * a_s * size, drive * size)
        self.i = self.bounded(a_s * error + computed * a_s * size, a_s * size)


def convolution_errors(eq: Equations, trace: Trace, at_w: Array, dtype: Any) -> dict[str, Array]:
    """What the gradients of a subject that sums a kernel over its whole past are off beside `errors`.

    It sums T products per gradient of an input, and T^2 per one of the decay, at the size of the sums of their
    magnitudes; its kernel is off as `oracle.rounding.convolution_bound` says.

    Args:
        at_w: dL/dw of every step, [T, ...].
    """
    unit = Precision.of(dtype).e * (4 * len(trace.x) + 32)
    back: Array = np.zeros(trace.x.shape[1:])
    of_x = np.zeros_like(trace.x)
    for t in range(len(trace.x) - 1, -1, -1):
        of_x[t] = back = np.abs(eq.a) * back + np.abs(at_w[t])
    size: Array = np.zeros(trace.x.shape[1:])  # sum of a^k |x[t-k]|
    rise = of_a = size  # its derivative with respect to a
    for t, x in enumerate(trace.x):
        rise, size = np.asarray(np.abs(eq.a) * rise + size), np.asarray(np.abs(eq.a) * size + np.abs(x))
        of_a = of_a + np.abs(at_w[t]) * rise
    return {"x": unit * of_x, "a": unit * of_a}
