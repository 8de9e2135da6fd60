"""Running a network to judge it: what every layer received, gave and kept, and the gradients that reached it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracetorch import oracle
from tracetorch.adapters.base import ConversionError, parameters
from tracetorch.adapters.networks import recurrent
from tracetorch.adapters.networks.network import Network, Stage

# Gradients are linear in the gradient of the output. Where a reset that keeps its gradient lets them grow beyond the
# float32 range over time, a smaller one is tried, in this order; powers of two change no other bit.
COTANGENT_SCALES = (1.0, 2.0**-40, 2.0**-80)


@dataclass(frozen=True)
class Weighting:
    """The gradient of the outputs that gradients are judged by: random, of one scale, of the first `steps` steps.

    Where even the smallest scale overflows, the first steps still tell: what comes back from a step has as many steps
    to grow as lie before it.
    """

    scale: float = 1.0
    steps: int | None = None

    def of(self, y: Tensor, number: int) -> Tensor:
        """For output `number`, [T, ...]."""
        found = cotangent(y, number) * self.scale
        if self.steps is not None:
            found[self.steps :] = 0
        return found


def weightings(steps: int) -> Iterator[Weighting]:
    """Those to try, in this order, for that many steps."""
    yield from map(Weighting, COTANGENT_SCALES)
    for k in range(1, steps.bit_length()):
        yield Weighting(COTANGENT_SCALES[-1], steps >> k)


@dataclass(frozen=True)
class Gradients:
    """Of one stage: of its inputs and output [T, B, ...], and of its trainable parameters by name."""

    xs: tuple[Tensor, ...]
    y: Tensor
    parameters: dict[str, Tensor]

    @property
    def x(self) -> Tensor:
        """Of the only input, or of the first of several."""
        return self.xs[0]


@dataclass
class Observed:
    """What one stage received and did, [T, B, ...]. `spec` is None for a stateless module, `grad` if not asked for."""

    stage: Stage
    xs: tuple[Any, ...]
    y: Tensor
    states: dict[str, Tensor]
    spec: Any
    grad: Any = None

    @property
    def x(self) -> Tensor:
        """The only input, or the first of several."""
        found: Tensor = next(x for x in self.xs if isinstance(x, Tensor))
        return found

    def recording(self) -> oracle.Recording:
        """For the oracle."""
        states = {name: numpy_of(state) for name, state in self.states.items() if name not in ("drive", "feedback")}
        if "drive" not in self.states:
            return oracle.Recording(numpy_of(self.x), numpy_of(self.y), states, self.spec)
        # A recurrent layer's neuron received its input and what came back of its spikes.
        terms = np.abs(numpy_of(self.x)) + np.abs(numpy_of(self.states["feedback"]))
        return oracle.Recording(numpy_of(self.states["drive"]), numpy_of(self.y), states, self.spec, terms)


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def trainable(stage: Stage) -> dict[str, Tensor]:
    named = parameters(stage.adapter, stage.inner) if stage.neuron else dict(stage.inner.named_parameters())
    if stage.neuron and recurrent.is_recurrent(stage.inner):
        weights = recurrent.connection(stage.inner).named_parameters()
        named = {**named, **{f"connection.{name}": weight for name, weight in weights}}
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def cotangent(y: Tensor, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)


def differentiable(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def observe(
    network: Network, xs: Sequence[Tensor], grad: bool, weighting: Weighting = Weighting()
) -> tuple[list[Observed], tuple[Tensor, ...]]:
    """Run a network stage by stage over [T, B, ...], and backward from a fixed random gradient of its outputs."""
    xs = [x.detach().clone().requires_grad_(grad) for x in xs]
    with torch.set_grad_enabled(grad):
        walked, outputs = network.walk(*xs)
        seen = [
            Observed(one.stage, one.xs, one.y, one.states, one.stage.spec() if one.stage.neuron else None)
            for one in walked
            if isinstance(one.y, Tensor)
        ]
    if grad:
        aside = [tensor for tensor in network.constants.values() if isinstance(tensor, Tensor)]
        differentiate(seen, differentiable(outputs), weighting, aside=aside)
    return seen, outputs


def differentiate(
    seen: Sequence[Observed],
    outputs: Sequence[Tensor],
    weighting: Weighting = Weighting(),
    given: Sequence[Tensor] = (),
    aside: Sequence[Tensor] = (),
) -> None:
    """Fill in the gradients: of every stage's inputs and output, and of its trainable parameters.

    `aside`: parameters that the network uses beside its layers.
    """
    learnt = [trainable(o.stage) for o in seen]
    # The gradient of a parameter that several layers share is a sum over them, which no layer can be judged by.
    uses = Counter(id(tensor) for tensor in [*aside, *(t for named in learnt for t in named.values())])
    learnt = [{name: t for name, t in named.items() if uses[id(t)] == 1} for named in learnt]
    wanted = [x for o in seen for x in (*differentiable(o.xs), o.y)]
    wanted += [t for named in learnt for t in named.values()]
    wanted_with_path = list({id(tensor): tensor for tensor in wanted if tensor.requires_grad}.values())
    found: dict[int, Tensor | None] = {}
    cotangents = list(given) or [weighting.of(y, k) for k, y in enumerate(outputs)]
    roots = [(y, cotangent) for y, cotangent in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if roots:
        ends, weights = zip(*roots, strict=True)
        gradients = torch.autograd.grad(ends, wanted_with_path, weights, allow_unused=True)
        found = {id(tensor): gradient for tensor, gradient in zip(wanted_with_path, gradients, strict=True)}

    def of(tensor: Tensor) -> Tensor:
        gradient = found.get(id(tensor))
        return torch.zeros_like(tensor) if gradient is None else gradient

    for k, o in enumerate(seen):
        y = of(o.y)
        if not o.y.requires_grad:  # nothing to train before it: the gradient that reaches it is still known
            y = next((c for c, end in zip(cotangents, outputs, strict=True) if end is o.y), y)
        o.grad = Gradients(
            tuple(map(of, differentiable(o.xs))), y, {name: of(tensor) for name, tensor in learnt[k].items()}
        )


# Far enough below the range of float32 that nothing on the way to a gradient left it.
_LARGEST = 1e30


def overflowed(o: Observed) -> bool:
    """Whether a gradient is not finite though what the layer gave is."""
    return _above(o, float("inf"))


def _above(o: Observed, largest: float) -> bool:
    gradients = differentiable([*o.grad.xs, o.grad.y, *o.grad.parameters.values()])
    return bool(o.y.isfinite().all()) and not all(bool((g.abs() < largest).all()) for g in gradients)


def finite(network: Network, xs: Sequence[Tensor], grad: bool) -> tuple[list[Observed], tuple[Tensor, ...], Weighting]:
    """The source observed, and the first weighting with which its gradients do not near an overflow (or the last)."""
    for weighting in weightings(len(xs[0])):
        seen, outputs = observe(network, xs, grad, weighting)
        if not grad or not any(_above(o, _LARGEST) for o in seen):
            break
    return seen, outputs, weighting


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return oracle.same_bits(numpy_of(a), numpy_of(b))


def run_alone(o: Observed, x: Tensor, cotangent: Tensor | None) -> Observed:
    """A layer alone, on an input; with the gradient of its output, if that is given."""
    x = x.detach().clone().requires_grad_(cotangent is not None)
    with torch.set_grad_enabled(cotangent is not None):
        y, states = o.stage.adapter.trace(o.stage.inner, x)
    alone = Observed(o.stage, (x,), y, states, o.spec)
    if cotangent is not None:
        differentiate([alone], [y], given=[cotangent.to(y.dtype)])
    return alone


def through_state(o: Observed, x: Tensor, scale: float) -> dict[str, Tensor]:
    """Gradients of a layer alone from a fixed random gradient of the membranes of all steps."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y, states = o.stage.adapter.trace(o.stage.inner, x)
        membrane = o.stage.membrane(y, states)
    named = {"input": x, **trainable(o.stage)}
    found = torch.autograd.grad(membrane, list(named.values()), cotangent(membrane) * scale, allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(named.items(), found, strict=True)}


def canonical_membrane(o: Observed) -> np.ndarray:
    _, _, v = oracle.trajectory(o.spec, o.recording())
    return v


def check_walk(network: Network, x: Any, outputs: Sequence[Tensor]) -> None:
    """The network's own forward must give what its stages gave one by one, or nothing said of the stages holds for it.

    Raises:
        ConversionError: it does not.
    """
    with torch.no_grad():
        whole = network.own(x)
        shown = network.shown([y.detach() for y in outputs])
    if len(whole) != len(shown) or not all(map(equal_bits, whole, shown)):
        raise ConversionError(
            "''",
            "forward",
            type(network.root).__name__,
            "its own forward differs from that of its layers one by one",
            "remove what acts beside the layers, such as hooks",
        )
