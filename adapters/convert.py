"""Converting one layer or a whole network, and the result that proves it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracetorch import oracle
from tracetorch.adapters import verify as _verify
from tracetorch.adapters.base import Building, ConversionError, Note, parameters
from tracetorch.adapters.network import Network, Stage, preserved, read
from tracetorch.adapters.registry import adapter, adapter_of
from tracetorch.adapters.report import Agreement, LayerRow, Report
from tracetorch.core.raw import from_raw, to_raw
from tracetorch.core.spec import NeuronSpec

_SAME_RAW = ("value", "clamped")


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """The semantics of one neuron layer of any supported framework.

    Args:
        layer: an instance; nothing of it is changed.
        dt: time step, for frameworks whose neurons do not hold one; unused by those of this version.

    Raises:
        SpecError: not a neuron layer known here, or an option that cannot be read; names it.
    """
    return adapter_of(layer).spec(layer, dt)


def build(spec: NeuronSpec, framework: str, stock: bool = False) -> nn.Module:
    """A new neuron layer of a framework that computes a spec.

    Args:
        spec: what it shall compute.
        framework: "tracetorch", "snntorch" or "sinabs".
        stock: only parts of the framework itself; without it, callables and small subclasses of ours fill the gaps.

    Raises:
        ConversionError: the framework cannot express it; names field, value and remedy.
        ValueError, ImportError: an unknown or missing framework.
    """
    return adapter(framework).build(spec, Building("(one layer)", framework, stock))


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
        emits = self._source.emits_state
        if self._single(x):
            return self._run_step(x)
        xs = _time_first(self._source, x, self._time_dim)
        if not emits:
            ys, membrane = self._target.forward(xs), None
        else:
            *_, (stage, _, ys, states) = self._target.chain(xs)
            membrane = self._as_source(stage, ys, states["v_mem"])
        dim = _time_axis(self._source, self._time_dim)
        ys = ys.movedim(0, dim)
        return ys if membrane is None else (ys, membrane.movedim(0, dim))

    def reset(self) -> None:
        """The target's neurons back to their initial state."""
        self._target.reset()

    def verify(self, x: Tensor, grad: bool = True, carry_back: bool = False) -> Agreement:
        """Run source and target, as they are now, on `x`, and judge every layer by the oracle.

        Hidden states of both are put back afterwards; parameters and their `.grad` are not touched.

        Args:
            x: an input like the sample.
            grad: whether to judge gradients of inputs and parameters too.
            carry_back: give the source, for the length of the call, the target's present parameters: whether the
                conversion still holds after the target was trained by itself. Needless with `share_weights=True`.

        Raises:
            ConversionError: a network that can no longer be read.
        """
        xs = _sequence(self._source, x, self._time_dim)
        with preserved(self._source), preserved(self._target):
            if not carry_back:
                rows = _verify.rows(self._source, self._target, xs, self._notes, grad)
            else:
                with _CarriedBack(self._source, self._target):
                    rows = _verify.rows(self._source, self._target, xs, self._notes, grad)
        changed = () if carry_back else _changed(self._source, self._target)
        return Agreement(
            self._source.framework, self._target.framework, rows, steps=len(xs), changed_parameters=changed
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

    def _as_source(self, stage: Stage, spikes: Tensor, membrane: Tensor) -> Tensor:
        """The target's membrane as the source shows it: before or after its reset."""
        ours, theirs = stage.spec(), self._source.stages[-1].spec()
        if ours.stores_before_reset == theirs.stores_before_reset:
            return membrane
        shown = oracle.equations(theirs if theirs.stores_before_reset else ours)
        change = shown.before_reset if theirs.stores_before_reset else shown.after_reset
        v, s = (np.asarray(t.detach().cpu().numpy(), dtype=np.float64) for t in (membrane, spikes))
        return torch.from_numpy(np.asarray(change(v, s))).to(membrane)


class _CarriedBack:
    """The target's parameters in the source, for the length of a `with` block."""

    def __init__(self, source: Network, target: Network) -> None:
        self.pairs = [pair for pair in _pairs(source, target) if not pair.agree()]
        # The memory is put aside, not written to: sinabs's default threshold is one tensor for all layers.
        self.saved = [(pair.theirs, pair.theirs.data) for pair in self.pairs]

    def __enter__(self) -> None:
        for pair in self.pairs:
            ours = pair.ours.detach()
            same = pair.their_raw == pair.our_raw
            value = ours if same else to_raw(pair.their_raw, from_raw(pair.our_raw, ours))
            pair.theirs.data = value.to(pair.theirs.dtype).clone()

    def __exit__(self, *_: object) -> None:
        for theirs, value in self.saved:
            theirs.data = value


@dataclass(frozen=True)
class _Pair:
    """A parameter that was carried: the source's tensor and the target's, each in its raw form."""

    name: str
    theirs: Tensor
    ours: Tensor
    their_raw: str = "value"
    our_raw: str = "value"

    def agree(self) -> bool:
        """Whether they are worth the same, or one float apart, as a stock layer holds a threshold to turn > into >=."""
        if self.theirs.shape != self.ours.shape:
            return False
        if self.their_raw == self.our_raw:
            value, own = self.theirs.detach(), self.ours.detach()
        else:
            value, own = from_raw(self.their_raw, self.theirs.detach()), from_raw(self.our_raw, self.ours.detach())
        value = value.to(own)
        steps = [torch.nextafter(value, torch.full_like(own, end)) for end in (torch.inf, -torch.inf)]
        return bool(((own == value) | (own == steps[0]) | (own == steps[1])).all())


def _pairs(source: Network, target: Network) -> Iterator[_Pair]:
    for s, t in zip(source.stages, target.stages, strict=True):
        if not s.neuron:
            ours = dict(t.inner.named_parameters())
            yield from (_Pair(f"{s.name}.{name}", theirs, ours[name]) for name, theirs in s.inner.named_parameters())
            continue
        raws = [{name: p.raw for name, p in stage.spec().parameters.items()} for stage in (s, t)]
        own = parameters(t.adapter, t.inner)
        for name, attribute in s.adapter.attributes(s.inner).items():
            if name in own and all(name in raw for raw in raws):
                theirs = getattr(s.inner, attribute)
                yield _Pair(f"{s.name}.{attribute}", theirs, own[name], raws[0][name], raws[1][name])


def _changed(source: Network, target: Network) -> tuple[str, ...]:
    """Names of the parameters that no longer agree."""
    return tuple(pair.name for pair in _pairs(source, target) if not pair.agree())


def _time_axis(network: Network, time_dim: int | None) -> int:
    return (1 if not network.adapter.STEPPED else 0) if time_dim is None else time_dim


def _time_first(network: Network, x: Tensor, time_dim: int | None) -> Tensor:
    return x.movedim(_time_axis(network, time_dim), 0)


def _sequence(network: Network, x: Tensor, time_dim: int | None) -> Tensor:
    """The input as [T, B, ...]."""
    kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
    if kind not in (torch.float32, torch.float64):
        raise ConversionError("''", "sample", kind, "the input must be a float32 or float64 tensor", "x.float()")
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


def _check_precision(network: Network, xs: Tensor) -> None:
    """torch promotes: a parameter of one precision and an input of another compute in neither's."""
    for stage in network.stages:
        tensors = parameters(stage.adapter, stage.inner) if stage.neuron else dict(stage.inner.named_parameters())
        for name, tensor in tensors.items():
            if tensor.ndim and tensor.is_floating_point() and tensor.dtype is not xs.dtype:
                raise ConversionError(
                    f"{stage.name!r}",
                    name,
                    tensor.dtype,
                    f"the sample is {xs.dtype}",
                    f"net.to({xs.dtype}), or a sample of the parameters' dtype",
                )


def _build_neuron(stage: Stage, to: str, building: Building, share: bool) -> nn.Module:
    target = adapter(to)
    layer = target.build(stage.spec(), building)
    tensors = parameters(stage.adapter, stage.inner)
    layer.to(next(iter(tensors.values())).device).train(stage.inner.training)
    if share:
        _share(stage, layer, to)
    return layer


def _share(stage: Stage, layer: nn.Module, to: str) -> None:
    """Make the target's parameters the source's own."""
    theirs, ours = stage.adapter.attributes(stage.inner), adapter(to).attributes(layer)
    raw = {name: parameter.raw for name, parameter in stage.spec().parameters.items()}
    own = {name: parameter.raw for name, parameter in adapter(to).spec(layer).parameters.items()}
    for name, attribute in theirs.items():
        if name not in ours:
            continue
        tensor, mine = getattr(stage.inner, attribute), getattr(layer, ours[name])
        if not tensor.is_floating_point():  # threshold=1 is no weight: the target has its float
            continue
        same = raw[name] == own.get(name) or {raw[name], own.get(name)} <= set(_SAME_RAW)
        if not same or not torch.equal(tensor.detach().to(mine), mine.detach()):
            raise ConversionError(
                f"{stage.name!r}",
                attribute,
                raw[name],
                f"{to} keeps it in another form, so it cannot be shared",
                "share_weights=False",
            )
        if isinstance(mine, nn.Parameter):
            shared = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            setattr(layer, ours[name], shared)
        else:
            setattr(layer, ours[name], tensor)


def _copies(network: Network, share: bool) -> dict[str, nn.Module]:
    """The stateless modules, copied together, so that what is shared among them stays shared."""
    memo: dict[int, Any] = {}
    if share:
        for stage in network.stages:
            if not stage.neuron:
                tensors = [*stage.inner.parameters(), *stage.inner.buffers()]
                memo.update({id(tensor): tensor for tensor in tensors})
    return {stage.name: copy.deepcopy(stage.inner, memo) for stage in network.stages if not stage.neuron}


def _write(
    network: Network, to: str, stock: bool, share: bool, approximate: bool
) -> tuple[Network, dict[str, Sequence[Note]]]:
    """The target network, stage by stage, and the notes of each neuron's build."""
    target = adapter(to)
    notes: dict[str, Sequence[Note]] = {}
    copies = _copies(network, share)
    stages = []
    for stage in network.stages:
        if stage.neuron:
            building = Building(f"{stage.name!r}", to, stock, approximate)
            inner = held = _build_neuron(stage, to, building, share)
            notes[stage.name] = building.notes
        else:
            inner = copies[stage.name]
            held = target.wrap(inner)
        stages.append(Stage(stage.name, held, inner, stage.neuron, target))
    modules = OrderedDict((stage.name, stage.held) for stage in stages)
    root = target.assemble(modules, network.emits_state)
    root.training = network.root.training
    return Network(root, to, target, tuple(stages), network.emits_state and target.STEPPED), notes


def _check_output(network: Network, target: Network) -> None:
    """A source that returns its membrane must find it in the target."""
    if not network.emits_state:
        return
    theirs, ours = network.stages[-1].spec(), target.stages[-1].spec()
    if theirs.stores_before_reset and not ours.stores_before_reset and theirs.reset != "subtract":
        raise ConversionError(
            f"{network.stages[-1].name!r}",
            "output",
            True,
            f"{target.framework} keeps the membrane after the reset, and a reset to a value loses the one before it",
            "output=False in the last layer, or to='tracetorch'",
        )


def _refuse(rows: Sequence[LayerRow], approximate: bool, gradients: bool) -> None:
    for row in rows:
        if row.forward == "approximate" and not approximate:
            raise ConversionError(
                f"{row.name!r}",
                "forward",
                "approximate",
                f"measured on the sample: {row.reason}",
                "allow_approximate=True",
            )
        if gradients and row.gradient in ("differs", "none"):
            raise ConversionError(
                f"{row.name!r}",
                "gradient",
                row.gradient,
                f"require_gradients=True, but {row.reason}",
                "stock=False, another target, or require_gradients=False",
            )


def convert(
    net: nn.Module,
    to: str,
    sample: Tensor,
    *,
    time_dim: int | None = None,
    dt: float | None = None,
    stock: bool = False,
    share_weights: bool = False,
    require_gradients: bool = False,
    allow_approximate: bool = False,
) -> Conversion:
    """Port a whole network to another framework, and measure on a sample what stayed the same.

    The source is detected, and left as it was, hidden states included. In this version it is an `nn.Sequential` of
    stateless torch modules and neurons (`snntorch.Leaky`, `sinabs.layers.LIF`, `tt.snn.SpecNeuron`).

    Args:
        net: the source network.
        to: "tracetorch", "sinabs" or "snntorch".
        sample: what `net`'s forward takes, float32 or float64; with many steps and spikes, it proves more.
        time_dim: `None`: a source called step by step takes one step [B, ...]; a sinabs source takes [B, T, ...].
            Otherwise the sample's time dimension: a source called step by step is then run over it.
        dt: time step for frameworks whose neurons hold none; unused by those of this version.
        stock: only parts of the target framework itself, no callables or subclasses of ours.
        share_weights: the target's parameters are the source's own tensors, not copies.
        require_gradients: also refuse a layer whose gradient would differ.
        allow_approximate: return the nearest network where a choice cannot be carried; its rows say what differs.

    Returns:
        A `Conversion`: `model`, `report`, `run`, `verify`.

    Raises:
        ConversionError: what cannot be carried; names layer, field, value and remedy.
        ValueError, ImportError: an unknown or missing framework.
    """
    network = read(net)
    xs = _sequence(network, sample, time_dim)
    _check_precision(network, xs)
    with preserved(network):
        target, notes = _write(network, to, stock, share_weights, allow_approximate)
        _check_output(network, target)
        empty = Report(network.framework, to, ())
        agreement = Agreement(network.framework, to, (), steps=len(xs))
        conversion = Conversion(target.root, empty, agreement, network, target, notes, time_dim)
        conversion.agreement = conversion.verify(sample)
    target.reset()
    rows = conversion.agreement.rows
    _refuse(rows, allow_approximate, require_gradients)
    conversion.report = Report(network.framework, to, rows)
    return conversion
