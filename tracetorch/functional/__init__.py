"""Functions of the neurons: time constants, spike functions, quantizers, surrogate gradients."""

from tracetorch.functional.quantizers import probabilistic_ste, round_ste, stochastic_round_ste
from tracetorch.functional.spikes import heaviside, sigmoid4x, spike_count, surrogate_spike
from tracetorch.functional.surrogates import SURROGATES, Surrogate
from tracetorch.functional.time_constants import (
    alpha_to_tau,
    decay_to_halflife,
    decay_to_timesteps,
    halflife_to_decay,
    tau_to_alpha,
    timesteps_to_decay,
)

__all__ = [
    "SURROGATES",
    "Surrogate",
    "alpha_to_tau",
    "decay_to_halflife",
    "decay_to_timesteps",
    "halflife_to_decay",
    "heaviside",
    "probabilistic_ste",
    "round_ste",
    "sigmoid4x",
    "spike_count",
    "stochastic_round_ste",
    "surrogate_spike",
    "tau_to_alpha",
    "timesteps_to_decay",
]
