"""`unroll`: a model that takes one time step per call, run over a whole sequence, its neurons fused over time."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.core import folding
from tracetorch.core.layer import Layer
from tracetorch.core.program import Call, Kept, NotPlain, Program, Ref, hooked, may_be_random, program

FOLDS = ("fast", "exact")
# Models of which it was said that they run step by step; refers to none that is gone.
_SAID: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class UnrollWarning(UserWarning):
    """`tt.unroll` runs a model step by step; says why."""


class _Stream:
    """A value at every step: one tensor with a time dimension, a list of what each step gave, or both.

    A matrix product may round otherwise in a slice, whose memory is aligned otherwise than that of a tensor of its own.
    So steps cut from a whole are fresh tensors, laid out as their `models`, which is what the step loop would have
    made; only the input's steps are slices, as in a user's loop over it.
    """

    def __init__(
        self, time_dim: int, whole: Tensor | None = None, steps: list[Any] | None = None, models: Any = None
    ) -> None:
        self.time_dim, self._whole, self._steps, self._models = time_dim, whole, steps, models

    @property
    def whole(self) -> Tensor:
        if self._whole is None:
            assert self._steps is not None
            self._whole = torch.stack(self._steps, self.time_dim)
        return self._whole

    @property
    def steps(self) -> list[Any]:
        if self._steps is None:
            assert self._whole is not None
            models: Sequence[Tensor] = self._models.steps
            self._steps = [
                torch.empty_like(model if model.shape == y.shape else y, dtype=y.dtype).copy_(y)
                for y, model in zip(self._whole.unbind(self.time_dim), models, strict=True)
            ]
        return self._steps

    @property
    def tensor(self) -> bool:
        """Whether it is a tensor at every step, of one shape."""
        if self._whole is not None or self._steps is None:
            return True
        first = self._steps[0]
        return isinstance(first, Tensor) and all(
            isinstance(step, Tensor) and step.shape == first.shape for step in self._steps
        )


def _like(sequence: Any, items: list[Any]) -> Any:
    """The items in a sequence of the same type: a list, a tuple or a named tuple."""
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)


def _filled(argument: Any, streams: Sequence[_Stream], t: int) -> Any:
    """An argument at step t, `Ref`s replaced by their values."""
    if isinstance(argument, Ref):
        return streams[argument.number].steps[t]
    if isinstance(argument, (tuple, list)):
        return _like(argument, [_filled(item, streams, t) for item in argument])
    if isinstance(argument, dict):
        return {key: _filled(item, streams, t) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_filled(item, streams, t) for item in (argument.start, argument.stop, argument.step)))
    return argument


def _callable(target: nn.Module | Callable[..., Any] | str) -> Callable[..., Any]:
    if isinstance(target, str):
        return lambda thing, *args, **kwargs: getattr(thing, target)(*args, **kwargs)
    return target


class _Run:
    def __init__(self, xs: Tensor, time_dim: int, fold: str) -> None:
        self.time_dim, self.fast, self.length = time_dim, fold == "fast", xs.shape[time_dim]
        self.streams = [_Stream(time_dim, xs, list(xs.unbind(time_dim)))]
        self.kept: dict[tuple[int, str], _Stream] = {}

    def run(self, calls: Program) -> Any:
        wanted: dict[int, list[str]] = {}
        for call in calls.calls:
            if isinstance(call.target, Kept):
                wanted.setdefault(call.args[0].number, []).append(call.target.attribute)
        for number, call in enumerate(calls.calls, start=1):
            self.streams.append(self._stream(number, call, wanted.get(number, [])))
        return self._result(Ref(len(calls.calls)) if calls.output is None else calls.output)

    def _result(self, output: Any) -> Any:
        if isinstance(output, Ref):
            stream = self.streams[output.number]
            if not stream.tensor:
                raise TypeError("unroll: the model does not return a tensor of one shape at every step")
            return stream.whole
        if isinstance(output, (tuple, list)):
            return _like(output, [self._result(item) for item in output])
        if isinstance(output, dict):
            return {key: self._result(item) for key, item in output.items()}
        raise TypeError(f"unroll: the model returns {type(output).__name__} beside tensors")

    def _stream(self, number: int, call: Call, wanted: list[str]) -> _Stream:
        if isinstance(call.target, Kept):
            return self.kept[call.args[0].number, call.target.attribute]
        if wanted:
            return self._traced(number, call, wanted)
        return self._neuron(call) or (self.fast and self._folded(call)) or self._stepped(call)

    def _traced(self, number: int, call: Call, wanted: list[str]) -> _Stream:
        """A native layer whose states are read after every step."""
        layer, entered = call.target, self._single(call)
        if not isinstance(layer, Layer) or entered is None:
            raise TypeError(f"unroll: the states {wanted} are read of a {type(layer).__name__}, no native layer")
        ys, states = layer.trace(entered.whole, self.time_dim, wanted)
        for attribute, whole in states.items():
            self.kept[number, attribute] = _Stream(self.time_dim, whole, models=entered)
        return _Stream(self.time_dim, ys, models=entered)

    def _single(self, call: Call) -> _Stream | None:
        """The only argument, if it is a tensor at every step."""
        if len(call.args) == 1 and not call.kwargs and isinstance(call.args[0], Ref):
            stream = self.streams[call.args[0].number]
            return stream if stream.tensor else None
        return None

    def _neuron(self, call: Call) -> _Stream | None:
        layer, entered = call.target, self._single(call)
        if not isinstance(layer, Layer) or entered is None or hooked(layer):
            return None
        if type(layer).forward is not Layer.forward:
            return None
        return _Stream(self.time_dim, layer.unroll(entered.whole, self.time_dim), models=entered)

    def _folded(self, call: Call) -> _Stream | None:
        if isinstance(call.target, nn.Module):
            entered = self._single(call)
            if isinstance(call.target, Layer) or entered is None:
                return None
            whole = folding.fold(call.target, entered.whole)
            return None if whole is None else _Stream(self.time_dim, whole, models=_Own(self.time_dim, whole))
        known = call.target in (folding.METHODS if isinstance(call.target, str) else folding.FUNCTIONS)
        if not known or call.kwargs:
            return None
        values = [self.streams[a.number] if isinstance(a, Ref) else a for a in call.args]
        wholes = [value.whole if isinstance(value, _Stream) and value.tensor else value for value in values]
        dims = {whole.ndim for whole in wholes if isinstance(whole, Tensor)}
        if len(dims) != 1 or not all(isinstance(whole, (Tensor, int, float)) for whole in wholes):
            return None
        if any(isinstance(a, Tensor) for a in call.args):  # a tensor without time
            return None
        whole = _callable(call.target)(*wholes)
        return _Stream(self.time_dim, whole, models=_Own(self.time_dim, whole))

    def _stepped(self, call: Call) -> _Stream:
        function = _callable(call.target)
        steps = [
            function(*_filled(call.args, self.streams, t), **_filled(dict(call.kwargs), self.streams, t))
            for t in range(self.length)
        ]
        return _Stream(self.time_dim, steps=steps)


class _Own:
    """The steps of a folded result, as models of their own."""

    def __init__(self, time_dim: int, whole: Tensor) -> None:
        self.steps = whole.unbind(time_dim)


def _loop(model: nn.Module, xs: Tensor, time_dim: int) -> Any:
    return _stacked([model(x) for x in xs.unbind(time_dim)], time_dim)


def _stacked(results: Sequence[Any], time_dim: int) -> Any:
    """The results of all steps, each tensor stacked, in the structure of one step's."""
    first = results[0]
    if isinstance(first, (tuple, list)):
        return _like(first, [_stacked(series, time_dim) for series in zip(*results, strict=True)])
    if isinstance(first, dict):
        return {key: _stacked([result[key] for result in results], time_dim) for key in first}
    return torch.stack(list(results), time_dim)


def _nothing() -> None:
    """What most layers do when a sequence begins."""


def unroll(model: nn.Module, xs: Tensor, time_dim: int = 0, fold: str = "fast") -> Any:
    """Run a model that takes one time step per call over a whole sequence; states carry on, as in a loop.

    The model must be a plain graph for this to be fast: a `Sequential`, or a `forward` that calls layers and functions
    without looking at values, setting attributes or working in place. Native layers run all their steps by
    `layer.unroll`. Any other model is run step by step, and an `UnrollWarning` says so, once for each model.

    Args:
        model: one call is one time step, a tensor in and a tensor out (a `Graph`: a structure of tensors).
        xs: [T, B, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`), or another dimension.
        time_dim: the time dimension of `xs` and of the result.
        fold: "exact": every call that is no native layer is made once per step, and outputs and final states are those
            of the step loop, bit for bit (a compiled `layer.unroll` rounds exp, sigmoid and tanh within 2 ulp of torch,
            which shows in the values of smooth spikes; `tt.backend("eager")` has torch's own bits). "fast": modules and
            functions listed in `tracetorch.core.folding` run once with time folded into the batch, equal but for
            rounding; batch norm and dropout in training mode, and what is not listed, run once per step.

    Returns:
        The outputs of all steps, stacked at `time_dim`, in the structure of one step's.

    Raises:
        ValueError: another `fold`, or an empty sequence.
        TypeError: a call of the model takes a whole sequence, as a pipeline's does.
    """
    if getattr(model, "over_sequences", False):
        raise TypeError(f"unroll: a call of {type(model).__name__} takes a whole sequence. Remedy: call it on that")
    if fold not in FOLDS:
        raise ValueError(f"unroll: fold={fold!r} is not known; use one of {', '.join(map(repr, FOLDS))}")
    if not -xs.ndim <= time_dim < xs.ndim:
        raise ValueError(f"unroll: time_dim={time_dim} is out of range for an input of shape {list(xs.shape)}")
    if xs.shape[time_dim] == 0:
        raise ValueError(f"unroll: the sequence has no time step (shape {list(xs.shape)}, time_dim={time_dim})")
    time_dim %= xs.ndim
    if time_dim > 1:
        return unroll(model, xs.movedim(time_dim, 0), 0, fold).movedim(0, time_dim)
    if isinstance(model, Layer) and not hooked(model) and type(model).forward is Layer.forward:
        return model.unroll(xs, time_dim)
    for module in model.modules():
        getattr(module, "begin_sequence", _nothing)()
    try:
        calls = program(model)
        random = [call for call in calls.calls if may_be_random(call.target, folding.listed)]
        if fold == "exact" and len(random) > 1:
            raise NotPlain("two of its modules may draw random numbers, which the loop draws in turns")
    except NotPlain as reason:
        if model not in _SAID:
            _SAID.add(model)
            warnings.warn(f"tt.unroll runs {type(model).__name__} step by step: {reason}", UnrollWarning, stacklevel=2)
        return _loop(model, xs, time_dim)
    return _Run(xs, time_dim, fold).run(calls)
