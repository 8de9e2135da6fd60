"""SpikingJelly as a subject: its nodes, one step per call; in step_mode "m", one sequence per call."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from tracetorch.adapters.base import Building
from tracetorch.conformance.subjects.layers import LayerSubject
from tracetorch.core.spec import NeuronSpec


class SpikingJelly(LayerSubject):
    """Calls a node; its membrane is the memory `v`.

    Args:
        name, framework, stock: as of `LayerSubject`.
        step_mode: "s" or "m".
    """

    def __init__(self, name: str, framework: str, stock: bool = True, step_mode: str = "s") -> None:
        super().__init__(name, framework, stock)
        self.step_mode = step_mode

    def refuse(self, spec: NeuronSpec) -> None:
        """The adapter says what it cannot build."""

    def make(self, spec: NeuronSpec, building: Building) -> nn.Module:
        """The layer, in its step mode."""
        node: Any = super().make(spec, building)
        node.step_mode = self.step_mode
        return cast(nn.Module, node)

    def call(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LayerSubject.call`."""
        adapter: Any = self.adapter
        outputs, states = adapter.carried(layer, xs)
        return outputs, states

    def final(self, layer: nn.Module) -> dict[str, Tensor]:
        """The memories."""
        node: Any = layer
        return {name: node._memories["v" if name == "v_mem" else name] for name in self.states}
