"""Raw forms in float64: value and derivative, and how far a float32 implementation of the value may be off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Function: TypeAlias = Callable[[Array, float], Array]


@dataclass(frozen=True)
class RawForm:
    """A raw form as functions of (raw, dt); dt counts only where the form has one.

    Attributes:
        of: the value.
        slope_of: d value / d raw.
        error_of: relative error of a rounded value, in unit roundoffs.
        complement: whether frameworks compute 1 - value, and the decay as what is lost of the membrane: such a step
            rounds at the size of |1 - value| too.
    """

    of: Function
    slope_of: Function
    error_of: Function
    complement: bool = False

    def value(self, raw: Array, dt: float | None = None) -> Array:
        """The value in the equations."""
        return self.of(raw, 1.0 if dt is None else dt)

    def slope(self, raw: Array, dt: float | None = None) -> Array:
        """Its derivative."""
        return self.slope_of(raw, 1.0 if dt is None else dt)

    def error(self, raw: Array, dt: float | None = None) -> Array:
        """Its relative error in unit roundoffs."""
        return self.error_of(raw, 1.0 if dt is None else dt)


def _sigmoid(raw: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-raw))


def _exact(raw: Array, dt: float) -> Array:
    return np.zeros_like(raw)


def _constant(error: float) -> Function:
    return lambda raw, dt: np.full_like(raw, error)


def _relative(value: Function, error: float) -> Function:
    """A complement 1 - q, off by `error` roundoffs of q and one of itself, relative to it; near 0 by its own size.

    Where the complement is far smaller than q, the step's own bound has |1 - value| beside it: see `complement`.
    """

    def of(raw: Array, dt: float) -> Array:
        small = np.maximum(np.abs(value(raw, dt)), 1e-3)
        return np.asarray(1 + error * np.abs(1 - value(raw, dt)) / small)

    return of


# exp_tau: -1/tau is off by one rounding, and tau itself by three more where it was computed as -1/ln(alpha); exp turns
# these into a relative error of |1/tau| roundoffs each, and is itself within 2 ulp (4 roundoffs) of the truth. With a
# dt, which is rounded to float32 too, one more. sigmoid, softplus: within 2.5 ulp, rounded up. A complement is off by
# the error of what is taken from 1: one rounding of 1/tau, two of dt*rate, 2.5 ulp of the sigmoid.
RAW: Mapping[str, RawForm] = MappingProxyType(
    {
        "value": RawForm(lambda raw, dt: raw, lambda raw, dt: np.ones_like(raw), _exact),
        # torch passes the gradient of clamp at both ends.
        "clamped": RawForm(
            lambda raw, dt: np.asarray(np.clip(raw, 0, 1), dtype=np.float64),
            lambda raw, dt: np.where((raw >= 0) & (raw <= 1), 1.0, 0.0),
            _exact,
        ),
        "exp_tau": RawForm(
            lambda raw, dt: np.exp(-1 / raw),
            lambda raw, dt: np.exp(-1 / raw) / raw**2,
            lambda raw, dt: 4 + 4 * np.abs(1 / raw),
        ),
        "exp_dt_tau": RawForm(
            lambda raw, dt: np.exp(-dt / raw),
            lambda raw, dt: np.exp(-dt / raw) * dt / raw**2,
            lambda raw, dt: 4 + 5 * np.abs(dt / raw),
            complement=True,
        ),
        "one_minus_inverse_tau": RawForm(
            lambda raw, dt: 1 - 1 / raw,
            lambda raw, dt: 1 / raw**2,
            _relative(lambda raw, dt: 1 - 1 / raw, 1.0),
            complement=True,
        ),
        "one_minus_dt_rate": RawForm(
            lambda raw, dt: 1 - dt * raw,
            lambda raw, dt: np.full_like(raw, -dt),
            _relative(lambda raw, dt: 1 - dt * raw, 2.0),
            complement=True,
        ),
        "one_minus_sigmoid": RawForm(
            lambda raw, dt: _sigmoid(-raw),
            lambda raw, dt: -_sigmoid(raw) * _sigmoid(-raw),
            _relative(lambda raw, dt: _sigmoid(-raw), 6.0),
            complement=True,
        ),
        "sigmoid": RawForm(
            lambda raw, dt: _sigmoid(raw), lambda raw, dt: _sigmoid(raw) * _sigmoid(-raw), _constant(6.0)
        ),
        "softplus": RawForm(lambda raw, dt: np.logaddexp(0, raw), lambda raw, dt: _sigmoid(raw), _constant(8.0)),
    }
)
