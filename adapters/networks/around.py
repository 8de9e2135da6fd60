"""The parts of a plan without neurons: what is done before and after the time steps."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tracetorch.adapters.networks.graphs import Builder, Names, Part, live, refusal
from tracetorch.adapters.networks.recording import Event, Held, In, Out, Tape
from tracetorch.adapters.networks.rolling import Steps
from tracetorch.core.graph import Node, Ref, leaves, rewrite


def around(
    builder: Builder, events: Sequence[tuple[int, Event, Any, Any]], known: Mapping[Any, Any], want: Any
) -> Part:
    """A part without neurons: the events that `want` needs, from `known` values."""
    inputs = tuple(dict.fromkeys(v.name for v in known.values() if isinstance(v, Ref)))
    names, nodes, values = Names(*inputs), list[Node](), dict(known)

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Held):
            return builder.held_node(names, nodes, values, leaf)
        if isinstance(leaf, Steps):
            return steps_of(leaf)
        if not isinstance(leaf, (In, Out)):
            return leaf
        if leaf in values:
            return values[leaf]
        if isinstance(leaf, Out) and leaf.path:
            whole = value(Out(leaf.event, leaf.path[:-1]))
            nodes.append(Node(names.new("getitem"), "function", operator.getitem, (whole, leaf.path[-1])))
            values[leaf] = Ref(nodes[-1].name)
            return values[leaf]
        raise refusal(
            "", "forward", repr(leaf), "what is done after the loop uses a value from before it", "report this"
        )

    def steps_of(leaf: Steps) -> Any:
        whole = values[replace(leaf, last=False)]
        if leaf not in values or not leaf.last:
            node = (
                Node(names.new("last"), "function", operator.getitem, (whole, -1))
                if leaf.last
                else Node(names.new("steps"), "method", "unbind", (whole, 0))
            )
            nodes.append(node)
            values[("listed", leaf)] = Ref(node.name)
        return values[("listed", leaf)]

    for number, event, args, kwargs in events:
        stacked = _stacking(event, args, kwargs)
        if stacked is not None and isinstance(args[0], Steps):
            whole = values[replace(args[0], last=False)]
            if stacked == 0:
                values[Out(number)] = whole
            else:
                nodes.append(Node(names.new("moved"), "method", "movedim", (whole, 0, stacked)))
                nodes.append(Node(names.new("stack"), "method", "contiguous", (Ref(nodes[-1].name),)))
                values[Out(number)] = Ref(nodes[-1].name)
            continue
        if event.kind == "module" and id(event.target) in builder.neurons:
            path = builder.paths[id(event.target)]
            raise refusal(path, "neuron", event.where, "it is called outside the loop", "call it inside")
        args, kwargs = rewrite((args, kwargs), value)
        nodes.append(builder.node(names, event, args, kwargs))
        values[Out(number)] = Ref(nodes[-1].name)
    output = rewrite(want, value)  # which adds nodes
    return live(Part(inputs, tuple(nodes), output))


def _stacking(event: Event, args: Any, kwargs: Any) -> int | None:
    """The dimension of `torch.stack(steps, dim)`."""
    if event.target is not torch.stack:
        return None
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return dim if type(dim) is int and set(kwargs) <= {"dim"} else None


def needed(tape: Tape, wanted: Sequence[Any], end: int) -> list[tuple[int, Event, Any, Any]]:
    """The events before `end` that some values come from."""
    numbers: set[int] = set()
    waiting = [leaf for leaf in wanted if isinstance(leaf, Out)]
    while waiting:
        number = waiting.pop().event
        if number not in numbers:
            numbers.add(number)
            event = tape.events[number]
            waiting += [leaf for leaf in leaves((event.args, event.kwargs)) if isinstance(leaf, Out)]
    return [(n, tape.events[n], tape.events[n].args, tape.events[n].kwargs) for n in sorted(numbers) if n < end]
