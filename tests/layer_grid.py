"""Layers of snnTorch, sinabs and the house with options at random; what each becomes in every framework, judged.

Every layer is read, run over a stimulus, and judged by the oracle; then built in each framework, with callables of ours
and from stock parts alone, run over the same stimulus and judged by the source's own spec.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from tracetorch import oracle
from tracetorch.adapters.base import Building, ConversionError, parameters
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


def expected_gradients(source, target, seen, cotangent):
    """The oracle's, of the source's semantics through what the target trains, along the target's own trajectory."""
    values = {}
    for name, parameter in source.parameters.items():
        own = target.parameters.get(name)
        values[name] = parameter if own is None else Parameter(own.value, parameter.learnable, own.raw)
    return oracle.gradients(source.replace(parameters=values), seen.recording, numpy(cotangent))


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
    """Each gradient within the tolerance of the oracle's, unless the build said that it differs."""
    truth = expected_gradients(source, seen.spec, seen, cotangent)
    for name, gradient in seen.gradients.items():
        if name not in truth:
            continue
        finite = np.isfinite(gradient).all() and np.isfinite(truth[name]).all()
        if not finite or np.abs(truth[name]).max() > 1e30:
            found.counts["gradients not finite"] += 1
            continue
        error = oracle.gradient_error(gradient, truth[name])
        if error > tolerance(xs) and "differs" not in promised:
            found.fault(f"{label}: gradient of {name}: error {error:.2g}, and nothing was said of it\n{source}")


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


def check(found, layer, xs):
    """One layer, into every framework."""
    cotangent = torch.randn(xs.shape, generator=torch.Generator().manual_seed(0), dtype=xs.dtype)
    source = check_source(found, layer, xs, cotangent)
    return {
        (to, stock): check_target(found, source, to, stock, xs, cotangent) for to in TARGETS for stock in (False, True)
    }
