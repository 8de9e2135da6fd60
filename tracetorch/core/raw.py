"""Raw forms in torch: how a stored, trainable number becomes the value in the equations (`spec.RAW_FORMS`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

# Those that count time in the unit of the spec's dt.
TIMED = ("exp_dt_tau", "one_minus_dt_rate")

# (raw, dt) -> value. Each with the operations of the framework that has it: sinabs `torch.exp(-1.0 / tau)`, snnTorch
# `beta.clamp(0, 1)`. Plain dictionaries: torch.compile does not look into a read-only view of one.
_RAW: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "value": lambda raw, dt: raw,
    "clamped": lambda raw, dt: raw.clamp(0, 1),
    "exp_tau": lambda raw, dt: torch.exp(-1.0 / raw),
    "exp_dt_tau": lambda raw, dt: torch.exp(-dt / raw),
    "one_minus_inverse_tau": lambda raw, dt: 1 - 1 / raw,
    "one_minus_dt_rate": lambda raw, dt: 1 - dt * raw,
    "one_minus_sigmoid": lambda raw, dt: 1 - torch.sigmoid(raw),
    "sigmoid": lambda raw, dt: torch.sigmoid(raw),
    "softplus": lambda raw, dt: F.softplus(raw),
}


_INVERSE: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "value": lambda value, dt: value,
    "clamped": lambda value, dt: value,
    "exp_tau": lambda value, dt: -1.0 / torch.log(value),
    "exp_dt_tau": lambda value, dt: -dt / torch.log(value),
    "one_minus_inverse_tau": lambda value, dt: 1 / (1 - value),
    "one_minus_dt_rate": lambda value, dt: (1 - value) / dt,
    "one_minus_sigmoid": lambda value, dt: -torch.logit(value),
    "sigmoid": lambda value, dt: torch.logit(value),
    "softplus": lambda value, dt: value + torch.log(-torch.expm1(-value)),
}


COMPUTED = tuple(_RAW)


def _step(name: str, dt: float | None) -> float:
    if dt is None and name in TIMED:
        raise ValueError(f"dt=None: the raw form {name!r} counts time in the unit of a dt; give it")
    return 1.0 if dt is None else dt


def to_raw(name: str, value: Tensor, dt: float | None = None) -> Tensor:
    """A raw tensor whose value is the given one, to rounding; same shape. Values out of a raw form's range give NaN.

    Raises:
        ValueError: no dt for one of `TIMED`.
    """
    return _INVERSE[name](value, _step(name, dt))


def from_raw(name: str, raw: Tensor, dt: float | None = None) -> Tensor:
    """The value in the equations for a raw tensor; same shape, differentiable.

    Raises:
        NotImplementedError: a raw form that no adapter of this version reads.
        ValueError: no dt for one of `TIMED`.
    """
    if name not in _RAW:
        raise NotImplementedError(f"raw form {name!r} is not computed in this version; computed: {', '.join(_RAW)}")
    return _RAW[name](raw, _step(name, dt))
