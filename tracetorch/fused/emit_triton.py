"""The Triton renderer: a pointwise graph as the body of a function on blocks of elements.

Driven by a table of operations; no neuron's name occurs here. The arithmetic is that of eager torch on the same device:
`device` is "cuda", or "cpu" for Triton's interpreter. What Triton 3.6 would compile loosely is written out: `/` and
`sqrt` of float32 are approximate there (`div_rn`, `sqrt_rn`), `-x` is 0 - x and loses -0 (`x * -1.0`), `exp` is
ex2.approx.ftz (libdevice's expf adds the reduction around it), `minimum` and `maximum` drop NaN unless told. Compile
with `OPTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from tracetorch.fused.graph import Argument, Graph, GraphError, Node, Ref

# No contraction of a * b + c, no flushing of subnormal numbers inside libdevice.
OPTIONS: Mapping[str, bool] = MappingProxyType({"enable_fp_fusion": False, "enable_reflect_ftz": False})
DEVICES = ("cuda", "cpu")
TYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.float32: "tl.float32", torch.float64: "tl.float64", torch.bool: "tl.int1"}
)


@dataclass(frozen=True)
class _Type:
    """What the expressions of an element type are spelled with."""

    name: str
    divide: str
    root: str

    def div(self, a: str, b: str) -> str:
        """The correctly rounded quotient."""
        return self.divide.format(a=a, b=b)


_DOUBLE = _Type("tl.float64", "({a}) / ({b})", "tl.sqrt")
_SINGLE = _Type("tl.float32", "tl.div_rn({a}, {b})", "tl.sqrt_rn")
Expression = Callable[..., str]


def _binary(sign: str) -> Expression:
    return lambda _, a, b: f"{a} {sign} {b}"


def _call(name: str) -> Expression:
    return lambda _, a: f"{name}({a})"


def _extremum(name: str) -> Expression:
    # Of two zeros, +0 is the greater: CUDA's fmin and fmax behind a test for NaN (MaxMinElementwiseKernel.cu).
    return lambda _, a, b: f"tl.{name}({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"


def _chosen(sign: str) -> Expression:
    # NaN passes, and of two zeros the first is taken.
    return lambda _, a, b: f"tl.where({a} != {a}, {a}, tl.where({b} != {b}, {b}, tl.where({a} {sign} {b}, {b}, {a})))"


def _clamped(sign: str) -> Expression:
    # By a number: NaN and -0 pass, on the CPU as on CUDA (TensorCompare.cu, launch_clamp_scalar).
    return lambda _, a, b: f"tl.where({a} {sign} {b}, {b}, {a})"


# operation -> expression, given the element type and the operands
_RENDER: Mapping[str, Expression] = MappingProxyType(
    {
        "add": _binary("+"),
        "sub": _binary("-"),
        "mul": _binary("*"),
        "div": lambda t, a, b: t.div(a, b),
        "neg": lambda _, a: f"{a} * -1.0",
        "abs": _call("tl.abs"),
        "sign": lambda t, a: f"({a} > 0).to({t.name}) - ({a} < 0).to({t.name})",
        "reciprocal": lambda t, a: t.div("1.0", a),
        "sqrt": lambda t, a: f"{t.root}({a})",
        "exp": _call("libdevice.exp"),
        "log": _call("libdevice.log"),
        "sigmoid": lambda t, a: t.div("1.0", f"1.0 + libdevice.exp({a} * -1.0)"),
        "tanh": _call("libdevice.tanh"),
        "floor": _call("tl.floor"),
        "ceil": _call("tl.ceil"),
        "trunc": _call("libdevice.trunc"),
        "round": _call("libdevice.rint"),
        "relu": lambda _, a: f"tl.where({a} < 0, 0.0, {a})",
        "minimum": _extremum("minimum"),
        "maximum": _extremum("maximum"),
        # One rounding. nvcc contracts the eager kernels' a + c * b and 1 - t * t.
        "add_scaled": lambda _, a, b, c: f"tl.fma({b}, {c}, {a})",
        "sub_scaled": lambda _, a, b, c: f"tl.fma({b}, {c} * -1.0, {a})",
        "sigmoid_backward": lambda _, g, s: f"{g} * (1.0 - {s}) * {s}",
        "tanh_backward": lambda _, g, t: f"{g} * tl.fma({t} * -1.0, {t}, 1.0)",
        "threshold_backward": lambda _, g, x, at: f"tl.where({x} <= {at}, 0.0, {g})",
        "gt": _binary(">"),
        "ge": _binary(">="),
        "lt": _binary("<"),
        "le": _binary("<="),
        "eq": _binary("=="),
        "ne": _binary("!="),
        "and": _binary("&"),
        "or": _binary("|"),
        "not": lambda _, a: f"~{a}",
        "where": lambda _, c, a, b: f"tl.where({c}, {a}, {b})",
        "full_like": lambda _, value, like: value,
    }
)
# Where eager torch on the CPU computes something else.
_RENDER_CPU: Mapping[str, Expression] = MappingProxyType({"minimum": _chosen(">"), "maximum": _chosen("<")})
# By a number.
_CLAMPS: Mapping[str, Expression] = MappingProxyType({"minimum": _clamped(">"), "maximum": _clamped("<")})
_POWERS: Mapping[float, Expression] = MappingProxyType(
    {
        1.0: lambda _, a: a,
        2.0: lambda _, a: f"{a} * {a}",
        3.0: lambda _, a: f"{a} * {a} * {a}",
        0.5: lambda t, a: f"{t.root}({a})",
        -1.0: lambda t, a: t.div("1.0", a),
        -2.0: lambda t, a: t.div("1.0", f"{a} * {a}"),
    }
)
# Places of an expression in which a bare number takes the type of the block beside it.
_BARE: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("add", "sub", "mul", "gt", "ge", "lt", "le", "eq", "ne"), (0, 1)),
        "sigmoid_backward": (0,),
        "threshold_backward": (2,),
    }
)
_LOGICAL = frozenset({"and", "or", "not"})
_COMPARISONS = frozenset({"gt", "ge", "lt", "le", "eq", "ne"})
# Operations that may give bool, or take it, as they stand.
_OF_BOOL = _LOGICAL | _COMPARISONS | {"where", "cast", "full_like"}


def _literal(value: Argument, dtype: torch.dtype) -> str:
    """A number as Python text whose value is exactly that of the element type."""
    assert not isinstance(value, Ref)
    if dtype is torch.bool:
        return str(bool(value))
    with np.errstate(over="ignore"):
        number = float(value) if dtype is torch.float64 else float(np.float32(value))
    return repr(number) if np.isfinite(number) else f'float("{number}")'


def _full(value: Argument, dtype: torch.dtype, like: str) -> str:
    text = f"tl.full({like}.shape, {_literal(value, dtype)}, {TYPES[dtype]})"
    # Quirk: Triton 3.6 makes every constant equal to zero +0 (semantic.py, scalar_constant).
    return f"({text} * -1.0)" if text.startswith(f"tl.full({like}.shape, -0.0,") else text


class Body:
    """The statements of a graph: one assignment a node, `v<k>` for node k.

    Args:
        graph: what to render.
        names: an expression for every input; each stands for a block of elements.
        device: "cuda", or "cpu" in the interpreter.

    Raises:
        GraphError: an operation, a dtype or an exponent that cannot be rendered; names it.
    """

    def __init__(self, graph: Graph, names: Mapping[str, str], device: str) -> None:
        if device not in DEVICES:
            raise ValueError(f"device {device!r} has no Triton form; known: {', '.join(DEVICES)}")
        self.graph = graph
        self.device = device
        self.values = [names[name] for name, _ in graph.inputs]
        self.like = self.values[0]
        self.lines: list[str] = []
        for k, node in enumerate(graph.nodes):
            self.lines.append(f"v{k} = {self.render(node)}")
            self.values.append(f"v{k}")

    def output(self, name: str, dtype: torch.dtype) -> str:
        """The expression of an output, as this dtype."""
        ref = dict(self.graph.outputs)[name]
        value = self.values[ref.index]
        return value if self.graph.dtype(ref) is dtype else f"{value}.to({TYPES[dtype]})"

    def render(self, node: Node) -> str:
        """One node as an expression."""
        dtypes = [node.dtype, *(self.graph.dtype(a) for a in node.args if isinstance(a, Ref))]
        for dtype in dtypes:
            if dtype not in TYPES:
                raise GraphError(f"the operation {node.op} on {dtype} cannot be rendered in Triton")
        if node.dtype is torch.bool and node.op not in _OF_BOOL:
            raise GraphError(f"the operation {node.op} on torch.bool cannot be rendered in Triton")
        element = _DOUBLE if node.dtype is torch.float64 else _SINGLE
        operands = [self._operand(node, k) for k in range(len(node.args))]
        if node.op == "cast":
            return self._cast(node, operands[0])
        if node.op == "pow":
            exponent = node.args[1]
            if isinstance(exponent, Ref) or float(exponent) not in _POWERS:
                shown = "a tensor" if isinstance(exponent, Ref) else repr(exponent)
                raise GraphError(f"pow with the exponent {shown} cannot be rendered; it can with {sorted(_POWERS)}")
            return _POWERS[float(exponent)](element, operands[0])
        if node.op in _CLAMPS and not isinstance(node.args[1], Ref):
            return operands[1] if node.args[1] != node.args[1] else _CLAMPS[node.op](element, *operands)
        if node.op == "div" and self.device == "cuda" and not isinstance(node.args[1], Ref):
            reciprocal = self._reciprocal(node)
            bare = reciprocal != 0.0
            factor = _literal(reciprocal, node.dtype) if bare else _full(reciprocal, node.dtype, self.like)
            return f"{operands[0]} * {factor}"
        if node.op not in _RENDER:
            raise GraphError(f"the operation {node.op} cannot be rendered in Triton")
        render = (_RENDER_CPU.get(node.op) if self.device == "cpu" else None) or _RENDER[node.op]
        return render(element, *operands)

    def _cast(self, node: Node, value: str) -> str:
        if self._dtype(node, 0) is node.dtype:
            return value
        return f"{value} != 0" if node.dtype is torch.bool else f"{value}.to({TYPES[node.dtype]})"

    def _reciprocal(self, node: Node) -> float:
        """Eager torch on CUDA divides by a Python number as it multiplies by the number's rounded reciprocal.

        Read in BinaryDivTrueKernel.cu (`iter.is_cpu_scalar(2)`); division with rounding_mode="trunc" does the same.
        """
        divisor = node.args[1]
        assert not isinstance(divisor, Ref)
        kind = np.float64 if node.dtype is torch.float64 else np.float32
        with np.errstate(all="ignore"):
            return float(kind(1) / kind(divisor))

    def _dtype(self, node: Node, position: int) -> torch.dtype:
        """The dtype in which an argument is computed with; for a number, that of the tensors beside it."""
        argument = node.args[position]
        if isinstance(argument, Ref):
            return self.graph.dtype(argument)
        if node.op in ("full_like", "cast"):
            return node.dtype
        if node.op == "where" and position == 0:
            return torch.bool
        first = 1 if node.op == "where" else 0
        others = [self.graph.dtype(a) for a in node.args[first:] if isinstance(a, Ref)]
        return others[0] if others else node.dtype

    def _operand(self, node: Node, position: int) -> str:
        """An argument as an expression: a variable, a bare number, or a block of one number."""
        argument, dtype = node.args[position], self._dtype(node, position)
        if isinstance(argument, Ref):
            text = self.values[argument.index]
            if dtype is torch.bool and node.op in _COMPARISONS:
                return f"{text}.to(tl.int32)"
            return f"({text} != 0)" if node.op in _LOGICAL and dtype is not torch.bool else text
        if dtype is torch.bool and node.op in _COMPARISONS:
            return str(int(bool(argument)))
        if node.op in _LOGICAL:
            return _full(bool(argument), torch.bool, self.like)
        literal = _literal(argument, dtype)
        if position in _BARE.get(node.op, ()) and literal != "-0.0":
            return literal
        return _full(argument, dtype, self.like)


def function(name: str, body: Body, arguments: Sequence[str], results: Sequence[str]) -> list[str]:
    """The lines of a `@triton.jit` function that computes a body."""
    return [
        "@triton.jit",
        f"def {name}({', '.join(arguments)}):",
        *(f"    {line}" for line in body.lines),
        f"    return {', '.join(results)}",
    ]
