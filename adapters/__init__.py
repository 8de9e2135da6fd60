"""Adapters: any supported framework's neurons and networks, read into a spec and built from one.

A framework is imported only once one of its layers is in hand, or asked for as a target. `JaxStage` imports JAX, once
it is asked for.
"""

from typing import Any

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.conversion import Conversion
from tracetorch.adapters.convert import build, convert, spec
from tracetorch.adapters.fusing.fuse import FuseReport, FuseRow, fuse
from tracetorch.adapters.pipelines.pipeline import Pipeline
from tracetorch.adapters.pipelines.stage import stage
from tracetorch.adapters.registry import FRAMEWORKS
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


def __getattr__(name: str) -> Any:
    if name == "JaxStage":
        from tracetorch.adapters.jax.stage import JaxStage

        return JaxStage
    if name == "to_brainstate":
        from tracetorch.adapters.brainpy.network import to_brainstate

        return to_brainstate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
