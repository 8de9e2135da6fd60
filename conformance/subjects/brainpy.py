"""brainpy.state as a subject: `LIF` in a `JaxStage`, one compiled scan a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tracetorch.adapters.jax.bridge import check
from tracetorch.adapters.jax.stage import JaxStage
from tracetorch.adapters.stateful import SeamError
from tracetorch.conformance.protocol import Array, Arrays, Json, Unsupported
from tracetorch.conformance.subjects.layers import LayerSubject
from tracetorch.core.spec import NeuronSpec


class Brainpy(LayerSubject):
    """Runs a stage over [T, B, ...]; its membrane is V, stored before its reset. In float32, as JAX does by default."""

    def refuse(self, spec: NeuronSpec) -> None:
        """The adapter says what it cannot build."""

    def build(self, spec: Json) -> Json:
        """As `Subject.build`; its decay is exp(-dt/tau), learned or not."""
        built = super().build(spec)
        if "mem_decay" in spec["parameters"]:
            assert self.layer is not None
            own = self.adapter.spec(self.layer).parameters["mem_decay"].to_dict()
            built["parameters"] = {"mem_decay": own, **built["parameters"]}
        return built

    def call(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LayerSubject.call`."""
        assert isinstance(layer, JaxStage)
        ys, recorded = layer.trace(xs)
        return ys, {"v_mem": recorded["V"]}

    def final(self, layer: nn.Module) -> dict[str, Tensor]:
        """The membrane."""
        assert isinstance(layer, JaxStage)
        state = layer.get_state("V")
        assert state is not None
        return {"v_mem": state}

    def run(self, x: Array, calls: Sequence[int], grad_output: Array | None) -> Arrays:
        """As `Subject.run`; float64 only in JAX's x64 mode."""
        try:
            check("the input", torch.from_numpy(x.copy()))
        except SeamError as error:
            raise Unsupported("dtype", str(x.dtype), str(error)) from error
        return super().run(x, calls, grad_output)
