"""A copy of a tree of modules that shares its tensors, with a twin in the place of every neuron that is fused."""

from __future__ import annotations

import copy
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracetorch.adapters.fusing.twin import OWN, Twin, twin_class
from tracetorch.core.layer import Layer

# What a copy begins without: kernels, the report, and what `Module.compile` made, which calls the original.
_LEFT_OUT = frozenset({*OWN, "_compiled_call_impl"})
# How deep a value is searched for a module of the tree, and copied: data lies deeper, and is shared.
_SEARCHED, _COPIED = 4, 6


class Tree:
    """Copies a tree of modules: new modules, the same tensors, attributes that refer to modules made to follow."""

    def __init__(self) -> None:
        self.shells: dict[int, nn.Module] = {}
        self.originals: dict[int, nn.Module] = {}
        self.copies: dict[int, Any] = {}
        self.alive: list[Any] = []

    def plan(self, module: nn.Module, mixin: type[Twin] | None) -> None:
        """Make the new object, still empty."""
        self.originals[id(module)] = module
        if isinstance(module, torch.jit.ScriptModule):
            self.shells[id(module)] = module
            return
        cls = type(module) if mixin is None else twin_class(mixin, type(module))
        self.shells[id(module)] = object.__new__(cls)

    def build(self, root: nn.Module) -> nn.Module:
        """Fill all of them; returns the copy of `root`."""
        for key, shell in self.shells.items():
            original = self.originals[key]
            if shell is not original:
                # A native layer's copy begins without kernels and with states of its own.
                found = original.__getstate__() if isinstance(original, Layer) else vars(original)
                shell.__dict__.update({k: self.copied(v) for k, v in found.items() if k not in _LEFT_OUT})
        return self.shells[id(root)]

    def copied(self, value: Any, depth: int = 0) -> Any:
        """An attribute's value: containers anew, what refers to a module of the tree made to refer to its copy."""
        if id(value) in self.shells:
            return self.shells[id(value)]
        if isinstance(value, (Tensor, nn.Module, type, str, int, float)) or value is None or depth > _COPIED:
            return value
        if id(value) in self.copies:
            return self.copies[id(value)]
        result = self._copied(value, depth)
        self.alive.append(value)
        self.copies[id(value)] = result
        return result

    def _copied(self, value: Any, depth: int) -> Any:
        twin: Any
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.copied(value.__self__, depth + 1))
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, partial):
            inner = [self.copied(part, depth + 1) for part in (value.func, value.args, value.keywords)]
            return partial(inner[0], *inner[1], **inner[2])
        if type(value) in (dict, OrderedDict, defaultdict):
            twin = copy.copy(value)
            twin.clear()
            for key, item in value.items():
                twin[self.shells.get(id(key), key)] = self.copied(item, depth + 1)
            return twin
        if type(value) in (list, deque, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            items = [self.copied(item, depth + 1) for item in value]
            if isinstance(value, tuple):
                same = all(a is b for a, b in zip(items, value, strict=True))
                return value if same else type(value)(*items) if hasattr(value, "_fields") else tuple(items)
            twin = copy.copy(value)
            twin.clear()
            twin.extend(items)
            return twin
        if type(value) in (set, frozenset):
            return type(value)(self.shells.get(id(item), item) for item in value)
        if isinstance(value, weakref.ref):
            return weakref.ref(self.shells[id(value())]) if id(value()) in self.shells else value
        if isinstance(value, RemovableHandle):
            return self._handle(value)
        return self._object(value, depth)

    def _handle(self, handle: RemovableHandle) -> RemovableHandle:
        """What removes a hook of the tree removes the copy's instead: lazy modules and Norse's networks keep such."""
        hooks, number, extra = handle.__getstate__()
        if not any(hooks is own for module in self.originals.values() for own in vars(module).values()):
            return handle
        twin = copy.copy(handle)
        twin.__setstate__((self.copied(hooks), number, self.copied(extra)))
        return twin

    def _function(self, function: types.FunctionType, depth: int) -> Any:
        """A function whose closure or defaults refer to a module of the tree refers to its copy instead."""
        if not self._refers(function):
            return function

        def followed(value: Any) -> Any:
            return self.copied(value, depth + 1) if self._refers(value) else value

        cells = []
        for cell in function.__closure__ or ():
            old = _content(cell)
            new = followed(old)
            cells.append(cell if new is old else types.CellType(new))
        defaults = followed(function.__defaults__)
        twin = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, defaults, tuple(cells) or None
        )
        twin.__kwdefaults__ = followed(function.__kwdefaults__)
        twin.__dict__.update(function.__dict__)
        return twin

    def _object(self, value: Any, depth: int) -> Any:
        """Any other object is shared, unless one of its attributes refers to a module of the tree."""
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict) or not any(self._refers(item) for item in attributes.values()):
            return value
        twin = copy.copy(value)
        self.copies[id(value)] = twin
        twin.__dict__.update({name: self.copied(item, depth + 1) for name, item in attributes.items()})
        return twin

    def _refers(self, value: Any, depth: int = 0) -> bool:
        """Whether a module of the tree is within reach of a value."""
        if id(value) in self.shells:
            return True
        if depth > _SEARCHED:
            return False
        inner: Iterable[Any] = ()
        if isinstance(value, types.MethodType):
            inner = (value.__self__,)
        elif isinstance(value, types.FunctionType):
            cells = [_content(cell) for cell in value.__closure__ or ()]
            inner = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        elif isinstance(value, partial):
            inner = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, Mapping):
            inner = (*value.keys(), *value.values())
        elif isinstance(value, weakref.ref):
            inner = (value(),)
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            inner = value
        return any(self._refers(item, depth + 1) for item in inner)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None
