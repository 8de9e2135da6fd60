"""snnTorch: numbers and callables for the constructors of its neurons (snntorch 1.0.0)."""

from __future__ import annotations

from typing import Any

import torch
from snntorch.functional import quant
from torch import Tensor

from tracetorch.adapters.base import Building, value_of
from tracetorch.adapters.snntorch.layers import StateLevels
from tracetorch.core.spec import NeuronSpec


def set_rc(layer: Any, spec: NeuronSpec, building: Building) -> None:
    """R and C of a Lapicque with the decay a and the gain b in a step of 1: the floats nearest 1/b and b/(1-a)."""
    dtype = value_of(spec, "threshold").dtype  # of a layer in float64 whose R and C were given as Python numbers
    a, b = value_of(spec, "mem_decay").to(dtype), value_of(spec, "input_gain").to(dtype)
    if not ((a < 1) & (b > 0)).all():
        raise building.impossible("mem_decay", float(a.max()), "R C must be positive", "a decay below 1")

    def near(value: Tensor) -> list[Tensor]:
        around = [value]
        for end in (torch.inf, -torch.inf):
            step = value
            for _ in range(3):
                step = torch.nextafter(step, torch.full_like(step, end))
                around.append(step)
        return around

    best_r, best_c = b / (1 - a), 1 / b
    best = torch.full(torch.broadcast_shapes(a.shape, b.shape), torch.inf, dtype=a.dtype)
    for r in near(b / (1 - a)):
        for c in near(1 / b):
            off = (1 - 1 / (r * c) - a).abs() / a.clamp(min=1e-30) + (r * (1 / (r * c)) - b).abs() / b
            better = off < best
            best = torch.where(better, off, best)
            best_r, best_c = torch.where(better, r, best_r), torch.where(better, c, best_c)
    layer.R, layer.C = best_r, best_c
    layer.time_step = torch.ones((), dtype=a.dtype)
    layer.beta = torch.exp(-1 / (best_r * best_c))
    if best.any():
        building.note("mem_decay", "R and C give the source's decay and gain to a rounding")


def state_quant(spec: NeuronSpec, building: Building) -> Any:
    """`state_quant`: a callable of ours, or with `stock` the framework's own, if it has one with these levels."""
    if spec.state_levels is None:
        return False
    dtype = value_of(spec, "threshold").dtype
    if not building.stock:
        building.note("state_quant", "custom callable: the levels of the source; snnTorch's own does not pickle")
        return StateLevels(spec.state_levels, dtype)
    levels, bits = torch.tensor(spec.state_levels, dtype=dtype), len(spec.state_levels).bit_length() - 1
    low, high = float(levels[0]), float(levels[-1])
    if bits > 0 and low < 0:
        # It goes from -threshold - threshold*lower_limit to threshold + threshold*upper_limit.
        own = quant.state_quant(num_bits=bits, threshold=-low, lower_limit=0, upper_limit=(high + low) / -low)
        cells = dict(zip(own.__code__.co_freevars, own.__closure__, strict=True))
        made = cells["levels"].cell_contents
        if made.dtype == dtype and torch.equal(made, levels):
            return own
    why = "snntorch.functional.quant.state_quant makes 2^num_bits levels as far from each other"
    raise building.impossible("state_levels", f"{len(levels)} levels", why, "stock=False")
