"""SpikingJelly: `LIFNode`, `ParametricLIFNode` and `IFNode` as source and target (spikingjelly 2.0.0).

Equations, r = v_reset, or 0 for a v_reset of None; 1/tau is sigmoid(w) in a ParametricLIFNode:

    h = v + (x - (v - r)) / tau with decay_input, else v - (v - r) / tau + x;   IFNode: h = v + x
    s = [h >= v_threshold];   v = h - s*v_threshold (v_reset None), or s*v_reset + (1 - s)*h

Their numbers are Python floats, which have no precision of their own: they are read in torch's default dtype.
"""

from __future__ import annotations

from tracetorch.adapters.base import no_networks
from tracetorch.adapters.networks.modules import as_it_is as wrap
from tracetorch.adapters.spikingjelly.build import build
from tracetorch.adapters.spikingjelly.layers import Node, Spike
from tracetorch.adapters.spikingjelly.read import attributes, carried, is_neuron, reset, spec, states, trace

NAME = "spikingjelly"
STEPPED = True
assemble = no_networks("SpikingJelly", NAME)

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
