"""The C source of a scan: forward over all time steps, and backward by recomputation from a state saved every C steps.

Layout: elements (b, n), b < B, n < N, n contiguous; time and batch by strides, so that [T, B, N] and [B, T, N] are the
same kernel. Each block of elements runs through all steps before the next one starts, with its states in L1. A
parameter of fewer values than there are elements begins anew with its first: one value, or one for each neuron.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from tracetorch.fused.emit_c import BLOCK, PREAMBLE, Body, invariants
from tracetorch.fused.graph import Graph, GraphError
from tracetorch.fused.signature import Signature
from tracetorch.fused.trace import Traced

CHUNK = 32  # steps between two saved states
STRIP = 64  # elements between two requests for later rows: a burst of them would stall the arithmetic
AHEAD = 2  # rows asked for before they are needed
STACK = 1 << 18  # bytes of a thread's stack that a kernel's arrays may take: half of the smallest stack that is usual
_NARROWEST = 8  # elements of a block

# Elements of a sequence from one step to the next and from one b to the next: `by_t`, `by_b`. `stream`: whether outputs
# go past the caches. `width`: elements of a job, at most BLOCK. After them the parameters' sizes, and in the backward
# kernel `still_<output>`: whether an output's gradient is one row [B, N], the same at every step (of a sum over time).
INTEGERS = ("T", "B", "N", "by_t", "by_b", "threads", "stream", "width")


def _head(name: str, pointers: Sequence[str], signature: Signature, more: Sequence[str] = ()) -> list[str]:
    lines = [f"void {name}(void **pointers, const int64_t *integers) {{"]
    lines += [f"  float *restrict {p} = pointers[{k}];" for k, p in enumerate(pointers)]
    names = ["given_width" if i == "width" else i for i in (*INTEGERS, *signature.sizes, *more)]
    lines += [f"  const int64_t {i} = integers[{k}];" for k, i in enumerate(names)]
    return [
        *lines,
        "  const int64_t width = given_width < BLOCK ? given_width : BLOCK;",
        "  const int64_t blocks = (N + width - 1) / width;",
        "#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)",
        "  for (int64_t job = 0; job < B * blocks; job++) {",
        "    const int64_t b = job / blocks, n = (job % blocks) * width;",
        "    const int64_t m = N - n < width ? N - n : width, at = b * N + n, start = b * by_b + n;",
        "    // Where the next job starts: its first rows are asked for during the last ones of this.",
        "    const int64_t next = job + 1 < B * blocks ? job + 1 : job;",
        "    const int64_t then = next / blocks * by_b + next % blocks * width;",
    ]


def _strips(
    indent: str, asks: Sequence[str], statements: Sequence[str], puts: Sequence[tuple[str, str, str]]
) -> list[str]:
    """The loop over the elements of a row, in strips.

    Args:
        indent: of the loop.
        asks: rows that are needed some steps later.
        statements: of one element `e`.
        puts: (condition, to, from): rows that leave L1; "" is always.
    """
    bytes_ = "(end - s) * sizeof(float)"
    lines = [f"for (int64_t s = 0; s < m; s += {STRIP}) {{"]
    lines += [f"  const int64_t end = m - s < {STRIP} ? m : s + {STRIP};"]
    lines += [f"  ask({row} + s, {bytes_});" for row in asks]
    lines += ["#pragma GCC ivdep", "  for (int64_t e = s; e < end; e++) {"]
    lines += [f"    {line}" for line in statements] + ["  }"]
    for condition, to, kept in puts:
        guard = f"if ({condition}) " if condition else ""
        lines.append(f"  {guard}put({to} + s, {kept} + s, {bytes_}, stream);")
    return [line if line.startswith("#") else f"{indent}{line}" for line in [*lines, "}"]]


def _given_or_zero(to: str, given: str) -> str:
    """A statement that loads a block of a state, zero where no tensor is given."""
    return f"if ({given}) memcpy({to}, {given} + at, m * sizeof(float)); else memset({to}, 0, m * sizeof(float));"


def _load_parameters(graph: Graph, signature: Signature) -> tuple[list[str], dict[str, str]]:
    """Statements before the loop over time, and the expressions of the parameters."""
    lines, names = [], {}
    for name in signature.parameters:
        p = signature.plain[name]
        names[name] = f"p_{p}[e]"
        lines.append(f"    float p_{p}[BLOCK];")
        lines.append(f"    for (int64_t e = 0, place = at % size_{p}; e < m; e++, place++) {{")
        lines.append(f"      if (place == size_{p}) place = 0;")
        lines.append(f"      p_{p}[e] = given_{p}[place];")
        lines.append("    }")
    return lines, names


def _hoisted(graph: Graph, names: dict[str, str], prefix: str) -> tuple[list[str], dict[int, str]]:
    """Statements for what depends on the parameters alone, and the expressions of these nodes."""
    fixed = {k: f"{prefix}{k}[e]" for k in invariants(graph, tuple(names))}
    if not fixed:
        return [], {}
    every = {name: names.get(name, "0") for name, _ in graph.inputs}
    body = Body(graph, every, "unused", fixed)
    lines = [f"    float {prefix}{k}[BLOCK];" for k in fixed]
    lines.append("    for (int64_t e = 0; e < m; e++) {")
    lines += [f"      {target} = {body.render(graph.nodes[k])};" for k, target in fixed.items()]
    return [*lines, "    }"], fixed


def _rows(names: Sequence[str], t: str) -> list[str]:
    """Pointers to a step's rows of sequences."""
    return [f"const float *restrict {name}_row = {name} + {t} * by_t + start;" for name in names]


def _forward(traced: Traced, signature: Signature) -> list[str]:
    graph, plain = traced.forward, signature.plain
    lines = _head("forward", signature.forward_pointers, signature)
    loads, names = _load_parameters(graph, signature)
    hoisted, fixed = _hoisted(graph, names, "f")
    lines += loads + hoisted
    states = [plain[name] for name in signature.states]
    inputs = signature.named("in", signature.inputs)
    outputs = signature.named("out", signature.outputs)
    for s in states:
        lines.append(f"    float s_{s}[BLOCK];")
        lines.append(f"    {_given_or_zero(f's_{s}', f'first_{s}')}")
    lines += [f"    float {name}_block[BLOCK];" for name in outputs]
    lines.append("    for (int64_t t = 0; t < T; t++) {")
    for s in states:
        save = f"saved_{s} + (t / {CHUNK} - 1) * B * N + at, s_{s}, m * sizeof(float)"
        lines.append(f"      if (saved_{s} && t && t % {CHUNK} == 0) put({save}, stream);")
    lines += [f"      {line}" for line in _rows(inputs, "t")]
    names |= {name: f"in_{plain[name]}_row[e]" for name in signature.inputs}
    names |= {name: f"s_{plain[name]}[e]" for name in signature.states}
    body = Body(graph, names, "v", fixed)
    statements = [
        *body.lines,
        *(f"const float new_{plain[name]} = {body.output(name + chr(39))};" for name in signature.states),
        *(f"out_{plain[name]}_block[e] = {body.output(name)};" for name in signature.outputs),
        *(f"s_{s}[e] = new_{s};" for s in states),
    ]
    lines.append("      const int64_t place = t * by_t + start;")
    puts = [("", f"{name} + place", f"{name}_block") for name in outputs]
    puts += [(f"record_{s}", f"record_{s} + place", f"s_{s}") for s in states]
    here, there = f"place + {AHEAD} * by_t", f"(t + {AHEAD}) % T * by_t + then"
    lines.append(f"      const int64_t later = t + {AHEAD} < T ? {here} : {there};")
    asks = [f"{name} + later" for name in inputs]
    lines += _strips("      ", asks, statements, puts)
    lines.append("    }")
    lines += [f"    put(last_{s} + at, s_{s}, m * sizeof(float), stream);" for s in states]
    return [*lines, "    settle();", "  }", "}"]


def _recompute(traced: Traced, signature: Signature, names: dict[str, str], fixed: dict[int, str]) -> list[str]:
    """States of a chunk from the one before it: h_<state>[step] is the state before that step."""
    plain = signature.plain
    states = [plain[name] for name in signature.states]
    lines = []
    for s in states:
        lines.append(f"      if (c) memcpy(h_{s}[0], saved_{s} + (c - 1) * B * N + at, m * sizeof(float));")
        lines.append(f"      else {_given_or_zero(f'h_{s}[0]', f'first_{s}')}")
    lines.append(f"      const int64_t steps = T - c * {CHUNK} < {CHUNK} ? T - c * {CHUNK} : {CHUNK};")
    lines.append("      for (int64_t k = 0; k + 1 < steps; k++) {")
    lines += [f"        {line}" for line in _rows(signature.named("in", signature.inputs), f"(c * {CHUNK} + k)")]
    names = {**names, **{name: f"h_{plain[name]}[k][e]" for name in signature.states}}
    body = Body(traced.forward, names, "v", fixed)
    new = [f"h_{plain[name]}[k + 1][e] = {body.output(name + chr(39))};" for name in signature.states]
    return [*lines, *_strips("        ", [], [*body.lines, *new], []), "      }"]


def _product(graph: Graph, signature: Signature, names: dict[str, str], fixed: dict[int, str]) -> list[str]:
    """The statements of one step of the vector-Jacobian product."""
    plain = signature.plain
    given = {**names, **{name: f"h_{plain[name]}[k][e]" for name in signature.states}}
    given |= {f"d_{name}": f"d_out_{plain[name]}_row[e]" for name in signature.outputs}
    given |= {f"d_{name}'": f"l_{plain[name]}[e]" for name in signature.states}
    given |= {f"d_{name}'": f"a_{plain[name]}[e]" for name in signature.learned}
    body = Body(graph, given, "w", fixed)
    results = {f"l_{plain[name]}": body.output(f"d_{name}") for name in signature.states}
    results |= {f"a_{plain[name]}": body.output(f"d_{name}") for name in signature.learned}
    return [
        *body.lines,
        *(f"const float new_{target} = {value};" for target, value in results.items()),
        *(f"d_in_{plain[name]}_block[e] = {body.output(f'd_{name}')};" for name in signature.differentiable_inputs),
        *(f"{target}[e] = new_{target};" for target in results),
    ]


def _places_back() -> list[str]:
    """Where the rows lie that are needed next, going back: gradients some steps, inputs a chunk from now.

    In the first steps of all these are rows of the next job, whose first chunk is the last one in time, of which there
    may be fewer steps.
    """
    return [
        f"const int64_t sooner = t >= {AHEAD} ? place - {AHEAD} * by_t : (T - {AHEAD} % T + t) % T * by_t + then;",
        f"const int64_t then_t = (T - 1) / {CHUNK} * {CHUNK} + k;",
        f"const int64_t chunk_sooner = c ? place - {CHUNK} * by_t : then_t < T ? then_t * by_t + then : place;",
    ]


def _backward(traced: Traced, signature: Signature) -> list[str]:
    assert traced.vjp is not None
    plain = signature.plain
    still = signature.named("still", signature.outputs)
    lines = _head("backward", signature.backward_pointers, signature, still)
    loads, names = _load_parameters(traced.forward, signature)
    hoisted, fixed = _hoisted(traced.forward, names, "f")
    vjp_hoisted, vjp_fixed = _hoisted(traced.vjp, names, "g")
    lines += loads + hoisted + vjp_hoisted
    states = [plain[name] for name in signature.states]
    learned = [plain[name] for name in signature.learned]
    inputs = signature.named("in", signature.inputs)
    d_outputs = signature.named("d_out", signature.outputs)
    for s in states:
        lines.append(f"    float h_{s}[{CHUNK}][BLOCK], l_{s}[BLOCK];")
        lines.append(f"    {_given_or_zero(f'l_{s}', f'd_last_{s}')}")
    for p in learned:
        lines.append(f"    float a_{p}[BLOCK];")
        lines.append(f"    memset(a_{p}, 0, m * sizeof(float));")
    d_inputs = signature.named("d_in", signature.differentiable_inputs)
    lines += [f"    float {name}_block[BLOCK];" for name in d_inputs]
    lines.append(f"    for (int64_t c = (T - 1) / {CHUNK}; T > 0 && c >= 0; c--) {{")
    names |= {name: f"in_{plain[name]}_row[e]" for name in signature.inputs}
    lines += _recompute(traced, signature, names, fixed)
    lines.append("      for (int64_t k = steps - 1; k >= 0; k--) {")
    lines.append(f"        const int64_t t = c * {CHUNK} + k, place = t * by_t + start;")
    lines += [f"        {line}" for line in _rows(inputs, "t")]
    for name, same in zip(d_outputs, still, strict=True):
        lines.append(f"        const float *restrict {name}_row = {name} + ({same} ? at : place);")
    for s in states:
        row = f"l_{s}[e] += d_record_{s}[place + e]"
        lines.append(f"        if (d_record_{s}) for (int64_t e = 0; e < m; e++) {row};")
    lines += [f"        {line}" for line in _places_back()]
    asks = [f"{name} + ({same} ? at : sooner)" for name, same in zip(d_outputs, still, strict=True)]
    asks += [f"{name} + chunk_sooner" for name in inputs]
    puts = [(name, f"{name} + place", f"{name}_block") for name in d_inputs]
    lines += _strips("        ", asks, _product(traced.vjp, signature, names, vjp_fixed), puts)
    lines += ["      }", "    }"]
    lines += [f"    if (d_first_{s}) memcpy(d_first_{s} + at, l_{s}, m * sizeof(float));" for s in states]
    lines += [f"    memcpy(d_given_{p} + at, a_{p}, m * sizeof(float));" for p in learned]
    return [*lines, "    settle();", "  }", "}"]


def _block(lines: Sequence[str], dtype: torch.dtype) -> int:
    """Elements of a block, so few that the arrays of a function fit on the stack.

    Raises:
        GraphError: a step of so many states that none would.
    """
    declared = re.findall(r"(?:\[(\d+)\])?\[BLOCK\]", "\n".join(lines))
    element = sum(int(rows or 1) for rows in declared) * dtype.itemsize
    block = BLOCK
    while block * element > STACK:
        block //= 2
    if block < _NARROWEST:
        raise GraphError(
            f"the step's states and parameters take {element} bytes of a kernel's stack for each element, of at most "
            f"{STACK // _NARROWEST}; split the layer into several of fewer states"
        )
    return block


def source(traced: Traced, signature: Signature, dtype: torch.dtype) -> str:
    """The C source of a traced step: deterministic, readable; `backward` only if the step's product was traced.

    Args:
        signature: names in order; the product carries the gradients of its `learned`.
        dtype: float32 or float64, of all tensors.

    Raises:
        GraphError: an operation that cannot be rendered; names it. Too many states; says how many bytes.
    """
    lines = _forward(traced, signature)
    block = _block(lines, dtype)
    if traced.vjp is not None:
        back = _backward(traced, signature)
        block = min(block, _block(back, dtype))
        lines += ["", *back]
    text = "\n".join(lines) + "\n"
    if dtype is torch.float64:
        text = text.replace("float ", "double ").replace("(float)", "(double)")
    return PREAMBLE.format(block=block) + "\n" + text
