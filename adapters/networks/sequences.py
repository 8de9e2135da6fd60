"""Calls of one time step as modules over whole sequences, batch first."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.networks.network import Function

# Calls whose result at a step is that of its elements, so that a dimension of time in front changes nothing.
ELEMENTWISE = {
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "abs",
    "relu",
    "sigmoid",
    "tanh",
    "maximum",
    "minimum",
    "where",
    "pow",
}
# Calls that treat every sample of a batch alike, so that time may be folded into it.
FOLDED = {"conv1d", "conv2d", "conv3d", "linear", "max_pool1d", "max_pool2d", "max_pool3d", "flatten", "softmax"}
FOLDED |= {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate"}


class Lifted(nn.Module):
    """A call of one time step over a whole sequence, batch first.

    Elementwise calls are made once; those that treat a batch's samples alike once, with time folded into the batch; any
    other once per step.

    Args:
        function: the call, of the values of one step [B, ...].
        constants: for each of its arguments, a tensor without time, or `None`.
        time: the dimension of time, 1, or 0 for sequences with time first, [T, B, ...].
        computed: numbers of the arguments that are handed in, and have no time either.
    """

    def __init__(
        self, function: Function, constants: tuple[Tensor | None, ...], time: int = 1, computed: Collection[int] = ()
    ) -> None:
        super().__init__()
        self.time = time
        self.function, self.held = function, tuple(c is not None for c in constants)
        self.timeless = tuple(held or k in computed for k, held in enumerate(self.held))
        for k, constant in enumerate(constants):
            if isinstance(constant, nn.Parameter):
                self.register_parameter(f"constant_{k}", constant)
            elif constant is not None:
                self.register_buffer(f"constant_{k}", constant)
        target = function.node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        plain = not any(self.timeless) and not function.sized and function.callee is None
        self.whole = plain and name in ELEMENTWISE
        self.folds = plain and name in FOLDED and len(constants) == 1

    def forward(self, *xs: Any) -> Any:
        """xs: [B, T, ...], those that have time -> [B, T, ...]."""
        if self.whole and len({x.ndim for x in xs}) == 1:
            return self.function(*xs)
        if self.folds:
            y: Tensor = self.function(xs[0].flatten(0, 1))
            return y.unflatten(0, xs[0].shape[:2])
        given = iter(xs)
        values = [getattr(self, f"constant_{k}") if held else next(given) for k, held in enumerate(self.held)]
        timed = [value for value, timeless in zip(values, self.timeless, strict=True) if not timeless]
        if not timed:
            return self.function(*values)
        if isinstance(timed[0], tuple):  # one of several results is taken, each over the whole sequence already
            return self.function(*values)
        steps = []
        for t in range(timed[0].shape[self.time]):
            pairs = zip(values, self.timeless, strict=True)
            steps.append(self.function(*(v if whole else v.select(self.time, t).clone() for v, whole in pairs)))
        return _stacked(steps, self.time)


def _stacked(steps: list[Any], time: int) -> Any:
    if isinstance(steps[0], (tuple, list)):
        return tuple(_stacked(list(series), time) for series in zip(*steps, strict=True))
    return torch.stack(steps, time) if isinstance(steps[0], Tensor) else steps[0]


class Folded(nn.Module):
    """A module of one step over a whole sequence, batch first, with time folded into the batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, ...] -> [B, T, ...]."""
        y: Tensor = self.module(x.flatten(0, 1))
        return y.unflatten(0, x.shape[:2])
