"""What records a step's operations on tensors as nodes of a graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tracetorch.fused import operations
from tracetorch.fused.graph import OPS, Argument, Graph, GraphError, Node, Number, Ref, prune, verify
from tracetorch.fused.operations import aten
from tracetorch.fused.untraceable import ValueReads, refuse_draw


class Tracer(TorchDispatchMode):
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
        if func in operations.VALUE:
            raise GraphError(f"{func}: the step reads the value of a tensor (an if, int() or item()); use torch.where")
        if func in operations.SINGLE:
            return self._single(func, args, kwargs, nested)
        if nested:
            raise GraphError(f"{func}: joins tensors, which is not pointwise")
        name = func._schema.name
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs, name)
        result = func(*args, **kwargs)
        ref = self._drawn(func, args, result) if func in operations.DRAWS else self._record(func, args, kwargs, result)
        self._track(result, ref)
        return result

    def _drawn(self, func: Any, args: Any, result: Tensor) -> Ref:
        """Random numbers in [0, 1), the next of the inputs that stand for them; of a probability, whether it is more.

        torch.bernoulli (2.6 to 2.13) compares the numbers that rand_like draws, and raises for a p outside [0, 1]: in a
        kernel, which raises nothing, that gives NaN.
        """
        names = [name for name, _ in self.inputs]
        name = next(self.draws, None)
        if name is None or result.dtype is not self.inputs[names.index(name)][1]:
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
        functional = operations.FUNCTIONAL.get(func) or getattr(
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
        # What parameters of no dimension give among themselves has none either.
        own = max((a.numel() for a in args if isinstance(a, Tensor) and id(a) in self.refs), default=self.numel)
        if not isinstance(result, Tensor) or result.numel() not in (own, self.numel):
            raise GraphError(f"{func}: is not pointwise: it gives {_describe(result)} from {self.numel} elements")
        if func in operations.IDENTITY:
            return self.refs[id(args[0])]
        if func is aten._to_copy.default:
            ref = self.refs[id(args[0])]
            return ref if result.dtype is args[0].dtype else self._node("cast", (ref,), result.dtype)
        if func in operations.FILL or func is aten.full_like.default:
            value = args[1] if func is aten.full_like.default else operations.FILL[func]
            like = next(self.refs[id(a)] for a in args if isinstance(a, Tensor))
            return self._node("full_like", (value, like), result.dtype)
        if func in operations.BITWISE and result.dtype is not torch.bool:
            raise GraphError(f"{func}: on {result.dtype}; only on bool")
        op, operands = self._operation(func, args, kwargs)
        op = operations.OF_BOOLS.get(op, op) if result.dtype is torch.bool else op
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
                low, high = (*args[1:], None, None)[:2]
                low, high = kwargs.get("min", low), kwargs.get("max", high)
                if low is None:
                    return "minimum", (args[0], high)
                if high is None:
                    return "maximum", (args[0], low)
                raised = self._node("maximum", (self.refs[id(args[0])], low), args[0].dtype)
                return "minimum", (raised, high)
        if func in operations.SAME and not kwargs:
            return operations.SAME[func], args
        raise GraphError(f"{func}: is not an operation of a pointwise graph (arguments {kwargs or 'as given'})")

    def _arguments(
        self, func: Any, op: str, operands: Sequence[Any], dtype: torch.dtype | None
    ) -> tuple[Argument, ...]:
        """Operands as node references and numbers; tensors that torch would promote are cast."""
        if dtype is None:
            floats = [a for a in operands if isinstance(a, Tensor) and a.dtype is not torch.bool]
            dtype = torch.result_type(floats[0], floats[-1]) if floats else None
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
        if values.numel() and bool(values.isnan().all()):
            return math.nan  # this very object: two graphs with it are equal
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
            if node.dtype not in operations.DTYPES:
                raise GraphError(f"{node.op} computes in {node.dtype}; a kernel does in float32 and float64")
        return graph


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _describe(result: Any) -> str:
    return f"shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
