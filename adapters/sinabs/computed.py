"""A sinabs layer that computes any spec with a native order of operations and one membrane (sinabs 3.1.3)."""

from __future__ import annotations

from typing import Any

import torch
from sinabs import layers as sl
from torch import Tensor, nn

from tracetorch.adapters.base import Building
from tracetorch.adapters.computed import SpecStep
from tracetorch.adapters.simplify import described
from tracetorch.core.spec import NeuronSpec


class Computed(SpecStep, sl.StatefulLayer):
    """A sinabs layer whose step is that of a spec, called as `sinabs.layers.LIF`: [B, T, ...] -> [B, T, ...].

    Its parameters go by the names of the spec, in the source's raw forms. The buffer `v_mem` carries on from call to
    call; `record_states` fills `recordings`. It starts where the spec says.
    """

    def __init__(self, spec: NeuronSpec, record_states: bool = False) -> None:
        super().__init__(state_names=["v_mem"])
        self.v_mem: Tensor
        self.take(spec)
        self.record_states = record_states
        self.recordings: dict[str, Tensor] = {}
        self.firing_rate = torch.zeros(())

    def forward(self, input_data: Tensor) -> Tensor:
        """[B, T, ...] -> [B, T, ...]."""
        shape = (input_data.shape[0], *input_data.shape[2:])
        kept: Tensor = self.v_mem
        v = kept if kept.shape == shape else self.first(input_data[:, 0])
        values, outputs, membranes = self.values(), [], []
        for x in input_data.unbind(1):
            output, v = self.advance(x, v, values)
            outputs.append(output)
            membranes.append(v)
        self.v_mem = v
        self.recordings = {"v_mem": torch.stack(membranes, 1)} if self.record_states else {}
        spikes = torch.stack(outputs, 1)
        self.firing_rate = spikes.mean()
        return spikes

    def reset_states(self, *args: Any, **kwargs: Any) -> None:
        """As sinabs's, but to where the spec starts."""
        super().reset_states(*args, **kwargs)
        if self.is_state_initialised() and not (args or kwargs):
            self.v_mem = self.first(self.v_mem)

    @property
    def _param_dict(self) -> dict[str, Any]:
        return {"spec": self.spec, "record_states": self.record_states}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Computed:
        twin: Computed = super().__deepcopy__(memo)
        return twin.train(self.training)


def computed(spec: NeuronSpec, building: Building) -> nn.Module:
    """The layer, and what the report says of it."""
    building.note("form", f"custom class tracetorch.adapters.sinabs.Computed: {described(spec)}")
    return Computed(spec)
