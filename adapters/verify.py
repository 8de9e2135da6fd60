"""Measuring a conversion: both networks run, every layer judged by the oracle on the inputs that it really received."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracetorch import oracle
from tracetorch.adapters import modules as known
from tracetorch.adapters.base import ConversionError, Note, describe, parameters
from tracetorch.adapters.network import Network, Stage
from tracetorch.adapters.report import LayerRow
from tracetorch.core.spec import NeuronSpec, Parameter

# Gradients are sums over time, batch and positions of terms that each round, in any order: the error of a sum of n
# terms grows as sqrt(n) roundoffs, on top of that of the terms themselves. The largest error seen for agreeing layers
# is 3e-5 in float32, of a convolution with 10^6 terms; what a wrong reset path or surrogate does is of order 1.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

# Gradients are linear in the gradient of the output. Where a reset that keeps its gradient lets them grow beyond the
# float32 range over time, a smaller one is tried, in this order; powers of two change no other bit.
COTANGENT_SCALES = (1.0, 2.0**-40, 2.0**-80)
_LOST = "the source's own gradient overflows on this input: it shows nothing of gradients"


@dataclass(frozen=True)
class Gradients:
    """Of one stage: of its input and output [T, B, ...], and of its trainable parameters by name."""

    x: Tensor
    y: Tensor
    parameters: dict[str, Tensor]


@dataclass
class Observed:
    """What one stage received and did, [T, B, ...]. `spec` is None for a stateless module, `grad` if not asked for."""

    stage: Stage
    x: Tensor
    y: Tensor
    states: dict[str, Tensor]
    spec: Any
    grad: Any = None

    def recording(self) -> oracle.Recording:
        """For the oracle."""
        states = {name: _numpy(state) for name, state in self.states.items()}
        return oracle.Recording(_numpy(self.x), _numpy(self.y), states, self.spec)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _trainable(stage: Stage) -> dict[str, Tensor]:
    named = parameters(stage.adapter, stage.inner) if stage.neuron else dict(stage.inner.named_parameters())
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def _cotangent(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)


def observe(network: Network, xs: Tensor, grad: bool, scale: float = 1.0) -> list[Observed]:
    """Run a network stage by stage over [T, B, ...], and backward from a fixed random gradient of its output."""
    xs = xs.detach().clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        seen = [
            Observed(stage, x, y, states, stage.spec() if stage.neuron else None)
            for stage, x, y, states in network.chain(xs)
        ]
    if grad:
        _differentiate(seen, _cotangent(seen[-1].y) * scale)
    return seen


def _differentiate(seen: Sequence[Observed], cotangent: Tensor) -> None:
    """Fill in the gradients: of every stage's input and output, and of its trainable parameters."""
    trainable = [_trainable(o.stage) for o in seen]
    uses = Counter(id(tensor) for named in trainable for tensor in named.values())
    # The gradient of a parameter that several layers share is a sum over them, which no layer can be judged by.
    trainable = [{name: t for name, t in named.items() if uses[id(t)] == 1} for named in trainable]
    wanted = [o.x for o in seen] + [t for named in trainable for t in named.values()]
    wanted_with_path = [tensor for tensor in wanted if tensor.requires_grad]
    found: dict[int, Tensor | None] = {}
    if seen[-1].y.requires_grad:
        gradients = torch.autograd.grad(seen[-1].y, wanted_with_path, cotangent, allow_unused=True)
        found = {id(tensor): gradient for tensor, gradient in zip(wanted_with_path, gradients, strict=True)}

    def of(tensor: Tensor) -> Tensor:
        gradient = found.get(id(tensor))
        return torch.zeros_like(tensor) if gradient is None else gradient

    for k, o in enumerate(seen):
        grad_y = cotangent if k + 1 == len(seen) else of(seen[k + 1].x)
        o.grad = Gradients(of(o.x), grad_y, {name: of(tensor) for name, tensor in trainable[k].items()})


def _overflowed(o: Observed) -> bool:
    gradients = [o.grad.x, o.grad.y, *o.grad.parameters.values()]
    return bool(o.y.isfinite().all()) and not all(bool(g.isfinite().all()) for g in gradients)


def _finite(network: Network, xs: Tensor, grad: bool) -> tuple[list[Observed], float]:
    """The source observed, and the first scale with which none of its gradients overflows (or the last one tried)."""
    for scale in COTANGENT_SCALES:
        seen = observe(network, xs, grad, scale)
        if not grad or not any(map(_overflowed, seen)):
            break
    return seen, scale


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return oracle.same_bits(_numpy(a), _numpy(b))


def _alone(target: Observed, source: Observed, grad: bool) -> Observed:
    """The target's layer alone, on what the source's layer received."""
    x = source.x.detach().clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y, states = target.stage.adapter.trace(target.stage.inner, x)
    alone = Observed(target.stage, x, y, states, target.spec)
    if grad:
        _differentiate([alone], source.grad.y.to(y.dtype))
    return alone


def _canonical_membrane(o: Observed) -> np.ndarray:
    _, _, v = oracle.trajectory(o.spec, o.recording())
    return v


def _state_difference(source: Observed, alone: Observed) -> float:
    """Largest difference of the membranes after their reset, up to and without the first mismatch of each neuron."""
    differ = np.logical_or.accumulate(_numpy(source.y) != _numpy(alone.y), axis=0)
    if source.spec.stores_before_reset == alone.spec.stores_before_reset:
        membranes = [_numpy(o.states["v_mem"]).astype(np.float64) for o in (source, alone)]
    else:
        membranes = [_canonical_membrane(o) for o in (source, alone)]
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
        return all(_equal_bits(source.states[name], alone.states[name]) for name in source.states)
    # Numbers, not bits: a reset to 0 by multiplication may leave -0.0.
    return bool(np.array_equal(_canonical_membrane(source), _canonical_membrane(alone), equal_nan=True))


def _gradient_spec(source: NeuronSpec, target: NeuronSpec) -> NeuronSpec:
    """The source's semantics with the target's raw forms: the chain rule through what the target trains."""
    values = {}
    for name, parameter in source.parameters.items():
        own = target.parameters.get(name)
        values[name] = parameter if own is None else Parameter(own.value, parameter.learnable, own.raw)
    return source.replace(parameters=values)


def _gradient_errors(source: Observed, target: Observed) -> dict[str, float]:
    """Each tensor's error against the oracle's gradient along the target's own trajectory."""
    truth = oracle.gradients(_gradient_spec(source.spec, target.spec), target.recording(), _numpy(target.grad.y))
    errors = {"input": oracle.gradient_error(_numpy(target.grad.x), truth["x"])}
    for name, gradient in target.grad.parameters.items():
        if name in truth:
            errors[name] = oracle.gradient_error(_numpy(gradient), truth[name])
    return errors


def _neuron_gradient(
    source: Observed, target: Observed, alone: Observed, notes: Sequence[Note]
) -> tuple[str, float, str]:
    """Verdict, error and what to say of it."""
    errors = _gradient_errors(source, target)
    worst = max(errors, key=lambda name: errors[name])
    error = errors[worst]
    measured = f"gradient of {worst}: error {error:.1g}"
    promised = {note.gradient for note in notes}
    if "differs" in promised:
        return "differs", error, measured
    same = source.grad.parameters.keys() == alone.grad.parameters.keys() and _equal_bits(source.grad.x, alone.grad.x)
    same = same and all(_equal_bits(g, alone.grad.parameters[name]) for name, g in source.grad.parameters.items())
    if same and "reparametrised" not in promised:
        return "exact", error, ""
    if error > _tolerance(target):
        return "differs", error, f"{measured}, measured"
    return ("reparametrised" if "reparametrised" in promised else "rounding"), error, measured


def _tolerance(o: Observed) -> float:
    # The gradient of a float32 spike is float32, whatever the precision of the membrane.
    dtype = o.y.dtype
    return float(GRADIENT_TOLERANCE[dtype] + torch.finfo(dtype).eps * o.y.numel() ** 0.5)


def _carried(source: Stage, target: Stage) -> tuple[str, ...]:
    theirs, ours = source.adapter.attributes(source.inner), target.adapter.attributes(target.inner)
    lines = []
    for name, attribute in theirs.items():
        if name in ours:
            learnable = ", learnable" if getattr(source.inner, attribute).requires_grad else ""
            lines.append(f"{attribute} -> {ours[name]}{learnable}")
    return tuple(lines)


def judge_neuron(source: Observed, target: Observed, notes: Sequence[Note], grad: bool) -> LayerRow:
    """The row of a neuron layer."""
    reasons = [f"{note.field}: {note.text}" for note in notes]
    own = oracle.judge(source.spec, source.recording())
    if not own.ok:
        reasons.append(f"the source itself departs from its spec at {own.first}: please report this")
    judged = oracle.judge(source.spec, target.recording())
    alone = _alone(target, source, grad)
    forward = "rounding"
    if not judged.ok or not own.ok or any(note.approximate for note in notes):
        forward = "approximate"
        reasons.append(
            f"{judged.unexplained} spikes and {judged.state_violations} states outside the rounding bound, "
            f"first at {judged.first}"
        )
    elif _equal_bits(source.y, alone.y) and _same_states(source, alone):
        forward = "exact"
    if source.spec.output == "spikes" and judged.spikes == 0:
        reasons.append("no spike in the sample: it shows nothing of spikes and resets")
    gradient, error, said = _neuron_gradient(source, target, alone, notes) if grad else ("", 0.0, "")
    mismatches = int((source.y != target.y).sum()) if source.spec.output == "spikes" else 0
    lost = grad and _overflowed(source)
    if lost:
        reasons.append(_LOST)
    return LayerRow(
        name=source.stage.name,
        source=describe(source.stage.inner),
        target=describe(target.stage.inner),
        neuron=True,
        forward=forward,
        gradient=gradient,
        reason="; ".join([*reasons, said] if said else reasons),
        carried=_carried(source.stage, target.stage),
        slots=judged.slots if source.spec.output == "spikes" else 0,
        spikes=judged.spikes,
        spike_mismatches=mismatches,
        unexplained_mismatches=judged.unexplained,
        state_violations=judged.state_violations,
        first_violation=judged.first,
        max_state_difference=_state_difference(source, alone),
        gradient_error=error,
        unexpected=gradient == "differs" and not lost and all(note.gradient != "differs" for note in notes),
    )


def _stateless_gradient_error(source: Stage, target: Observed) -> float:
    """The target's gradients against the source module's, in float64, on what the target received."""
    module = copy.deepcopy(source.inner).double()
    x = target.x.detach().double().flatten(0, 1).requires_grad_()
    named = {name: p for name, p in module.named_parameters() if name in target.grad.parameters}
    with torch.enable_grad():
        y = module(x)
        truth = torch.autograd.grad(y, [x, *named.values()], target.grad.y.double().flatten(0, 1), allow_unused=True)
    pairs = list(
        zip([target.grad.x.flatten(0, 1), *(target.grad.parameters[name] for name in named)], truth, strict=True)
    )
    return max(oracle.gradient_error(_numpy(g), _numpy(t)) for g, t in pairs if t is not None)


def judge_stateless(source: Observed, target: Observed, grad: bool, first: bool) -> LayerRow:
    """The row of a stateless module: the source's, called as the source calls it, on what the target received."""
    with torch.no_grad():
        expected = source.stage.apply(target.x.detach(), first)
    if expected.shape != target.y.shape or expected.dtype != target.y.dtype:
        raise ConversionError(
            f"{source.stage.name!r}",
            "output",
            list(target.y.shape),
            f"the source gives {list(expected.shape)}",
            "report this",
        )
    difference = float((expected - target.y.detach()).abs().max())
    forward, reason = "exact", ""
    if not _equal_bits(expected, target.y):
        flat = target.x.detach().flatten(0, 1)
        bound = known.rounding_bound(source.stage.inner, flat, expected)
        within = bound is not None and bool(
            ((expected - target.y).detach().double().abs().flatten(0, 1) <= bound).all()
        )
        forward = "rounding" if within else "approximate"
        reason = (
            "time is folded into the batch: sums in another order" if within else f"differs by up to {difference:.2g}"
        )
    gradient, error = "", 0.0
    if grad:
        error = _stateless_gradient_error(source.stage, target)
        exact = _equal_bits(source.grad.x, target.grad.x)
        exact = exact and all(
            _equal_bits(source.grad.parameters[n], target.grad.parameters[n]) for n in source.grad.parameters
        )
        gradient = "exact" if exact else "rounding" if error <= _tolerance(target) else "differs"
    lost = grad and _overflowed(source)
    if lost:
        reason = "; ".join(filter(None, (reason, _LOST)))
    return LayerRow(
        name=source.stage.name,
        source=describe(source.stage.held),
        target=describe(target.stage.held),
        neuron=False,
        forward=forward,
        gradient=gradient,
        reason=reason,
        gradient_error=error,
        max_output_difference=difference,
        unexpected=gradient == "differs" and not lost,
    )


def check_chain(network: Network, xs: Tensor, seen: Sequence[Observed]) -> None:
    """The network's own forward must give what its stages gave one by one, or nothing said of the stages holds for it.

    Raises:
        ConversionError: it does not.
    """
    with torch.no_grad():
        whole = network.forward(xs.detach())
    if not _equal_bits(whole, seen[-1].y):
        raise ConversionError(
            "''",
            "forward",
            type(network.root).__name__,
            "its own forward differs from that of its layers one by one",
            "remove what acts beside the layers, such as hooks",
        )


def rows(
    source: Network, target: Network, xs: Tensor, notes: dict[str, Sequence[Note]], grad: bool
) -> tuple[LayerRow, ...]:
    """Run both on [T, B, ...] and judge every layer. The networks' states are changed: see `network.preserved`."""
    seen, scale = _finite(source, xs, grad)
    try:
        made = observe(target, xs, grad, scale)
    except RuntimeError as error:
        raise ConversionError(
            "''",
            "dtype",
            xs.dtype,
            f"the source runs on this input, the target does not ({error})",
            "a float32 network and sample, where the dtypes of spikes and membranes clash",
        ) from error
    check_chain(source, xs, seen)
    check_chain(target, xs, made)
    return tuple(
        judge_neuron(s, t, notes.get(s.stage.name, ()), grad)
        if s.stage.neuron
        else judge_stateless(s, t, grad, first=k == 0)
        for k, (s, t) in enumerate(zip(seen, made, strict=True))
    )
