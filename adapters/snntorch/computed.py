"""A snnTorch neuron that computes any spec with a native order of operations (snntorch 1.0.0)."""

from __future__ import annotations

from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from tracetorch.adapters.base import Building
from tracetorch.adapters.computed import SpecStep
from tracetorch.adapters.losses import formed
from tracetorch.adapters.simplify import described
from tracetorch.adapters.snntorch.layers import SpikeGrad
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional.surrogates import Surrogate


class Computed(SpecStep, snntorch.SpikingNeuron):
    """A snnTorch neuron whose step is that of a spec.

    It is called as `snntorch.Leaky`, with `init_hidden`, `output` and the buffer `mem`, which starts where the spec
    says; with a synapse as `snntorch.Synaptic`, with the buffer `syn` too. Its parameters go by the names of the spec,
    in the source's raw forms.
    """

    def __init__(self, spec: NeuronSpec) -> None:
        # snnTorch's own default is a closure, which does not pickle; the step computes its spikes from the spec.
        spike_grad = SpikeGrad(spec.surrogate or Surrogate("zero"), strict=spec.comparison == ">")
        super().__init__(spike_grad=spike_grad, init_hidden=True)
        del self.threshold
        self.take(spec)
        self.mem: Tensor
        self.stored = {name: {"v_mem": "mem", "i_syn": "syn"}[name] for name in spec.states}
        for attribute in self.stored.values():
            self.register_buffer(attribute, torch.zeros(0), persistent=False)

    def forward(self, input_: Tensor, *given: Tensor, **named: Tensor) -> Any:
        """One step, as `snntorch.Leaky.forward` or `Synaptic.forward`: spikes, or spikes, current and membrane."""
        attributes = tuple(self.stored.values())
        for attribute, state in {**dict(zip(attributes, given, strict=False)), **named}.items():
            if self.init_hidden:
                raise TypeError(f"`{attribute}` should not be passed as an argument while `init_hidden=True`")
            setattr(self, attribute, state)
        states = tuple(getattr(self, attribute) for attribute in attributes)
        if self.mem.shape != input_.shape:
            states = self.begin(input_)
        spikes, *after = self.advance(input_, states, self.values())
        for attribute, state in zip(attributes, after, strict=True):
            setattr(self, attribute, state)
        return (spikes, *after) if self.output or not self.init_hidden else spikes


def computed(spec: NeuronSpec, building: Building) -> nn.Module:
    """The layer, in the spec's order of operations or another that computes it, and what the report says of it."""
    spec = formed(spec, building)
    building.note("form", f"custom class tracetorch.adapters.snntorch.Computed: {described(spec)}")
    return Computed(spec)
