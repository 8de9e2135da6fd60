"""The Triton source of a scan: forward over all time steps, and backward by recomputation from states saved on the way.

Layout: elements (b, n), b < B, n < N, n contiguous; time and batch by strides, so that [T, B, N] and [B, T, N] are the
same kernel. A program runs one block of elements through all steps, its states in registers. Offsets are a scalar of 64
bits and a place in the block. A parameter has a stride for b and one for n, of which either may be 0.

The step and its vector-Jacobian product are functions of their own, inlined by the compiler. Rows are read a group of
steps ahead: while a group is computed, whose rows are in registers, those of the next one are on their way. Where too
few elements fill no GPU, so that nothing else is done while one waits, rows FAR steps ahead are brought into its second
cache too. The forward kernel takes AHEAD steps at a time, and the T % AHEAD last ones, whose rows it has by then, one
by one; it saves the states before every CHUNK-th step. The backward kernel takes UNROLL steps at a time, last ones
first: from the saved states before them it runs to the first of the UNROLL, keeps the states of these in registers, and
goes back through them. Gradients of parameters are summed over time per element, in the order of the steps.

This module writes text; launch_triton.py compiles and runs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tracetorch.fused.emit_triton import TYPES, Body, function
from tracetorch.fused.signature import Signature
from tracetorch.fused.trace import Traced

INTEGERS = ("T", "B", "N", "by_t", "by_b")
ROWS = ("N", "by_t", "by_b")  # given in units of UNIT elements
_MATHS = {
    "cuda": "from triton.language.extra import libdevice",
    "cpu": "from tracetorch.fused.interpreter_triton import libdevice",
}

# A block of addresses that can be read. It has no effect on any value.
_PREFETCH = (
    "@triton.jit",
    "def prefetch(places):",
    '    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places.to(tl.int64)], '
    "dtype=tl.int32, is_pure=False, pack=1)",
)


def chunk(states: int) -> int:
    """Steps between two saved states: states in number / chunk is the memory held, in inputs."""
    return 8 if states <= 8 else 16


def unroll(states: int, dtype: torch.dtype) -> int:
    """Steps whose states the backward kernel keeps in registers: fewer for many or wide states."""
    words = states * (2 if dtype is torch.float64 else 1)
    return 8 if words <= 2 else 4 if words <= 8 else 2 if words <= 16 else 1


class _Source:
    """The pieces of the text that both kernels share."""

    def __init__(self, traced: Traced, signature: Signature, dtype: torch.dtype, device: str) -> None:
        self.traced, self.signature, self.dtype, self.device = traced, signature, dtype, device
        plain = signature.plain
        self.inputs = signature.named("in", signature.inputs)
        self.d_inputs = signature.named("d_in", signature.differentiable_inputs)
        self.outputs = signature.named("out", signature.outputs)
        self.states = [plain[name] for name in signature.states]
        self.learned = [plain[name] for name in signature.learned]
        self.values = signature.named("s", signature.states)
        self.fixed = signature.named("p", signature.parameters)
        self.names = dict(zip(signature.inputs, self.inputs, strict=True))
        self.names |= dict(zip(signature.states, self.values, strict=True))
        self.names |= dict(zip(signature.parameters, self.fixed, strict=True))

    def step(self) -> list[str]:
        """`step(inputs, states, parameters) -> outputs, new states`."""
        body = Body(self.traced.forward, self.names, self.device)
        wanted = (*self.signature.outputs, *(f"{name}'" for name in self.signature.states))
        results = [body.output(name, self.dtype) for name in wanted]
        return function("step", body, [*self.inputs, *self.values, *self.fixed], results)

    def vjp(self) -> list[str]:
        """`vjp(inputs, states, parameters, d of outputs, of new states, of parameters so far) -> d of inputs, ...`."""
        assert self.traced.vjp is not None
        signature, plain = self.signature, self.signature.plain
        names = {**self.names, **{f"d_{name}": f"d_out_{plain[name]}" for name in signature.outputs}}
        names |= {f"d_{name}'": f"l_{plain[name]}" for name in signature.states}
        names |= {f"d_{name}'": f"a_{plain[name]}" for name in signature.learned}
        body = Body(self.traced.vjp, names, self.device)
        wanted = (*signature.differentiable_inputs, *signature.states, *signature.learned)
        results = [body.output(f"d_{name}", self.dtype) for name in wanted]
        given = [*self.inputs, *self.values, *self.fixed, *(f"d_{name}" for name in self.outputs), *self.carried()]
        return function("vjp", body, given, results)

    def carried(self) -> list[str]:
        """What goes back through time: the gradients of the states, and those of the parameters so far."""
        return [*(f"l_{s}" for s in self.states), *(f"a_{p}" for p in self.learned)]

    def head(self, name: str, pointers: Sequence[str], constants: Sequence[str]) -> list[str]:
        """The kernel's signature, its place, and its parameters."""
        integers = (*INTEGERS, *self.signature.strides)
        # No value of theirs is compiled in, nor where tensors begin: what is read in vectors has UNIT=4.
        plain, places = (", ".join(f'"{each}"' for each in group) for group in (integers, pointers))
        lines = [f"@triton.jit(do_not_specialize=[{plain}], do_not_specialize_on_alignment=[{places}])", f"def {name}("]
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
            *(["    inside = tl.where(live, e, 0)"] if self.device == "cuda" else []),
            "    at = b * N + n",
            "    start = b * by_b + n",
        ]
        for p in (self.signature.plain[name] for name in self.signature.parameters):
            lines.append(f"    p_{p} = {load(f'given_{p} + b * by_b_{p} + n * by_n_{p} + e * by_n_{p}')}")
        return lines

    def run_step(self, inputs: Sequence[str], outputs: Sequence[str]) -> str:
        """A statement that advances the states."""
        targets, values = ", ".join([*outputs, *self.values]), ", ".join([*inputs, *self.values, *self.fixed])
        return f"{targets} = step({values})"

    def unused(self) -> list[str]:
        """A name for every output that is not wanted."""
        return ["_"] * len(self.outputs)

    def load_group(self, indent: str, names: Sequence[str], prefix: str, count: str, t: str, mask: str) -> list[str]:
        """The rows of several steps as tuples `<prefix><name>`, `t` being the step of the loop's `j`."""
        lines = [f"{indent}{prefix}{name} = ()" for name in names]
        lines.append(f"{indent}for j in tl.static_range({count}):")
        return [*lines, *(f"{indent}    {prefix}{name} += ({load(row(name, t), mask)},)" for name in names)]

    def prefetch(self, names: Sequence[str], count: str, far: str, t: str) -> list[str]:
        """Bring rows of a later group, of which `far` is the first, into the GPU's second cache; `t` is that of `j`."""
        if self.device != "cuda":
            return []
        lines = ["        if FAR > 0:", f"            far = {far}", f"            for j in tl.static_range({count}):"]
        return [*lines, *(f"                prefetch({row(name, t, 'inside')})" for name in names)]


def row(sequence: str, t: str, e: str = "e") -> str:
    """The place of a step's block."""
    return f"{sequence} + {t} * by_t + start + {e}"


def load(place: str, mask: str = "live") -> str:
    """A block from memory, 0 where there is no element."""
    return f"tl.load({place}, mask={mask}, other=0.0)"


def store(place: str, value: str) -> str:
    """A block to memory, where there are elements."""
    return f"tl.store({place}, {value}, mask=live)"


def _forward(source: _Source) -> list[str]:
    constants = ("BLOCK", "UNIT", "AHEAD", "CHUNK", "FAR")
    lines = source.head("forward", source.signature.forward_pointers, constants)
    lines += [f"    s_{s} = {load(f'first_{s} + at + e')}" for s in source.states]
    now = [f"now_{name}" for name in source.outputs]

    def one_step(indent: str) -> list[str]:
        """Step `t + k`, its inputs already in registers."""
        found = []
        if source.states:
            found += ["if k % CHUNK == 0:", f"    if saved_{source.states[0]} is not None:"]
            found.append("        if (t + k) % CHUNK == 0:")
            places = [f"saved_{s} + (t + k) // CHUNK * B * N + at + e" for s in source.states]
            found += [f"            {store(place, f's_{s}')}" for place, s in zip(places, source.states, strict=True)]
        found.append(source.run_step([f"all_{name}[k]" for name in source.inputs], now))
        found += [store(row(name, "(t + k)"), value) for name, value in zip(source.outputs, now, strict=True)]
        for s in source.states:
            found.append(f"if record_{s} is not None:")
            found.append(f"    {store(row(f'record_{s}', '(t + k)'), f's_{s}')}")
        return [f"{indent}{line}" for line in found]

    lines.append("    t = T * 0")
    lines += source.load_group(" " * 4, source.inputs, "all_", "AHEAD", "j", "live & (j < T)")
    lines += ["    while t + AHEAD <= T:", "        left = tl.minimum(T - t - AHEAD, AHEAD).to(tl.int32)"]
    lines += source.load_group(" " * 8, source.inputs, "next_", "AHEAD", "(t + AHEAD + j)", "live & (j < left)")
    lines += source.prefetch(source.inputs, "AHEAD", "tl.minimum(t + FAR, T - AHEAD)", "(far + j)")
    lines += ["        for k in tl.static_range(AHEAD):", *one_step(" " * 12)]
    lines += [f"        all_{name} = next_{name}" for name in source.inputs]
    lines += ["        t += AHEAD", "    for k in tl.static_range(AHEAD):", "        if t + k < T:"]
    lines += one_step(" " * 12)
    return [*lines, *(f"    {store(f'last_{s} + at + e', f's_{s}')}" for s in source.states)]


def _one_vjp(
    source: _Source, inputs: Sequence[str], states: Sequence[str], d_outputs: Sequence[str], t: str
) -> list[str]:
    """Statements that go back through one step."""
    lines = []
    for s in source.states:
        lines += [f"if d_record_{s} is not None:", f"    l_{s} += {load(row(f'd_record_{s}', t))}"]
    new = [f"now_{name}" for name in source.d_inputs]
    given = ", ".join([*inputs, *states, *source.fixed, *d_outputs, *source.carried()])
    lines.append(f"{', '.join([*new, *source.carried()])} = vjp({given})")
    for name, value in zip(source.d_inputs, new, strict=True):
        lines += [f"if {name} is not None:", f"    {store(row(name, t), value)}"]
    return lines


def _group_back(source: _Source) -> list[str]:
    """UNROLL steps, their states in registers, while the rows of the UNROLL before them are on their way.

    The first group is past the end: nothing of it is a step, and the rows of the one before it are asked for.
    """
    d_names = [f"d_{name}" for name in source.outputs]
    rows = [*source.inputs, *d_names]
    lines = [f"    all_{name} = ()" for name in rows]
    lines.append("    for j in tl.static_range(UNROLL):")
    lines += [f"        all_{name} += (tl.zeros([BLOCK], {TYPES[source.dtype]}),)" for name in rows]
    lines += [f"    below_{s} = tl.zeros([BLOCK], {TYPES[source.dtype]})" for s in source.states]
    lines += ["    t = (T + UNROLL - 1) // UNROLL * UNROLL", "    while t >= 0:"]
    lines.append("        left = tl.where(t > 0, tl.minimum(T - t + UNROLL, UNROLL), 0).to(tl.int32)")
    lines += source.load_group(" " * 8, rows, "next_", "UNROLL", "(t - UNROLL + j)", "live & (j < left)")
    lines += [f"        s_{s} = below_{s}" for s in source.states]
    for s in source.states:
        place = f"saved_{s} + (t - UNROLL) // CHUNK * B * N + at + e"
        lines.append(f"        below_{s} = {load(place, 'live & (left > 0)')}")
    lines += source.prefetch(rows, "UNROLL", "tl.maximum(t - FAR, 0)", "tl.minimum(far + j, T - 1)")
    if source.states:
        before = [f"before_{name}[j]" for name in source.inputs]
        lines += ["        if UNROLL < CHUNK:", "            k = t // CHUNK * CHUNK", "            while k < t:"]
        lines += source.load_group(" " * 16, source.inputs, "before_", "UNROLL", "(k + j)", "live & (t < T)")
        lines.append("                for j in tl.static_range(UNROLL):")
        lines.append(f"                    {source.run_step(before, source.unused())}")
        lines.append("                k += UNROLL")
    inputs = [f"all_{name}[j]" for name in source.inputs]
    lines += [f"        h_{s} = (s_{s},)" for s in source.states]
    if source.states:
        lines.append("        for j in tl.static_range(UNROLL - 1):")
        lines.append(f"            {source.run_step(inputs, source.unused())}")
        lines += [f"            h_{s} += (s_{s},)" for s in source.states]
    lines.append("        steps = tl.minimum(T - t, UNROLL).to(tl.int32)")
    lines += ["        for j in tl.static_range(UNROLL - 1, -1, -1):", "            if j < steps:"]
    kept = [f"h_{s}[j]" for s in source.states]
    back = _one_vjp(source, inputs, kept, [f"all_{name}[j]" for name in d_names], "(t + j)")
    lines += [f"                {line}" for line in back]
    lines += [f"        all_{name} = next_{name}" for name in rows]
    return [*lines, "        t -= UNROLL"]


def _backward(source: _Source) -> list[str]:
    lines = source.head("backward", source.signature.backward_pointers, ("BLOCK", "UNIT", "UNROLL", "CHUNK", "FAR"))
    lines += [f"    l_{s} = {load(f'd_last_{s} + at + e')}" for s in source.states]
    lines += [f"    a_{p} = tl.zeros([BLOCK], {TYPES[source.dtype]})" for p in source.learned]
    lines += _group_back(source)
    lines += [f"    {store(f'd_first_{s} + at + e', f'l_{s}')}" for s in source.states]
    return [*lines, *(f"    {store(f'd_given_{p} + at + e', f'a_{p}')}" for p in source.learned)]


def source(traced: Traced, signature: Signature, dtype: torch.dtype, device: str = "cuda") -> str:
    """The Triton source of a traced step: deterministic, readable; `backward` only if the step's product was traced.

    Args:
        signature: names in order; the product carries the gradients of its `learned`.
        dtype: float32 or float64, of all tensors.
        device: "cuda", or "cpu" for Triton's interpreter: whose eager torch the arithmetic follows.

    Raises:
        GraphError: an operation that cannot be rendered; names it.
    """
    parts = _Source(traced, signature, dtype, device)
    lines = ["import triton", "import triton.language as tl", _MATHS[device], "", "", *parts.step()]
    if device == "cuda":
        lines += ["", "", *_PREFETCH]
    if traced.vjp is not None:
        lines += ["", "", *parts.vjp()]
    lines += ["", "", *_forward(parts)]
    if traced.vjp is not None:
        lines += ["", "", *_backward(parts)]
    return "\n".join(lines) + "\n"
