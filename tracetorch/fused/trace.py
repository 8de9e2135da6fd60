"""Tracing a step, and its vector-Jacobian product, into a pointwise graph.

The step runs once on small tensors under a `TorchDispatchMode` that sees every aten operation after autograd, so that
custom autograd Functions are seen through and the backward pass is recorded like the forward. Tensors are tracked by
identity: an operation on a tracked tensor becomes a node, an operation without one just runs, and its result is a
constant. A tensor that was there before and is not declared, a branch on a tensor's value, and anything that is not
pointwise are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tracetorch.fused.graph import OPS, Argument, Graph, GraphError, Node, Number, Ref, prune, verify
from tracetorch.fused.precision import refuse_rounding
from tracetorch.fused.untraceable import ValueReads, called, no_other_chance, refuse_draw

aten = torch.ops.aten

# aten operation -> graph operation with the same arguments
_SAME = {
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.sign.default: "sign",
    aten.sgn.default: "sign",
    aten.reciprocal.default: "reciprocal",
    aten.sqrt.default: "sqrt",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.floor.default: "floor",
    aten.ceil.default: "ceil",
    aten.trunc.default: "trunc",
    aten.round.default: "round",
    aten.relu.default: "relu",
    aten.minimum.default: "minimum",
    aten.maximum.default: "maximum",
    aten.clamp_min.default: "maximum",
    aten.clamp_max.default: "minimum",
    aten.pow.Tensor_Scalar: "pow",
    aten.sigmoid_backward.default: "sigmoid_backward",
    aten.tanh_backward.default: "tanh_backward",
    aten.threshold_backward.default: "threshold_backward",
    aten.gt.Tensor: "gt",
    aten.gt.Scalar: "gt",
    aten.ge.Tensor: "ge",
    aten.ge.Scalar: "ge",
    aten.lt.Tensor: "lt",
    aten.lt.Scalar: "lt",
    aten.le.Tensor: "le",
    aten.le.Scalar: "le",
    aten.eq.Tensor: "eq",
    aten.eq.Scalar: "eq",
    aten.ne.Tensor: "ne",
    aten.ne.Scalar: "ne",
    aten.logical_and.default: "and",
    aten.logical_or.default: "or",
    aten.logical_not.default: "not",
    aten.bitwise_and.Tensor: "and",
    aten.bitwise_or.Tensor: "or",
    aten.bitwise_not.default: "not",
}
# Views and copies of a whole tensor: the value passes through.
_IDENTITY = {
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
}
_SINGLE = {
    aten.unbind.int,
    aten.stack.default,
    aten.cat.default,
    aten.select.int,
    aten.select_backward.default,
    aten.slice.Tensor,
    aten.slice_backward.default,
    aten.split.Tensor,
}
_FILL = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
}
# In-place operations whose functional form has another overload's name.
_FUNCTIONAL = {aten.pow_.Scalar: aten.pow.Tensor_Scalar}
# The operations that draw random numbers and are traced: each takes as many from [0, 1) as the input has elements.
DRAWS = {aten.rand_like.default: "draw", aten.bernoulli.default: "chance"}
# A tensor's value asked for by Python: an `if`, an `int()`, an `item()`.
_VALUE = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default}
_BITWISE = {aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_not.default}
# What arithmetic is between two tensors of bool.
_OF_BOOLS = {"add": "or", "maximum": "or", "mul": "and", "minimum": "and"}
_DTYPES = (torch.float32, torch.float64, torch.bool)  # in which a kernel computes


class _Tracer(TorchDispatchMode):
    """Records the nodes of everything computed from tracked tensors."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Quirk: torch (2.13) wraps every dispatch mode so that its first use imports torch._dynamo, 2 s of a process's
        # start. Older versions do not ask. Goes when torch wraps lazily.
        return False

    def __init__(
        self, inputs: Mapping[str, Tensor], constants: Sequence[Tensor] = (), draws: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.draws = iter(draws)
        self.inputs = tuple((name, tensor.dtype) for name, tensor in inputs.items())
        self.nodes: list[Node] = []
        self.refs: dict[int, Ref] = {id(tensor): Ref(k) for k, tensor in enumerate(inputs.values())}
        # Tensors must stay alive while tracked: an id is only unique among the living.
        self.alive: list[Tensor] = list(inputs.values())
        self.constants: dict[int, Tensor] = {id(tensor): tensor for tensor in constants}
        self.numel = next(iter(inputs.values())).numel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        nested = [a for group in args if isinstance(group, (list, tuple)) for a in group if isinstance(a, Tensor)]
        tracked = any(id(tensor) in self.refs for tensor in (*tensors, *nested))
        if not tracked:
            refuse_draw(func)
            return self._constant(func(*args, **kwargs))
        if func in _VALUE:
            raise GraphError(f"{func}: the step reads the value of a tensor (an if, int() or item()); use torch.where")
        if func in _SINGLE:
            return self._single(func, args, kwargs, nested)
        if nested:
            raise GraphError(f"{func}: joins tensors, which is not pointwise")
        name = func._schema.name
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs, name)
        result = func(*args, **kwargs)
        ref = self._drawn(func, args, result) if func in DRAWS else self._record(func, args, kwargs, result)
        self._track(result, ref)
        return result

    def _drawn(self, func: Any, args: Any, result: Tensor) -> Ref:
        """Random numbers in [0, 1), the next of the inputs that stand for them; of a probability, whether it is more.

        torch.bernoulli (2.6 to 2.13) compares the numbers that rand_like draws, and raises for a p outside [0, 1]: in a
        kernel, which raises nothing, that gives NaN.
        """
        names = [name for name, _ in self.inputs]
        name = next(self.draws, None)
        if name is None or result.numel() != self.numel or result.dtype is not self.inputs[names.index(name)][1]:
            raise GraphError(f"{func}: random numbers of {result.dtype}, {_describe(result)}, have no place here")
        number = Ref(names.index(name))
        if func is aten.rand_like.default:
            return number
        p = self._tensor(func, args[0])
        bounds = self._node("ge", (p, 0.0), torch.bool), self._node("le", (p, 1.0), torch.bool)
        inside = self._node("and", bounds, torch.bool)
        less = self._node("lt", (number, p), torch.bool)
        drawn = self._node("where", (less, 1.0, self._node("full_like", (0.0, number), result.dtype)), result.dtype)
        return self._node("where", (inside, drawn, math.nan), result.dtype)

    def _track(self, tensor: Tensor, ref: Ref) -> None:
        self.refs[id(tensor)] = ref
        self.alive.append(tensor)

    def _single(self, func: Any, args: Any, kwargs: Any, nested: Sequence[Tensor]) -> Any:
        """Taking apart and joining along a dimension of one step: the value passes through."""
        result = func(*args, **kwargs)
        parts = result if isinstance(result, (list, tuple)) else [result]
        if len(nested) > 1 or len(parts) > 1 or parts[0].numel() != self.numel:
            word = "joins" if nested else "takes apart"
            raise GraphError(f"{func}: {word} tensors, which is not pointwise")
        self._track(parts[0], self.refs[id(nested[0] if nested else args[0])])
        return result

    def _constant(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            self.constants[id(result)] = result
        return result

    def _in_place(self, func: Any, args: Any, kwargs: Any, name: str) -> Any:
        """x.add_(y): the node of add, in the place of x, unless x shares its memory with another tensor."""
        packet, _, overload = name.split("::")[1].partition(".")
        functional = _FUNCTIONAL.get(func) or getattr(
            getattr(aten, packet.removesuffix("_"), None), func._overloadname or overload, None
        )
        target = args[0]
        if functional is None or not packet.endswith("_") or target._is_view() or id(target) not in self.refs:
            raise GraphError(f"{func}: writes in place into a view or a constant; use the operation without underscore")
        before = target.clone()
        self._track(before, self.refs[id(target)])
        expected = functional(before, *args[1:], **kwargs)
        ref = self._record(functional, (before, *args[1:]), kwargs, expected)
        func(*args, **kwargs)
        if expected.dtype is not target.dtype:
            ref = self._node("cast", (ref,), target.dtype)
        self.refs[id(target)] = ref
        return target

    # ---- one operation -------------------------------------------------------------------------------------------

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> Ref:
        if not isinstance(result, Tensor) or result.numel() != self.numel:
            raise GraphError(f"{func}: is not pointwise: it gives {_describe(result)} from {self.numel} elements")
        if func in _IDENTITY:
            return self.refs[id(args[0])]
        if func is aten._to_copy.default:
            ref = self.refs[id(args[0])]
            return ref if result.dtype is args[0].dtype else self._node("cast", (ref,), result.dtype)
        if func in _FILL or func is aten.full_like.default:
            value = args[1] if func is aten.full_like.default else _FILL[func]
            like = next(self.refs[id(a)] for a in args if isinstance(a, Tensor))
            return self._node("full_like", (value, like), result.dtype)
        if func in _BITWISE and result.dtype is not torch.bool:
            raise GraphError(f"{func}: on {result.dtype}; only on bool")
        op, operands = self._operation(func, args, kwargs)
        op = _OF_BOOLS.get(op, op) if result.dtype is torch.bool else op
        common = None if OPS[op].result == "bool" else result.dtype
        arguments = self._arguments(func, op, operands, common)
        return self._node(op, arguments, result.dtype)

    def _operation(self, func: Any, args: Any, kwargs: Any) -> tuple[str, Sequence[Any]]:
        """The graph operation and its operands."""
        alpha = kwargs.get("alpha", 1)
        match func:
            case aten.add.Tensor | aten.add.Scalar:
                return ("add", args[:2]) if alpha == 1 else ("add_scaled", (*args[:2], alpha))
            case aten.sub.Tensor | aten.sub.Scalar:
                return ("sub", args[:2]) if alpha == 1 else ("sub_scaled", (*args[:2], alpha))
            case aten.rsub.Scalar | aten.rsub.Tensor if alpha == 1 and len(args) == 2:
                return "sub", (args[1], args[0])
            case aten.div.Tensor_mode | aten.div.Scalar_mode:
                mode = kwargs["rounding_mode"]
                if mode is None:
                    return "div", args[:2]
                if mode != "trunc":
                    raise GraphError(f"{func}: rounding_mode={mode!r}; only 'trunc'")
                quotient = self._node("div", self._arguments(func, "div", args[:2], args[0].dtype), args[0].dtype)
                return "trunc", (quotient,)
            case aten.pow.Tensor_Scalar if args[1] in (1.5, -0.5):
                root = self._node("sqrt", self._arguments(func, "sqrt", args[:1], args[0].dtype), args[0].dtype)
                if args[1] == -0.5:
                    return "reciprocal", (root,)
                x = self._arguments(func, "mul", args[:1], args[0].dtype)[0]
                lowest = self._node("eq", (x, -math.inf), torch.bool)  # whose square root is NaN, and power is not
                return "where", (lowest, math.inf, self._node("mul", (x, root), args[0].dtype))
            case aten.where.self:
                return "where", args
            case aten.masked_fill.Scalar:
                return "where", (args[1], args[2], args[0])
            case aten.clamp.default:
                low, high = (*args[1:], None, None)[:2] if len(args) > 1 else (kwargs.get("min"), kwargs.get("max"))
                low, high = kwargs.get("min", low), kwargs.get("max", high)
                if low is None:
                    return "minimum", (args[0], high)
                if high is None:
                    return "maximum", (args[0], low)
                raised = self._node("maximum", (self.refs[id(args[0])], low), args[0].dtype)
                return "minimum", (raised, high)
        if func in _SAME and not kwargs:
            return _SAME[func], args
        raise GraphError(f"{func}: is not an operation of a pointwise graph (arguments {kwargs or 'as given'})")

    def _arguments(
        self, func: Any, op: str, operands: Sequence[Any], dtype: torch.dtype | None
    ) -> tuple[Argument, ...]:
        """Operands as node references and numbers; tensors that torch would promote are cast."""
        if dtype is None:
            floats = [a.dtype for a in operands if isinstance(a, Tensor) and a.dtype is not torch.bool]
            dtype = floats[0] if floats and op not in ("and", "or", "not") else None
        arguments = []
        for k, operand in enumerate(operands):
            if isinstance(operand, (Ref, bool, int, float)):
                arguments.append(operand)
                continue
            if not isinstance(operand, Tensor):
                raise GraphError(f"{func}: the argument {operand!r} has no place in a graph")
            ref = self._tensor(func, operand)
            if op == "div" and k == 1 and _on_gpu(operand) and not isinstance(ref, Ref):
                # On a GPU torch multiplies by the reciprocal of a number or of the CPU's tensor; by this it divides.
                ref = self._node("full_like", (ref, Ref(0)), operand.dtype)
            condition = op == "where" and k == 0
            current = operand.dtype
            if isinstance(ref, Ref) and dtype is not None and not condition and current is not dtype:
                ref = self._node("cast", (ref,), dtype)
            arguments.append(ref)
        return tuple(arguments)

    def _tensor(self, func: Any, tensor: Tensor) -> Ref | Number:
        if id(tensor) in self.refs:
            return self.refs[id(tensor)]
        if id(tensor) not in self.constants:
            raise GraphError(
                f"{func}: the step reads a tensor of shape {list(tensor.shape)} that is neither an input, a state nor "
                "a declared parameter; declare it"
            )
        values = tensor.reshape(-1)
        if values.numel() == 0 or not bool((values == values[0]).all()):
            raise GraphError(f"{func}: a constant of shape {list(tensor.shape)} with different values; declare it")
        number: Number = values[0].item()
        return number

    def _node(self, op: str, args: tuple[Argument, ...], dtype: torch.dtype) -> Ref:
        self.nodes.append(Node(op, args, dtype))
        return Ref(len(self.inputs) + len(self.nodes) - 1)

    def ref(self, tensor: Tensor, what: str) -> Ref:
        """The node of a result, a constant one made into a node."""
        if id(tensor) in self.refs:
            return self.refs[id(tensor)]
        value = self._tensor(what, tensor)
        return self._node("full_like", (value, Ref(0)), tensor.dtype)

    def value_reads(self) -> ValueReads:
        """Refuses what takes a tracked tensor's value without an operation of torch."""
        return ValueReads(lambda tensor: id(tensor) in self.refs)

    def graph(self, results: Iterable[tuple[str, Tensor]]) -> Graph:
        """What was recorded, as far as these results, by name, need it."""
        outputs = tuple((name, self.ref(result, name)) for name, result in results)
        graph = prune(Graph(self.inputs, tuple(self.nodes), outputs))
        verify(graph)
        for node in graph.nodes:
            if node.dtype not in _DTYPES:
                raise GraphError(f"{node.op} computes in {node.dtype}; a kernel does in float32 and float64")
        return graph


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _describe(result: Any) -> str:
    return f"shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__


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
        inputs: examples, all of one shape, parameters expanded to it: every tensor that the step reads.
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
    shapes = {tuple(tensor.shape) for tensor in inputs.values()}
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
        return False  # as in _Tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DRAWS:
            self.names.append(f"{DRAWS[func]} {len(self.names)}")
        return func(*args, **(kwargs or {}))


def name_draws(step: StepFunction, inputs: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A name, beginning with its kind in `DRAWS`, for each draw of a step; torch's generator is advanced."""
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
    with _Tracer(leaves, constants, draws) as tracer, tracer.value_reads(), no_other_chance(), torch.no_grad():
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
    as_is = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    tracer = _Tracer({**leaves, **cotangents}, constants, draws)
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
