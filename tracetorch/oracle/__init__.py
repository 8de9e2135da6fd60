"""The float64 NumPy reference of every spec, its rounding bounds, and the verdicts. No torch."""

from tracetorch.oracle.equations import Equations, OracleError, equations
from tracetorch.oracle.gradient_judge import (
    GradientJudgement,
    gradient_bounds,
    gradient_error,
    gradients,
    judge_gradient,
)
from tracetorch.oracle.judge import Judgement, Recording, explained, judge, same_bits, trajectory
from tracetorch.oracle.lif import Step, Trace, advance, backward, run
from tracetorch.oracle.rounding import bounds, current_bound, roundoff
from tracetorch.oracle.signed import TwoSigns, drift, two_signs
from tracetorch.oracle.simulation import Expected, expected, simulate

__all__ = [
    "Equations",
    "Expected",
    "GradientJudgement",
    "Judgement",
    "OracleError",
    "Recording",
    "Step",
    "Trace",
    "TwoSigns",
    "advance",
    "backward",
    "bounds",
    "current_bound",
    "drift",
    "equations",
    "expected",
    "explained",
    "gradient_bounds",
    "gradient_error",
    "gradients",
    "judge",
    "judge_gradient",
    "roundoff",
    "run",
    "same_bits",
    "simulate",
    "trajectory",
    "two_signs",
]
