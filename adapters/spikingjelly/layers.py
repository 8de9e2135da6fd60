"""SpikingJelly: the node and the spike function of ours, where its own have not the choice (spikingjelly 2.0.0)."""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from tracetorch.core.spec import NeuronSpec
from tracetorch.functional.spikes import heaviside
from tracetorch.functional.surrogates import Surrogate
from tracetorch.snn.spec_neuron import SpecNeuron


class Spike(nn.Module):
    """A `surrogate_function` that SpikingJelly has not: another comparison, or a surrogate of another framework.

    Args:
        surrogate: its gradient.
        strict: a spike where h > threshold; else where h >= threshold.
        threshold: the layer's `v_threshold`, with which the width of some surrogates scales.
    """

    def __init__(self, surrogate: Surrogate, strict: bool, threshold: float) -> None:
        super().__init__()
        self.surrogate, self.strict, self.threshold = surrogate, strict, threshold

    def forward(self, z: Tensor) -> Tensor:
        """z = h - threshold -> spikes, 0 or 1, in the dtype of z."""
        threshold = torch.full_like(z, self.threshold)
        return heaviside(z, threshold, self.surrogate, strict=self.strict, dtype=z.dtype)

    def extra_repr(self) -> str:
        return f"{self.surrogate}, {'>' if self.strict else '>='}"


class Node(neuron.BaseNode):
    """A node that computes any spec that has a native order of operations: the states are its memories, v the membrane.

    Called, reset and stepped as SpikingJelly's own nodes; `neuron` holds the parameters.
    """

    def __init__(self, spec: NeuronSpec) -> None:
        super().__init__(v_reset=None)
        self.neuron = SpecNeuron(spec)
        for name in self._synaptic:
            self.register_memory(name, 0.0)

    @property
    def _synaptic(self) -> tuple[str, ...]:
        return tuple(name for name in self.neuron.state_names if name != "v_mem")

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], step_mode: str
    ) -> tuple[object, ...]:
        """States before the first step, or before a step of another shape: the initial ones."""
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        names = ("v_mem", *self._synaptic)
        kept = [state if isinstance(state, Tensor) and state.shape == x.shape else None for state in states]
        return tuple(
            self.neuron.state(name, x) if state is None else state for name, state in zip(names, kept, strict=True)
        )

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        """One step, as that of SpikingJelly's nodes."""
        given = dict(zip(("v_mem", *self._synaptic), states, strict=True))
        output, *after = self.neuron.step(inputs[0], *(given[name] for name in self.neuron.state_names))
        found = dict(zip(self.neuron.state_names, after, strict=True))
        return (output,), tuple(found[name] for name in given)
