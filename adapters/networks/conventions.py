"""Native layers called as the layers of another framework are: for a source's own forward, run as it stands."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.networks.steps import RETURNED
from tracetorch.core.layer import Layer

# The attribute of a snnTorch layer for each state.
ATTRIBUTES: Mapping[str, str] = {
    "v_mem": "mem",
    "i_syn": "syn",
    "i_exc": "syn_exc",
    "i_inh": "syn_inh",
    "spikes": "spk",
}


class _Called(nn.Module):
    """A native layer under another calling convention.

    Args:
        layer: the native layer.
        names: the source layer's attribute -> the native layer's, of parameters and states.
    """

    def __init__(self, layer: Layer, names: Mapping[str, str]) -> None:
        super().__init__()
        self.layer, self.names = layer, dict(names)

    def __getattr__(self, name: str) -> Any:
        names = self.__dict__.get("names", {})
        if name not in names:
            return super().__getattr__(name)
        value = attrgetter(names[name])(self.layer)
        return torch.zeros(0) if value is None else value

    def __setattr__(self, name: str, value: Any) -> None:
        names = self.__dict__.get("names", {})
        if name not in names:
            super().__setattr__(name, value)
        elif names[name] in self.layer.state_names:
            setattr(self.layer, names[name], value if value is not None and value.numel() else None)
        else:
            raise AttributeError(f"{name}: set it in the native layer, as {names[name]}")

    def fit(self, shape: torch.Size) -> None:
        """Start anew, as both frameworks do, where the states have another shape than the input."""
        for name in self.layer.state_names:
            state = getattr(self.layer, name)
            if state is not None and state.shape != shape:
                setattr(self.layer, name, None)


class SnnTorchCalled(_Called):
    """A native layer called as a snnTorch layer: one step, its states handed in and out or hidden.

    Args:
        layer: the native layer.
        source: the layer that it stands for; only read.
        names: the source layer's attribute -> the native layer's parameter.

    Raises:
        ValueError: the class of the source hands its states in no order that is known here.
    """

    def __init__(self, layer: Layer, source: nn.Module, names: Mapping[str, str]) -> None:
        known = [RETURNED[cls.__name__] for cls in type(source).__mro__ if cls.__name__ in RETURNED]
        if not known:
            raise ValueError(f"{type(source).__name__}: the order of its states is not known")
        held: Any = source
        super().__init__(layer, {**names, **{ATTRIBUTES[state]: state for state in known[0]}})
        self.states = known[0]
        self.hidden, self.shows = bool(held.init_hidden), bool(held.output or not held.init_hidden)

    def forward(self, x: Tensor, *states: Tensor | None, **named: Tensor | None) -> Any:
        """One step. x: [B, ...]; spikes, or spikes and states, as the source gives them."""
        given = {name: s for name, s in zip(self.states, states, strict=False) if s is not None}
        given |= {self.names[name]: s for name, s in named.items() if s is not None}
        if self.hidden and given:
            raise TypeError(f"with init_hidden=True, {', '.join(given)} cannot be handed in")
        for name, state in given.items():
            setattr(self.layer, name, state)
        self.fit(x.shape)
        spikes = self.layer(x)
        shown = [getattr(self.layer, name) for name in self.states if name != "spikes"]
        return (spikes, *shown) if self.shows else spikes

    def reset_mem(self) -> Any:
        """The states to zero; returns them."""
        found = []
        for name in self.states:
            state = getattr(self.layer, name)
            if state is not None:
                setattr(self.layer, name, torch.zeros_like(state))
            found.append(torch.zeros(0) if state is None else getattr(self.layer, name))
        return found[0] if len(found) == 1 else tuple(found)

    init_leaky = init_lapicque = init_synaptic = init_alpha = init_rleaky = init_rsynaptic = reset_mem


class SinabsCalled(_Called):
    """A native layer called as a sinabs layer: a whole sequence [B, T, ...], or [B*T, ...] of a `Squeeze` layer.

    Args:
        layer: the native layer.
        source: the layer that it stands for; only read.
        names: the source layer's attribute -> the native layer's parameter.
    """

    def __init__(self, layer: Layer, source: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__(layer, {**names, **{name: name for name in layer.state_names}})
        self.batch_size = int(getattr(source, "batch_size", 0))
        self.num_timesteps = int(getattr(source, "num_timesteps", 0))

    @property
    def squeezed(self) -> bool:
        """Whether time is folded into the batch."""
        return self.batch_size != 0

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, ...] or [B*T, ...] -> likewise."""
        xs = x.reshape(self.batch_size, self.num_timesteps, *x.shape[1:]) if self.squeezed else x
        self.fit(xs[:, 0].shape)
        begin = getattr(self.layer, "begin_sequence", None)
        if begin is not None:
            begin()
        ys: Tensor = self.layer.unroll(xs, 1)
        return ys.flatten(0, 1) if self.squeezed else ys

    def reset_states(self, randomize: bool = False) -> None:
        """Back to the initial states."""
        if randomize:
            raise ValueError("reset_states: randomize=True: a start by chance has no place here")
        self.layer.reset_states()


def called(layer: Layer, source: nn.Module, names: Mapping[str, str], stepped: bool) -> _Called:
    """A native layer called as its source is."""
    return SnnTorchCalled(layer, source, names) if stepped else SinabsCalled(layer, source, names)
