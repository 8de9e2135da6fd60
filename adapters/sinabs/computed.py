"""A sinabs layer that computes any spec with a native order of operations (sinabs 3.1.3)."""

from __future__ import annotations

from typing import Any

import torch
from sinabs import layers as sl
from torch import Tensor, nn

from tracetorch.adapters.base import Building
from tracetorch.adapters.computed import SpecStep
from tracetorch.adapters.losses import formed
from tracetorch.adapters.simplify import described
from tracetorch.core.spec import NeuronSpec


class Computed(SpecStep, sl.StatefulLayer):
    """A sinabs layer whose step is that of a spec, called as `sinabs.layers.LIF`: [B, T, ...] -> [B, T, ...].

    Its parameters go by the names of the spec, in the source's raw forms. The buffer `v_mem`, with a synapse `i_syn`
    too, carries on from call to call; `record_states` fills `recordings`. It starts where the spec says.
    """

    def __init__(self, spec: NeuronSpec, record_states: bool = False) -> None:
        super().__init__(state_names=list(spec.states))
        self.v_mem: Tensor
        self.take(spec)
        self.record_states = record_states
        self.recordings: dict[str, Tensor] = {}
        self.firing_rate = torch.zeros(())

    def forward(self, input_data: Tensor) -> Tensor:
        """[B, T, ...] -> [B, T, ...]."""
        shape = (input_data.shape[0], *input_data.shape[2:])
        names = self._choices.states
        states = tuple(getattr(self, name) for name in names)
        states = states if self.v_mem.shape == shape else self.begin(input_data[:, 0])
        values, outputs, after = self.values(), [], []
        for x in input_data.unbind(1):
            output, *kept = self.advance(x, states, values)
            states = tuple(kept)
            outputs.append(output)
            after.append(states)
        for name, state in zip(names, states, strict=True):
            setattr(self, name, state)
        series = zip(names, zip(*after, strict=True), strict=True)
        self.recordings = {name: torch.stack(each, 1) for name, each in series} if self.record_states else {}
        spikes = torch.stack(outputs, 1)
        self.firing_rate = spikes.mean()
        return spikes

    def reset_states(self, *args: Any, **kwargs: Any) -> None:
        """As sinabs's, but to where the spec starts."""
        super().reset_states(*args, **kwargs)
        if self.is_state_initialised() and not (args or kwargs):
            for name, state in zip(self._choices.states, self.begin(self.v_mem), strict=True):
                setattr(self, name, state)

    @property
    def _param_dict(self) -> dict[str, Any]:
        return {"spec": self.spec, "record_states": self.record_states}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Computed:
        twin: Computed = super().__deepcopy__(memo)
        return twin.train(self.training)


def computed(spec: NeuronSpec, building: Building) -> nn.Module:
    """The layer, in the spec's order of operations or another that computes it, and what the report says of it."""
    spec = formed(spec, building)
    building.note("form", f"custom class tracetorch.adapters.sinabs.Computed: {described(spec)}")
    return Computed(spec)
