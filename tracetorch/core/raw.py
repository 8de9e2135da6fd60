"""Raw forms in torch: how a stored, trainable number becomes the value in the equations (`spec.RAW_FORMS`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

# Each with the operations of the framework that has it: sinabs `torch.exp(-1.0 / tau)`, snnTorch `beta.clamp(0, 1)`.
# The raw forms of frameworks without an adapter here yet have no entry; asking for one is an error by name. Plain
# dictionaries: torch.compile does not look into a read-only view of one.
_RAW: Mapping[str, Callable[[Tensor], Tensor]] = {
    "value": lambda raw: raw,
    "clamped": lambda raw: raw.clamp(0, 1),
    "exp_tau": lambda raw: torch.exp(-1.0 / raw),
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


_INVERSE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "value": lambda value: value,
    "clamped": lambda value: value,
    "exp_tau": lambda value: -1.0 / torch.log(value),
    "sigmoid": torch.logit,
    "softplus": lambda value: value + torch.log(-torch.expm1(-value)),
}


COMPUTED = tuple(_RAW)


def to_raw(name: str, value: Tensor) -> Tensor:
    """A raw tensor whose value is the given one, to rounding; same shape. Values out of a raw form's range give NaN."""
    return _INVERSE[name](value)


def from_raw(name: str, raw: Tensor) -> Tensor:
    """The value in the equations for a raw tensor; same shape, differentiable.

    Raises:
        NotImplementedError: a raw form that no adapter of this version reads.
    """
    if name not in _RAW:
        raise NotImplementedError(f"raw form {name!r} is not computed in this version; computed: {', '.join(_RAW)}")
    return _RAW[name](raw)
