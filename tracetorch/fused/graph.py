"""The graph of a step: a short list of pointwise operations, its table of operations, and the verifier.

A node is an operation of `OPS` on earlier nodes or Python numbers. `OPS` is the whole vocabulary: what is not in it
cannot be in a graph. The interpreter (`evaluate`) is the meaning of a graph: each operation is one call of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | int | bool


class GraphError(ValueError):
    """A step that is no pointwise graph; the message names the operation and the reason."""


@dataclass(frozen=True)
class Ref:
    """The value of a node, by its place in the list (inputs first)."""

    index: int


Argument: TypeAlias = Ref | Number


@dataclass(frozen=True)
class Op:
    """An operation: how many arguments it has, what torch computes for it, and the dtype of its result.

    `result` is "same" (of its tensor arguments, which agree), "bool", or "cast" (the node's own).
    """

    arity: int
    torch: Callable[..., Tensor]
    result: str = "same"


def _compare(function: Callable[..., Tensor]) -> Op:
    return Op(2, function, "bool")


OPS: Mapping[str, Op] = MappingProxyType(
    {
        "add": Op(2, torch.add),
        "sub": Op(2, torch.sub),
        "mul": Op(2, torch.mul),
        "div": Op(2, torch.div),
        "neg": Op(1, torch.neg),
        "abs": Op(1, torch.abs),
        "sign": Op(1, torch.sign),
        "reciprocal": Op(1, torch.reciprocal),
        "sqrt": Op(1, torch.sqrt),
        "exp": Op(1, torch.exp),
        "log": Op(1, torch.log),
        "sigmoid": Op(1, torch.sigmoid),
        "tanh": Op(1, torch.tanh),
        "floor": Op(1, torch.floor),
        "ceil": Op(1, torch.ceil),
        "trunc": Op(1, torch.trunc),
        "round": Op(1, torch.round),
        "relu": Op(1, torch.relu),
        "minimum": Op(2, lambda a, b: torch.clamp(a, max=b) if not isinstance(b, Tensor) else torch.minimum(a, b)),
        "maximum": Op(2, lambda a, b: torch.clamp(a, min=b) if not isinstance(b, Tensor) else torch.maximum(a, b)),
        "pow": Op(2, torch.pow),
        # multiply and add with one rounding: what torch computes for add(a, b, alpha=c)
        "add_scaled": Op(3, lambda a, b, c: torch.add(a, b, alpha=c)),
        "sub_scaled": Op(3, lambda a, b, c: torch.sub(a, b, alpha=c)),
        "sigmoid_backward": Op(2, lambda g, s: torch.ops.aten.sigmoid_backward.default(g, s)),
        "tanh_backward": Op(2, lambda g, t: torch.ops.aten.tanh_backward.default(g, t)),
        # the gradient of relu and of one-sided clamps
        "threshold_backward": Op(3, lambda g, x, at: torch.ops.aten.threshold_backward.default(g, x, at)),
        "gt": _compare(torch.gt),
        "ge": _compare(torch.ge),
        "lt": _compare(torch.lt),
        "le": _compare(torch.le),
        "eq": _compare(torch.eq),
        "ne": _compare(torch.ne),
        "and": _compare(torch.logical_and),
        "or": _compare(torch.logical_or),
        "not": Op(1, torch.logical_not, "bool"),
        "where": Op(3, torch.where),
        "cast": Op(1, lambda a: a, "cast"),
        # arguments: the value, and a node whose shape it takes
        "full_like": Op(2, lambda value, like: torch.full_like(like, value), "cast"),
    }
)


@dataclass(frozen=True)
class Node:
    """One operation. `dtype` is of its result."""

    op: str
    args: tuple[Argument, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Graph:
    """Inputs by name, nodes in order, outputs by name. Node k has the index `len(inputs) + k`."""

    inputs: tuple[tuple[str, torch.dtype], ...]
    nodes: tuple[Node, ...]
    outputs: tuple[tuple[str, Ref], ...]

    def dtype(self, ref: Ref) -> torch.dtype:
        """Of an input or a node."""
        n = len(self.inputs)
        return self.inputs[ref.index][1] if ref.index < n else self.nodes[ref.index - n].dtype

    def __str__(self) -> str:
        names = [name for name, _ in self.inputs] + [f"v{k}" for k in range(len(self.nodes))]

        def show(argument: Argument) -> str:
            return names[argument.index] if isinstance(argument, Ref) else repr(argument)

        lines = [f"inputs: {', '.join(f'{name} {str(dtype)[6:]}' for name, dtype in self.inputs)}"]
        for k, node in enumerate(self.nodes):
            lines.append(f"v{k} = {node.op}({', '.join(map(show, node.args))})  # {str(node.dtype)[6:]}")
        return "\n".join([*lines, f"outputs: {', '.join(f'{name}={show(ref)}' for name, ref in self.outputs)}"])


def verify(graph: Graph) -> None:
    """Check that a graph is well formed: known operations, arguments that come before, dtypes that agree.

    Raises:
        GraphError: names the node and what is wrong.
    """
    seen = len(graph.inputs)
    for k, node in enumerate(graph.nodes):
        where = f"node v{k}, {node.op}"
        if node.op not in OPS:
            raise GraphError(f"{where}: is no operation of a graph; there are: {', '.join(OPS)}")
        op = OPS[node.op]
        if len(node.args) != op.arity:
            raise GraphError(f"{where}: has {len(node.args)} arguments, not {op.arity}")
        refs = [argument for argument in node.args if isinstance(argument, Ref)]
        if not refs:
            raise GraphError(f"{where}: has no tensor among its arguments")
        late = [ref.index for ref in refs if not 0 <= ref.index < seen + k]
        if late:
            raise GraphError(f"{where}: its argument {late[0]} does not come before it")
        _verify_dtypes(graph, node, op, refs, where)
    for name, ref in graph.outputs:
        if not 0 <= ref.index < seen + len(graph.nodes):
            raise GraphError(f"output {name}: there is no value {ref.index}")


def _verify_dtypes(graph: Graph, node: Node, op: Op, refs: Sequence[Ref], where: str) -> None:
    dtypes = [graph.dtype(ref) for ref in refs]
    if op.result == "bool" and node.dtype is not torch.bool:
        raise GraphError(f"{where}: gives bool, not {node.dtype}")
    if op.result == "cast":
        return
    values = dtypes[1:] if node.op == "where" and isinstance(node.args[0], Ref) else dtypes
    if node.op == "where" and dtypes[0] is not torch.bool:
        raise GraphError(f"{where}: its condition is {dtypes[0]}, not bool")
    if len(set(values)) > 1:
        raise GraphError(f"{where}: its arguments are {values}; a cast is missing")
    if op.result == "same" and values and node.dtype is not values[0]:
        raise GraphError(f"{where}: gives {values[0]}, not {node.dtype}")


def evaluate(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a graph means: every node computed by torch, in order.

    Args:
        graph: a verified graph.
        inputs: by name, all of one shape, in the dtypes of the graph.

    Raises:
        GraphError: an input missing, or of another dtype.
    """
    values: list[Tensor] = []
    for name, dtype in graph.inputs:
        if name not in inputs or inputs[name].dtype is not dtype:
            found = inputs[name].dtype if name in inputs else "nothing"
            raise GraphError(f"input {name}: {found} given, {dtype} needed")
        values.append(inputs[name])
    for node in graph.nodes:
        arguments = [values[a.index] if isinstance(a, Ref) else a for a in node.args]
        result = OPS[node.op].torch(*arguments)
        values.append(result if result.dtype is node.dtype else result.to(node.dtype))
    return {name: values[ref.index] for name, ref in graph.outputs}


def prune(graph: Graph) -> Graph:
    """The same graph without nodes that no output needs; inputs stay."""
    n = len(graph.inputs)
    needed: set[int] = set()
    stack = [ref.index for _, ref in graph.outputs]
    while stack:
        index = stack.pop()
        if index in needed:
            continue
        needed.add(index)
        if index >= n:
            stack.extend(a.index for a in graph.nodes[index - n].args if isinstance(a, Ref))
    kept = [k for k in range(len(graph.nodes)) if n + k in needed]
    place = {**{k: k for k in range(n)}, **{n + k: n + new for new, k in enumerate(kept)}}

    def moved(argument: Argument) -> Argument:
        return Ref(place[argument.index]) if isinstance(argument, Ref) else argument

    nodes = tuple(Node(graph.nodes[k].op, tuple(map(moved, graph.nodes[k].args)), graph.nodes[k].dtype) for k in kept)
    return Graph(graph.inputs, nodes, tuple((name, Ref(place[ref.index])) for name, ref in graph.outputs))


def used(graph: Graph) -> set[str]:
    """Names of the inputs that the outputs need; one that is passed through unchanged is needed."""
    refs = [ref.index for _, ref in graph.outputs]
    refs += [a.index for node in graph.nodes for a in node.args if isinstance(a, Ref)]
    return {graph.inputs[index][0] for index in refs if index < len(graph.inputs)}


def narrowed(graph: Graph, inputs: Sequence[str]) -> Graph:
    """The same graph with these inputs only, in this order; the others may not be used.

    Raises:
        GraphError: an input that is used and not among them.
    """
    names = [name for name, _ in graph.inputs]
    place = {names.index(name): k for k, name in enumerate(inputs)}
    shift = len(inputs) - len(names)

    def moved(argument: Argument) -> Argument:
        if not isinstance(argument, Ref):
            return argument
        if argument.index >= len(names):
            return Ref(argument.index + shift)
        if argument.index not in place:
            raise GraphError(f"the input {names[argument.index]} is used, and not given")
        return Ref(place[argument.index])

    nodes = tuple(Node(node.op, tuple(map(moved, node.args)), node.dtype) for node in graph.nodes)
    outputs = []
    for name, ref in graph.outputs:
        new = moved(ref)
        assert isinstance(new, Ref)
        outputs.append((name, new))
    return Graph(tuple((name, graph.inputs[names.index(name)][1]) for name in inputs), nodes, tuple(outputs))
