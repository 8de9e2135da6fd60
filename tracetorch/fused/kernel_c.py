"""The C source of a scan: forward over all time steps, and backward by recomputation from a state saved every C steps.

Layout: elements (b, n), b < B, n < N, n contiguous; time and batch by strides, so that [T, B, N] and [B, T, N] are the
same kernel. Each block of elements runs through all steps before the next one starts, with its states in L1. A
parameter has a stride for b and one for n, of which either may be 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tracetorch.fused.emit_c import BLOCK, PREAMBLE, Body, invariants
from tracetorch.fused.graph import Graph
from tracetorch.fused.trace import Traced

CHUNK = 32  # steps between two saved states
STRIP = 64  # elements between two requests for later rows: a burst of them would stall the arithmetic
AHEAD = 2  # rows asked for before they are needed


@dataclass(frozen=True)
class Layout:
    """The pointers and integers that a kernel takes, in order, by name."""

    pointers: tuple[str, ...]
    integers: tuple[str, ...]


# `stream`: whether outputs go past the caches. `width`: elements of a job, at most BLOCK.
_INTEGERS = ("T", "B", "N", "threads", "stream", "width", "x_t", "x_b", "y_t", "y_b")


def _parameter_integers(parameters: Sequence[str]) -> list[str]:
    return [f"{name}_{axis}" for name in parameters for axis in ("b", "n")]


def forward_layout(states: Sequence[str], parameters: Sequence[str]) -> Layout:
    """Of the forward kernel; `saved_*` and `record_*` may be null."""
    pointers = ["x", "y"]
    for state in states:
        pointers += [f"first_{state}", f"last_{state}", f"saved_{state}", f"record_{state}"]
    return Layout((*pointers, *parameters), (*_INTEGERS, *_parameter_integers(parameters)))


def backward_layout(states: Sequence[str], parameters: Sequence[str], learned: Sequence[str]) -> Layout:
    """Of the backward kernel; `d_x` and `d_record_*`, the gradients of recorded states, may be null."""
    pointers = ["x", "d_y", "d_x"]
    for state in states:
        pointers += [f"saved_{state}", f"d_last_{state}", f"d_record_{state}", f"d_first_{state}"]
    pointers += [*parameters, *(f"d_{name}" for name in learned)]
    return Layout(tuple(pointers), (*_INTEGERS, *_parameter_integers(parameters)))


def _head(name: str, layout: Layout) -> list[str]:
    lines = [f"void {name}(void **pointers, const int64_t *integers) {{"]
    lines += [f"  float *restrict {p} = pointers[{k}];" for k, p in enumerate(layout.pointers)]
    lines += [f"  const int64_t {i} = integers[{k}];" for k, i in enumerate(layout.integers)]
    return [
        *lines,
        "  const int64_t blocks = (N + width - 1) / width;",
        "#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)",
        "  for (int64_t job = 0; job < B * blocks; job++) {",
        "    const int64_t b = job / blocks, n = (job % blocks) * width;",
        "    const int64_t m = N - n < width ? N - n : width, at = b * N + n;",
    ]


def _strips(
    indent: str, asks: Sequence[tuple[str, str]], statements: Sequence[str], puts: Sequence[tuple[str, str, str]]
) -> list[str]:
    """The loop over the elements of a row, in strips.

    Args:
        indent: of the loop.
        asks: (condition, row): rows that are needed some steps later, where they exist.
        statements: of one element `e`.
        puts: (condition, to, from): rows that leave L1; "" is always.
    """
    bytes_ = "(end - s) * sizeof(float)"
    lines = [f"for (int64_t s = 0; s < m; s += {STRIP}) {{"]
    lines += [f"  const int64_t end = m - s < {STRIP} ? m : s + {STRIP};"]
    lines += [f"  if ({condition}) ask({row} + s, {bytes_});" for condition, row in asks]
    lines += ["#pragma GCC ivdep", "  for (int64_t e = s; e < end; e++) {"]
    lines += [f"    {line}" for line in statements] + ["  }"]
    for condition, to, kept in puts:
        guard = f"if ({condition}) " if condition else ""
        lines.append(f"  {guard}put({to} + s, {kept} + s, {bytes_}, stream);")
    return [line if line.startswith("#") else f"{indent}{line}" for line in [*lines, "}"]]


def _load_parameters(
    graph: Graph, parameters: Sequence[str], prefix: str
) -> tuple[list[str], dict[str, str], dict[int, str]]:
    """Statements before the loop over time; the expressions of the parameters and of what depends on them alone."""
    lines, names = [], {}
    for name in parameters:
        names[name] = f"p_{name}[e]"
        lines.append(f"    float p_{name}[BLOCK];")
        lines.append(f"    for (int64_t e = 0; e < m; e++) p_{name}[e] = {name}[b * {name}_b + (n + e) * {name}_n];")
    fixed = {k: f"{prefix}{k}[e]" for k in invariants(graph, parameters)}
    if not fixed:
        return lines, names, {}
    every = {name: names.get(name, "0") for name, _ in graph.inputs}
    body = Body(graph, every, "unused", fixed)
    lines += [f"    float {prefix}{k}[BLOCK];" for k in fixed]
    lines.append("    for (int64_t e = 0; e < m; e++) {")
    lines += [f"      {target} = {body.render(graph.nodes[k])};" for k, target in fixed.items()]
    lines.append("    }")
    return lines, names, fixed


def _forward(traced: Traced, states: Sequence[str], parameters: Sequence[str]) -> list[str]:
    graph = traced.forward
    lines = _head("forward", forward_layout(states, parameters))
    loads, names, fixed = _load_parameters(graph, parameters, "f")
    lines += loads
    for s in states:
        lines.append(f"    float s_{s}[BLOCK];")
        lines.append(f"    memcpy(s_{s}, first_{s} + at, m * sizeof(float));")
    lines.append("    float y_block[BLOCK];")
    lines.append("    for (int64_t t = 0; t < T; t++) {")
    for s in states:
        save = f"saved_{s} + (t / {CHUNK}) * B * N + at, s_{s}, m * sizeof(float)"
        lines.append(f"      if (saved_{s} && t % {CHUNK} == 0) put({save}, stream);")
    lines.append("      const float *restrict x_row = x + t * x_t + b * x_b + n;")
    names = {**names, "x": "x_row[e]", **{s: f"s_{s}[e]" for s in states}}
    body = Body(graph, names, "v", fixed)
    statements = [*body.lines, *(f"const float new_{s} = {body.output(s + chr(39))};" for s in states)]
    statements += [f"y_block[e] = {body.output('output')};", *(f"s_{s}[e] = new_{s};" for s in states)]
    lines.append("      const int64_t out = t * y_t + b * y_b + n;")
    puts = [("", "y + out", "y_block"), *((f"record_{s}", f"record_{s} + out", f"s_{s}") for s in states)]
    lines += _strips("      ", [(f"t + {AHEAD} < T", f"x_row + {AHEAD} * x_t")], statements, puts)
    lines.append("    }")
    lines += [f"    memcpy(last_{s} + at, s_{s}, m * sizeof(float));" for s in states]
    return [*lines, "    settle();", "  }", "}"]


def _recompute(traced: Traced, states: Sequence[str], names: dict[str, str], fixed: dict[int, str]) -> list[str]:
    """States of a chunk from the saved one: h_<state>[step] is the state before that step."""
    lines = [f"      memcpy(h_{s}[0], saved_{s} + c * B * N + at, m * sizeof(float));" for s in states]
    lines.append(f"      const int64_t steps = T - c * {CHUNK} < {CHUNK} ? T - c * {CHUNK} : {CHUNK};")
    lines.append("      for (int64_t k = 0; k + 1 < steps; k++) {")
    lines.append(f"        const float *restrict x_row = x + (c * {CHUNK} + k) * x_t + b * x_b + n;")
    body = Body(traced.forward, {**names, "x": "x_row[e]", **{s: f"h_{s}[k][e]" for s in states}}, "v", fixed)
    statements = [*body.lines, *(f"h_{s}[k + 1][e] = {body.output(s + chr(39))};" for s in states)]
    return [*lines, *_strips("        ", [], statements, []), "      }"]


def _backward(traced: Traced, states: Sequence[str], parameters: Sequence[str], learned: Sequence[str]) -> list[str]:
    assert traced.vjp is not None
    graph = traced.vjp
    lines = _head("backward", backward_layout(states, parameters, learned))
    loads, names, fixed = _load_parameters(traced.forward, parameters, "f")
    more, _, vjp_fixed = _load_parameters(graph, parameters, "g")
    lines += loads + more[2 * len(parameters) :]
    for s in states:
        lines.append(f"    float h_{s}[{CHUNK}][BLOCK], l_{s}[BLOCK];")
        lines.append(f"    memcpy(l_{s}, d_last_{s} + at, m * sizeof(float));")
    for p in learned:
        lines.append(f"    float a_{p}[BLOCK];")
        lines.append(f"    memset(a_{p}, 0, m * sizeof(float));")
    lines.append("    float d_x_block[BLOCK];")
    lines.append(f"    for (int64_t c = (T - 1) / {CHUNK}; T > 0 && c >= 0; c--) {{")
    lines += _recompute(traced, states, names, fixed)
    lines.append("      for (int64_t k = steps - 1; k >= 0; k--) {")
    lines.append(f"        const int64_t t = c * {CHUNK} + k;")
    lines.append("        const float *restrict x_row = x + t * x_t + b * x_b + n;")
    lines.append("        const float *restrict d_y_row = d_y + t * y_t + b * y_b + n;")
    for s in states:
        row = f"l_{s}[e] += d_record_{s}[t * y_t + b * y_b + n + e]"
        lines.append(f"        if (d_record_{s}) for (int64_t e = 0; e < m; e++) {row};")
    given = {**names, "x": "x_row[e]", "d_output": "d_y_row[e]"}
    given |= {s: f"h_{s}[k][e]" for s in states} | {f"d_{s}'": f"l_{s}[e]" for s in states}
    given |= {f"d_{p}'": f"a_{p}[e]" for p in learned}
    body = Body(graph, given, "w", vjp_fixed)
    results = {f"l_{s}": body.output(f"d_{s}") for s in states} | {f"a_{p}": body.output(f"d_{p}") for p in learned}
    statements = [*body.lines, *(f"const float new_{target} = {value};" for target, value in results.items())]
    statements += [f"d_x_block[e] = {body.output('d_x')};", *(f"{target}[e] = new_{target};" for target in results)]
    asks = [(f"t >= {AHEAD}", f"d_y_row - {AHEAD} * y_t"), (f"t >= {CHUNK}", f"x_row - {CHUNK} * x_t")]
    lines += _strips("        ", asks, statements, [("d_x", "d_x + t * x_t + b * x_b + n", "d_x_block")])
    lines += ["      }", "    }"]
    lines += [f"    memcpy(d_first_{s} + at, l_{s}, m * sizeof(float));" for s in states]
    lines += [f"    memcpy(d_{p} + at, a_{p}, m * sizeof(float));" for p in learned]
    return [*lines, "    settle();", "  }", "}"]


def source(
    traced: Traced, states: Sequence[str], parameters: Sequence[str], learned: Sequence[str], dtype: torch.dtype
) -> str:
    """The C source of a traced step: deterministic, readable; `backward` only if the step's product was traced.

    Args:
        states, parameters: names, in order.
        learned: the parameters whose gradients the product carries.
        dtype: float32 or float64, of all tensors.

    Raises:
        GraphError: an operation that cannot be rendered; names it.
    """
    lines = _forward(traced, states, parameters)
    if traced.vjp is not None:
        lines += ["", *_backward(traced, states, parameters, learned)]
    text = "\n".join(lines) + "\n"
    if dtype is torch.float64:
        text = text.replace("float ", "double ").replace("(float)", "(double)")
    return PREAMBLE.format(block=BLOCK) + "\n" + text
