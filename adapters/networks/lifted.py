"""Networks over whole sequences, batch first: the calls of one step lifted to [B, T, ...]."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.networks import recurrent
from tracetorch.adapters.networks.graphs import Plan, free
from tracetorch.adapters.networks.network import Function, Stage
from tracetorch.adapters.networks.recorded import Recorded, network_of
from tracetorch.adapters.networks.sequences import Lifted
from tracetorch.adapters.registry import adapter
from tracetorch.core.graph import Graph, Node, Ref, State, rewrite


@dataclass(frozen=True)
class Taken:
    """What a spike of a sinabs layer takes off its membrane.

    Attributes:
        constant: the amount, where it is one; else the threshold, or threshold / alpha.
        over_decay: whether it is threshold / alpha.
        detached: whether no gradient reaches the spikes through it.
    """

    constant: Tensor | None
    over_decay: bool
    detached: bool

    def amount(self, neuron: Any) -> Tensor:
        """Of the layer's present parameters."""
        threshold: Tensor = neuron.spike_threshold
        if self.constant is not None:
            return self.constant.to(threshold)
        return threshold / neuron.alpha_mem_calculated if self.over_decay else threshold


def taken_by(neuron: Any) -> Taken | None:
    """Of a layer, as it is now; None where a spike takes nothing."""
    choices = adapter("sinabs").spec(neuron)
    if choices.output != "spikes" or choices.reset == "none":
        return None
    constant = choices.parameters["reset_amount"].value if choices.reset_amount == "value" else None
    return Taken(
        None if constant is None else torch.from_numpy(constant.copy()),
        choices.reset_amount == "threshold_over_decay",
        choices.reset_gradient == "detached",
    )


def before_reset(neuron: Any, spikes: Tensor, v_mem: Tensor, taken: Taken | None = None) -> Tensor:
    """The membrane before its reset, of a sinabs layer, from what it is after: what is subtracted is added again.

    `taken`: of the layer, if it is known already.
    """
    taken = taken or taken_by(neuron)
    if taken is None:
        return v_mem
    return v_mem + (spikes.detach() if taken.detached else spikes).to(v_mem.dtype) * taken.amount(neuron)


class WithMembrane(nn.Module):
    """A sinabs neuron that returns its membrane, or other states, beside its spikes.

    Args:
        neuron: the layer.
        as_before_reset: the membrane before its reset, as snnTorch shows it; else after it, as sinabs does.
        states: the states that it returns, in order.
    """

    def __init__(self, neuron: nn.Module, as_before_reset: bool, states: tuple[str, ...] = ("v_mem",)) -> None:
        super().__init__()
        self.neuron, self.as_before_reset, self.shown = neuron, as_before_reset, states

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [B, T, ...] -> spikes and states, of the same shape."""
        layer: Any = self.neuron
        recurs = isinstance(layer, recurrent.Sequenced)
        neuron = layer.neuron if recurs else layer
        spikes, found = (self._step_by_step if recurs else self._at_once)(layer, x)
        if self.as_before_reset and "v_mem" in found:
            found["v_mem"] = before_reset(neuron, spikes, found["v_mem"])
        return spikes, *(found[name] for name in self.shown)

    def _at_once(self, neuron: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        recording, neuron.record_states = neuron.record_states, True
        try:
            spikes = neuron(x)
        finally:
            neuron.record_states = recording
        return spikes, {name: neuron.recordings[name] for name in self.shown}

    def _step_by_step(self, layer: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The neuron of a recurrent layer is called once per step, so that its states are collected there."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.shown}

        def keep(module: Any, args: Any, result: Any) -> None:
            for name, series in found.items():
                series.append(getattr(module, name))

        hook = layer.neuron.register_forward_hook(keep)
        try:
            spikes = layer(x)
        finally:
            hook.remove()
        return spikes, {name: torch.stack(series, 1) for name, series in found.items()}


class _Writer:
    """Writes the graph over [B, T, ...] of a plan."""

    def __init__(self, source: Recorded, plan: Plan) -> None:
        self.source, self.plan = source, plan
        self.modules: dict[str, nn.Module] = {}
        self.nodes: list[Node] = []
        # By the name of a node: the module that is called, and how its membrane is shown, if not as it is.
        self.held: dict[str, nn.Module] = {}
        self.shown: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {}
        # The states that are read of each neuron.
        self.read: dict[str, list[str]] = {}
        for place in dict.fromkeys(place for place in source.places() if isinstance(place, State)):
            self.read.setdefault(place.name, []).append(place.attribute)
        self.constants = {Ref(n.name): plan.tensors[n.target] for n in plan.step.nodes if n.kind == "tensor"}
        # What is computed of these alone.
        self.timeless: set[Ref] = set()
        own = {path.split(".")[0] for path in plan.modules}
        self.container = next(name for name in ("functions", "functions_of_step", "calls") if name not in own)

    def write(self) -> Graph:
        """Of every node of the step, in order."""
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
        output = self.places(self.plan.step.output)
        if self.source.style == "loop" and len(output) == 1:
            output = output[0]  # of a loop the outputs of a step are always a tuple
        return Graph(self.modules, self.nodes, output, self.plan.step.inputs)

    def places(self, value: Any) -> Any:
        """Arguments, each state in them as the node that its neuron's call gives it as."""
        return rewrite(value, lambda leaf: Ref(f"{leaf.name}_{leaf.attribute}") if isinstance(leaf, State) else leaf)

    def neuron(self, node: Node) -> None:
        """The call of a neuron; where its states are read, of one that returns them too, and a node for each."""
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
        states = self.read[node.name]
        self.modules[node.target] = WithMembrane(neuron, differs, tuple(states))
        both = f"{node.name}_both"
        self.nodes.append(node._replace(name=both, args=self.places(node.args)))
        for k, name in enumerate([node.name, *(f"{node.name}_{state}" for state in states)]):
            self.nodes.append(Node(name, "function", operator.getitem, (Ref(both), k)))

    def function(self, node: Node) -> None:
        """A function, or a module of several arguments, over the whole sequence."""
        callee = self.plan.modules[node.target] if node.kind == "module" else None
        function = Function(node, callee)
        places = (*function.references, *((Ref(self.plan.step.inputs[0]),) if function.sized else ()))
        computed = [k for k, place in enumerate(places) if place in self.timeless]
        lifted = Lifted(function, tuple(self.constants.get(place) for place in places), computed=computed)
        if all(lifted.timeless):
            self.timeless.add(Ref(node.name))
        self.held[node.name] = function
        path = f"{self.container}.{free(node.name)}"
        self.modules[path] = lifted
        handed = tuple(place for place in places if place not in self.constants)
        self.nodes.append(Node(node.name, "module", path, self.places(handed)))


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
