"""Reading a network: an `nn.Sequential` of stateless torch modules and neurons, as a chain of stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters import modules as known
from tracetorch.adapters.base import Adapter, ConversionError
from tracetorch.adapters.registry import adapter, framework_of
from tracetorch.core.model import Sequential
from tracetorch.core.spec import NeuronSpec, SpecError


class _Verbatim(str):
    """A value already written as Python writes it."""

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Stage:
    """One module of the chain.

    Attributes:
        name: its path in the source network.
        held: the module as its network holds it (perhaps wrapped, to fold time).
        inner: the module itself: a neuron, or a stateless module that takes one step.
        neuron: whether it is a neuron.
        adapter: of the network's framework.
    """

    name: str
    held: nn.Module
    inner: nn.Module
    neuron: bool
    adapter: Adapter

    def apply(self, xs: Tensor, first: bool) -> Tensor:
        """A stateless stage over [T, B, ...], as its network applies it, `first` of its stages or not."""
        if self.adapter.STEPPED:
            return known.per_step(self.held, xs, first)
        return self.held(xs.transpose(0, 1)).transpose(0, 1)

    def spec(self) -> NeuronSpec:
        """The neuron's spec. Raises `ConversionError` naming the layer."""
        try:
            return self.adapter.spec(self.inner)
        except SpecError as error:
            what, _, why = str(error).partition(": ")
            field, equals, value = what.partition("=")
            field, value = (field, _Verbatim(value)) if equals else ("class", type(self.inner).__qualname__)
            remedy = "use what can be read, or change the layer as said"
            raise ConversionError(f"{self.name!r}", field, value, why or what, remedy) from error


@dataclass(frozen=True)
class Network:
    """A chain of stages and the module they belong to."""

    root: nn.Module
    framework: str
    adapter: Adapter
    stages: tuple[Stage, ...]
    emits_state: bool

    def chain(self, xs: Tensor) -> Iterator[tuple[Stage, Tensor, Tensor, dict[str, Tensor]]]:
        """Stage by stage over the whole sequence [T, B, ...] from the initial state: stage, input, output, states."""
        for k, stage in enumerate(self.stages):
            if stage.neuron:
                ys, states = stage.adapter.trace(stage.inner, xs)
            else:
                ys, states = stage.apply(xs, first=k == 0), {}
            yield stage, xs, ys, states
            xs = ys

    def forward(self, xs: Tensor) -> Tensor:
        """The network's own forward over [T, B, ...] from the initial state; the spikes, if it returns more."""
        self.reset()
        if self.adapter.STEPPED:
            results = [self.root(x) for x in xs]
            return torch.stack([r[0] if isinstance(r, tuple) else r for r in results])
        return self.root(xs.transpose(0, 1)).transpose(0, 1)

    def reset(self) -> None:
        """Every neuron back to its initial state."""
        for stage in self.stages:
            if stage.neuron:
                stage.adapter.reset(stage.inner)


@contextmanager
def preserved(network: Network) -> Iterator[None]:
    """Put back, whatever happens, every hidden state that running the network changes."""
    saved: list[tuple[nn.Module, str, Any, Any]] = []
    absent = object()
    for stage in network.stages:
        if stage.neuron:
            for name in stage.adapter.states(stage.inner):
                buffer = stage.inner._buffers.get(name, absent)
                saved.append((stage.inner, name, buffer, stage.inner.__dict__.get(name, absent)))
    try:
        yield
    finally:
        for module, name, buffer, attribute in saved:
            for store, value in ((module._buffers, buffer), (module.__dict__, attribute)):
                if value is absent:
                    store.pop(name, None)
                else:
                    store[name] = value


def _children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested Sequentials in order, with their paths."""
    for name, child in module._modules.items():  # named_children leaves out a module that stands there again
        assert child is not None
        path = f"{prefix}{name}"
        _refuse_hooks(child, path)
        if type(child) in (nn.Sequential, Sequential):
            yield from _children(child, f"{path}.")
        else:
            yield path, child


def _refuse_hooks(module: nn.Module, path: str) -> None:
    hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
    hooks += [t._backward_hooks or {} for t in module.parameters(recurse=False)]
    if any(hooks):
        raise ConversionError(
            f"{path!r}",
            "hooks",
            type(module).__name__,
            "a hook may change what the layer computes",
            "remove it",
        )


def _batch_first_stages(path: str, child: nn.Module, owner: Adapter) -> Iterator[Stage]:
    """Stages of a stateless module of a network over [B, T, ...]: bare, or wrapped to fold time into the batch."""
    inner = getattr(child, "module", None)
    if type(child).__name__ in ("Repeat", "PerStep") and isinstance(inner, nn.Module):
        _refuse_hooks(inner, f"{path}.module")
        parts = (
            list(_children(inner, f"{path}.module.")) if type(inner) is nn.Sequential else [(f"{path}.module", inner)]
        )
        for name, part in parts:
            held = child if part is inner else type(child)(part)
            yield Stage(name, held, part, False, owner)
    elif type(child) is nn.Flatten and child.start_dim == 2:
        end = child.end_dim - 1 if child.end_dim > 0 else child.end_dim
        yield Stage(path, child, nn.Flatten(1, end), False, owner)
    elif type(child) in known.KNOWN and type(child) not in (
        nn.Linear,
        *known.ELEMENTWISE,
        *known.DROPOUT,
        nn.LayerNorm,
    ):
        raise ConversionError(
            f"{path!r}",
            "module",
            type(child).__name__,
            "it would mix time with its own dimensions",
            "sinabs.layers.Repeat",
        )
    else:
        yield Stage(path, child, child, False, owner)


def _emits_state(neuron: nn.Module) -> bool:
    """Whether a call returns the state beside the spikes (snnTorch)."""
    return bool(getattr(neuron, "output", False)) or not getattr(neuron, "init_hidden", True)


def _check_stateless(stage: Stage) -> None:
    if not known.is_known(stage.inner):
        cls = type(stage.inner)
        raise ConversionError(
            f"{stage.name!r}",
            "module",
            f"{cls.__module__}.{cls.__qualname__}",
            "it is neither a neuron of a known framework nor one of the stateless torch modules known here, so what "
            "it keeps between steps is unknown",
            f"use one of {', '.join(sorted(m.__name__ for m in known.KNOWN))}",
        )
    if isinstance(stage.inner, known.MODAL) and stage.inner.training:
        raise ConversionError(
            f"{stage.name!r}",
            "training",
            True,
            "in training mode its result depends on chance or on the batch, and cannot be compared",
            "call net.eval() first; the converted network can be set to train() afterwards",
        )


def read(net: nn.Module) -> Network:
    """Read a network into a chain of stages.

    Raises:
        ConversionError: not an `nn.Sequential`, no neuron, neurons of several frameworks, one neuron used twice, or a
            module that is not known to be stateless.
    """
    if type(net) not in (nn.Sequential, Sequential) and framework_of(net) is None:
        cls = type(net)
        raise ConversionError(
            f"'' ({cls.__qualname__})",
            "network",
            cls.__qualname__,
            "only an nn.Sequential can be read in this version",
            "write the network as an nn.Sequential of stateless torch modules and neurons",
        )
    _refuse_hooks(net, "")
    children = list(_children(net, "")) if framework_of(net) is None else [("0", net)]
    frameworks = {name: framework_of(child) for name, child in children}
    present = {framework for framework in frameworks.values() if framework is not None}
    if len(present) != 1:
        raise ConversionError(
            "''",
            "framework",
            sorted(present),
            "a network to convert has neurons of exactly one framework",
            "convert each part by itself",
        )
    framework = present.pop()
    owner = adapter(framework)
    stages: list[Stage] = []
    for path, child in children:
        if frameworks[path] is not None:
            stages.append(Stage(path, child, child, True, owner))
        elif owner.STEPPED:
            stages.append(Stage(path, child, child, False, owner))
        else:
            stages.extend(_batch_first_stages(path, child, owner))
    neurons = [stage.inner for stage in stages if stage.neuron]
    if len({id(neuron) for neuron in neurons}) != len(neurons):
        raise ConversionError(
            "''", "neuron", "used twice", "two places would share one state", "give each its own layer"
        )
    for stage in stages:
        if not stage.neuron:
            _check_stateless(stage)
    emits = [stage for stage in stages if stage.neuron and _emits_state(stage.inner)]
    if emits and emits != [stages[-1]]:
        raise ConversionError(
            f"{emits[0].name!r}",
            "init_hidden" if not getattr(emits[0].inner, "init_hidden", True) else "output",
            getattr(emits[0].inner, "output", None),
            "it passes spikes and membrane on as a tuple, which the next module cannot take",
            "init_hidden=True and output=False in every layer but the last",
        )
    return Network(net, framework, owner, tuple(stages), bool(emits))
