"""A network read from a recording, or written from one: its plan as a graph, a loop and stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import Adapter
from tracetorch.adapters.networks import recurrent
from tracetorch.adapters.networks.graphs import Part, Plan
from tracetorch.adapters.networks.network import Function, Network, Stage
from tracetorch.adapters.observing import check_walk
from tracetorch.core.graph import Graph, Loop, Ref, State, leaves


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor of a nested structure, in order."""
    for leaf in leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf


@dataclass(frozen=True)
class Recorded(Network):
    """A network read from a recording, or written from one.

    Attributes:
        frame: the plan as a `Loop`: how the input is cut into steps, and what is made of the steps' outputs.
        states: for a step whose states are handed in: the first ones.
    """

    frame: Loop | None = None
    states: tuple[Tensor | None, ...] = ()

    def enter(self, x: Any) -> tuple[Tensor, ...]:
        """The inputs of all steps, each [T, B, ...]."""
        return (x,) if self.frame is None else self.frame.sequences(x)

    def own(self, x: Any) -> tuple[Tensor, ...]:
        """Every tensor that the network's own forward returns, from the initial state."""
        self.reset()
        if self.style == "sequence":
            results = tensors_of(self.root(*(xs.transpose(0, 1) for xs in self.enter(x))))
            return tuple(result.transpose(0, 1) for result in results)
        if self.style == "step":
            return stepped(self, x)
        return tuple(tensors_of(self.root(x)))

    def shown(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The step's outputs as `own` returns them."""
        if self.style in ("step", "sequence") or self.frame is None or self.frame.after is None:
            return tuple(outputs)
        return tuple(tensors_of(self.frame.after(*outputs)))


def stepped(network: Recorded, xs: Tensor) -> tuple[Tensor, ...]:
    """A network that takes one step per call, over [T, B, ...]; states that it hands out are handed in again."""
    assert network.plan is not None
    states = [None if s is None else s.new_zeros((xs.shape[1], *s.shape[1:])) for s in network.states]
    flat = [place for place in leaves(network.plan.step.output) if isinstance(place, (Ref, State))]
    back = {number: flat.index(state) for number, state in network.plan.threads.items() if state in flat}
    series = []
    for x in xs:
        results = list(tensors_of(network.root(x, *states)))
        series.append(results)
        for number, place in back.items():
            states[number - 1] = results[place]
    return tuple(torch.stack(list(each)) for each in zip(*series, strict=True))


def check_other_shape(source: Network, target: Network, x: Any) -> None:
    """Both networks on an input of another batch size and length, where the source takes one.

    Raises:
        ConversionError: one of them does not compute what its stages do.
    """
    if not isinstance(source, Recorded) or source.plan is None or not source.plan.other:
        return
    x = lengthened(x, source.plan.other)
    with torch.no_grad():
        for network in (source, target):
            check_walk(network, x, network.walk(*network.enter(x))[1])


def lengthened(value: Any, more: Mapping[int, int]) -> Any:
    """A tensor with some of its first entries once more at its end: at each dimension, so many."""
    for dim, by in more.items():
        if isinstance(value, Tensor) and value.ndim > dim:
            again = value.narrow(dim, 0, min(by, value.shape[dim]))
            value = torch.cat([value, *[again] * -(-by // max(1, again.shape[dim]))], dim)
    return value


# ---- plans as networks -----------------------------------------------------------------------------------------------


def graph_of(part: Part, plan: Plan) -> Graph:
    """A part of a plan as a module, over the plan's own modules."""
    used = {node.target for node in part.nodes if node.kind == "module"}
    held = {node.target for node in part.nodes if node.kind == "tensor"}
    return Graph(
        {path: plan.modules[path] for path in plan.modules if path in used},
        part.nodes,
        part.output,
        part.inputs,
        {name: plan.tensors[name] for name in plan.tensors if name in held},
    )


def frame_of(plan: Plan, **options: Any) -> Loop:
    """A plan as a `Loop`."""
    parts = [None if part is None else graph_of(part, plan) for part in (plan.before, plan.after)]
    return Loop(graph_of(plan.step, plan), plan.cuts, parts[0], parts[1], plan.steps, plan.carry, **options)


def stages_of(plan: Plan, owner: Adapter) -> tuple[Stage, ...]:
    """The stages of a plan's step."""
    stages = []
    for node in plan.step.nodes:
        if node.kind == "tensor":
            continue
        module = plan.modules[node.target] if node.kind == "module" else None
        plain = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], (Ref, State))
        if module is not None and plain:
            neuron = node.name in plan.neurons
            held = plan.held.get(node.name, module)
            own = recurrent.adapter_of(module, owner) if neuron else owner
            stages.append(Stage(node.target, held, module, neuron, own, (node.args[0],), node.name))
            continue
        function = Function(node, module)
        places = (*function.references, *((Ref(plan.step.inputs[0]),) if function.sized else ()))
        held = plan.held.get(node.name, function)
        stages.append(Stage(node.name, held, function, False, owner, places, node.name))
    return tuple(stages)


def network_of(
    plan: Plan, root: nn.Module, framework: str, owner: Adapter, style: str, states: tuple[Any, ...] = ()
) -> Recorded:
    """A plan as a network of stages."""
    places = tuple(leaf for leaf in leaves(plan.step.output) if isinstance(leaf, (Ref, State)))
    constants = {Ref(n.name): plan.tensors[n.target] for n in plan.step.nodes if n.kind == "tensor"}
    frame = frame_of(plan) if style == "loop" else None
    return Recorded(
        root=root,
        framework=framework,
        adapter=owner,
        stages=stages_of(plan, owner),
        outputs=places,
        plan=plan,
        style=style,
        constants=constants,
        frame=frame,
        states=states,
    )
