"""brainpy.state as a subject: `LIF`, `LIFRef`, `ALIF` in a `JaxStage`, one compiled scan a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tracetorch.adapters.brainpy import recorded
from tracetorch.adapters.jax.bridge import check
from tracetorch.adapters.jax.stage import JaxStage
from tracetorch.adapters.stateful import SeamError
from tracetorch.conformance.protocol import Array, Arrays, Json, Unsupported
from tracetorch.conformance.subjects.layers import LayerSubject
from tracetorch.core.spec import NeuronSpec


class Brainpy(LayerSubject):
    """Runs a stage over [T, B, ...]; in float32, as JAX does by default.

    Its membrane is V, stored before its reset; that of an `ALIF`, whose threshold was another then, is shown after it.
    """

    last: dict[str, Tensor]

    def refuse(self, spec: NeuronSpec) -> None:
        """The adapter says what it cannot build."""

    def build(self, spec: Json) -> Json:
        """As `Subject.build`; its decays are exp(-dt/tau), learned or not."""
        built = super().build(spec)
        assert self.layer is not None
        own = self.adapter.spec(self.layer).parameters
        decays = [name for name in ("mem_decay", "adapt_decay") if name in spec["parameters"]]
        built["parameters"] = {**{name: own[name].to_dict() for name in decays}, **built["parameters"]}
        return built

    def call(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LayerSubject.call`."""
        assert isinstance(layer, JaxStage)
        ys, states = recorded(layer, xs)
        self.last = {name: state[-1] for name, state in states.items()}
        return ys, states

    def final(self, layer: nn.Module) -> dict[str, Tensor]:
        """After the last step of the last call."""
        return self.last

    def run(self, x: Array, calls: Sequence[int], grad_output: Array | None) -> Arrays:
        """As `Subject.run`; float64 only in JAX's x64 mode."""
        try:
            check("the input", torch.from_numpy(x.copy()))
        except SeamError as error:
            raise Unsupported("dtype", str(x.dtype), str(error)) from error
        return super().run(x, calls, grad_output)
