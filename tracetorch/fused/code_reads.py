"""What code reads that is no attribute of a layer: the globals of its functions, the attributes of its classes.

Only a user's own code is looked at. That of installed packages is taken not to change while it runs.
"""

from __future__ import annotations

import argparse
import dis
import sys
import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

# Not installed packages where they are imported from a checkout, and still nobody's own code.
_TRUSTED = frozenset({"torch", "numpy", "tracetorch"})
_INSTALLED = ("site-packages", "dist-packages")
# `beta` itself, and not that of `self.beta`; the last one is of Python 3.12 and later, where types have parameters.
_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_IMPORT = frozenset({"IMPORT_NAME"})
_METHODS = (staticmethod, classmethod)


@lru_cache(512)
def users_own(module: str | None) -> bool:
    """Whether a module of this name is a user's own code: no installed package, none of the standard library."""
    root = (module or "").partition(".")[0]
    if not root or root in _TRUSTED or root in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return not any(folder in file for folder in _INSTALLED)


@lru_cache(4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """The names that code, and what is defined within it, looks up outside itself."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


@lru_cache(4096)
def _named(code: types.CodeType, operations: frozenset[str]) -> frozenset[str]:
    """The names among them that these operations of the bytecode have."""
    inner = [_named(constant, operations) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(each.argval for each in dis.get_instructions(code) if each.opname in operations).union(*inner)


def globals_of(function: types.FunctionType) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The global names that a function of a user's own reads, each with the dictionary that has it.

    Of the modules among them and of those that it imports, which are a user's own too, and of the modules in these, the
    names that the function could look up in them.
    """
    if not users_own(function.__module__):
        return
    modules: list[Any] = [sys.modules.get(name) for name in sorted(_named(function.__code__, _IMPORT))]
    for name in sorted(_named(function.__code__, _GLOBAL)):
        if name in function.__globals__:
            modules.append(function.__globals__[name])
            yield name, function.__globals__
    names, seen = sorted(_names(function.__code__)), set()
    while modules:
        module = modules.pop()
        if not isinstance(module, types.ModuleType) or id(module) in seen or not users_own(module.__name__):
            continue
        seen.add(id(module))
        for name in names:
            if name in vars(module):
                modules.append(vars(module)[name])
                yield name, vars(module)


def attributes_of(kind: type) -> Iterator[tuple[type, str, Any]]:
    """What a class of a user's own and its bases have, but for what every class has."""
    for cls in kind.__mro__:
        if not users_own(cls.__module__):
            continue
        for name, value in vars(cls).items():
            if not (name.startswith("__") and name.endswith("__")) or isinstance(value, types.FunctionType):
                yield cls, name, value


def is_data(value: Any) -> bool:
    """Whether an object is one whose attributes are read: of a user's own class, or a plain namespace."""
    plain = isinstance(value, (types.SimpleNamespace, argparse.Namespace))
    return hasattr(value, "__dict__") and (plain or users_own(type(value).__module__))


def function_of(value: Any) -> Any:
    """The function behind a class's attribute, or the attribute."""
    if isinstance(value, _METHODS):
        return value.__func__
    return value.fget if isinstance(value, property) else value
