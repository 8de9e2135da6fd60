"""Writing the target of a conversion: each neuron built from its spec, the rest copied, put together alike."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tracetorch.adapters.base import Building, ConversionError, Note, note_origin, parameters
from tracetorch.adapters.networks import lifted, recurrent
from tracetorch.adapters.networks.carrying import share
from tracetorch.adapters.networks.chain import linked
from tracetorch.adapters.networks.graphs import Part, Plan
from tracetorch.adapters.networks.network import Network, Stage
from tracetorch.adapters.networks.recorded import Recorded, frame_of, graph_of, network_of
from tracetorch.adapters.networks.states import attribute
from tracetorch.adapters.registry import ALONE, adapter, adapter_of, framework_of
from tracetorch.core.composition import Composition
from tracetorch.core.graph import Graph, Loop, State, rewrite, stepped

Notes = dict[str, Sequence[Note]]

# A layer of sinabs forgets its feedback, and nothing else, between two calls.
_FORGETS = {
    "tracetorch": "each call of the source starts without feedback: so does each tt.unroll of the target, while calls "
    "of single steps, which the source has not, keep it",
    "snntorch": "each call of the source starts without feedback; a call of the target is one step and keeps it: call "
    "begin_sequence() of the layer where a new sequence shall start from the last states",
}


@dataclass(frozen=True)
class Order:
    """What was asked for."""

    to: str
    stock: bool
    share: bool
    approximate: bool


class SteppedLoop(Loop):
    """A `Loop` of another framework's layers, which takes one step per call, as that framework's users write it."""

    def restart(self) -> None:
        """The neurons back to their initial states."""
        for module in self.step.modules():
            if framework_of(module) is not None:
                recurrent.adapter_of(module, adapter_of(module)).reset(module)
            elif isinstance(module, recurrent.Stepped):
                module.spk = module.spk.new_zeros(0)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every step; the outputs, each [T, ...]."""
        return stepped(self.step, inputs)


def write(network: Network, order: Order) -> tuple[Network, Notes]:
    """The target network, and the notes of each neuron's build."""
    if isinstance(network, Recorded):
        return _write_recorded(network, order)
    return _write_chain(network, order)


def build_neuron(stage: Stage, order: Order, notes: Notes) -> nn.Module:
    """The target's layer of a neuron, its recurrent connection included."""
    building = Building(f"{stage.name!r}", order.to, order.stock, order.approximate)
    layer = _build(stage, order, building)
    tensors = parameters(stage.adapter, stage.inner)
    layer.to(next(iter(tensors.values())).device).train(stage.inner.training)
    if order.share:
        share(stage, layer, order.to)
    notes[stage.name] = building.notes
    if not recurrent.is_recurrent(stage.inner):
        return layer
    if not recurrent.from_start(stage.inner) and adapter(order.to).STEPPED:
        building.note("recurrence", _FORGETS[order.to])
    connection = recurrent.connection(stage.inner)
    copied = copy.deepcopy(connection, _memo([connection], order.share))
    return recurrent.build(stage.inner, layer, copied, order.to)


def _build(stage: Stage, order: Order, building: Building) -> nn.Module:
    """The target's layer: a copy of a native one in a native target, else built from its spec."""
    native: Any = adapter("tracetorch")
    own = native.is_neuron(stage.inner) and not recurrent.is_recurrent(stage.inner)
    if own and order.to == "tracetorch" and native.carries(stage.inner, order.stock):
        stage.spec()  # or the refusal of what cannot be judged
        carried: nn.Module = native.copied(stage.inner)
        return carried
    found = stage.spec()
    if isinstance(found, Composition):
        raise native.refusal(found, building)
    note_origin(found, building)
    return adapter(order.to).build(found, building)


def _memo(modules: Sequence[nn.Module], share: bool) -> dict[int, Any]:
    """For copying several modules together: what is shared among them stays so, with `share` the source's too."""
    if not share:
        return {}
    return {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy that writes into no tensor: its result is another tensor, as the calls that follow refer to it."""
    made: nn.Module = copy.deepcopy(module, memo)
    if getattr(made, "inplace", False):
        made.inplace = False  # type: ignore[assignment]
    return made


# ---- chains ----------------------------------------------------------------------------------------------------------


def _write_chain(network: Network, order: Order) -> tuple[Network, Notes]:
    target, notes, stages = adapter(order.to), Notes(), []
    memo = _memo([stage.inner for stage in network.stages if not stage.neuron], order.share)
    copies = {s.name: _copied(s.inner, memo) for s in network.stages if not s.neuron}
    for stage in network.stages:
        inner = build_neuron(stage, order, notes) if stage.neuron else copies[stage.name]
        held = inner if stage.neuron else target.wrap(inner)
        own = recurrent.adapter_of(inner, target) if stage.neuron else target
        stages.append(Stage(stage.name, held, inner, stage.neuron, own))
    modules = OrderedDict((stage.name, stage.held) for stage in stages)
    root = target.assemble(modules, network.emits_state)
    root.training = network.root.training
    return Network(root, order.to, target, linked(stages), network.emits_state and target.STEPPED), notes


# ---- recorded networks -----------------------------------------------------------------------------------------------


def _write_recorded(network: Recorded, order: Order) -> tuple[Network, Notes]:
    assert network.plan is not None
    plan, notes = network.plan, Notes()
    made: dict[str, nn.Module] = {}
    for stage in network.stages:
        if stage.neuron and stage.name not in made:
            made[stage.name] = build_neuron(stage, order, notes)
    if order.to in ALONE:
        adapter(order.to).assemble(OrderedDict(), False)  # which says so
    others = {path: module for path, module in plan.modules.items() if path not in made}
    memo = _memo(list(others.values()), order.share)
    if order.share:
        memo.update({id(tensor): tensor for tensor in plan.tensors.values()})
    modules = {path: made[path] if path in made else _copied(others[path], memo) for path in plan.modules}
    tensors = {name: copy.deepcopy(tensor, memo) for name, tensor in plan.tensors.items()}
    written = replace(plan, modules=modules, tensors=tensors, threads={}, held={})
    if adapter(order.to).STEPPED:
        return _stepped_target(network, written, order.to), notes
    return lifted.target(network, written, order.to), notes


def _stepped_target(network: Recorded, plan: Plan, to: str) -> Recorded:
    """A network of a framework whose layers take one step per call: a `Graph`, or a `Loop` of one."""

    def held(leaf: Any) -> Any:
        return State(leaf.name, attribute(to, leaf.attribute)) if isinstance(leaf, State) else leaf

    nodes = tuple(n._replace(args=rewrite(n.args, held), kwargs=rewrite(dict(n.kwargs), held)) for n in plan.step.nodes)
    shown = replace(plan, step=Part(plan.step.inputs, nodes, rewrite(plan.step.output, held)))
    root: nn.Module
    if network.style == "step":
        root = graph_of(shown.step, shown)
    elif to == "tracetorch":
        root = frame_of(shown)
    else:
        parts = [None if part is None else graph_of(part, shown) for part in (shown.before, shown.after)]
        root = SteppedLoop(graph_of(shown.step, shown), shown.cuts, parts[0], parts[1], shown.steps, shown.carry)
    for module in root.modules():
        if isinstance(module, (Graph, Loop)):
            module.training = network.root.training
    return network_of(plan, root, to, adapter(to), network.style)


def refuse_states(network: Network, target: Network) -> None:
    """A source that shows its membrane must find it in the target. Raises `ConversionError`."""
    shown = {place.name for place in network.outputs if isinstance(place, State)}
    if network.emits_state:
        shown.add(network.stages[-1].result.name)
    for mine, made in zip(network.stages, target.stages, strict=True):
        if mine.result.name not in shown:
            continue
        theirs, ours = mine.spec(), made.spec()
        if theirs.stores_before_reset and not ours.stores_before_reset and theirs.reset not in ("subtract", "none"):
            raise ConversionError(
                f"{mine.name!r}",
                "output",
                True,
                f"{target.framework} keeps the membrane after the reset, and a reset to a value loses the one before",
                "output=False in the last layer, or to='tracetorch'",
            )
