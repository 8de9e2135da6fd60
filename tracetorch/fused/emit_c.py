"""The C renderer: a pointwise graph as a loop over time, elements in blocks, states in L1.

Driven by a table of operations; no neuron's name occurs here. `float` stands for the element type, replaced by
`double` in a float64 kernel. A Python number is written as the element type's exact value (a hexadecimal float).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch

from tracetorch.fused.graph import Argument, Graph, GraphError, Node, Ref

BLOCK = 512  # elements of one block: a few arrays of this length stay in L1
_TYPES = {torch.float32: "float", torch.float64: "double", torch.bool: "int"}

# exp in float32: x = q ln 2 + s with q an integer, a polynomial of degree 6 in s, then a scale by 2^q in two steps so
# that results near the ends of the range are exact or infinite. Within 1 ulp; ln 2 is split so that q * high is exact.
PREAMBLE = """\
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define BLOCK {block}

// Copies a row out of L1. With `stream`, past the caches: a large output is not read again before it is evicted, and a
// plain store would first read the line that it overwrites.
static inline void put(void *to, const void *from, int64_t bytes, int64_t stream) {{
#ifdef __SSE2__
  char *t = to;
  const char *f = from;
#if defined(__AVX512F__)
  enum {{ WIDTH = 64 }};
#elif defined(__AVX__)
  enum {{ WIDTH = 32 }};
#else
  enum {{ WIDTH = 16 }};
#endif
  if (stream) {{
    int64_t head = (WIDTH - ((uintptr_t)t & (WIDTH - 1))) & (WIDTH - 1), at = head < bytes ? head : bytes;
    memcpy(t, f, at);
    for (; at + WIDTH <= bytes; at += WIDTH) {{
#if defined(__AVX512F__)
      _mm512_stream_si512((void *)(t + at), _mm512_loadu_si512((const void *)(f + at)));
#elif defined(__AVX__)
      _mm256_stream_si256((__m256i *)(t + at), _mm256_loadu_si256((const __m256i *)(f + at)));
#else
      _mm_stream_si128((__m128i *)(t + at), _mm_loadu_si128((const __m128i *)(f + at)));
#endif
    }}
    memcpy(t + at, f + at, bytes - at);
    return;
  }}
#endif
  memcpy(to, from, bytes);
}}

// Makes streamed rows visible to other threads.
static inline void settle(void) {{
#ifdef __SSE2__
  _mm_sfence();
#endif
}}

// Asks for a row that is needed some steps later.
static inline void ask(const void *row, int64_t bytes) {{
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)row + at);
}}

static inline float scale2_float(float x, int q) {{
  union {{ int32_t i; float f; }} a, b;
  int half = q >> 1;
  a.i = (half + 127) << 23;
  b.i = (q - half + 127) << 23;
  return x * a.f * b.f;
}}

static inline float exp_float(float x) {{
  float clipped = x > 105.0f ? 105.0f : x < -105.0f ? -105.0f : x;
  float q = rintf(clipped * 0x1.715476p+0f);
  float s = __builtin_fmaf(q, -0x1.62e4p-1f, clipped);
  s = __builtin_fmaf(q, -1.42860676533018705e-6f, s);
  float u = 1.98527617612853646e-4f;
  u = __builtin_fmaf(u, s, 1.39304355252534151e-3f);
  u = __builtin_fmaf(u, s, 8.33336077630519867e-3f);
  u = __builtin_fmaf(u, s, 4.16664853692054749e-2f);
  u = __builtin_fmaf(u, s, 1.66666671633720398e-1f);
  u = __builtin_fmaf(u, s, 0.5f);
  u = 1.0f + __builtin_fmaf(s * s, u, s);
  float y = scale2_float(u, (int)q);
  return x != x ? x : x > 104.0f ? INFINITY : x < -104.0f ? 0.0f : y;
}}

static inline double exp_double(double x) {{ return exp(x); }}
"""


def _number(value: Argument, dtype: torch.dtype) -> str:
    assert not isinstance(value, Ref)
    if dtype is torch.bool:
        return str(int(bool(value)))
    number = float(value) if dtype is torch.float64 else float(np.float32(value))
    if number != number:
        return "NAN"
    if number in (float("inf"), float("-inf")):
        return "INFINITY" if number > 0 else "-INFINITY"
    return f"{number.hex()}{'f' if dtype is torch.float32 else ''}"


def _binary(sign: str) -> Callable[..., str]:
    return lambda a, b: f"{a} {sign} {b}"


def _call(name: str) -> Callable[..., str]:
    return lambda a: f"{name}({a})"


# operation -> C expression; {f} is the suffix of a C function for the element type, {t} the type's name
_RENDER: Mapping[str, Callable[..., str]] = MappingProxyType(
    {
        "add": _binary("+"),
        "sub": _binary("-"),
        "mul": _binary("*"),
        "div": _binary("/"),
        "neg": lambda a: f"-{a}",
        "abs": _call("fabs{f}"),
        "sign": lambda a: f"({{t}})(({a} > 0) - ({a} < 0))",
        "reciprocal": lambda a: f"1 / {a}",
        "sqrt": _call("sqrt{f}"),
        "exp": _call("exp_{t}"),
        "log": _call("log{f}"),
        "sigmoid": lambda a: f"1 / (1 + exp_{{t}}(0 - {a}))",
        "tanh": _call("tanh{f}"),
        "floor": _call("floor{f}"),
        "ceil": _call("ceil{f}"),
        "trunc": _call("trunc{f}"),
        "round": _call("rint{f}"),
        "relu": lambda a: f"{a} < 0 ? 0 : {a}",
        # Comparisons written so that NaN passes as in torch; of 0 and -0, the second one.
        "minimum": lambda a, b: f"{a} != {a} ? {a} : {b} != {b} ? {b} : {a} < {b} ? {a} : {b}",
        "maximum": lambda a, b: f"{a} != {a} ? {a} : {b} != {b} ? {b} : {a} > {b} ? {a} : {b}",
        "add_scaled": lambda a, b, c: f"__builtin_fma{{f}}({b}, {c}, {a})",
        "sub_scaled": lambda a, b, c: f"__builtin_fma{{f}}({b}, -({c}), {a})",
        "sigmoid_backward": lambda g, s: f"{g} * (1 - {s}) * {s}",
        "tanh_backward": lambda g, t: f"{g} * __builtin_fma{{f}}(-({t}), {t}, 1)",
        "threshold_backward": lambda g, x, at: f"{x} <= {at} ? 0 : {g}",
        "gt": _binary(">"),
        "ge": _binary(">="),
        "lt": _binary("<"),
        "le": _binary("<="),
        "eq": _binary("=="),
        "ne": _binary("!="),
        "and": lambda a, b: f"({a} != 0) & ({b} != 0)",
        "or": lambda a, b: f"({a} != 0) | ({b} != 0)",
        "not": lambda a: f"{a} == 0",
        "where": lambda c, a, b: f"{c} ? {a} : {b}",
        "cast": lambda a: a,
        "full_like": lambda value, like: value,
    }
)
# A bound that is a number is torch's clamp, which keeps the value where both are equal, and with it a -0.
_CLAMP: Mapping[str, Callable[..., str]] = MappingProxyType(
    {
        "minimum": lambda a, b: f"{a} > {b} ? {b} : {a}",
        "maximum": lambda a, b: f"{a} < {b} ? {b} : {a}",
    }
)
_POWERS: Mapping[float, str] = {
    1.0: "{a}",
    2.0: "{a} * {a}",
    3.0: "{a} * {a} * {a}",
    0.5: "sqrt{{f}}({a})",
    -1.0: "1 / {a}",
    -2.0: "1 / ({a} * {a})",
}


def _expression(node: Node, operands: Sequence[str]) -> str:
    if node.op == "pow":
        exponent = node.args[1]
        if isinstance(exponent, Ref) or float(exponent) not in _POWERS:
            shown = "a tensor" if isinstance(exponent, Ref) else repr(exponent)
            raise GraphError(f"pow with the exponent {shown} cannot be rendered; it can with {sorted(_POWERS)}")
        return _POWERS[float(exponent)].format(a=operands[0])
    if node.op in _CLAMP and not isinstance(node.args[1], Ref):
        return _CLAMP[node.op](*operands)
    if node.op not in _RENDER:
        raise GraphError(f"the operation {node.op} cannot be rendered in C")
    return _RENDER[node.op](*operands)


def _operand_dtype(graph: Graph, node: Node, position: int) -> torch.dtype:
    """The dtype in which a number among a node's arguments is computed with."""
    if node.op == "full_like":
        return node.dtype
    others = [
        graph.dtype(a) for k, a in enumerate(node.args) if isinstance(a, Ref) and not (node.op == "where" and k == 0)
    ]
    return others[0] if others else node.dtype


# Rounded to float64 and then to float32, their results are those of float32 itself, as 53 bits are at least 2 * 24 + 2
# (S. A. Figueroa, When is double rounding innocuous?, 1995).
ROUNDED_TWICE = frozenset({"cast", "add", "sub", "mul", "div", "reciprocal", "sqrt"})


class Body:
    """The statements of a graph inside the element loop.

    Args:
        graph: what to render.
        names: a C expression for every input.
        prefix: of the variables, so that two graphs can stand in one function.
        skip: nodes already computed elsewhere, with their C expressions.
    """

    def __init__(self, graph: Graph, names: Mapping[str, str], prefix: str, skip: Mapping[int, str]) -> None:
        self.graph = graph
        self.double = bool(graph.inputs) and graph.inputs[0][1] is torch.float64
        self.gradients = {k for k, (name, _) in enumerate(graph.inputs) if name.startswith("d_")}
        self.values = [names[name] for name, _ in graph.inputs]
        self.lines: list[str] = []
        for k, node in enumerate(graph.nodes):
            if k in skip:
                self.values.append(skip[k])
                continue
            self.values.append(f"{prefix}{k}")
            if any(isinstance(a, Ref) and a.index in self.gradients for a in node.args):
                self.gradients.add(len(graph.inputs) + k)
            self.lines.append(f"const {_TYPES[node.dtype]} {prefix}{k} = {self.render(node)};")

    def render(self, node: Node) -> str:
        """One node as a C expression."""
        operands = []
        for k, argument in enumerate(node.args):
            if isinstance(argument, Ref):
                operands.append(self.values[argument.index])
            else:
                operands.append(_number(argument, _operand_dtype(self.graph, node, k)))
        element = node.dtype if node.dtype in (torch.float32, torch.float64) else torch.float32
        text = _expression(node, operands).replace("{t}", _TYPES[element])
        if self._rounds(node):  # spelt so, since `float` becomes `double` in a kernel of float64
            return f"(double)(__typeof__(1.0f))({text.replace('{f}', '')})"
        return text.replace("{f}", "f" if element is torch.float32 else "")

    def _rounds(self, node: Node) -> bool:
        """Whether torch computes a node in float32 in a step of float64: rounded from float64, it has the same bits.

        Gradients stay unrounded there, nearer to the true ones than torch's.
        """
        if not self.double or node.dtype is not torch.float32 or node.op not in ROUNDED_TWICE:
            return False
        return not any(isinstance(a, Ref) and a.index in self.gradients for a in node.args)

    def output(self, name: str) -> str:
        """The C expression of an output."""
        return self.values[dict(self.graph.outputs)[name].index]


def invariants(graph: Graph, parameters: Sequence[str]) -> list[int]:
    """Nodes that depend on parameters alone: computed once for a sequence, not once a step."""
    fixed = {k for k, (name, _) in enumerate(graph.inputs) if name in parameters}
    n = len(graph.inputs)
    found = []
    for k, node in enumerate(graph.nodes):
        refs = [a.index for a in node.args if isinstance(a, Ref)]
        if all(ref in fixed for ref in refs) and node.dtype is not torch.bool:
            fixed.add(n + k)
            found.append(k)
    return found
