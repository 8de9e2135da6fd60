"""The firing rate of a LIF neuron under a constant input, as a smooth function: the slope that online learning follows.

Derived in docs/online-learning.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

SOFTNESS = 0.05


def stationary_rate(current: Tensor, mem_decay: Tensor, threshold: Tensor, softness: float = SOFTNESS) -> Tensor:
    """Spikes per step of `m = m*mem_decay + current`, minus `threshold` at each spike, in the long run.

    With z = (current - threshold*(1 - mem_decay)) / (threshold*mem_decay), which is 0 where the neuron begins to fire
    and 1 where it fires in every step, and L = -log(mem_decay):

        rate = L / log(1 + (e^(2L) - 1)/(2 z))          for z <= 1/2, and 1 - rate(1 - z) above

    This is exact, up to where in its plateau of one rate the current lies, at the rates 1/n and 1 - 1/n. It depends on
    current/threshold and mem_decay alone. `softness` rounds off the two corners: z is replaced by q(z)/(q(z) + q(1-z)),
    q(z) = (z + sqrt(z^2 + softness^2))/2, so that the slope is finite everywhere, and nowhere zero.

    A decay that has rounded to 0 or 1, and a threshold that has rounded to 0, count as the nearest value with finite
    slopes.

    Args:
        current: any shape.
        mem_decay: in (0, 1), broadcasting against `current`.
        threshold: above 0, broadcasting against `current`.
        softness: above 0, in units of z.

    Returns:
        The rate, in (0, 1), in the shape of the three together; differentiable in each.
    """
    mem_decay, threshold = open_decay(mem_decay), threshold.clamp(min=torch.finfo(threshold.dtype).eps ** 2)
    z = (current - threshold * (1 - mem_decay)) / (threshold * mem_decay)
    low = z <= 0.5
    near = torch.where(low, z, 1 - z)  # the distance to the nearer corner: no digits are lost at the upper one
    width = torch.as_tensor(softness, dtype=z.dtype, device=z.device)
    q, rest = _softened(near, width), _softened(1 - near, width)
    decay_rate = -torch.log(mem_decay)
    odds = 2 * decay_rate + torch.log(-torch.expm1(-2 * decay_rate)) - torch.log(q) + torch.log((q + rest) / 2)
    rate = decay_rate / torch.logaddexp(odds, torch.zeros_like(odds))
    return torch.where(low, rate, 1 - rate)


def open_decay(decay: Tensor) -> Tensor:
    """A decay in (0, 1) that floating point has not rounded to an end, where a stationary state has no slope."""
    eps = torch.finfo(decay.dtype).eps
    return decay.clamp(eps, 1 - eps / 2)


def _softened(z: Tensor, width: Tensor) -> Tensor:
    """(z + sqrt(z^2 + width^2))/2, with all its digits where z is far below 0."""
    root = torch.hypot(z, width)
    above = z > 0
    return torch.where(above, (z + root) / 2, width * width / (2 * (root - torch.where(above, -z, z))))
