"""Layers of snnTorch, sinabs and the house with options at random; what each becomes in every framework, judged.

Every layer is read, run over a stimulus, and judged by the oracle; then built in each framework, with callables of ours
and from stock parts alone, run over the same stimulus and judged by the source's own spec.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from tracetorch import oracle
from tracetorch.adapters.base import Building, ConversionError, parameters
from tracetorch.adapters.observing import COTANGENT_SCALES
from tracetorch.adapters.registry import adapter, adapter_of
from tracetorch.core.spec import Parameter

TARGETS = ("tracetorch", "sinabs", "snntorch")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def numpy(tensor):
    """As an array of its own."""
    return tensor.detach().contiguous().numpy()


@dataclass
class Seen:
    """What a layer did: its spec, a recording for the oracle, and its gradients by the names of the spec."""

    spec: object
    recording: oracle.Recording
    gradients: dict[str, np.ndarray]


def observe(layer, xs, cotangent):
    """Run a layer over [T, B, N] from its initial state, and backward from a fixed gradient of its output."""
    own = adapter_of(layer)
    xs = xs.detach().clone().requires_grad_()
    outputs, states = own.trace(layer, xs)
    spec = own.spec(layer)
    named = {name: tensor for name, tensor in parameters(own, layer).items() if tensor.requires_grad}
    wanted = [xs, *named.values()]
    found = [None] * len(wanted)
    if outputs.requires_grad:
        found = torch.autograd.grad(outputs, wanted, cotangent.to(outputs.dtype), allow_unused=True)
    gradients = {
        name: numpy(torch.zeros_like(t) if g is None else g)
        for name, t, g in zip(["x", *named], wanted, found, strict=True)
    }
    recording = oracle.Recording(numpy(xs), numpy(outputs), {n: numpy(s) for n, s in states.items()}, spec)
    return Seen(spec, recording, gradients)


def gradient_spec(source, target):
    """The source's semantics through what the target trains."""
    values = {}
    for name, parameter in source.parameters.items():
        own = target.parameters.get(name)
        values[name] = parameter if own is None else Parameter(own.value, parameter.learnable, own.raw)
    return source.replace(parameters=values)


def tolerance(xs):
    """Of sums of as many terms as there are neuron-steps."""
    return TOLERANCE[xs.dtype] + np.finfo(np.float32).eps * xs.numel() ** 0.5


@dataclass
class Found:
    """The tally of a grid."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, text):
        """Remember what should not be."""
        self.faults.append(text)


def check_gradients(found, label, source, seen, cotangent, xs, promised):
    """Each gradient is the oracle's along the target's own trajectory, or the build said that it differs.

    One whose precision explains more than the tolerance is judged by that, and counted.
    """
    spec, weights = gradient_spec(source, seen.spec), numpy(cotangent)
    truth = oracle.gradients(spec, seen.recording, weights)
    bounds = functools.cache(lambda: oracle.gradient_bounds(spec, seen.recording, weights))
    for name, gradient in seen.gradients.items():
        if name not in truth or "differs" in promised:
            continue
        own = functools.partial(lambda name: bounds().get(name, np.zeros(())), name)
        judged = oracle.judge_gradient(gradient, truth[name], tolerance(xs), own)
        found.counts["gradients"] += 1
        if judged.ill_conditioned:
            found.counts["gradients that show nothing" if judged.void else "ill-conditioned gradients"] += 1
        elif not judged.ok:
            found.fault(f"{label}: gradient of {name}: {judged}, and nothing was said of it\n{source}")


def check_source(found, layer, xs, cotangent):
    """The layer is what its spec says; returns what was seen."""
    seen = observe(layer, xs, cotangent)
    label = type(layer).__module__.split(".")[0] + "." + type(layer).__name__
    judged = oracle.judge(seen.spec, seen.recording)
    found.counts["layers"] += 1
    found.counts["neuron-steps"] += judged.slots
    found.counts["spikes"] += int(judged.spikes)
    found.counts["explained mismatches"] += judged.explained
    if not judged.ok:
        found.fault(f"{label} itself departs from its spec: {judged}\n{seen.spec}")
    check_gradients(found, label, seen.spec, seen, cotangent, xs, ())
    return seen


def check_target(found, source, to, stock, xs, cotangent):
    """Build the spec in a framework and judge it by the source's spec; a refusal must be complete."""
    label = f"{source.spec.form} -> {to}{' stock' if stock else ''}"
    building = Building("'neuron'", to, stock)
    try:
        target = adapter(to).build(source.spec, building)
    except ConversionError as error:
        found.counts[f"{label}: refused {error.field}"] += 1
        found.counts["refusals"] += 1
        if not (error.field and error.remedy and str(error.value)):
            found.fault(f"{label}: a refusal without field, value or remedy: {error}")
        return None
    seen = observe(target, xs, cotangent)
    found.counts["pairs"] += 1
    found.counts[f"{label}: built"] += 1
    judged = oracle.judge(source.spec, seen.recording)
    found.counts["explained mismatches"] += judged.explained
    if not judged.ok:
        found.fault(f"{label}: {judged}; notes {building.notes}\n{source.spec}\n{target}")
    promised = {note.gradient for note in building.notes}
    check_gradients(found, label, source.spec, seen, cotangent, xs, promised)
    if to == "tracetorch" and not stock:
        check_same_bits(found, source, seen, label)
    return target


def check_same_bits(found, source, seen, label):
    """A native layer has the bits of its source, but where the source itself has another order of operations."""
    same = source.recording.outputs.tobytes() == seen.recording.outputs.tobytes()
    for name, state in source.recording.states.items():
        same = same and state.tobytes() == seen.recording.states[name].tobytes()
    found.counts[f"{label}: {'same' if same else 'other'} bits"] += 1


def telling(layer, xs):
    """A fixed random gradient of the output for which the layer's own gradients do not overflow.

    They are linear in it. Where they grow over time by more than float32 holds, a smaller one is taken, then that of
    the first steps alone: what comes back from a step has as many steps to grow as lie before it.
    """
    plain = torch.randn(xs.shape, generator=torch.Generator().manual_seed(0), dtype=xs.dtype)
    ways = [(scale, len(xs)) for scale in COTANGENT_SCALES]
    ways += [(COTANGENT_SCALES[-1], len(xs) // 2**k) for k in range(1, len(xs).bit_length())]
    for scale, steps in ways:
        cotangent = plain * scale
        cotangent[steps:] = 0
        if all((np.abs(gradient) < 1e30).all() for gradient in observe(layer, xs, cotangent).gradients.values()):
            break
    return cotangent, steps


def check(found, layer, xs):
    """One layer, into every framework."""
    cotangent, steps = telling(layer, xs)
    found.counts["layers judged on the gradients of their first steps"] += steps < len(xs)
    source = check_source(found, layer, xs, cotangent)
    return {
        (to, stock): check_target(found, source, to, stock, xs, cotangent) for to in TARGETS for stock in (False, True)
    }
