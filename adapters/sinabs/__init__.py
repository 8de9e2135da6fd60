"""sinabs: its neurons as source and target (sinabs 3.1.3).

Equations, alpha = exp(-1/tau) or the trained alpha itself, input [B, T, ...]:

    LIF  i = alpha_syn*(i + x) with tau_syn, else x;   u = (1-alpha_mem)*i with norm_input, else i
         v = alpha_mem*v + u;   s = spike_fn(v, threshold);   v = reset_fn(s, v, threshold);   v = relu(v - min) + min
    IAF  alpha_mem = 1 and no norm_input.   ExpLeak  no spikes: the output is v, before its clamp
    ALIF i as above, with norm_input times 1-alpha_mem and kept so;   v = alpha_mem*v + i;   theta = b0 + adapt_scale*b
         s, v with theta in the place of the threshold;   b = alpha_adapt*b + (1-alpha_adapt)*s

Reading is in `read.py`, building in `build.py`, subclasses and callables of ours in `layers.py`.
"""

from __future__ import annotations

from sinabs import layers as sl
from torch import nn

from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks.modules import PerStep
from tracetorch.adapters.networks.modules import chained as assemble
from tracetorch.adapters.sinabs.build import build
from tracetorch.adapters.sinabs.layers import ALIF, IAF, LIF, ExpLeak, Reset, Spike, SurrogateGradient
from tracetorch.adapters.sinabs.read import attributes, is_neuron, reset, spec, states, trace

NAME = "sinabs"
STEPPED = False


def wrap(module: nn.Module) -> nn.Module:
    """Linear and elementwise modules as they are, others in `Repeat`, those that depend on the batch once per step."""
    if type(module) in known.TIMELESS:
        return module
    return PerStep(module) if isinstance(module, known.MODAL) else sl.Repeat(module)


__all__ = [
    "ALIF",
    "IAF",
    "LIF",
    "NAME",
    "STEPPED",
    "ExpLeak",
    "PerStep",
    "Reset",
    "Spike",
    "SurrogateGradient",
    "assemble",
    "attributes",
    "build",
    "is_neuron",
    "reset",
    "spec",
    "states",
    "trace",
    "wrap",
]
