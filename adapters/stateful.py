"""Modules beside the native layers whose states `tt.reset_states` and its like reach: stages of other frameworks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tracetorch.core import recomputation
from tracetorch.core.trail import Trail, refuse_spent


class SeamError(ValueError):
    """Data that cannot cross a seam between two stages as it is; names the seam, what was found, and the remedy."""


class StateHolder(nn.Module):
    """Base of such a module: the state functions, over states that the subclass reads and writes by name.

    A state is a tensor, [B, ...] unless it has no dimension, or None before the first step. A call of the module is
    bracketed by `enter_call` and `leave_call`, which give a second backward its message.
    """

    # Asked by `tracetorch.core.states`.
    holds_states = True

    def __init__(self) -> None:
        super().__init__()
        self.trail = Trail()

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states."""
        raise NotImplementedError(f"{type(self).__name__} must define state_names")

    def get_state(self, name: str) -> Tensor | None:
        """The state itself, not a copy."""
        raise NotImplementedError(f"{type(self).__name__} must define get_state")

    def set_state(self, name: str, value: Tensor | None) -> None:
        """Put a state in place; None: as before the first step."""
        raise NotImplementedError(f"{type(self).__name__} must define set_state")

    def enter_call(self) -> None:
        """Before a call. Raises `RuntimeError` inside torch's own checkpointing, which would run it twice."""
        recomputation.refuse(type(self).__name__)
        if not (self.trail.passed or self.trail.fused):
            return
        if torch.is_grad_enabled() and not self.trail.blind:
            for name in self.state_names:
                state = self.get_state(name)
                if state is not None:
                    refuse_spent(type(self).__name__, name, state, whole=self.trail.passed)
        self.trail.renew()

    def leave_call(self, *results: Tensor) -> None:
        """After a call, with its outputs."""
        self.trail.follow([*results, *(self.get_state(name) for name in self.state_names)])

    def check_batch(self, batch: int, what: str, dim: int = 0) -> None:
        """Raises `ValueError` if a kept state is of another batch size, which is its dimension `dim`."""
        for name in self.state_names:
            state = self.get_state(name)
            if state is not None and state.ndim and state.shape[dim] != batch:
                raise ValueError(
                    f"{what}: the state {name!r} has shape {list(state.shape)} from the last call, the input has the "
                    f"batch size {batch}; call reset_states() before another batch size or shape"
                )

    def reset_states(self) -> None:
        """Forget the states; the next call starts from the initial ones, whatever its batch size."""
        self.trail.renew()
        for name in self.state_names:
            self.set_state(name, None)

    def zero_states(self) -> None:
        """Set the states to zero, keeping their shapes."""
        for name in self.state_names:
            state = self.get_state(name)
            if state is not None:
                self.set_state(name, torch.zeros_like(state))

    def detach_states(self) -> None:
        """Cut the states from the graph that computed them."""
        self.trail.renew()
        for name in self.state_names:
            state = self.get_state(name)
            if state is not None:
                self.set_state(name, state.detach())

    def save_states(self) -> dict[str, Tensor | None]:
        """`{state: tensor, or None before the first step}`: the tensors themselves, not copies."""
        return {name: self.get_state(name) for name in self.state_names}

    def check_states(self, states: Mapping[str, Tensor | None]) -> None:
        """Raises `ValueError` unless `states` has exactly the states of this module."""
        if set(states) != set(self.state_names):
            raise ValueError(
                f"{type(self).__name__}: states {sorted(states)} given, this one has {sorted(self.state_names)}"
            )

    def load_states(self, states: Mapping[str, Tensor | None], strict: bool = True) -> None:
        """Put back what `save_states` gave. With `strict`, states missing on either side raise `ValueError`."""
        if strict:
            self.check_states(states)
        for name in self.state_names:
            if name in states:
                self.set_state(name, states[name])
