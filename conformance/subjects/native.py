"""traceTorch as a subject: `SpecNeuron` in the step loop of torch, in the C kernel, or in the Triton kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tracetorch as tt
from tracetorch.adapters.base import Building
from tracetorch.conformance.protocol import Unsupported
from tracetorch.conformance.subjects.layers import LayerSubject
from tracetorch.core.forms import FORMS, check_form
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.fused.executor import interpreted
from tracetorch.fused.layers import unroll
from tracetorch.snn.spec_neuron import SpecNeuron


class Native(LayerSubject):
    """The native layer of a spec, in its own form, or in the first that computes it.

    Args:
        name: the subject's name.
        executor: "eager", "cpu" or "triton".

    Raises:
        tracetorch.fused.executor.BackendError: the executor is not available here.
    """

    def __init__(self, name: str, executor: str) -> None:
        with tt.backend(executor):
            pass
        device = "cuda" if executor == "triton" and not interpreted() else "cpu"
        super().__init__(name, "tracetorch", device=device)
        self.executor = executor

    @property
    def version(self) -> str:
        """Of the package."""
        return tt.__version__

    def describe(self) -> dict[str, Any]:
        """As `Subject.describe`."""
        return {**super().describe(), "notes": f"SpecNeuron, backend {self.executor!r}"}

    def refuse(self, spec: NeuronSpec) -> None:
        """The forms say what they cannot compute; a kernel has no winner among neurons."""
        if self.executor != "eager" and spec.inhibition != "none":
            raise Unsupported("inhibition", spec.inhibition, "a kernel's neurons are each by itself")

    def make(self, spec: NeuronSpec, building: Building) -> nn.Module:
        """A `SpecNeuron`."""
        refusals = []
        for form in dict.fromkeys((spec.form, *FORMS)):
            try:
                formed = spec.replace(form=form)
                check_form(formed)
            except SpecError as error:
                refusals.append(f"{form}: {error}")
            else:
                return SpecNeuron(formed)
        raise Unsupported("form", "any", "; ".join(refusals))

    def call(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LayerSubject.call`. A kernel runs twice: as users call it, and once more to show its states."""
        native: Any = layer
        if self.executor == "eager":
            return native.trace(xs, states=self.states)
        before = {name: getattr(native, name) for name in native.state_names}
        with torch.no_grad():
            _, states = unroll(native, [xs], 0, record=True, backend=self.executor)
        for name, state in before.items():
            setattr(native, name, state)
        with tt.backend(self.executor):
            return native.unroll(xs), {name: states[name] for name in self.states}
