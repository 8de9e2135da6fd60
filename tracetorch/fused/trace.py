"""Tracing a step, and its vector-Jacobian product, into a pointwise graph.

The step runs once on small tensors under a `TorchDispatchMode` that sees every aten operation after autograd, so that
custom autograd Functions are seen through and the backward pass is recorded like the forward. Tensors are tracked by
identity: an operation on a tracked tensor becomes a node, an operation without one just runs, and its result is a
constant. A tensor that was there before and is not declared, a branch on a tensor's value, and anything that is not
pointwise are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tracetorch.core import saved_hooks
from tracetorch.fused import operations
from tracetorch.fused.graph import Graph, GraphError
from tracetorch.fused.precision import refuse_rounding
from tracetorch.fused.tracer import Tracer
from tracetorch.fused.untraceable import called, no_other_chance


@dataclass(frozen=True)
class Traced:
    """A traced step.

    Attributes:
        forward: inputs, states, parameters -> outputs, and each state after the step, by its name with a prime.
        vjp: the inputs of `forward` and the gradients `d_<output>`, `d_<state>'` -> `d_<input>` for each of `wanted`.
    """

    forward: Graph
    vjp: Graph | None


StepFunction = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


def trace(
    step: StepFunction,
    inputs: Mapping[str, Tensor],
    states: Sequence[str],
    wanted: Sequence[str] = (),
    carried: Sequence[str] = (),
    constants: Sequence[Tensor] = (),
    outputs: Sequence[str] = ("output",),
    draws: Sequence[str] = (),
) -> Traced:
    """Trace a step.

    Args:
        step: takes the inputs by name, returns the outputs and the new states.
        inputs: examples, all of one shape, parameters expanded to it: every tensor that the step reads. Where nothing
            is `wanted`, some may have no dimension, which is what torch takes an operation's dtype by.
        states: names of the states among them, in the order in which the step returns them.
        wanted: names of the inputs whose gradients the vector-Jacobian product shall give; none: no product.
        carried: those of them that are parameters: the product takes their gradient from the later steps, `d_<name>'`,
            and adds to it as autograd does over a loop, one term after the other.
        constants: tensors that the step reads besides the inputs, and whose values may stand in the graph.
        outputs: names for what the step returns before the states.
        draws: names of the inputs that stand for the random numbers that the step draws, in the order of drawing.

    Raises:
        GraphError: the step is not pointwise, reads what was not declared, or branches on a tensor's value.
    """
    shapes = {tuple(tensor.shape) for tensor in inputs.values() if wanted or tensor.ndim}
    if len(shapes) != 1:
        raise GraphError(f"inputs of different shapes: {sorted(shapes)}; expand them")
    if torch.is_inference_mode_enabled():  # in which torch shows a tracer operations that it else takes apart
        with torch.inference_mode(False):
            return trace(step, inputs, states, wanted, carried, constants, outputs, draws)
    leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in inputs.items()}
    names = [*outputs, *(f"{name}'" for name in states)]
    forward = _trace_forward(step, leaves, names, constants, draws)
    _check_dtypes(forward, states)
    if not wanted:
        return Traced(forward, None)

    def with_parameters(given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [*step(given), *(given[name] for name in carried)]

    carried_names = [*names, *(f"{name}'" for name in carried)]
    return Traced(forward, _trace_vjp(with_parameters, leaves, carried_names, wanted, constants, draws))


def _check_dtypes(graph: Graph, states: Sequence[str]) -> None:
    """Raises `GraphError` unless a kernel can hold every value in the dtype that it has in torch."""
    results, given = dict(graph.outputs), dict(graph.inputs)
    for name in states:
        dtype = graph.dtype(results[f"{name}'"])
        if dtype is not given[name]:
            raise GraphError(f"the state {name} becomes {dtype} from {given[name]}")
    if all(dtype is torch.float64 for dtype in given.values()):
        refuse_rounding(graph, frozenset())


class _Draws(TorchDispatchMode):
    """Notes the draws of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in Tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in operations.DRAWS:
            self.names.append(f"{operations.DRAWS[func]} {len(self.names)}")
        return func(*args, **(kwargs or {}))


def name_draws(step: StepFunction, inputs: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A name, beginning with its kind in `operations.DRAWS`, for each draw of a step; torch's generator is advanced."""
    with torch.no_grad(), no_other_chance(), _Draws() as found:
        called(step, inputs)
    return tuple(found.names)


def _results(step: StepFunction, leaves: Mapping[str, Tensor], names: Sequence[str]) -> Sequence[Tensor]:
    results: Any = called(step, leaves)
    if isinstance(results, Tensor):
        raise GraphError(f"the step returned a tensor, expected a tuple of {len(names)}: {', '.join(names)}")
    if len(results) != len(names):
        raise GraphError(f"the step returned {len(results)} values, expected {len(names)}: {', '.join(names)}")
    return results


def _trace_forward(
    step: StepFunction,
    leaves: Mapping[str, Tensor],
    names: Sequence[str],
    constants: Sequence[Tensor],
    draws: Sequence[str],
) -> Graph:
    with Tracer(leaves, constants, draws) as tracer, tracer.value_reads(), no_other_chance(), torch.no_grad():
        results = _results(step, leaves, names)
    return tracer.graph(zip(names, results, strict=True))


def _vjp(results: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` with `allow_unused`.

    Quirk: that function (torch 2.13) imports sympy to check the shapes of given gradients, a quarter of a second of a
    process's start; here they are right by construction. Goes when the import does.
    """
    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward(
        tuple(results), tuple(grads), False, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )


def _trace_vjp(
    step: StepFunction,
    leaves: Mapping[str, Tensor],
    names: Sequence[str],
    wanted: Sequence[str],
    constants: Sequence[Tensor],
    draws: Sequence[str],
) -> Graph:
    with torch.no_grad():
        examples = _results(step, leaves, names)
    cotangents = {f"d_{name}": torch.ones_like(example) for name, example in zip(names, examples, strict=True)}
    # Tracing may happen inside a user's saved-tensor hooks (checkpointing counts what is saved): it saves past them.
    as_is = saved_hooks.past()
    tracer = Tracer({**leaves, **cotangents}, constants, draws)
    # Whoever looks for NaN by anomaly detection means the data, not the examples.
    plain = torch.autograd.set_detect_anomaly(False)
    with plain, tracer, tracer.value_reads(), no_other_chance(), torch.enable_grad(), as_is:
        results = _results(step, leaves, names)
        attached = [(r, g) for r, g in zip(results, cotangents.values(), strict=True) if r.requires_grad]
        gradients: Sequence[Any] = [None] * len(wanted)
        if attached:
            ends, grads = zip(*attached, strict=True)
            gradients = called(lambda given: _vjp(ends, [given[n] for n in wanted], grads), leaves)
        given = [torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(wanted, gradients, strict=True)]
    return tracer.graph((f"d_{name}", gradient) for name, gradient in zip(wanted, given, strict=True))
