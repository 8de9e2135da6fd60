"""Stages and pipelines for the tests of `adapters.Pipeline`."""

from __future__ import annotations

import copy
import functools

import brainpy.state as bp
import brainunit as u
import numpy as np
import sinabs.activation as sa
import sinabs.layers as sl
import snntorch as snn
import torch
from norse.torch import LIFBoxCell
from snntorch import surrogate
from spikingjelly.activation_based import neuron as sj
from torch import nn

import tracetorch as tt
from tracetorch.adapters import JaxStage, Pipeline

N = 5


def atan(x):
    """snnTorch's own default is a closure, which does not pickle."""
    return surrogate.ATan.apply(x, 2.0)


def lif(reset="soft", size=N, **changes):
    numbers = {"R": 3.0 * u.ohm, "tau": 5.0 * u.ms, "V_th": 1.0 * u.mV, "V_rest": 0.1 * u.mV, "V_reset": -0.2 * u.mV}
    return bp.LIF(size, spk_reset=reset, **{**numbers, **changes})


def sinabs_lif():
    return sl.LIF(tau_mem=8.0, spike_fn=sa.SingleSpike, norm_input=False)


def leaky(spike_grad=atan):
    return snn.Leaky(0.8, init_hidden=True, spike_grad=spike_grad)


def native(beta=0.7, size=N, learn_bias=True):
    return tt.snn.LIB(size, beta=beta, learn_bias=learn_bias, quant_fn=tt.functional.round_ste())


def linear(gain=2.0, seed=0):
    layer = nn.Linear(N, N)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(gain * rng.standard_normal((N, N)) / np.sqrt(N)))
        layer.bias.fill_(0.2)
    return layer


def four(**options):
    """sinabs, snnTorch, native and brainpy, a matrix before each."""
    stages = []
    for k, make in enumerate((sinabs_lif, leaky, native, lambda: JaxStage(lif(), dt=1.0))):
        stages += [linear(seed=k), make()]
    return Pipeline(*stages, **options)


PIPELINES = {
    "four": lambda: four(fold="exact"),
    "four fused": lambda: four(fuse=True, fold="exact"),
    "brainpy": lambda: Pipeline(linear(), lif("hard"), dt=1.0, fold="exact"),
    "others": lambda: Pipeline(
        nn.Sequential(linear(), leaky()), sj.LIFNode(step_mode="m"), linear(seed=2), sj.IFNode(), fold="exact"
    ),
    "norse": lambda: Pipeline(linear(), LIFBoxCell(), fold="exact"),
    "nested": lambda: nn.Sequential(
        Pipeline(linear(), Pipeline(sinabs_lif(), linear(seed=1), time_dim=1, fold="exact"), leaky(), fold="exact"),
        nn.Identity(),
    ),
}


@functools.cache
def _made(name):
    torch.manual_seed(0)
    return PIPELINES[name]()


def pipeline(name):
    """A copy, which shares what JAX has compiled with every other copy."""
    return copy.deepcopy(_made(name))


def stimulus(steps=12, batch=3, seed=0, dtype=torch.float32):
    values = np.random.default_rng(seed).standard_normal((steps, batch, N))
    return torch.from_numpy(values * 1.5).to(dtype)
