"""From a recording over whole sequences to the graph of one time step.

A network of sinabs is batch first: it runs [B, T, ...], or [B*T, ...] between `FlattenTime` and `UnflattenTime` and in
`Squeeze` layers. Each recorded value has one of these layouts, or none once time is summed away; what only moves
between the layouts is nothing in a step, and what works on time itself comes after the steps. Some layers of snnTorch
take [T, B, ...] (`wholes`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks import wholes
from tracetorch.adapters.networks.graphs import Builder, Names, Part, Plan, live
from tracetorch.adapters.networks.network import Function
from tracetorch.adapters.networks.recorded import lengthened
from tracetorch.adapters.networks.recording import Event, Held, In, NoGraph, Out, Tape, Unknown
from tracetorch.adapters.networks.sequences import ELEMENTWISE, FOLDED, Folded, Lifted
from tracetorch.adapters.networks.sizes import generalised
from tracetorch.core.graph import Node, Ref, State, leaves, rewrite

_RESHAPES = {"flatten", "unflatten", "view", "reshape"}
_WITH_DIM = {"cat": 1, "softmax": 1, "log_softmax": 1, "flatten": 1}


class _NotOfAStep(Exception):
    """A call that works on time itself."""


class _Lifting:
    """Sorts the events of a recording into those of a step and those after it."""

    def __init__(self, builder: Builder, tape: Tape, x: Tensor, time_first: bool) -> None:
        self.builder, self.tape, self.x, self.time_first = builder, tape, x, time_first
        self.batch, self.steps = _extent(builder, tape, time_first)
        # The first two dimensions of values that have both.
        self.apart = (self.steps, self.batch) if time_first else (self.batch, self.steps)
        self.names = Names("x")
        # The nodes of a step, and by name the module that computes each over the whole sequence.
        self.nodes: list[Node] = []
        self.held: dict[str, nn.Module] = {}
        # What stands in the step for a recorded value, and whether that has time "apart" or is "flat".
        self.values: dict[Any, Any] = {}
        self.layouts: dict[Any, str] = {}
        # The numbers of the events after the steps; the neurons called so far.
        self.after: list[int] = []
        self.called: set[int] = set()

    def plan(self) -> Plan:
        """Of the whole recording."""
        self.values[In(0)], self.layouts[In(0)] = Ref("x"), self.layout_of(self.x)
        for number, event in enumerate(self.tape.events):
            self.event(number, event)
        wanted: dict[Any, Ref] = {}
        after = self.rest(wanted)
        part = live(Part(("x",), tuple(self.nodes), tuple(self.values[place] for place in wanted)))
        before = None
        if self.layouts[In(0)] == "flat":
            node = Node("unflatten", "method", "unflatten", (Ref("x"), 0, self.extent()))
            before = Part(("x",), (node,), (Ref("unflatten"),))
        called = tuple(node.name for node in part.nodes if node.name in self.builder.neuron_nodes)
        modules, tensors, cut = self.builder.modules, self.builder.tensors, 0 if self.time_first else 1
        return Plan(part, modules, tensors, called, before, after, (cut,), held=self.held)

    def extent(self) -> tuple[int, int]:
        """Batch and time of a folded input: what its layers hold as a constant, and the other."""
        fixed = any(getattr(n, "num_timesteps", -1) > 0 for n in self.builder.neurons.values())
        return (-1, self.steps) if fixed else (self.batch, -1)

    def layout_of(self, x: Tensor) -> str:
        """Of the network's input."""
        if tuple(x.shape[:2]) == self.apart:
            return "apart"
        if x.shape[0] == self.batch * self.steps and not self.time_first:
            return "flat"
        kind = ConversionError if self.time_first else NoGraph
        why = f"its neurons ran on {self.batch} samples of {self.steps} steps"
        remedy = "[T, B, ...]" if self.time_first else "[B, T, ...] or [B*T, ...]"
        raise kind("''", "sample", list(x.shape), why, remedy)

    def event(self, number: int, event: Event) -> None:
        """One event: nothing in a step, a node of the step, or after it."""
        sources = [leaf for leaf in leaves((event.args, event.kwargs)) if isinstance(leaf, (In, Out))]
        if any(self.root(source) not in self.layouts for source in sources) or not sources:
            self.later(number, event)
            return
        layouts = {self.layouts[self.root(source)] for source in sources}
        try:
            if len(layouts) > 1:
                raise _NotOfAStep
            self.of_step(number, event, layouts.pop())
        except _NotOfAStep:
            self.later(number, event)

    def root(self, ref: Any) -> Any:
        """The whole result that a reference is a part of: what has a layout."""
        return Out(ref.event) if isinstance(ref, Out) else ref

    def later(self, number: int, event: Event) -> None:
        """An event after the steps; a neuron cannot be one."""
        if id(event.target) in self.builder.neurons:
            path = self.builder.paths[id(event.target)]
            why = "its input is no whole sequence any more"
            raise NoGraph(f"{path!r}", "neuron", event.where, why, "call it before time is cut or summed away")
        self.after.append(number)

    def of_step(self, number: int, event: Event, layout: str) -> None:
        """A node of the step; or nothing, if the call only moves a value to the other layout."""
        out = Out(number)
        moved = self.moved(event, layout)
        if moved is not None:
            self.values[out], self.layouts[out] = self.value(event.args[0]), moved
            return
        if id(event.target) in self.builder.neurons:
            self.layouts[out] = layout
            self.neuron(out, event)
            return
        node, held = self.module(event, layout) if event.kind == "module" else self.function(event, layout)
        self.held[node.name] = held
        self.values[out], self.layouts[out] = Ref(node.name), layout

    def module(self, event: Event, layout: str) -> tuple[Node, nn.Module]:
        """The node of a stateless module in one step, and the module that takes the values of the whole sequence."""
        module = event.target
        target = _apart(self.builder.paths[id(module)], module) if layout == "apart" else module
        node = self.new(event, rewrite(event.args, self.value), rewrite(event.kwargs, self.value))
        if target is not module:
            self.builder.modules[node.target] = target
        return node, module if layout == "apart" else Folded(module)

    def function(self, event: Event, layout: str) -> tuple[Node, nn.Module]:
        """The node of a function in one step, and a module that takes the values of the whole sequence."""
        args = _shifted(event, layout)
        node = self.new(event, rewrite(args, self.value), rewrite(event.kwargs, self.value))
        function = Function(node)
        return node, Lifted(function, tuple(None for _ in function.references), 0 if self.time_first else 1)

    def neuron(self, out: Out, event: Event) -> None:
        """A neuron's node; before it that of its own matrix, where it has one."""
        if id(event.target) in self.called:
            why = "it goes on from the states that a call over the whole sequence left"
            path = self.builder.paths[id(event.target)]
            raise NoGraph(f"{path!r}", "neuron", f"used twice, {event.where}", why, "give each its own layer")
        self.called.add(id(event.target))
        given = self.value(event.args[0])
        if self.time_first:
            path, matrix = self.builder.paths[id(event.target)] or "0", wholes.connection(event.target)
            if matrix is not None:
                name = self.at(f"{path}.linear", matrix, given)
                self.held[name], given = Folded(matrix), Ref(name)
                given = self.plus(f"{path}.bias_hh", wholes.added(event.target), given)
                path = f"{path}.neuron"
            name = self.at(path, wholes.neuron(event.target), given)
        else:
            name = self.new(event, (given,), {}).name
        self.builder.neuron_nodes.append(name)
        self.values[out] = Ref(name)
        if isinstance(event.result, tuple):
            self.values |= {Out(out.event, (0,)): Ref(name), Out(out.event, (1,)): State(name, "v_mem")}

    def plus(self, path: str, bias: Tensor | None, given: Ref) -> Ref:
        """A value, or the sum of it and a tensor of the network."""
        if bias is None:
            return given
        owner = self.names.new(path)
        self.builder.tensors[owner] = bias
        held = Node(owner, "tensor", owner)
        total = Node(self.names.new("add"), "function", operator.add, (given, Ref(held.name)))
        self.nodes += [held, total]
        return Ref(total.name)

    def at(self, path: str, module: nn.Module, given: Any) -> str:
        """The name of a new node that calls a module of this path."""
        self.builder.modules[path] = module
        self.nodes.append(Node(self.names.new(path), "module", path, (given,)))
        return self.nodes[-1].name

    def new(self, event: Event, args: Any, kwargs: Any) -> Node:
        """A new node of the step."""
        self.nodes.append(self.builder.node(self.names, event, args, kwargs))
        return self.nodes[-1]

    def value(self, leaf: Any) -> Any:
        """What stands in the step for a recorded argument."""
        if isinstance(leaf, Out) and leaf.path and leaf not in self.values:
            raise _NotOfAStep
        if isinstance(leaf, (In, Out)):
            return self.values[leaf]
        if isinstance(leaf, (Held, Unknown)):
            kind = ConversionError if self.time_first else NoGraph  # nothing is stepped over [T, B, ...]
            why = "a tensor of the network is used outside its layers"
            raise kind("''", "forward", repr(leaf), why, "a module for it")
        return leaf

    def moved(self, event: Event, layout: str) -> str | None:
        """The new layout, if the call only moves between the two."""
        if event.name not in _RESHAPES or not isinstance(event.result, Tensor):
            return None
        given, got = event.values[0], event.result
        if not isinstance(given, Tensor):
            return None
        apart, flat = self.apart, (self.batch * self.steps,)
        if layout == "apart" and tuple(got.shape) == (*flat, *given.shape[2:]):
            return "flat"
        if layout == "flat" and tuple(got.shape) == (*apart, *given.shape[1:]):
            return "apart"
        return layout if got.shape == given.shape else None

    def rest(self, wanted: dict[Any, Ref]) -> Part:
        """What comes after the steps: of their outputs, each [T, B, ...], put into its layout first."""
        names, nodes = Names("y0"), list[Node]()
        values: dict[Any, Any] = {}

        def value(leaf: Any) -> Any:
            if isinstance(leaf, (In, Out)) and leaf in self.values and leaf not in values:
                wanted[leaf] = Ref(f"y{len(wanted)}")
                values[leaf] = self.laid_out(nodes, names, wanted[leaf], self.layouts[self.root(leaf)])
            if isinstance(leaf, Out) and leaf.path and leaf not in values:
                whole = value(Out(leaf.event, leaf.path[:-1]))
                nodes.append(Node(names.new("item"), "function", operator.getitem, (whole, leaf.path[-1])))
                values[leaf] = Ref(nodes[-1].name)
            return values[leaf] if isinstance(leaf, (In, Out)) else leaf

        for number in self.after:
            event = self.tape.events[number]
            args, kwargs = rewrite((event.args, event.kwargs), value)
            nodes.append(self.builder.node(names, event, args, kwargs))
            values[Out(number)] = Ref(nodes[-1].name)
        output = rewrite(self.tape.output, value)
        inputs = tuple(f"y{k}" for k in range(len(wanted)))
        return live(Part(inputs, tuple(nodes), output))

    def laid_out(self, nodes: list[Node], names: Names, place: Ref, layout: str) -> Ref:
        """An output of the steps, [T, B, ...], laid out as the source's: a sum over another layout rounds otherwise."""
        if not self.time_first:
            nodes.append(Node(names.new("transposed"), "method", "transpose", (place, 0, 1)))
            nodes.append(Node(names.new("batch_first"), "method", "contiguous", (Ref(nodes[-1].name),)))
            place = Ref(nodes[-1].name)
        if layout == "flat":
            nodes.append(Node(names.new("flat"), "method", "flatten", (place, 0, 1)))
            place = Ref(nodes[-1].name)
        return place


def _apart(path: str, module: nn.Module) -> nn.Module:
    """The module of one step, of one that is called with [B, T, ...]."""
    if type(module) in (*known.TIMELESS, nn.LayerNorm, *known.DROPOUT):
        return module
    if type(module) is nn.Flatten and module.start_dim >= 2:
        return nn.Flatten(module.start_dim - 1, module.end_dim - 1 if module.end_dim > 0 else module.end_dim)
    raise ConversionError(
        f"{path!r}",
        "module",
        type(module).__name__,
        "it would mix time with its own dimensions",
        "sinabs.layers.Repeat, or time folded into the batch around it",
    )


def _shifted(event: Event, layout: str) -> tuple[Any, ...]:
    """The arguments of a function in one step. Raises `_NotOfAStep` where it works on time."""
    if event.name in ELEMENTWISE:
        return event.args
    first = 1 if layout == "flat" else 2
    if event.name == "getitem" and isinstance(event.args[1], tuple):
        index = event.args[1]
        if index[:first] == (slice(None),) * first and not any(isinstance(i, Tensor) for i in index):
            return event.args[0], (slice(None), *index[first:])
    if event.name in _WITH_DIM and not event.kwargs and len(event.args) >= 2:
        dims = [d for d in event.args[1:] if type(d) is int]
        if len(dims) == len(event.args) - 1 and all(d >= first or d < 0 for d in dims):
            return (event.args[0], *(d - first + 1 if d >= 0 else d for d in dims))
    if layout == "flat" and event.name in FOLDED | {"lp_pool2d", "batch_norm"} and event.name not in _WITH_DIM:
        return event.args
    raise _NotOfAStep


def _extent(builder: Builder, tape: Tape, time_first: bool) -> tuple[int, int]:
    """Batch size and number of steps, as the first neuron saw them."""
    for event in tape.events:
        if id(event.target) not in builder.neurons:
            continue
        neuron, shape = event.target, event.values[0].shape
        if time_first:
            return shape[1], shape[0]
        if not hasattr(neuron, "num_timesteps"):
            return shape[0], shape[1]
        batch, steps = int(neuron.batch_size), int(neuron.num_timesteps)
        return (batch, shape[0] // batch) if batch > 0 else (shape[0] // steps, steps)
    raise ConversionError(
        "''", "neuron", "none called", "the sample's forward calls no neuron", "a network with neurons"
    )


def plan(recording: Any, x: Tensor) -> Plan:
    """The plan of a network over [B, T, ...] or [B*T, ...]; or over [T, B, ...], with the layers of `wholes`.

    Args:
        recording: records it (`sources`).
        x: the sample.
    """
    time_first = bool(getattr(recording.owner, "TIME_FIRST", False))

    def lifted(sample: Tensor) -> _Lifting:
        return _Lifting(Builder(recording.net, recording.neurons), recording.tape((sample,)), sample, time_first)

    first = lifted(x)
    # Layers of sinabs go on from the states of the last call, unless the forward resets them.
    found = replace(first.plan(), carry=not time_first and recording.carries((x,)))
    for more in _others(first):
        longer = lengthened(x, more)
        try:
            other = lifted(longer)
            again = other.plan()
        except (RuntimeError, ValueError, IndexError):
            continue
        shapes = {"before": (x.shape, longer.shape)}
        shapes["step"] = (torch.Size([first.batch]), torch.Size([other.batch]))
        shapes["after"] = tuple(torch.Size([one.steps, one.batch]) for one in (first, other))  # type: ignore[assignment]
        return replace(generalised(found, again, shapes), other=more, remarks=_constants(first, other))
    return replace(found, remarks=(f"the shape of the input is a constant of the source: {tuple(x.shape)}",))


def _others(lifting: _Lifting) -> Sequence[Mapping[int, int]]:
    """By how much samples of other batch sizes and lengths are longer."""
    if lifting.layouts[In(0)] == "apart":
        return {0: 1, 1: 2}, {1: 2}
    return ({0: lifting.steps if lifting.extent()[0] < 0 else lifting.batch},)


def _constants(one: _Lifting, other: _Lifting) -> tuple[str, ...]:
    """What is said of a batch size or a number of steps that the source holds."""
    same = {"batch size": (one.batch, other.batch), "number of steps": (one.steps, other.steps)}
    return tuple(f"the {name} is a constant of the source: {a}" for name, (a, b) in same.items() if a == b)
