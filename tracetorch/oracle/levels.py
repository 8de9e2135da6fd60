"""States that are rounded to given levels in every step, in float64: snnTorch's `state_quant` (1.0.0).

A state u becomes the nearest level; of two as near, the first of the tuple. A subject compares the distances
abs(level - u) as they are rounded, of a u that is itself within a bound of the oracle's: between two levels it may take
either, as a spike near the threshold may be either. So the level that the subject took is the oracle's too where it is
as near as the roundings allow, else the oracle keeps its own, and the state is a violation. Where nothing is rounded, a
tie is decided as said.
"""

from __future__ import annotations

import numpy as np

from tracetorch.oracle.raw import Array


def nearest(u: Array, levels: Array) -> Array:
    """The nearest level of each element of u; the first level where u is not finite."""
    order = np.argsort(levels, kind="stable")
    known = levels[order]
    after = np.clip(np.searchsorted(known, u), 1 if len(known) > 1 else 0, len(known) - 1)
    before = np.maximum(after - 1, 0)
    with np.errstate(invalid="ignore", over="ignore"):
        below, above = np.abs(known[before] - u), np.abs(known[after] - u)
    second = (above < below) | ((above == below) & (order[after] < order[before]))
    return np.asarray(np.where(np.isfinite(u), np.where(second, known[after], known[before]), levels[0]))


def _in_float32(value: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(value == value.astype(np.float32).astype(np.float64))


def taken(u: Array, bound: Array, levels: Array, own: Array, roundoff: float) -> Array:
    """The levels that a subject took, as far as the oracle can follow.

    Args:
        u: the oracle's state before it is rounded.
        bound: what the subject's may be off, in the same shape.
        levels: [L].
        own: the subject's state, or what it must have been.
        roundoff: of the subject's dtype.
    """
    expected, found = nearest(u, levels), nearest(own, levels)
    with np.errstate(invalid="ignore"):
        to_expected, to_found = np.abs(expected - u), np.abs(found - u)
        exact = (bound == 0) & _in_float32(to_expected) & _in_float32(to_found)
        slack = np.where(exact, 0.0, 2 * bound + 2 * roundoff * (to_expected + to_found))
        near = (slack > 0) & (to_found - to_expected <= slack)
    return np.where(near, found, expected)


__all__ = ["nearest", "taken"]
