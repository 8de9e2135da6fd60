"""snnTorch as a subject: `snntorch.Leaky`, one step per call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.conformance.subjects.layers import LayerSubject


class SnnTorch(LayerSubject):
    """Steps a layer with hidden state; its membrane is the buffer `mem`."""

    def call(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LayerSubject.call`."""
        stepped: Any = layer
        outputs, membranes = [], []
        for x in xs:
            outputs.append(stepped(x))
            membranes.append(stepped.mem)
        return torch.stack(outputs), {"v_mem": torch.stack(membranes)}

    def final(self, layer: nn.Module) -> dict[str, Tensor]:
        """The buffer `mem`."""
        stepped: Any = layer
        return {"v_mem": stepped.mem}
