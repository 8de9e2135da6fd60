"""From a step function to its kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tracetorch.fused import compiler, kernel_c, launch_triton
from tracetorch.fused.graph import Graph, GraphError
from tracetorch.fused.kernel import CKernel, Kernel
from tracetorch.fused.signature import Signature
from tracetorch.fused.trace import StepFunction, Traced, name_draws, trace

_EXAMPLES = ((8,), (2, 5))  # shapes on which a step is traced


def build(
    step: StepFunction,
    states: Sequence[str],
    parameters: Sequence[str],
    learned: Sequence[str],
    dtype: torch.dtype,
    backward: bool = True,
    backend: str = "cpu",
    device: str = "cpu",
    inputs: Sequence[str] = ("x",),
    outputs: Sequence[str] = ("output",),
    scalars: Sequence[str] = (),
) -> Kernel:
    """Trace and compile a step.

    Args:
        step: takes the inputs, the states and the parameters by name; returns the outputs and the new states.
        states, parameters, inputs, outputs: names, in order.
        learned: parameters whose gradients are wanted.
        dtype: float32 or float64, of all of them.
        backward: whether to build the backward kernel too. Without it nothing of autograd is used, which a process
            forked after a backward pass could not.
        backend: "cpu" (C) or "triton", which compiles at the first call.
        device: the device type of the tensors: "cpu", or with "triton" also "cuda".
        scalars: parameters of no dimension.

    Raises:
        GraphError: a step that is not pointwise, or an operation without a form in the backend's language; names it. A
            step in which torch computes in another dtype for a parameter's having no dimension; names that.
        CompilerError: no C compiler.
    """
    names = (*inputs, *states, *parameters)
    every = (*names, *(f"d_{output}" for output in outputs))  # what the product's graph names
    if len(set(every)) != len(every):
        twice = sorted({name for name in every if every.count(name) > 1})
        raise GraphError(f"the step has two tensors of one name, {', '.join(twice)}; rename one")
    wanted = (*inputs, *states, *learned) if backward else ()
    found = []
    with torch.random.fork_rng([]):
        for shape in _EXAMPLES:
            given = {name: torch.full(shape, 0.5, dtype=dtype) for name in names}
            draws = name_draws(step, given)
            given |= {name: torch.full(shape, 0.5, dtype=dtype) for name in draws}
            found.append(trace(step, given, states, wanted, carried=learned, outputs=outputs, draws=draws))
        if _mixes(found[0].forward, dtype):

            def bare(names: Sequence[str]) -> Graph:
                scalar = {name: torch.tensor(0.5, dtype=dtype) for name in names}
                return trace(step, given | scalar, states, outputs=outputs, draws=draws).forward

            _refuse_deciding(scalars, found[0].forward, bare)
    # A size read in Python (x.shape, x.numel()) would become a number in the kernel, right for the example alone.
    if found[0] != found[1]:
        raise GraphError("the step's arithmetic depends on the shape of its input, so it is no function of one element")
    sequences = (*inputs, *draws)
    signature = Signature(tuple(states), tuple(parameters), tuple(learned), sequences, tuple(outputs), draws)
    return compiled(found[0], signature, dtype, backend, device)


def _mixes(graph: Graph, dtype: torch.dtype) -> bool:
    """Whether there are two floating dtypes, of which a step of float64 may have made the narrower of no input."""
    return dtype is torch.float64 or any(node.dtype is torch.float64 for node in graph.nodes)


def _refuse_deciding(scalars: Sequence[str], expected: Graph, bare: Callable[[Sequence[str]], Graph]) -> None:
    """Raises `GraphError` if a dtype depends on a parameter's having no dimension, which it has in no kernel.

    Args:
        scalars: parameters of no dimension: float32 beside one of float64 stays float32.
        expected: the step's graph where they have the dimensions of all.
        bare: gives its graph where the named ones have none.
    """
    if not scalars or bare(scalars) == expected:
        return
    names = [name for name in scalars if bare([name]) != expected] or scalars
    raise GraphError(
        f"the step computes in another dtype because of {' and '.join(names)}, of no dimension; say in which, as in "
        f"spikes * {names[0]}.to(spikes.dtype), or give it one value per neuron"
    )


def compiled(
    traced: Traced, signature: Signature, dtype: torch.dtype, backend: str = "cpu", device: str = "cpu"
) -> Kernel:
    """The kernel of a traced step; arguments and errors as in `build`."""
    found = dict(traced.forward.outputs)
    dtypes = tuple(traced.forward.dtype(found[name]) for name in signature.outputs)
    if backend == "triton":
        return launch_triton.kernel(traced, signature, dtype, dtypes, device)
    text = kernel_c.source(traced, signature, dtype)
    return CKernel(traced, signature, dtype, dtypes, text, kernel_c.CHUNK, compiler.load(text))
