"""`snntorch.Leaky` with every option, and the native layer of its spec against it."""

import snntorch as snn
import torch

import tracetorch as tt
from tests.adapter_checks import bits, gradients
from tracetorch import adapters

T, B, N = 100, 3, 7

# (reset_mechanism, reset_delay) -> (reset, reset_timing or None if it has no meaning, reset_gradient likewise)
RESETS = {
    ("subtract", True): ("subtract", "next_step_after_decay", "detached"),
    ("subtract", False): ("subtract", "same_step_residual", "attached"),
    ("zero", True): ("value", "next_step_before_decay", "detached"),
    ("zero", False): ("value", "same_step_residual", "attached"),
    ("none", True): ("none", None, None),
    ("none", False): ("none", None, None),
}


def per_neuron(low, high, seed):
    return torch.rand(N, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def leaky(**options):
    values = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    return snn.Leaky(**{"beta": 0.85, "init_hidden": True, **values})


def run(layer, xs, states=("mem",)):
    """Outputs, states after every step, and gradients of the input and every trainable parameter, by name."""
    xs = xs.clone().requires_grad_()
    outputs, recorded = [], {name: [] for name in states}
    for x in xs:
        outputs.append(layer(x))
        for name in states:
            recorded[name].append(getattr(layer, name))
    outputs = torch.stack(outputs)
    return outputs, {n: torch.stack(r) for n, r in recorded.items()}, gradients(layer, xs, outputs)


def stimulus(scale=1.0, shape=(T, B, N)):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 0.25) * scale


NATIVE = {"beta": "mem_decay", "threshold": "threshold", "graded_spikes_factor": "spike_scale", "x": "x"}


def assert_bit_identical(layer, xs):
    native = tt.snn.SpecNeuron(adapters.spec(layer))
    theirs, mems, grads = run(layer, xs)
    mine, states, own = run(native, xs, ("v_mem",))
    fired = int((theirs != 0).sum())
    assert fired > 0.02 * theirs.numel(), "nothing fired: a trace without spikes proves nothing"
    assert fired < 0.98 * theirs.numel()
    assert bits(mine) == bits(theirs)
    assert bits(states["v_mem"]) == bits(mems["mem"])
    assert {NATIVE[name] for name in grads} == set(own)
    for name, gradient in grads.items():
        assert bits(own[NATIVE[name]]) == bits(gradient), name
    return theirs, mems["mem"], grads


SYNAPTIC = {"alpha": 0.8, "beta": 0.7, "init_hidden": True}
# class -> (how it is made, the names of its tensors in the spec, its states in the spec)
OTHERS = {
    "Synaptic": (
        lambda **o: snn.Synaptic(**{**SYNAPTIC, **o}),
        {"alpha": "syn_decay", "beta": "mem_decay", "threshold": "threshold", "x": "x"},
        {"syn": "i_syn", "mem": "v_mem"},
    ),
    "Alpha": (
        lambda **o: snn.Alpha(**{**SYNAPTIC, **o}),
        {"beta": "mem_decay", "threshold": "threshold", "x": "x"},
        {"syn_exc": "i_exc", "syn_inh": "i_inh", "mem": "v_mem"},
    ),
    "Lapicque": (
        lambda **o: snn.Lapicque(beta=0.8, init_hidden=True, **o),
        {"threshold": "threshold", "x": "x"},
        {"mem": "v_mem"},
    ),
}


def other(cls, reset, delay, **options):
    options |= {} if delay is None else {"reset_delay": delay}
    return OTHERS[cls][0](reset_mechanism=reset, **options)
