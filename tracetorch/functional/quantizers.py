"""Quantizers: turn the smooth output of a spike function into discrete events, gradient passed straight through."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.functional.levels import nearest_by_halving, well_spaced


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


class _NearestLevel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: tuple[float, ...]) -> Tensor:
        if x.dtype in (torch.float32, torch.float64) and well_spaced(levels):
            return nearest_by_halving(x, levels)
        nearest, distance = torch.full_like(x, levels[0]), (levels[0] - x).abs()
        for level in levels[1:]:
            other = (level - x).abs()
            nearer = other < distance
            nearest, distance = torch.where(nearer, level, nearest), torch.where(nearer, other, distance)
        return nearest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].clone(), None


def nearest_level(x: Tensor, levels: tuple[float, ...]) -> Tensor:
    """x, any shape -> the nearest of the levels, of two as near the first of the tuple; gradient 1.

    The distances abs(level - x) are rounded in x's dtype and compared one after the other, as
    `snntorch.functional.quant.StateQuant` (1.0.0) does by a minimum over them. Where none is less than the first
    level's (x is infinite or NaN), that is the result.
    """
    return _NearestLevel.apply(x, levels)


class _Straight(torch.autograd.Function):
    """`value` forward, the gradient of x passed straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].clone(), None


class _Probabilistic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return p * torch.bernoulli(p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return grads[0] * (2 * p)


def _checked(name: str, step_size: float) -> float:
    if not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"{name}: step_size must be a finite number above 0, not {step_size!r}")
    return float(step_size)


class round_ste(nn.Module):
    """Round to the nearest multiple of `step_size` (ties to even), gradient 1.

    Args:
        step_size: the distance between two levels, above 0.

    Raises:
        ValueError: `step_size` is not a finite number above 0.
    """

    def __init__(self, step_size: float = 1.0) -> None:
        super().__init__()
        self.step_size = _checked("round_ste", step_size)

    def forward(self, x: Tensor) -> Tensor:
        """x, any shape -> the same shape, multiples of `step_size`."""
        return round_to_step(x, self.step_size)

    def extra_repr(self) -> str:
        return f"step_size={self.step_size:g}"


class stochastic_round_ste(nn.Module):
    """Round to one of the two nearest multiples of `step_size`, at random, so that the mean is x; gradient 1.

    With f the distance to the multiple below, in steps, it rounds up with probability f. Draws from torch's generator.

    Args:
        step_size: the distance between two levels, above 0.

    Raises:
        ValueError: `step_size` is not a finite number above 0.
    """

    def __init__(self, step_size: float = 1.0) -> None:
        super().__init__()
        self.step_size = _checked("stochastic_round_ste", step_size)

    def forward(self, x: Tensor) -> Tensor:
        """x, any shape -> the same shape, multiples of `step_size`."""
        scaled = x.detach() / self.step_size
        below = torch.floor(scaled)
        up = torch.rand_like(scaled) < scaled - below
        return _Straight.apply(x, (below + up) * self.step_size)

    def extra_repr(self) -> str:
        return f"step_size={self.step_size:g}"


class probabilistic_ste(nn.Module):
    """p -> p with probability p, else 0: `p * bernoulli(p)`; gradient 2p, that of its mean p^2.

    For outputs in [0, 1], such as those of `sigmoid4x`; torch raises `RuntimeError` for others.
    """

    def forward(self, p: Tensor) -> Tensor:
        """p, any shape, in [0, 1] -> the same shape."""
        return _Probabilistic.apply(p)
