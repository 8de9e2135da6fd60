"""`sinabs.layers.LIF` with every option, and the native layer of its spec against it."""

import copy

import sinabs.layers as sl
import torch
from sinabs import activation

from tests.adapter_checks import gradients

T, B, N = 100, 3, 7


def per_neuron(low, high, seed):
    return torch.rand(N, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


# name -> (spike_fn, spike_count, max_spikes)
SPIKES = {
    "single": (activation.SingleSpike, "single", None),
    "multi": (activation.MultiSpike, "multiple", None),
    "max2": (activation.MaxSpike(2), "limited", 2),
    "max": (activation.MaxSpike(), "multiple", None),
}
# name -> (reset_fn, the fields that it sets, its parameter)
SUBTRACT = {"reset": "subtract", "reset_gradient": "attached"}
RESETS = {
    "subtract": (activation.MembraneSubtract(), {**SUBTRACT, "reset_amount": "threshold"}, None),
    "subtract 0.7": (
        activation.MembraneSubtract(0.7),
        {**SUBTRACT, "reset_amount": "value"},
        ("reset_amount", torch.tensor(0.7)),
    ),
    "subtract tensor": (
        activation.MembraneSubtract(per_neuron(0.4, 1.2, 8)),
        {**SUBTRACT, "reset_amount": "value"},
        ("reset_amount", per_neuron(0.4, 1.2, 8)),
    ),
    "reset": (
        activation.MembraneReset(),
        {"reset": "add_value", "reset_gradient": "detached"},
        ("reset_value", torch.tensor(0.0)),
    ),
    "reset 0.1": (
        activation.MembraneReset(0.1),
        {"reset": "add_value", "reset_gradient": "detached"},
        ("reset_value", torch.tensor(0.1)),
    ),
}


def lif(**options):
    """A layer that shares nothing with the tables above. sinabs's default threshold is one tensor for all layers."""
    values = {key: copy.deepcopy(value) for key, value in options.items()}
    return sl.LIF(**{"tau_mem": 5.0, "spike_threshold": torch.tensor(1.0), **values})


def stimulus(layer, shape=(B, T, N)):
    scale = 16.0 if layer.norm_input else 3.5
    scale = scale * 0.4 if layer.tau_syn_calculated is not None else scale
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 0.3) * scale


def run(layer, xs):
    """Outputs, states after every step [B, T, ...], gradients of input and parameters by name."""
    xs = xs.clone().requires_grad_()
    if isinstance(layer, sl.LIF):
        layer.reset_states()
        layer.record_states = True
        outputs = layer(xs)
        states = dict(layer.recordings)
        layer.record_states = False
    else:
        layer.reset_states()
        outputs, states = layer.trace(xs, 1)
    return outputs, states, gradients(layer, xs, outputs)
