"""What a row in the table of a network file is: a class, its arguments, how they are read and how it is built."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tracetorch.core.topology import FileError

Tensors: TypeAlias = Mapping[str, Tensor | None]
Children: TypeAlias = Sequence[tuple[str, nn.Module]]
Build: TypeAlias = Callable[[type[nn.Module], dict[str, Any], Tensors, Children], nn.Module]


class Argument(NamedTuple):
    """What a constructor argument may be, in words and as a test (JSON lists are tuples by then)."""

    words: str
    accepts: Callable[[Any], bool]


def or_none(kind: Argument) -> Argument:
    """The same, or None."""
    return Argument(f"{kind.words} or null", lambda value: value is None or kind.accepts(value))


def tuple_of(kind: Argument, *lengths: int) -> Argument:
    """A tuple of one of these lengths."""
    counts = " or ".join(map(str, lengths))
    return Argument(
        f"a list of {counts}, each {kind.words}",
        lambda value: type(value) is tuple and len(value) in lengths and all(map(kind.accepts, value)),
    )


def one_or_each(kind: Argument, n: int) -> Argument:
    """One for all `n` dimensions, or a tuple of `n`."""
    return either(kind, tuple_of(kind, n))


def either(one: Argument, other: Argument) -> Argument:
    """One of two kinds."""
    return Argument(f"{one.words} or {other.words}", lambda value: one.accepts(value) or other.accepts(value))


def one_of(*names: str) -> Argument:
    """One of some texts."""
    return Argument(f"one of {', '.join(names)}", lambda value: type(value) is str and value in names)


INT = Argument("an integer", lambda value: type(value) is int)
BOOL = Argument("true or false", lambda value: type(value) is bool)
FLOAT = Argument("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))
SHAPE = tuple_of(INT, *range(1, 9))


def build_leaf(cls: type[nn.Module], arguments: dict[str, Any], tensors: Tensors, children: Children) -> nn.Module:
    """On the meta device, so that an absurd size takes no memory before it is compared with its arrays."""
    if children:
        raise FileError(f"it has children ({[name for name, _ in children]!r:.100}), which its class has not")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's "Initializing zero-element tensors is a no-op"
        return cls(**arguments)


def attributes(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """Arguments that the module keeps under their own names."""
    return {name: getattr(module, name) for name in names}


@dataclass(frozen=True)
class Row:
    """One class: its constructor arguments, how they are read from a module, and how it is built from them."""

    cls: type[nn.Module]
    fields: Mapping[str, Argument]
    build: Build = build_leaf
    read: Callable[[nn.Module, Sequence[str]], dict[str, Any]] = attributes

    def arguments(self, module: nn.Module) -> dict[str, Any]:
        """JSON-ready arguments that give this module. Raises `FileError` where there are none."""
        return self.checked({name: _plain(value) for name, value in self.read(module, list(self.fields)).items()})

    def checked(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments from JSON, lists as tuples. Raises `FileError` on a missing, unknown or wrong one."""
        if set(data) != set(self.fields):
            missing, unknown = sorted(set(self.fields) - set(data)), sorted(set(data) - set(self.fields))
            raise FileError(f"arguments missing: {missing}; unknown: {unknown!r:.200}")
        arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        for name, value in arguments.items():
            if not self.fields[name].accepts(value):
                raise FileError(f"{name}={value!r:.200} must be {self.fields[name].words}")
        return arguments


def _plain(value: Any) -> Any:
    """Lists as tuples and numpy's scalars as Python's, as they would come from JSON."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value
