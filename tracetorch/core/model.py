"""`Model` and `Sequential`: modules whose native layers' states are handled together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tracetorch.core import states as _states
from tracetorch.core.unrolling import unroll

__all__ = ["Model", "Sequential", "unroll"]


class Model(nn.Module):
    """An `nn.Module` with the state functions as methods; they reach native layers in any nesting of modules."""

    def reset_states(self) -> None:
        """`tt.reset_states(self)`."""
        _states.reset_states(self)

    def zero_states(self) -> None:
        """`tt.zero_states(self)`."""
        _states.zero_states(self)

    def detach_states(self) -> None:
        """`tt.detach_states(self)`."""
        _states.detach_states(self)

    def save_states(self) -> _states.States:
        """`tt.save_states(self)`."""
        return _states.save_states(self)

    def load_states(self, states: Mapping[str, Mapping[str, Tensor | None]], strict: bool = True) -> None:
        """`tt.load_states(self, states, strict)`."""
        _states.load_states(self, states, strict)

    def TTcompile(self) -> None:
        """`tt.TTcompile(self)`."""
        _states.TTcompile(self)

    def TTdecompile(self) -> None:
        """`tt.TTdecompile(self)`."""
        _states.TTdecompile(self)


class Sequential(Model, nn.Sequential):
    """`nn.Sequential` with the state functions as methods: one call is one time step."""
