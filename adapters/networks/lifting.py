"""From a recording over whole sequences, batch first, to the graph of one time step.

A network of sinabs runs [B, T, ...], or [B*T, ...] between `FlattenTime` and `UnflattenTime` and in `Squeeze` layers.
Each recorded value has one of these layouts, or none once time is summed away; what only moves between the layouts is
nothing in a step, and what works on time itself comes after the steps.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks.graphs import Builder, Names, Part, Plan, live
from tracetorch.adapters.networks.network import Function
from tracetorch.adapters.networks.recording import Event, Held, In, NoGraph, Out, Tape, Unknown
from tracetorch.adapters.networks.sequences import ELEMENTWISE, FOLDED, Folded, Lifted
from tracetorch.adapters.networks.sizes import generalised
from tracetorch.core.graph import Node, Ref, leaves, rewrite

_RESHAPES = {"flatten", "unflatten", "view", "reshape"}
_WITH_DIM = {"cat": 1, "softmax": 1, "log_softmax": 1, "flatten": 1}


class _NotOfAStep(Exception):
    """A call that works on time itself."""


class _Lifting:
    """Sorts the events of a recording into those of a step and those after it."""

    def __init__(self, builder: Builder, tape: Tape, x: Tensor) -> None:
        self.builder, self.tape, self.x = builder, tape, x
        self.batch, self.steps = _extent(builder, tape)
        self.names = Names("x")
        self.nodes: list[Node] = []
        self.held: dict[str, nn.Module] = {}
        self.values: dict[Any, Any] = {}
        self.layouts: dict[Any, str] = {}
        self.after: list[int] = []
        self.called: set[int] = set()

    def plan(self) -> Plan:
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
        # Layers of sinabs go on from the states of the last call, until they are reset.
        modules, tensors = self.builder.modules, self.builder.tensors
        return Plan(part, modules, tensors, called, before, after, (1,), carry=True, held=self.held)

    def extent(self) -> tuple[int, int]:
        """Batch and time of a folded input: what its layers hold as a constant, and the other."""
        fixed = any(getattr(n, "num_timesteps", -1) > 0 for n in self.builder.neurons.values())
        return (-1, self.steps) if fixed else (self.batch, -1)

    def layout_of(self, x: Tensor) -> str:
        if tuple(x.shape[:2]) == (self.batch, self.steps):
            return "apart"
        if x.shape[0] == self.batch * self.steps:
            return "flat"
        raise ConversionError(
            "''",
            "sample",
            list(x.shape),
            f"its neurons ran on {self.batch} samples of {self.steps} steps",
            "[B, T, ...] or [B*T, ...]",
        )

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
        return Out(ref.event) if isinstance(ref, Out) else ref

    def later(self, number: int, event: Event) -> None:
        if id(event.target) in self.builder.neurons:
            path = self.builder.paths[id(event.target)]
            why = "its input has no time dimension any more"
            raise ConversionError(f"{path!r}", "neuron", event.where, why, "call it before time is summed away")
        self.after.append(number)

    def of_step(self, number: int, event: Event, layout: str) -> None:
        out = Out(number)
        moved = self.moved(event, layout)
        if moved is not None:
            self.values[out], self.layouts[out] = self.value(event.args[0]), moved
            return
        args, kwargs = event.args, event.kwargs
        held: Any = None
        if id(event.target) in self.builder.neurons:
            if id(event.target) in self.called:
                why = "it goes on from the states that a call over the whole sequence left"
                path = self.builder.paths[id(event.target)]
                raise NoGraph(f"{path!r}", "neuron", f"used twice, {event.where}", why, "give each its own layer")
            self.called.add(id(event.target))
            self.builder.neuron_nodes.append(self.new(event, rewrite(args[:1], self.value), {}).name)
            self.values[out], self.layouts[out] = Ref(self.nodes[-1].name), layout
            return
        if event.kind == "module":
            module = event.target
            if layout == "apart":
                target = _apart(self.builder.paths[id(module)], module)
                held = module
            else:
                target, held = module, Folded(module)
            node = self.new(event, rewrite(args, self.value), rewrite(kwargs, self.value))
            if target is not module:
                self.builder.modules[node.target] = target
        else:
            args = _shifted(event, layout)
            node = self.new(event, rewrite(args, self.value), rewrite(kwargs, self.value))
            function = Function(node)
            held = Lifted(function, tuple(None for _ in function.references))
        self.held[node.name] = held
        self.values[out], self.layouts[out] = Ref(node.name), layout

    def new(self, event: Event, args: Any, kwargs: Any) -> Node:
        self.nodes.append(self.builder.node(self.names, event, args, kwargs))
        return self.nodes[-1]

    def value(self, leaf: Any) -> Any:
        if isinstance(leaf, Out) and leaf.path:
            raise _NotOfAStep
        if isinstance(leaf, (In, Out)):
            return self.values[leaf]
        if isinstance(leaf, (Held, Unknown)):
            raise ConversionError(
                "''", "forward", repr(leaf), "a tensor of the network is used outside its layers", "a module for it"
            )
        return leaf

    def moved(self, event: Event, layout: str) -> str | None:
        """The new layout, if the call only moves between the two."""
        if event.name not in _RESHAPES or not isinstance(event.result, Tensor):
            return None
        given, got = event.values[0], event.result
        if not isinstance(given, Tensor):
            return None
        apart, flat = (self.batch, self.steps), (self.batch * self.steps,)
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
            if isinstance(leaf, (In, Out)) and leaf not in values and self.root(leaf) in self.layouts:
                wanted[leaf] = Ref(f"y{len(wanted)}")
                nodes.append(Node(names.new("transposed"), "method", "transpose", (wanted[leaf], 0, 1)))
                # Laid out as the source's: a sum over another layout rounds otherwise.
                nodes.append(Node(names.new("batch_first"), "method", "contiguous", (Ref(nodes[-1].name),)))
                if self.layouts[leaf] == "flat":
                    nodes.append(Node(names.new("flat"), "method", "flatten", (Ref(nodes[-1].name), 0, 1)))
                values[leaf] = Ref(nodes[-1].name)
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


def _apart(path: str, module: nn.Module) -> nn.Module:
    """The module of one step, of one that is called with [B, T, ...]."""
    if type(module) in (nn.Linear, nn.LayerNorm, *known.ELEMENTWISE, *known.DROPOUT):
        return module
    if type(module) is nn.Flatten and module.start_dim >= 2:
        return nn.Flatten(module.start_dim - 1, module.end_dim - 1 if module.end_dim > 0 else module.end_dim)
    raise ConversionError(
        f"{path!r}",
        "module",
        type(module).__name__,
        "it would mix time with its own dimensions",
        "sinabs.layers.Repeat",
    )


def _shifted(event: Event, layout: str) -> tuple[Any, ...]:
    """The arguments of a function in one step. Raises `_NotOfAStep` where it works on time."""
    if event.name in ELEMENTWISE:
        return event.args
    first = 1 if layout == "flat" else 2
    if event.name in _WITH_DIM and not event.kwargs and len(event.args) >= 2:
        dims = [d for d in event.args[1:] if type(d) is int]
        if len(dims) == len(event.args) - 1 and all(d >= first or d < 0 for d in dims):
            return (event.args[0], *(d - first + 1 if d >= 0 else d for d in dims))
    if layout == "flat" and event.name in FOLDED | {"lp_pool2d", "batch_norm"} and event.name not in _WITH_DIM:
        return event.args
    raise _NotOfAStep


def _extent(builder: Builder, tape: Tape) -> tuple[int, int]:
    """Batch size and number of steps, as the first neuron saw them."""
    for event in tape.events:
        if id(event.target) not in builder.neurons:
            continue
        neuron, shape = event.target, event.values[0].shape
        if not hasattr(neuron, "num_timesteps"):
            return shape[0], shape[1]
        batch, steps = int(neuron.batch_size), int(neuron.num_timesteps)
        return (batch, shape[0] // batch) if batch > 0 else (shape[0] // steps, steps)
    raise ConversionError(
        "''", "neuron", "none called", "the sample's forward calls no neuron", "a network with neurons"
    )


def plan(recording: Any, x: Tensor) -> Plan:
    """The plan of a network over [B, T, ...] or [B*T, ...].

    Args:
        recording: records it (`sources`).
        x: the sample.
    """
    first = _Lifting(Builder(recording.net, recording.neurons), recording.tape((x,)), x)
    found = first.plan()
    for longer in _others(x, first):
        try:
            other = _Lifting(Builder(recording.net, recording.neurons), recording.tape((longer,)), longer)
            again = other.plan()
        except (RuntimeError, ValueError, IndexError):
            continue
        shapes = {"before": (x.shape, longer.shape)}
        shapes["step"] = (torch.Size([first.batch]), torch.Size([other.batch]))
        shapes["after"] = tuple(torch.Size([one.steps, one.batch]) for one in (first, other))  # type: ignore[assignment]
        return generalised(found, again, shapes)
    return replace(found, remarks=(f"the shape of the input is a constant of the source: {tuple(x.shape)}",))


def _others(x: Tensor, lifting: _Lifting) -> Sequence[Tensor]:
    """Samples of other batch sizes and lengths."""
    if lifting.layouts[In(0)] == "apart":
        longer = torch.cat([x, x[:, :2]], 1)
        return torch.cat([longer, longer[:1]]), longer
    more = lifting.steps if lifting.extent()[0] < 0 else lifting.batch
    return (torch.cat([x, x[:more]]),)
