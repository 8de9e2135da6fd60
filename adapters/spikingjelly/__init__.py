"""SpikingJelly: `LIFNode`, `ParametricLIFNode` and `IFNode` as source and target (spikingjelly 2.0.0).

Equations, r = v_reset, or 0 for a v_reset of None; 1/tau is sigmoid(w) in a ParametricLIFNode:

    h = v + (x - (v - r)) / tau with decay_input, else v - (v - r) / tau + x;   IFNode: h = v + x
    s = [h >= v_threshold];   v = h - s*v_threshold (v_reset None), or s*v_reset + (1 - s)*h

Their numbers are Python floats, which have no precision of their own: they are read in torch's default dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tracetorch.adapters.base import no_networks
from tracetorch.adapters.spikingjelly.build import build
from tracetorch.adapters.spikingjelly.layers import Node, Spike
from tracetorch.adapters.spikingjelly.read import attributes, carried, is_neuron, reset, spec, states, trace

NAME = "spikingjelly"
STEPPED = True


def wrap(module: nn.Module) -> nn.Module:
    """Nodes in step_mode "s" take one step per call, as the module does."""
    return module


def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """Networks of SpikingJelly are not written in this version.

    Raises:
        ConversionError: always.
    """
    raise no_networks("SpikingJelly", NAME)


__all__ = [
    "NAME",
    "STEPPED",
    "Node",
    "Spike",
    "assemble",
    "attributes",
    "build",
    "carried",
    "is_neuron",
    "reset",
    "spec",
    "states",
    "trace",
    "wrap",
]
