"""traceTorch's own layers as source and target."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tracetorch.adapters.base import Building, readable
from tracetorch.adapters.modules import nested
from tracetorch.core.forms import check_form
from tracetorch.core.layer import Layer
from tracetorch.core.model import Sequential
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.quantizers import round_ste
from tracetorch.functional.spikes import sigmoid4x
from tracetorch.functional.surrogates import Surrogate
from tracetorch.snn.leaky import LI, LIB
from tracetorch.snn.spec_neuron import SpecNeuron

NAME = "tracetorch"
STEPPED = True
_RAW = {"mem_decay": "sigmoid", "threshold": "softplus", "bias": "value"}


def is_neuron(module: nn.Module) -> bool:
    """Any native layer."""
    return isinstance(module, Layer)


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """The spec of a `SpecNeuron`, of a `LIB` with the hard quantizer, or of a `LI`, with the present parameters.

    Raises:
        SpecError: another layer, another `spike_fn` or `quant_fn`, or a feature dimension other than the last.
    """
    if type(layer) is SpecNeuron:
        return layer.spec
    if type(layer) not in (LI, LIB):
        raise SpecError(
            f"{type(layer).__name__}: of the native layers SpecNeuron, LIB and LI can be read in this version"
        )
    if layer.dim != -1:
        raise SpecError(f"dim={layer.dim}: a spec's parameters broadcast against the last dimension, dim=-1")
    own = attributes(layer)
    values = {name: readable(layer, attribute, _RAW[name]) for name, attribute in own.items()}
    if type(layer) is LI:
        return NeuronSpec(
            form="tracetorch.LI",
            output="membrane",
            spike_count="none",
            reset="none",
            threshold_gradient=False,
            parameters=values,
        )
    assert isinstance(layer, LIB)
    if layer.spike_fn is not sigmoid4x:
        raise SpecError(f"spike_fn={layer.spike_fn!r}: only tt.functional.sigmoid4x can be read")
    if type(layer.quant_fn) is not round_ste or layer.quant_fn.step_size != 1:
        raise SpecError(f"quant_fn={layer.quant_fn!r}: only the hard quantizer tt.functional.round_ste() makes spikes")
    return NeuronSpec(form="tracetorch.LIB", comparison=">", surrogate=Surrogate("logistic"), parameters=values)


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """The names are the same in a `SpecNeuron`; the others keep `raw_beta`, ..."""
    if isinstance(layer, SpecNeuron):
        return {name: name for name in layer.spec.parameters}
    names = {"mem_decay": "raw_beta", "threshold": "raw_threshold", "bias": "raw_bias"}
    return {name: own for name, own in names.items() if hasattr(layer, own)}


def states(layer: nn.Module) -> tuple[str, ...]:
    """The declared states."""
    assert isinstance(layer, Layer)
    return layer.state_names


def reset(layer: nn.Module) -> None:
    """`layer.reset_states()`."""
    assert isinstance(layer, Layer)
    layer.reset_states()


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Step by step from the initial state."""
    assert isinstance(layer, Layer)
    layer.reset_states()
    outputs, states = layer.trace(xs)
    return outputs, {"v_mem" if name == "mem" else name: state for name, state in states.items()}


def build(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `SpecNeuron`: the same form, so the same bits."""
    try:
        check_form(spec)
    except SpecError as error:
        raise building.impossible("form", spec.form, str(error), "another source layer") from error
    return SpecNeuron(spec)


def wrap(module: nn.Module) -> nn.Module:
    """Native networks take one step per call, as the module does."""
    return module


def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """A `tt.Sequential`; the last layer's state is its attribute `v_mem`."""
    return nested(modules, Sequential)
