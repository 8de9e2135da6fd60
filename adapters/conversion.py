"""The result of a conversion: the target model, its report, and running and judging both networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracetorch import oracle
from tracetorch.adapters import calls
from tracetorch.adapters import verify as _verify
from tracetorch.adapters.base import ConversionError, Note
from tracetorch.adapters.networks import stepping
from tracetorch.adapters.networks.carrying import CarriedBack, changed
from tracetorch.adapters.networks.modules import evaluated
from tracetorch.adapters.networks.network import Network, Stage, preserved
from tracetorch.adapters.networks.recorded import Recorded, tensors_of
from tracetorch.adapters.networks.stepping import AsItStands
from tracetorch.adapters.report import Agreement, Report
from tracetorch.core.graph import rewrite


@dataclass(repr=False)
class Conversion:
    """The result of `convert`.

    Attributes:
        model: an ordinary model of the target framework, called as its users call it.
        report: one row a layer: verdicts measured on the sample, how each field was met, parameters carried.
        agreement: the whole measurement on the sample.
    """

    model: nn.Module
    report: Report
    agreement: Agreement
    _source: Network
    _target: Network
    _notes: dict[str, Sequence[Note]]
    _time_dim: int | None
    _step_shape: torch.Size | None = None

    def __repr__(self) -> str:
        return f"Conversion: {self.report}"

    def run(self, x: Tensor) -> Any:
        """The target on the source's own input; out comes the source's own structure.

        A sequence starts from the initial state. A single step (a source with one step per call, converted without
        `time_dim`) goes on from the last one; `reset()` starts anew, and so does an input of another shape.
        """
        if isinstance(self._source, AsItStands):
            return self._run_as_it_stands(self._source, x)
        if isinstance(self._source, Recorded):
            return self._run_recorded(self._source, x)
        emits = self._source.emits_state
        if self._single(x):
            return self._run_step(x)
        xs = _time_first(self._source, x, self._time_dim)
        if not emits:
            ys, membrane = self._target.forward(xs), None
        else:
            last = self._target.walk(xs)[0][-1]
            ys, membrane = last.y, self._as_source(last.stage, last.y, last.states["v_mem"])
        dim = _time_axis(self._source, self._time_dim)
        ys = ys.movedim(0, dim)
        return ys if membrane is None else (ys, membrane.movedim(0, dim))

    @property
    def stepped(self) -> bool:
        """Whether the target runs the source's own forward, as its report says: a model that is code, not data."""
        return isinstance(self._target, AsItStands) and self._target.graph is None

    def reset(self) -> None:
        """The target's neurons back to their initial state."""
        self._target.reset()

    def pairs(self) -> Iterator[tuple[Stage, Stage]]:
        """Each stage of the source with the target's."""
        yield from zip(self._source.stages, self._target.stages, strict=True)

    def modules(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Each module of the source's that is called with the target's, before and after the time steps too."""
        for mine, made in self.pairs():
            yield mine.inner, made.inner
        if self._source.plan is not None and self._target.plan is not None:
            for path, module in self._source.plan.modules.items():
                yield module, self._target.plan.modules[path]

    def verify(
        self, x: Any, grad: bool = True, carry_back: bool = False, *, modal: frozenset[int] = frozenset()
    ) -> Agreement:
        """Run source and target, as they are now, on `x`, and judge every layer by the oracle.

        Hidden states of both are put back afterwards; parameters and their `.grad` are not touched.

        Args:
            x: an input like the sample.
            grad: whether to judge gradients of inputs and parameters too.
            carry_back: give the source, for the length of the call, the target's present parameters: whether the
                conversion still holds after the target was trained by itself. Needless with `share_weights=True`.
            modal: ids of further modules of which the report shall say that they are in training mode.

        Dropout and batch norm in training mode are judged in evaluation mode, and their rows say so.

        Raises:
            ConversionError: a network that can no longer be read.
        """
        xs = sequence(self._source, x, self._time_dim)
        source, target = self._source, self._target
        with preserved(source), preserved(target), evaluated(source.root, target.root) as own, ExitStack() as stack:
            if carry_back:
                stack.enter_context(CarriedBack(source, target))
            if isinstance(source, AsItStands) and isinstance(target, AsItStands):
                rows = calls.rows(source, target, xs, self._notes, grad, modal | own)
                steps = calls.length(source, xs)
            else:
                rows = _verify.rows(source, target, xs, self._notes, grad, modal | own)
                steps = len(source.enter(xs)[0])
        stale = () if carry_back else changed(self._source, self._target)
        return Agreement(
            source.framework,
            target.framework,
            rows,
            (*source.remarks(), *_one_step(source, steps)),
            steps=steps,
            changed_parameters=stale,
        )

    def _single(self, x: Tensor) -> bool:
        return self._source.adapter.STEPPED and self._time_dim is None

    def _run_step(self, x: Tensor) -> Any:
        last = self._target.stages[-1]
        if self._step_shape not in (None, x.shape):
            self.reset()  # as snnTorch, which starts anew when the shape of its input changes
        self._step_shape = x.shape
        if self._target.adapter.STEPPED:
            result = self.model(x)
            ys = result[0] if isinstance(result, tuple) else result
        else:
            ys = self.model(x.unsqueeze(1)).squeeze(1)
        if not self._source.emits_state:
            return ys
        attribute = "mem" if hasattr(last.inner, "mem") else "v_mem"
        return ys, self._as_source(last, ys, getattr(last.inner, attribute))

    def _run_as_it_stands(self, source: AsItStands, x: Tensor) -> Any:
        """The target that runs the source's own forward."""
        if self._time_dim is not None:
            self.reset()
            return stepping.stacked([self.model(step) for step in x.unbind(self._time_dim)], self._time_dim)
        if source.loops or self._step_shape not in (None, x.shape):
            self.reset()
        self._step_shape = x.shape
        return self.model(x)

    def _run_recorded(self, source: Recorded, x: Any) -> Any:
        """The target of a network with a forward of its own."""
        whole = self._target.style == "sequence"
        if source.style == "loop" and not whole:
            self.reset()
            return self.model(x)
        if source.style == "loop":
            assert source.frame is not None
            xs = source.frame.sequences(x)
            self.reset()
            outputs = self._target_outputs(xs)
            return outputs if source.frame.after is None else source.frame.after(*outputs)
        x = x[0] if isinstance(x, tuple) else x
        if self._time_dim is None:
            if self._step_shape not in (None, x.shape):
                self.reset()
            self._step_shape = x.shape
            if not whole:
                return self.model(x)
            outputs = tuple(y.squeeze(0) for y in self._target_outputs((x.unsqueeze(0),)))
        else:
            self.reset()
            xs = x.movedim(self._time_dim, 0)
            results = self._target_outputs((xs,)) if whole else stepped(self.model, xs)
            outputs = tuple(y.movedim(0, self._time_dim) for y in results)
        assert source.plan is not None
        given = dict(zip(source.outputs, outputs, strict=True))
        return rewrite(source.plan.step.output, lambda leaf: given.get(leaf, leaf))

    def _target_outputs(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of a target over [B, T, ...]: the step's outputs, each [T, B, ...]."""
        return tuple(y.transpose(0, 1) for y in tensors_of(self.model(*(x.transpose(0, 1) for x in xs))))

    def _as_source(self, stage: Stage, spikes: Tensor, membrane: Tensor) -> Tensor:
        """The target's membrane as the source shows it: before or after its reset."""
        ours, theirs = stage.spec(), self._source.stages[-1].spec()
        if ours.stores_before_reset == theirs.stores_before_reset:
            return membrane
        shown = oracle.equations(theirs if theirs.stores_before_reset else ours)
        change = shown.before_reset if theirs.stores_before_reset else shown.after_reset
        v, s = (np.asarray(t.detach().cpu().numpy(), dtype=np.float64) for t in (membrane, spikes))
        return torch.from_numpy(np.asarray(change(v, s))).to(membrane)


def _one_step(network: Network, steps: int) -> tuple[str, ...]:
    """What is said of an input that is one step of a network that is called step by step."""
    if steps > 1 or network.style == "loop" or not network.adapter.STEPPED:
        return ()
    return ("one step was judged, which shows nothing of what is carried on: give a sequence, and its time_dim",)


def _time_axis(network: Network, time_dim: int | None) -> int:
    return (1 if not network.adapter.STEPPED else 0) if time_dim is None else time_dim


def _time_first(network: Network, x: Tensor, time_dim: int | None) -> Tensor:
    return x.movedim(_time_axis(network, time_dim), 0)


def sequence(network: Network, x: Any, time_dim: int | None) -> Any:
    """The input as [T, B, ...]; of a network that loops over time itself, as that takes it."""
    if isinstance(network, Recorded) and isinstance(x, tuple):
        x = x[0]
    kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
    if kind not in (torch.float32, torch.float64):
        remedy = "x.float()" if isinstance(x, Tensor) else "torch.as_tensor(x, dtype=torch.float32)"
        raise ConversionError("''", "sample", kind, "the input must be a float32 or float64 tensor", remedy)
    if network.style == "loop":
        return _whole(x, time_dim)
    if not network.adapter.STEPPED and time_dim not in (None, 1):
        raise ConversionError(
            "''", "time_dim", time_dim, f"{network.framework} takes [B, T, ...]", "time_dim=1 or None"
        )
    if network.adapter.STEPPED and time_dim is None:
        xs = x.unsqueeze(0)
    else:
        axis = _time_axis(network, time_dim)
        if x.ndim < 2 or not -x.ndim <= axis < x.ndim:
            raise ConversionError(
                "''", "time_dim", axis, f"out of range for the shape {list(x.shape)}", "time_dim=0 or 1"
            )
        xs = _time_first(network, x, time_dim)
    if xs.ndim < 3:
        why = "it has no batch dimension beside time and features"
        raise ConversionError("''", "sample", list(x.shape), why, "x.unsqueeze(1)")
    if xs.numel() == 0:
        raise ConversionError(
            "''", "sample", list(x.shape), "an empty input proves nothing", "at least one step and sample"
        )
    return xs


def _whole(x: Tensor, time_dim: int | None) -> Tensor:
    if time_dim is not None:
        why = "the network's forward runs over time itself"
        raise ConversionError("''", "time_dim", time_dim, why, "time_dim=None")
    if x.numel() == 0:
        why = "an empty input proves nothing"
        raise ConversionError("''", "sample", list(x.shape), why, "at least one step and sample")
    return x


def stepped(model: nn.Module, xs: Tensor) -> tuple[Tensor, ...]:
    """One call per step; every tensor that it returns, each [T, ...]."""
    series = [list(tensors_of(model(x))) for x in xs]
    return tuple(torch.stack(list(each)) for each in zip(*series, strict=True))
