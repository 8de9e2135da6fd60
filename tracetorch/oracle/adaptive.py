"""The adaptive threshold (sinabs `ALIF`, 3.1.3): n is the state `adaptation`, A and a_n its scale and its decay.

    theta[t] = threshold + A*n[t-1]           of the spike test and, where the amount is the threshold, of the reset
    n[t] = a_n*n[t-1] + (1-a_n)*s[t]          n[-1] = 0

All else is as in `oracle.equations`. A subject's own n[t-1] is part of the state from which the oracle restarts, so
theta is a known number in every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tracetorch.oracle.equations import Equations, OracleError, equations
from tracetorch.oracle.raw import RAW, Array


@dataclass(frozen=True)
class Adaptation:
    """Of a run: decay a_n with its relative error in unit roundoffs, scale A, and n before every step [T, ...]."""

    decay: Array
    decay_error: Array
    scale: Array
    before: Array

    def after(self, spikes: Array) -> Array:
        """n after every step, [T, ...]."""
        return self.decay * self.before + (1 - self.decay) * spikes

    def bound(self, spikes: Array, roundoff: float, tiny: float) -> Array:
        """What rounding may add to one step of n: 4 roundings, and the error of a decay that is itself computed."""
        size = np.abs(self.before) + np.abs(spikes)
        return np.asarray(roundoff * (4 + self.decay_error * np.abs(self.decay)) * size + tiny)

    def backward(self, t: int, grad_theta: Array, grad_n: Array, spikes: Array, total: dict[str, Array]) -> Array:
        """dL/dn before the step, from dL/dtheta in it and dL/dn after it; adds to `adapt_scale` and `adapt_decay`."""
        total["adapt_scale"] += grad_theta * self.before[t]
        total["adapt_decay"] += grad_n * (self.before[t] - spikes)
        return self.decay * grad_n + self.scale * grad_theta


def adapted(spec: Any, states: Any) -> Equations:
    """The equations of an adaptive spec along a subject's recorded states, threshold and reset amount [T, ...]."""
    n = states["adaptation"].astype(np.float64)
    return along(spec, np.concatenate([np.zeros_like(n[:1]), n[:-1]]))


def along(spec: Any, before: Array) -> Equations:
    """The equations of an adaptive spec, with the adaptation before every step, [T, ...].

    Raises:
        OracleError: a reset in another step than the spike's, or by theta / a.
    """
    eq = equations(spec.replace(parameters=_without(spec)))
    if spec.reset_timing != "same_step" or eq.divided:
        raise OracleError(
            f"reset_timing={spec.reset_timing!r}, reset_amount={spec.reset_amount!r}: the oracle has equations for an "
            "adaptive threshold only with a reset in the spike's own step, by the threshold or a constant"
        )
    decay, scale = spec.parameters["adapt_decay"], spec.parameters["adapt_scale"]
    raw = decay.value.astype(np.float64)
    adaptation = Adaptation(
        np.asarray(RAW[decay.raw].value(raw, spec.dt)),
        np.asarray(RAW[decay.raw].error(raw, spec.dt)),
        np.asarray(RAW[scale.raw].value(scale.value.astype(np.float64), spec.dt)),
        before,
    )
    theta = eq.threshold + adaptation.scale * adaptation.before
    rho = theta if spec.reset == "subtract" and spec.reset_amount == "threshold" else eq.rho
    return replace(eq, threshold=theta, rho=np.broadcast_to(rho, theta.shape), adaptation=adaptation)


def threshold_slack(eq: Equations, w: Array, spikes: Array, roundoff: float) -> tuple[Array, Array]:
    """What the rounding of theta adds to the bounds of w (seen by the spike test) and of the membrane after the reset.

    theta takes two roundings, of at most |threshold| + 2 A n; a count of n spikes multiplies what they amount to.
    """
    assert eq.adaptation is not None
    size = 3 * roundoff * (np.abs(eq.threshold) + 2 * np.abs(eq.adaptation.scale * eq.adaptation.before))
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(eq.theta > 0, np.maximum(np.abs(w) / eq.theta, 1.0), 1.0)
    return size * times, size * (times + np.abs(spikes))


def _without(spec: Any) -> dict[str, Any]:
    return {name: p for name, p in spec.parameters.items() if not name.startswith("adapt_")}


__all__ = ["Adaptation", "adapted", "along", "threshold_slack"]
