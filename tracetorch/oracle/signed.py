"""Spikes of two signs on their own, in float64, from the initial state, by their own spikes or by given ones.

With p and n the spikes of either sign, theta and theta' the thresholds, g and g' the scales:

    u = a*v + i;   p = count(u - theta + bias);   n = count(-theta' - u - bias)
    v = u - p*theta + n*theta';   output = g*p - g'*n

In an `Equations` of them s = p - n, `theta` and `neg_theta` are the membranes at which a spike of either sign fires.
`oracle.composed` judges a recording of such a neuron; where p and n are both 1, as thresholds below 0 allow, s
hides it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from tracetorch.oracle import composed
from tracetorch.oracle.equations import Equations, equations
from tracetorch.oracle.lif import Step, Trace
from tracetorch.oracle.raw import RAW, Array
from tracetorch.oracle.rounding import shifted


def _zero() -> Array:
    return np.zeros(())


@dataclass(frozen=True)
class TwoSigns(Equations):
    """The equations of the positive spikes, and beside them the numbers of the negative ones."""

    neg_threshold: Array = field(default_factory=_zero)
    neg_g: Array = field(default_factory=_zero)

    @property
    def neg_theta(self) -> Array:
        """The membrane below which a negative spike fires."""
        return -self.neg_threshold - self.bias

    def signs(self, u: Array) -> tuple[Array, Array]:
        """p and n, neither below 0."""
        inclusive = self.choices.comparison == ">="
        if self.choices.spike_count == "smooth":
            return super().count(u), super().count(self.theta + self.neg_theta - u)
        below = u <= self.neg_theta if inclusive else u < self.neg_theta
        return super().count(u), np.where(below, 1.0, 0.0)

    def count(self, u: Array) -> Array:
        """s = p - n of a membrane."""
        p, n = self.signs(u)
        return np.asarray(p - n)

    def shown(self, u: Array) -> Array:
        """The output of a membrane."""
        p, n = self.signs(u)
        return np.asarray(self.g * p - self.neg_g * n)

    def fired(self, outputs: Array) -> Array:
        """s of the outputs of whole spikes; NaN where no spike gives an output."""
        found = np.where(outputs == 0, 0.0, np.nan)
        found = np.where((outputs == -self.neg_g) & np.isnan(found), -1.0, found)
        return np.asarray(np.where((outputs == self.g) & np.isnan(found), 1.0, found))

    @property
    def readable(self) -> bool:
        """Whether every output of whole spikes is that of one s."""
        return bool(np.all((self.g != 0) & (self.neg_g != 0) & (self.g != -self.neg_g)))

    def reset(self, u: Array, p: Array, n: Array) -> Array:
        """The membrane after its reset."""
        return np.asarray(u - p * self.rho + n * self.neg_threshold)

    @property
    def steepest(self) -> Array:
        """The largest slope of a smooth spike."""
        return self.surrogate(self.theta)


def two_signs(spec: Any) -> TwoSigns:
    """Equations of a spec with `neg_threshold`.

    Raises:
        OracleError: choices without equations; names the field and its value.
    """
    composed.refuse(spec)
    plain = {name: p for name, p in spec.parameters.items() if name not in ("neg_threshold", "neg_scale")}
    own = equations(spec.replace(parameters=plain))

    def value(name: str, default: float) -> Array:
        parameter = spec.parameters.get(name)
        if parameter is None:
            return np.full((), default)
        return np.asarray(RAW[parameter.raw].value(parameter.value.astype(np.float64), spec.dt))

    given = {f.name: getattr(own, f.name) for f in fields(own)}
    return TwoSigns(**given, neg_threshold=value("neg_threshold", 0.0), neg_g=value("neg_scale", 1.0))


def simulate(spec: Any, x: Array, spikes: Array | None = None) -> tuple[TwoSigns, Trace, Array]:
    """The equations, the trajectory and the outputs. x: float64 [T, ...]; `spikes`: s to follow, whole ones.

    Raises:
        OracleError: as `two_signs`.
    """
    eq = two_signs(spec)
    i = v = np.zeros(x.shape[1:])
    kept, outputs = [], []
    for t, x_t in enumerate(x):
        drive, i = eq.synapse(x_t, i)
        u = eq.a * v + drive
        p, n = eq.signs(u) if spikes is None else (spikes[t] > 0, spikes[t] < 0)
        v = eq.reset(u, p, n)
        kept.append((i, drive, u, np.zeros_like(u), np.subtract(p, n, dtype=np.float64), v))
        outputs.append(eq.g * p - eq.neg_g * n)
    step = Step(*(np.stack(column) for column in zip(*kept, strict=True)))
    held = np.zeros(x.shape, dtype=bool)
    return eq, Trace(x, shifted(step.i), shifted(step.v), step, held), np.stack(outputs)


def drift(
    spec: Any, recording: Any, eq: TwoSigns, roundoff: float, tiny: float
) -> tuple[Array, Array, dict[str, Array]]:
    """How far rounding may take a subject, that fires the spikes of a simulation, from it: u, v and other states.

    E_v = |a| E_v + E_i + the bound of one step; what a smooth reset takes is off by at most its slope times theta +
    theta' of that.

    Args:
        recording: the simulation; `roundoff`, `tiny`: of the subject's dtype.
    """
    run = composed.rerun(spec, recording, roundoff, tiny)
    u_bound, v_bound = np.maximum(*run.z_bounds), run.bounds["v_mem"]
    a, a_s = np.abs(eq.a), np.zeros(()) if eq.a_s is None else np.abs(eq.a_s)
    i_bound = run.bounds.get("i_syn", np.zeros(recording.x.shape))
    steep: Any = 1.0
    if spec.spike_count == "smooth":
        steep = np.maximum(1.0, eq.steepest * (np.abs(eq.rho) + np.abs(eq.neg_threshold)))
    e_i = e_v = np.zeros(recording.x.shape[1:])
    of_i, of_u, of_v = [], [], []
    for t in range(len(recording.x)):
        e_i = a_s * e_i + i_bound[t]
        carried = a * e_v + e_i
        e_v = steep * carried + v_bound[t]
        of_i.append(e_i)
        of_u.append(carried + u_bound[t])
        of_v.append(e_v)
    others = {"i_syn": np.stack(of_i)} if "i_syn" in recording.states else {}
    return np.stack(of_u), np.stack(of_v), others
