"""The nearest of many levels, found by halving: the same bits as comparing with one level after the other.

The levels ascend. With d(l) = fl(abs(l - x)), rounded in x's dtype, the result is the first l of the smallest d.
Rounding keeps the order of what it rounds, so that d falls, if not strictly, towards x and rises after it.

x above all levels: D = d(last) is the smallest, and fl(x - l) <= D is false up to the first level of that distance and
true from it on. Else the result is one of the two levels a <= x < b around x, for d(a') > d(a) where a' is the level
before a: their distances are a - a' apart, and the floats around d(a'), which is at most (a - a') + (b - a), are less
than that apart if a - a' is not far less than b - a (`well_spaced`). In both cases the search can halve.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

_MANY = 8  # levels, from which on halving takes fewer operations
_CLOSE = 2.0**-20  # of a gap, the next; in float32 2^-22 would do


def well_spaced(levels: tuple[float, ...]) -> bool:
    """Whether there are many levels, they ascend, and none is far closer to the one before than to the one after."""
    gaps = [after - before for before, after in pairwise(levels)]
    return len(levels) >= _MANY and gaps[0] > 0 and all(b > 0 and a > _CLOSE * b for a, b in pairwise(gaps))


def nearest_by_halving(x: Tensor, levels: tuple[float, ...]) -> Tensor:
    """x, any shape -> the nearest of `well_spaced` levels, of two as near the first; that of all where x is NaN."""
    known = [torch.full_like(x, level) for level in levels]
    half = 1 << (len(levels) - 1).bit_length()
    window = [known[0], *known, *[known[-1]] * (half - len(levels))]  # one before the candidates, and the candidates
    beyond, least = x > levels[-1], x - levels[-1]
    while half > 1:
        half //= 2
        level = window[half]
        reached = torch.where(beyond, x - level <= least, level > x)
        window = [torch.where(reached, window[k], window[k + half]) for k in range(half + 1)]
    below, above = window
    second = beyond | ((above - x).abs() < (below - x).abs())
    return torch.where(x == x, torch.where(second, above, below), levels[0])
