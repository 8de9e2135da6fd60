"""A source's own forward, run as it stands with the target's layers in it: where no graph can hold what it does.

A branch on a tensor's value, a step that makes other calls than the one before, a call counter, a state of the user's
own: the target is then a copy of the source's module in which each neuron is a layer of the target that is called as
the source's layer is (`conventions`). Nothing of the forward is guessed, and nothing of it is judged but what it gives;
every call of a layer in it is (`calls`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.networks import recurrent, writing
from tracetorch.adapters.networks.conventions import BEFORE_RESET, Called, called
from tracetorch.adapters.networks.graphs import free
from tracetorch.adapters.networks.keeping import kept
from tracetorch.adapters.networks.lifted import before_reset
from tracetorch.adapters.networks.modules import is_known
from tracetorch.adapters.networks.network import Network, Stage, preserved, refuse_hooks
from tracetorch.adapters.networks.recorded import Recorded, tensors_of
from tracetorch.adapters.networks.recording import Held, NoGraph, leaves_of, record
from tracetorch.adapters.networks.sources import neurons_of
from tracetorch.adapters.networks.writing import Notes, Order, build_neuron
from tracetorch.adapters.registry import adapter
from tracetorch.core.graph import Ref, leaves, rewrite


@dataclass(frozen=True)
class AsItStands(Network):
    """A network whose own forward is run; its stages are the layers that are called in it, in no order.

    Attributes:
        why: what keeps it from being a graph.
        loops: one call runs over time itself.
        graph: what a neuron that is called several times in a step leaves of it: a graph whose layers cannot be run one
            after the other over the whole sequence, so that it is judged as a forward that is run.
        unused: layers that no call of the sample's forward reaches, whatever its values: converted, and not judged.
        direct: names of the parameters that the forward uses beside its layers.
    """

    why: str = ""
    loops: bool = False
    unused: tuple[Stage, ...] = ()
    direct: frozenset[str] = frozenset()
    graph: Recorded | None = None

    def remarks(self) -> tuple[str, ...]:
        """What the report says of it beyond its layers."""
        if self.graph is not None:
            return (*self.graph.remarks(), self.why)
        found = (f"stepped: its own forward, run as it stands with the target's layers in it: {self.why}",)
        names = ", ".join(stage.name for stage in self.unused)
        return (*found, f"not called on the sample, so not judged: {names}") if names else found

    def inputs(self, x: Any) -> list[Tensor]:
        """The arguments of its calls: x, or each step of x [T, B, ...]; of their own, so that none is written to."""
        return [step.clone() for step in x] if self.style == "step" else [x.clone()]

    def own(self, x: Any) -> tuple[Tensor, ...]:
        """Every tensor that its own forward returns, call by call, from the initial states."""
        self.reset()
        with kept(self.root):
            return self.go_on(self.inputs(x))

    def go_on(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every tensor that it returns, from the states that it has."""
        return tuple(tensor for x in inputs for tensor in tensors_of(self.root(x)))


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(net: nn.Module, sample: Any, time_dim: int | None, refusal: NoGraph) -> AsItStands:
    """The network as it stands.

    Args:
        net, sample, time_dim: as of `convert`.
        refusal: why it is no graph.

    Raises:
        ConversionError: chance, or states handed in from outside.
    """
    framework, neurons = neurons_of(net)
    owner = adapter(framework)
    if isinstance(sample, tuple):
        why = "states are handed in from outside, and which of its outputs they become is not known"
        raise ConversionError("''", "sample", f"{len(sample)} arguments", why, "a forward that takes its input alone")
    for path, module in net.named_modules():
        refuse_hooks(module, path)
    known = {id(n) for n in neurons}
    layers = leaves_of(net, lambda m: id(m) in known or is_known(m))
    paths = {id(module): path for path, module in net.named_modules()}
    stages = tuple(_stage(paths[id(m)], m, m, id(m) in known, owner) for m in layers)
    inside = {id(p) for m in layers for p in m.parameters()}
    constants = {Ref(name): p for name, p in net.named_parameters() if id(p) not in inside}
    style = "loop" if time_dim is None else "step"
    why = f"{refusal.field} {refusal.value}: {refusal.why}"
    network = AsItStands(net, framework, owner, stages, style=style, why=why, constants=constants)
    x = sample if time_dim is None else sample.movedim(time_dim, 0)
    return _seen(network, x, layers)


def _stage(path: str, held: nn.Module, inner: nn.Module, neuron: bool, owner: Any) -> Stage:
    """Of a neuron, with its adapter; of a stateless module, which is called as it is in the source."""
    own = recurrent.adapter_of(inner, owner) if neuron else adapter("tracetorch")
    return Stage(path, held, inner, neuron, own)


def of_graph(graph: Recorded, sample: Any, time_dim: int | None) -> AsItStands:
    """A network that is a graph, but for neurons that are called several times in a step, as one to be run.

    Raises:
        ConversionError: as `read`.
    """
    assert graph.plan is not None
    names = ", ".join(graph.plan.shared)
    why = f"{names}: called several times in a step, each call advances the one state, in the source's order"
    network = read(graph.root, sample, time_dim, NoGraph("''", "neuron", "used twice", why, ""))
    held = {
        place.name: place for place in network.constants if free(place.name.replace(".", "_")) in graph.plan.tensors
    }
    constants = {place: network.constants[place] for place in held.values()}
    loops = graph.style == "loop"
    return replace(network, why=why, graph=graph, unused=(), constants=constants, loops=loops)


def _seen(network: AsItStands, x: Tensor, layers: Sequence[nn.Module]) -> AsItStands:
    """The network with what a recording of it shows. Raises `ConversionError` where chance has a part in it."""
    counts: Counter[int] = Counter()
    most, branches, direct = 0, False, set[str]()
    with preserved(network), kept(network.root), torch.no_grad():
        network.reset()
        for value in network.inputs(x):
            tape = record(network.root, (value,), layers)
            if tape.random:
                why = "it draws random numbers, and what depends on chance cannot be compared"
                raise ConversionError("''", "forward", tape.random[0], why, "draw them outside; net.eval()")
            now = Counter(id(event.target) for event in tape.events if event.kind == "module")
            most = max([most, *(now[id(stage.inner)] for stage in network.stages if stage.neuron)])
            branches, counts = branches or bool(tape.value_reads), counts + now
            direct |= {leaf.name for e in tape.events for leaf in leaves((e.args, e.kwargs)) if isinstance(leaf, Held)}
    unused = tuple(stage for stage in network.stages if not counts[id(stage.inner)])
    if branches and unused:
        why = "the sample takes no branch that calls it: nothing is known of it"
        raise ConversionError(f"{unused[0].name!r}", "calls", 0, why, "a sample that reaches it")
    used = tuple(stage for stage in network.stages if counts[id(stage.inner)])
    loops = network.style == "loop" and (most > 1 or not network.adapter.STEPPED)
    return replace(network, stages=used, unused=unused, loops=loops, direct=frozenset(direct))


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(network: AsItStands, order: Order) -> tuple[AsItStands, Notes]:
    """The copy of the network with the target's layers in it, and the notes of each neuron's build.

    Raises:
        ConversionError: a layer that the target has not, or cannot call so; or a network that cannot be copied.
    """
    if network.graph is not None:
        return _write_graph(network, network.graph, order)
    notes, layers, made = Notes(), dict[int, nn.Module](), dict[int, nn.Module]()
    for stage in (*network.stages, *network.unused):
        if stage.neuron:
            layers[id(stage.inner)] = layer = build_neuron(stage, order, notes)
            made[id(stage.inner)] = called(layer, stage, order.to, _names(stage, layer, order.to))
    root = _copied_root(network.root, made, order.share)
    own, stages = adapter(order.to), []
    for stage in network.stages:
        held = root.get_submodule(stage.name)
        if stage.neuron:
            stages.append(_of_target(stage, held, layers[id(stage.inner)], own))
        else:
            stages.append(_stage(stage.name, held, held, False, own))
    tensors = dict(root.named_parameters())
    constants = {ref: tensors[ref.name] for ref in network.constants}
    return replace(
        network, root=root, framework=order.to, adapter=own, stages=tuple(stages), constants=constants
    ), notes


def _copied_root(root: nn.Module, made: Mapping[int, nn.Module], share: bool) -> nn.Module:
    """A copy of the network, each neuron replaced."""
    memo: dict[int, Any] = dict(made)
    if share:
        memo.update({id(tensor): tensor for tensor in (*root.parameters(), *root.buffers())})
    try:
        return copy.deepcopy(root, memo)
    except (RuntimeError, TypeError) as error:
        why = f"its forward is run as it stands, and the module cannot be copied: {error}"
        raise ConversionError("''", "module", type(root).__name__, why, "keep only plain values in it") from error


def _of_target(source: Stage, held: nn.Module, layer: nn.Module, owner: Any) -> Stage:
    """A neuron's stage; where its layer shows another membrane than it keeps, with how."""
    stage = _stage(source.name, held, layer, True, owner)
    if isinstance(held, Called) and held.membrane == BEFORE_RESET:
        return replace(stage, shown=partial(before_reset, held.bare))
    return stage


def _write_graph(network: AsItStands, graph: Recorded, order: Order) -> tuple[AsItStands, Notes]:
    """The target of a network that is a graph, to be run."""
    written, notes = writing.write(graph, order)
    own = adapter(order.to)
    parts = [written.root.step, written.root.before, written.root.after] if network.loops else [written.root]
    found: dict[str, nn.Module] = {}
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if isinstance(part, nn.Module):
            found.update(part.named_modules())
            tensors.update({**dict(part.named_parameters()), **dict(part.named_buffers())})
    held = {stage.name: found[free(stage.name)] for stage in network.stages}
    stages = tuple(_stage(s.name, held[s.name], held[s.name], s.neuron, own) for s in network.stages)
    constants = {place: tensors[free(place.name.replace(".", "_"))] for place in network.constants}
    return replace(
        network, root=written.root, framework=order.to, adapter=own, stages=stages, constants=constants
    ), notes


def _names(stage: Stage, layer: nn.Module, to: str) -> Mapping[str, str]:
    """The source layer's attribute -> the target layer's, of each parameter."""
    theirs = stage.adapter.attributes(stage.inner)
    ours = recurrent.adapter_of(layer, adapter(to)).attributes(layer)
    return {attribute: ours[name] for name, attribute in theirs.items() if name in ours}


# ---- running ---------------------------------------------------------------------------------------------------------


def check_second_call(source: AsItStands, target: AsItStands, x: Tensor) -> None:
    """Both called twice in a row must agree in the second call as they do in the first.

    Raises:
        ConversionError: the source's forward changes its neurons' states in a way that the target does not follow.
    """
    found = []
    for network in (source, target):
        network.reset()
        with kept(network.root), torch.no_grad():
            found.append([network.go_on(network.inputs(x)) for _ in range(2)])
    (first, second), (mine, again) = found
    if any(same(first, mine) and not same(second, again) for same in (_same, _close)):
        why = "source and target agree in the first call, and not in a second one that follows it"
        remedy = "the reset of the layers' states by their own reset_mem(), or outside the network"
        raise ConversionError("''", "state", "kept from call to call", why, remedy)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """The same numbers, tensor by tensor."""
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _close(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Of layers that round: no spike decided otherwise, so that all that is computed of them is near."""
    near = [x.shape == y.shape and torch.allclose(x, y, 1e-3, 1e-3) for x, y in zip(a, b, strict=False)]
    return len(a) == len(b) and all(near)


def stacked(results: Sequence[Any], dim: int) -> Any:
    """The structure of one step's result, every tensor of all steps stacked."""
    series = [iter(list(tensors_of(result))) for result in results]
    return rewrite(
        results[0], lambda leaf: torch.stack([next(s) for s in series], dim) if isinstance(leaf, Tensor) else leaf
    )
