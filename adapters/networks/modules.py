"""Stateless modules of a network: which are known, how networks hold them, how they fold time, how results round."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ELEMENTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Hardtanh,
    nn.ReLU6,
)
# They treat [B, T, F] as T times [B, F]; the others need time folded into the batch, or a call per step.
TIMELESS = (nn.Linear, *ELEMENTWISE)
MATMUL = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
SELECT = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
    nn.Unflatten,
    nn.ZeroPad2d,
)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORM = (*BATCH_NORM, nn.LayerNorm, nn.GroupNorm)
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

# Whose result in training mode depends on the other steps' or on chance.
MODAL = (*BATCH_NORM, *DROPOUT)
# Said of these where a network holds them in training mode.
TRAINING = "in training mode, where its result depends on chance or on the batch: judged in evaluation mode"
FOLDED_STATISTICS = "in training, the source normalises batch and time together, the target each step by itself"
KNOWN = (*ELEMENTWISE, *MATMUL, *AVERAGE, *SELECT, *NORM, *DROPOUT)


@contextmanager
def evaluated(*networks: nn.Module) -> Iterator[frozenset[int]]:
    """Dropout and batch norm in evaluation mode for a `with` block; gives the ids of those that were in training."""
    found = [m for network in networks for m in network.modules() if isinstance(m, MODAL) and m.training]
    for module in found:
        module.training = False
    try:
        yield frozenset(map(id, found))
    finally:
        for module in found:
            module.training = True


def is_known(module: nn.Module) -> bool:
    """Whether it is exactly one of the stateless modules known here; a subclass may compute anything."""
    return type(module) in KNOWN


class PerStep(nn.Module):
    """Calls a stateless module once per time step of [B, T, ...]: for modules whose result depends on the batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, ...] -> [B, T, ...]."""
        return torch.stack([self.module(step) for step in x.unbind(1)], 1)


def inside(module: nn.Module) -> nn.Module | None:
    """The module that a `PerStep`, or sinabs's `Repeat`, calls on each step of [B, T, ...]; of another one None."""
    cls = type(module)
    if cls is PerStep or (cls.__name__ == "Repeat" and cls.__module__.startswith("sinabs.")):
        held: Any = module
        inner: nn.Module = held.module
        return inner
    return None


@dataclass(frozen=True)
class Constant:
    """A value without time: every step has the same."""

    tensor: Tensor


def alias(value: Any) -> Any:
    """The same values as other tensors."""
    if isinstance(value, Tensor):
        return value.view_as(value)
    return tuple(map(alias, value)) if isinstance(value, tuple) else value


def _length(values: Iterable[Any]) -> int:
    for value in values:
        if isinstance(value, Tensor):
            return len(value)
        if isinstance(value, tuple):
            return _length(value)
    raise ValueError("no value has a time dimension")


def _at(value: Any, t: int, slices: bool) -> Any:
    if isinstance(value, Constant):
        return value.tensor
    if isinstance(value, tuple):
        return tuple(_at(item, t, slices) for item in value)
    return value[t] if slices else value[t].clone()


def _stacked(results: Sequence[Any]) -> Any:
    if isinstance(results[0], (tuple, list)):
        return tuple(map(_stacked, zip(*results, strict=True)))
    return torch.stack(list(results)) if isinstance(results[0], Tensor) else Constant(results[0])


def per_step(module: nn.Module, *xs: Any, first: bool = False) -> Any:
    """The module called once per time step. xs: [T, B, ...].

    A matrix product may round otherwise in a slice, whose memory is aligned otherwise than that of a tensor of its own.
    So the `first` module of a network takes slices, as in a user's loop over the input, and any other one tensors.
    """
    return _stacked([module(*(_at(x, t, first) for x in xs)) for t in range(_length(xs))])


def folded(module: nn.Module, xs: Tensor) -> Tensor:
    """The module called once, batch-first time folded into the batch. xs: [T, B, ...], result likewise."""
    batch_first = xs.transpose(0, 1)
    return module(batch_first.flatten(0, 1)).unflatten(0, batch_first.shape[:2]).transpose(0, 1)


def _absolute(module: nn.Module) -> nn.Module:
    """A float64 copy with absolute weights: on absolute inputs it gives the sum of the magnitudes of all terms."""
    twin = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
        if isinstance(twin, BATCH_NORM) and twin.running_mean is not None:
            twin.running_mean.abs_().neg_()
    return twin


def _terms(module: nn.Module, x: Tensor, y: Tensor) -> int | None:
    """How many terms each output of the module sums, or None where no rounding bound is known."""
    if isinstance(module, MATMUL):
        weight = module.weight
        transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d))
        return weight.numel() // (1 if transposed else weight.shape[0]) + 1
    if isinstance(module, BATCH_NORM) and not module.training:
        return 8  # (x - mean) / sqrt(var + eps) * weight + bias, folded into a scale and a shift by some kernels
    if isinstance(module, AVERAGE):
        return x[0].numel() // max(1, x.shape[1])
    return None


def rounding_bound(module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """How far two correct evaluations of `module(x)` may lie apart, float64, in the shape of y; None: not at all.

    A sum of n products in any order, each rounded, is within n*e times the sum of the terms' magnitudes of the truth
    (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), so two of them are within twice that.
    """
    terms = _terms(module, x, y)
    if terms is None:
        return None
    roundoff = torch.finfo(x.dtype).eps / 2
    magnitude: Tensor = _absolute(module)(x.double().abs())
    return 2 * (terms + 1) * roundoff * magnitude + torch.finfo(x.dtype).tiny


def as_it_is(module: nn.Module) -> nn.Module:
    """`wrap` of a framework whose networks take one step per call, as the module does."""
    return module


def chained(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """`assemble` of a framework whose networks are an `nn.Sequential` over [B, T, ...]."""
    return nested(modules, nn.Sequential)


def nested(modules: Mapping[str, nn.Module], container: Callable[[], nn.Sequential]) -> nn.Sequential:
    """A tree of containers from dotted names, in order: "0", "1.0", "1.1"."""
    root = container()
    for name, module in modules.items():
        *path, leaf = name.split(".")
        parent = root
        for part in path:
            child = parent._modules.get(part)
            if child is None:
                child = container()
                parent.add_module(part, child)
            assert isinstance(child, nn.Sequential)
            parent = child
        parent.add_module(leaf, module)
    return root
