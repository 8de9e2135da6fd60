"""How far a gradient of the difference of exponentials may be off: as `oracle.conditioning`, for `oracle.alpha`.

Nothing here feeds back on itself: l_e and l_n only decay, so the errors of their terms are carried as these are. The
slopes of k divide by (ln(a) - ln(a_s))^2, which cancels where both decays are close.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tracetorch.oracle.alpha import Run
from tracetorch.oracle.chain import sum_to
from tracetorch.oracle.conditioning import ROUNDINGS, Precision, surrogate_error
from tracetorch.oracle.raw import RAW, Array


def gradient_bounds(spec: Any, run: Run, grad_output: Array, dtype: Any) -> dict[str, Array]:
    """As `oracle.gradient_bounds`, of a run along the subject's trajectory."""
    precision, shape = Precision.of(dtype), run.x.shape[1:]
    unit, names = ROUNDINGS * precision.e, ("k", "a_s", "a", "theta", "g")
    error, size = ({name: np.zeros(shape) for name in names} for _ in range(2))
    of_x: Array = np.zeros_like(run.x)
    l_e = l_n = off_e = off_n = np.zeros(shape)
    slack = np.broadcast_to(run.bounds(precision.e, precision.tiny)["v_mem"], run.x.shape)

    def add(name: str, factor: Array, off: Array, of: Array) -> None:
        error[name] = error[name] + np.abs(factor) * (off + unit * np.abs(of))
        size[name] = size[name] + np.abs(factor * of)

    for t in range(len(run.x) - 1, -1, -1):
        e, n, r, q, kept = run.e_before[t], run.n_before[t], run.r[t], run.q[t], run.kept[t]
        given = run.eq.g * grad_output[t]
        at_w = given * run.eq.surrogate(run.w[t])
        off_w = np.abs(given) * surrogate_error(run.eq, run.w[t], slack[t], precision.e) + unit * np.abs(at_w)
        add("g", run.spikes[t], np.zeros(shape), grad_output[t])
        if spec.threshold_gradient:
            add("theta", np.ones(()), off_w, at_w)
        add("theta", r, off_e, l_e)
        at_m, off_m = q * at_w, q * off_w
        by_k = np.abs(run.k) * off_m + (precision.e * run.k_error + unit * np.abs(run.k)) * np.abs(at_m)
        at_e, at_n = q * l_e + run.k * at_m, kept * l_n + run.k * at_m
        off_e, off_n = q * off_e + by_k + unit * np.abs(q * l_e), kept * off_n + by_k + unit * np.abs(kept * l_n)
        add("k", np.abs(run.a_s * e) + np.abs(run.a * n), off_m, at_m)
        add("a_s", e, off_e, at_e)
        add("a", n, off_n, at_n)
        of_x[t] = off_e + off_n + unit * (np.abs(at_e) + np.abs(at_n)) + precision.tiny
        l_e, l_n = run.a_s * at_e, run.a * at_n + r * at_w
        off_e = np.abs(run.a_s) * (off_e + unit * np.abs(at_e)) + precision.tiny
        off_n = np.abs(run.a) * (off_n + unit * np.abs(at_n)) + r * off_w + unit * np.abs(r * at_w) + precision.tiny
    return {"x": of_x, **_of_parameters(spec, run, error, size, precision)}


def _of_parameters(
    spec: Any, run: Run, error: dict[str, Array], size: dict[str, Array], precision: Precision
) -> dict[str, Array]:
    log_s, log_a = np.log(run.a_s), np.log(run.a)
    apart = np.abs(log_a - log_s)
    spread = 16 * (1 + (np.abs(log_s) + np.abs(log_a)) / apart)  # roundoffs of the slopes of k
    slopes = {"syn_decay": ("a_s", np.abs(log_a / run.a_s)), "mem_decay": ("a", np.abs(log_s / run.a))}
    found = {}
    for name, parameter in spec.parameters.items():
        if name in slopes:
            own, slope = slopes[name]
            through = slope / apart**2
            off = error[own] + through * (error["k"] + precision.e * spread * size["k"])
            total = size[own] + through * size["k"]
        else:
            own = {"threshold": "theta", "spike_scale": "g"}.get(name, "")
            off, total = error.get(own, np.zeros_like(run.x[0])), size.get(own, np.zeros_like(run.x[0]))
        shape = parameter.value.shape
        factor = np.abs(RAW[parameter.raw].slope(parameter.value.astype(np.float64), spec.dt))
        roundings = (run.x.size / max(parameter.value.size, 1)) ** 0.5 + 16
        summed = sum_to(off, shape) + precision.e * roundings * sum_to(total, shape)
        found[name] = np.asarray(summed * factor + precision.tiny)
    return found


__all__ = ["gradient_bounds"]
