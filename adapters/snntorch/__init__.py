"""snnTorch: its neurons as source and target (snntorch 1.0.0).

Equations, b = clamp(beta, 0, 1), a = clamp(alpha, 0, 1), r = [mem > theta] of the membrane left by the previous step,
detached:

    Leaky     subtract: mem = b*mem + x - r*theta      zero: mem = b*((1-r)*mem) + x      none: mem = b*mem + x
    Synaptic  syn = a*syn + x; mem = b*mem + syn;  subtract: mem - r*theta;  zero: mem - r*mem;  none
    Lapicque  mem = x*R*(1/(R*C))*dt + (1 - dt/(R*C))*mem;  subtract: mem - r*theta;  zero: mem - r*mem;  none
    Alpha     e = a*e + x; i = b*i - x; mem = k*(e + i), k = ln(a) / (ln(b) - ln(a)) + 1;  zero: all three times 1-r;
              subtract: e - r*theta, i - r*i, mem + r*i with the i of the step before;  none
    StateLeaky  mem[t] = sum over k of exp(-k/tau)*x[t-k], tau = 1/(1-beta); no reset; factor squared
    spk = [mem > theta] * graded_spikes_factor
    reset_delay=False (Leaky, Synaptic): d = [mem > theta] - r;  subtract: mem - d*theta;  zero: mem - d*mem

Reading is in `read.py`, building in `build.py`, subclasses of ours in `layers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from tracetorch.adapters.networks.modules import as_it_is as wrap
from tracetorch.adapters.networks.modules import nested
from tracetorch.adapters.snntorch.build import build
from tracetorch.adapters.snntorch.layers import Leaky, SpikeGrad, Synaptic
from tracetorch.adapters.snntorch.parallel import ParallelNeuron
from tracetorch.adapters.snntorch.read import attributes, is_neuron, reset, spec, states, trace
from tracetorch.adapters.snntorch.sequences import input_matrix, parts

NAME = "snntorch"
STEPPED = True


def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """An `nn.Sequential`, one step per call, states hidden; the last neuron returns its membrane too if asked."""
    last = list(modules.values())[-1]
    if emit_state and is_neuron(last):
        cast(Any, last).output = True
    return nested(modules, nn.Sequential)


__all__ = [
    "NAME",
    "STEPPED",
    "Leaky",
    "ParallelNeuron",
    "SpikeGrad",
    "Synaptic",
    "assemble",
    "attributes",
    "build",
    "input_matrix",
    "is_neuron",
    "parts",
    "reset",
    "spec",
    "states",
    "trace",
    "wrap",
]
