"""The gradient verdict of a layer: its gradients against the oracle's, or against the source layer's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tracetorch import oracle
from tracetorch.adapters.base import Note
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks.network import Function, Stage
from tracetorch.adapters.observing import (
    Observed,
    differentiable,
    equal_bits,
    numpy_of,
    run_alone,
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


def _gradient_errors(source: Observed, target: Observed) -> dict[str, float]:
    """Each tensor's error against the oracle's gradient along the target's own trajectory."""
    truth = oracle.gradients(_gradient_spec(source.spec, target.spec), target.recording(), numpy_of(target.grad.y))
    errors = {"input": oracle.gradient_error(numpy_of(target.grad.x), truth["x"])}
    for name, gradient in target.grad.parameters.items():
        if name in truth:
            errors[name] = oracle.gradient_error(numpy_of(gradient), truth[name])
    return errors


def of_neuron(source: Observed, target: Observed, alone: Observed, notes: Sequence[Note]) -> tuple[str, float, str]:
    """Verdict, error and what to say of it."""
    errors = _gradient_errors(source, target)
    worst = max(errors, key=lambda name: errors[name])
    error = errors[worst]
    measured = f"gradient of {worst}: error {error:.1g}"
    promised = {note.gradient for note in notes}
    if "differs" in promised:
        return "differs", error, measured
    same = source.grad.parameters.keys() == alone.grad.parameters.keys() and equal_bits(source.grad.x, alone.grad.x)
    same = same and all(equal_bits(g, alone.grad.parameters[name]) for name, g in source.grad.parameters.items())
    if same and not promised & {"reparametrised", "opaque"}:
        return "exact", error, ""
    if error > tolerance(target):
        return "differs", error, f"{measured}, measured"
    # The oracle took the user's own surrogate as it is: nobody knows what it should be.
    verdict = next((word for word in ("opaque", "reparametrised") if word in promised), "rounding")
    return verdict, error, measured


def tolerance(o: Observed) -> float:
    # The gradient of a float32 spike is float32, whatever the precision of the membrane.
    dtype = o.y.dtype
    return float(GRADIENT_TOLERANCE[dtype] + torch.finfo(dtype).eps * o.y.numel() ** 0.5)


def through_membrane(source: Observed, target: Observed) -> tuple[str, float, str]:
    """Verdict, error and what to say of the gradient through the membrane, on what the target received."""
    scale = 2.0**-40 if not bool(target.x.isfinite().all()) else 1.0
    truth, found = (through_state(o, target.x, scale) for o in (source, target))
    names = {"input": "input", **_twins(source.stage, target.stage)}
    pairs = [(truth[name], found[ours]) for name, ours in names.items() if name in truth and ours in found]
    if all(equal_bits(theirs, ours) for theirs, ours in pairs):
        return "exact", 0.0, ""
    error = max(oracle.gradient_error(numpy_of(ours), numpy_of(theirs)) for theirs, ours in pairs)
    said = f"gradient through the membrane: error {error:.1g}"
    return ("rounding", error, said) if error <= tolerance(target) else ("differs", error, f"{said}, measured")


def of_recurrent(source: Observed, target: Observed, notes: Sequence[Note]) -> tuple[str, float, str]:
    """Verdict of a recurrent layer: its gradients against the source layer's own, on what the target received."""
    truth = run_alone(source, target.x, target.grad.y).grad
    found = run_alone(target, target.x, target.grad.y).grad
    names = {**_twins(source.stage, target.stage), **{n: n for n in truth.parameters if n.startswith("connection.")}}
    pairs = [(truth.x, found.x)]
    pairs += [(truth.parameters[n], found.parameters[m]) for n, m in names.items() if n in truth.parameters]
    promised = {note.gradient for note in notes}
    error = max(oracle.gradient_error(numpy_of(ours), numpy_of(theirs)) for theirs, ours in pairs)
    said = f"gradient against the source's own: error {error:.1g}"
    if "differs" in promised or error > tolerance(target):
        return "differs", error, said
    for word in ("opaque", "reparametrised"):
        if word in promised:
            return word, error, said
    return ("exact", error, "") if all(equal_bits(a, b) for a, b in pairs) else ("rounding", error, said)


def _twins(source: Stage, target: Stage) -> dict[str, str]:
    """The parameters of both with the same raw form, by their names."""
    raws = [{name: p.raw for name, p in stage.spec().parameters.items()} for stage in (source, target)]
    return {name: name for name, raw in raws[0].items() if raws[1].get(name) == raw}


def worse(a: tuple[str, float, str], b: tuple[str, float, str]) -> tuple[str, float, str]:
    """The worse of two verdicts, with what is to be said of both."""
    order = ("exact", "rounding", "reparametrised", "opaque", "differs", "none")
    said = "; ".join(filter(None, (a[2], b[2])))
    return max(a[0], b[0], key=order.index), max(a[1], b[1]), said


def stateless_error(source: Stage, target: Observed) -> float:
    """The target's gradients against the source module's, in float64, on what the target received."""
    module = copy.deepcopy(source.inner).double()
    xs = [_double(x) for x in target.xs]
    named = {name: p for name, p in module.named_parameters() if name in target.grad.parameters}
    with torch.enable_grad():
        if isinstance(module, Function) or len(xs) > 1:
            y = known.per_step(module, *xs)
        else:
            y = module(xs[0].flatten(0, 1)).unflatten(0, xs[0].shape[:2])
        wanted = [*differentiable(xs), *named.values()]
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
