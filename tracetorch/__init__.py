"""traceTorch: spiking networks, portable between frameworks, with proof of what stayed the same.

`import tracetorch as tt` needs torch and numpy alone. `tt.convert` forwards to `tracetorch.adapters`, which imports a
framework only once its layers are in hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tracetorch import functional, fused, snn
from tracetorch.core import (
    Model,
    NeuronSpec,
    Parameter,
    Sequential,
    SpecError,
    detach_states,
    load_states,
    reset_states,
    save_states,
    unroll,
)
from tracetorch.core.storage import FileError, load, save
from tracetorch.fused import backend

if TYPE_CHECKING:
    from tracetorch.adapters import convert

__version__ = "0.1.0.dev0"

__all__ = [
    "FileError",
    "Model",
    "NeuronSpec",
    "Parameter",
    "Sequential",
    "SpecError",
    "__version__",
    "backend",
    "convert",
    "detach_states",
    "functional",
    "fused",
    "load",
    "load_states",
    "reset_states",
    "save",
    "save_states",
    "snn",
    "unroll",
]


def __getattr__(name: str) -> Any:
    if name == "convert":
        from tracetorch.adapters import convert

        return convert
    raise AttributeError(f"module 'tracetorch' has no attribute {name!r}")
