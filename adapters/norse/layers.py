"""Norse: the cell of ours, where its own have not the choice (norse 1.1.0)."""

from __future__ import annotations

from typing import Any

from norse.torch.functional.lif import LIFFeedForwardState
from norse.torch.functional.lif_box import LIFBoxFeedForwardState
from norse.torch.module.snn import SNNCell
from torch import Tensor

from tracetorch.core.spec import NeuronSpec
from tracetorch.snn.spec_neuron import SpecNeuron


class Cell(SNNCell):
    """A cell that computes any spec that has a native order of operations and Norse's states: v, perhaps i.

    Called as Norse's own cells; `neuron` holds the parameters.
    """

    def __init__(self, spec: NeuronSpec) -> None:
        dt = 1.0 if spec.dt is None else spec.dt
        super().__init__(activation=self.advance, state_fallback=self.initial_state, p=None, dt=dt)
        self.neuron = SpecNeuron(spec)
        self.state_type = LIFFeedForwardState if "i_syn" in spec.states else LIFBoxFeedForwardState

    def initial_state(self, input_tensor: Tensor) -> Any:
        """The state before the first step."""
        found = {name: self.neuron.state(name, input_tensor) for name in self.neuron.state_names}
        return self.state_type(**{name.partition("_")[0]: state for name, state in found.items()})

    def advance(self, x: Tensor, state: Any, p: Any, dt: float) -> tuple[Tensor, Any]:
        """One step, as Norse's activation functions take it."""
        states = [getattr(state, name.partition("_")[0]) for name in self.neuron.state_names]
        output, *after = self.neuron.step(x, *states)
        named = zip(self.neuron.state_names, after, strict=True)
        return output, self.state_type(**{name.partition("_")[0]: value for name, value in named})

    def extra_repr(self) -> str:
        return ""
