"""Which frameworks there are. An adapter file is imported only once a layer of its framework is in hand."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, cast

from torch import nn

from tracetorch.adapters.base import Adapter
from tracetorch.core.spec import SpecError

# framework name -> (adapter module, the package whose classes betray a layer of it). A new framework is one new row.
_TABLE = {
    "tracetorch": ("tracetorch.adapters.native", "tracetorch"),
    "snntorch": ("tracetorch.adapters.snntorch", "snntorch"),
    "sinabs": ("tracetorch.adapters.sinabs", "sinabs"),
    "spikingjelly": ("tracetorch.adapters.spikingjelly", "spikingjelly"),
    "norse": ("tracetorch.adapters.norse", "norse"),
    "brainpy": ("tracetorch.adapters.brainpy", "brainpy"),
}
_PLANNED = ("nir",)

# Of which layers are converted, and no whole networks.
ALONE = ("spikingjelly", "norse")

FRAMEWORKS = tuple(_TABLE)

# extra -> the packages whose absence means that it is not installed, or not all of it; else the one of its own name.
_PACKAGES = {"brainpy": ("brainpy", "brainpy_state", "brainstate", "braintools", "brainunit", "saiunit", "jax")}


def imported(module: str, extra: str) -> ModuleType:
    """A module of this package that imports what the extra installs.

    Raises:
        ImportError: that is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _PACKAGES.get(extra, (extra,)):
            raise
        missing = extra if package == extra else f"{package}, which {extra} needs,"
        raise ImportError(
            f"{missing} is not installed in this environment; from the checkout: pip install -e '.[{extra}]'",
            name=package,
        ) from error


def adapter(name: str) -> Adapter:
    """The adapter of a framework.

    Raises:
        ValueError: an unknown framework, or one without an adapter in this version.
        ImportError: the framework is not installed; says how to install it.
    """
    if name in _PLANNED:
        raise ValueError(f"framework {name!r} has no adapter in this version; it has: {', '.join(FRAMEWORKS)}")
    if name not in _TABLE:
        raise ValueError(f"framework {name!r} is not known; known: {', '.join(FRAMEWORKS)}")
    return cast(Adapter, imported(_TABLE[name][0], name))


def is_brainstate(module: Any) -> bool:
    """Whether it is a module of brainstate, or a neuron of brainpy.state, which are no torch modules."""
    return "brainstate" in sys.modules and "brainstate" in {
        cls.__module__.split(".")[0] for cls in type(module).__mro__
    }


def framework_of(module: nn.Module) -> str | None:
    """The framework of a neuron layer, or None if it is no neuron layer of any framework known here."""
    packages = {cls.__module__.split(".")[0] for cls in type(module).__mro__}
    packages |= set(getattr(module, "stands_for", ()))  # a JaxStage around a neuron of brainpy
    for name, (_, package) in reversed(list(_TABLE.items())):
        if package in packages and adapter(name).is_neuron(module):
            return name
    return None


def adapter_of(module: nn.Module) -> Adapter:
    """The adapter of a neuron layer.

    Raises:
        SpecError: not a neuron layer of a known framework.
    """
    name = framework_of(module)
    if name is None:
        cls = type(module)
        raise SpecError(
            f"{cls.__module__}.{cls.__qualname__} is not a neuron layer of a framework known here "
            f"({', '.join(FRAMEWORKS)})"
        )
    return adapter(name)
