"""Numbers of a plan that change with the shape of the input, found by recording a second shape."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tracetorch.adapters.networks.graphs import Part, Plan, refusal
from tracetorch.adapters.networks.recording import NoGraph
from tracetorch.core.graph import Node, Size, leaves, rewrite


def generalised(plan: Plan, other: Plan, shapes: Mapping[str, tuple[torch.Size, torch.Size]]) -> Plan:
    """The plan with every number that changes with the input's shape as a `Size`.

    Args:
        plan, other: of the same network, recorded on inputs of different shapes.
        shapes: for "before", "step" and "after", the shapes of the part's first input in both recordings.

    Raises:
        ConversionError: the two differ in anything else.
    """
    parts: dict[str, Any] = {}
    for name in ("before", "step", "after"):
        mine, theirs = getattr(plan, name), getattr(other, name)
        if (mine is None) != (theirs is None):
            raise _depends("the input's shape")
        parts[name] = None if mine is None else _merged(mine, theirs, *shapes[name])
    if plan.cuts != other.cuts:
        raise _depends("the input's shape")
    return replace(plan, **parts)


def _depends(what: str) -> NoGraph:
    return refusal(
        "",
        "forward",
        what,
        "its calls change with the shape of the input or the number of steps",
        "a forward that makes the same calls for every batch size and length",
    )


def _merged(mine: Part, theirs: Part, a: torch.Size, b: torch.Size) -> Part:
    mine_tree = ([(n.name, n.kind, n.args, dict(n.kwargs)) for n in mine.nodes], mine.output)
    their_tree = ([(n.name, n.kind, n.args, dict(n.kwargs)) for n in theirs.nodes], theirs.output)
    left, right = list(leaves(mine_tree)), list(leaves(their_tree))
    same = [n.target for n in mine.nodes] == [n.target for n in theirs.nodes]
    if not same or len(left) != len(right) or mine.inputs != theirs.inputs:
        raise _depends("other calls")
    merged = iter([_number(x, y, a, b) for x, y in zip(left, right, strict=True)])
    nodes, output = rewrite(mine_tree, lambda leaf: next(merged))
    made = [
        Node(name, kind, old.target, args, kwargs)
        for (name, kind, args, kwargs), old in zip(nodes, mine.nodes, strict=True)
    ]
    return Part(mine.inputs, tuple(made), output)


def _number(x: Any, y: Any, a: torch.Size, b: torch.Size) -> Any:
    if type(x) is type(y) and (x is y or bool(x == y)):
        return x
    if type(x) is int and type(y) is int:
        for dim in range(len(a)):
            if (a[dim], b[dim]) == (x, y):
                return Size(dim)
        for dim, times in itertools.combinations(range(len(a)), 2):
            if (a[dim] * a[times], b[dim] * b[times]) == (x, y):
                return Size(dim, times)
    raise _depends(f"{x!r} for one shape, {y!r} for another")
