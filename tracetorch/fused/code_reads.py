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
_METHODS = (staticmethod, classmethod)


@lru_cache(512)
def users_own(module: str | None) -> bool:
    """Whether a module of this name is a user's own code: no installed package, none of the standard library."""
    root = (module or "").partition(".")[0]
    if not root or root in _TRUSTED or root in sys.stdlib_module_names - {"__main__"}:
        return False
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return not any(folder in file for folder in _INSTALLED)


@lru_cache(4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """The names that code, and what is defined within it, looks up outside itself."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


@lru_cache(4096)
def _globals(code: types.CodeType) -> frozenset[str]:
    """The names among them that are globals: `beta` itself, and not that of `self.beta`."""
    inner = [_globals(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    loads = (each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return frozenset(loads).union(*inner)


def globals_of(function: types.FunctionType) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The global names that a function of a user's own reads, each with the dictionary that has it.

    Of the modules among them, which are a user's own too, the names that the function could look up in them.
    """
    if not users_own(function.__module__):
        return
    names = sorted(_names(function.__code__))
    for name in sorted(_globals(function.__code__)):
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        yield name, function.__globals__
        if isinstance(value, types.ModuleType) and users_own(value.__name__):
            for within in names:
                if within in vars(value):
                    yield within, vars(value)


def attributes_of(kind: type) -> Iterator[tuple[type, str, Any]]:
    """What a class of a user's own and its bases have, but for what every class has."""
    for cls in kind.__mro__:
        if not users_own(cls.__module__):
            continue
        for name, value in vars(cls).items():
            if not (name.startswith("__") and name.endswith("__")) or name in ("__call__", "__getattr__"):
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
