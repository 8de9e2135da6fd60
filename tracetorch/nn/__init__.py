"""Online learning with traces, `LIF`, `LIS` and `Sequential`; and the textbook single neuron."""

from tracetorch.nn.layers import LIF, LIS
from tracetorch.nn.lif_neuron import LIFNeuron
from tracetorch.nn.online import Online, OnlineStates
from tracetorch.nn.rate import stationary_rate
from tracetorch.nn.sequential import Sequential

__all__ = ["LIF", "LIS", "LIFNeuron", "Online", "OnlineStates", "Sequential", "stationary_rate"]
