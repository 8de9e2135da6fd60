"""Functions of the neurons: time constants, spike functions, quantizers, surrogate gradients."""

from tracetorch.functional.quantizers import round_ste
from tracetorch.functional.spikes import heaviside, sigmoid4x, spike_count
from tracetorch.functional.surrogates import SURROGATES, Surrogate
from tracetorch.functional.time_constants import alpha_to_tau, tau_to_alpha

__all__ = [
    "SURROGATES",
    "Surrogate",
    "alpha_to_tau",
    "heaviside",
    "round_ste",
    "sigmoid4x",
    "spike_count",
    "tau_to_alpha",
]
