"""Adapters: any supported framework's neurons and networks, read into a spec and built from one.

A framework is imported only once one of its layers is in hand, or asked for as a target. `JaxStage` imports JAX, once
it is asked for, and `adapters.sinabs`, `adapters.snntorch` and so on, what is special to a framework, that framework.
"""

from typing import Any

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.conversion import Conversion
from tracetorch.adapters.convert import build, convert, spec
from tracetorch.adapters.fusing.fuse import FuseReport, FuseRow, fuse
from tracetorch.adapters.pipelines.pipeline import Pipeline
from tracetorch.adapters.pipelines.stage import stage
from tracetorch.adapters.registry import FRAMEWORKS, adapter, imported
from tracetorch.adapters.report import Agreement, LayerRow, Report
from tracetorch.adapters.stateful import SeamError

__all__ = [
    "FRAMEWORKS",
    "Agreement",
    "Conversion",
    "ConversionError",
    "FuseReport",
    "FuseRow",
    "JaxStage",
    "LayerRow",
    "Pipeline",
    "Report",
    "SeamError",
    "build",
    "convert",
    "fuse",
    "spec",
    "stage",
    "to_brainstate",
]


# name -> the module that has it, the extra that this needs
_LATE = {
    "JaxStage": ("tracetorch.adapters.jax.stage", "brainpy"),
    "to_brainstate": ("tracetorch.adapters.brainpy.network", "brainpy"),
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(imported(*_LATE[name]), name)
    if name in FRAMEWORKS and name != "tracetorch":
        return adapter(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
