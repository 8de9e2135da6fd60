"""Time constants and decays. `alpha` is the factor by which a trace shrinks in one time step, in (0, 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def tau_to_alpha(tau: float | Tensor, dt: float = 1.0) -> Tensor:
    """alpha = exp(-dt / tau). `tau` and `dt` in the same unit (steps, if `dt` is 1); any shape."""
    return torch.exp(-dt / torch.as_tensor(tau))


def alpha_to_tau(alpha: float | Tensor, dt: float = 1.0) -> Tensor:
    """tau = -dt / ln(alpha), in the unit of `dt`. Not exactly the inverse of `tau_to_alpha` in floating point."""
    return -dt / torch.log(torch.as_tensor(alpha))
