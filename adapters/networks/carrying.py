"""Parameters of a source and its target: which pairs were carried, whether they still agree, sharing, carrying back.

The running statistics of batch norm, which training changes too, count as parameters here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import ConversionError, described, parameters, shaped
from tracetorch.adapters.networks import recurrent
from tracetorch.adapters.networks.network import Network, Stage
from tracetorch.adapters.registry import adapter
from tracetorch.core.raw import from_raw, to_raw

_SAME_RAW = ("value", "clamped")


class CarriedBack:
    """The target's parameters in the source, for the length of a `with` block."""

    def __init__(self, source: Network, target: Network) -> None:
        self.pairs = [pair for pair in pairs(source, target) if not pair.agree()]
        # The memory is put aside, not written to: sinabs's default threshold is one tensor for all layers.
        self.saved = [(pair.theirs, pair.theirs.data) for pair in self.pairs]

    def __enter__(self) -> None:
        for pair in self.pairs:
            ours = pair.ours.detach()
            same = (pair.their_raw, pair.their_dt) == (pair.our_raw, pair.our_dt)
            value = ours if same else to_raw(pair.their_raw, from_raw(pair.our_raw, ours, pair.our_dt), pair.their_dt)
            pair.theirs.data = shaped(value.to(pair.theirs.dtype), pair.theirs).clone()

    def __exit__(self, *_: object) -> None:
        for theirs, value in self.saved:
            theirs.data = value


@dataclass(frozen=True)
class _Pair:
    """A parameter that was carried: the source's tensor and the target's, each in its raw form."""

    name: str
    theirs: Tensor
    ours: Tensor
    their_raw: str = "value"
    our_raw: str = "value"
    their_dt: float | None = None
    our_dt: float | None = None

    def agree(self) -> bool:
        """Whether they are worth the same, or one float apart, as a stock layer holds a threshold to turn > into >=.

        In two raw forms, also where they are worth the same to the roundings of going from one to the other.
        """
        theirs = shaped(self.theirs.detach(), self.ours)
        if theirs.shape != self.ours.shape:
            return False
        if self.their_raw == self.our_raw:
            value, own = theirs, self.ours.detach()
        else:
            value = from_raw(self.their_raw, theirs, self.their_dt)
            own = from_raw(self.our_raw, self.ours.detach(), self.our_dt)
            if value.dtype == own.dtype and own.is_floating_point():
                return bool(((own - value).abs() <= 4 * torch.finfo(own.dtype).eps * own.abs()).all())
        value = value.to(own)
        steps = [torch.nextafter(value, torch.full_like(own, end)) for end in (torch.inf, -torch.inf)]
        return bool(((own == value) | (own == steps[0]) | (own == steps[1])).all())


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """What training changes of a stateless module, by name."""
    buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    return {**dict(module.named_parameters()), **buffers}


def pairs(source: Network, target: Network) -> Iterator[_Pair]:
    """Every parameter that was carried."""
    seen = set[int]()
    for pair in _of_steps(source, target):
        seen.add(id(pair.theirs))
        yield pair
    yield from (pair for pair in _around_steps(source, target) if id(pair.theirs) not in seen)


def _around_steps(source: Network, target: Network) -> Iterator[_Pair]:
    """Of what a recorded network does before and after its time steps."""
    if source.plan is None or target.plan is None:
        return
    neurons = {id(stage.inner) for stage in source.stages if stage.neuron}
    for path, module in source.plan.modules.items():
        if id(module) not in neurons:
            ours = _trained(target.plan.modules[path])
            yield from (_Pair(f"{path}.{name}", theirs, ours[name]) for name, theirs in _trained(module).items())
    for name, tensor in source.plan.tensors.items():
        yield _Pair(name, tensor, target.plan.tensors[name])


def _of_steps(source: Network, target: Network) -> Iterator[_Pair]:
    for ref, theirs in source.constants.items():
        yield _Pair(ref.name, theirs, target.constants[ref])
    for s, t in zip(source.stages, target.stages, strict=True):
        if not s.neuron:
            ours = _trained(t.inner)
            yield from (_Pair(f"{s.name}.{name}", theirs, ours[name]) for name, theirs in _trained(s.inner).items())
            continue
        specs = [stage.spec() for stage in (s, t)]
        if recurrent.is_recurrent(s.inner):
            ours = dict(recurrent.connection(t.inner).named_parameters())
            for name, theirs in recurrent.connection(s.inner).named_parameters():
                yield _Pair(f"{s.name}.connection.{name}", theirs, ours[name])
        raws = [{name: p.raw for name, p in spec.parameters.items()} for spec in specs]
        dts = [spec.dt for spec in specs]
        own = parameters(t.adapter, t.inner)
        for name, attribute in s.adapter.attributes(s.inner).items():
            if name in own and all(name in raw for raw in raws):
                theirs = attrgetter(attribute)(s.inner)
                yield _Pair(f"{s.name}.{attribute}", theirs, own[name], raws[0][name], raws[1][name], *dts)
        for name, (attribute, placed) in _inside(s).items():
            if name in own:
                value = from_raw(raws[1][name], own[name].detach(), dts[1])
                yield _Pair(f"{s.name}.{attribute}", attrgetter(attribute)(s.inner), placed(value))


def _inside(stage: Stage) -> Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Of parameters that a source holds as a part of a tensor: its attribute, and the tensor that a value makes."""
    found: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = getattr(stage.inner, "inside", {})
    return found


def changed(source: Network, target: Network) -> tuple[str, ...]:
    """Names of the parameters that no longer agree."""
    return tuple(pair.name for pair in pairs(source, target) if not pair.agree())


def share(stage: Stage, layer: nn.Module, to: str) -> None:
    """Make the target's parameters the source's own."""
    theirs, ours = stage.adapter.attributes(stage.inner), adapter(to).attributes(layer)
    raw = {name: parameter.raw for name, parameter in stage.spec().parameters.items()}
    own = {name: parameter.raw for name, parameter in described(adapter(to), layer).parameters.items()}
    for name, (attribute, _) in _inside(stage).items():
        if stage.spec().parameters[name].learnable:
            why = f"the source learns it as a part of {attribute}, which no layer of {to} has, so it cannot be shared"
            raise ConversionError(f"{stage.name!r}", name, "learnable", why, "share_weights=False")
    for name, attribute in theirs.items():
        if name not in ours:
            continue
        tensor, mine = getattr(stage.inner, attribute), getattr(layer, ours[name])
        if not tensor.is_floating_point():  # threshold=1 is no weight: the target has its float
            continue
        same = raw[name] == own.get(name) or {raw[name], own.get(name)} <= set(_SAME_RAW)
        if not same or not torch.equal(tensor.detach().to(mine), mine.detach()):
            raise ConversionError(
                f"{stage.name!r}",
                attribute,
                raw[name],
                f"{to} keeps it in another form or shape, so it cannot be shared",
                "share_weights=False",
            )
        if isinstance(mine, nn.Parameter):
            shared = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            setattr(layer, ours[name], shared)
        else:
            setattr(layer, ours[name], tensor)
