"""Layers, models, states, and the record of a neuron's semantics."""

from tracetorch.core.layer import Layer
from tracetorch.core.model import Model, Sequential, unroll
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.core.states import (
    TTcompile,
    TTdecompile,
    detach_states,
    load_states,
    reset_states,
    save_states,
    zero_states,
)
from tracetorch.core.unrolling import UnrollWarning

__all__ = [
    "Layer",
    "Model",
    "NeuronSpec",
    "Parameter",
    "Sequential",
    "SpecError",
    "TTcompile",
    "TTdecompile",
    "UnrollWarning",
    "detach_states",
    "load_states",
    "reset_states",
    "save_states",
    "unroll",
    "zero_states",
]
