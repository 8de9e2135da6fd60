"""sinabs as a subject: `sinabs.layers.LIF` and `ALIF`, a sequence [B, T, ...] per call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.networks.states import attribute
from tracetorch.conformance.protocol import Array, Arrays
from tracetorch.conformance.subjects.layers import LayerSubject


class Sinabs(LayerSubject):
    """Calls a layer that records its states; they are the buffers `v_mem` and `i_syn`, and of an ALIF `b`.

    What an ALIF records at t is the membrane of step t + 1 before its reset (3.1.3): it is called step by step instead,
    and shows its buffers. With a synapse, which it forgets between calls, its states are those of its own step function
    where there is one call, and not shown where there are more.
    """

    calls = 1
    last: Mapping[str, Tensor] = MappingProxyType({})

    def call(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LayerSubject.call`."""
        whole: Any = layer
        if "adaptation" in self.states:
            return self._adaptive(whole, xs)
        whole.record_states = True
        outputs = whole(xs.transpose(0, 1)).transpose(0, 1)
        return outputs, {name: whole.recordings[name].transpose(0, 1) for name in self.states}

    def _adaptive(self, layer: Any, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if "i_syn" in self.states and self.calls > 1:
            return layer(xs.transpose(0, 1)).transpose(0, 1), {}
        if "i_syn" in self.states:
            adapter: Any = self.adapter
            whole, states = adapter.trace(layer, xs)
            self.last = {name: states[name][-1] for name in self.states}
            return whole, states
        outputs, kept = [], []
        for x in xs:
            outputs.append(layer(x.unsqueeze(1)).squeeze(1))
            kept.append(self.final(layer))
        return torch.stack(outputs), {name: torch.stack([states[name] for states in kept]) for name in self.states}

    def final(self, layer: nn.Module) -> dict[str, Tensor]:
        """The buffers; of an ALIF with a synapse as in `call`."""
        if {"adaptation", "i_syn"} <= set(self.states):
            return {} if self.calls > 1 else dict(self.last)
        return {name: getattr(layer, attribute(self.framework, name)) for name in self.states}

    def run(self, x: Array, calls: Sequence[int], grad_output: Array | None) -> Arrays:
        """As `Subject.run`."""
        self.calls = len(calls)
        return super().run(x, calls, grad_output)
