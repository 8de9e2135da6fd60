"""The float64 reference of the native layers, from the equations and not from their code; backward derived by hand.

One step, x to output; h is the number of branches (1, or 2 in the dual layers, `pos` and `neg`), part_b(v) is v itself
without branches, `where(v >= 0, v, 0)` in `pos` and `where(v <= 0, v, 0)` in `neg`; sums are over the branches b:

    S:    syn_b = alpha_b*syn_b + (1-alpha_b)*part_b(x);       u = sum syn_b, else u = x
    R:    rec_b = gamma_b*rec_b + (1-gamma_b)*part_b(output of the step before);      r = sum rec_b, else r = 0
          in_b  = part_b(u) + rec_weight_b*part_b(r)
          mem_b = beta_b*mem_b + in_b, EMA: beta_b*mem_b + (1-beta_b)*in_b;           m = sum mem_b
    LI:   output = m
    LIB:  s = Q(f(m - threshold + bias));                      output = s, q = s*threshold
    LITS: p = Q(f(m - pos_threshold + bias)),  n = -Q(f(-neg_threshold - m - bias))
          output = p*pos_scale + n*neg_scale (LIT: both scales 1),  q = p*pos_threshold + n*neg_threshold
          mem_b = mem_b - q/h

f(z) = sigmoid(4z). Q is the identity, or rounds to the nearest integer with the gradient passed straight through: a
spike where z > 0. With another `surrogate`, f is the smooth spike of that name, and its derivative stands for that of
the spike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracetorch.oracle.lif import Feedback
from tracetorch.oracle.raw import Array
from tracetorch.oracle.surrogates import DERIVATIVES, PRIMITIVES

Values = Mapping[str, Array]


@dataclass(frozen=True)
class Native:
    """Which layer: the letters of its name. `family` is "LI", "LIB", "LIT" or "LITS"; `hard`: Q rounds.

    `surrogate` has a name and parameters, as `tracetorch.functional.Surrogate`; None: sigmoid(4z). `inclusive`: a spike
    where z >= 0.
    """

    family: str
    dual: bool = False
    synapse: bool = False
    recurrent: bool = False
    ema: bool = False
    hard: bool = True
    surrogate: Any = None
    inclusive: bool = False

    def fires(self, z: Array) -> Array:
        """Q(f(z)): spikes of the distance z to a threshold."""
        if self.hard:
            return np.asarray(z >= 0 if self.inclusive else z > 0, dtype=np.float64)
        if self.surrogate is None:
            return np.asarray(0.5 * (1 + np.tanh(2 * z)), dtype=np.float64)
        return np.asarray(PRIMITIVES[self.surrogate.name](z, **dict(self.surrogate.parameters)), dtype=np.float64)

    def slope(self, z: Array) -> Array:
        """What stands for the derivative of the spikes."""
        if self.surrogate is None:
            smooth = 0.5 * (1 + np.tanh(2 * z))
            return np.asarray(4 * smooth * (1 - smooth), dtype=np.float64)
        values = DERIVATIVES[self.surrogate.name](z, np.ones(()), **dict(self.surrogate.parameters))
        return np.asarray(values, dtype=np.float64)

    @property
    def branches(self) -> tuple[str, ...]:
        """What stands before the names of traces and their parameters."""
        return ("pos_", "neg_") if self.dual else ("",)


@dataclass
class Tape:
    """What one step computed: `new` the states after it, and the values that the backward pass reads.

    `m` is the membrane of the spike test, `up` and `down` its spikes, down with its sign.
    """

    x: Array
    old: dict[str, Array]
    new: dict[str, Array] = field(default_factory=dict)
    u: Array = field(default_factory=lambda: np.zeros(()))
    r: Array = field(default_factory=lambda: np.zeros(()))
    inputs: dict[str, Array] = field(default_factory=dict)
    m: Array = field(default_factory=lambda: np.zeros(()))
    up: Array = field(default_factory=lambda: np.zeros(()))
    down: Array = field(default_factory=lambda: np.zeros(()))
    output: Array = field(default_factory=lambda: np.zeros(()))


def _mask(branch: str, v: Array) -> Array:
    """d part_b(v) / dv; at 0 both branches pass, as `where` does with both its conditions true."""
    passes = {"": np.ones(v.shape, dtype=bool), "pos_": v >= 0, "neg_": v <= 0}[branch]
    return passes.astype(np.float64)


def spikes(kind: Native, p: Values, m: Array) -> tuple[Array, Array]:
    """Of a membrane: up and down, down with its sign; zero in a family that has none."""
    if kind.family == "LI":
        return np.zeros_like(m), np.zeros_like(m)
    if kind.family == "LIB":
        return kind.fires(m - p["threshold"] + p["bias"]), np.zeros_like(m)
    return kind.fires(m - p["pos_threshold"] + p["bias"]), -kind.fires(-p["neg_threshold"] - m - p["bias"])


def emitted(kind: Native, p: Values, m: Array, up: Array, down: Array) -> tuple[Array, Array]:
    """The output and q, what the reset takes from the membrane."""
    if kind.family == "LI":
        return m, np.zeros_like(m)
    if kind.family == "LIB":
        return up, up * p["threshold"]
    scales = (p["pos_scale"], p["neg_scale"]) if kind.family == "LITS" else (1.0, 1.0)
    return up * scales[0] + down * scales[1], up * p["pos_threshold"] + down * p["neg_threshold"]


def step(kind: Native, p: Values, x: Array, old: Mapping[str, Array], fired: tuple[Array, Array] | None = None) -> Tape:
    """One time step from the states `old`; parameters `p` by name, each broadcasting against x.

    With `fired`, up and down are those in the place of its own.
    """
    tape = Tape(x, dict(old))
    new, zero = tape.new, np.zeros_like(x)
    u, r = x, zero
    if kind.synapse:
        for b in kind.branches:
            a = p[f"{b}alpha"]
            new[f"{b}syn"] = a * old.get(f"{b}syn", zero) + (1 - a) * x * _mask(b, x)
        u = sum((new[f"{b}syn"] for b in kind.branches), zero)
    if kind.recurrent:
        previous = old.get("prev_output", zero)
        for b in kind.branches:
            c = p[f"{b}gamma"]
            new[f"{b}rec"] = c * old.get(f"{b}rec", zero) + (1 - c) * previous * _mask(b, previous)
        r = sum((new[f"{b}rec"] for b in kind.branches), zero)
    for b in kind.branches:
        taken = u * _mask(b, u) + (p[f"{b}rec_weight"] * r * _mask(b, r) if kind.recurrent else 0)
        beta = p[f"{b}beta"]
        new[f"{b}mem"] = beta * old.get(f"{b}mem", zero) + (1 - beta if kind.ema else 1) * taken
        tape.inputs[b] = taken
    m = sum((new[f"{b}mem"] for b in kind.branches), zero)
    up, down = spikes(kind, p, m) if fired is None else fired
    output, q = emitted(kind, p, m, up, down)
    for b in kind.branches:
        new[f"{b}mem"] = new[f"{b}mem"] - q / len(kind.branches)
    if kind.recurrent:
        new["prev_output"] = output
    tape.u, tape.r, tape.m, tape.up, tape.down, tape.output = u, r, m, up, down, output
    return tape


def run(kind: Native, p: Values, xs: Array) -> list[Tape]:
    """The layer from the zero state. xs: float64 [T, ...]; one tape a step."""
    tapes: list[Tape] = []
    for x in xs:
        tapes.append(step(kind, p, x, tapes[-1].new if tapes else {}))
    return tapes


def _fire_backward(kind: Native, p: Values, tape: Tape, grad: Array, grad_q: Array, total: dict[str, Array]) -> Array:
    """dL/dm, from dL/doutput and dL/dq; adds the parameters' gradients to `total`."""
    m = tape.m
    if kind.family == "LI":
        return grad
    if kind.family == "LIB":
        z = m - p["threshold"] + p["bias"]
        grad_z = (grad + grad_q * p["threshold"]) * kind.slope(z)
        total["threshold"] += grad_q * tape.up - grad_z
        total["bias"] += grad_z
        return grad_z
    moved = np.zeros_like(m)
    for name, sign, events in (("pos", 1.0, tape.up), ("neg", -1.0, tape.down)):
        threshold = p[f"{name}_threshold"]
        z = sign * (m + p["bias"]) - threshold
        scale = p[f"{name}_scale"] if kind.family == "LITS" else 1.0
        grad_z = sign * (grad * scale + grad_q * threshold) * kind.slope(z)
        total[f"{name}_threshold"] += grad_q * events - grad_z
        if kind.family == "LITS":
            total[f"{name}_scale"] += grad * events
        total["bias"] += sign * grad_z
        moved = moved + sign * grad_z
    return moved


def backward(
    kind: Native, p: Values, tapes: list[Tape], grads: Array, feedback: Feedback | None = None
) -> dict[str, Array]:
    """The adjoint of `run`. Back in time, with l, y, k, o for dL/d mem, syn, rec, prev_output after the step:

        dL/doutput = G + o;  dL/dq = -sum l_b / h;  dL/dm from `_fire_backward`;  d_b = l_b + dL/dm
        dL/dbeta_b += d_b*(mem_b - in_b if EMA else mem_b);  l_b = beta_b*d_b;  e_b = dL/din_b = d_b, EMA (1-beta_b)*d_b
        dL/drec_weight_b += e_b*part_b(r);  dL/drec_b = k_b + sum_c rec_weight_c*e_c*mask_c(r);  likewise S and x

    Args:
        grads: G, dL/doutput, [T, ...].
        feedback: as `oracle.lif.backward` has it.

    Returns:
        Element-wise gradients: `x` [T, ...], and of every parameter [...], not yet summed to its shape.
    """
    like = np.zeros_like(tapes[0].x)
    total = {name: like.copy() for name in p}
    carried = {f"{b}{name}": like for b in kind.branches for name in ("mem", "syn", "rec")}
    grad_x, o = np.zeros_like(grads), like
    for t in range(len(tapes) - 1, -1, -1):
        tape = tapes[t]
        old = {name: tape.old.get(name, like) for name in (*carried, "prev_output")}
        grad_q = -sum((carried[f"{b}mem"] for b in kind.branches), like) / len(kind.branches)
        grad_m = _fire_backward(kind, p, tape, grads[t] + o, grad_q, total)
        grad_u, grad_r = like, like
        for b in kind.branches:
            d, beta = carried[f"{b}mem"] + grad_m, p[f"{b}beta"]
            total[f"{b}beta"] += d * (old[f"{b}mem"] - (tape.inputs[b] if kind.ema else 0))
            carried[f"{b}mem"] = beta * d
            e = (1 - beta) * d if kind.ema else d
            grad_u = grad_u + e * _mask(b, tape.u)
            if kind.recurrent:
                total[f"{b}rec_weight"] += e * tape.r * _mask(b, tape.r)
                grad_r = grad_r + e * p[f"{b}rec_weight"] * _mask(b, tape.r)
        o, grad_x[t] = like, grad_u
        if kind.recurrent:
            o = _trace_backward(kind, p, "rec", "gamma", old, old["prev_output"], grad_r, carried, total)
        if kind.synapse:
            grad_x[t] = _trace_backward(kind, p, "syn", "alpha", old, tape.x, grad_u, carried, total)
        if feedback is not None:
            o = o + feedback(t, grad_x[t])
    return {"x": grad_x, **total}


def _trace_backward(
    kind: Native,
    p: Values,
    trace: str,
    decay: str,
    old: Values,
    entered: Array,
    grad: Array,
    carried: dict[str, Array],
    total: dict[str, Array],
) -> Array:
    """Through `trace_b = decay_b*trace_b + (1-decay_b)*part_b(entered)`: dL/dentered from dL/d(sum trace_b)."""
    back = np.zeros_like(grad)
    for b in kind.branches:
        d, a = carried[f"{b}{trace}"] + grad, p[f"{b}{decay}"]
        total[f"{b}{decay}"] += d * (old[f"{b}{trace}"] - entered * _mask(b, entered))
        carried[f"{b}{trace}"] = a * d
        back = back + (1 - a) * d * _mask(b, entered)
    return back
