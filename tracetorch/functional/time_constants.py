"""Time constants and decays. `alpha` is the factor by which a trace shrinks in one time step, in (0, 1)."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def tau_to_alpha(tau: float | Tensor, dt: float = 1.0) -> Tensor:
    """alpha = exp(-dt / tau). `tau` and `dt` in the same unit (steps, if `dt` is 1); any shape."""
    return torch.exp(-dt / torch.as_tensor(tau))


def alpha_to_tau(alpha: float | Tensor, dt: float = 1.0) -> Tensor:
    """tau = -dt / ln(alpha), in the unit of `dt`. Not exactly the inverse of `tau_to_alpha` in floating point."""
    return -dt / torch.log(torch.as_tensor(alpha))


def _within(name: str, value: float | Tensor, low: float, high: float, words: str) -> None:
    inside = (value > low) & (value < high) if isinstance(value, Tensor) else low < value < high
    if not bool(inside.all() if isinstance(inside, Tensor) else inside):
        raise ValueError(f"{name} must be {words}, not {value!r}")


def _log(value: Number) -> Number:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def halflife_to_decay(halflife: Number) -> Number:
    """decay = 2^(-1/halflife): after `halflife` steps half of a trace is left. A float, or a tensor of any shape.

    Raises:
        ValueError: not a finite number above 0.
    """
    _within("halflife_to_decay: halflife", halflife, 0, math.inf, "finite and above 0")
    return 2 ** (-1 / halflife)


def decay_to_halflife(decay: Number) -> Number:
    """halflife = -ln 2 / ln decay, in steps. A float, or a tensor of any shape.

    Raises:
        ValueError: not in (0, 1).
    """
    _within("decay_to_halflife: decay", decay, 0, 1, "in (0, 1)")
    return -math.log(2) / _log(decay)


def timesteps_to_decay(timesteps: Number) -> Number:
    """decay = 1 - 1/timesteps: the time horizon, the sum 1 + decay + decay^2 + ... is `timesteps`. Float or tensor.

    Raises:
        ValueError: not a finite number above 1.
    """
    _within("timesteps_to_decay: timesteps", timesteps, 1, math.inf, "finite and above 1")
    return 1 - 1 / timesteps


def decay_to_timesteps(decay: Number) -> Number:
    """timesteps = 1 / (1 - decay), the time horizon. A float, or a tensor of any shape.

    Raises:
        ValueError: not in (0, 1).
    """
    _within("decay_to_timesteps: decay", decay, 0, 1, "in (0, 1)")
    return 1 / (1 - decay)
