"""Parameters that several neuron layers of a source share, such as one beta: shared in the target too, or named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import Note
from tracetorch.adapters.networks.network import Network


class _Place(NamedTuple):
    """A trained parameter of a source's layer, and of the target's the layer and attribute that it went to."""

    layer: str
    name: str
    theirs: Tensor
    made: nn.Module
    attribute: str | None
    raw: str

    @property
    def ours(self) -> Tensor:
        """The target's tensor."""
        tensor: Tensor = attrgetter(self.attribute or "")(self.made)
        return tensor


def _places(source: Network, target: Network) -> Iterator[_Place]:
    for mine, made in zip(source.stages, target.stages, strict=True):
        if not mine.neuron:
            continue
        attributes, raws = made.adapter.attributes(made.inner), made.spec().parameters
        for name, attribute in mine.adapter.attributes(mine.inner).items():
            theirs = attrgetter(attribute)(mine.inner)
            if theirs.requires_grad:
                raw = raws[name].raw if name in raws else ""
                yield _Place(mine.name, name, theirs, made.inner, attributes.get(name), raw)


def tie(source: Network, target: Network, notes: dict[str, Sequence[Note]]) -> None:
    """Make one what is one in the source, where the target holds it in one form; else add a note to the later layer."""
    first: dict[int, _Place] = {}
    for place in _places(source, target):
        before = first.setdefault(id(place.theirs), place)
        if before.made is place.made or _tied(before, place):
            continue
        text = f"one parameter with {before.name} of the layer {before.layer!r} in the source; here each trains its own"
        notes[place.layer] = [*notes.get(place.layer, ()), Note(place.name, text)]


def _tied(before: _Place, place: _Place) -> bool:
    """Whether both are one tensor of the target now."""
    if before.attribute is None or place.attribute is None or before.raw != place.raw:
        return False
    one, other = before.ours, place.ours
    if one is other:
        return True
    if not isinstance(one, nn.Parameter) or one.shape != other.shape or not torch.equal(one, other):
        return False
    *path, last = place.attribute.split(".")
    owner = attrgetter(".".join(path))(place.made) if path else place.made
    setattr(owner, last, one)
    return True


__all__ = ["tie"]
