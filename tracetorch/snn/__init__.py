"""Native spiking layers."""

from tracetorch.core.layer import Layer
from tracetorch.snn.leaky import LI, LIB
from tracetorch.snn.spec_neuron import SpecNeuron

__all__ = ["LI", "LIB", "Layer", "SpecNeuron"]
