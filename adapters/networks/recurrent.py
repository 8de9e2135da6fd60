"""Recurrent layers of a framework: an elementwise neuron and the framework's own recurrent connection.

The neuron is judged on what it really received, x(t) + W s(t-1). A layer that a target does not have is written as a
module of the two: `tracetorch.snn.recurrent.Recurrent`, `Stepped` for snnTorch, `Sequenced` for sinabs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import Adapter
from tracetorch.adapters.networks.inside import AdapterOfInside
from tracetorch.adapters.networks.states import attribute
from tracetorch.adapters.registry import adapter, framework_of
from tracetorch.core.spec import NeuronSpec
from tracetorch.snn.recurrent import Recurrent
from tracetorch.snn.spec_neuron import SpecNeuron


class _Kind(NamedTuple):
    """Of a framework's recurrent class: the class without the recurrence, and its connection."""

    plain: str
    attribute: str
    from_start: bool  # whether the connection acts in the first step too


_KINDS: Mapping[str, _Kind] = {
    "RLeaky": _Kind("Leaky", "recurrent", True),
    "RSynaptic": _Kind("Synaptic", "recurrent", True),
    "LIFRecurrent": _Kind("LIF", "rec_connect", False),
    "IAFRecurrent": _Kind("IAF", "rec_connect", False),
}


class _Fed(nn.Module):
    """A neuron and a connection from its spikes of the last step, `spk`, to its input."""

    spk: Tensor

    def __init__(self, neuron: nn.Module, connection: nn.Module, from_start: bool) -> None:
        super().__init__()
        self.neuron, self.connection, self.from_start = neuron, connection, from_start
        self.register_buffer("spk", torch.zeros(0), persistent=False)

    def feedback(self, x: Tensor, last: Tensor | None) -> Tensor:
        """What is added to the input x of a step, both [B, ...]; `last`: the spikes of the step before, if any."""
        if last is None and not self.from_start:
            return torch.zeros_like(x)
        return self.connection(torch.zeros_like(x) if last is None else last).reshape(x.shape)


class Stepped(_Fed):
    """A recurrent snnTorch layer with hidden states, one step per call, of any neuron of snnTorch.

    Args:
        neuron: with `init_hidden=True`.
        connection: from spikes [B, ...] to an input of the same shape.
        from_start: whether the connection acts in the first step too, on zeros.
    """

    def forward(self, x: Tensor) -> Tensor:
        """One step. x: [B, ...]."""
        last = self.spk if self.spk.shape == x.shape else None
        spikes: Tensor = self.neuron(x + self.feedback(x, last))
        self.spk = spikes
        return spikes

    def begin_sequence(self) -> None:
        """With `from_start=False`: the next step has no feedback, as at the start of a call in sinabs."""
        if not self.from_start:
            self.spk = self.spk.new_zeros(0)

    @property
    def mem(self) -> Any:
        """The neuron's membrane."""
        return self.neuron.mem

    @property
    def syn(self) -> Any:
        """The neuron's synaptic current, where it has one."""
        return self.neuron.syn


class Sequenced(_Fed):
    """A recurrent sinabs layer over [B, T, ...], of a neuron that sinabs has no such layer for.

    Args:
        neuron: takes [B, T, ...].
        connection: from spikes [B, ...] to an input of the same shape.
        from_start: whether the connection acts in the first step too, on zeros, and a call goes on from the spikes of
            the last one, as in snnTorch; else each call starts without feedback, as in sinabs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, ...] -> spikes, likewise."""
        steps: list[Tensor] = []
        goes_on = self.from_start and self.spk.shape == x[:, 0].shape
        for step in x.unbind(1):
            last = steps[-1] if steps else self.spk if goes_on else None
            steps.append(self.neuron((step + self.feedback(step, last)).unsqueeze(1)).squeeze(1))
        self.spk = steps[-1]
        return torch.stack(steps, 1)


_WRITTEN = (Recurrent, Stepped, Sequenced)


def is_recurrent(module: nn.Module) -> bool:
    """Whether it is a recurrent layer that can be read."""
    return isinstance(module, _WRITTEN) or (type(module).__name__ in _KINDS and framework_of(module) is not None)


def _plain(module: nn.Module) -> nn.Module:
    """The neuron of a recurrent layer: its own attributes under the class without the recurrence. To be read only."""
    if isinstance(module, _WRITTEN):
        return module.neuron
    cls = next(c for c in _relatives(module) if c.__name__ == _KINDS[type(module).__name__].plain)
    twin: nn.Module = object.__new__(cls)
    twin.__dict__.update(module.__dict__)
    return twin


def _relatives(module: nn.Module) -> tuple[type, ...]:
    """The classes of the module's framework without the recurrence. (It is imported: one of its layers is in hand.)"""
    package = importlib.import_module({"snntorch": "snntorch", "sinabs": "sinabs.layers"}[str(framework_of(module))])
    return tuple(getattr(package, kind.plain) for kind in _KINDS.values() if hasattr(package, kind.plain))


def connection(module: nn.Module) -> nn.Module:
    """What the spikes of a step go through."""
    if isinstance(module, _WRITTEN):
        return module.connection
    found: nn.Module = getattr(module, _KINDS[type(module).__name__].attribute)
    return found


def from_start(module: nn.Module) -> bool:
    """Whether the connection acts in the first step too."""
    if isinstance(module, _WRITTEN):
        return bool(module.from_start)
    return _KINDS[type(module).__name__].from_start


class RecurrentAdapter(AdapterOfInside):
    """An adapter of one framework's recurrent layers: as `Adapter`, of the neuron inside."""

    recurrent = True

    def is_neuron(self, module: nn.Module) -> bool:
        """Any recurrent layer."""
        return is_recurrent(module)

    def spec(self, layer: nn.Module, dt: float | None = None) -> NeuronSpec:
        """Of the neuron, on the sum of input and feedback."""
        found = self.base.spec(_plain(layer), dt)
        if type(layer).__name__ != "RLeaky":
            return found
        timing = found.reset_timing
        if found.reset == "value" and timing == "next_step_before_decay":
            timing = "next_step_discards_input"  # RLeaky takes all of u = beta*mem + x + W s away
        return found.replace(form="snntorch.RLeaky", reset_timing=timing)

    def attributes(self, layer: nn.Module) -> Mapping[str, str]:
        """Of the neuron, as paths."""
        inside = "neuron." if isinstance(layer, _WRITTEN) else ""
        return {name: inside + own for name, own in self.base.attributes(_plain(layer)).items()}

    def states(self, layer: nn.Module) -> tuple[str, ...]:
        """What a call changes, on the layer itself."""
        if isinstance(layer, Recurrent):
            return layer.state_names
        return ("spk", *(self.base.states(layer) if not isinstance(layer, _WRITTEN) else ()))

    def reset(self, layer: nn.Module) -> None:
        """Back to the initial state."""
        if isinstance(layer, Recurrent):
            layer.reset_states()
            return
        # snnTorch's states are those of a plain class over the same attributes, buffers included.
        own = _plain(layer) if isinstance(layer, _WRITTEN) or self.base.STEPPED else layer
        self.base.reset(own)
        if hasattr(layer, "spk"):
            layer.spk = torch.zeros(0)

    def trace(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Adapter.trace`; beside the states, "drive": what the neuron received."""
        self.reset(layer)
        fed: list[Tensor] = []
        hook = connection(layer).register_forward_hook(lambda module, args, result: fed.append(result))
        try:
            outputs, states = self._run(layer, xs)
        finally:
            hook.remove()
        # snnTorch computes the feedback of one step twice where it resets to zero.
        every = max(1, len(fed) // len(xs)) if from_start(layer) else 1
        feedback = [f.reshape(xs.shape[1:]) for f in fed[::every]]
        if not from_start(layer):
            feedback = [torch.zeros_like(xs[0]), *feedback]
        if not self.STEPPED and not isinstance(layer, Sequenced):
            # sinabs 3.1.3's own recording of a recurrent layer at t is the membrane before the reset of step t + 1.
            _, states = self.base.trace(_plain(layer), xs + torch.stack(feedback[: len(xs)]))
        states["feedback"] = torch.stack(feedback[: len(xs)])
        states["drive"] = xs + states["feedback"]
        return outputs, states

    def _run(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs and states after every step, each [T, B, ...], from the present state."""
        if not self.STEPPED:
            return self._sequence(layer, xs)
        spec = self.spec(layer)
        holder: Any = layer.neuron if isinstance(layer, Stepped) else layer
        outputs: list[Tensor] = []
        recorded: dict[str, list[Tensor]] = {name: [] for name in spec.states}
        for x in xs:
            result = layer(x)
            outputs.append(result[0] if isinstance(result, tuple) else result)
            for name in recorded:
                recorded[name].append(getattr(holder, attribute(self.NAME, name)))
        return torch.stack(outputs), {name: torch.stack(series) for name, series in recorded.items()}

    def _sequence(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `_run`, of sinabs's layers; without states where they are another class's to record."""
        if not isinstance(layer, Sequenced):
            return layer(xs.transpose(0, 1)).transpose(0, 1), {}
        source: Any = layer.neuron
        recorded: dict[str, list[Tensor]] = {}

        def keep(module: Any, args: Any, result: Any) -> None:
            for name in dict(module.named_buffers()):
                recorded.setdefault(name, []).append(getattr(module, name))

        hook = source.register_forward_hook(keep)
        try:
            outputs = layer(xs.transpose(0, 1)).transpose(0, 1)
        finally:
            hook.remove()
        return outputs, {name: torch.stack(series) for name, series in recorded.items()}


def adapter_of(module: nn.Module, base: Adapter) -> Any:
    """The adapter of a neuron: the framework's own, or that of its recurrent layers."""
    return RecurrentAdapter(base) if is_recurrent(module) else base


def build(source: nn.Module, neuron: nn.Module, copied: nn.Module, to: str) -> nn.Module:
    """The recurrent layer of a target, of its neuron and a copy of the source's connection."""
    starts = from_start(source)
    if to == "tracetorch":
        assert isinstance(neuron, SpecNeuron)
        return Recurrent(neuron, copied, starts)
    return Stepped(neuron, copied, starts) if adapter(to).STEPPED else Sequenced(neuron, copied, starts)
