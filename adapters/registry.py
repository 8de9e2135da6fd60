"""Which frameworks there are. An adapter file is imported only once a layer of its framework is in hand."""

from __future__ import annotations

import importlib
from typing import cast

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
    try:
        return cast(Adapter, importlib.import_module(_TABLE[name][0]))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != _TABLE[name][1]:
            raise
        raise ImportError(
            f"{name} is not installed in this environment; from the checkout: pip install -e '.[{name}]'", name=name
        ) from error


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
