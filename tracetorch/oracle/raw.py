"""Raw forms in float64: value and derivative, and how far a float32 implementation of the value may be off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class RawForm:
    """value(raw); slope(raw) = d value / d raw; error(raw) = relative error of a rounded value, in unit roundoffs."""

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    error: Callable[[Array], Array]


def _sigmoid(raw: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-raw))


def _exact(raw: Array) -> Array:
    return np.zeros_like(raw)


# exp_tau: -1/tau is off by one rounding, and tau itself by three more where it was computed as -1/ln(alpha); exp turns
# these into a relative error of |1/tau| roundoffs each, and is itself within 2 ulp (4 roundoffs) of the truth.
# sigmoid, softplus: within 2.5 ulp, rounded up.
RAW: Mapping[str, RawForm] = MappingProxyType(
    {
        "value": RawForm(lambda raw: raw, np.ones_like, _exact),
        # torch passes the gradient of clamp at both ends.
        "clamped": RawForm(
            lambda raw: np.asarray(np.clip(raw, 0, 1), dtype=np.float64),
            lambda raw: np.where((raw >= 0) & (raw <= 1), 1.0, 0.0),
            _exact,
        ),
        "exp_tau": RawForm(
            lambda raw: np.exp(-1 / raw), lambda raw: np.exp(-1 / raw) / raw**2, lambda raw: 4 + 4 * np.abs(1 / raw)
        ),
        "sigmoid": RawForm(_sigmoid, lambda raw: _sigmoid(raw) * _sigmoid(-raw), lambda raw: np.full_like(raw, 6.0)),
        "softplus": RawForm(lambda raw: np.logaddexp(0, raw), _sigmoid, lambda raw: np.full_like(raw, 8.0)),
    }
)
