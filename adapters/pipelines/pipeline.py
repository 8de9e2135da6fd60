"""`Pipeline`: stages of several frameworks as one trainable module over sequences."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tracetorch.adapters.fusing.fuse import fuse as fused
from tracetorch.adapters.pipelines.conventions import Convention
from tracetorch.adapters.pipelines.probe import Probe, Seam
from tracetorch.adapters.pipelines.stage import Stage
from tracetorch.adapters.pipelines.states import keeps
from tracetorch.adapters.registry import is_brainstate
from tracetorch.adapters.stateful import SeamError
from tracetorch.core import recomputation
from tracetorch.core.model import Model
from tracetorch.core.states import named_layers
from tracetorch.core.unrolling import FOLDS

# What a framework raises, which does not know the seam; other exceptions may be somebody's control flow, as torch's.
_REFUSALS = (ValueError, TypeError, LookupError, RuntimeError, AssertionError, AttributeError, ArithmeticError)
# What `_entry` keeps: the states of every layer, and those that stages pass in and out.
_Entry: TypeAlias = tuple[list[tuple[Any, dict[str, Any]]], list[tuple[Stage, dict[str, Any]]]]


class Pipeline(Model):
    """Stages one after the other over whole sequences; gradients flow through all of them, JAX included.

    A stage is a module of snnTorch, sinabs, SpikingJelly or Norse, a native layer or model, a `brainstate` module
    (which becomes a `JaxStage`), a stateless torch module, an `nn.Sequential` of these, another pipeline, or what
    `adapters.stage(module, kind=...)` says. What a call of each takes is found from its class; `print(pipe)` says what
    was found. States carry on from call to call, so a long sequence may come in chunks; `reset_states()` starts anew.

    Args:
        stages: in order.
        time_dim: of the input and the output: 0 for [T, B, ...], 1 for [B, T, ...].
        fuse: run other frameworks' neurons through one kernel a sequence, as `tt.fuse` does: the pipeline then holds
            twins that share the parameters and have hidden states of their own.
        fold: "fast": a stateless module is called once, time folded into the batch, equal but for rounding; "exact":
            once a step.
        dt: the time step of `brainstate` stages, in the unit of their tau; None: `brainstate.environ` has it.

    Raises:
        TypeError: a stage that is no module, or of which it cannot be known what a call takes.
        ValueError: no stage, another `time_dim` or `fold`, one module used in two stages.
    """

    # Its call takes a whole sequence, as `time_dim` says: for a pipeline around it.
    over_sequences = True

    def __init__(self, *stages: Any, time_dim: int = 0, fuse: bool = False, fold: str = "fast", dt: Any = None) -> None:
        super().__init__()
        if time_dim not in (0, 1):
            raise ValueError(f"Pipeline: time_dim={time_dim!r} must be 0 for [T, B, ...] or 1 for [B, T, ...]")
        if fold not in FOLDS:
            raise ValueError(f"Pipeline: fold={fold!r} is not known; use one of {', '.join(map(repr, FOLDS))}")
        if not stages:
            raise ValueError("Pipeline: it needs at least one stage")
        self.time_dim, self.fold, self.fuse, self.dt = time_dim, fold, fuse, dt
        self.stages = nn.ModuleList(self._stage(k, given) for k, given in enumerate(stages))
        self._check_sharing()

    def _stage(self, k: int, given: Any) -> Stage:
        module, how = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        if isinstance(module, Stage):
            module, how = module.module, module.convention
        if how is not None and not isinstance(how, Convention):
            raise TypeError(f"Pipeline: stage {k} is a tuple; use adapters.stage(module, kind=...)")
        if is_brainstate(module):
            from tracetorch.adapters.jax.stage import JaxStage

            module = JaxStage(module, dt=self.dt)
        if not isinstance(module, nn.Module):
            kind = type(module).__name__
            raise TypeError(f"Pipeline: stage {k} is a {kind}, no torch.nn.Module or brainstate module")
        what = f"stage {k} ({type(module).__name__})"
        stage = Stage(module, how, self.fold, what)
        return Stage(_twin(module), stage.convention, self.fold, what) if self.fuse else stage

    def _check_sharing(self) -> None:
        seen: dict[int, int] = {}
        for k, stage in enumerate(self.stages):
            inside = {id(m) for m in stage.modules() if not isinstance(m, Stage) and keeps(m)}
            for other in {seen[i] for i in inside if i in seen}:
                raise ValueError(
                    f"Pipeline: stages {other} and {k} hold one and the same module with states; two places would "
                    "share one state. Remedy: a copy for each"
                )
            seen.update(dict.fromkeys(inside, k))

    # ---- running -------------------------------------------------------------------------------------------------

    def forward(self, xs: Tensor) -> Tensor:
        """The whole sequence, [T, B, ...] (`time_dim=0`) or [B, T, ...]; as many steps and samples come out.

        Where a framework's spikes are float32 whatever goes in (snnTorch, sinabs), they get the input's dtype back. If
        a stage refuses its input, no state has changed.

        Raises:
            SeamError: data that does not fit at a seam; names the seam, what was found, and the remedy.
        """
        recomputation.refuse(type(self).__name__)
        self._check_input(xs)
        ys = xs.movedim(self.time_dim, 0)
        with self._states_put_back():
            for k in range(len(self.stages)):
                ys = self._crossed(k, ys)
        return ys.movedim(0, self.time_dim)

    def _check_input(self, xs: Any) -> None:
        if not isinstance(xs, Tensor) or not xs.is_floating_point():
            tensor = isinstance(xs, Tensor)
            found = xs.dtype if tensor else type(xs).__name__
            remedy = "x.float()" if tensor else "torch.as_tensor(x, dtype=torch.float32)"
            raise SeamError(f"{self._seam(0)}: the input is {found}. Remedy: a floating point tensor, {remedy}")
        if xs.ndim < 2:
            wanted = "[T, B, ...]" if self.time_dim == 0 else "[B, T, ...]"
            raise SeamError(f"{self._seam(0)}: the input has shape {list(xs.shape)}; needed is {wanted}")
        if xs.shape[self.time_dim] == 0:
            raise SeamError(f"{self._seam(0)}: the input {list(xs.shape)} has no step at time_dim={self.time_dim}")

    def _crossed(self, k: int, xs: Tensor) -> Tensor:
        """Stage k over [T, B, ...], what enters and leaves it checked."""
        stage = self.stages[k]
        assert isinstance(stage, Stage)
        self._check_place(k, stage, xs)
        try:
            ys = stage(xs)
        except torch.OutOfMemoryError:
            raise
        except _REFUSALS as error:
            raise SeamError(f"{self._seam(k)}: it gets {_shown(xs)}, and says: {error}") from error
        self._check_units(k)
        return self._check_output(k, xs, ys)

    def _check_units(self, k: int) -> None:
        """After stage k has run: what it returns must not be taken for a number in another unit."""
        if k + 1 == len(self.stages):
            return
        # Of a `JaxStage`. Spikes have no unit, and are numbers in that of whatever comes after them.
        given = getattr(self.stages[k].module, "output_unit", None)
        taken = getattr(self.stages[k + 1].module, "input_unit", None)
        if given is not None and taken is not None and str(given) != str(taken):
            raise SeamError(
                f"{self._seam(k + 1)}: stage {k} returns numbers in {given}, stage {k + 1} takes them for numbers in "
                f"{taken}. Remedy: a stage between them that converts them, or the unit taken off in the module"
            )

    def _check_place(self, k: int, stage: Stage, xs: Tensor) -> None:
        for name, tensor in (*stage.module.named_parameters(), *_own_buffers(stage)):
            if tensor.is_floating_point() and not xs.is_floating_point():
                raise SeamError(
                    f"{self._seam(k)}: it gets {_shown(xs)}, its {name} is {tensor.dtype}. Remedy: before it a stage "
                    "that returns floating point numbers, and spikes with a surrogate if gradients are to pass"
                )
            if tensor.device != xs.device:
                raise SeamError(
                    f"{self._seam(k)}: it gets {_shown(xs)}, its {name} is on {tensor.device}. Remedy: "
                    f"pipe.to({str(xs.device)!r}), or the data there"
                )
            if tensor.is_floating_point() and tensor.dtype is not xs.dtype and tensor.ndim:
                raise SeamError(
                    f"{self._seam(k)}: it gets {_shown(xs)}, its {name} is {tensor.dtype}. Remedy: "
                    f"pipe.to({xs.dtype}), or x.to({tensor.dtype})"
                )

    def _check_output(self, k: int, xs: Tensor, ys: Any) -> Tensor:
        where = self._seam(k + 1)
        if not isinstance(ys, Tensor):
            raise SeamError(f"{where}: stage {k} returned {type(ys).__name__}. Remedy: a stage that returns a tensor")
        if ys.shape[:2] != xs.shape[:2]:
            steps, batch = xs.shape[:2]
            hint = (
                "; time and batch are exchanged: is it adapters.stage(module, kind='sequence', time_dim=...)?"
                if ys.shape[:2] == (batch, steps)
                else ""
            )
            raise SeamError(
                f"{where}: {steps} steps of {batch} samples went into stage {k}, and [T, B, ...]={list(ys.shape)} came "
                f"out{hint}. Remedy: a stage that keeps both, or adapters.stage(...) with what its call takes"
            )
        if ys.device != xs.device:
            raise SeamError(f"{where}: stage {k} got data on {xs.device} and returned it on {ys.device}")
        return ys.to(xs.dtype) if ys.is_floating_point() and ys.dtype is not xs.dtype else ys

    def _seam(self, k: int) -> str:
        names = [stage.what for stage in self.stages if isinstance(stage, Stage)]
        before = names[k - 1] if k else "input"
        return f"seam {k}, {before} -> {names[k] if k < len(names) else 'output'}"

    @contextmanager
    def _states_put_back(self) -> Iterator[None]:
        """If a stage fails, the states of all are those of before."""
        entry = self._entry()
        try:
            yield
        except BaseException:
            self._put_back(entry)
            raise

    def _entry(self) -> _Entry:
        """All states as they are."""
        states = [(layer, layer.save_states()) for _, layer in named_layers(self)]
        return states, [(stage, dict(stage.explicit)) for stage in self.modules() if isinstance(stage, Stage)]

    def _put_back(self, entry: _Entry) -> None:
        states, passed = entry
        for stage, explicit in passed:
            stage.explicit = explicit
        for layer, values in states:
            layer.load_states(values, strict=False)

    # ---- looking inside ------------------------------------------------------------------------------------------

    @property
    def conventions(self) -> tuple[str, ...]:
        """What a call of each stage was taken to be, in words."""
        return tuple(str(stage.convention) for stage in self.stages if isinstance(stage, Stage))

    def probe(self, x: Tensor) -> Probe:
        """What crosses every seam on this input: shapes, rates, silent and saturated neurons, NaN; with pictures.

        Runs the stages as `forward` does, without gradients, from the present states; afterwards these are as before.
        """
        self._check_input(x)
        seams = []
        with torch.no_grad(), self._looking():
            ys = x.movedim(self.time_dim, 0)
            seams.append(Seam.of(self._seam(0), ys))
            for k in range(len(self.stages)):
                ys = self._crossed(k, ys)
                seams.append(Seam.of(self._seam(k + 1), ys))
        return Probe(tuple(seams))

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Afterwards all states are as before, and what a batch norm counted."""
        entry = self._entry()
        counted = [(buffer, buffer.clone()) for buffer in self.buffers()]
        try:
            yield
        finally:
            self._put_back(entry)
            for buffer, value in counted:  # a batch norm writes without a new version
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    def with_stage(self, k: int, replacement: Any) -> Pipeline:
        """A new pipeline that shares all other stages' modules, and has another stage at place k."""
        kept: list[Any] = [(s.module, s.convention) for s in self.stages if isinstance(s, Stage)]
        if not -len(kept) <= k < len(kept):
            raise ValueError(f"Pipeline.with_stage: there is no stage {k}; it has {len(kept)}")
        kept[k] = replacement
        return Pipeline(*kept, time_dim=self.time_dim, fuse=self.fuse, fold=self.fold, dt=self.dt)

    # ---- copies --------------------------------------------------------------------------------------------------

    @contextmanager
    def _states_cut(self) -> Iterator[None]:
        """Inside, every state is a tensor without a graph, as copying and pickling need it."""
        kept = [(layer, layer.save_states()) for _, layer in named_layers(self)]
        try:
            for layer, states in kept:
                layer.load_states({n: None if s is None else s.detach() for n, s in states.items()}, strict=False)
            yield
        finally:
            for layer, states in kept:
                layer.load_states(states, strict=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        with self._states_cut():
            twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
            for mine, theirs in zip(self.modules(), twin.modules(), strict=True):
                # Quirk of sinabs 3.1.3: a copy of a layer forgets its training mode and what was frozen.
                theirs.training = mine.training
                for name, parameter in mine.named_parameters(recurse=False):
                    getattr(theirs, name).requires_grad_(parameter.requires_grad)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return copy.deepcopy(self).__dict__


def _twin(module: nn.Module) -> nn.Module:
    """The module fused over time: the same parameters, hidden states of its own."""
    if isinstance(module, Pipeline):
        stages = [(s.module, s.convention) for s in module.stages if isinstance(s, Stage)]
        return Pipeline(*stages, time_dim=module.time_dim, fuse=True, fold=module.fold, dt=module.dt)
    if not getattr(module, "over_sequences", False):
        return fused(module)
    # A JaxStage is compiled over the sequence already.
    hidden: Any = module.state_names
    shared = [*module.parameters(), *(b for name, b in module.named_buffers() if name not in hidden)]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def _own_buffers(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are no hidden states."""
    states = {place.name for place in stage.places}
    for path, module in stage.module.named_modules():
        hidden = getattr(module, "state_names", ())
        for own, buffer in module._buffers.items():
            name = f"{path}.{own}" if path else own
            if buffer is not None and name not in states and own not in hidden and not buffer.is_sparse:
                yield name, buffer


def _shown(xs: Tensor) -> str:
    return f"[T, B, ...]={list(xs.shape)} {str(xs.dtype).removeprefix('torch.')} on {xs.device}"
