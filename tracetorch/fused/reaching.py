"""Which gradients there are at all: autograd gives None, not zeros, to what reaches no result that has a gradient."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tracetorch.fused.graph import Graph, Ref
from tracetorch.fused.signature import Signature


def gradients(vjp: Graph, signature: Signature, given: Sequence[bool], steps: int) -> tuple[bool, ...]:
    """Whether each gradient of a sequence would be a tensor in the step loop.

    Args:
        vjp: of one step, as `Traced.vjp`.
        given: for each output, each state after the last step and, if there are more, each recorded state, whether it
            has a gradient.
        steps: of the sequence.

    Returns:
        For each differentiable input, each state before the first step and each learned parameter.
    """
    outputs, states = signature.outputs, signature.states
    has = dict(zip((*outputs, *states), given, strict=False))
    recorded = dict(zip(states, given[len(outputs) + len(states) :], strict=False))
    at_every_step = {f"d_{name}" for name in outputs if has[name]} | {f"d_{n}'" for n in states if recorded.get(n)}
    carried = frozenset(f"d_{name}'" for name in states if has[name])
    every = {f"d_{name}" for name in outputs} | {f"d_{name}'" for name in (*states, *signature.learned)}
    found: set[str] = set()
    before: list[frozenset[str]] = []  # what the states carried back into each step; it repeats in the end
    while len(before) < steps and carried not in before:
        before.append(carried)
        step = _reached(vjp, at_every_step | carried, every)
        found |= step
        carried = frozenset(f"d_{name}'" for name in states if f"d_{name}" in step)
    if carried in before and len(before) < steps:
        begin = before.index(carried)
        carried = before[begin + (steps - begin) % (len(before) - begin)]
    first = {name.removesuffix("'") for name in carried}
    places = [f"d_{name}" in found for name in signature.differentiable_inputs]
    places += [f"d_{name}" in first for name in states]
    return (*places, *[f"d_{name}" in found for name in signature.learned])


def _reached(graph: Graph, sources: Collection[str], every: Collection[str]) -> set[str]:
    """The outputs that depend on one of these inputs, and those that are a gradient whatever comes in.

    Such a one is of a backward pass that does not look at the gradient that it gets. The tracer writes zero for None.
    """
    names = [name for name, _ in graph.inputs]
    live, inner = [name in sources for name in names], [name in every for name in names]
    for node in graph.nodes:
        refs = [argument.index for argument in node.args if isinstance(argument, Ref)]
        live.append(any(live[index] for index in refs))
        inner.append(any(inner[index] for index in refs))
    return {name for name, ref in graph.outputs if live[ref.index] or not (inner[ref.index] or _is_zero(graph, ref))}


def _is_zero(graph: Graph, ref: Ref) -> bool:
    place = ref.index - len(graph.inputs)
    return place >= 0 and graph.nodes[place].op == "full_like" and graph.nodes[place].args[0] == 0
