"""sinabs as a subject: `sinabs.layers.LIF`, a sequence [B, T, ...] per call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tracetorch.conformance.subjects.layers import LayerSubject


class Sinabs(LayerSubject):
    """Calls a layer that records its states; they are the buffers `v_mem` and `i_syn`."""

    def call(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LayerSubject.call`."""
        whole: Any = layer
        whole.record_states = True
        outputs = whole(xs.transpose(0, 1)).transpose(0, 1)
        return outputs, {name: whole.recordings[name].transpose(0, 1) for name in self.states}
