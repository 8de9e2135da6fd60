"""Measuring a conversion whose target runs the source's own forward: every call of every layer in it is judged.

Both run on the same input under hooks on their layers. A neuron is judged on all that it received, call after call, as
one sequence; it must give there, run alone, what it gave in the network, or its states were changed between the calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tracetorch.adapters import verify
from tracetorch.adapters.base import ConversionError, Note, describe
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks.conventions import LOST
from tracetorch.adapters.networks.keeping import kept
from tracetorch.adapters.networks.network import Stage
from tracetorch.adapters.networks.stepping import AsItStands
from tracetorch.adapters.observing import (
    COTANGENT_SCALES,
    Gradients,
    Observed,
    cotangent,
    differentiable,
    equal_bits,
    overflowed,
    trainable,
)
from tracetorch.adapters.report import LayerRow


@dataclass
class _Calls:
    """Of one layer in one run: what it received and gave, call by call, and the states that it showed."""

    xs: list[Tensor] = field(default_factory=list)
    ys: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    shown: list[tuple[Tensor, ...]] = field(default_factory=list)


@dataclass
class _Run:
    """One run of a network: the calls of each stage, what the network returned, and gradients by the tensors' ids."""

    network: AsItStands
    calls: list[_Calls]
    outputs: tuple[Tensor, ...]
    gradients: Mapping[int, Tensor | None] = field(default_factory=dict)

    @cached_property
    def uses(self) -> Counter[int]:
        """How many layers have each trainable parameter, by its id; the forward itself counts as one."""
        named = {**dict(self.network.root.named_parameters()), **dict(self.network.root.named_buffers())}
        aside = {id(named[name]) for name in self.network.direct if name in named}
        held = [{id(tensor) for tensor in trainable(stage).values()} for stage in self.network.stages]
        return Counter(key for ids in (aside, *held) for key in ids)

    def gradient(self, tensor: Tensor) -> Tensor:
        """Zero where none arrived."""
        found = self.gradients.get(id(tensor))
        return torch.zeros_like(tensor) if found is None else found


def _hooks(stage: Stage, calls: _Calls) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def before(module: Any, args: tuple[Any, ...]) -> Any:
        # An alias, so that a value that several layers take has a gradient of its own through each.
        x = known.alias(args[0])
        if torch.is_grad_enabled() and x.is_floating_point() and not x.requires_grad:
            x = x.detach().requires_grad_().clone()  # the forward cut it off: the layer is judged all the same
        calls.xs.append(x)
        return x.clone() if getattr(stage.inner, "inplace", False) else x, *args[1:]

    def after(module: Any, args: Any, result: Any) -> Any:
        y, *shown = result if isinstance(result, tuple) else (result,)
        calls.ys.append(y)
        calls.versions.append(y._version)
        calls.shown.append(tuple(shown))
        # The forward may write into what a stateless module gives: into a tensor of its own, so that y is judged.
        return None if stage.neuron else y.clone()

    return before, after


@contextmanager
def _watched(network: AsItStands, calls: Sequence[_Calls]) -> Any:
    handles = []
    for stage, own in zip(network.stages, calls, strict=True):
        before, after = _hooks(stage, own)
        handles += [stage.held.register_forward_pre_hook(before), stage.held.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(network: AsItStands, x: Tensor, grad: bool, scale: float = 1.0) -> _Run:
    """The network's own forward from the initial states, and backward from a fixed random gradient of its outputs."""
    calls = [_Calls() for _ in network.stages]
    network.reset()
    # Copies that are no leaves: a forward that writes into its input may do so.
    inputs = [value.requires_grad_(grad).clone() for value in network.inputs(x.detach())]
    with torch.set_grad_enabled(grad), kept(network.root), _watched(network, calls):
        outputs = network.go_on(inputs)
    run = _Run(network, calls, outputs)
    for stage, own in zip(network.stages, calls, strict=True):
        if not own.xs:
            why = "the sample's forward does not call it: nothing is known of it"
            raise ConversionError(f"{stage.name!r}", "calls", 0, why, "a sample that reaches it, or a network without")
    if grad:
        run.gradients = _gradients(run, scale)
    return run


def _gradients(run: _Run, scale: float) -> dict[int, Tensor | None]:
    wanted = [t for own in run.calls for t in differentiable([*own.xs, *own.ys])]
    wanted += [t for stage in run.network.stages for t in trainable(stage).values()]
    with_path = list({id(tensor): tensor for tensor in wanted if tensor.requires_grad}.values())
    roots = [(y, cotangent(y, k) * scale) for k, y in enumerate(differentiable(run.outputs)) if y.requires_grad]
    if not roots or not with_path:
        return {}
    ends, weights = zip(*roots, strict=True)
    found = torch.autograd.grad(ends, with_path, weights, allow_unused=True)
    return {id(tensor): gradient for tensor, gradient in zip(with_path, found, strict=True)}


def _joined(stage: Stage, tensors: Sequence[Tensor], stepped: bool) -> Tensor:
    """The values of all calls as [T, ...]: one step a call, or one after the other for a neuron of whole sequences."""
    if len({tensor.shape[1:] for tensor in tensors}) != 1 or (stepped and len({len(t) for t in tensors}) != 1):
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        why = "it is called with inputs of several shapes"
        raise ConversionError(f"{stage.name!r}", "calls", shapes, why, "one shape in every call")
    if stepped or not stage.neuron:
        return torch.stack(list(tensors))
    batch, steps = int(getattr(stage.held, "batch_size", 0)), int(getattr(stage.held, "num_timesteps", 0))
    apart = [tensor.unflatten(0, (batch, steps)) if batch else tensor for tensor in tensors]
    return torch.cat([tensor.transpose(0, 1) for tensor in apart])


def _observed(run: _Run, number: int, stepped: bool, grad: bool) -> Observed:
    """What a layer received and gave, as one sequence, and the states that it had meanwhile."""
    stage, own = run.network.stages[number], run.calls[number]

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return _joined(stage, tensors, stepped)

    if any(y._version != version for y, version in zip(own.ys, own.versions, strict=True)):
        why = "the forward writes into what the layer gave"
        raise ConversionError(f"{stage.name!r}", "output", "written into", why, "a new tensor: y = y * 2, not y *= 2")
    xs, ys = joined(own.xs), joined(own.ys)
    states: dict[str, Tensor] = {}
    if stage.neuron:
        with torch.no_grad():
            again, states = stage.adapter.trace(stage.inner, xs.detach())
        if not equal_bits(again, ys):
            why = "alone, on all that it received, it gives something else than in the network"
            remedy = "leave its states as the layer returned them"
            raise ConversionError(f"{stage.name!r}", "state", "changed between its calls", why, remedy)
    seen = Observed(stage, (xs,), ys, states, stage.spec() if stage.neuron else None)
    if grad:
        given = (joined([run.gradient(x) for x in own.xs]),) if xs.is_floating_point() else ()
        # Of a parameter that is used elsewhere too the gradient is a sum, which no layer can be judged by.
        alone = {name: tensor for name, tensor in trainable(stage).items() if run.uses[id(tensor)] == 1}
        learnt = {name: run.gradient(tensor) for name, tensor in alone.items()}
        seen.grad = Gradients(given, joined([run.gradient(y) for y in own.ys]), learnt)
    return seen


def _observe(network: AsItStands, x: Tensor, stepped: bool, grad: bool, scale: float) -> tuple[_Run, list[Observed]]:
    run = _run(network, x, grad, scale)
    return run, [_observed(run, number, stepped, grad) for number in range(len(network.stages))]


def rows(
    source: AsItStands,
    target: AsItStands,
    x: Tensor,
    notes: Mapping[str, Sequence[Note]],
    grad: bool,
    modal: frozenset[int] = frozenset(),
) -> tuple[LayerRow, ...]:
    """Run both on an input, judge every layer, and hold what the two return against each other.

    Args:
        source, target: their states are changed: see `network.preserved`.
        x: what the source takes, or with style "step" [T, B, ...].
        notes: of the target's neurons, by name.
        grad: whether to judge gradients too.
        modal: ids of modules of which the rows shall say that they are in training mode.

    Raises:
        ConversionError: a layer that is not called, or whose states the forward changes.
    """
    stepped = source.adapter.STEPPED
    for scale in COTANGENT_SCALES:
        first, seen = _observe(source, x, stepped, grad, scale)
        if not grad or not any(map(overflowed, seen)):
            break
    second, made = _observe(target, x, stepped, grad, scale)
    found = []
    for number, (s, t) in enumerate(zip(seen, made, strict=True)):
        if s.y.shape != t.y.shape:
            why = "source and target call it a different number of times: a spike decided by a rounding took a branch"
            raise ConversionError(f"{s.stage.name!r}", "calls", f"{len(s.y)}, {len(t.y)}", why, "another sample")
        if s.stage.neuron:
            shows = grad and getattr(t.stage.held, "membrane", "") != LOST
            found.append(verify.judge_neuron(s, t, notes.get(s.stage.name, ()), grad, shows_state=shows))
        else:
            with torch.no_grad():  # the source's module, on the very tensors that the target's received
                expected = torch.stack([s.stage.inner(value.detach()) for value in second.calls[number].xs])
            training = id(s.stage.inner) in modal
            found.append(verify.judge_stateless(s, t, grad, first=False, training=training, expected=expected))
    return (*found, _forward_row(first, second, found))


def _forward_row(source: _Run, target: _Run, layers: Sequence[LayerRow]) -> LayerRow:
    """The row of the forward itself: of what both return."""
    same = len(source.outputs) == len(target.outputs) and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(source.outputs, target.outputs, strict=False)
    )
    pairs = list(zip(source.outputs, target.outputs, strict=True)) if same else []
    filled = [(a.detach().double(), b.detach().double()) for a, b in pairs if a.numel()]
    difference = max((float((a - b).abs().max()) for a, b in filled), default=0.0)
    forward, reason = "exact", source.network.why
    if not (same and all(not a.numel() or equal_bits(a, b) for a, b in pairs)):
        # Layers that round may lead to other outputs; layers that are all the same bits may not.
        forward = "rounding" if same and any(row.forward == "rounding" for row in layers) else "approximate"
        reason += f"; its outputs differ by up to {difference:.2g}" if same else "; its outputs have another structure"
    name = describe(source.network.root)
    return LayerRow("forward", name, name, False, forward, "", reason, max_output_difference=difference)


def length(network: AsItStands, x: Tensor) -> int:
    """The number of time steps that the network makes of an input: the most that one of its neurons made."""
    if network.style == "step":
        return len(x)
    if network.graph is not None:
        return len(network.graph.enter(x)[0])
    stepped = network.adapter.STEPPED
    run = _run(network, x, grad=False)
    named = zip(network.stages, run.calls, strict=True)
    return max(len(_joined(stage, own.xs, stepped)) for stage, own in named if stage.neuron)
