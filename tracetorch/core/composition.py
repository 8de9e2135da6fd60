"""`Composition`: what a layer composed of parts computes, where a `NeuronSpec` has no field for it.

A pair of traces (D) and a trace of the layer's own output (R) are no neuron of another framework. Such a layer has no
spec, but its equations are known, those of `tracetorch.oracle.native`: it is converted to itself, and judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tracetorch.core.spec import Parameter
from tracetorch.functional.surrogates import Surrogate

# A state of a layer of one branch -> its name in a spec.
SPEC_STATES: Mapping[str, str] = {"mem": "v_mem", "syn": "i_syn"}


@dataclass(frozen=True)
class Composition:
    """The parts of a native layer, and its parameters under the layer's own names.

    Attributes:
        name: of its class.
        family, dual, synapse, recurrent, ema: as in `tracetorch.snn.composed.Parts`.
        spike_count, comparison: as in a `NeuronSpec`; "none", "single" or "smooth".
        surrogate: None where there are no spikes.
        layer_states: in the order of the layer's step.
        parameters: `beta`, `pos_gamma`, `neg_threshold`, ...: the raw numbers.
    """

    name: str
    family: str
    dual: bool
    synapse: bool
    recurrent: bool
    ema: bool
    spike_count: str
    surrogate: Surrogate | None
    layer_states: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    comparison: str = ">"

    # What code that takes a spec asks of it.
    dt = None
    time_unit = None
    stores_before_reset = False
    adaptive = False

    @property
    def form(self) -> str:
        """The order of operations: the layer's own."""
        return f"tracetorch.{self.name}"

    @property
    def output(self) -> str:
        """As in a `NeuronSpec`."""
        return "membrane" if self.spike_count == "none" else "spikes"

    @property
    def reset(self) -> str:
        """As in a `NeuronSpec`."""
        return "none" if self.spike_count == "none" else "subtract"

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states, those of one branch as in a spec."""
        return tuple(SPEC_STATES.get(name, name) for name in self.layer_states)

    def replace(self, **changes: Any) -> Composition:
        """A copy with some fields changed."""
        return replace(self, **changes)
