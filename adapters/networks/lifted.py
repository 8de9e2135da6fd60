"""Networks over whole sequences, batch first: the calls of one step lifted to [B, T, ...]."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.networks import recurrent
from tracetorch.adapters.networks.graphs import Plan
from tracetorch.adapters.networks.network import Function, Stage
from tracetorch.adapters.networks.recorded import Recorded, network_of
from tracetorch.adapters.networks.sequences import Lifted
from tracetorch.adapters.registry import adapter
from tracetorch.core.graph import Graph, Node, Ref, State, rewrite


def before_reset(neuron: Any, spikes: Tensor, v_mem: Tensor) -> Tensor:
    """The membrane before its reset, of a sinabs layer, from what it is after: what is subtracted is added again."""
    choices = adapter("sinabs").spec(neuron)
    if choices.output != "spikes" or choices.reset == "none":
        return v_mem
    amount = neuron.spike_threshold
    if choices.reset_amount == "threshold_over_decay":
        amount = amount / neuron.alpha_mem_calculated
    elif choices.reset_amount == "value":
        amount = torch.from_numpy(choices.parameters["reset_amount"].value.copy()).to(v_mem)
    once = spikes.detach() if choices.reset_gradient == "detached" else spikes
    return v_mem + once.to(v_mem.dtype) * amount


class WithMembrane(nn.Module):
    """A sinabs neuron that returns its membrane beside its spikes.

    Args:
        neuron: the layer.
        as_before_reset: the membrane before its reset, as snnTorch shows it; else after it, as sinabs does.
    """

    def __init__(self, neuron: nn.Module, as_before_reset: bool) -> None:
        super().__init__()
        self.neuron, self.as_before_reset = neuron, as_before_reset

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, T, ...] -> spikes and membranes, of the same shape."""
        neuron: Any = self.neuron
        if isinstance(neuron, recurrent.Sequenced):
            return self._recurrent(neuron, x)
        recording, neuron.record_states = neuron.record_states, True
        try:
            spikes = neuron(x)
        finally:
            neuron.record_states = recording
        membrane = neuron.recordings["v_mem"]
        return spikes, before_reset(neuron, spikes, membrane) if self.as_before_reset else membrane

    def _recurrent(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its neuron is called once per step, so that its membranes are collected there."""
        found: list[Tensor] = []
        hook = layer.neuron.register_forward_hook(lambda module, args, result: found.append(module.v_mem))
        try:
            spikes = layer(x)
        finally:
            hook.remove()
        membrane = torch.stack(found, 1)
        return spikes, before_reset(layer.neuron, spikes, membrane) if self.as_before_reset else membrane


class _Writer:
    """Writes the graph over [B, T, ...] of a plan."""

    def __init__(self, source: Recorded, plan: Plan) -> None:
        self.source, self.plan = source, plan
        self.modules: dict[str, nn.Module] = {}
        self.nodes: list[Node] = []
        self.held: dict[str, nn.Module] = {}
        self.shown: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {}
        self.read = {place.name for place in source.places() if isinstance(place, State)}
        self.constants = {Ref(n.name): plan.tensors[n.target] for n in plan.step.nodes if n.kind == "tensor"}

    def write(self) -> Graph:
        for node in self.plan.step.nodes:
            if node.kind == "tensor":
                continue
            if node.name in self.plan.neurons:
                self.neuron(node)
            elif node.kind == "module" and len(node.args) == 1 and not node.kwargs:
                module = self.plan.modules[node.target]
                if node.target not in self.modules:
                    self.modules[node.target] = adapter("sinabs").wrap(module)
                self.held[node.name] = self.modules[node.target]
                self.nodes.append(node._replace(args=self.places(node.args)))
            else:
                self.function(node)
        return Graph(self.modules, self.nodes, self.places(self.plan.step.output), self.plan.step.inputs)

    def places(self, value: Any) -> Any:
        return rewrite(value, lambda leaf: Ref(f"{leaf.name}_{leaf.attribute}") if isinstance(leaf, State) else leaf)

    def neuron(self, node: Node) -> None:
        neuron = self.plan.modules[node.target]
        self.modules[node.target] = self.held[node.name] = neuron
        if node.name not in self.read:
            self.nodes.append(node._replace(args=self.places(node.args)))
            return
        theirs = next(stage.spec() for stage in self.source.stages if stage.result.name == node.name)
        ours = recurrent.adapter_of(neuron, adapter("sinabs")).spec(neuron)
        differs = theirs.stores_before_reset and not ours.stores_before_reset
        bare = neuron.neuron if isinstance(neuron, recurrent.Sequenced) else neuron
        self.shown[node.name] = partial(before_reset, bare) if differs else None
        self.modules[node.target] = WithMembrane(neuron, differs)
        both = f"{node.name}_both"
        self.nodes.append(node._replace(name=both, args=self.places(node.args)))
        self.nodes.append(Node(node.name, "function", operator.getitem, (Ref(both), 0)))
        self.nodes.append(Node(f"{node.name}_v_mem", "function", operator.getitem, (Ref(both), 1)))

    def function(self, node: Node) -> None:
        callee = self.plan.modules[node.target] if node.kind == "module" else None
        function = Function(node, callee)
        places = (*function.references, *((Ref(self.plan.step.inputs[0]),) if function.sized else ()))
        lifted = Lifted(function, tuple(self.constants.get(place) for place in places))
        self.held[node.name] = function
        path = f"functions.{node.name}"
        self.modules[path] = lifted
        timed = tuple(place for place in places if place not in self.constants)
        if not timed:
            why = "it depends on nothing that changes over time"
            raise ConversionError(f"{node.name!r}", "forward", node.target, why, "compute it before the loop")
        self.nodes.append(Node(node.name, "module", path, self.places(timed)))


def target(source: Recorded, plan: Plan, to: str) -> Recorded:
    """The target of a recorded network, as a module over [B, T, ...] that gives the step's outputs, likewise."""
    writer = _Writer(source, plan)
    root = writer.write()
    root.training = source.root.training
    network = network_of(plan, root, to, adapter(to), "sequence")
    stages = tuple(_lifted(stage, writer) for stage in network.stages)
    frame = source.frame
    return replace(network, stages=stages, frame=frame)


def _lifted(stage: Stage, writer: _Writer) -> Stage:
    name = stage.result.name
    return replace(stage, held=writer.held[name], shown=writer.shown.get(name))
