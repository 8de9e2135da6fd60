"""`LIFNeuron`: the textbook leaky integrate-and-fire neuron, one variable, for learning and for plots."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from tracetorch.core.layer import Layer
from tracetorch.functional.spikes import heaviside
from tracetorch.functional.surrogates import Surrogate


class LIFNeuron(Layer):
    """The leaky integrate-and-fire neuron (Gerstner and Kistler, Spiking Neuron Models, 2002, section 4.1), in steps:

        V = beta*V + I
        spike = 1 if V > threshold else 0
        V = reset_potential where it spiked

    A constant input I from V = 0 gives V = I*(1 - beta^k)/(1 - beta) after k steps: no spike ever if I/(1 - beta) is at
    most the threshold, else one every k steps, k the first with V > threshold (with reset_potential 0).

    `potential` and `spike` are buffers of the input's shape, which persist from call to call and are in `state_dict`,
    unlike the states of every other layer. The gradient passes a spike by the surrogate; none passes the reset.

    Args:
        threshold: a finite number.
        beta: the factor by which the potential decays in one step, in [0, 1].
        reset_potential: what the potential is set to after a spike; at most the threshold.
        surrogate: the gradient of a spike: a `Surrogate`, or its name.

    Raises:
        ValueError: a value out of its range.
    """

    potential: Tensor
    spike: Tensor

    def __init__(
        self,
        threshold: float = 1.0,
        beta: float = 0.9,
        reset_potential: float = 0.0,
        surrogate: Surrogate | str = "atan",
    ) -> None:
        super().__init__()
        if not math.isfinite(threshold):
            raise ValueError(f"LIFNeuron: threshold must be finite, not {threshold!r}")
        if not 0 <= beta <= 1:
            raise ValueError(f"LIFNeuron: beta must be in [0, 1], not {beta!r}")
        if not (math.isfinite(reset_potential) and reset_potential <= threshold):
            raise ValueError(
                f"LIFNeuron: reset_potential must be finite and at most threshold={threshold!r}, not "
                f"{reset_potential!r}"
            )
        self.threshold, self.beta, self.reset_potential = float(threshold), float(beta), float(reset_potential)
        self.surrogate = Surrogate(surrogate) if isinstance(surrogate, str) else surrogate
        self.register_buffer("potential", torch.zeros(()))
        self.register_buffer("spike", torch.zeros(()))
        self.state_names = ("potential", "spike")

    def forward(self, current: float | Tensor) -> Tensor:  # type: ignore[override]
        """One step. current: a number, or a floating point tensor of any shape -> spikes of its shape, 0 or 1."""
        if not isinstance(current, Tensor):
            current = torch.full_like(self.potential, current)
        self._spread(current)
        return cast(Tensor, super().forward(current))

    forward.elementwise_step = True  # type: ignore[attr-defined]

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """x, potential, spike of one shape -> spikes, potential, spikes."""
        v = self.beta * states[0] + x
        s = heaviside(v - self.threshold, torch.full_like(v, self.threshold), self.surrogate, v=v).to(v.dtype)
        return s, torch.where(s > 0, self.reset_potential, v), s

    def unroll(self, xs: Tensor, time_dim: int = 0) -> Tensor:  # type: ignore[override]
        """The whole sequence. xs: [T, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`); same shape back."""
        if xs.shape[time_dim]:
            self._spread(xs.select(time_dim, 0))
        return cast(Tensor, super().unroll(xs, time_dim))

    def _spread(self, x: Tensor) -> None:
        """A single value of a state stands for an input of any shape."""
        self.check_input(x)
        for name in self.state_names:
            state = getattr(self, name)
            if state.ndim == 0 and x.ndim:
                setattr(self, name, torch.zeros_like(x) + state.to(x.dtype))

    def reset_states(self) -> None:
        """Potential and spike back to a single 0, whatever the shape of the next input."""
        for name in self.state_names:
            setattr(self, name, torch.zeros_like(getattr(self, name)[(0,) * getattr(self, name).ndim].detach()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.state_names:  # of the shape that was saved
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor):
                setattr(self, name, getattr(self, name).detach().new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}, beta={self.beta:g}, reset_potential={self.reset_potential:g}"
