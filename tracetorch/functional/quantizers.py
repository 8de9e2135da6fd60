"""Quantizers: turn the smooth output of a spike function into discrete events, gradient passed straight through."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step_size: float) -> Tensor:
        return torch.round(x / step_size) * step_size

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].clone(), None


def round_to_step(x: Tensor, step_size: float = 1.0) -> Tensor:
    """x, any shape -> the nearest multiple of `step_size` (ties to even), gradient 1."""
    return _RoundSTE.apply(x, step_size)


class round_ste(nn.Module):
    """Round to the nearest multiple of `step_size` (ties to even), gradient 1.

    Args:
        step_size: the distance between two levels, above 0.

    Raises:
        ValueError: `step_size` is not a finite number above 0.
    """

    def __init__(self, step_size: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(step_size) and step_size > 0):
            raise ValueError(f"round_ste: step_size must be a finite number above 0, not {step_size!r}")
        self.step_size = float(step_size)

    def forward(self, x: Tensor) -> Tensor:
        """x, any shape -> the same shape, multiples of `step_size`."""
        return round_to_step(x, self.step_size)

    def extra_repr(self) -> str:
        return f"step_size={self.step_size:g}"
