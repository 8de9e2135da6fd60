"""`Model` and `Sequential`: modules whose native layers' states are handled together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tracetorch.core import states as _states
from tracetorch.core.layer import Layer


class Model(nn.Module):
    """An `nn.Module` with the state functions as methods; they reach native layers in any nesting of modules."""

    def reset_states(self) -> None:
        """`tt.reset_states(self)`."""
        _states.reset_states(self)

    def zero_states(self) -> None:
        """Set the states of every native layer to zero, keeping their shapes."""
        for layer in self.modules():
            if isinstance(layer, Layer):
                layer.zero_states()

    def detach_states(self) -> None:
        """`tt.detach_states(self)`."""
        _states.detach_states(self)

    def save_states(self) -> _states.States:
        """`tt.save_states(self)`."""
        return _states.save_states(self)

    def load_states(self, states: Mapping[str, Mapping[str, Tensor | None]], strict: bool = True) -> None:
        """`tt.load_states(self, states, strict)`."""
        _states.load_states(self, states, strict)


class Sequential(Model, nn.Sequential):
    """`nn.Sequential` with the state functions as methods: one call is one time step."""


def unroll(model: nn.Module, xs: Tensor, time_dim: int = 0, fold: str = "exact") -> Tensor:
    """Run a model that takes one time step per call over a whole sequence; states carry on.

    Args:
        model: one call is one time step, a tensor in and a tensor out.
        xs: [T, B, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`).
        time_dim: the time dimension of `xs` and of the result.
        fold: "exact" calls every layer once per step, bit-identical to the loop by hand. It is the only one so far.

    Raises:
        ValueError: another `fold`, or an empty sequence.
    """
    if fold != "exact":
        raise ValueError(f"unroll: fold={fold!r} is not available in this version; use fold='exact'")
    if xs.shape[time_dim] == 0:
        raise ValueError(f"unroll: the sequence has no time step (shape {list(xs.shape)}, time_dim={time_dim})")
    return torch.stack([model(x) for x in xs.unbind(time_dim)], time_dim)
