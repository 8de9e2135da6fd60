"""Which calls may run once over all time steps: the listed ones, whose result at a step depends on that step alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracetorch.core.program import hooked
from tracetorch.functional.quantizers import round_ste
from tracetorch.functional.spikes import surrogate_spike

# Each takes the module and the dimensions of one step's input; True: folded into the batch; False: per step.
Rule = Callable[[Any, int], bool]
ELEMENTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softsign, nn.Softplus),
    *(round_ste, surrogate_spike),
)
# Work on the last dimensions, so that any number may stand before them.
TRAILING = (nn.Linear, nn.LayerNorm, *ELEMENTWISE)
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _spatial(n: int) -> Rule:
    return lambda module, ndim: ndim == n + 2


def _pool(n: int) -> Rule:
    return lambda module, ndim: ndim == n + 2 and not getattr(module, "return_indices", False)


def _batch_norm(module: Any, ndim: int) -> bool:
    return not module.training and module.running_mean is not None and ndim >= 2


def _instance_norm(n: int) -> Rule:
    return lambda module, ndim: ndim == n + 2 and not (module.training and module.running_mean is not None)


def _after_batch(attribute: str) -> Rule:
    """A dimension that is given by number, and is not that of the batch."""

    def rule(module: Any, ndim: int) -> bool:
        dim = getattr(module, attribute)
        return isinstance(dim, int) and ndim >= 2 and dim % ndim >= 1

    return rule


def _rules() -> dict[type[nn.Module], Rule]:
    rules: dict[type[nn.Module], Rule] = {
        nn.GroupNorm: lambda module, ndim: ndim >= 2,
        nn.PReLU: lambda module, ndim: ndim >= 2,
        nn.Upsample: lambda module, ndim: ndim >= 3,
        nn.Flatten: _after_batch("start_dim"),
        nn.Unflatten: _after_batch("dim"),
        nn.Softmax: _after_batch("dim"),
        nn.LogSoftmax: _after_batch("dim"),
    }
    for n in (1, 2, 3):
        for kind in ("Conv{}d", "ConvTranspose{}d", "ZeroPad{}d"):
            rules[getattr(nn, kind.format(n))] = _spatial(n)
        for kind in ("MaxPool{}d", "AvgPool{}d", "AdaptiveMaxPool{}d", "AdaptiveAvgPool{}d", "LPPool{}d"):
            rules[getattr(nn, kind.format(n))] = _pool(n)
        rules[getattr(nn, f"BatchNorm{n}d")] = _batch_norm
        rules[getattr(nn, f"InstanceNorm{n}d")] = _instance_norm(n)
    return rules


RULES: Mapping[type[nn.Module], Rule] = MappingProxyType(_rules())
# Functions and methods of tensors of as many dimensions: broadcasting means the same with time in front.
FUNCTIONS = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg}
    | {torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.abs, torch.relu, torch.sigmoid, torch.tanh}
    | {torch.maximum, torch.minimum, F.relu, F.sigmoid, F.tanh}
)
METHODS = frozenset({"add", "sub", "mul", "div", "neg", "abs", "relu", "sigmoid", "tanh", "maximum", "minimum"})


def listed(module: nn.Module) -> bool:
    """Whether it is exactly one of the stateless modules known here; a subclass may compute anything."""
    return type(module) in TRAILING or type(module) in RULES or type(module) in DROPOUT


def fold(module: nn.Module, xs: Tensor) -> Tensor | None:
    """The module called once for all steps, xs [T, B, ...] or [B, T, ...]; None: it must run per step."""
    kind = type(module)
    if hooked(module):
        return None
    if kind in TRAILING or (kind in DROPOUT and not module.training):
        return module(xs)
    if kind in RULES and RULES[kind](module, xs.ndim - 1):
        return module(xs.flatten(0, 1)).unflatten(0, xs.shape[:2])
    return None
