"""`Graph`: a network as data, the calls of one time step in their order; `Loop`: a graph run over whole sequences."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tracetorch.core import program as plain
from tracetorch.core.layer import Layer
from tracetorch.core.model import Model, Sequential
from tracetorch.core.states import reset_states
from tracetorch.core.unrolling import unroll


class Ref(NamedTuple):
    """The value of an input or of an earlier node."""

    name: str


class State(NamedTuple):
    """A tensor that a module keeps after a call: the node of the call, and the module's attribute."""

    name: str
    attribute: str


class Size(NamedTuple):
    """A number read off the first input: its size at a dimension; times another's with `times`."""

    dim: int
    times: int | None = None


class Node(NamedTuple):
    """One call.

    Attributes:
        name: of its value.
        kind: "module", "function", "method" (of the first argument), or "tensor" (a parameter or buffer of the graph).
        target: the module's path, the function, the method's name, or the tensor's name.
        args, kwargs: numbers, text, `None`, dtypes, slices, tuples, lists and dicts of these; `Ref`, `State`, `Size`.
    """

    name: str
    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # torch's functions that choose between two (`F.max_pool2d`) go by a local name, and do not pickle.
        name = getattr(self.target, "__name__", "")
        dispatched = self.kind == "function" and getattr(F, name, None) is self.target
        return _restored, (
            self.name,
            self.kind,
            name if dispatched else self.target,
            self.args,
            self.kwargs,
            dispatched,
        )


def _restored(name: str, kind: str, target: Any, args: Any, kwargs: Any, dispatched: bool) -> Node:
    return Node(name, kind, getattr(F, target) if dispatched else target, args, kwargs)


KINDS = ("module", "function", "method", "tensor")


def rewrite(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of nested arguments, every leaf (`Ref`, `State`, `Size`, tensor, number...) replaced by `change(leaf)`."""
    if isinstance(value, (Ref, State, Size, plain.Ref)):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rewrite(item, change) for item in value))
    if isinstance(value, tuple):
        return tuple(rewrite(item, change) for item in value)
    if isinstance(value, list):
        return [rewrite(item, change) for item in value]
    if isinstance(value, dict):
        return {key: rewrite(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(rewrite(item, change) for item in (value.start, value.stop, value.step)))
    return change(value)


def leaves(value: Any) -> Iterator[Any]:
    """Every leaf of nested arguments, in order."""
    found: list[Any] = []
    rewrite(value, found.append)
    yield from found


class Graph(Model, plain.Planned):
    """A network as data: a list of calls. One call of the graph makes them in order.

    Nothing in it is code: it prints as Python (`code`), copies, pickles, and `tt.save` writes it as JSON. A graph of
    native layers is one time step per call, and `tt.unroll` folds and fuses it.

    Args:
        modules: those that the nodes call, by path ("fc1", "block.0"); a path may be called by several nodes.
        nodes: the calls; each refers to inputs and to earlier ones.
        output: what a call returns: nested tuples, lists and dicts of `Ref` and `State`.
        inputs: names of the arguments of a call.
        tensors: parameters and buffers that nodes use by themselves.

    Raises:
        ValueError: two nodes of one name, a reference to none, a module or tensor that is not given, an unknown kind.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        nodes: Sequence[Node],
        output: Any,
        inputs: Sequence[str] = ("x",),
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.nodes, self.output, self.inputs = tuple(nodes), output, tuple(inputs)
        for name, tensor in (tensors or {}).items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        for path, module in modules.items():
            _register(self, path, module)
        self._check()

    def _check(self) -> None:
        known = set(self.inputs)
        if len(known) != len(self.inputs) or not known or not all(map(_is_name, known)):
            raise ValueError(f"Graph: inputs={self.inputs!r}: must be at least one name, each once")
        called: set[str] = set()
        for node in self.nodes:
            if not _is_name(node.name):
                raise ValueError(f"Graph: {node.name!r} cannot be the name of a node")
            if node.kind not in KINDS or node.name in known:
                raise ValueError(f"Graph: node {node.name!r}: kind={node.kind!r} is not known, or its name is taken")
            self._check_leaves(f"node {node.name!r}", (node.args, node.kwargs), known, called)
            if node.kind == "module":
                called.add(node.name)
                self.get_submodule(node.target)
            if node.kind == "tensor" and node.target not in {*self._parameters, *self._buffers}:
                raise ValueError(f"Graph: node {node.name!r}: there is no tensor {node.target!r}")
            known.add(node.name)
        self._check_leaves("the output", self.output, known, called)

    @staticmethod
    def _check_leaves(where: str, value: Any, known: set[str], called: set[str]) -> None:
        for leaf in leaves(value):
            if isinstance(leaf, (Ref, State)) and leaf.name not in (called if isinstance(leaf, State) else known):
                raise ValueError(f"Graph: {where} refers to {leaf.name!r}, which is no earlier node of that kind")

    def called(self, node: Node) -> nn.Module:
        """The module that a node calls."""
        return self.get_submodule(node.target)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """The attributes that are read of each node's module."""
        found: dict[str, dict[str, None]] = {}
        for leaf in leaves(([(node.args, dict(node.kwargs)) for node in self.nodes], self.output)):
            if isinstance(leaf, State):
                found.setdefault(leaf.name, {})[leaf.attribute] = None
        return {name: tuple(attributes) for name, attributes in found.items()}

    def repeats(self) -> bool:
        """Whether a native layer is called by several nodes: its one state then advances with each, step by step."""
        called = [id(self.called(n)) for n in self.nodes if n.kind == "module" and isinstance(self.called(n), Layer)]
        return len(set(called)) != len(called)

    def forward(self, *inputs: Any) -> Any:
        """Make the calls in order; returns the output's structure."""
        if len(inputs) != len(self.inputs):
            raise TypeError(f"this graph takes {', '.join(self.inputs)}; {len(inputs)} arguments were given")
        values: dict[Any, Any] = dict(zip(self.inputs, inputs, strict=True))
        reads = self.reads()

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return values[leaf.name]
            if isinstance(leaf, State):
                return values[leaf]
            return size_of(leaf, inputs[0]) if isinstance(leaf, Size) else leaf

        for node in self.nodes:
            args, kwargs = rewrite(node.args, value), rewrite(dict(node.kwargs), value)
            values[node.name] = self.perform(node, args, kwargs)
            for attribute in reads.get(node.name, ()):
                values[State(node.name, attribute)] = getattr(self.called(node), attribute)
        return rewrite(self.output, value)

    def perform(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One node's call."""
        if node.kind == "module":
            return self.called(node)(*args, **kwargs)
        if node.kind == "function":
            return node.target(*args, **kwargs)
        if node.kind == "method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return getattr(self, node.target)

    def program(self) -> plain.Program:
        """Its calls, for `tt.unroll`. Raises `NotPlain` where it has hooks, or several inputs."""
        if len(self.inputs) != 1:
            raise plain.NotPlain(f"it takes {len(self.inputs)} inputs")
        if plain.hooked(self):
            raise plain.NotPlain("it has hooks")
        calls: list[plain.Call] = []
        known: dict[Any, Any] = {Ref(self.inputs[0]): plain.Ref(0)}

        def add(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> plain.Ref:
            calls.append(plain.Call(target, args, kwargs or {}))
            return plain.Ref(len(calls))

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Size):
                return add(partial(size_of, leaf), (plain.Ref(0),))
            return known[leaf] if isinstance(leaf, (Ref, State)) else leaf

        reads = self.reads()
        for node in self.nodes:
            if node.kind == "tensor":
                known[Ref(node.name)] = getattr(self, node.target)
                continue
            args, kwargs = rewrite(node.args, value), rewrite(dict(node.kwargs), value)
            target = self.called(node) if node.kind == "module" else node.target
            made = known[Ref(node.name)] = add(target, args, kwargs)
            for attribute in reads.get(node.name, ()):
                if not isinstance(target, Layer):
                    raise plain.NotPlain(f"the {attribute} of a {type(target).__name__} is read")
                known[State(node.name, attribute)] = add(plain.Kept(target, attribute), (made,))
        return plain.Program(tuple(calls), rewrite(self.output, value))

    @property
    def code(self) -> str:
        """The calls as Python, for reading."""
        return str(self.to_fx().python_code("self").src)

    def to_fx(self) -> fx.Graph:
        """The same calls as a `torch.fx.Graph`, for tools that work on one."""
        graph = fx.Graph()
        known: dict[Any, Any] = {name: graph.placeholder(name) for name in self.inputs}

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return known[leaf.name]
            if isinstance(leaf, State):
                return known[leaf]
            if isinstance(leaf, Size):
                dims = (leaf.dim,) if leaf.times is None else (leaf.dim, leaf.times)
                sizes = [graph.call_method("size", (known[self.inputs[0]], dim)) for dim in dims]
                return sizes[0] if len(sizes) == 1 else graph.call_function(operator.mul, tuple(sizes))
            return leaf

        reads = self.reads()
        for node in self.nodes:
            args, kwargs = rewrite(node.args, value), rewrite(dict(node.kwargs), value)
            op = "get_attr" if node.kind == "tensor" else f"call_{node.kind}"
            known[node.name] = graph.create_node(op, node.target, args, kwargs, name=node.name)
            for attribute in reads.get(node.name, ()):
                known[State(node.name, attribute)] = graph.get_attr(f"{node.target}.{attribute}")
        graph.output(rewrite(self.output, value))
        return graph

    def extra_repr(self) -> str:
        lines = [line for line in self.code.splitlines() if line.strip() and "wrap(" not in line]
        return "\n".join(line.split(";")[0].removesuffix("  ") for line in lines if not line.startswith("import"))


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.isascii() and not keyword.iskeyword(name)


def size_of(size: Size, x: Tensor) -> int:
    """The number that a `Size` stands for, read off a graph's first input."""
    return x.shape[size.dim] * (1 if size.times is None else x.shape[size.times])


def _register(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at its path, in containers that are never called."""
    *above, leaf = path.split(".")
    for name in above:
        child = root._modules.get(name)
        if child is None:
            child = Sequential()
            root.add_module(name, child)
        root = child
    present = root._modules.get(leaf)
    if present is not None and present is not module:
        raise ValueError(f"Graph: two modules at the path {path!r}")
    root.add_module(leaf, module)


class Loop(Model):
    """A network over whole sequences: what is done `before` the time steps, in every `step`, and `after` them.

    Args:
        step: one time step. Its inputs are the results of `before`; its output is a tuple.
        cuts: for each input of `step`, the time dimension at which it is cut into steps; `None`: every step has it.
        before: of the whole input, a tuple; `None`: the input as it is.
        after: of the outputs of all steps, each stacked to [T, ...]; its result is that of the call.
        steps: how many, where no input is cut; or the first so many of a longer input.
        carry: go on from the states that the last call left, instead of from the initial ones.
        fold: of `tt.unroll`, for native layers.

    Raises:
        ValueError: no input is cut and `steps` is not given, or the numbers of inputs differ.
    """

    def __init__(
        self,
        step: Graph,
        cuts: Sequence[int | None] = (0,),
        before: Graph | None = None,
        after: Graph | None = None,
        steps: int | None = None,
        carry: bool = False,
        fold: str = "exact",
    ) -> None:
        super().__init__()
        self.step, self.before, self.after = step, before, after
        self.cuts, self.steps, self.carry, self.fold = tuple(cuts), steps, carry, fold
        if len(self.cuts) != len(step.inputs):
            raise ValueError(f"Loop: {len(step.inputs)} inputs of a step, and cuts={self.cuts}")
        if steps is None and all(cut is None for cut in self.cuts):
            raise ValueError("Loop: no input has a time dimension, so the number of steps must be given")

    def forward(self, x: Tensor) -> Any:
        """The whole sequence, as the network's source takes it; returns what that returns."""
        if self.carry:
            for module in self.step.modules():
                getattr(module, "begin_sequence", _nothing)()
        else:
            self.restart()
        outputs = self.run(self.sequences(x))
        return outputs if self.after is None else self.after(*outputs)

    def restart(self) -> None:
        """The neurons back to their initial states."""
        reset_states(self.step)

    def sequences(self, x: Tensor) -> tuple[Tensor, ...]:
        """The inputs of all steps, each [T, ...]."""
        values = (x,) if self.before is None else self.before(x)
        moved = [v if cut is None else v.movedim(cut, 0) for v, cut in zip(values, self.cuts, strict=True)]
        lengths = {len(v) for v, cut in zip(moved, self.cuts, strict=True) if cut is not None}
        steps = min(lengths) if self.steps is None else self.steps
        return tuple(
            v[:steps] if cut is not None else v.expand(steps, *v.shape) for v, cut in zip(moved, self.cuts, strict=True)
        )

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every step; the outputs, each [T, ...]."""
        if len(inputs) == 1 and not self.step.repeats():
            outputs: tuple[Tensor, ...] = unroll(self.step, inputs[0], 0, self.fold)
            return outputs
        return stepped(self.step, inputs)

    def extra_repr(self) -> str:
        return f"cuts={self.cuts}, steps={self.steps}, carry={self.carry}"


def _nothing() -> None:
    """What most layers do when a sequence begins."""


def stepped(step: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One call per time step; the outputs, each [T, ...]."""
    results = [step(*values) for values in zip(*inputs, strict=True)]
    return tuple(torch.stack(list(series)) for series in zip(*results, strict=True))
