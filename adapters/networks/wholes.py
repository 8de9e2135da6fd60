"""Layers of snnTorch that take whole sequences, time first: [T, B, C], with nothing kept from call to call.

`StateLeaky` is an elementwise neuron; `LinearLeaky` is a matrix and such a neuron, and is read as the two. So is
`LeakyParallel`, with a second bias between: its neurons alone are a `ParallelNeuron`, whose sums are in another order
than those of the nn.RNN that the layer is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tracetorch.adapters.base import Adapter, ConversionError
from tracetorch.adapters.networks.inside import AdapterOfInside
from tracetorch.adapters.registry import adapter, framework_of
from tracetorch.core.spec import NeuronSpec

# class -> the attribute of its matrix
_LAYERS: Mapping[str, str | None] = {
    "StateLeaky": None,
    "ParallelNeuron": None,
    "LinearLeaky": "linear",
    "LeakyParallel": "rnn",
}
_PARALLEL = "LeakyParallel"


def is_whole(module: nn.Module) -> bool:
    """Whether it is one of these layers, or the nn.RNN of snnTorch's, which takes whole sequences too."""
    return type(module).__name__ in _LAYERS and framework_of(module) == "snntorch"


def connection(module: nn.Module) -> nn.Module | None:
    """The matrix that its input goes through."""
    if type(module).__name__ == _PARALLEL:
        own: Any = adapter("snntorch")
        matrix: nn.Module = own.input_matrix(module)[0]
        return matrix
    attribute = _LAYERS[type(module).__name__]
    return None if attribute is None else getattr(module, attribute)


def added(module: nn.Module) -> Tensor | None:
    """What is added to what its matrix gives: the second bias of a `LeakyParallel`."""
    own: Any = adapter("snntorch")
    found: Tensor | None = own.input_matrix(module)[1] if type(module).__name__ == _PARALLEL else None
    return found


def neuron(module: nn.Module) -> nn.Module:
    """The neuron alone: the layer, or its own parameters and options under the class without a matrix."""
    if type(module).__name__ == _PARALLEL:
        own: Any = adapter("snntorch")
        apart: nn.Module = own.ParallelNeuron(module)
        return apart
    if connection(module) is None:
        return module
    cls = next(c for c in type(module).__mro__ if c.__name__ == "StateLeaky")
    twin: nn.Module = object.__new__(cls)
    twin.__dict__.update(module.__dict__)
    twin.__dict__["whole"] = (module,)
    return twin


def owner_of(neurons: list[nn.Module], base: Adapter) -> Any:
    """The adapter of a network's neurons: the framework's own, or that of its layers over whole sequences.

    Raises:
        ConversionError: the network has layers of both kinds.
    """
    whole = [type(module).__name__ for module in neurons if is_whole(module)]
    if whole and len(whole) < len(neurons):
        why = "it takes whole sequences [T, B, C], and other layers of the network one step per call"
        raise ConversionError("''", "neuron", whole[0], why, "layers of one kind, each kind converted by itself")
    return WholeAdapter(base) if whole else base


class WholeAdapter(AdapterOfInside):
    """An adapter of these layers in a network: as `Adapter`; its modules are called with [T, B, ...]."""

    TIME_FIRST = True

    def __init__(self, base: Adapter) -> None:
        super().__init__(base)
        self.STEPPED = False

    def is_neuron(self, module: nn.Module) -> bool:
        """One of these layers."""
        return is_whole(module)

    def spec(self, layer: nn.Module, dt: float | None = None) -> NeuronSpec:
        """Of the neuron."""
        return self.base.spec(neuron(layer), dt)

    def attributes(self, layer: nn.Module) -> Mapping[str, str]:
        """Of the neuron."""
        return self.base.attributes(neuron(layer))

    def states(self, layer: nn.Module) -> tuple[str, ...]:
        """What a call leaves in the layer; no later call reads it."""
        return "spk", "mem"

    def reset(self, layer: nn.Module) -> None:
        """Nothing: each call starts anew."""

    def trace(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Adapter.trace`."""
        return self.base.trace(neuron(layer), xs)
