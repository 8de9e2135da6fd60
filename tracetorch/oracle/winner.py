"""One winner among the neurons of a layer, in float64: snnTorch's `inhibition=True` (1.0.0).

Of the neurons [..., N] of a sample the first with the largest distance z = u - theta may spike. A subject's z is off by
a bound, so that of neurons whose z are that near to each other any may be the winner.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracetorch.oracle.raw import Array


def winner(z: Array) -> Array:
    """1 for the winner, 0 for the others; NaN is larger than any number, as in torch."""
    found = np.zeros(z.shape)
    np.put_along_axis(found, np.argmax(z, axis=-1, keepdims=True), 1.0, axis=-1)
    return found


def explained(spikes: Array, z: Array, bound: Array, low: Array, high: Array) -> NDArray[np.bool_]:
    """Where emitted spikes are those of z within the bound.

    Args:
        spikes: what was emitted, [..., N].
        z: the oracle's distances to the threshold.
        bound: of each.
        low, high: the spikes of z less, and plus, its bound, without inhibition.
    """
    first, exact = winner(z), np.all(bound == 0, axis=-1, keepdims=True)
    lower, upper = z - bound, z + bound
    may = upper >= lower.max(axis=-1, keepdims=True)
    must = (upper >= lower.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True) == 1
    may = np.where(exact, first > 0, may)
    must = np.where(exact, first > 0, must & may)
    fits = np.where(spikes > 0, may & (high > 0), ~must | (low == 0))
    return np.asarray(fits & np.isin(spikes, (0.0, 1.0)) & (spikes.sum(axis=-1, keepdims=True) <= 1))


__all__ = ["explained", "winner"]
