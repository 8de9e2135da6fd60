"""traceTorch: spiking networks, portable between frameworks, with proof of what stayed the same.

`import tracetorch as tt` needs torch and numpy alone. `tt.convert` and `tt.fuse` forward to `tracetorch.adapters`,
which imports a framework only once its layers are in hand.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tracetorch import functional, fused, nn, plot, snn
from tracetorch.core import (
    Layer,
    Model,
    NeuronSpec,
    Parameter,
    Sequential,
    SpecError,
    TTcompile,
    TTdecompile,
    UnrollWarning,
    detach_states,
    load_states,
    reset_states,
    save_states,
    unroll,
    zero_states,
)
from tracetorch.core.checkpoint import checkpoint
from tracetorch.core.graph import Graph, Loop
from tracetorch.core.storage import FileError, load, save
from tracetorch.fused import backend

if TYPE_CHECKING:
    from tracetorch.adapters.convert import convert
    from tracetorch.adapters.fusing.fuse import fuse

__version__ = "0.1.0.dev0"

__all__ = [
    "FileError",
    "Graph",
    "Layer",
    "Loop",
    "Model",
    "NeuronSpec",
    "Parameter",
    "Sequential",
    "SpecError",
    "TTcompile",
    "TTdecompile",
    "UnrollWarning",
    "__version__",
    "backend",
    "checkpoint",
    "convert",
    "detach_states",
    "functional",
    "fuse",
    "fused",
    "load",
    "load_states",
    "nn",
    "plot",
    "reset_states",
    "save",
    "save_states",
    "snn",
    "unroll",
    "zero_states",
]


def __getattr__(name: str) -> Any:
    if name == "convert":
        from tracetorch.adapters import convert

        return convert
    if name == "fuse":
        from tracetorch.adapters import fuse

        return fuse
    if name in ("adapters", "conformance", "oracle"):
        return importlib.import_module(f"tracetorch.{name}")
    raise AttributeError(f"module 'tracetorch' has no attribute {name!r}")
