"""The choices, parameters and raw forms of a `NeuronSpec`, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# field -> choice -> what it means. The specification page of the documentation is generated from this table.
CHOICES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "output": {"spikes": "spike_scale * s", "membrane": "the membrane after the step"},
        "synapse": {
            "none": "i = x",
            "decay_then_add": "i = a_s*i + x (snnTorch Synaptic)",
            "add_then_decay": "i = a_s*(i + x) (sinabs tau_syn)",
            "read_then_decay": "the drive is i + x, stored is i = a_s*(i + x) (Norse LIF)",
            "moving_average": "i = a_s*i + (1-a_s)*x (traceTorch S layers)",
            "difference_of_exponentials": "e = a_s*e + x, i = a*i - x, u = k*(e + i), "
            "k = 1 + ln(a_s) / (ln(a) - ln(a_s)); its resets change e and i too (snnTorch Alpha)",
        },
        "decay": {"none": "a = 1", "geometric": "a = the parameter mem_decay, through its raw form"},
        "input_gain": {
            "one": "b = 1",
            "one_minus_decay": "b = 1 - a",
            "one_minus_decay_kept": "b = 1 - a, and the synapse keeps b*i in the place of i (sinabs ALIF)",
            "value": "b = the parameter input_gain",
        },
        "comparison": {">": "a spike where u > theta", ">=": "a spike where u >= theta"},
        "spike_count": {
            "none": "no spikes",
            "single": "at most one spike a step",
            "multiple": "trunc(u / theta) spikes a step where u > 0",
            "limited": "trunc(u / theta), at most max_spikes",
            "smooth": "a differentiable spike function, not a step",
        },
        "reset": {
            "none": "v = u",
            "subtract": "v = u - s*rho",
            "value": "v = reset_value where s > 0, else u",
            "add_value": "v = u*(s == 0) + reset_value for every neuron (sinabs MembraneReset)",
        },
        "reset_amount": {
            "threshold": "rho = theta (without the bias)",
            "threshold_over_decay": "rho = theta / a: what is left after a decay is exactly theta less",
            "value": "rho = the parameter reset_amount",
        },
        "reset_timing": {
            "same_step": "applied in the step of the spike; the state is stored after the reset",
            "same_step_residual": "in the step of the spike, but the spike test of a step first subtracts a reset for "
            "a stored membrane that is still above theta (snnTorch reset_delay=False)",
            "next_step_before_decay": "applied at the start of the next step; stored before the reset",
            "next_step_after_decay": "applied in the next step to the decayed membrane; stored before the reset",
            "next_step_discards_input": "the step after a spike yields the reset value whatever the input is",
        },
        "reset_gradient": {
            "attached": "the gradient flows through the spikes of the reset",
            "detached": "the spikes of the reset are constants in the backward pass",
            "membrane_stopped": "the membrane in the reset is a constant, the spike is not (brainpy hard reset)",
        },
        "clamp": {
            "none": "no lower bound",
            "after_reset": "v = max(v, min_v_mem) after the reset",
            "before_spikes": "u = max(u, min_v_mem) before the spikes are counted (snnTorch LeakyParallel)",
        },
        "spike_test": {
            "membrane": "s = count(u - theta)",
            "change": "s = count(abs(u - v) - theta), v the membrane of the step before (snnTorch DeltaLeaky)",
        },
        "inhibition": {
            "none": "every neuron spikes by itself",
            "winner": "of the neurons of a sample [B, N] only the first with the largest u - theta may emit, and its "
            "spike is not scaled; a reset in the next step takes all that were above theta (snnTorch inhibition=True)",
        },
        "refractory": {
            "none": "none",
            "hold": "the membrane is held for refractory_steps after a spike, or for the parameter refractory_time",
        },
        "initial_state": {"zero": "v = 0", "leak": "v = leak", "reset_value": "v = reset_value"},
    }
)

# How a raw (stored, trainable) number becomes the value in the equations. `tracetorch.core.raw` computes them in torch,
# `tracetorch.oracle.raw` in float64.
RAW_FORMS: Mapping[str, str] = MappingProxyType(
    {
        "value": "the number itself",
        "clamped": "min(max(raw, 0), 1)",
        "exp_tau": "exp(-1 / raw), raw in time steps",
        "exp_dt_tau": "exp(-dt / raw), raw and dt in the spec's time unit",
        "one_minus_inverse_tau": "1 - 1 / raw, raw in time steps",
        "one_minus_dt_rate": "1 - dt * raw",
        "one_minus_sigmoid": "1 - sigmoid(raw)",
        "sigmoid": "sigmoid(raw)",
        "softplus": "softplus(raw)",
    }
)

PARAMETERS = (
    "mem_decay",
    "syn_decay",
    "input_gain",
    "leak",
    "threshold",
    "bias",
    "reset_amount",
    "reset_value",
    "min_v_mem",
    "spike_scale",
    "adapt_decay",
    "adapt_scale",
    "resistance",
    "surrogate_scale",
    "initial_v",
    "neg_threshold",
    "neg_scale",
    "refractory_time",
)
