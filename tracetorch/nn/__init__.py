"""Neurons outside the library of layers: the textbook single neuron."""

from tracetorch.nn.lif_neuron import LIFNeuron

__all__ = ["LIFNeuron"]
