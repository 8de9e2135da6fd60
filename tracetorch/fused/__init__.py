"""The engine: a step traced into a graph, the graph rendered as a kernel, the kernel run over a whole sequence."""

from tracetorch.fused import memory
from tracetorch.fused.compiler import CompilerError
from tracetorch.fused.executor import BackendError, FuseWarning, backend
from tracetorch.fused.graph import Graph, GraphError, evaluate, verify
from tracetorch.fused.layers import FuseError, source
from tracetorch.fused.trace import Traced, trace

__all__ = [
    "BackendError",
    "CompilerError",
    "FuseError",
    "FuseWarning",
    "Graph",
    "GraphError",
    "Traced",
    "backend",
    "evaluate",
    "memory",
    "source",
    "trace",
    "verify",
]
