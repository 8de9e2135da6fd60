"""Norse: how its neurons are fused (norse 1.1.0). Cells, layers over time, and cells under `Lift`.

A cell's call is one step `(x, state) -> (z, state)` and stays the framework's own code; its twin gains `unroll`. A
layer's call, and a lifted cell's, is a whole sequence [T, B, ...]. The step is the neuron's own activation function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from norse.torch.module.lift import Lift
from norse.torch.module.sequential import SequentialState
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell
from torch import Tensor, nn

from tracetorch.adapters.fusing.twin import Recipe, Twin, check_unroll, hooked, stacked
from tracetorch.adapters.networks import modules as known
from tracetorch.fused.reads import read

PACKAGE = "norse"


@dataclass(frozen=True)
class _Activation:
    """The step of a neuron whose state is a named tuple of this type."""

    state: type

    def __call__(self, layer: Any, x: Tensor, states: Mapping[str, Tensor]) -> Sequence[Tensor]:
        output, after = layer.activation(x, self.state(**states), layer.p, layer.dt)
        return [output, *(getattr(after, name) for name in states)]


class _NeuronTwin(Twin):
    """The part common to cells and layers."""

    def recipe(self) -> Recipe:
        kind: Any = self.__dict__.get("_state_type") or state_type(self)
        return Recipe(tuple(kind._fields), _Activation(kind), ("_state_type",))

    def sequence(self, xs: Tensor, time_dim: int, state: Any, record: bool = False) -> tuple[Tensor, Any] | None:
        """Outputs and the last state, or with `record` the states stacked over time; None: not through a kernel."""
        self.__dict__["_state_type"] = type(state)
        if not hasattr(state, "_fields"):
            return None
        names = tuple(state._fields)
        result = self.run_sequence(xs, time_dim, state._asdict(), names if record else ())
        if result is None:
            return None
        kept = result.recorded if record else result.last
        return result.outputs, type(state)(**{name: kept[name] for name in names})


class CellTwin(_NeuronTwin):
    """Of a cell: its call stays one step."""

    @staticmethod
    def note(module: nn.Module) -> str:
        """Its call."""
        return "a call is one step and stays its own code; unroll(xs, time_dim) is fused"

    def unroll(self, xs: Tensor, time_dim: int = 0, state: Any = None) -> tuple[Tensor, Any]:
        """One call per step: the outputs stacked over time, and the last state.

        Args:
            xs: [T, B, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`).
            state: before the first step, as the call takes it.

        Raises:
            FuseError: no such time dimension, or no step.
        """
        check_unroll(self, xs, time_dim)
        if not hooked(self):
            layer: Any = self
            first = layer.state_fallback(xs.select(time_dim, 0)) if state is None else state
            done = self.sequence(xs, time_dim, first)
            if done is not None:
                return done
            state = first
        outputs = []
        for x in xs.unbind(time_dim):
            output, state = self(x, state)
            outputs.append(output)
        return torch.stack(outputs, time_dim), state


class LayerTwin(_NeuronTwin):
    """Of a layer over time."""

    def forward(self, input_tensor: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """As the framework's: [T, B, ...] -> outputs, and the last state or with `record_states` all states."""
        layer: Any = self
        if input_tensor.ndim > 0 and len(input_tensor) > 0:
            state = state if state is not None else layer.state_fallback(input_tensor)
            done = self.sequence(input_tensor, 0, state, layer.record_states)
            if done is not None:
                return done
        return SNN.forward(layer, input_tensor, state)


class NetworkTwin(Twin):
    """Of a `SequentialState` whose call is one step: its call stays that; it gains `unroll`."""

    neuron = False

    def unroll(self, xs: Tensor, time_dim: int = 0, state: Any = None) -> tuple[Tensor, Any]:
        """One call per step: the outputs stacked over time, and the last states.

        Layer by layer, each over all steps: stateless ones once per step, so that their bits are those of the calls.
        With `return_hidden` the outputs are a list, one tensor a layer.

        Args:
            xs: [T, B, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`).
            state: one entry a layer, as the call takes it; a list given here is changed, as by the call.

        Raises:
            FuseError: no such time dimension, or no step.
        """
        check_unroll(self, xs, time_dim)
        network: Any = self
        children = list(network)
        if hooked(self) or network.return_hidden or any(hooked(m) or not _folds(m, children) for m in children):
            outputs = []
            for x in xs.unbind(time_dim):
                output, state = self(x, state)
                outputs.append(output)
            return stacked(outputs, time_dim), state
        state = [None] * len(network) if state is None else state
        xs = xs.movedim(time_dim, 0)
        for index, child in enumerate(network):
            if isinstance(child, CellTwin):
                xs, state[index] = child.unroll(xs, 0, state[index])
            else:
                xs = torch.stack([child(x) for x in xs]) if index == 0 else known.per_step(child, xs)
        return xs.movedim(0, time_dim), state


def _folds(module: nn.Module, network: Sequence[nn.Module]) -> bool:
    """Whether all steps may go through a module before the next one sees the first: its order of steps is all it needs.

    Not dropout in training, which shares its random numbers, nor a batch norm whose statistics two places update.
    """
    twice = sum(child is module for child in network) > 1
    modal = module.training and isinstance(module, known.MODAL if twice else known.DROPOUT)
    return isinstance(module, CellTwin) or (known.is_known(module) and not modal)


class LiftTwin(Twin):
    """Of a `Lift` around a cell, or around a `SequentialState` of cells."""

    neuron = False

    def forward(self, x: Any) -> Any:
        """As the framework's: [T, B, ...], or a tuple of it and a state."""
        layer: Any = self
        inner = layer.lifted_module
        xs, state = x if isinstance(x, tuple) else (x, None)
        if isinstance(inner, (CellTwin, NetworkTwin)) and not hooked(inner) and len(xs) > 0:
            return inner.unroll(xs, state=state)
        return Lift.forward(layer, x)


def state_type(module: nn.Module) -> type:
    """The named tuple of a neuron's states.

    Raises:
        TypeError: its state is no named tuple of tensors.
    """
    # Quirk of 1.1.0: IAF's initial state is its own v_reset, of which it requires a gradient from then on.
    before = {id(t): (t, t.requires_grad) for t in read(module).tensors.values() if t.is_leaf}
    layer: Any = module
    state = layer.state_fallback(torch.zeros(1, 1))
    for tensor, required in before.values():
        tensor.requires_grad_(required)
    if not hasattr(state, "_fields") or not all(isinstance(value, Tensor) for value in state):
        raise TypeError(f"{type(module).__name__}: its state is no named tuple of tensors")
    return type(state)


def choose(module: nn.Module) -> type[Twin] | str | None:
    """The mixin of a layer that can be fused, why one cannot, or None: no neuron of this framework."""
    if isinstance(module, (SNNRecurrent, SNNRecurrentCell)):
        return "recurrent: its spikes return through a matrix at every step"
    for kind, mixin in ((SNNCell, CellTwin), (SNN, LayerTwin)):
        if isinstance(module, kind):
            return mixin if type(module).forward is kind.forward else f"overrides forward of {kind.__name__}"
    if isinstance(module, Lift) and type(module).forward is Lift.forward:
        return LiftTwin if isinstance(module.lifted_module, (SNNCell, SequentialState)) else None
    if isinstance(module, SequentialState) and type(module).forward is SequentialState.forward:
        return NetworkTwin if any(isinstance(child, SNNCell) for child in module) else None
    return None


def adopt(module: nn.Module) -> None:
    """Norse's modules keep no state."""
