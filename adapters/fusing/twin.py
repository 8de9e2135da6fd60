"""Fused twins: a subclass of a framework's layer that runs whole sequences through one kernel.

A twin is made from a mixin of a framework's adapter file and the layer's own class, so that it is an instance of both.
Its class has the original's name; pickles name the mixin and the original's class.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.fused import executor
from tracetorch.fused.callers import hooks_on_all_modules
from tracetorch.fused.hoist import LayerStep
from tracetorch.fused.layers import FuseError
from tracetorch.fused.sequence import Result, Sequencer, Unfused

# Attributes that fusing itself adds; no step reads them.
OWN = ("_sequencer", "fuse_report")


@dataclass(frozen=True)
class Recipe:
    """How a layer's step is traced.

    Attributes:
        states: names of the states, in the order in which `body` returns them.
        body: `body(layer, x, states by name) -> output, *new states`: calls the framework's own step on a copy of the
            layer. A module-level function, or an object that pickles.
        volatile: attributes besides the states that a call changes and no step reads.
    """

    states: tuple[str, ...]
    body: LayerStep
    volatile: tuple[str, ...] = ()

    def sequencer(self) -> Sequencer:
        """Without kernels so far."""
        return Sequencer(self.states, self.body, (*self.states, *self.volatile, *OWN))


class Twin(nn.Module):
    """Base of the mixins; stands before the framework's class in the order of resolution."""

    # False: a module around neurons, without a step of its own; no row of the report.
    neuron = True

    def __init_subclass__(cls) -> None:
        """A twin's class is none of the framework's or the user's: what they do with a new one is not for it."""

    @staticmethod
    def note(module: nn.Module) -> str:
        """What the report says of a fused layer: which of its calls stay its own code."""
        return ""

    def recipe(self) -> Recipe:
        """How this layer's step is traced, as it is configured now."""
        raise NotImplementedError(f"{type(self).__name__} must define recipe()")

    def run_sequence(
        self, xs: Tensor, time_dim: int, first: Mapping[str, Tensor], record: Sequence[str] = ()
    ) -> Result | None:
        """All steps through one kernel, or None where the layer's own code must run.

        Raises:
            FuseError: a backend was asked for by name, and cannot run this.
        """
        if torch.compiler.is_compiling():
            return None
        recipe = self.recipe()
        sequencer = self.__dict__.get("_sequencer")
        if sequencer is None or sequencer.states != recipe.states or sequencer.body != recipe.body:
            sequencer = self.__dict__["_sequencer"] = recipe.sequencer()
        try:
            return sequencer.run(self, xs, time_dim, first, record)
        except Unfused as reason:
            own(self, reason)
            return None

    def kernel_source(self, backend: str, dtype: torch.dtype, backward: bool) -> str:
        """For `tt.fused.source`: the kernel of this layer's step, as it is configured now.

        Raises:
            GraphError: a step that no kernel runs.
        """
        return self.recipe().sequencer().source(self, backend, dtype, backward)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        if arguments and arguments[0] is type(self):
            return (_new, (type(self).twin_mixin, type(self).twin_of, *arguments[1:]), *rest)  # type: ignore[attr-defined]
        return (function, arguments, *rest)


def own(layer: nn.Module, reason: Unfused) -> None:
    """Raises `FuseError` where a kernel was asked for by name."""
    if executor.current() in ("cpu", "triton"):
        raise FuseError(
            f"{type(layer).__name__}: {reason}; use tt.backend('auto') to have the layer's own code run instead"
        ) from reason


def twin_class(mixin: type[Twin], original: type[nn.Module]) -> type[nn.Module]:
    """The class of a fused layer: `mixin` over `original`, under the original's name. One for each pair."""
    make: Any = _twin_class
    return make(mixin, original)


@functools.cache
def _twin_class(mixin: Any, original: Any) -> type[nn.Module]:
    attributes = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "twin_of": original,
        "twin_mixin": mixin,
    }
    return type(original.__name__, (mixin, original), attributes)


def _new(mixin: type[Twin], original: type[nn.Module], *arguments: Any) -> nn.Module:
    """For pickle and copy."""
    cls = twin_class(mixin, original)
    return cls.__new__(cls, *arguments)


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of a module: then each step must be a call."""
    here = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in here) or hooks_on_all_modules()


def stacked(results: Sequence[Any], time_dim: int) -> Any:
    """The results of one call per step, each tensor stacked over time."""
    if isinstance(results[0], (tuple, list)):
        return type(results[0])(torch.stack(series, time_dim) for series in zip(*results, strict=True))
    return torch.stack(list(results), time_dim)


def check_unroll(layer: nn.Module, xs: Tensor, time_dim: int) -> None:
    """Raises `FuseError` unless xs is [T, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`) with a step in it."""
    if time_dim not in (0, 1) or xs.ndim < 1 + time_dim or xs.shape[time_dim] == 0:
        raise FuseError(
            f"{type(layer).__name__}: unroll with time_dim={time_dim} and an input of shape {list(xs.shape)}; "
            "needed is [T, B, ...] with time_dim=0 or [B, T, ...] with time_dim=1, and T at least 1"
        )
