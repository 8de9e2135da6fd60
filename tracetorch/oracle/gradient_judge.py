"""Judging a gradient: is it that of the oracle, as far as the precision in which it was computed can tell?

A gradient agrees if its largest error, over the largest gradient of its tensor, is within a tolerance. One that is not
may still be all that its precision allows: where the computation is ill-conditioned (what grows over time cancels in a
sum, a surrogate jumps within the rounding bound of a membrane) the right formula in floating point gives this, and the
bound of `oracle.conditioning` says how far it may be off. Such a gradient is judged by that bound, element by element,
and called ill-conditioned. It agrees, if it is off by less than a tenth: a wrong reset path or surrogate does more. One
that is off by more, though its precision explains it, shows nothing: it is no evidence of a fault, nor of none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracetorch.oracle import alpha, alpha_conditioning, composed
from tracetorch.oracle.chain import sum_to, to_parameters
from tracetorch.oracle.conditioning import Errors, Precision, Slack, convolution_errors, errors
from tracetorch.oracle.equations import Equations, OracleError
from tracetorch.oracle.judge import Recording, trajectory
from tracetorch.oracle.lif import Adjoints, Feedback, backward
from tracetorch.oracle.raw import Array
from tracetorch.oracle.rounding import current_bound, form_rounding, roundoff, slack

# What a wrong reset path or surrogate does is of order 1.
TELLING = 0.1


@dataclass(frozen=True)
class GradientJudgement:
    """Of one tensor, relative to the largest of the true gradient.

    Attributes:
        error: the largest error.
        bound: the largest that its precision explains; 0 where no bound was derived or needed.
        ok: whether it is within the tolerance, or every element within its bound and the error below a tenth.
        void: whether the bound explains an error above that.
    """

    error: float
    bound: float
    ok: bool
    void: bool

    @property
    def ill_conditioned(self) -> bool:
        """Whether it took the bound to explain the error."""
        return self.bound > 0

    def __str__(self) -> str:
        said = f"error {self.error:.1g}"
        if not self.ill_conditioned:
            return said
        nothing = ", which shows nothing" if self.void else ""
        if np.isinf(self.bound):
            return f"{said}, ill-conditioned: it leaves the range of its precision{nothing}"
        return f"{said}, ill-conditioned: its precision explains up to {self.bound:.1g}{nothing}"


def gradients(
    spec: Any, recording: Recording, grad_output: NDArray[Any], feedback: Feedback | None = None
) -> dict[str, Array]:
    """Gradients along the subject's own trajectory: of `x` [T, ...], and of the raw parameters of `spec` by name.

    Args:
        spec: whose gradient: its reset path, its surrogate, its raw forms.
        recording: what the subject did, from the initial state on.
        grad_output: dL/doutput, [T, ...].
        feedback: of a recurrent layer, recorded on the sum of its input and of what comes back of its outputs:
            (t, dL/dx of step t) -> what dL/doutput of step t - 1 gets of it.

    Raises:
        OracleError: a gradient of another shape.
    """
    if grad_output.shape != recording.x.shape:
        raise OracleError(f"grad_output has shape {list(grad_output.shape)}, the output {list(recording.x.shape)}")
    with np.errstate(all="ignore"):
        if alpha.covers(spec):
            return alpha.gradients(spec, recording, grad_output.astype(np.float64), sum_to, feedback)
        if composed.covers(spec):
            e, _ = roundoff(recording.x.dtype)
            return composed.gradients(spec, recording, grad_output.astype(np.float64), e, sum_to, feedback)
        eq, trace, _ = trajectory(spec, recording)
        g = backward(eq, trace, grad_output.astype(np.float64), feedback=feedback)
        result = {"x": g["x"], **to_parameters(spec, eq, g)}
    return result


def gradient_error(subject: NDArray[Any], truth: Array) -> float:
    """max|difference| / max|truth| of one tensor; infinite where the subject has NaN and the truth has not.

    Raises:
        OracleError: shapes that differ, or an empty tensor.
    """
    if subject.shape != truth.shape:
        raise OracleError(f"a gradient of shape {list(subject.shape)} against one of {list(truth.shape)}")
    if truth.size == 0:
        raise OracleError("an empty gradient proves nothing")
    both_nan = np.isnan(subject) & np.isnan(truth)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(both_nan | (subject == truth), 0.0, np.abs(subject.astype(np.float64) - truth))
    if np.isnan(difference).any():
        return float("inf")
    scale = float(np.max(np.where(np.isfinite(truth), np.abs(truth), 0.0)))
    largest = float(difference.max())
    return 0.0 if largest == 0 else largest / scale if scale > 0 else float("inf")


def judge_gradient(
    subject: NDArray[Any], truth: Array, tolerance: float, bound: Callable[[], Array] | None = None
) -> GradientJudgement:
    """Judge one tensor.

    Args:
        subject: the gradient of the layer.
        truth: that of the oracle.
        tolerance: of the largest error over the largest gradient.
        bound: computes what each element may be off; asked for only where the tolerance does not do.

    Raises:
        OracleError: as `gradient_error`.
    """
    error = gradient_error(subject, truth)
    if error <= tolerance or bound is None:
        return GradientJudgement(error, 0.0, error <= tolerance, False)
    with np.errstate(all="ignore"):
        largest = np.max(np.abs(truth), where=np.isfinite(truth), initial=0.0)
        allowed = np.maximum(np.broadcast_to(bound(), truth.shape), tolerance * largest)
        explained = (np.abs(subject.astype(np.float64) - truth) <= allowed) | np.isinf(allowed) | (subject == truth)
        off = float(np.max(allowed)) / largest if largest > 0 else np.inf
    if not explained.all():
        return GradientJudgement(error, 0.0, False, False)
    return GradientJudgement(error, off, error < TELLING, error >= TELLING)


def gradient_bounds(
    spec: Any,
    recording: Recording,
    grad_output: NDArray[Any],
    feedback: tuple[Feedback, Feedback] | None = None,
) -> dict[str, Array]:
    """What each of `oracle.gradients` may be off when computed in the recording's precision; likewise by name.

    Args:
        feedback: of a recurrent layer: as in `gradients`, and the same of magnitudes.

    Returns:
        Arrays in the shape of the gradients. Empty for a neuron that no bound was derived for: then the tolerance
        alone judges.
    """
    unknown = composed.covers(spec) or spec.inhibition != "none"
    if unknown or (alpha.covers(spec) and feedback is not None):
        return {}
    dtype = max(recording.x.dtype, recording.outputs.dtype, key=lambda d: float(np.finfo(d).eps))
    with np.errstate(all="ignore"):
        if alpha.covers(spec):
            run = alpha.rerun(spec, recording)
            return alpha_conditioning.gradient_bounds(spec, run, grad_output.astype(np.float64), dtype)
        eq, trace, _ = trajectory(spec, recording)
        met = Adjoints(*(np.zeros_like(trace.x) for _ in range(5)))
        backward(eq, trace, grad_output.astype(np.float64), met, None if feedback is None else feedback[0])
        w, v = slack(eq, trace, recording)
        off = Slack(w, v, np.broadcast_to(current_bound(eq, trace, recording.x.dtype), trace.x.shape))
        if eq.a_s is None:
            off = Slack(w, v, np.zeros_like(trace.x))
        found = errors(eq, trace, met, off, dtype, None if feedback is None else feedback[1])
        if form_rounding(recording.spec).convolves:
            summed = convolution_errors(eq, trace, met.w, dtype)
            for name, more in summed.items():
                found.error[name] = found.error[name] + more
        return _of_parameters(spec, eq, found, dtype, recording.x.size)


def _of_parameters(spec: Any, eq: Equations, found: Errors, dtype: Any, terms: int) -> dict[str, Array]:
    """By the names of `spec`: what the terms are off, what their sum rounds, what the chain rule's factors round."""
    precision = Precision.of(dtype)
    own = to_parameters(spec, eq, found.error, absolute=True)
    sizes = to_parameters(spec, eq, found.size, absolute=True)
    bounds = {"x": found.error["x"]}
    for name, size in sizes.items():
        decay = eq.a_error if name == "mem_decay" else eq.a_s_error if name == "syn_decay" else np.zeros(())
        roundings = (terms / max(size.size, 1)) ** 0.5 + 16 + float(np.max(decay))
        bound = own[name] + precision.e * roundings * size + precision.tiny
        bounds[name] = np.where(np.isnan(bound) | ~(size < precision.largest), np.inf, bound)
    return bounds


__all__ = ["TELLING", "GradientJudgement", "gradient_bounds", "gradient_error", "gradients", "judge_gradient"]
