"""Adapters: any supported framework's neurons and networks, read into a spec and built from one.

A framework is imported only once one of its layers is in hand, or asked for as a target.
"""

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.convert import Conversion, build, convert, spec
from tracetorch.adapters.fuse import FuseReport, FuseRow, fuse
from tracetorch.adapters.registry import FRAMEWORKS
from tracetorch.adapters.report import Agreement, LayerRow, Report

__all__ = [
    "FRAMEWORKS",
    "Agreement",
    "Conversion",
    "ConversionError",
    "FuseReport",
    "FuseRow",
    "LayerRow",
    "Report",
    "build",
    "convert",
    "fuse",
    "spec",
]
