"""A snnTorch neuron that computes any spec with a native order of operations and one membrane (snntorch 1.0.0)."""

from __future__ import annotations

from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from tracetorch.adapters.base import Building
from tracetorch.adapters.computed import SpecStep
from tracetorch.adapters.simplify import described
from tracetorch.adapters.snntorch.layers import SpikeGrad
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional.surrogates import Surrogate


class Computed(SpecStep, snntorch.SpikingNeuron):
    """A snnTorch neuron whose step is that of a spec.

    It is called as `snntorch.Leaky`, with `init_hidden`, `output` and the buffer `mem`, which starts where the spec
    says. Its parameters go by the names of the spec, in the source's raw forms.
    """

    def __init__(self, spec: NeuronSpec) -> None:
        # snnTorch's own default is a closure, which does not pickle; the step computes its spikes from the spec.
        spike_grad = SpikeGrad(spec.surrogate or Surrogate("zero"), strict=spec.comparison == ">")
        super().__init__(spike_grad=spike_grad, init_hidden=True)
        del self.threshold
        self.take(spec)
        self.register_buffer("mem", torch.zeros(0), persistent=False)

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One step, as `snntorch.Leaky.forward`: spikes, or spikes and membrane."""
        if mem is not None:
            if self.init_hidden:
                raise TypeError("`mem` should not be passed as an argument while `init_hidden=True`")
            self.mem = mem
        if self.mem.shape != input_.shape:
            self.mem = self.first(input_)
        spikes, self.mem = self.advance(input_, self.mem, self.values())
        return (spikes, self.mem) if self.output or not self.init_hidden else spikes


def computed(spec: NeuronSpec, building: Building) -> nn.Module:
    """The layer, and what the report says of it."""
    building.note("form", f"custom class tracetorch.adapters.snntorch.Computed: {described(spec)}")
    return Computed(spec)
