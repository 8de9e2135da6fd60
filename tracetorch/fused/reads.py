"""What a step can read from its layer: every tensor within reach, and every Python value, by path.

A layer's attributes are walked through containers, configuration objects, functions' closures and submodules, and the
user's own classes and functions through their attributes and globals. Tensors become inputs of the traced step;
everything else is the guard: a kernel serves as long as its guard is unchanged.
"""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracetorch.fused.code_reads import attributes_of, function_of, globals_of, is_data, users_own

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
    lists: list[tuple[Any, list[Any]]] = field(default_factory=list)
    cells: list[tuple[Any, Any]] = field(default_factory=list)
    functions: list[tuple[types.FunctionType, Any, Any, Any]] = field(default_factory=list)
    tensors: list[tuple[Tensor, torch.dtype, torch.Size]] = field(default_factory=list)
    constants: list[tuple[Tensor, int, Any]] = field(default_factory=list)
    arrays: list[tuple[Any, Any]] = field(default_factory=list)
    names: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list)  # of globals and of classes
    default: torch.dtype = field(default_factory=torch.get_default_dtype)
    doubtful: bool = False  # something whose contents cannot be compared quickly

    def mapping(self, value: Mapping[Any, Any], skip: frozenset[str] = frozenset()) -> None:
        """Remember a dictionary, of which the values of some keys may change."""
        self.dicts.append((value, skip, list(value), [item for item in value.items() if item[0] not in skip]))

    def unchanged(self) -> bool:
        if self.doubtful or torch.get_default_dtype() is not self.default:
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
        for scope, name, content in self.names:
            if scope.get(name) is not content:
                return False
        for array, content in self.arrays:
            if _bytes(array) != content:
                return False
        for tensor, dtype, shape in self.tensors:
            if tensor.dtype is not dtype or tensor.shape != shape:
                return False
        return not self.constants or all(_holds(*constant) for constant in self.constants)


def _writes(tensor: Tensor) -> int:
    """How often a tensor on a GPU was written to, as far as torch counts; else -1.

    Reading a value there waits for all of the GPU's work, and no CUDA graph captures it. Writes through `.data` are not
    counted: a layer's configuration is not to be changed in that way.
    """
    return tensor._version if not (tensor.is_cpu or tensor.is_inference()) else -1


def _holds(tensor: Tensor, writes: int, value: Any) -> bool:
    """Whether a constant has its value still."""
    return _writes(tensor) == writes >= 0 or bool(tensor.item() == value)


class _Walk:
    def __init__(self, skip: Sequence[str]) -> None:
        self.skip = frozenset(skip)
        self.tensors: dict[str, Tensor] = {}
        self.constants: list[Tensor] = []
        self.guard: list[Any] = []
        self.seen: dict[int, str] = {}
        self.classes: set[int] = set()
        self.outer: set[int] = set()
        self.kept = _Seen()
        self.odd = ""

    def visit(self, path: str, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            # nan is unequal to itself, and 1 == True == 1.0
            self.guard.append((path, kind, value if value == value else repr(value)))
            return
        if not self._new(path, value):
            return
        if isinstance(value, Tensor):
            self._tensor(path, value)
        elif isinstance(value, nn.Module):
            self._module(path, value)
        elif isinstance(value, Mapping):
            self._remember(value)
            self.guard.append((path, kind, len(value)))
            for name, item in value.items():
                self.visit(f"{path}.{name}" if isinstance(name, str) else f"{path}[{name!r}]", item)
        elif isinstance(value, (np.ndarray, set, bytearray)):
            self.kept.arrays.append((value, _bytes(value)))
            self.guard.append((path, kind, _bytes(value)))
        elif isinstance(value, (list, tuple, deque)):
            if not isinstance(value, tuple):
                self.kept.lists.append((value, list(value)))
            self.guard.append((path, kind, len(value)))
            fields = getattr(value, "_fields", range(len(value)))
            for name, item in zip(fields, value, strict=True):
                self.visit(f"{path}.{name}", item)
        else:
            self._object(path, value)

    def _new(self, path: str, value: Any) -> bool:
        """Whether it was not met before; else the guard notes where."""
        if id(value) in self.seen:
            self.guard.append((path, self.seen[id(value)]))
            return False
        self.seen[id(value)] = path
        return True

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
        self.kept.constants.append((value, _writes(value), value.item()))
        self.guard.append((path, value.dtype, value.shape, value.item()))

    def _module(self, path: str, module: nn.Module) -> None:
        self.guard.append((path, type(module)))
        self._class(type(module))
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
            self._function(path, value, self.visit)
        elif isinstance(value, types.MethodType):
            self.visit(f"{path}.function", value.__func__)
            self.visit(f"{path}.self", value.__self__)
        elif isinstance(value, partial):
            for name in ("func", "args", "keywords"):
                self.visit(f"{path}.{name}", getattr(value, name))
        elif isinstance(value, type) or not hasattr(value, "__dict__"):
            self.guard.append((path, Same(value)))
            self._class(value if isinstance(value, type) else type(value))
            slots = [] if isinstance(value, type) else _slots(type(value))
            self.kept.doubtful = self.kept.doubtful or bool(slots)
            for name in slots:
                self.visit(f"{path}.{name}", getattr(value, name, None))
        else:
            self.guard.append((path, type(value)))
            self._class(type(value))
            self._remember(vars(value))
            for name, item in vars(value).items():
                self.visit(f"{path}.{name}", item)

    def _function(self, path: str, value: types.FunctionType, visit: Callable[[str, Any], object]) -> None:
        """A function; `visit` takes what its closure holds."""
        self.guard.append((path, Same(value.__code__)))
        self.kept.functions.append((value, value.__code__, value.__defaults__, value.__kwdefaults__))
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if visit(f"{path}.{name}", _content(cell)) is not False:
                self.kept.cells.append((cell, _content(cell)))
        for k, default in enumerate((*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())):
            self.visit(f"{path}.default{k}", default)
        for name, scope in globals_of(value):
            if self._outside(f"{path}.global {name}", scope[name]):
                self.kept.names.append((scope, name, scope[name]))

    def _class(self, kind: type) -> None:
        """What the functions of a class can read of it, and outside it."""
        if id(kind) in self.classes:
            return
        self.classes.add(id(kind))
        for cls, name, value in attributes_of(kind):
            if self._outside(f"{cls.__qualname__}.{name}", function_of(value)):
                self.kept.names.append((vars(cls), name, value))

    def _outside(self, path: str, value: Any) -> bool:
        """Visit what is no part of a layer. False: a module of Python or a tensor, which the tracer looks at."""
        if isinstance(value, (types.ModuleType, Tensor)):
            return False
        if isinstance(value, nn.Module):
            self._outer(path, value)
        elif type(value) in _PLAIN or _flat(value):
            self.visit(path, value)
        elif isinstance(value, types.FunctionType) and users_own(value.__module__):
            if self._new(path, value):
                self._function(path, value, self._outside)
        elif isinstance(value, type) and users_own(value.__module__):
            self.visit(path, value)
        elif type(value) in (dict, OrderedDict, list, tuple) or is_data(value):
            if self._new(path, value):
                self._contents(path, value)
        else:
            self.guard.append((path, Same(value)))
        return True

    def _outer(self, path: str, value: nn.Module) -> None:
        """The plain values of a module outside a layer; its tensors are the tracer's to refuse.

        Not by `_new`: the same module may be a part of the layer, and its tensors then inputs of the kernel.
        """
        for within, module in value.named_modules(prefix=path):
            if id(module) in self.outer:
                continue
            self.outer.add(id(module))
            self.guard.append((within, type(module)))
            self._class(type(module))
            held = vars(module)
            for name, item in list(held.items()):
                if type(item) in _PLAIN:
                    self.visit(f"{within}.{name}", item)
                    self.kept.names.append((held, name, item))

    def _contents(self, path: str, value: Any) -> None:
        """What a container or an object outside a layer holds."""
        if isinstance(value, (list, tuple)):
            items: Any = enumerate(value)
            if isinstance(value, list):
                self.kept.lists.append((value, list(value)))
        else:
            held = value if isinstance(value, dict) else vars(value)
            if held is not value:
                self._class(type(value))
            self._remember(held)
            items = held.items()
        self.guard.append((path, type(value)))
        for name, item in list(items):
            self._outside(f"{path}.{name}", item)


def _flat(value: Any) -> bool:
    """Whether it is a container of plain values alone, or an array."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(type(item) in _PLAIN for item in value)
    return isinstance(value, np.ndarray)


def _bytes(value: Any) -> Any:
    """What an array or a set holds, hashable."""
    if isinstance(value, set):
        return frozenset((type(item), item) for item in value)
    return (value.shape, value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else bytes(value)


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
    walk.guard.append(("default dtype", walk.kept.default))
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
