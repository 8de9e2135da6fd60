"""Norse: its feed-forward LIF, LIFBox, LI, LIBox and IAF as source and target (norse 1.1.0).

Equations, k = dt*tau_mem_inv, k_s = dt*tau_syn_inv, z = [v > v_th]:

    LIFCell, LIF:   j = i + x; v = v + k*((v_leak - v) + j); i = j - k_s*j; z; v = (1-z)*v + z*v_reset
    LIFBoxCell:     v = v + k*(x + v_leak - v); z; v = reset_method(z, v, v_reset, v_th)
    LICell, LI:     as LIF without z;   LIBoxCell: v = v + k*((v_leak - v) + x);   IAFCell: v = v + x; z; v as in LIF

Cells take a state and return one, `(x, state) -> (z, state)`; without one they start anew. v starts at v_leak, that of
IAFCell at v_reset.
"""

from __future__ import annotations

from tracetorch.adapters.base import no_networks
from tracetorch.adapters.networks.modules import as_it_is as wrap
from tracetorch.adapters.norse.build import build
from tracetorch.adapters.norse.layers import Cell
from tracetorch.adapters.norse.read import attributes, carried, is_neuron, reset, spec, states, trace

NAME = "norse"
STEPPED = True
assemble = no_networks("Norse", NAME)

__all__ = [
    "NAME",
    "STEPPED",
    "Cell",
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
