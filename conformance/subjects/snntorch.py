"""snnTorch as a subject: `snntorch.Leaky` and `Synaptic`, one step per call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tracetorch.adapters.networks.states import attribute
from tracetorch.conformance.subjects.layers import LayerSubject


class SnnTorch(LayerSubject):
    """Steps a layer with hidden state; its membrane is the buffer `mem`, its current `syn`."""

    def call(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LayerSubject.call`."""
        outputs: list[Tensor] = []
        states: dict[str, list[Tensor]] = {name: [] for name in self.states}
        for x in xs:
            result = layer(x)
            outputs.append(result[0] if isinstance(result, tuple) else result)  # of a DeltaLeaky
            for name, state in self.final(layer).items():
                states[name].append(state)
        return torch.stack(outputs), {name: torch.stack(steps) for name, steps in states.items()}

    def final(self, layer: nn.Module) -> dict[str, Tensor]:
        """The buffers."""
        return {name: getattr(layer, attribute(self.framework, name)) for name in self.states}
