"""traceTorch's own layers as source and target."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tracetorch.adapters.base import Building
from tracetorch.adapters.modules import nested
from tracetorch.core.forms import check_form
from tracetorch.core.layer import Layer
from tracetorch.core.model import Sequential
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.snn.spec_neuron import SpecNeuron

NAME = "tracetorch"
STEPPED = True


def is_neuron(module: nn.Module) -> bool:
    """Any native layer."""
    return isinstance(module, Layer)


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """The spec of a `SpecNeuron`, with its present parameters. Other native layers cannot be read yet."""
    if type(layer) is not SpecNeuron:
        raise SpecError(
            f"{type(layer).__name__}: of the native layers only SpecNeuron can be read into a spec in this version"
        )
    return layer.spec


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """The names are the same."""
    return {name: name for name in spec(layer).parameters}


def states(layer: nn.Module) -> tuple[str, ...]:
    """The declared states."""
    assert isinstance(layer, Layer)
    return layer._state_names


def reset(layer: nn.Module) -> None:
    """`layer.reset_states()`."""
    assert isinstance(layer, Layer)
    layer.reset_states()


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Step by step from the initial state."""
    assert isinstance(layer, Layer)
    layer.reset_states()
    return layer.trace(xs)


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
