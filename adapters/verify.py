"""Measuring a conversion: both networks run, every layer judged by the oracle on the inputs that it really received."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracetorch import oracle
from tracetorch.adapters import gradients
from tracetorch.adapters.base import ConversionError, Note, describe
from tracetorch.adapters.gradients import GRADIENT_TOLERANCE
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks.network import Function, Network, Stage, stored_membrane
from tracetorch.adapters.observing import (
    Observed,
    canonical_membrane,
    check_walk,
    equal_bits,
    finite,
    numpy_of,
    observe,
    overflowed,
    run_alone,
)
from tracetorch.adapters.report import LayerRow
from tracetorch.core.graph import State

__all__ = ["GRADIENT_TOLERANCE", "check_walk", "judge_neuron", "judge_stateless", "rows"]

_LOST = "the source's own gradient overflows on this input: it shows nothing of gradients"
_FIRST = (
    "the source's own gradient overflows on this input: judged are those of the outputs of the first {} of {} steps"
)


def _state_difference(source: Observed, alone: Observed) -> float:
    """Largest difference of the membranes after their reset, up to and without the first mismatch of each neuron."""
    differ = np.logical_or.accumulate(numpy_of(source.y) != numpy_of(alone.y), axis=0)
    if source.spec.stores_before_reset == alone.spec.stores_before_reset:
        membranes = [numpy_of(stored_membrane(o.states)).astype(np.float64) for o in (source, alone)]
    else:
        membranes = [canonical_membrane(o) for o in (source, alone)]
    with np.errstate(invalid="ignore"):  # of infinite membranes, left out below
        difference = np.abs(membranes[0] - membranes[1])
    if source.spec.output == "membrane":
        differ = np.zeros_like(differ)
    left = difference[~differ & np.isfinite(difference)]
    return float(left.max()) if left.size else 0.0


def _same_states(source: Observed, alone: Observed) -> bool:
    """Whether the membranes are bit-identical, in the form in which both or only one of them shows it."""
    if source.states.keys() != alone.states.keys():
        return False
    if source.spec.stores_before_reset == alone.spec.stores_before_reset:
        return all(equal_bits(source.states[name], alone.states[name]) for name in source.states)
    # Numbers, not bits: a reset to 0 by multiplication may leave -0.0.
    return bool(np.array_equal(canonical_membrane(source), canonical_membrane(alone), equal_nan=True))


def _carried(source: Stage, target: Stage) -> tuple[str, ...]:
    theirs, ours = source.adapter.attributes(source.inner), target.adapter.attributes(target.inner)
    lines = []
    for name, attribute in theirs.items():
        if name in ours:
            learnable = ", learnable" if attrgetter(attribute)(source.inner).requires_grad else ""
            lines.append(f"{attribute} -> {ours[name]}{learnable}")
    return tuple(lines)


def _forward(
    source: Observed, alone: Observed, judged: oracle.Judgement, notes: Sequence[Note]
) -> tuple[str, list[str]]:
    """The forward verdict, and what speaks against a better one."""
    own, said = oracle.judge(source.spec, source.recording()), []
    if not own.ok:
        said.append(f"the source itself departs from its spec at {own.first}: please report this")
    if not judged.ok:
        said.append(
            f"{judged.unexplained} spikes and {judged.state_violations} states outside the rounding bound, "
            f"first at {judged.first}"
        )
    if said or any(note.approximate for note in notes):
        return "approximate", said
    return "exact" if equal_bits(source.y, alone.y) and _same_states(source, alone) else "rounding", said


def judge_neuron(
    source: Observed,
    target: Observed,
    notes: Sequence[Note],
    grad: bool,
    shows_state: bool = False,
    first_steps: int | None = None,
) -> LayerRow:
    """The row of a neuron layer.

    Args:
        shows_state: its membrane is used outside it.
        first_steps: gradients are those of the outputs of so many steps; None: of all.
    """
    reasons = [f"{note.field}: {note.text}" for note in notes]
    judged = oracle.judge(source.spec, target.recording())
    alone = run_alone(target, source.x, source.grad.y if grad else None)
    forward, said = _forward(source, alone, judged, notes)
    reasons += said
    if source.spec.output == "spikes" and judged.spikes == 0:
        reasons.append("no spike in the sample: it shows nothing of spikes and resets")
    if grad and shows_state:
        # The oracle's gradient enters by the spikes alone; what enters by the membrane is held against the source's.
        source = run_alone(source, source.x, source.grad.y)
        target = run_alone(target, target.x, target.grad.y)
    gradient = gradients.of_neuron(source, target, alone, notes) if grad else gradients.GradientVerdict("", 0.0)
    if grad and shows_state:
        gradient = gradients.worse(gradient, gradients.through_membrane(source, target))
    differ = (source.y != target.y) if source.spec.output == "spikes" else torch.zeros(1, 1, dtype=torch.bool)
    steps = differ.flatten(1).any(1).nonzero()
    lost = grad and overflowed(source)
    if lost:
        reasons.append(_LOST)
    elif first_steps is not None:
        reasons.append(_FIRST.format(first_steps, len(source.y)))
    return LayerRow(
        name=source.stage.name,
        source=describe(source.stage.inner),
        target=describe(target.stage.inner),
        neuron=True,
        forward=forward,
        gradient=gradient.verdict,
        reason="; ".join([*reasons, gradient.said] if gradient.said else reasons),
        carried=_carried(source.stage, target.stage),
        slots=judged.slots if source.spec.output == "spikes" else 0,
        spikes=judged.spikes,
        spike_mismatches=int(differ.sum()),
        first_difference=int(steps[0]) if len(steps) else None,
        unexplained_mismatches=judged.unexplained,
        state_violations=judged.state_violations,
        first_violation=judged.first,
        max_state_difference=_state_difference(source, alone),
        gradient_error=gradient.error,
        unexpected=_unexpected(gradient, notes) and not lost,
    )


def _unexpected(gradient: gradients.GradientVerdict, notes: Sequence[Note]) -> bool:
    foretold = any(note.gradient == "differs" for note in notes)
    return gradient.verdict == "differs" and not gradient.void and not foretold


def judge_stateless(
    source: Observed,
    target: Observed,
    grad: bool,
    first: bool,
    training: bool = False,
    expected: Tensor | None = None,
) -> LayerRow:
    """The row of a stateless module: the source's, called as the source calls it, on what the target received."""
    if expected is None:
        with torch.no_grad():
            expected = source.stage.apply(*map(_detached, target.xs), first=first)
    if expected.shape != target.y.shape or expected.dtype != target.y.dtype:
        raise ConversionError(
            f"{source.stage.name!r}",
            "output",
            list(target.y.shape),
            f"the source gives {list(expected.shape)}",
            "report this",
        )
    real = expected.is_floating_point()
    difference = float((expected.double() - target.y.detach().double()).abs().max())
    forward, reason = "exact", ""
    if not equal_bits(expected, target.y):
        within = real and _within_bound(source.stage, target, expected)
        forward = "rounding" if within else "approximate"
        reason = (
            "time is folded into the batch: sums in another order" if within else f"differs by up to {difference:.2g}"
        )
    gradient, error = "", 0.0
    if grad and real:
        error = gradients.stateless_error(source.stage, target)
        exact = all(map(equal_bits, source.grad.xs, target.grad.xs))
        exact = exact and all(
            equal_bits(source.grad.parameters[n], target.grad.parameters[n]) for n in source.grad.parameters
        )
        gradient = "exact" if exact else "rounding" if error <= gradients.tolerance(target) else "differs"
    lost = grad and overflowed(source)
    if lost:
        reason = "; ".join(filter(None, (reason, _LOST)))
    if training:
        batch = isinstance(source.stage.inner, known.BATCH_NORM) and not source.stage.adapter.STEPPED
        reason = "; ".join(filter(None, (reason, known.TRAINING, known.FOLDED_STATISTICS if batch else "")))
    return LayerRow(
        name=source.stage.name,
        source=_named(source.stage),
        target=_named(target.stage),
        neuron=False,
        forward=forward,
        gradient=gradient,
        reason=reason,
        gradient_error=error,
        max_output_difference=difference,
        unexpected=gradient == "differs" and not lost,
    )


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return tuple(map(_detached, value)) if isinstance(value, tuple) else value


def _within_bound(stage: Stage, target: Observed, expected: Tensor) -> bool:
    if len(target.xs) > 1:
        return False
    bound = known.rounding_bound(stage.inner, target.x.detach().flatten(0, 1), expected)
    off = (expected - target.y).detach().double().abs().flatten(0, 1)
    return bound is not None and bool((off <= bound).all())


def _named(stage: Stage) -> str:
    """A stage's class, or the function that it calls."""
    if isinstance(stage.inner, Function):
        target = stage.inner.node.target
        return str(getattr(target, "__name__", target))
    return describe(stage.held)


def rows(
    source: Network,
    target: Network,
    x: Any,
    notes: dict[str, Sequence[Note]],
    grad: bool,
    modal: frozenset[int] = frozenset(),
) -> tuple[LayerRow, ...]:
    """Run both on an input as `Network.enter` takes it, and judge every layer.

    The networks' states are changed: see `network.preserved`.
    """
    xs = source.enter(x)
    seen, outputs, weighting = finite(source, xs, grad)
    try:
        made, results = observe(target, target.enter(x), grad, weighting)
    except RuntimeError as error:
        raise ConversionError(
            "''",
            "dtype",
            xs[0].dtype,
            f"the source runs on this input, the target does not ({error})",
            "a float32 network and sample, where the dtypes of spikes and membranes clash",
        ) from error
    shown = {place.name for place in source.places() if isinstance(place, State)}
    check_walk(source, x, outputs)
    check_walk(target, x, results)
    return tuple(
        judge_neuron(s, t, notes.get(s.stage.name, ()), grad, s.stage.result.name in shown, weighting.steps)
        if s.stage.neuron
        else judge_stateless(s, t, grad, source.takes_input(s.stage), training=id(s.stage.inner) in modal)
        for s, t in zip(seen, made, strict=True)
    )
