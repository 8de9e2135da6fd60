"""Recurrent layers of a framework: an elementwise neuron and the framework's own recurrent connection.

The neuron is judged on what it really received, x(t) + W s(t-1). A layer that a target does not have is written as a
module of the two: `tracetorch.snn.recurrent.Recurrent`, `Stepped` for snnTorch, `Sequenced` for sinabs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import Adapter, Building
from tracetorch.adapters.registry import adapter, framework_of
from tracetorch.core.spec import NeuronSpec
from tracetorch.snn.recurrent import Recurrent
from tracetorch.snn.spec_neuron import SpecNeuron

# class -> the class without the recurrence, the attribute of the connection, whether it acts in the first step
_LAYERS = {
    "RLeaky": ("Leaky", "recurrent", True),
    "RSynaptic": ("Synaptic", "recurrent", True),
    "LIFRecurrent": ("LIF", "rec_connect", False),
    "IAFRecurrent": ("IAF", "rec_connect", False),
}


class Stepped(nn.Module):
    """A recurrent snnTorch layer with hidden states, one step per call, of any neuron of snnTorch.

    Args:
        neuron: with `init_hidden=True`.
        connection: from spikes [B, ...] to an input of the same shape.
        from_start: whether the connection acts in the first step too, on zeros.
    """

    spk: Tensor

    def __init__(self, neuron: nn.Module, connection: nn.Module, from_start: bool) -> None:
        super().__init__()
        self.neuron, self.connection, self.from_start = neuron, connection, from_start
        self.register_buffer("spk", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """One step. x: [B, ...]."""
        first = self.spk.shape != x.shape
        last = torch.zeros_like(x) if first else self.spk
        feedback = self.connection(last).reshape(x.shape) if self.from_start or not first else torch.zeros_like(x)
        spikes: Tensor = self.neuron(x + feedback)
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


class Sequenced(nn.Module):
    """A recurrent sinabs layer over [B, T, ...], of a neuron that sinabs has no such layer for.

    Args:
        neuron: takes [B, T, ...].
        connection: from spikes [B, ...] to an input of the same shape.
        from_start: whether the connection acts in the first step too, on zeros, and a call goes on from the spikes of
            the last one, as in snnTorch; else each call starts without feedback, as in sinabs.
    """

    spk: Tensor

    def __init__(self, neuron: nn.Module, connection: nn.Module, from_start: bool) -> None:
        super().__init__()
        self.neuron, self.connection, self.from_start = neuron, connection, from_start
        self.register_buffer("spk", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, ...] -> spikes, likewise."""
        steps: list[Tensor] = []
        for step in x.unbind(1):
            kept = self.spk if self.spk.shape == step.shape else torch.zeros_like(step)
            last = steps[-1] if steps else kept
            acts = bool(steps) or self.from_start
            feedback = self.connection(last).reshape(step.shape) if acts else torch.zeros_like(step)
            steps.append(self.neuron((step + feedback).unsqueeze(1)).squeeze(1))
        self.spk = steps[-1]
        return torch.stack(steps, 1)


_WRITTEN = (Recurrent, Stepped, Sequenced)


def is_recurrent(module: nn.Module) -> bool:
    """Whether it is a recurrent layer that can be read."""
    return isinstance(module, _WRITTEN) or _kind(module) is not None


def _kind(module: nn.Module) -> tuple[str, str, bool] | None:
    return _LAYERS.get(type(module).__name__) if framework_of(module) is not None else None


def _plain(module: nn.Module) -> nn.Module:
    """The neuron of a recurrent layer: its own attributes under the class without the recurrence. To be read only."""
    if isinstance(module, _WRITTEN):
        return module.neuron
    kind = _kind(module)
    assert kind is not None
    cls = next(c for c in _relatives(module) if c.__name__ == kind[0])
    twin: nn.Module = object.__new__(cls)
    twin.__dict__.update(module.__dict__)
    return twin


def _relatives(module: nn.Module) -> tuple[type, ...]:
    """The classes of the module's framework without the recurrence. (It is imported: one of its layers is in hand.)"""
    package = importlib.import_module({"snntorch": "snntorch", "sinabs": "sinabs.layers"}[str(framework_of(module))])
    return tuple(getattr(package, name) for name, _, _ in _LAYERS.values() if hasattr(package, name))


def connection(module: nn.Module) -> nn.Module:
    """What the spikes of a step go through."""
    if isinstance(module, _WRITTEN):
        return module.connection
    kind = _kind(module)
    assert kind is not None
    found: nn.Module = getattr(module, kind[1])
    return found


def from_start(module: nn.Module) -> bool:
    """Whether the connection acts in the first step too."""
    if isinstance(module, _WRITTEN):
        return bool(module.from_start)
    kind = _kind(module)
    assert kind is not None
    return kind[2]


class RecurrentAdapter:
    """An adapter of one framework's recurrent layers: as `Adapter`, of the neuron inside."""

    recurrent = True

    def __init__(self, base: Adapter) -> None:
        self.base = base
        self.NAME, self.STEPPED = base.NAME, base.STEPPED

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
        if isinstance(layer, _WRITTEN):
            self.base.reset(layer.neuron)
        elif self.base.STEPPED:
            self.base.reset(_holder(layer))
        else:
            self.base.reset(layer)
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
        if not self.STEPPED:
            return self._sequence(layer, xs)
        names = {**_STORED.get(self.NAME, {})}
        spec = self.spec(layer)
        holder: Any = layer.neuron if isinstance(layer, Stepped) else layer
        outputs, recorded = [], {name: [] for name in spec.states}  # type: ignore[var-annotated]
        for x in xs:
            result = layer(x)
            outputs.append(result[0] if isinstance(result, tuple) else result)
            for name in recorded:
                recorded[name].append(getattr(holder, names.get(name, name)))
        return torch.stack(outputs), {name: torch.stack(series) for name, series in recorded.items()}

    def _sequence(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
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

    def build(self, spec: NeuronSpec, building: Building) -> nn.Module:
        """Not used: see `build`."""
        return self.base.build(spec, building)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Not used."""
        return module

    def assemble(self, modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
        """Not used."""
        return self.base.assemble(modules, emit_state)


_STORED = {"snntorch": {"v_mem": "mem", "i_syn": "syn"}}


def _holder(layer: nn.Module) -> nn.Module:
    """For resetting a snnTorch layer's states: the plain class over the same attributes, buffers included."""
    return _plain(layer)


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
