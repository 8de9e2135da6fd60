"""The Triton source of a scan: forward over all time steps, and backward by recomputation from states saved on the way.

Layout: elements (b, n), b < B, n < N, n contiguous; time and batch by strides, so that [T, B, N] and [B, T, N] are the
same kernel. A program runs one block of elements through all steps, its states in registers. Offsets are a scalar of 64
bits and a place in the block. A parameter has a stride for b and one for n, of which either may be 0.

The step and its vector-Jacobian product are functions of their own, inlined by the compiler. The input of AHEAD steps
is loaded before their arithmetic. The forward kernel saves the states before every CHUNK-th step. The backward kernel
takes UNROLL steps at a time, last ones first: from the saved states before them it runs to the first of the UNROLL,
keeps the states of these in registers, and goes back through them; the T % UNROLL last steps of all go one by one.
Gradients of parameters are summed over time per element, in the order of the steps.

This module writes text; launch_triton.py compiles and runs it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from tracetorch.fused.emit_triton import TYPES, Body, function
from tracetorch.fused.kernel_c import Layout
from tracetorch.fused.trace import Traced

_SIZES = ("T", "B", "N", "x_t", "x_b", "y_t", "y_b")
ROWS = ("N", "x_t", "x_b", "y_t", "y_b")  # given in units of UNIT elements
_MATHS = {
    "cuda": "from triton.language.extra import libdevice",
    "cpu": "from tracetorch.fused.interpreter_triton import libdevice",
}


def chunk(states: int) -> int:
    """Steps between two saved states: states in number / chunk is the memory held, in inputs."""
    return 8 if states <= 8 else 16


def unroll(states: int, dtype: torch.dtype) -> int:
    """Steps whose states the backward kernel keeps in registers: fewer for many or wide states."""
    words = states * (2 if dtype is torch.float64 else 1)
    return 8 if words <= 2 else 4 if words <= 8 else 2 if words <= 16 else 1


def _integers(parameters: Sequence[str]) -> tuple[str, ...]:
    return (*_SIZES, *(f"{name}_{axis}" for name in parameters for axis in ("b", "n")))


def forward_layout(states: Sequence[str], parameters: Sequence[str]) -> Layout:
    """Of the forward kernel; `saved_*` and `record_*` may be None."""
    pointers = ["x", "y"]
    for state in states:
        pointers += [f"first_{state}", f"last_{state}", f"saved_{state}", f"record_{state}"]
    return Layout((*pointers, *parameters), _integers(parameters))


def backward_layout(states: Sequence[str], parameters: Sequence[str], learned: Sequence[str]) -> Layout:
    """Of the backward kernel; `d_x` may be None."""
    pointers = ["x", "d_y", "d_x"]
    for state in states:
        pointers += [f"saved_{state}", f"d_last_{state}", f"d_first_{state}"]
    pointers += [*parameters, *(f"d_{name}" for name in learned)]
    return Layout(tuple(pointers), _integers(parameters))


def _identifiers(names: Sequence[str]) -> dict[str, str]:
    """A Python name for each, which a path of a parameter (`readout.weight`) is not; different ones differ."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"\W", "_", name)
        found[name] = plain if plain not in found.values() else f"{plain}_{len(found)}"
    return found


class _Source:
    """The pieces of the text that both kernels share."""

    def __init__(
        self,
        traced: Traced,
        states: Sequence[str],
        parameters: Sequence[str],
        learned: Sequence[str],
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.traced, self.dtype, self.device = traced, dtype, device
        names = _identifiers([*states, *parameters])
        self.states = [names[name] for name in states]
        self.parameters = [names[name] for name in parameters]
        self.learned = [names[name] for name in learned]
        self.original = {plain: name for name, plain in names.items()}
        self.new_states = [f"s_{s}" for s in self.states]
        self.fixed = [f"p_{p}" for p in self.parameters]

    def step(self) -> list[str]:
        """`step(x, states, parameters) -> output, new states`."""
        names = {"x": "x"} | {self.original[s]: f"s_{s}" for s in self.states}
        names |= {self.original[p]: f"p_{p}" for p in self.parameters}
        body = Body(self.traced.forward, names, self.device)
        results = [body.output(name, self.dtype) for name in ("output", *(f"{self.original[s]}'" for s in self.states))]
        return function("step", body, ["x", *self.new_states, *self.fixed], results)

    def vjp(self) -> list[str]:
        """`vjp(x, states, parameters, d_output, d of new states, d of parameters so far) -> d of x, states, ...`."""
        assert self.traced.vjp is not None
        names = {"x": "x", "d_output": "d_output"}
        names |= {self.original[s]: f"s_{s}" for s in self.states}
        names |= {self.original[p]: f"p_{p}" for p in self.parameters}
        names |= {f"d_{self.original[s]}'": f"l_{s}" for s in self.states}
        names |= {f"d_{self.original[p]}'": f"a_{p}" for p in self.learned}
        body = Body(self.traced.vjp, names, self.device)
        wanted = ("x", *(self.original[name] for name in (*self.states, *self.learned)))
        results = [body.output(f"d_{name}", self.dtype) for name in wanted]
        return function("vjp", body, ["x", *self.new_states, *self.fixed, "d_output", *self.carried()], results)

    def carried(self) -> list[str]:
        """What goes back through time: the gradients of the states, and those of the parameters so far."""
        return [*(f"l_{s}" for s in self.states), *(f"a_{p}" for p in self.learned)]

    def head(self, name: str, pointers: Sequence[str], constants: Sequence[str]) -> list[str]:
        """The kernel's signature, its place, and its parameters."""
        integers = _integers(self.parameters)
        # No value of theirs is compiled in: rows of a multiple of 16 elements, which are read in vectors, have UNIT=16.
        plain = ", ".join(f'"{integer}"' for integer in integers)
        lines = [f"@triton.jit(do_not_specialize=[{plain}])", f"def {name}("]
        lines += [f"    {pointer}," for pointer in pointers]
        lines += [f"    {integer}: tl.int64," for integer in integers]
        lines += [f"    {constant}: tl.constexpr," for constant in constants]
        lines += [
            "):",
            *(f"    {row} *= UNIT" for row in ROWS),
            "    blocks = (N + BLOCK - 1) // BLOCK",
            "    program = tl.program_id(0).to(tl.int64)",
            "    b = program // blocks",
            "    n = (program % blocks) * BLOCK",
            "    e = tl.arange(0, BLOCK)",
            "    live = e < N - n",
            "    at = b * N + n",
            "    x_at = b * x_b + n",
            "    y_at = b * y_b + n",
        ]
        for p in self.parameters:
            lines.append(f"    p_{p} = {load(f'{p}_ptr + b * {p}_b + n * {p}_n + e * {p}_n')}")
        return lines

    def run_step(self, x: str, output: str) -> str:
        """A statement that advances the states."""
        targets, values = ", ".join([output, *self.new_states]), ", ".join([x, *self.new_states, *self.fixed])
        return f"{targets} = step({values})"

    def load_saved(self, indent: str) -> list[str]:
        """The states before the chunk `c`."""
        return [f"{indent}s_{s} = {load(f'saved_{s} + c * B * N + at + e')}" for s in self.states]


def load(place: str) -> str:
    """A block from memory, 0 where there is no element."""
    return f"tl.load({place}, mask=live, other=0.0)"


def store(place: str, value: str) -> str:
    """A block to memory, where there are elements."""
    return f"tl.store({place}, {value}, mask=live)"


def _forward(source: _Source) -> list[str]:
    pointers = ["x", "y"]
    for s in source.states:
        pointers += [f"first_{s}", f"last_{s}", f"saved_{s}", f"record_{s}"]
    pointers += [f"{p}_ptr" for p in source.parameters]
    lines = source.head("forward", pointers, ("BLOCK", "UNIT", "AHEAD", "CHUNK"))
    lines += [f"    s_{s} = {load(f'first_{s} + at + e')}" for s in source.states]

    def one_step(indent: str, t: str, x: str) -> list[str]:
        found = [source.run_step(x, "out"), store(f"y + {t} * y_t + y_at + e", "out")]
        for s in source.states:
            found.append(f"if record_{s} is not None:")
            found.append(f"    {store(f'record_{s} + {t} * y_t + y_at + e', f's_{s}')}")
        return [f"{indent}{line}" for line in found]

    def save(indent: str, t: str) -> list[str]:
        if not source.states:
            return []
        found = [f"if saved_{source.states[0]} is not None:", f"    if {t} % CHUNK == 0:"]
        found += [f"        {store(f'saved_{s} + {t} // CHUNK * B * N + at + e', f's_{s}')}" for s in source.states]
        return [f"{indent}{line}" for line in found]

    lines.append("    t = T * 0")
    lines.append("    while t + AHEAD <= T:")
    lines.append("        xs = ()")
    lines.append("        for k in tl.static_range(AHEAD):")
    lines.append(f"            xs += ({load('x + (t + k) * x_t + x_at + e')},)")
    lines.append("        for k in tl.static_range(AHEAD):")
    if source.states:
        lines += ["            if k % CHUNK == 0:", *save(" " * 16, "(t + k)")]
    lines += one_step(" " * 12, "(t + k)", "xs[k]")
    lines.append("        t += AHEAD")
    lines.append("    while t < T:")
    lines += save(" " * 8, "t")
    lines += one_step(" " * 8, "t", load("x + t * x_t + x_at + e"))
    lines.append("        t += 1")
    return [*lines, *(f"    {store(f'last_{s} + at + e', f's_{s}')}" for s in source.states)]


def _one_back(source: _Source) -> list[str]:
    """Steps that no group of UNROLL holds: each from the saved states before it, without memory for others."""
    lines = ["    while end % UNROLL != 0:", "        t = end - 1", "        c = t // CHUNK"]
    lines += source.load_saved(" " * 8)
    if source.states:
        lines.append("        k = c * CHUNK")
        lines.append("        while k < t:")
        lines.append(f"            {source.run_step(load('x + k * x_t + x_at + e'), '_')}")
        lines.append("            k += 1")
    lines.append(f"        now = {load('x + t * x_t + x_at + e')}")
    lines.append(f"        d_output = {load('d_y + t * y_t + y_at + e')}")
    given = ", ".join(["now", *source.new_states, *source.fixed, "d_output", *source.carried()])
    lines.append(f"        {', '.join(['d_now', *source.carried()])} = vjp({given})")
    lines.append("        if d_x is not None:")
    lines.append(f"            {store('d_x + t * x_t + x_at + e', 'd_now')}")
    return [*lines, "        end = t"]


def _group_back(source: _Source) -> list[str]:
    """UNROLL steps, their states in registers."""
    lines = ["    while end > 0:", "        t = end - UNROLL", "        c = t // CHUNK"]
    lines += source.load_saved(" " * 8)
    if source.states:
        lines.append("        if UNROLL < CHUNK:")
        lines.append("            k = c * CHUNK")
        lines.append("            while k < t:")
        lines.append("                before = ()")
        lines.append("                for j in tl.static_range(UNROLL):")
        lines.append(f"                    before += ({load('x + (k + j) * x_t + x_at + e')},)")
        lines.append("                for j in tl.static_range(UNROLL):")
        lines.append(f"                    {source.run_step('before[j]', '_')}")
        lines.append("                k += UNROLL")
    lines += ["        xs = ()", "        d_ys = ()", "        for j in tl.static_range(UNROLL):"]
    lines.append(f"            xs += ({load('x + (t + j) * x_t + x_at + e')},)")
    lines.append(f"            d_ys += ({load('d_y + (t + j) * y_t + y_at + e')},)")
    lines += [f"        h_{s} = (s_{s},)" for s in source.states]
    if source.states:
        lines.append("        for j in tl.static_range(UNROLL - 1):")
        lines.append(f"            {source.run_step('xs[j]', '_')}")
        lines += [f"            h_{s} += (s_{s},)" for s in source.states]
    lines.append("        for j in tl.static_range(UNROLL - 1, -1, -1):")
    kept = [f"h_{s}[j]" for s in source.states]
    given = ", ".join(["xs[j]", *kept, *source.fixed, "d_ys[j]", *source.carried()])
    lines.append(f"            {', '.join(['d_now', *source.carried()])} = vjp({given})")
    lines.append("            if d_x is not None:")
    lines.append(f"                {store('d_x + (t + j) * x_t + x_at + e', 'd_now')}")
    return [*lines, "        end = t"]


def _backward(source: _Source) -> list[str]:
    pointers = ["x", "d_y", "d_x"]
    for s in source.states:
        pointers += [f"saved_{s}", f"d_last_{s}", f"d_first_{s}"]
    pointers += [*(f"{p}_ptr" for p in source.parameters), *(f"d_{p}_ptr" for p in source.learned)]
    lines = source.head("backward", pointers, ("BLOCK", "UNIT", "UNROLL", "CHUNK"))
    lines += [f"    l_{s} = {load(f'd_last_{s} + at + e')}" for s in source.states]
    lines += [f"    a_{p} = tl.zeros([BLOCK], {TYPES[source.dtype]})" for p in source.learned]
    lines += ["    end = T", *_one_back(source), *_group_back(source)]
    lines += [f"    {store(f'd_first_{s} + at + e', f'l_{s}')}" for s in source.states]
    return [*lines, *(f"    {store(f'd_{p}_ptr + at + e', f'a_{p}')}" for p in source.learned)]


def source(
    traced: Traced,
    states: Sequence[str],
    parameters: Sequence[str],
    learned: Sequence[str],
    dtype: torch.dtype,
    device: str = "cuda",
) -> str:
    """The Triton source of a traced step: deterministic, readable; `backward` only if the step's product was traced.

    Args:
        states, parameters: names, in order.
        learned: the parameters whose gradients the product carries.
        dtype: float32 or float64, of all tensors.
        device: "cuda", or "cpu" for Triton's interpreter: whose eager torch the arithmetic follows.

    Raises:
        GraphError: an operation that cannot be rendered; names it.
    """
    parts = _Source(traced, states, parameters, learned, dtype, device)
    lines = ["import triton", "import triton.language as tl", _MATHS[device], "", "", *parts.step()]
    if traced.vjp is not None:
        lines += ["", "", *parts.vjp()]
    lines += ["", "", *_forward(parts)]
    if traced.vjp is not None:
        lines += ["", "", *_backward(parts)]
    return "\n".join(lines) + "\n"
