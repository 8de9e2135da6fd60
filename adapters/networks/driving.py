"""Layers of each target, as a facade drives them: a step or a sequence, and their states by the names of a spec."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.networks import recurrent
from tracetorch.adapters.networks.states import attribute
from tracetorch.core.composition import SPEC_STATES


class Driver:
    """How layers of a framework are run and hold their states; of native layers, and the base of the others'.

    Args:
        layer: the layer that is driven; only read. It is given again at each call, so that a driver holds no module.
        states: names of its states.
    """

    def __init__(self, layer: nn.Module, states: tuple[str, ...]) -> None:
        self.paths = {name: self._path(layer, name) for name in states}

    def _path(self, layer: nn.Module, state: str) -> str:
        # The 32 layers have names of their own for the states of a spec.
        held: Any = layer
        return next((name for name in held.state_names if SPEC_STATES.get(name, name) == state), state)

    def step(self, layer: Any, x: Tensor) -> Tensor:
        """One step. x: [B, ...]."""
        self._fit(layer, x.shape)
        spikes: Tensor = layer(x)
        return spikes

    def sequence(self, layer: Any, xs: Tensor) -> Tensor:
        """All steps of [B, T, ...], from the states that it has; of sinabs's recurrent layers without feedback."""
        self._fit(layer, xs[:, 0].shape)
        getattr(layer, "begin_sequence", _nothing)()
        spikes: Tensor = self._whole(layer, xs)
        return spikes

    def _whole(self, layer: Any, xs: Tensor) -> Any:
        return layer.unroll(xs, 1)

    def get(self, layer: nn.Module, state: str) -> Tensor | None:
        """A state; None before the first step."""
        value = attrgetter(self.paths[state])(layer)
        return value if value is not None and value.numel() else None

    def put(self, layer: nn.Module, state: str, value: Tensor | None) -> None:
        """Set a state; None: as before the first step."""
        *above, last = self.paths[state].split(".")
        holder = layer.get_submodule(".".join(above))
        setattr(holder, last, self._stored(value, getattr(holder, last)))

    def _stored(self, value: Tensor | None, before: Tensor | None) -> Any:
        return value

    def _fit(self, layer: nn.Module, shape: torch.Size) -> None:
        """Start anew, as snnTorch and sinabs do, where the states have another shape than the input."""
        for name in self.paths:
            state = self.get(layer, name)
            if state is not None and state.shape != shape:
                self.put(layer, name, None)


class SnnTorchDriver(Driver):
    """Of snnTorch's layers with hidden states, one step per call; a recurrent one is a `recurrent.Stepped`."""

    def _path(self, layer: nn.Module, state: str) -> str:
        inside = "neuron." if isinstance(layer, recurrent.Stepped) and state != "spikes" else ""
        return inside + attribute("snntorch", state)

    def _whole(self, layer: Any, xs: Tensor) -> Any:
        return torch.stack([layer(x) for x in xs.unbind(1)], 1)

    def _stored(self, value: Tensor | None, before: Tensor | None) -> Any:
        # snnTorch makes its next state on the device of the last one.
        return torch.zeros(0, device=None if before is None else before.device) if value is None else value


class SinabsDriver(SnnTorchDriver):
    """Of sinabs's layers, over [B, T, ...]; a recurrent one is a `recurrent.Sequenced`."""

    def _path(self, layer: nn.Module, state: str) -> str:
        if isinstance(layer, recurrent.Sequenced):
            return "spk" if state == "spikes" else f"neuron.{attribute('sinabs', state)}"
        return attribute("sinabs", state)

    def step(self, layer: Any, x: Tensor) -> Tensor:
        """One step, as a sequence of one: [B, 1, ...]."""
        self._fit(layer, x.shape)
        self._complete(layer)
        spikes: Tensor = layer(x.unsqueeze(1))
        return spikes.squeeze(1)

    def _whole(self, layer: Any, xs: Tensor) -> Any:
        return layer(xs)

    def _complete(self, layer: nn.Module) -> None:
        """A layer of which one state is not set begins with none of them (sinabs 3.1.3): zeros in its place."""
        values = {name: self.get(layer, name) for name in self.paths if name != "spikes"}
        given = [value for value in values.values() if value is not None]
        for name in [name for name, value in values.items() if value is None and given]:
            self.put(layer, name, torch.zeros_like(given[0]))


DRIVERS: Mapping[str, type[Driver]] = {"tracetorch": Driver, "snntorch": SnnTorchDriver, "sinabs": SinabsDriver}


def _nothing() -> None:
    """What most layers do when a sequence begins."""
