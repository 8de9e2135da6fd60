"""A module's numbers as JAX has them, kept from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from tracetorch.adapters.jax.bridge import FEW, aliases, to_jax, to_torch

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass
class _Kept:
    """One tensor's array, and of which memory it is.

    Attributes:
        array: JAX's.
        version: torch's count of the tensor's changes.
        place: data pointer, shape, strides and dtype; what is kept here keeps that memory from being given to another.
        view: NumPy's of a small tensor's memory; None for a large one.
        numbers: of a small tensor as they were copied.
        tensor: a large tensor.
    """

    array: Any
    version: int
    place: tuple[Any, ...]
    view: np.ndarray | None = None
    numbers: bytes = b""
    tensor: Tensor | None = None

    def holds(self) -> bool:
        """Whether the array has the numbers that are in the memory now: a write through `.data` leaves no version."""
        if self.view is not None:
            return self.view.tobytes() == self.numbers
        assert self.tensor is not None
        if aliases(self.tensor, self.array):
            return True
        bits = _BITS[self.tensor.dtype]
        return torch.equal(to_torch(self.array).view(bits), self.tensor.contiguous().view(bits))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Mirror:
    """JAX's arrays of some tensors, made when a tensor is another, or has another version or other numbers.

    A large one is JAX's view of the tensor's own memory where JAX can have one, and so is never behind it. Any other is
    a copy.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}

    def arrays(self, tensors: Sequence[Tensor]) -> list[Any]:
        """In the order of the tensors, which is the same at every call; float32 or float64."""
        return [self._array(k, tensor) for k, tensor in enumerate(tensors)]

    def _array(self, k: int, tensor: Tensor) -> Any:
        kept = self._kept.get(k)
        same = kept is not None and kept.version == _version(tensor) and kept.place == _place(tensor)
        if kept is None or not same or not kept.holds():
            kept = self._kept[k] = _copied(tensor)
        return kept.array

    def __deepcopy__(self, memo: dict[int, Any]) -> Mirror:
        return Mirror()

    def __reduce__(self) -> Any:
        return Mirror, ()


def _copied(tensor: Tensor) -> _Kept:
    plain = tensor.detach().resolve_neg()
    version, place = _version(tensor), _place(tensor)
    if plain.numel() <= FEW and plain.device.type == "cpu":
        view = plain.numpy()
        return _Kept(jax.numpy.array(view), version, place, view, view.tobytes())
    return _Kept(to_jax(plain), version, place, tensor=plain)
