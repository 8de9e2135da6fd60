"""Every operation compiled for sm_80 and sm_90: its own instructions, nothing contracted, nothing approximated."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton_without_gpu import BOOL, F32, F64, POINTERS, C, V, X, instructions, owned, triton
from tracetorch.fused import graph, launch_triton
from tracetorch.fused.emit_triton import OPTIONS, Body, function
from tracetorch.fused.graph import OPS, Graph, Node, Ref

pytestmark = pytest.mark.usefixtures("fresh_kernels")

TINY = """
@triton.jit
def tiny(x, v, c, y):
    e = tl.arange(0, 32)
    tl.store(y + e, step(tl.load(x + e), tl.load(v + e), tl.load(c + e) != 0))
"""


def instructions_of(op: str, args: tuple, dtype: torch.dtype, arch: int) -> Counter[str]:
    """Those of one operation on x, v and a condition c, one element a thread."""
    return instructions(assembled(op, args, dtype, arch)["ptx"])


def assembled(op: str, args: tuple, dtype: torch.dtype, arch: int) -> dict[str, Any]:
    """PTX and cubin of one operation."""
    node = Node(op, args, BOOL if OPS[op].result == "bool" else dtype)
    made = Graph((("x", dtype), ("v", dtype), ("c", BOOL)), (node,), (("output", Ref(3)),))
    graph.verify(made)
    body = Body(made, {"x": "x", "v": "v", "c": "c"}, "cuda")
    head = ["import triton", "import triton.language as tl", "from triton.language.extra import libdevice", ""]
    text = "\n".join([*head, *function("step", body, ["x", "v", "c"], [body.output("output", dtype)]), TINY])
    types = {name: "*i8" if name == "c" else POINTERS[dtype] for name in "xvcy"}
    source = triton.compiler.ASTSource(launch_triton.load(text).functions["tiny"], types, {})
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": 1, **OPTIONS}).asm


def sass(cubin: bytes, folder: Path) -> Counter[str]:
    """What ptxas made of a kernel: its machine instructions."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    (folder / "kernel.cubin").write_bytes(cubin)
    text = subprocess.run([str(tool), "-c", "kernel.cubin"], cwd=folder, capture_output=True, text=True, check=True)
    found = Counter(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text.stdout))
    assert found["EXIT"] > 0, text.stdout[:500]
    return found


# operation and arguments -> its floating point instructions in float32 and in float64 ({f}: f32 or f64). Comparisons
# and selections are left out, they do not round; negation and absolute value are bit operations or `neg`, `abs`.
PLAIN = {
    **{("add", args): ["add.rn.{f}"] for args in ((X, V), (X, 0.3), (0.3, X))},
    ("sub", (X, V)): ["sub.rn.{f}"],
    ("sub", (0.3, X)): ["sub.rn.{f}"],
    ("sub", (X, 0.3)): ["add.rn.{f}"],
    **{("mul", args): ["mul.rn.{f}"] for args in ((X, V), (X, 0.3))},
    ("div", (X, V)): ["div.rn.{f}"],
    ("div", (0.3, X)): ["div.rn.{f}"],
    ("div", (X, 0.3)): ["mul.rn.{f}"],
    **{(op, (X,)): [] for op in ("neg", "abs", "relu", "cast")},
    ("sign", (X,)): ["sub.rn.{f}"],
    ("reciprocal", (X,)): ["div.rn.{f}"],
    ("sqrt", (X,)): ["sqrt.rn.{f}"],
    ("floor", (X,)): ["cvt.rmi.{f}.{f}"],
    ("ceil", (X,)): ["cvt.rpi.{f}.{f}"],
    ("trunc", (X,)): ["cvt.rzi.{f}.{f}"],
    ("round", (X,)): ["cvt.rni.{f}.{f}"],
    ("minimum", (X, 0.3)): [],
    ("maximum", (X, 0.3)): [],
    ("pow", (X, 1)): [],
    ("pow", (X, 2)): ["mul.rn.{f}"],
    ("pow", (X, 3)): ["mul.rn.{f}", "mul.rn.{f}"],
    ("pow", (X, 0.5)): ["sqrt.rn.{f}"],
    ("pow", (X, -1)): ["div.rn.{f}"],
    ("pow", (X, -2)): ["mul.rn.{f}", "div.rn.{f}"],
    ("add_scaled", (X, V, 0.3)): ["fma.rn.{f}"],
    ("sub_scaled", (X, V, 0.3)): ["fma.rn.{f}"],
    ("sigmoid_backward", (X, V)): ["sub.rn.{f}", "mul.rn.{f}", "mul.rn.{f}"],
    ("tanh_backward", (X, V)): ["fma.rn.{f}", "mul.rn.{f}"],
    ("threshold_backward", (X, V, 0.3)): [],
    **{(op, (X, V)): [] for op in ("gt", "ge", "lt", "le", "eq", "ne", "and", "or")},
    ("not", (X,)): [],
    ("where", (C, X, V)): [],
    ("full_like", (0.3, X)): [],
}


# What PTX has for float32, and not for float64.
EXTREMA = {
    F32: {"minimum": ["min.NaN.f32"], "maximum": ["max.NaN.f32"]},
    F64: {"minimum": ["min.f64"], "maximum": ["max.f64"]},
}


# The functions of libdevice, which is CUDA's own: how many of each instruction they may have. Every `approx` and `ftz`
# here stands inside libdevice's function, which bounds the error of the whole.
OWNED = {
    F32: {
        "exp": {"fma": 4, "ex2.approx.ftz.f32": 1},
        "sigmoid": {"fma": 4, "ex2.approx.ftz.f32": 1, "div.rn.f32": 1},
        "log": {"fma": 12},
        "tanh": {"fma": 6, "ex2.approx.ftz.f32": 1, "rcp.approx.ftz.f32": 1},
    },
    F64: {
        "exp": {"fma": 14},
        "sigmoid": {"fma": 14, "div.rn.f64": 1},
        "log": {"fma": 16, "rcp.approx.ftz.f64": 1},
        "tanh": {"fma": 28, "ex2.approx.ftz.f32": 1, "rcp.approx.ftz.f64": 1},
    },
}


COMPILED = [(F32, 80), (F32, 90), (F64, 90)]


def test_every_operation_is_compiled():
    assert {op for op, _ in PLAIN} | set(OWNED[F32]) | {"minimum", "maximum"} == set(OPS)
    assert set(OWNED[F32]) == set(OWNED[F64])


@pytest.mark.parametrize(("dtype", "arch"), COMPILED)
def test_each_operation_has_its_own_instructions_and_no_others(dtype, arch):
    f = "f32" if dtype is F32 else "f64"
    every = {**PLAIN, **{(op, (X, V)): names for op, names in EXTREMA[dtype].items()}}
    for (op, args), names in every.items():
        found = instructions_of(op, args, dtype, arch)
        rounding = {name: n for name, n in found.items() if not re.match(r"(neg|abs|cvt\.rn\.f\d\d\.[us])", name)}
        assert rounding == Counter(name.format(f=f) for name in names), (op, args, found)


@pytest.mark.parametrize(("dtype", "arch"), COMPILED)
def test_the_machine_code_contracts_and_approximates_nothing(dtype, arch, tmp_path):
    """The machine code of a whole division or square root has both, inside a correctly rounded routine."""
    letter = "F" if dtype is F32 else "D"
    some = [("add", (X, V)), ("sub", (0.3, X)), ("round", (X,)), ("pow", (X, 3)), ("sigmoid_backward", (X, V))]
    for op, args in some:
        found = sass(assembled(op, args, dtype, arch)["cubin"], tmp_path)
        assert not [name for name in found if re.match(rf"{letter}FMA|MUFU|.*\.FTZ", name)], (op, args, found)
    assert sass(assembled("add_scaled", (X, V, 0.3), dtype, arch)["cubin"], tmp_path)[f"{letter}FMA"] == 1
    assert sass(assembled("mul", (X, V), dtype, arch)["cubin"], tmp_path)[f"{letter}MUL"] == 1


@pytest.mark.parametrize(("dtype", "arch"), COMPILED)
def test_functions_of_libdevice_are_all_there_is_of_approximations(dtype, arch):
    for op, allowed in OWNED[dtype].items():
        assert owned(instructions_of(op, (X,), dtype, arch)) == allowed, op
