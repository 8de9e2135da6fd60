"""Spike functions: a hard step forward, a surrogate gradient backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.functional.surrogates import Surrogate


class _Heaviside(torch.autograd.Function):
    """1 where z > 0 (or z >= 0), in the given dtype; backward by a surrogate of z."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        threshold: Tensor,
        v: Tensor | None,
        strict: bool,
        surrogate: Surrogate,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(z, threshold, v if surrogate.of_membrane else None)
        ctx.surrogate = surrogate
        return (z > 0).to(dtype) if strict else (z >= 0).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        z, threshold, v = ctx.saved_tensors
        return ctx.surrogate.vjp(grads[0], z, threshold, v), None, None, None, None, None


class _Count(torch.autograd.Function):
    """(v > 0) * trunc(v / threshold), at most `limit` if given, as float32; backward by a surrogate of z.

    `z` must be `v - threshold`: the gradient is given to it, so that it reaches both or, if the caller detached the
    threshold, only `v`.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, threshold: Tensor, limit: int | None, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(z, threshold, v if surrogate.of_membrane else None)
        ctx.surrogate = surrogate
        spikes = (v > 0) * torch.div(v, threshold, rounding_mode="trunc").float()
        return spikes if limit is None else torch.clamp(spikes, max=limit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        z, threshold, v = ctx.saved_tensors
        return ctx.surrogate.vjp(grads[0], z, threshold, v), None, None, None, None


def heaviside(
    z: Tensor,
    threshold: Tensor,
    surrogate: Surrogate,
    *,
    strict: bool = True,
    v: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Spikes of `z = v - threshold`, any shape: 1 where `z > 0` (`strict`) or `z >= 0`, else 0; of the given dtype.

    NaN gives 0. The gradient with respect to `z` is the surrogate's; `threshold` only scales its width. `v` is for
    surrogates written in the membrane itself; without it they take `z + threshold`.
    """
    return _Heaviside.apply(z, threshold, v, strict, surrogate, dtype)


def spike_count(v: Tensor, threshold: Tensor, z: Tensor, surrogate: Surrogate, limit: int | None = None) -> Tensor:
    """Spikes of `v`, several a step: `(v > 0) * trunc(v / threshold)`, at most `limit`; float32.

    The gradient goes to `z`, which the caller computes as `v - threshold`.
    """
    return _Count.apply(z, v, threshold, limit, surrogate)


def sigmoid4x(x: Tensor) -> Tensor:
    """sigmoid(4 x): the default spike function of the native layers; slope 1 at 0."""
    return torch.sigmoid(4 * x)


class surrogate_spike(nn.Module):
    """A hard spike with a named surrogate gradient, as the `spike_fn` of a native layer: 1 where z > 0, else 0.

    With `strict=False` it is 1 where z >= 0, as in sinabs.

    The names and defaults are those of `SURROGATES`: snnTorch's `atan`, `fast_sigmoid`, `sigmoid`, `straight_through`,
    `triangular`, `spike_rate_escape`, `sparse_fast_sigmoid`, sinabs's `single_exponential`, `heaviside_window`,
    `gaussian`, `multi_gaussian`, `periodic_exponential`, and `logistic`, the gradient of `sigmoid4x`.

    Args:
        name: a key of `SURROGATES`.
        threshold: for surrogates whose width scales with the threshold, which a `spike_fn` does not see.
        strict: whether a membrane exactly at its threshold does not spike.
        parameters: of the surrogate; missing ones take the source framework's defaults.

    Raises:
        ValueError: an unknown name or parameter, or a value that is not a finite number.
    """

    def __init__(self, name: str, threshold: float = 1.0, *, strict: bool = True, **parameters: float) -> None:
        super().__init__()
        self.surrogate = Surrogate(name, tuple(parameters.items()))
        self.threshold = float(threshold)
        self.strict = strict

    def forward(self, z: Tensor) -> Tensor:
        """z, any shape: the distance to the threshold -> spikes of the same shape and dtype."""
        told = torch.full_like(z, self.threshold)
        return heaviside(z, told, self.surrogate, strict=self.strict, dtype=z.dtype)

    def extra_repr(self) -> str:
        return f"{self.surrogate}" + ("" if self.strict else ", strict=False")
