"""Equal bit for bit: the comparison of all tests that promise it."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def assert_bits(a: Tensor, b: Tensor, what: str = "") -> None:
    """Shape, then dtype, then every bit: -0 is not 0, and NaN equals only the same NaN, and no value shows nothing."""
    assert a.shape == b.shape, (what, a.shape, b.shape)
    assert a.dtype == b.dtype, (what, a.dtype, b.dtype)
    assert a.numel(), f"{what}: no value to compare"
    left, right = (t.detach().contiguous().numpy().reshape(-1).view(np.uint8).reshape(t.numel(), -1) for t in (a, b))
    different = (left != right).any(1)
    assert not different.any(), f"{what}: {different.sum()} of {a.numel()} values differ"
