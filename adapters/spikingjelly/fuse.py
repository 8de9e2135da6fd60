"""SpikingJelly: how its neurons are fused (spikingjelly 2.0.0). LIFNode, IFNode, ParametricLIFNode and their like.

With step_mode "m" a call is a whole sequence [T, B, ...]; with "s" it is one step and stays the framework's own code.
The step is the node's `single_step_functional_forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from spikingjelly.activation_based import base, neuron
from spikingjelly.activation_based.neuron.base_node import BaseNode
from torch import Tensor, nn

from tracetorch.adapters.fusing.twin import Recipe, Twin

PACKAGE = "spikingjelly"
# Whose sequences are the same arithmetic as their steps: classes with a sequence operation of their own.
_SEQUENCES = (
    neuron.LIFNode,
    neuron.IFNode,
    neuron.ParametricLIFNode,
    neuron.QIFNode,
    neuron.EIFNode,
    neuron.IzhikevichNode,
)
_METHODS = ("single_step_functional_forward", "multi_step_functional_forward", "multi_step_forward")


def _step(layer: Any, x: Tensor, states: Mapping[str, Tensor]) -> Sequence[Tensor]:
    # Quirk of 2.0.0: with a w of no dimension the whole step is one registered operation, the sigmoid of w within it,
    # where torch cannot compute it beforehand. With a w of one element it is ordinary operations, and the same bits.
    if isinstance(layer, neuron.ParametricLIFNode) and layer.w.ndim == 0:
        layer._parameters["w"] = layer.w.reshape(1)  # the layer is a copy
    outputs, after = layer.single_step_functional_forward((x,), tuple(states.values()))
    if len(outputs) != 1:
        raise TypeError(f"{type(layer).__name__}: a step returns {len(outputs)} outputs, not one")
    return [outputs[0], *after]


class NodeTwin(Twin):
    """Of a node: the states are its memories."""

    @staticmethod
    def note(module: nn.Module) -> str:
        """With step_mode "s"."""
        node: Any = module
        return "step_mode 's': its own code, until set_step_mode(net, 'm')" if node.step_mode == "s" else ""

    def recipe(self) -> Recipe:
        layer: Any = self
        return Recipe(tuple(layer._memories), _step, ("_memories", "_memories_rv", "v_seq", "_store_v_seq"))

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the framework's: [T, B, ...] -> [T, B, ...]; memories carry on."""
        layer: Any = self
        result = None
        plain = isinstance(x_seq, Tensor) and x_seq.ndim > 0 and len(x_seq) > 0
        if plain and not args and not kwargs and getattr(layer, "_neuron_precision", None) is None:
            states = layer.materialize_states((x_seq,), tuple(layer._memories.values()), "m")
            first = dict(zip(layer._memories, states, strict=True))
            kept = ("v",) if layer.store_v_seq else ()
            result = self.run_sequence(x_seq, 0, first, kept)
        if result is None:
            return super().multi_step_forward(x_seq, *args, **kwargs)  # type: ignore[misc]
        layer._memories.update(result.last)
        layer.v_seq = result.recorded.get("v")
        return result.outputs


def choose(module: nn.Module) -> type[Twin] | str | None:
    """The mixin of a node that can be fused, why one cannot, or None: no neuron of this framework."""
    if not any(cls.__module__.startswith(f"{base.__package__}.neuron") for cls in type(module).__mro__):
        return None
    cls: Any = type(module)
    if not isinstance(module, BaseNode) or cls.forward is not base.MemoryModule.forward:
        return "its forward is not the one of SpikingJelly's BaseNode"
    for stock in _SEQUENCES:
        if isinstance(module, stock):
            own = [name for name in _METHODS if getattr(cls, name) is not getattr(stock, name)]
            return f"overrides {', '.join(own)} of {stock.__name__}" if own else NodeTwin
    if cls.multi_step_forward is not BaseNode.multi_step_forward or (
        cls.multi_step_functional_forward is not base.MemoryModule.multi_step_functional_forward
    ):
        return "its sequences are not a loop over its steps"
    return NodeTwin


def adopt(module: nn.Module) -> None:
    """Give a copied node memories of its own: SpikingJelly resets them in place."""
    if isinstance(module, base.MemoryModule):
        module._memories = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in module._memories.items()
        }
