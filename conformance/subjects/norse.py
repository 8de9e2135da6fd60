"""Norse as a subject: its cells, one step per call, the state handed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import Building, value_of
from tracetorch.conformance.protocol import Array, Arrays, Json
from tracetorch.conformance.subjects.layers import LayerSubject
from tracetorch.core.spec import NeuronSpec


class Norse(LayerSubject):
    """Calls a cell and keeps the state that it returns."""

    state: Any = None
    scale: Tensor | None = None

    def describe(self) -> Json:
        """As `Subject.describe`."""
        scaled = "; an input gain of 1 by 1/k on its input, where that is a power of two" if self.stock else ""
        described = super().describe()
        return {**described, "notes": f"{described['notes']}{scaled}"}

    def make(self, spec: NeuronSpec, building: Building) -> nn.Module:
        """The cell.

        Norse's own have a gain of k = 1 - a: a gain of 1 is met by 1/k on the input, where that is a power of two and
        rounds nothing, and a is not learned.
        """
        decay = spec.parameters.get("mem_decay")
        self.scale = None
        if self.stock and spec.input_gain == "one" and decay is not None and not decay.learnable:
            rest = 1 - value_of(spec, "mem_decay")
            if bool((rest > 0).all() and (torch.frexp(rest).mantissa == 0.5).all()):
                self.scale, spec = 1 / rest, spec.replace(input_gain="one_minus_decay")
        return super().make(spec, building)

    @property
    def alone(self) -> bool:
        """Not where the input is scaled for it."""
        return self.scale is None

    def refuse(self, spec: NeuronSpec) -> None:
        """The adapter says what it cannot build."""

    def call(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LayerSubject.call`."""
        adapter: Any = self.adapter
        scaled = xs if self.scale is None else xs * self.scale
        outputs, states, self.state = adapter.carried(layer, scaled, self.state)
        return outputs, states

    def final(self, layer: nn.Module) -> dict[str, Tensor]:
        """The state after the last call."""
        return {name: getattr(self.state, name.partition("_")[0]) for name in self.states}

    def run(self, x: Array, calls: Sequence[int], grad_output: Array | None) -> Arrays:
        """As `Subject.run`."""
        self.state = None
        return super().run(x, calls, grad_output)
