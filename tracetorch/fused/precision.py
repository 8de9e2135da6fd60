"""Whether a kernel of float64 computes what torch does where torch has float32 among float64."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch

from tracetorch.fused.emit_c import ROUNDED_TWICE
from tracetorch.fused.graph import Graph, GraphError, Ref


def refuse_rounding(graph: Graph, known_floats: Set[str]) -> None:
    """Raise `GraphError` for arithmetic in float32 that a kernel, which has float64 throughout, would round otherwise.

    Args:
        graph: of a step whose input is float64.
        known_floats: inputs of float32 whose values are of float32 indeed.
    """
    known = _exact_in_float32(graph, known_floats)
    for k, node in enumerate(graph.nodes):
        if node.dtype is torch.float32 and len(graph.inputs) + k not in known:
            raise GraphError(f"{node.op} computes in float32 on an input of float64, and rounds")


def _exact_in_float32(graph: Graph, known_floats: Set[str]) -> dict[int, str]:
    """Values that a float64 kernel may hold where torch has float32, as float32 holds them too: "binary" (0 or 1),
    "whole" (small integers) or "float" (a parameter of float32). Products with a binary value are exact."""
    n = len(graph.inputs)
    known = {
        k: "float" for k, (name, dtype) in enumerate(graph.inputs) if dtype is torch.float32 and name in known_floats
    }

    def kind(argument: Any) -> str:
        if isinstance(argument, Ref):
            return "binary" if graph.dtype(argument) is torch.bool else known.get(argument.index, "")
        return "binary" if argument in (0, 1) else "whole" if float(argument).is_integer() else "float"

    for k, node in enumerate(graph.nodes):
        if node.dtype is torch.bool:
            continue
        if node.op == "cast":
            known[n + k] = "float"  # the kernel rounds
            given = node.args[0]
            if isinstance(given, Ref):
                known[n + k] = "binary" if graph.dtype(given) is torch.bool else known.get(given.index, "float")
            continue
        kinds = [kind(argument) for argument in (node.args[1:] if node.op == "where" else node.args)]
        if node.op in ("floor", "ceil", "trunc", "round", "sign"):
            known[n + k] = "whole"
        elif node.op == "mul" and "binary" in kinds and all(kinds):
            known[n + k] = kinds[1 - kinds.index("binary")]
        elif node.op in ("mul", "add", "sub") and set(kinds) <= {"binary", "whole"}:
            known[n + k] = "binary" if node.op == "sub" and node.args[0] == 1 and kinds[1] == "binary" else "whole"
        elif node.op in ROUNDED_TWICE and all(kinds):
            known[n + k] = "float"  # the kernel rounds
        elif node.op in ("neg", "abs", "where", "minimum", "maximum", "full_like") and all(kinds):
            known[n + k] = next((each for each in ("float", "whole") if each in kinds), "binary")
    return known
