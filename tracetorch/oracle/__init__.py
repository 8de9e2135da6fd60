"""The float64 NumPy reference of every spec, its rounding bounds, and the verdicts. No torch."""

from tracetorch.oracle.equations import Equations, OracleError, equations
from tracetorch.oracle.judge import (
    Judgement,
    Recording,
    bounds,
    gradient_error,
    gradients,
    judge,
    same_bits,
    trajectory,
)
from tracetorch.oracle.lif import Step, Trace, advance, backward, run

__all__ = [
    "Equations",
    "Judgement",
    "OracleError",
    "Recording",
    "Step",
    "Trace",
    "advance",
    "backward",
    "bounds",
    "equations",
    "gradient_error",
    "gradients",
    "judge",
    "run",
    "same_bits",
    "trajectory",
]
