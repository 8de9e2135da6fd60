"""snnTorch: how its neurons are fused (snntorch 1.0.0). Leaky, Synaptic, Lapicque, Alpha.

A call is one step and stays the framework's own code; the fused twin gains `unroll`. The step is that call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from tracetorch.adapters.fusing.twin import Recipe, Twin, check_unroll, hooked, stacked

PACKAGE = "snntorch"
_STATES = {
    snntorch.Leaky.forward: ("mem",),
    snntorch.Synaptic.forward: ("syn", "mem"),
    snntorch.Lapicque.forward: ("mem",),
    snntorch.Alpha.forward: ("syn_exc", "syn_inh", "mem"),
}
_RECURRENT = (snntorch.RLeaky, snntorch.RSynaptic, snntorch.SLSTM, snntorch.SConv2dLSTM)


def _step(layer: Any, x: Tensor, states: Mapping[str, Tensor]) -> Sequence[Tensor]:
    for name, state in states.items():
        setattr(layer, name, state)
    result = layer.forward(x)
    return [result[0] if isinstance(result, tuple) else result, *(getattr(layer, name) for name in states)]


class NeuronTwin(Twin):
    """Of a neuron whose call is one step."""

    @staticmethod
    def note(module: nn.Module) -> str:
        """Its call."""
        return "a call is one step and stays its own code; unroll(xs, time_dim) is fused"

    def recipe(self) -> Recipe:
        return Recipe(_STATES[type(self).forward], _step, ("reset",))

    def unroll(self, xs: Tensor, time_dim: int = 0, **states: Tensor) -> Any:
        """What one call per step returns, stacked over time; the layer keeps the last states.

        Args:
            xs: [T, B, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`).
            states: as the call takes them (`mem=...`): before the first step.

        Returns:
            Spikes in the shape of xs, with `init_hidden` and no `output`; else a tuple of spikes and every state.

        Raises:
            FuseError: no such time dimension, or no step.
        """
        check_unroll(self, xs, time_dim)
        layer: Any = self
        names = self.recipe().states
        hidden = layer.init_hidden and not layer.output
        if not hooked(self) and not (layer.init_hidden and states) and set(states) <= set(names):
            element = [size for k, size in enumerate(xs.shape) if k != time_dim]
            first = {name: self._state(states.get(name), name, element, xs) for name in names}
            result = self.run_sequence(xs, time_dim, first, () if hidden else names)
            if result is not None:
                for name, state in result.last.items():
                    setattr(layer, name, state)
                return result.outputs if hidden else (result.outputs, *(result.recorded[name] for name in names))
        steps = iter(xs.unbind(time_dim))
        return stacked([self(next(steps), **states), *(self(x) for x in steps)], time_dim)

    def _state(self, given: Tensor | None, name: str, element: list[int], xs: Tensor) -> Tensor:
        """The state that a call would begin with: another shape than the input's begins with zero."""
        state: Tensor = getattr(self, name) if given is None else given
        return state if list(state.shape) == element else torch.zeros(element, dtype=xs.dtype, device=state.device)


def choose(module: nn.Module) -> type[Twin] | str | None:
    """The mixin of a layer that can be fused, why one cannot, or None: no neuron of this framework."""
    if not isinstance(module, snntorch.SpikingNeuron):
        return None
    if isinstance(module, _RECURRENT):
        return "recurrent: its spikes or states return through a matrix at every step"
    if type(module).forward in _STATES:
        return NeuronTwin
    return "its forward is not one of snnTorch's Leaky, Synaptic, Lapicque and Alpha"


def adopt(module: nn.Module) -> None:
    """Give a copied neuron states of its own, and let `snntorch.utils.reset` and `reset_hidden` find it."""
    if isinstance(module, snntorch.SpikingNeuron):
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = buffer.clone()
        if module not in snntorch.SpikingNeuron.instances:
            snntorch.SpikingNeuron.instances.append(module)
