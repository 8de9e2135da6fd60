"""Any other module whose call is one elementwise step: `forward(x, state=None) -> (output, state)`.

Its call stays as it is; the twin gains `unroll`. Nothing is declared: a module counts if tracing its step succeeds.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.fusing.twin import Recipe, Twin, check_unroll, hooked
from tracetorch.fused.reads import duplicate, read


@dataclass(frozen=True)
class _Form:
    """How a state is passed: one tensor (`kind` is None), or a tuple or list of `count` tensors."""

    count: int
    kind: type | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"state{k}" for k in range(self.count))

    def packed(self, tensors: Sequence[Tensor]) -> Any:
        """The state as the call takes it."""
        if self.kind is None:
            return tensors[0]
        return self.kind(*tensors) if hasattr(self.kind, "_fields") else self.kind(tensors)

    def unpacked(self, state: Any) -> tuple[Tensor, ...] | None:
        """Its tensors, or None: of another form."""
        parts = (state,) if isinstance(state, Tensor) else state
        same = type(state) is self.kind or (self.kind is None and isinstance(state, Tensor))
        if not same or len(parts) != self.count or not all(isinstance(part, Tensor) for part in parts):
            return None
        return tuple(parts)


def _form(state: Any) -> _Form | None:
    if isinstance(state, Tensor):
        return _Form(1, None)
    if isinstance(state, (tuple, list)) and state and all(isinstance(part, Tensor) for part in state):
        return _Form(len(state), type(state))
    return None


@dataclass(frozen=True)
class _Call:
    """The step of a module that is called with its state."""

    form: _Form

    def __call__(self, layer: Any, x: Tensor, states: Mapping[str, Tensor]) -> Sequence[Tensor]:
        output, state = layer.forward(x, self.form.packed(list(states.values())))
        parts = self.form.unpacked(state)
        if parts is None:
            raise TypeError(f"{type(layer).__name__}: a call returns a state of another form than it takes")
        return [output, *parts]


class StepTwin(Twin):
    """Of a module called as `forward(x, state) -> (output, state)`, or with `state=None` for the first step."""

    @staticmethod
    def note(module: nn.Module) -> str:
        """Its call."""
        return "a call is one step and stays its own code; unroll(xs, time_dim) is fused"

    def recipe(self) -> Recipe:
        form: _Form | None = self.__dict__.get("_state_form") or state_form(self)
        if form is None:
            raise TypeError(f"{type(self).__name__}: its call returns no (output, state)")
        return Recipe(form.names, _Call(form), ("_state_form",))

    def unroll(self, xs: Tensor, time_dim: int = 0, state: Any = None) -> tuple[Tensor, Any]:
        """One call per step: the outputs stacked over time, and the last state.

        Without a state the first step is a call, which makes its own.

        Args:
            xs: [T, B, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`).
            state: before the first step, as the call takes it.

        Raises:
            FuseError: no such time dimension, or no step.
        """
        check_unroll(self, xs, time_dim)
        steps = list(xs.unbind(time_dim)) if any(hooked(module) for module in self.modules()) else []
        outputs = []
        if state is None and not steps:
            output, state = self(xs.select(time_dim, 0))
            outputs = [output.unsqueeze(time_dim)]
            xs = xs.narrow(time_dim, 1, xs.shape[time_dim] - 1)
            if xs.shape[time_dim] == 0:
                return outputs[0], state
        form = _form(state)
        if form is not None and not steps:
            self.__dict__["_state_form"] = form
            first = form.unpacked(state) or ()
            result = self.run_sequence(xs, time_dim, dict(zip(form.names, first, strict=True)))
            if result is not None:
                state = form.packed(list(result.last.values()))
                return torch.cat([*outputs, result.outputs], time_dim) if outputs else result.outputs, state
        for x in steps or xs.unbind(time_dim):
            output, state = self(x, state)
            outputs.append(output.unsqueeze(time_dim))
        return torch.cat(outputs, time_dim), state


_SHAPE = (2, 4)  # of the example


def _fitting(tensor: Tensor) -> Tensor:
    """A parameter for the example: one of many neurons as if of its few."""
    return tensor.detach() if tensor.numel() == 1 else torch.full(_SHAPE, 0.5, dtype=tensor.dtype)


def state_form(module: nn.Module) -> _Form | None:
    """The form of the state that a call returns, found by calling a copy on a small example; None: not of this kind."""
    reads = read(module)
    twin: Any = duplicate(module, (), _fitting, reads)
    generator = torch.get_rng_state()
    try:
        with torch.no_grad():
            result = twin.forward(torch.full(_SHAPE, 0.5))
    except Exception:  # a module that takes something else
        return None
    finally:
        torch.set_rng_state(generator)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
        return None
    return _form(result[1])


def choose(module: nn.Module) -> type[Twin] | None:
    """The mixin of a module that may be a neuron, called with its input and its state.

    It may hold modules without tensors of their own, a surrogate or an activation; others make it a network.
    """
    cls = type(module)
    if cls.__module__.split(".")[0] == "torch" or hasattr(module, "unroll") or "forward" in vars(module):
        return None
    if any(True for child in module.children() for _ in (*child.parameters(), *child.buffers())):
        return None
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    if len(parameters) != 2 or parameters[1].default is not None:
        return None
    return StepTwin if state_form(module) is not None else None
