"""`Parameter`: raw numbers of a neuron, exact and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracetorch.core.choices import RAW_FORMS


class SpecError(ValueError):
    """A `NeuronSpec` that contradicts itself, or that cannot be read from a layer."""


def is_number(value: object) -> bool:
    """Whether it is a finite int or float."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def refuse_all_but_numbers(value: Any) -> None:
    """NumPy would read a string or a bool as a number."""
    if isinstance(value, list):
        for item in value:
            refuse_all_but_numbers(item)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"{value!r:.60} is not a number")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a neuron: the raw numbers as the source stores them.

    Args:
        value: float32 or float64, scalar (shape `()`) or any shape that broadcasts against the layer's neurons. Copied
            and made read-only.
        learnable: whether the source trains it.
        raw: a key of `RAW_FORMS`.
    """

    value: np.ndarray
    learnable: bool = False
    raw: str = "value"

    def __post_init__(self) -> None:
        if not isinstance(self.value, (np.ndarray, np.generic)):
            raise SpecError(f"a parameter must be a float32 or float64 array, not {self.value!r:.60}")
        value = np.array(self.value, order="C")
        if value.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise SpecError(f"a parameter must be float32 or float64, not {value.dtype}")
        if not np.isfinite(value).all():
            raise SpecError(f"a parameter holds a value that is not finite ({value})")
        if value.size == 0:
            raise SpecError("a parameter is empty")
        if self.raw not in RAW_FORMS:
            raise SpecError(f"raw form {self.raw!r} is not known; known: {', '.join(RAW_FORMS)}")
        if not isinstance(self.learnable, bool):
            raise SpecError(f"learnable={self.learnable!r}: must be True or False")
        value.setflags(write=False)
        object.__setattr__(self, "value", value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parameter):
            return NotImplemented
        return (
            self.value.dtype == other.value.dtype
            and self.value.shape == other.value.shape
            and self.value.tobytes() == other.value.tobytes()
            and (self.learnable, self.raw) == (other.learnable, other.raw)
        )

    def fixed_at(self, number: float) -> bool:
        """Whether it is 0 or 1 in the equations, not only as a raw number, and not learned."""
        itself = self.raw in ("value", "clamped")  # the raw forms in which 0 and 1 stand for themselves
        return itself and not self.learnable and not (self.value != number).any()

    def __hash__(self) -> int:
        return hash((self.value.tobytes(), self.value.shape, self.learnable, self.raw))

    def __reduce__(self) -> Any:
        return type(self).from_dict, (self.to_dict(),)

    def __str__(self) -> str:
        if self.value.size == 1:
            text = f"{self.value.reshape(()).item():.9g}"
        else:
            text = f"{self.value.min():.6g} .. {self.value.max():.6g}"
        shape = "" if self.value.ndim == 0 else f", shape {list(self.value.shape)}"
        raw = "" if self.raw == "value" else f", {RAW_FORMS[self.raw]}"
        return f"{text}{shape}{raw}{', learnable' if self.learnable else ''}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; exact, since float64 holds every float32 and `repr` of a float64 is exact."""
        return {
            "value": self.value.astype(np.float64).tolist(),
            "dtype": str(self.value.dtype),
            "learnable": self.learnable,
            "raw": self.raw,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Parameter:
        """The inverse of `to_dict`. Raises `SpecError` on anything else."""
        try:
            extra = set(data) - {"value", "dtype", "learnable", "raw"}
            if extra or data["dtype"] not in ("float32", "float64") or not isinstance(data["learnable"], bool):
                raise SpecError(f"not a parameter: {dict(data)!r:.200}")
            refuse_all_but_numbers(data["value"])
            with np.errstate(over="ignore"):  # what overflows float32 is infinite, and refused as that
                value = np.array(data["value"], dtype=data["dtype"])
            return cls(value, data["learnable"], data["raw"])
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise SpecError(f"not a parameter ({error}): {data!r:.200}") from error
