"""`Recurrent`: a neuron layer whose outputs return to its input at the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.core.layer import Layer
from tracetorch.snn.spec_neuron import SpecNeuron


class Recurrent(Layer):
    """s(t) = neuron(x(t) + connection(s(t-1))): one call is one time step, `unroll` runs step by step.

    Args:
        neuron: the elementwise layer.
        connection: from an output [B, ...] to an input of the same shape; stateless.
        from_start: the first step's input is x + connection(0), and a sequence goes on from the last one's spikes, as
            in snnTorch; else the first step of every sequence has no feedback, as in sinabs, whose layers keep their
            other states from call to call. A sequence is one `unroll`; a call of the layer is a step of it.
    """

    def __init__(self, neuron: SpecNeuron, connection: nn.Module, from_start: bool) -> None:
        super().__init__()
        self.neuron, self.connection, self.from_start = neuron, connection, from_start
        self.define_state("spikes")
        for name in neuron.state_names:
            self.define_state(name)

    spikes: Tensor | None

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """One step. x: [B, ...]; the output of the same shape."""
        self.check_input(x)
        first = self.spikes is None
        holders = [(self.neuron if getattr(self, name) is None else self, name) for name in self.neuron.state_names]
        states = [holder.state(name, x) for holder, name in holders]
        if first and not self.from_start:
            feedback = torch.zeros_like(x)
        else:
            feedback = self.connection(self.state("spikes", x)).reshape(x.shape)
        output, *after = self.neuron.fed_step(x, feedback, *states)
        self.spikes = output
        for name, state in zip(self.neuron.state_names, after, strict=True):
            setattr(self, name, state)
        return output

    def begin_sequence(self) -> None:
        """With `from_start=False`: the next step has no feedback. `unroll`, `tt.unroll` and `tt.Loop` call it."""
        if not self.from_start:
            self.spikes = None

    def unroll(self, xs: Tensor | Sequence[Tensor], time_dim: int = 0) -> Any:
        """As `Layer.unroll`, step by step; with `from_start=False` the sequence begins without feedback."""
        self.begin_sequence()
        return super().unroll(xs, time_dim)

    def extra_repr(self) -> str:
        return f"from_start={self.from_start}"
