"""Gradients whose own derivative is not known, and which say so instead of leaving it out.

`torch.autograd.function.once_differentiable` does not do where the incoming gradient is a constant: the gradients that
it returns are constants then too, and a second derivative lacks what came through them, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class _FirstOnly(torch.autograd.Function):
    """A gradient that hangs on what it was computed from."""

    @staticmethod
    def forward(ctx: Any, what: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.what = what
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.what} has first derivatives alone, and this is a second one: its backward pass is marked "
            "@once_differentiable"
        )


def first_only(
    what: str, gradients: Iterable[Tensor | None], sources: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients, for a backward pass under `create_graph=True`; differentiating one raises `RuntimeError`.

    Args:
        what: whose they are, for the message.
        gradients: computed without a graph.
        sources: all that they depend on: the inputs as autograd has them, and the incoming gradients.
    """
    given = [tensor for tensor in sources if tensor is not None and tensor.requires_grad]
    return tuple(None if g is None else _FirstOnly.apply(what, g, *given) for g in gradients)
