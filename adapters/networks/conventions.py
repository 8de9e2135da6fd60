"""Layers of a target called as the layers of the source are: for a source's own forward, run as it stands.

A membrane that the source's layer shows is shown as that shows it. Where the target's layer keeps the one after the
reset and the source shows the one before, u = v + s * amount; a u that is handed in must be the one that was shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.networks import recurrent
from tracetorch.adapters.networks.driving import DRIVERS, Driver
from tracetorch.adapters.networks.lifted import before_reset, taken_by
from tracetorch.adapters.networks.network import Stage
from tracetorch.adapters.networks.states import attribute, states_of
from tracetorch.adapters.registry import adapter, framework_of
from tracetorch.core.spec import NeuronSpec

# How a target's membrane is shown: as it is, as the one before its reset, or not at all.
AS_IT_IS, BEFORE_RESET, LOST = "as it is", "before the reset", "lost"


class Called(nn.Module):
    """A layer of a target under the calling convention of another.

    Args:
        layer: the target's layer.
        stage: what it stands for in the source; only read.
        to: the target.
        names: the source layer's attribute -> the target layer's, of parameters.
    """

    def __init__(self, layer: nn.Module, stage: Stage, to: str, names: Mapping[str, str]) -> None:
        super().__init__()
        ours = recurrent.adapter_of(layer, adapter(to)).spec(layer)
        spikes = ("spikes",) if recurrent.is_recurrent(layer) else ()
        self.layer, self.where, self.names = layer, stage.name, dict(names)
        self.driver: Driver = DRIVERS[to](layer, (*spikes, *ours.states))
        self.membrane = _membrane(stage.spec(), ours, to)
        self.taken = taken_by(self.bare) if self.membrane == BEFORE_RESET else None
        # The membrane that the layer kept in its last step, the spikes of that step, and what was shown of the two.
        self.last: tuple[Tensor, Tensor, Tensor | None] | None = None
        # The source layer's attribute -> the state that it holds.
        self.held = dict(self.attributes_of_states())

    def attributes_of_states(self) -> Mapping[str, str]:
        """The source layer's attribute for each state -> the state."""
        raise NotImplementedError(f"{type(self).__name__} must define attributes_of_states")

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("held", {}):
            value = self.state(self.held[name])
            return torch.zeros(0) if value is None else value
        names = self.__dict__.get("names", {})
        return attrgetter(names[name])(self.layer) if name in names else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("held", {}):
            self.give(self.held[name], value if value is not None and value.numel() else None)
        elif name in self.__dict__.get("names", {}):
            raise AttributeError(f"{name}: set it in the layer inside, as {self.names[name]}")
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # What was shown belongs to a graph, which no copy has.
        return {**self.__dict__, "last": None}

    @property
    def bare(self) -> nn.Module:
        """The neuron without a recurrence."""
        return self.layer.neuron if isinstance(self.layer, recurrent.Sequenced) else self.layer

    def state(self, name: str) -> Tensor | None:
        """A state as the source shows it."""
        value = self.driver.get(self.layer, name)
        if name != "v_mem" or self.membrane == AS_IT_IS or value is None:
            return value
        if self.membrane == LOST:
            raise self.refusal("the source shows its membrane as this target's layer does not keep it")
        if self.last is None or self.last[0] is not value:
            if bool(value.any()):
                raise self.refusal("the membrane before a reset is known right after a step alone")
            return value
        own, spikes, shown = self.last
        if shown is None:
            shown = before_reset(self.bare, spikes, own, self.taken)
            self.last = own, spikes, shown
        return shown

    def give(self, name: str, value: Tensor | None) -> None:
        """Set a state to what the source's forward hands in."""
        if name == "v_mem" and value is not None and self.membrane != AS_IT_IS and bool(value.any()):
            if self.last is None or self.last[2] is None:
                raise self.refusal("a membrane handed in must be what the layer returned last")
            own, spikes, shown = self.last
            if shown is value and own is self.driver.get(self.layer, name):
                return
            if value.requires_grad or not torch.equal(value, self.last[2].detach()):
                raise self.refusal("a membrane handed in must be what the layer returned last, unchanged or detached")
            # The next step's gradient sees what is taken away at the reset, as the source's does, and nothing before.
            amount = torch.zeros_like(own) if self.taken is None else self.taken.amount(self.bare)
            once = spikes.detach().to(own.dtype) * amount
            value = own.detach() - (once - once.detach())
        self.driver.put(self.layer, name, value)

    def refusal(self, why: str) -> ConversionError:
        """The error of a state that cannot be shown or taken."""
        remedy = "leave the states to the layers, or to='tracetorch'"
        return ConversionError(f"{self.where!r}", "v_mem", self.membrane, why, remedy)

    def note_step(self, spikes: Tensor) -> None:
        """After a step: what the membrane before its reset can be computed of."""
        if self.membrane == BEFORE_RESET:
            kept = self.driver.get(self.layer, "v_mem")
            self.last = None if kept is None else (kept, spikes, None)


class SnnTorchCalled(Called):
    """A layer called as a snnTorch layer: one step, its states handed in and out or hidden.

    Args:
        layer, stage, to, names: as of `Called`.

    Raises:
        ValueError: the class of the source hands its states in no order that is known here.
        ConversionError: its call returns a membrane that the target's layer does not keep.
    """

    def __init__(self, layer: nn.Module, stage: Stage, to: str, names: Mapping[str, str]) -> None:
        source: Any = stage.inner
        # The order in which its calls hand the states; not set as an attribute of a module, which this is not yet.
        self.__dict__["states"] = states_of(source)
        if not self.states:
            raise ValueError(f"{type(source).__name__}: the order of its states is not known")
        super().__init__(layer, stage, to, names)
        # Whether the states are hidden, and whether a call returns them beside the spikes.
        self.hidden, self.shows = bool(source.init_hidden), bool(source.output or not source.init_hidden)
        if self.shows and self.membrane == LOST:
            why = f"its call returns the membrane before its reset, and a layer of {to} keeps the one after, without it"
            remedy = "hidden states, init_hidden=True and output=False; or to='tracetorch'"
            raise ConversionError(f"{stage.name!r}", "reset", stage.spec().reset, why, remedy)

    def attributes_of_states(self) -> Mapping[str, str]:
        """mem, syn, ... in the order in which they are handed."""
        return {attribute("snntorch", state): state for state in self.states}

    def forward(self, x: Tensor, *states: Tensor | None, **named: Tensor | None) -> Any:
        """One step. x: [B, ...]; spikes, or spikes and states, as the source gives them."""
        given = {name: s for name, s in zip(self.states, states, strict=False) if s is not None}
        given |= {self.held[name]: s for name, s in named.items() if s is not None}
        if self.hidden and given:
            raise TypeError(f"with init_hidden=True, {', '.join(given)} cannot be handed in")
        for name, state in given.items():
            self.give(name, state if state.numel() else None)
        spikes = self.driver.step(self.layer, x)
        self.note_step(spikes)
        if not self.shows:
            return spikes
        return (spikes, *(self.state(name) for name in self.states if name != "spikes"))

    def reset_mem(self) -> Any:
        """The states to zero; returns them."""
        found = []
        for name in self.states:
            state = self.driver.get(self.layer, name)
            zero = torch.zeros(0) if state is None else torch.zeros_like(state)
            self.driver.put(self.layer, name, None if state is None else zero)
            found.append(zero)
        self.last = None
        return found[0] if len(found) == 1 else tuple(found)

    init_leaky = init_lapicque = init_synaptic = init_alpha = init_rleaky = init_rsynaptic = reset_mem


class SinabsCalled(Called):
    """A layer called as a sinabs layer: a whole sequence [B, T, ...], or [B*T, ...] of a `Squeeze` layer.

    Args:
        layer, stage, to, names: as of `Called`.
    """

    def __init__(self, layer: nn.Module, stage: Stage, to: str, names: Mapping[str, str]) -> None:
        super().__init__(layer, stage, to, names)
        self.batch_size = int(getattr(stage.inner, "batch_size", 0))
        self.num_timesteps = int(getattr(stage.inner, "num_timesteps", 0))

    def attributes_of_states(self) -> Mapping[str, str]:
        """v_mem, i_syn and b."""
        return {attribute("sinabs", state): state for state in self.driver.paths}

    @property
    def squeezed(self) -> bool:
        """Whether time is folded into the batch."""
        return self.batch_size != 0

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, ...] or [B*T, ...] -> likewise."""
        xs = x.reshape(self.batch_size, self.num_timesteps, *x.shape[1:]) if self.squeezed else x
        ys = self.driver.sequence(self.layer, xs)
        return ys.flatten(0, 1) if self.squeezed else ys

    def reset_states(self, randomize: bool = False) -> None:
        """Back to the initial states."""
        if randomize:
            raise ValueError("reset_states: randomize=True: a start by chance has no place here")
        for name in self.driver.paths:
            self.driver.put(self.layer, name, None)


def _membrane(theirs: NeuronSpec, ours: NeuronSpec, to: str) -> str:
    """How the target's membrane can be shown as the source shows its own."""
    if theirs.stores_before_reset == ours.stores_before_reset or "none" in (theirs.reset, ours.reset):
        return AS_IT_IS
    known = to == "sinabs" and theirs.stores_before_reset and theirs.reset == "subtract"
    return BEFORE_RESET if known else LOST


def called(layer: nn.Module, stage: Stage, to: str, names: Mapping[str, str]) -> nn.Module:
    """A layer of a target called as its source is: the layer itself, where its own class is called so.

    Args:
        layer: of the framework `to`, built for the stage.
        stage: of the source.
        names: the source layer's attribute -> the target layer's, of parameters.

    Raises:
        ValueError, ConversionError: as of `SnnTorchCalled`.
    """
    source: Any = stage.inner
    alike = type(source).__name__ in {cls.__name__ for cls in type(layer).__mro__}
    if alike and framework_of(source) == framework_of(layer) == to:
        if to == "snntorch":
            own: Any = layer
            own.init_hidden, own.output = source.init_hidden, source.output
        return layer
    return (SnnTorchCalled if stage.adapter.STEPPED else SinabsCalled)(layer, stage, to, names)
