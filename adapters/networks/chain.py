"""Reading an `nn.Sequential` of stateless torch modules and neurons: a chain of stages, with nothing recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from tracetorch.adapters.base import Adapter, ConversionError
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks import recurrent, wholes
from tracetorch.adapters.networks.network import Network, Stage, refuse_hooks
from tracetorch.adapters.registry import FRAMEWORKS, adapter, framework_of
from tracetorch.core.graph import Ref
from tracetorch.core.model import Sequential


def _children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested Sequentials in order, with their paths."""
    for name, child in module._modules.items():  # named_children leaves out a module that stands there again
        assert child is not None
        path = f"{prefix}{name}"
        refuse_hooks(child, path)
        if type(child) in (nn.Sequential, Sequential):
            yield from _children(child, f"{path}.")
        else:
            yield path, child


def _batch_first_stages(path: str, child: nn.Module, owner: Adapter) -> Iterator[Stage]:
    """Stages of a stateless module of a network over [B, T, ...]: bare, or wrapped to fold time into the batch."""
    inner = known.inside(child)
    if inner is not None:
        refuse_hooks(inner, f"{path}.module")
        parts = (
            list(_children(inner, f"{path}.module.")) if type(inner) is nn.Sequential else [(f"{path}.module", inner)]
        )
        for name, part in parts:
            held = child if part is inner else type(child)(part)
            yield Stage(name, held, part, False, owner)
    elif type(child) is nn.Flatten and child.start_dim == 2:
        end = child.end_dim - 1 if child.end_dim > 0 else child.end_dim
        yield Stage(path, child, nn.Flatten(1, end), False, owner)
    elif type(child) in known.KNOWN and type(child) not in (*known.TIMELESS, *known.DROPOUT, nn.LayerNorm):
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


def is_chain(net: nn.Module) -> bool:
    """Whether it is a neuron, or Sequentials with nothing in them that moves between [B, T, ...] and [B*T, ...]."""
    if any(_folds_time(module) or wholes.is_whole(module) for module in net.modules()):
        return False
    return framework_of(net) is not None or type(net) in (nn.Sequential, Sequential)


def _folds_time(module: nn.Module) -> bool:
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("sinabs.")}
    return bool(names & {"FlattenTime", "UnflattenTime", "SqueezeMixin"})


def not_one(present: list[str]) -> ConversionError:
    """Of a network without neurons, or with those of several frameworks."""
    why = "a network to convert has neurons of exactly one framework"
    known = f"neurons of one of these: {', '.join(FRAMEWORKS)}"
    return ConversionError("''", "framework", present, why, "convert each part by itself" if present else known)


def read(net: nn.Module) -> Network:
    """Read a network into a chain of stages.

    Raises:
        ConversionError: not an `nn.Sequential`, no neuron, neurons of several frameworks, one neuron used twice, or a
            module that is not known to be stateless.
    """
    refuse_hooks(net, "")
    children = list(_children(net, "")) if framework_of(net) is None else [("0", net)]
    frameworks = {name: framework_of(child) for name, child in children}
    present = {framework for framework in frameworks.values() if framework is not None}
    if len(present) != 1:
        raise not_one(sorted(present))
    framework = present.pop()
    owner = adapter(framework)
    stages: list[Stage] = []
    for path, child in children:
        if frameworks[path] is not None:
            stages.append(Stage(path, child, child, True, recurrent.adapter_of(child, owner)))
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
    return Network(net, framework, owner, linked(stages), bool(emits))


def linked(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Each stage with the one before as its input."""
    places = [Ref("x"), *(stage.result for stage in stages[:-1])]
    return tuple(replace(stage, inputs=(place,)) for stage, place in zip(stages, places, strict=True))
