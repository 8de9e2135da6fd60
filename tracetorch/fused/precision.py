"""Whether a kernel of float64 computes what torch does where torch has float32 among float64."""

from __future__ import annotations

from collections.abc import Set

import torch

from tracetorch.fused.emit_c import ROUNDED_TWICE
from tracetorch.fused.graph import Graph, GraphError, Ref

# Of values of float32 these give one that float32 holds too, whatever they are computed in.
_EXACT = frozenset(
    {"neg", "abs", "sign", "floor", "ceil", "trunc", "round", "where", "minimum", "maximum", "full_like"}
)


def refuse_rounding(graph: Graph, known_floats: Set[str]) -> None:
    """Raise `GraphError` for arithmetic in float32 that a kernel, which has float64 throughout, would round otherwise.

    Args:
        graph: of a step whose input is float64.
        known_floats: inputs of float32 whose values are of float32 indeed.
    """
    unknown = {k for k, (name, kind) in enumerate(graph.inputs) if kind is torch.float32 and name not in known_floats}
    for node in graph.nodes:
        if node.dtype is not torch.float32:
            continue
        doubtful = any(isinstance(argument, Ref) and argument.index in unknown for argument in node.args)
        if doubtful or node.op not in ROUNDED_TWICE | _EXACT:
            raise GraphError(f"{node.op} computes in float32 on an input of float64, and rounds")
