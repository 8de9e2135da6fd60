"""snnTorch as a subject: `snntorch.Leaky` and `Synaptic`, one step per call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tracetorch.conformance.subjects.layers import LayerSubject

_BUFFERS = {"v_mem": "mem", "i_syn": "syn", "i_exc": "syn_exc", "i_inh": "syn_inh"}


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
        return {name: getattr(layer, _BUFFERS.get(name, name)) for name in self.states}
