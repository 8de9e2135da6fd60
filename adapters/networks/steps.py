"""The nodes of one time step, from recorded events: what each neuron is given, and whose states are handed on."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from tracetorch.adapters.networks.around import around, needed
from tracetorch.adapters.networks.graphs import Builder, Names, Part, Plan, live, refusal
from tracetorch.adapters.networks.recording import Event, Held, In, Out, Tape, Unknown
from tracetorch.adapters.networks.rolling import Before, Cut, Here, Rolled, Steps
from tracetorch.adapters.networks.states import states_of
from tracetorch.core.graph import Node, Ref, State, leaves, rewrite


def _place(event: Event, state: str) -> int:
    """Where a layer's result has a state; the first is its spikes."""
    shown = [name for name in states_of(event.target) if name != "spikes"]
    return 0 if state == "spikes" else 1 + shown.index(state)


def _zero(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and not bool(value.any()))


class _Step:
    """The nodes of one time step."""

    def __init__(self, builder: Builder, body: Sequence[tuple[Event, Any, Any]]) -> None:
        self.builder, self.body = builder, body
        self.names, self.nodes = Names("x"), list[Node]()
        self.values: dict[Any, Any] = {}
        self.inputs: dict[tuple[Any, int | None], str] = {}
        self.handed: dict[int, tuple[int, str]] = {}
        self.threads: dict[int, Ref | State] = {}
        # The number of the last call of each neuron so far, and over the whole step.
        self.latest: dict[int, int] = {}
        self.node_of: dict[int, str] = {}
        self.last = {id(e.target): k for k, (e, _, _) in enumerate(body) if id(e.target) in builder.neurons}

    def build(self) -> None:
        for k, (event, args, kwargs) in enumerate(self.body):
            if event.name in ("getitem", "select") and len(args) == 1 and isinstance(args[0], Cut):
                self.values[Here(k)] = self.input(args[0].source, args[0].dim)
                continue
            if id(event.target) in self.builder.neurons:
                if id(event.target) in self.latest:
                    self.builder.shared.append(self.builder.paths[id(event.target)])
                args, kwargs = self.neuron(k, event, args, kwargs)
            args, kwargs = rewrite((args, kwargs), partial(self.value, event=event))
            self.nodes.append(self.builder.node(self.names, event, args, kwargs))
            self.results(k, event)
        # A state handed in is replaced by what the layer's last call in the step gives.
        for index, (k, state) in self.handed.items():
            name = self.node_of[self.last[id(self.body[k][0].target)]]
            self.threads[index] = Ref(name) if state == "spikes" else State(name, state)

    def results(self, k: int, event: Event) -> None:
        """What later events may refer to."""
        name = self.nodes[-1].name
        if id(event.target) not in self.builder.neurons:
            self.values[Here(k)] = Ref(name)
            return
        self.builder.neuron_nodes.append(name)
        self.node_of[k] = name
        self.latest[id(event.target)] = k
        if not isinstance(event.result, tuple):
            self.values[Here(k)] = Ref(name)
            return
        self.values[Here(k, (0,))] = Ref(name)
        for state in states_of(event.target):
            if state != "spikes" and _place(event, state) < len(event.result):
                self.values[Here(k, (_place(event, state),))] = State(name, state)

    def input(self, source: Any, dim: int | None) -> Ref:
        key = (source, dim)
        if key not in self.inputs:
            self.inputs[key] = "x" if not self.inputs else self.names.new("x")
        return Ref(self.inputs[key])

    def value(self, leaf: Any, event: Event) -> Any:
        """A reference of the body as one of the graph."""
        if isinstance(leaf, Here):
            return self.fetched(leaf)
        if isinstance(leaf, Cut):
            return self.input(leaf.source, leaf.dim)
        if isinstance(leaf, Held):
            return self.builder.held_node(self.names, self.nodes, self.values, leaf)
        if isinstance(leaf, (In, Out)):
            return self.input(leaf, None)
        if isinstance(leaf, Before):
            raise refusal(
                "",
                "forward",
                f"{event.name} at {event.where}",
                "it takes a value of the step before that is no neuron's own state",
                "a recurrent layer of the framework, or a neuron that holds the value as its state",
            )
        if isinstance(leaf, Unknown):
            raise refusal(
                "",
                "forward",
                f"{event.name} at {event.where}",
                f"it uses {leaf!r}",
                "self.register_buffer(name, tensor) in the network's __init__",
            )
        return leaf

    def fetched(self, leaf: Here) -> Any:
        """A result of a node, or a part of it."""
        if leaf in self.values:
            return self.values[leaf]
        whole = self.fetched(Here(leaf.event, leaf.path[:-1]))
        self.nodes.append(Node(self.names.new("getitem"), "function", operator.getitem, (whole, leaf.path[-1])))
        self.values[leaf] = Ref(self.nodes[-1].name)
        return self.values[leaf]

    def neuron(self, k: int, event: Event, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The input alone, after seeing that the states handed in are the layer's own of the step before."""
        path = self.builder.paths[id(event.target)] or "0"
        given, values = list(args[1:]) + list(kwargs.values()), event.values[1:]
        names = states_of(event.target)
        for j, leaf in enumerate(given, start=1):
            if leaf is None:
                continue
            state = names[j - 1] if j <= len(names) else "state"
            if not self.own(event, _place(event, state) if state in names else j, leaf):
                raise refusal(
                    path,
                    state,
                    f"argument {j} at {event.where}",
                    "the state handed to the layer is not the one that it gave in the step before",
                    "hand on what the layer returned, unchanged",
                )
            if isinstance(leaf, In):
                self.handed[leaf.index] = (k, state)
        if id(event.target) not in self.latest and not kwargs and not all(_zero(v) for v in values):
            raise refusal(
                path, "state", "not zero", "the first step starts from a state of the user's own", "start from zero"
            )
        return args[:1], {}

    def own(self, event: Event, j: int, leaf: Any) -> bool:
        """Whether a state handed in is what the same layer gave last, at the place `j` of its result."""
        if id(event.target) in self.latest:  # called before in the same step
            return isinstance(leaf, Here) and (leaf.event, leaf.path) == (self.latest[id(event.target)], (j,))
        if isinstance(leaf, Before):
            return leaf.event == self.last[id(event.target)] and leaf.path == (j,)
        # Only in the first step: a loop of one step, or a network that takes one step per call.
        return isinstance(leaf, (In, Out, Unknown, Held))


def plan_of_step(builder: Builder, tape: Tape) -> Plan:
    """The plan of a network whose call is one time step."""

    def here(leaf: Any) -> Any:
        return Here(leaf.event, leaf.path) if isinstance(leaf, Out) else leaf

    body = [(e, *rewrite((e.args, e.kwargs), here)) for e in tape.events]
    step = _Step(builder, body)
    step.build()
    output = rewrite(tape.output, lambda leaf: step.value(here(leaf), _RESULT))
    foreign = [source for source, _ in step.inputs if source != In(0)]
    if foreign:
        raise refusal(
            "", "sample", repr(foreign[0]), "the step takes more than its input", "only states beside the input"
        )
    part = live(Part(("x",), tuple(step.nodes), output))
    return _plan(builder, part, cuts=(None,), threads=step.threads)


_RESULT = Event("function", "return", (), {}, (), None, "the end of forward")


def plan_of_loop(builder: Builder, rolled: Rolled) -> Plan:
    """The plan of a network that loops over time itself."""
    step = _Step(builder, rolled.body)
    step.build()
    wanted: dict[Steps, Any] = {}
    for leaf in leaves(([(args, kwargs) for _, _, args, kwargs in rolled.after], rolled.output)):
        if isinstance(leaf, Steps):
            plain = replace(leaf, last=False)
            wanted.setdefault(plain, step.value(Here(leaf.event, leaf.path), _RESULT))
    if not step.inputs:
        raise refusal("", "forward", "no input", "no step of its loop uses the input", "a loop over the input")
    sources, cuts = zip(*step.inputs, strict=True)
    before_events = needed(rolled.tape, sources, rolled.start)
    before = around(builder, before_events, {In(0): Ref("x")}, tuple(sources))
    known = {plain: Ref(f"y{k}") for k, plain in enumerate(wanted)}
    after = around(builder, rolled.after, known, rolled.output)
    inputs = tuple(step.inputs.values())
    part = live(Part(inputs, tuple(step.nodes), tuple(wanted.values())))
    after = Part(tuple(f"y{k}" for k in range(len(wanted))), after.nodes, after.output)
    whole = before.output == (Ref("x"),)
    return _plan(builder, part, None if whole else before, after, tuple(cuts), rolled.steps)


def _plan(builder: Builder, step: Part, *args: Any, **kwargs: Any) -> Plan:
    called = [node.name for node in step.nodes if node.name in builder.neuron_nodes]
    shared = tuple(dict.fromkeys(builder.shared))
    return replace(Plan(step, builder.modules, builder.tensors, tuple(called), *args, **kwargs), shared=shared)
