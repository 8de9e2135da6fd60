"""The plan of a network: what is done before, in, and after each time step, as nodes of `tracetorch.core.graph`."""

from __future__ import annotations

import itertools
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from tracetorch.adapters.networks.recording import Event, Held, NoGraph
from tracetorch.core.graph import Graph, Node, Ref, State, leaves
from tracetorch.core.model import Sequential


class Part(NamedTuple):
    """A piece of a plan: nodes over named inputs, and what they give."""

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    output: Any


@dataclass(frozen=True)
class Plan:
    """A network as data.

    Attributes:
        step: of one time step; over [B, ...].
        before: of the whole input, one result for each input of `step`; `None`: the input as it is.
        after: of the step's outputs, each stacked to [T, ...]; `None`: no loop, the step's outputs are the network's.
        cuts: for each input of `step`, the dimension of time, or `None` for one that every step takes whole.
        steps: their number, if no input says it.
        modules, tensors: what the nodes use, by path.
        neurons: names of the nodes that call a neuron layer.
        threads: for a step whose states are handed in and out: argument number -> the state.
        remarks: what is to be known of it beyond its layers.
        carry: a call goes on from the states that the last one left.
        shared: paths of neurons that are called more than once in a step: all calls advance one state, in order.
        held: by node, how the network holds a module of one step that it calls with whole sequences.
        other: dimension -> by how much the input was longer there when a second one was recorded; none: there was none.
    """

    step: Part
    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, Tensor]
    neurons: tuple[str, ...]
    before: Part | None = None
    after: Part | None = None
    cuts: tuple[int | None, ...] = (0,)
    steps: int | None = None
    threads: Mapping[int, Ref | State] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    carry: bool = False
    held: Mapping[str, nn.Module] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    other: Mapping[int, int] = field(default_factory=dict)


def refusal(layer: str, field: str, value: object, why: str, remedy: str) -> NoGraph:
    """What keeps a forward from being data."""
    return NoGraph(f"{layer!r}", field, value, why, remedy)


class Names:
    """Names of nodes: of modules after their path, of functions after themselves, each once."""

    def __init__(self, *taken: str) -> None:
        self.taken = set(taken)

    def new(self, wish: str) -> str:
        base = "".join(c if c.isalnum() and c.isascii() else "_" for c in wish).strip("_") or "value"
        base = f"_{base}" if base[0].isdigit() or keyword.iskeyword(base) else base
        numbered = (f"{base}_{k}" for k in itertools.count(1))
        name = next(n for n in itertools.chain([base], numbered) if n not in self.taken)
        self.taken.add(name)
        return name


# What a graph and its containers have attributes for: no module or tensor in them can have such a name.
_ATTRIBUTES = frozenset(dir(Graph({}, (), Ref("x")))) | frozenset(dir(Sequential()))


def free(path: str) -> str:
    """A path at which a graph can hold a module or tensor: "output" and the like with an underscore behind."""
    return ".".join(f"{name}_" if name.rstrip("_") in _ATTRIBUTES else name for name in path.split("."))


class Builder:
    """Turns recorded events into nodes."""

    def __init__(self, net: nn.Module, neurons: Sequence[nn.Module]) -> None:
        self.neurons = {id(n): n for n in neurons}
        self.paths: dict[int, str] = {}
        for path, module in net.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), free(path))
        self.held = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.neuron_nodes: list[str] = []
        self.shared: list[str] = []

    def node(self, names: Names, event: Event, args: Any, kwargs: Any) -> Node:
        """The node of an event, its references resolved already."""
        if event.kind != "module":
            # Not in place, as `writing` does of modules: what follows refers to the result.
            kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
            return Node(names.new(event.name), event.kind, event.target, args, kwargs)
        path = self.paths[id(event.target)] or "0"
        self.modules[path] = event.target
        return Node(names.new(path), "module", path, args, kwargs)

    def held_node(self, names: Names, nodes: list[Node], values: dict[Any, Any], ref: Held) -> Ref:
        """A node that fetches a parameter or buffer."""
        if ref not in values:
            owner = free(ref.name.replace(".", "_"))
            self.tensors[owner] = self.held[ref.name]
            nodes.append(Node(names.new(owner), "tensor", owner))
            values[ref] = Ref(nodes[-1].name)
        found: Ref = values[ref]
        return found


def live(part: Part) -> Part:
    """Without the nodes that nothing refers to."""
    wanted = {leaf.name for leaf in leaves(part.output) if isinstance(leaf, (Ref, State))}
    kept: list[Node] = []
    for node in reversed(part.nodes):
        if node.name in wanted:
            kept.append(node)
            wanted |= {leaf.name for leaf in leaves((node.args, dict(node.kwargs))) if isinstance(leaf, (Ref, State))}
    return Part(part.inputs, tuple(reversed(kept)), part.output)
