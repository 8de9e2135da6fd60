"""A network as stages in order: the neurons and the stateless calls of a time step, each run over a whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import Adapter, ConversionError, described
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks.graphs import Plan
from tracetorch.core.graph import Node, Ref, Size, State, leaves, rewrite, size_of
from tracetorch.core.spec import SpecError

Value = Ref | State


class _Verbatim(str):
    """A value already written as Python writes it."""

    def __repr__(self) -> str:
        return str(self)


class Function(nn.Module):
    """A call of a function, or of a module with more than one argument, as a module of its tensor arguments."""

    def __init__(self, node: Node, callee: nn.Module | None = None) -> None:
        super().__init__()
        self.node, self.callee = node, callee
        found = leaves((node.args, dict(node.kwargs)))
        self.references = tuple(dict.fromkeys(leaf for leaf in found if isinstance(leaf, (Ref, State))))
        self.sized = any(isinstance(leaf, Size) for leaf in leaves((node.args, dict(node.kwargs))))

    def forward(self, *values: Any) -> Any:
        """The values of `references` in order, then, if it is `sized`, the network's input."""
        given = dict(zip(self.references, values, strict=False))

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Size):
                return size_of(leaf, values[-1])
            return given[leaf] if isinstance(leaf, (Ref, State)) else leaf

        args, kwargs = rewrite(self.node.args, value), rewrite(dict(self.node.kwargs), value)
        if self.callee is not None:
            return self.callee(*args, **kwargs)
        if self.node.kind == "method":
            return getattr(args[0], self.node.target)(*args[1:], **kwargs)
        return self.node.target(*args, **kwargs)

    def extra_repr(self) -> str:
        return str(getattr(self.node.target, "__name__", self.node.target))


@dataclass(frozen=True)
class Stage:
    """One call of the network's time step.

    Attributes:
        name: its path in the source network, or a function's name.
        held: the module as its network holds it (perhaps wrapped, to fold time).
        inner: the module itself: a neuron, or a stateless module that takes one step.
        neuron: whether it is a neuron.
        adapter: of the network's framework.
        inputs: where its arguments come from.
        node: what others call its result; its name, if it is called once.
        shown: of the output and the membrane, the membrane as the source shows it, where this layer keeps another.
    """

    name: str
    held: nn.Module
    inner: nn.Module
    neuron: bool
    adapter: Adapter
    inputs: tuple[Any, ...] = (Ref("x"),)
    node: str = ""
    shown: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def result(self) -> Ref:
        """Its value."""
        return Ref(self.node or self.name)

    def apply(self, *xs: Any, first: bool = False) -> Any:
        """A stateless stage over [T, B, ...], as its network applies it, to the network's input if `first`.

        Of values without time, such as a mask times a weight, it is called once.
        """
        if all(isinstance(x, known.Constant) for x in xs):
            return known.Constant(self.held(*(x.tensor for x in xs)))
        if getattr(self.inner, "inplace", False):  # what it is given is judged, as it was before the call
            xs = tuple(x.clone() if isinstance(x, Tensor) else x for x in xs)
        if self.adapter.STEPPED or isinstance(self.held, Function):
            return known.per_step(self.held, *xs, first=first)
        if getattr(self.adapter, "TIME_FIRST", False):
            return self.held(*xs)
        return self.held(*(x.transpose(0, 1) for x in xs)).transpose(0, 1)

    def membrane(self, y: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """Of the output and states that a trace gave, the membrane as the source shows it."""
        return stored_membrane(states) if self.shown is None else self.shown(y, states["v_mem"])

    def spec(self) -> Any:
        """The neuron's spec; of a native layer that no spec describes its `Composition`.

        Raises `ConversionError` naming the layer.
        """
        try:
            return described(self.adapter, self.inner)
        except SpecError as error:
            what, _, why = str(error).partition(": ")
            attribute, equals, value = what.partition("=")
            attribute, value = (attribute, _Verbatim(value)) if equals else ("class", type(self.inner).__qualname__)
            remedy = "use what can be read, or change the layer as said"
            raise ConversionError(f"{self.name!r}", attribute, value, why or what, remedy) from error


def stored_membrane(states: Mapping[str, Tensor]) -> Tensor:
    """The membrane among the states of a layer; of a pair of traces their sum."""
    return states["v_mem"] if "v_mem" in states else states["pos_mem"] + states["neg_mem"]


@dataclass(frozen=True)
class Seen:
    """A stage, and what it received and gave over the whole sequence."""

    stage: Stage
    xs: tuple[Any, ...]
    y: Any
    states: dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """Stages in order and the module they belong to.

    Attributes:
        root: an ordinary module of its framework.
        framework: its name.
        adapter: of it.
        stages: of one time step, each with the places its arguments come from.
        emits_state: a chain whose last neuron returns its state beside the spikes.
        outputs: what the step gives; of a chain, the last stage's value.
        plan: what a recorded network does before and after its steps.
        style: how `root` is called: "chain" (see `adapter.STEPPED`), "step", "loop", or "sequence" ([B, T, ...]).
    """

    root: nn.Module
    framework: str
    adapter: Adapter
    stages: tuple[Stage, ...]
    emits_state: bool = False
    outputs: tuple[Any, ...] = ()
    plan: Plan | None = None
    style: str = "chain"
    constants: Mapping[Ref, Tensor] = field(default_factory=dict)

    def enter(self, x: Any) -> tuple[Tensor, ...]:
        """The inputs of all steps, each [T, B, ...], of what `verify` was given."""
        return (x,)

    def walk(self, *xs: Tensor) -> tuple[list[Seen], tuple[Tensor, ...]]:
        """Stage by stage over the whole sequence [T, B, ...] from the initial state; and the step's outputs."""
        names = ("x",) if self.plan is None else self.plan.step.inputs
        values: dict[Any, Any] = {Ref(name): value for name, value in zip(names, xs, strict=True)}
        values.update({ref: known.Constant(tensor) for ref, tensor in self.constants.items()})
        seen = []
        for stage in self.stages:
            # Aliases, so that a value that several stages take has a gradient of its own through each.
            given = tuple(known.alias(values[place]) for place in stage.inputs)
            states: dict[str, Tensor] = {}
            if stage.neuron:
                y, states = stage.adapter.trace(stage.inner, given[0])
            else:
                y = stage.apply(*given, first=self.takes_input(stage))
            values[stage.result] = y
            values.update({State(stage.result.name, name): state for name, state in states.items()})
            if stage.shown is not None:
                values[State(stage.result.name, "v_mem")] = stage.membrane(y, states)
            seen.append(Seen(stage, given, y, states))
        return seen, tuple(values[place] for place in self.outputs or (self.stages[-1].result,))

    def places(self) -> Iterator[Any]:
        """Every value that a stage or the output refers to."""
        for stage in self.stages:
            yield from stage.inputs
        yield from self.outputs

    def takes_input(self, stage: Stage) -> bool:
        """Whether a stage is called with the network's input itself, cut into steps."""
        names = ("x",) if self.plan is None else self.plan.step.inputs
        return any(isinstance(place, Ref) and place.name in names for place in stage.inputs)

    def forward(self, xs: Tensor) -> Tensor:
        """A chain's own forward over [T, B, ...] from the initial state; the spikes, if it returns more."""
        self.reset()
        if self.adapter.STEPPED:
            results = [self.root(x) for x in xs]
            return torch.stack([r[0] if isinstance(r, tuple) else r for r in results])
        return self.root(xs.transpose(0, 1)).transpose(0, 1)

    def own(self, x: Any) -> tuple[Tensor, ...]:
        """The network's own forward on what `verify` was given, from the initial state: every tensor it returns."""
        return (self.forward(x),)

    def shown(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The step's outputs as `own` returns them."""
        return tuple(outputs)

    def remarks(self) -> tuple[str, ...]:
        """What is to be known of it beyond its layers."""
        return () if self.plan is None else self.plan.remarks

    def reset(self) -> None:
        """Every neuron back to its initial state."""
        for stage in self.stages:
            if stage.neuron:
                stage.adapter.reset(stage.inner)


def _held_states(stage: Stage) -> Iterator[tuple[nn.Module, str]]:
    """The attributes that a call of a neuron changes, and whose they are."""
    yield from ((stage.inner, name) for name in stage.adapter.states(stage.inner))
    yield from ((whole, name) for whole in getattr(stage.inner, "whole", ()) for name in stage.adapter.states(whole))
    inside = getattr(stage.inner, "neuron", None)
    base = getattr(stage.adapter, "base", None)
    if base is not None and isinstance(inside, nn.Module):
        yield from ((inside, name) for name in base.states(inside))
    if stage.held is not stage.inner and hasattr(stage.held, "last"):  # under another calling convention
        yield stage.held, "last"


@contextmanager
def preserved(network: Network) -> Iterator[None]:
    """Put back, whatever happens, every hidden state that running the network changes."""
    saved: list[tuple[nn.Module, str, Any, Any]] = []
    absent = object()
    for stage in network.stages:
        if stage.neuron:
            for module, name in _held_states(stage):
                buffer = module._buffers.get(name, absent)
                saved.append((module, name, buffer, module.__dict__.get(name, absent)))
    try:
        yield
    finally:
        for module, name, buffer, attribute in saved:
            for store, value in ((module._buffers, buffer), (module.__dict__, attribute)):
                if value is absent:
                    store.pop(name, None)
                else:
                    store[name] = value


# A LeakyParallel (snntorch 1.0.0) takes from the gradient of its hidden matrix all but the diagonal, by such a hook.
_OWN = ("snntorch._neurons.leakyparallel", "LeakyParallel.grad_hook")


def _foreign(hooks: Mapping[int, Any]) -> list[Any]:
    """Hooks of a tensor that are not its framework's own."""
    return [h for h in hooks.values() if (getattr(h, "__module__", ""), getattr(h, "__qualname__", "")) != _OWN]


def refuse_hooks(module: nn.Module, path: str) -> None:
    """Raises `ConversionError` if a call of the module, or the gradient of a parameter of it, runs hooks."""
    hooks: list[Any] = [module._forward_hooks, module._forward_pre_hooks]
    hooks += [module._backward_hooks, module._backward_pre_hooks]
    hooks += [_foreign(t._backward_hooks or {}) for t in module.parameters(recurse=False)]
    if any(hooks):
        raise ConversionError(
            f"{path!r}",
            "hooks",
            type(module).__name__,
            "a hook may change what the layer computes",
            "remove it",
        )
