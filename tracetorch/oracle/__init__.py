"""The float64 NumPy reference of every spec, its rounding bounds, and the verdicts. No torch."""

from tracetorch.oracle.equations import Equations, OracleError, equations
from tracetorch.oracle.judge import (
    Judgement,
    Recording,
    bounds,
    current_bound,
    explained,
    gradient_error,
    gradients,
    judge,
    roundoff,
    same_bits,
    trajectory,
)
from tracetorch.oracle.lif import Step, Trace, advance, backward, run
from tracetorch.oracle.simulation import Expected, expected, simulate

__all__ = [
    "Equations",
    "Expected",
    "Judgement",
    "OracleError",
    "Recording",
    "Step",
    "Trace",
    "advance",
    "backward",
    "bounds",
    "current_bound",
    "equations",
    "expected",
    "explained",
    "gradient_error",
    "gradients",
    "judge",
    "roundoff",
    "run",
    "same_bits",
    "simulate",
    "trajectory",
]
