"""The gradient verdict of a layer: its gradients against the oracle's; of a stateless one against the source's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracetorch import oracle
from tracetorch.adapters.base import Note, shaped
from tracetorch.adapters.feedback import Feedback
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks import recurrent
from tracetorch.adapters.networks.network import Function, Stage
from tracetorch.adapters.observing import (
    Observed,
    differentiable,
    equal_bits,
    numpy_of,
    through_state,
)
from tracetorch.core.spec import NeuronSpec, Parameter

# Gradients are sums over time, batch and positions of terms that each round, in any order: the error of a sum of n
# terms grows as sqrt(n) roundoffs, on top of that of the terms themselves. The largest error seen for agreeing layers
# is 3e-5 in float32, of a convolution with 10^6 terms; what a wrong reset path or surrogate does is of order 1.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def _gradient_spec(source: NeuronSpec, target: NeuronSpec) -> NeuronSpec:
    """The source's semantics with the target's raw forms: the chain rule through what the target trains."""
    values = {}
    for name, parameter in source.parameters.items():
        own = target.parameters.get(name)
        values[name] = parameter if own is None else Parameter(own.value, parameter.learnable, own.raw)
    clock = {} if target.dt is None else {"dt": target.dt, "time_unit": target.time_unit}
    return source.replace(parameters=values, **clock)


@dataclass(frozen=True)
class GradientVerdict:
    """Of a layer: the word of the report, the largest error of a tensor, and what to say of it.

    Attributes:
        void: whether it is "differs" only for errors that the precision of the gradients explains.
    """

    verdict: str
    error: float
    said: str = ""
    void: bool = False


def _bound(bounds: Callable[[], dict[str, np.ndarray]], name: str) -> np.ndarray:
    """Of one tensor; 0 where none was derived: then the tolerance alone judges."""
    return bounds().get(name, np.zeros(()))


def _judged(source: Observed, target: Observed) -> dict[str, oracle.GradientJudgement]:
    """Each tensor against the oracle's gradient along the target's own trajectory."""
    spec, recording, weights = _gradient_spec(source.spec, target.spec), target.recording(), numpy_of(target.grad.y)
    inner = source.stage.inner
    back = Feedback(inner, target.stage.inner, target.y) if recurrent.is_recurrent(inner) else None
    truth = oracle.gradients(spec, recording, weights, None if back is None else back.backward)

    @cache
    def bounds() -> dict[str, np.ndarray]:
        if back is None:
            return oracle.gradient_bounds(spec, recording, weights)
        if not back.bounded:
            return {}
        found = oracle.gradient_bounds(spec, recording, weights, (back.backward, back.magnitudes))
        return found and found | back.parameter_bounds(truth["x"], found["x"], target.y.dtype)

    if back is not None:
        truth = {**truth, **back.parameters(truth["x"])}
    found = {"x": target.grad.x, **target.grad.parameters}
    return {
        "input" if name == "x" else name: oracle.judge_gradient(
            numpy_of(shaped(gradient, torch.from_numpy(truth[name]))),
            truth[name],
            tolerance(target),
            partial(_bound, bounds, name),
        )
        for name, gradient in found.items()
        if name in truth
    }


def of_neuron(source: Observed, target: Observed, alone: Observed, notes: Sequence[Note]) -> GradientVerdict:
    """The verdict of a neuron layer.

    Args:
        alone: the target's layer on what the source's received.
        notes: what its build said.
    """
    judged = _judged(source, target)
    worst = max(judged, key=lambda name: (not (judged[name].ok or judged[name].void), judged[name].error))
    error = judged[worst].error
    weak = [name for name, one in judged.items() if one.ill_conditioned and name != worst]
    measured = "; ".join(f"gradient of {name}: {judged[name]}" for name in (worst, *weak))
    promised = {note.gradient for note in notes}
    if "differs" in promised:
        return GradientVerdict("differs", error, measured)
    same = source.grad.parameters.keys() == alone.grad.parameters.keys() and equal_bits(source.grad.x, alone.grad.x)
    theirs = alone.grad.parameters
    same = same and all(equal_bits(shaped(g, theirs[name]), theirs[name]) for name, g in source.grad.parameters.items())
    if same and not promised & {"reparametrised", "opaque"}:
        return GradientVerdict("exact", error, _of_the_source(judged[worst], measured))
    if not all(one.ok or one.void for one in judged.values()):
        return GradientVerdict("differs", error, f"{measured}, measured")
    if not all(one.ok for one in judged.values()):
        return GradientVerdict("differs", error, measured, void=True)
    # The oracle took the user's own surrogate as it is: nobody knows what it should be.
    verdict = next((word for word in ("opaque", "reparametrised") if word in promised), "rounding")
    return GradientVerdict(verdict, error, measured)


def _of_the_source(worst: oracle.GradientJudgement, measured: str) -> str:
    """What to say of a gradient that has the source's own bits."""
    if worst.ok or worst.void:
        return measured if worst.ill_conditioned else ""
    return f"{measured}: the source's own gradient departs from its spec: please report this"


def tolerance(o: Observed) -> float:
    # The gradient of a float32 spike is float32, whatever the precision of the membrane; so are snnTorch's, which a
    # graded_spikes_factor per neuron in float64 scales.
    spikes = isinstance(o.spec, NeuronSpec) and o.spec.output == "spikes" and o.spec.form.startswith("snntorch.")
    dtype = torch.float32 if spikes else o.y.dtype
    return float(GRADIENT_TOLERANCE[dtype] + torch.finfo(dtype).eps * o.y.numel() ** 0.5)


def through_membrane(source: Observed, target: Observed) -> GradientVerdict:
    """The verdict of the gradient through the membrane, on what the target received."""
    scale = 2.0**-40 if not bool(target.x.isfinite().all()) else 1.0
    truth, found = (through_state(o, target.x, scale) for o in (source, target))
    names = {"input": "input", **_twins(source.stage, target.stage)}
    pairs = [(truth[name], found[ours]) for name, ours in names.items() if name in truth and ours in found]
    if all(equal_bits(theirs, ours) for theirs, ours in pairs):
        return GradientVerdict("exact", 0.0)
    error = max(oracle.gradient_error(numpy_of(ours), numpy_of(theirs)) for theirs, ours in pairs)
    said = f"gradient through the membrane: error {error:.1g}"
    if error <= tolerance(target):
        return GradientVerdict("rounding", error, said)
    return GradientVerdict("differs", error, f"{said}, measured")


def _twins(source: Stage, target: Stage) -> dict[str, str]:
    """The parameters of both with the same raw form, by their names."""
    raws = [{name: p.raw for name, p in stage.spec().parameters.items()} for stage in (source, target)]
    return {name: name for name, raw in raws[0].items() if raws[1].get(name) == raw}


def worse(a: GradientVerdict, b: GradientVerdict) -> GradientVerdict:
    """The worse of two verdicts, with what is to be said of both."""
    order = ("exact", "rounding", "reparametrised", "opaque", "differs", "none")
    word = max(a.verdict, b.verdict, key=order.index)
    void = all(one.void for one in (a, b) if one.verdict == word)
    return GradientVerdict(word, max(a.error, b.error), "; ".join(filter(None, (a.said, b.said))), void)


def stateless_error(source: Stage, target: Observed) -> float:
    """The target's gradients against the source module's, in float64, on what the target received."""
    module = copy.deepcopy(source.inner).double()
    xs = [_double(x) for x in target.xs]
    named = {name: p for name, p in module.named_parameters() if name in target.grad.parameters}
    with torch.enable_grad():
        if isinstance(module, Function) or len(xs) > 1:
            y = known.per_step(module, *xs)
        else:
            y = module(xs[0].flatten(0, 1).clone()).unflatten(0, xs[0].shape[:2])  # it may write into what it is given
        wanted = [*differentiable(xs), *named.values()]
        if not wanted or not y.requires_grad:  # one of several results is taken; a comparison, whose result has none
            return 0.0
        truth = torch.autograd.grad(y, wanted, target.grad.y.double(), allow_unused=True)
    found = [*target.grad.xs, *(target.grad.parameters[name] for name in named)]
    pairs = list(zip(found, truth, strict=True))
    return max((oracle.gradient_error(numpy_of(g), numpy_of(t)) for g, t in pairs if t is not None), default=0.0)


def _double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    if isinstance(value, known.Constant):
        return known.Constant(_double(value.tensor)) if isinstance(value.tensor, Tensor) else value
    return value.detach().double().requires_grad_() if value.is_floating_point() else value
