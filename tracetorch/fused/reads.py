"""What a step can read from its layer: every tensor within reach, and every Python value, by path.

A layer's attributes are walked through containers, configuration objects, functions' closures and submodules. Tensors
become inputs of the traced step; everything else is the guard: a kernel serves as long as its guard is unchanged.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout, type(...)}
)
_TENSORS = frozenset({Tensor, nn.Parameter, nn.Buffer}) if hasattr(nn, "Buffer") else frozenset({Tensor, nn.Parameter})
# Of every `nn.Module`, and no part of any step: hooks, and what torch keeps for itself.
_INTERNAL = frozenset(
    name for name in vars(nn.Module()) if name not in ("training", "_parameters", "_buffers", "_modules")
) | {"_version", "__dict__", "__weakref__"}


class Same:
    """An object as a part of a guard: equal to itself alone. Keeps it alive, so that its identity stays its own."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"Same({self.value!r})"


@dataclass(frozen=True)
class Reads:
    """What was found.

    Attributes:
        tensors: floating point and integer tensors by path, each once.
        constants: integer and boolean tensors of one element, whose values are part of the guard.
        guard: hashable; equal as long as no Python value, no constant and no tensor's shape or dtype changed.
        odd: why a step of this layer cannot be traced at all, or "".
        seen: what `unchanged` compares: dictionaries and lists with their contents, cells, functions, tensors.
    """

    tensors: Mapping[str, Tensor]
    constants: tuple[Tensor, ...]
    guard: tuple[Any, ...]
    odd: str
    seen: _Seen

    def unchanged(self) -> bool:
        """Whether walking again would find the same: quick, and False where in doubt."""
        return self.seen.unchanged()


# A dictionary, the keys whose values may change, all keys, and the items that may not.
_Mapping = tuple[Mapping[Any, Any], frozenset[str], list[Any], list[tuple[Any, Any]]]


@dataclass
class _Seen:
    """Everything mutable that a walk went through, and what was in it, by identity."""

    dicts: list[_Mapping] = field(default_factory=list)
    lists: list[tuple[list[Any], list[Any]]] = field(default_factory=list)
    cells: list[tuple[Any, Any]] = field(default_factory=list)
    functions: list[tuple[types.FunctionType, Any, Any, Any]] = field(default_factory=list)
    tensors: list[tuple[Tensor, torch.dtype, torch.Size]] = field(default_factory=list)
    constants: list[tuple[Tensor, Any]] = field(default_factory=list)
    doubtful: bool = False  # something whose contents cannot be compared quickly

    def mapping(self, value: Mapping[Any, Any], skip: frozenset[str] = frozenset()) -> None:
        """Remember a dictionary, of which the values of some keys may change."""
        self.dicts.append((value, skip, list(value), [item for item in value.items() if item[0] not in skip]))

    def unchanged(self) -> bool:
        if self.doubtful:
            return False
        for mapping, skip, keys, items in self.dicts:
            now = list(mapping)
            # What a call changes may come and go; the rest has to be the same, in the same order.
            if now != keys and [key for key in now if key not in skip] != [key for key, _ in items]:
                return False
            for key, value in items:
                if mapping[key] is not value:
                    return False
        for seen, content in self.lists:
            if len(seen) != len(content) or not all(map(is_, seen, content)):
                return False
        for cell, content in self.cells:
            if _content(cell) is not content:
                return False
        for f, code, defaults, named in self.functions:
            if f.__code__ is not code or f.__defaults__ is not defaults or f.__kwdefaults__ is not named:
                return False
        for tensor, dtype, shape in self.tensors:
            if tensor.dtype is not dtype or tensor.shape != shape:
                return False
        return not self.constants or all(tensor.item() == value for tensor, value in self.constants)


class _Walk:
    def __init__(self, skip: Sequence[str]) -> None:
        self.skip = frozenset(skip)
        self.tensors: dict[str, Tensor] = {}
        self.constants: list[Tensor] = []
        self.guard: list[Any] = []
        self.seen: dict[int, str] = {}
        self.kept = _Seen()
        self.odd = ""

    def visit(self, path: str, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            # nan is unequal to itself, and 1 == True == 1.0
            self.guard.append((path, kind, value if value == value else repr(value)))
            return
        if id(value) in self.seen:
            self.guard.append((path, self.seen[id(value)]))
            return
        self.seen[id(value)] = path
        if isinstance(value, Tensor):
            self._tensor(path, value)
        elif isinstance(value, nn.Module):
            self._module(path, value)
        elif isinstance(value, Mapping):
            self._remember(value)
            self.guard.append((path, kind, len(value)))
            for name, item in value.items():
                self.visit(f"{path}.{name}" if isinstance(name, str) else f"{path}[{name!r}]", item)
        elif isinstance(value, (list, tuple)):
            if isinstance(value, list):
                self.kept.lists.append((value, list(value)))
            self.guard.append((path, kind, len(value)))
            fields = getattr(value, "_fields", range(len(value)))
            for name, item in zip(fields, value, strict=True):
                self.visit(f"{path}.{name}", item)
        else:
            self._object(path, value)

    def _remember(self, value: Mapping[Any, Any]) -> None:
        if type(value) in (dict, OrderedDict):
            self.kept.mapping(value)
        else:
            self.kept.doubtful = True

    def _tensor(self, path: str, value: Tensor) -> None:
        self.kept.tensors.append((value, value.dtype, value.shape))
        if type(value) not in _TENSORS or value.layout is not torch.strided or value.is_complex():
            self.odd = self.odd or f"{path} is a {type(value).__name__} ({value.dtype}, {value.layout})"
            return
        if value.is_floating_point() or (value.numel() != 1 and value.dtype is not torch.bool):
            self.tensors[path] = value
            self.guard.append((path, value.dtype, value.shape))
            return
        if value.numel() != 1:
            self.odd = self.odd or f"{path} is a tensor of {value.dtype}"
            return
        self.constants.append(value)
        self.kept.constants.append((value, value.item()))
        self.guard.append((path, value.dtype, value.shape, value.item()))

    def _module(self, path: str, module: nn.Module) -> None:
        self.guard.append((path, type(module)))
        within = f"{path}." if path else ""
        skip = frozenset() if path else self.skip
        self.kept.mapping(vars(module), skip | _INTERNAL)
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                self.kept.mapping(value, skip)
                for own, item in value.items():
                    if path or own not in self.skip:
                        self.visit(within + own, item)
            elif name not in _INTERNAL and (path or name not in self.skip):
                self.visit(within + name, value)

    def _object(self, path: str, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self.guard.append((path, Same(value.__code__)))
            self.kept.functions.append((value, value.__code__, value.__defaults__, value.__kwdefaults__))
            self.kept.cells += [(cell, _content(cell)) for cell in value.__closure__ or ()]
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                self.visit(f"{path}.{name}", _content(cell))
            for k, default in enumerate((*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())):
                self.visit(f"{path}.default{k}", default)
        elif isinstance(value, types.MethodType):
            self.visit(f"{path}.function", value.__func__)
            self.visit(f"{path}.self", value.__self__)
        elif isinstance(value, partial):
            for name in ("func", "args", "keywords"):
                self.visit(f"{path}.{name}", getattr(value, name))
        elif isinstance(value, type) or not hasattr(value, "__dict__"):
            self.guard.append((path, Same(value)))
            slots = [] if isinstance(value, type) else _slots(type(value))
            self.kept.doubtful = self.kept.doubtful or bool(slots)
            for name in slots:
                self.visit(f"{path}.{name}", getattr(value, name, None))
        else:
            self.guard.append((path, type(value)))
            self._remember(vars(value))
            for name, item in vars(value).items():
                self.visit(f"{path}.{name}", item)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for cls in kind.__mro__:
        slots = vars(cls).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def read(layer: nn.Module, skip: Sequence[str] = ()) -> Reads:
    """Walk a layer.

    Args:
        layer: whose step it is.
        skip: names of its attributes that a call changes: states, recordings.
    """
    walk = _Walk(skip)
    walk.visit("", layer)
    return Reads(walk.tensors, tuple(walk.constants), tuple(walk.guard), walk.odd, walk.kept)


def duplicate(layer: nn.Module, skip: Sequence[str], replaced: Callable[[Tensor], Tensor], reads: Reads) -> nn.Module:
    """A copy of a layer to trace on, without the attributes in `skip`, each tensor of `reads` replaced by another.

    Configuration objects are copied with it, so that nothing the step does to them reaches the layer.
    """
    import copy

    twin = object.__new__(type(layer))
    memo: dict[int, Any] = {id(layer): twin}
    memo |= {id(tensor): replaced(tensor) for tensor in reads.tensors.values()}
    memo |= {id(tensor): tensor for tensor in reads.constants}
    attributes: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if name in ("_parameters", "_buffers", "_modules"):
            attributes[name] = {k: copy.deepcopy(v, memo) for k, v in value.items() if k not in skip}
        elif name in _INTERNAL:
            attributes[name] = type(value)() if isinstance(value, (dict, set)) else value
        elif name not in skip:
            attributes[name] = copy.deepcopy(value, memo)
    twin.__dict__.update(attributes)
    return twin
