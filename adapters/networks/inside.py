"""Adapters of layers around a neuron: what they take over from the adapter of the neuron's framework."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tracetorch.adapters.base import Adapter, Building
from tracetorch.core.spec import NeuronSpec


class AdapterOfInside:
    """Base of the adapters of such layers, which say how one is read and run. No target is written of them.

    Args:
        base: the framework's own adapter.
    """

    def __init__(self, base: Adapter) -> None:
        self.base = base
        self.NAME, self.STEPPED = base.NAME, base.STEPPED

    def build(self, spec: NeuronSpec, building: Building) -> nn.Module:
        """The neuron, as the framework's own."""
        return self.base.build(spec, building)

    def wrap(self, module: nn.Module) -> nn.Module:
        """A stateless module, as it is called in the source."""
        return module

    def assemble(self, modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
        """As the framework's own."""
        return self.base.assemble(modules, emit_state)
