"""From a recording to the graph of one time step: the loop over time that a forward unrolled is found and rolled up.

The events between two calls of a neuron layer must come again, call for call, over the whole sequence, each referring
to the same values of its own step, to the step before it, or to what was there before the loop. Whatever breaks this is
named: nothing is assumed of what was not seen.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.networks.recording import REFS, Event, NoGraph, Out, Tape, same_call
from tracetorch.core.graph import leaves, rewrite


@dataclass(frozen=True)
class Here:
    """The value of the event number `event` of the same step."""

    event: int
    path: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Before:
    """The value of an event of the step before; `first`: what stands in its place in the first step."""

    event: int
    path: tuple[Any, ...]
    first: Any


@dataclass(frozen=True)
class Cut:
    """The present step of a value from outside the loop, cut at a dimension."""

    source: Any
    dim: int


@dataclass(frozen=True)
class Steps:
    """After the loop: a value of every step. `last`: of the last one only."""

    event: int
    path: tuple[Any, ...]
    last: bool = False


@dataclass(frozen=True)
class _Count:
    """The number of the step, as an argument."""


@dataclass
class Rolled:
    """A recording with its loop rolled up. References in `body` are `Here`, `Before`, `Cut`, or to outside it."""

    tape: Tape
    start: int
    period: int
    steps: int
    body: list[tuple[Event, Any, Any]]  # event of the first step, args, kwargs
    after: list[tuple[int, Event, Any, Any]]  # with the event's number
    output: Any


class NoLoop(Exception):
    """Why a recording is no loop; says where it first departs from one."""


def _refusal(field: str, value: object, why: str, remedy: str) -> NoGraph:
    return NoGraph("''", field, value, why, remedy)


def check(tape: Tape) -> None:
    """Refuse what no graph can hold. Raises `ConversionError`."""
    if tape.random:
        raise ConversionError(
            "''",
            "forward",
            tape.random[0],
            "it draws random numbers, and what depends on chance cannot be compared",
            "draw them outside the network and hand them in; dropout as nn.Dropout, and net.eval()",
        )
    if tape.value_reads:
        raise _refusal(
            "forward",
            tape.value_reads[0],
            "it looks at a tensor's value, so what it does may depend on the input in a way that no sample shows",
            "torch.where in place of a branch; no .item(), bool() or float() of a tensor in forward",
        )
    if tape.in_place:
        raise _refusal(
            "forward", tape.in_place[0], "it writes into a tensor in place", "append to a list and torch.stack it"
        )
    if tape.grad_modes:
        raise _refusal("forward", tape.grad_modes[0], "it switches gradients off or on", "tensor.detach() instead")


# ---- finding the loop ------------------------------------------------------------------------------------------------


def roll(tape: Tape, neurons: Sequence[nn.Module]) -> Rolled | None:
    """The recording with its loop over time rolled up, or `None` if it has none: one call is one step.

    Raises:
        ConversionError: it repeats its neurons, but not in the same way each time; says where it departs.
    """
    events = tape.events
    calls = {id(n): [k for k, e in enumerate(events) if e.kind == "module" and e.target is n] for n in neurons}
    called = [where for where in calls.values() if where]
    if not called:
        why = "the sample's forward calls no neuron layer"
        raise ConversionError("''", "neuron", "none called", why, "a network with neurons")
    anchor = min(called)
    reasons = []
    counts = sorted({_common(called, t) for t in range(2, len(anchor) + 1)} - {0}, reverse=True)
    for steps in counts:
        try:
            return _roll(tape, anchor, steps)
        except NoLoop as reason:
            reasons.append(str(reason))
    uses = max(map(len, called))
    if uses > 1 and len(called) == sum(len(where) == uses for where in called) and reasons and uses > 3:
        raise _refusal(
            "forward",
            reasons[0],
            f"it calls each of its neurons {uses} times, but does not repeat the same step each time",
            "the same calls in every step, their results in lists; what differs put before or after the loop",
        )
    return None


def _common(called: Sequence[Sequence[int]], steps: int) -> int:
    return steps if all(len(where) % steps == 0 for where in called) else 0


def _roll(tape: Tape, anchor: Sequence[int], steps: int) -> Rolled:
    events, each = tape.events, len(anchor) // steps
    period = anchor[each] - anchor[0]
    for k in range(len(anchor) - each):
        if anchor[k + each] - anchor[k] != period:
            event = events[anchor[k]]
            raise NoLoop(
                f"step {k // each + 1} has another number of calls than step 0 (at {event.name}, {event.where})"
            )
    start = anchor[0]
    while start > 0 and anchor[0] - start < period - 1 and same_call(events[start - 1], events[start - 1 + period]):
        start -= 1
    reason = NoLoop("")
    for first in range(start, anchor[0] + 1):
        if first + steps * period > len(events):
            break
        try:
            body = _body(events, first, period, steps)
        except NoLoop as error:
            reason = error
            continue
        rolled = Rolled(tape, first, period, steps, body, [], None)
        _outside(rolled)
        return rolled
    raise reason


def _body(events: Sequence[Event], start: int, period: int, steps: int) -> list[tuple[Event, Any, Any]]:
    found = []
    for k in range(period):
        same = [events[start + t * period + k] for t in range(steps)]
        for t, event in enumerate(same):
            if not same_call(same[0], event):
                raise NoLoop(f"step {t} calls {event.name} ({event.where}) where step 0 calls {same[0].name}")
        trees = [_relative((e.args, e.kwargs), start, period, t) for t, e in enumerate(same)]
        args, kwargs = _unified(trees, same[0])
        found.append((same[0], args, kwargs))
    return found


def _relative(value: Any, start: int, period: int, step: int) -> Any:
    """References into the loop as `Here`, or `Before` with no first value."""

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Out) or leaf.event < start:
            return leaf
        at, event = divmod(leaf.event - start, period)
        if at == step:
            return Here(event, leaf.path)
        if at == step - 1:
            return Before(event, leaf.path, None)
        raise NoLoop(f"step {step} uses a value of step {at}")

    return rewrite(value, change)


def _unified(trees: Sequence[Any], event: Event) -> Any:
    """The arguments of all steps as one."""
    rows = [list(leaves(tree)) for tree in trees]
    shape = _shape(trees[0])
    for t, tree in enumerate(trees):
        if _shape(tree) != shape:
            raise NoLoop(f"step {t} gives {event.name} ({event.where}) other arguments than step 0")
    columns = iter([_leaf([row[k] for row in rows], event) for k in range(len(rows[0]))])
    return rewrite(trees[0], lambda leaf: next(columns))


def _shape(tree: Any) -> str:
    return repr(rewrite(tree, lambda leaf: 0))


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a is b or bool(a == b))


def _leaf(values: Sequence[Any], event: Event) -> Any:
    first, rest = values[0], values[1:]
    if all(_same(first, value) for value in rest):
        return first
    if all(type(value) is int for value in values) and list(values) == list(range(len(values))):
        return _Count()
    if isinstance(rest[0], Before) and all(_same(rest[0], value) for value in rest):
        return Before(rest[0].event, rest[0].path, first)
    if all(isinstance(value, Out) for value in values):
        sources = {(value.event, value.path[:-1]) for value in values}
        if len(sources) == 1 and [value.path[-1:] for value in values] == [(t,) for t in range(len(values))]:
            return Cut(Out(first.event, first.path[:-1]), -1)  # of an unbind; the dimension is found below
    t = next(t for t, value in enumerate(values) if not _same(first, value))
    what = first if isinstance(first, (*REFS, Here, Before)) else repr(first)
    raise NoLoop(f"step {t} gives {event.name} ({event.where}) {values[t]!r} where step 0 gives {what}")


# ---- around the loop -------------------------------------------------------------------------------------------------


def _outside(rolled: Rolled) -> None:
    """Resolve how the input is cut into steps, and what is done with the values of all steps."""
    rolled.body = [(e, *_cut(rolled, e, args, kwargs)) for e, args, kwargs in rolled.body]
    end = rolled.start + rolled.period * rolled.steps
    for number, event in enumerate(rolled.tape.events[end:], start=end):
        args, kwargs = _gathered(rolled, (event.args, event.kwargs), end)
        rolled.after.append((number, event, args, kwargs))
    rolled.output = _gathered(rolled, rolled.tape.output, end)


def _cut(rolled: Rolled, event: Event, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def change(leaf: Any) -> Any:
        if isinstance(leaf, Cut) and leaf.dim == -1:
            source = rolled.tape.events[leaf.source.event]
            if source.name != "unbind" or leaf.source.path:
                raise NoLoop(f"each step takes its own result of {source.name} ({source.where})")
            dim = source.kwargs.get("dim", source.args[1] if len(source.args) > 1 else 0)
            return Cut(source.args[0], dim)
        return leaf

    args, kwargs = rewrite((args, kwargs), change)
    dim = _indexed(event, args)
    if dim is not None and isinstance(args[0], REFS):
        return (Cut(args[0], dim),), {}
    if any(isinstance(leaf, _Count) for leaf in leaves((args, kwargs))):
        raise NoLoop(f"{event.name} ({event.where}) takes the number of the step as an argument")
    return args, kwargs


def _indexed(event: Event, args: Any) -> int | None:
    """The dimension at which `x[t]`, `x[:, t]` or `x.select(dim, t)` cuts, or None for another call."""
    if event.name == "select" and len(args) == 3 and isinstance(args[2], _Count) and type(args[1]) is int:
        return int(args[1])
    if event.target is not operator.getitem:
        return None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    counts = [k for k, item in enumerate(index) if isinstance(item, _Count)]
    whole = [k for k, item in enumerate(index) if isinstance(item, slice) and item == slice(None)]
    trailing = {k for k, item in enumerate(index) if item is Ellipsis and k == len(index) - 1}
    return counts[0] if len(counts) == 1 and {*counts, *whole, *trailing} == set(range(len(index))) else None


def _gathered(rolled: Rolled, value: Any, end: int) -> Any:
    """Lists of a value of every step as `Steps`, and a value of the last step."""

    def where(leaf: Any) -> tuple[int, int] | None:
        if isinstance(leaf, Out) and rolled.start <= leaf.event < end:
            return divmod(leaf.event - rolled.start, rolled.period)
        return None

    def walk(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and len(value) == rolled.steps:
            places = [where(item) for item in value]
            ordered = all(place is not None and place[0] == t for t, place in enumerate(places))
            if (
                ordered
                and len({(place[1], item.path) for place, item in zip(places, value, strict=True) if place}) == 1
            ):
                return Steps(value[0].event - rolled.start, value[0].path)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(walk(item) for item in value))
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item) for item in value)
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        place = where(value)
        if place is None:
            return value
        if place[0] != rolled.steps - 1:
            raise NoLoop(f"a value of step {place[0]} alone is used after the loop")
        return Steps(place[1], value.path, last=True)

    return walk(value)
