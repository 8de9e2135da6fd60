"""`Sequential`: online layers in a chain, over a whole sequence or one step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tracetorch.core.layer import Layer
from tracetorch.core.model import Model, unroll
from tracetorch.core.states import named_layers
from tracetorch.nn.online import Online, OnlineStates


class Sequential(Model, nn.Sequential):
    """Layers run one after the other, forward through time; one learning signal in at the end reaches all of them.

    Members: `tt.nn.LIF`, `tt.nn.LIS`, another `Sequential`; any native layer, which learns by its own gradient through
    time; torch modules that act on the last dimension or on single elements (`nn.Linear`, `nn.Dropout`, ...); and any
    module around native layers that takes one step per call: `tt.unroll` gives it the steps of a sequence. A module of
    your own around online layers is given the sequence.
    """

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[OnlineStates, ...]]:
        """The whole sequence, [B, T, in_features] -> [B, T, out_features], or one step, [B, in_features].

        Returns the outputs of the last layer, and the states of every online layer. An error in any layer leaves the
        states of all as they were.
        """
        states: list[OnlineStates] = []
        undo: list[Callable[[], None]] = []
        x = inputs
        try:
            for layer in self:
                undo += _marks(layer)
                x = _run(layer, x, states)
        except BaseException:
            for back in reversed(undo):
                back()
            raise
        return x, tuple(states)


def _marks(layer: nn.Module) -> list[Callable[[], None]]:
    """What undoes the calls of a member from here on."""
    if isinstance(layer, Online):
        return [layer.mark()]
    online = [member for member in layer.modules() if isinstance(member, Online)]
    others = [partial(found.load_states, found.save_states()) for _, found in named_layers(layer)]
    return [*others, *(member.mark() for member in online)]


def _run(layer: nn.Module, x: Tensor, states: list[OnlineStates]) -> Tensor:
    if isinstance(layer, Online):
        x, own = layer(x)
        states.append(own)
        return x
    if isinstance(layer, Sequential):
        x, inner = layer(x)
        states.extend(inner)
        return x
    if isinstance(layer, Layer) and x.ndim == 3:
        return layer.unroll(x, time_dim=1)
    found = unroll(layer, x, time_dim=1) if x.ndim == 3 and _takes_steps(layer) else layer(x)
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            f"Sequential: {type(layer).__name__} returns {type(found).__name__}, not a tensor; wrap it in a module "
            "that does"
        )
    return found


def _takes_steps(layer: nn.Module) -> bool:
    """Whether a module's native layers would take a whole sequence for one step."""
    return not any(isinstance(member, Online) for member in layer.modules()) and any(named_layers(layer))
