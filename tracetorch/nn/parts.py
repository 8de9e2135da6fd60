"""What an online layer is made of: its input trace, its membrane, and how the membrane depends on the parameters."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tracetorch.core.layer import Layer, Value
from tracetorch.functional.surrogates import Surrogate

_surrogate = lru_cache(maxsize=64)(Surrogate)


class _Spike(torch.autograd.Function):
    """1 where z > 0, in z's dtype, so that a float64 gradient is not rounded; backward by the surrogate."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, v: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(z, threshold, v if surrogate.of_membrane else None)
        ctx.surrogate = surrogate
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        z, threshold, v = ctx.saved_tensors
        return ctx.surrogate.vjp(grads[0], z, threshold, v), None, None, None


class InputTrace(Layer):
    """The trace of the input and its derivative with respect to the decay d:

        presynaptic = presynaptic*d + x
        sensitivity = sensitivity*d + presynaptic of the step before

    Args:
        num_neurons: the features of the input.
        trace_decay: d, in (0, 1).
        trace_decay_rank: 0 for one shared value, 1 for one per feature.
        learn_trace_decay: whether it is a parameter.
    """

    def __init__(
        self,
        num_neurons: int,
        trace_decay: Value = 0.9,
        trace_decay_rank: int = 1,
        learn_trace_decay: bool = True,
    ) -> None:
        super().__init__(num_neurons)
        self.define_state("presynaptic")
        self.define_state("sensitivity")
        self.define_decay("trace_decay", trace_decay, trace_decay_rank, learn_trace_decay)

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """x, presynaptic, sensitivity [..., num_neurons] -> presynaptic, presynaptic, sensitivity."""
        before, sensitivity = states
        d = self.trace_decay
        trace = before * d + x
        return trace, trace, sensitivity * d + before


class LeakyMembrane(Layer):
    """A leaky integral, `mem = mem*mem_decay + x`, and nothing else: the membrane of a read-out."""

    def __init__(
        self, num_neurons: int, mem_decay: Value = 0.9, mem_decay_rank: int = 1, learn_mem_decay: bool = True
    ) -> None:
        super().__init__(num_neurons)
        self.define_state("mem")
        self.define_decay("mem_decay", mem_decay, mem_decay_rank, learn_mem_decay)

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """x, mem [..., num_neurons] -> mem, mem."""
        mem = states[0] * self.mem_decay + x
        return mem, mem


class SpikingMembrane(Layer):
    """`u = mem*mem_decay + x`, a spike where u > threshold, then `mem = u - spike*threshold`.

    Args:
        num_neurons: number of neurons.
        mem_decay: in (0, 1).
        threshold: above 0.
        surrogate: the name of a `Surrogate`, the slope of a spike.
        surrogate_parameters: of the surrogate, `(name, value)` pairs.
        emits: what `step` puts out: "spikes", with the reset in the graph, or "distance", u - threshold, with the
            reset taken as constant.
        mem_decay_rank, threshold_rank: 0 for one shared value, 1 for one per neuron.
        learn_mem_decay, learn_threshold: whether they are parameters.
    """

    def __init__(
        self,
        num_neurons: int,
        mem_decay: Value = 0.9,
        threshold: Value = 1.0,
        surrogate: str = "atan",
        surrogate_parameters: tuple[tuple[str, float], ...] = (),
        emits: str = "spikes",
        mem_decay_rank: int = 1,
        threshold_rank: int = 1,
        learn_mem_decay: bool = True,
        learn_threshold: bool = True,
    ) -> None:
        super().__init__(num_neurons)
        self.define_state("mem")
        self.define_decay("mem_decay", mem_decay, mem_decay_rank, learn_mem_decay)
        self.define_positive("threshold", threshold, threshold_rank, learn_threshold)
        made = Surrogate(surrogate, tuple((str(name), value) for name, value in surrogate_parameters))
        self.surrogate, self.surrogate_parameters, self.emits = made.name, made.parameters, emits

    def spikes(self, distance: Tensor, threshold: Tensor, u: Tensor) -> Tensor:
        """1 where `distance`, u - threshold, is above 0; backward by the surrogate."""
        return _Spike.apply(distance, threshold, u, _surrogate(self.surrogate, self.surrogate_parameters))

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """x, mem [..., num_neurons] -> spikes or distance, mem."""
        threshold = self.threshold
        u = states[0] * self.mem_decay + x
        distance = u - threshold
        if self.emits == "distance":
            return distance, u - (distance > 0).to(u.dtype) * threshold
        spikes = self.spikes(distance, threshold, u)
        return spikes, u - spikes * threshold


class Eligibility(Layer):
    """How the membrane depends on the parameters through the steps so far, their spikes taken as constant.

    With u = mem*d + x and x = W i + b, each is carried forward beside the membrane:

        by_weight = by_weight*d + i           [B, out, in], or [B, 1, in] where all neurons share one d
        by_bias = by_bias*d + 1               [B, out]
        by_decay = by_decay*d + mem of the step before
        by_threshold = by_threshold*d - spike
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("by_weight", "by_bias", "by_decay", "by_threshold"):
            self.define_state(name)

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """An input alone changes nothing: see `advance`."""
        return (x, *states)

    @torch.no_grad()
    def advance(self, x: Tensor, before: Tensor, spikes: Tensor | None, decay: Tensor) -> None:
        """After the steps of a call.

        Args:
            x: the input of the layer, [B, T, in].
            before: the membrane before each step, [B, T, out].
            spikes: [B, T, out], or None for a membrane without a threshold.
            decay: of the membrane, [out] or [].
        """
        decay = decay.reshape(-1)
        left = torch.arange(x.shape[1] - 1, -1, -1, device=x.device, dtype=x.dtype)
        powers = decay ** left[:, None]  # [T, out or 1]: what is left at the end of what came in at each step
        all_steps = decay ** x.shape[1]
        gains = {
            "by_weight": x if x.shape[1] == 1 else torch.einsum("to,bti->boi", powers, x).to(x.dtype),
            "by_bias": powers.sum(0).expand(before.shape[0], before.shape[2]),
            "by_decay": (powers * before).sum(1),
            "by_threshold": before.new_zeros(before.shape[::2]) if spikes is None else -(powers * spikes).sum(1),
        }
        for name, gain in gains.items():
            kept = getattr(self, name)
            factor = all_steps[:, None] if name == "by_weight" else all_steps
            size = (-1, decay.numel(), -1) if name == "by_weight" else gain.shape
            setattr(self, name, gain.expand(size) if kept is None else kept * factor + gain)
