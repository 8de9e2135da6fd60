"""The states of a spec in the layers of each framework: the attribute that holds one, the order in which calls do."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

# Framework -> state -> the attribute of a layer that holds it, where it is not the state's own name.
_ATTRIBUTES: Mapping[str, Mapping[str, str]] = {
    "snntorch": {"v_mem": "mem", "i_syn": "syn", "i_exc": "syn_exc", "i_inh": "syn_inh", "spikes": "spk"},
    "sinabs": {"adaptation": "b"},
}
# Class -> the states that a layer takes after its input and returns after its output, in order.
_HANDED: Mapping[str, tuple[str, ...]] = {
    "Leaky": ("v_mem",),
    "Lapicque": ("v_mem",),
    "Synaptic": ("i_syn", "v_mem"),
    "Alpha": ("i_exc", "i_inh", "v_mem"),
    "RLeaky": ("spikes", "v_mem"),
    "RSynaptic": ("spikes", "i_syn", "v_mem"),
}


def attribute(framework: str, state: str) -> str:
    """The attribute of the framework's layers that holds a state."""
    return _ATTRIBUTES.get(framework, {}).get(state, state)


def states_of(layer: nn.Module) -> tuple[str, ...]:
    """The states that a layer takes after its input and returns after its output, in order; empty where it does not."""
    return next((_HANDED[cls.__name__] for cls in type(layer).__mro__ if cls.__name__ in _HANDED), ())
