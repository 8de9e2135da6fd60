"""Triton kernels without a GPU: in the interpreter (values), compiled for sm_80 and sm_90 (instructions), and launched
on a driver that only takes notes."""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import tracetorch as tt
from tracetorch.fused import cubins, graph, kernel_triton, launch_triton
from tracetorch.fused.build import build
from tracetorch.fused.emit_triton import OPTIONS, Body, function
from tracetorch.fused.graph import OPS, Graph, Node, Ref
from tracetorch.fused.kernel import geometry
from tracetorch.fused.kernel_triton import chunk, unroll

# `make env` brings Triton on Linux, the only system it is built for.
triton = importlib.import_module("triton") if sys.platform == "linux" else pytest.importorskip("triton")

F32, F64, BOOL = torch.float32, torch.float64, torch.bool
POINTERS = {F32: "*fp32", F64: "*fp64"}
HERE = Path(__file__).parent


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=HERE.parent, env=given, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    """What was compiled for another test or another day is not used."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TRACETORCH_CACHE", str(tmp_path / "ours"))


def make_layer(n=16):
    return tt.snn.LIB(n, quant_fn=tt.functional.round_ste())


# ---- values ----------------------------------------------------------------------------------------------------------


def test_kernels_in_the_interpreter():
    done = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")), TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d{3,} passed", done.stdout, re.MULTILINE), done.stdout[-500:]


@pytest.mark.sweep
def test_what_waits_for_a_gpu_runs_in_the_interpreter(tmp_path):
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu.py", TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    out = tmp_path / "bench.json"
    done = python("-m", "benchmarks.gpu", "--out", str(out), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found) == ["sizes", "builds", "graphs", "calls", "memory", "peers"]
    assert not [part for part, result in found.items() if "error" in result], done.stdout
    assert not [row for row in found["sizes"]["found"].values() if "error" in row], done.stdout


# ---- instructions ----------------------------------------------------------------------------------------------------


def compiled(kernel, name: str, arch: int, null: tuple[str, ...] = (), elements: int = 2**22):
    """One of a kernel's functions compiled for a GPU that need not be there."""
    signature = kernel.signature
    pointers = signature.forward_pointers if name == "forward" else signature.backward_pointers
    if name == "backward":
        null += tuple(pointer for pointer in pointers if pointer.startswith("first_"))
    integers = (*kernel_triton.INTEGERS, *signature.strides)
    plan = launch_triton.spread(name, len(signature.states), kernel.dtype, elements, elements)
    vectors = plan.vectors
    run = launch_triton.load(kernel.source).functions[f"{name} vectors" if vectors else name]
    types, constants, hints = {}, {}, {}
    for k, (argument, what) in enumerate(zip(run.arg_names, (*pointers, *integers), strict=False)):
        pointer = k < len(pointers)
        types[argument] = "constexpr" if what in null else POINTERS[kernel.dtype] if pointer else "i64"
        if what in null:
            constants[(k,)] = None
        elif pointer and vectors and not what.startswith("given_"):
            hints[(k,)] = [["tt.divisibility", 16]]
    for argument, value in {"BLOCK": plan.block, "UNIT": 4 if vectors else 1, **dict(plan.constants)}.items():
        types[argument] = "constexpr"
        constants[(run.arg_names.index(argument),)] = value
    source = triton.compiler.ASTSource(run, types, constants, hints)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": plan.warps, **OPTIONS}).asm["ptx"]


def records(kernel) -> tuple[str, ...]:
    return tuple(f"{kind}_{s}" for s in kernel.signature.states for kind in ("record", "d_record"))


def ptxas(ptx: str, arch: int, folder: Path) -> tuple[int, int]:
    """Registers, and bytes spilled, of a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    (folder / "kernel.ptx").write_text(ptx)
    command = [str(tool), "-v", f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", said)]
    assert len(spilled) == 2, said
    return int(re.search(r"Used (\d+) registers", said)[1]), sum(spilled)


def instructions(ptx: str) -> Counter[str]:
    """The floating point instructions of a kernel, without loads, stores, moves and comparisons."""
    found = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.]*)\s", ptx[ptx.index(".entry") :], re.MULTILINE)
    skipped = ("ld.", "st.", "mov.", "setp.", "selp.")
    return Counter(name for name in found if re.search(r"f32|f64|approx|ftz", name) and not name.startswith(skipped))


TINY = """
@triton.jit
def tiny(x, v, c, y):
    e = tl.arange(0, 32)
    tl.store(y + e, step(tl.load(x + e), tl.load(v + e), tl.load(c + e) != 0))
"""
X, V, C = Ref(0), Ref(1), Ref(2)


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


def is_loop(ptx: str, label: str) -> bool:
    """Whether a label is jumped to from below it, and memory is read in between."""
    start, jump = ptx.index(f"\n{label}:"), ptx.rindex(f"{label};")
    return jump > start and "ld.global" in ptx[start:jump]


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


def owned(found: Counter[str]) -> dict[str, int]:
    """Fused multiply-adds, divisions, and what is approximate or flushes subnormal numbers."""
    special = {name: n for name, n in found.items() if re.search(r"approx|ftz|full|div|rcp|sqrt|ex2|lg2", name)}
    fma = sum(n for name, n in found.items() if name.startswith("fma"))
    return {**special, **({"fma": fma} if fma else {})}


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


def hard_lif(given):
    """x, v -> spike, v: leaky integration, hard threshold with an arctangent's gradient, reset by subtraction."""
    charged = given["alpha"] * given["v"] + given["x"]
    distance = charged - given["theta"]
    surrogate = distance / (1 + distance.abs())
    spike = (distance >= 0).to(charged.dtype) - surrogate.detach() + surrogate
    return [spike, charged - spike * given["theta"]]


def seven(given):
    """Seven states in a chain of leaks, two sigmoids, ten parameters."""
    drive, new = given["x"], []
    for k in range(7):
        drive = given[f"p{k}"] * given[f"s{k}"] + (1 - given[f"p{k}"]) * drive
        new.append(drive)
    soft = torch.sigmoid(given["p7"] * (new[-1] - given["p8"]))
    spike = soft + (torch.round(soft) - soft).detach()
    new[0] = new[0] - spike * given["p8"] * given["p9"]
    new[-1] = new[-1] * (1 - torch.sigmoid(new[1] * 4))
    return [spike, *new]


STEPS = {
    "lif": (hard_lif, ["v"], ["alpha", "theta"]),
    "seven": (seven, [f"s{k}" for k in range(7)], [f"p{k}" for k in range(10)]),
}


def make_kernel(name: str, dtype: torch.dtype = F32):
    step, states, parameters = STEPS[name]
    return build(step, states, parameters, parameters, dtype, backend="triton", device="cuda")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", STEPS)
def test_whole_kernels_contract_nothing_and_spill_nothing(name, arch, tmp_path):
    kernel = make_kernel(name)
    for direction in ("forward", "backward"):
        ptx = compiled(kernel, direction, arch, null=records(kernel))
        found = owned(instructions(ptx))
        assert not {key for key in found if "full" in key}
        exps = found.get("ex2.approx.ftz.f32", 0)
        assert {key for key in found if "approx" in key or "ftz" in key} <= {"ex2.approx.ftz.f32"}
        assert found.get("fma", 0) == 4 * exps
        assert (exps > 0) == (name == "seven")
        assert ".local" not in ptx.split(".entry")[1]
        registers, spilled = ptxas(ptx, arch, tmp_path)
        assert spilled == 0
        # Enough threads fit that their loads ahead are several times what the memory's latency needs.
        limits = {"lif": {"forward": 80, "backward": 124}, "seven": {"forward": 80, "backward": 168}}
        assert registers <= limits[name][direction]


@pytest.mark.parametrize("dtype", [F32, F64])
def test_many_elements_of_one_state_are_read_and_written_in_vectors(dtype):
    ptx = compiled(make_kernel("lif", dtype), "forward", 90, null=("saved_v", "record_v"))
    wide = "v4.b32" if dtype is F32 else "v2.b64"
    assert f"ld.global.{wide}" in ptx
    assert f"st.global.{wide}" in ptx


@pytest.mark.parametrize(("elements", "prefetched"), [(512, True), (2**17, False)])
@pytest.mark.parametrize(("direction", "inputs"), [("forward", 1), ("backward", 2)])
def test_rows_of_later_steps_are_asked_for_before_the_arithmetic(direction, inputs, elements, prefetched):
    kernel = make_kernel("lif")
    ptx = compiled(
        kernel, direction, 90, (*records(kernel), "saved_v") if direction == "forward" else records(kernel), elements
    )
    plan = launch_triton.spread(direction, 1, F32, elements, elements)
    steps = plan.constants[0][1]
    # The body of the loop over groups, which is the one that ends in a jump to its own beginning.
    (label,) = {
        name for name in re.findall(r"bra(?:\.uni)?\s+(\$\w+);", ptx) if f"\n{name}:" in ptx and is_loop(ptx, name)
    }
    body = ptx[ptx.index(f"\n{label}:") : ptx.rindex(label)]
    before = body[: re.search(r"(mul|div)\.rn\.f32|div\.full", body).start()]
    assert before.count("ld.global") == steps * inputs + (direction == "backward")
    assert body.count("ld.global") == before.count("ld.global")
    assert body.count("prefetch.global.L2") == prefetched * steps * inputs
    assert dict(plan.constants)["FAR"] == (64 if prefetched else 0)


def test_fewer_steps_are_kept_for_more_states():
    kept = [unroll(states, F32) for states in (1, 2, 3, 8, 9, 16, 17)]
    assert kept == [8, 8, 4, 4, 2, 2, 1]
    for states in range(20):
        for dtype in (F32, F64):
            assert chunk(states) % unroll(states, dtype) == 0
            assert states / chunk(states) <= 20 / 16
            for elements in (1, 2**19, 2**24):
                plan = launch_triton.spread("forward", states, dtype, elements, elements)
                ahead = dict(plan.constants)["AHEAD"]
                assert chunk(states) % ahead == 0 or ahead % chunk(states) == 0


# ---- the launch ------------------------------------------------------------------------------------------------------


class Driver:
    """Triton's view of a GPU: compiles for it, and keeps what would have been launched."""

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 2**17, "multiprocessor_count": 132, "max_num_regs": 2**16, "warpSize": 32}

    def __init__(self):
        self.loaded, self.launched, self.arguments = 0, [], []
        self.utils.load_binary = self.load_binary

    def load_binary(self, *_):
        self.loaded += 1
        return "module", 1, 32, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(*given):
            self.launched.append(given[:4])
            self.arguments.append(given[9:])  # after the function, the metadata and the hooks

        return launch

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    launch_triton._loaded.cache_clear()
    yield found
    launch_triton._loaded.cache_clear()


def call(driver, kernel, direction: str, shape: tuple[int, ...], time_dim: int = 0, sizes: int = 1, shift: int = 0):
    """Launch on small tensors that stand for large ones; the grid and the stream. `shift`: floats into their memory."""
    signature = kernel.signature
    names = signature.forward_pointers if direction == "forward" else signature.backward_pointers
    pointers = [None if "record" in name else torch.zeros(64, dtype=kernel.dtype)[shift:] for name in names]
    kernel.call(direction, pointers, geometry(torch.Size(shape), time_dim), (sizes,) * len(signature.parameters))
    return driver.launched[-1]


def make_small():
    """Quickly compiled."""
    return build(lambda given: [given["x"] + given["v"], given["x"]], ["v"], [], [], F32, False, "triton", "cuda")


ROW = 2**17  # elements; compiled sooner than for few


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_compilation_serves_every_length_layout_and_place_in_memory(direction, driver):
    kernel = make_kernel("lif")
    assert call(driver, kernel, direction, (16, 1, ROW)) == (1024, 1, 1, 77)
    assert call(driver, kernel, direction, (1, 1, ROW), sizes=ROW) == (1024, 1, 1, 77)
    for T, B, N in ((17, 3, ROW), (40, 3, ROW), (40, 2, ROW + 1), (16, 2, ROW - 4), (16, 2, ROW + 2)):
        found = call(driver, kernel, direction, (B, T, N), 1, B * N, shift=T % 3)
        assert found == (B * -(-N // 128), 1, 1, 77)
    assert call(driver, kernel, direction, (5, 0, ROW)) == found  # nothing to run
    assert driver.loaded == 1


def test_narrow_rows_have_programs_of_fewer_threads(driver):
    kernel = make_small()
    for n, threads in ((1, 32), (33, 64), (65, 128)):
        assert call(driver, kernel, "forward", (2**17, 3, n), 1) == (2**17, 1, 1, 77)
        (*_, ready) = launch_triton.load(kernel.source).compiled.values()
        assert ready.metadata.num_warps * 32 == threads


def test_vectors_need_rows_and_tensors_that_begin_at_multiples_of_16_bytes(driver):
    kernel = make_small()
    for shape, shift in (((3, 1, 2**20), 0), ((9, 8, 2**17 + 4), 4), ((9, 8, 2**17 + 4), 8)):
        assert call(driver, kernel, "forward", shape, shift=shift) == (-(-shape[1] * shape[2] // 512), 1, 1, 77)
    assert driver.loaded == 1
    for shape, shift in (((3, 1, 2**20), 1), ((3, 1, 2**20 + 1), 0), ((9, 1, 2**20 + 2), 2)):
        call(driver, kernel, "forward", shape, shift=shift)
    assert driver.loaded == 2


def test_float64_is_compiled_apart_where_the_source_is_the_same(driver):
    step = lambda given: [given["x"] + given["v"], given["x"]]  # noqa: E731
    made = [build(step, ["v"], [], [], dtype, False, "triton", "cuda") for dtype in (F32, F64)]
    assert made[0].source == made[1].source
    for k, kernel in enumerate(made):
        call(driver, kernel, "forward", (4, 1, ROW))
        assert driver.loaded == k + 1


def test_a_grid_that_no_gpu_runs_is_refused(driver):
    with pytest.raises(ValueError, match=r"2147483648 programs.*less B"):
        call(driver, make_small(), "forward", (2**31, 1, 1), 1)


def test_a_second_call_neither_compiles_nor_specialises(driver, monkeypatch):
    kernel = make_kernel("lif")
    for direction in ("forward", "backward"):
        call(driver, kernel, direction, (16, 1, ROW))
    for name in ("warmup", "run"):
        monkeypatch.setattr(triton.runtime.jit.JITFunction, name, forbidden)
    for direction in ("forward", "backward"):
        call(driver, kernel, direction, (18, 4, ROW))
    assert len(driver.launched) == 4


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_launch_has_the_arguments_of_tritons_own(direction, driver):
    kernel = make_kernel("lif")
    call(driver, kernel, direction, (2, 16, ROW), 1, ROW)
    (key,) = launch_triton.load(kernel.source).compiled
    constants = dict(zip(("BLOCK", "UNIT"), (key[-1].block, 1), strict=True)) | dict(key[-1].constants)
    (ours,) = driver.arguments
    names = launch_triton.load(kernel.source).functions[direction].arg_names
    given = dict(zip(names, ours, strict=True))
    assert {name: given[name] for name in constants} == constants
    assert [given[name] for name in ("T", "B", "N", "by_t", "by_b")] == [16, 2, ROW, ROW, 16 * ROW]
    assert [given[name] for name in ("by_b_alpha", "by_n_alpha")] == [0, 1]
    run = launch_triton.load(kernel.source).functions[direction]
    run[2 * 1024,](*ours[: -len(constants)], **constants, num_warps=key[-1].warps, **OPTIONS)
    assert driver.loaded == 1
    assert driver.launched[0] == driver.launched[1]
    for a, b in zip(*driver.arguments, strict=True):
        assert a is b or a == b


def pretend_cuda(monkeypatch, capturing: bool = False) -> list[int]:
    """Tensors are on GPU 3 of this process, whose current one is 0; the devices that were made current."""
    entered: list[int] = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(launch_triton, "_device", lambda tensor: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", forbidden)
    return entered


def test_a_kernel_is_launched_on_the_gpu_of_its_tensors(driver, monkeypatch):
    entered = pretend_cuda(monkeypatch)
    call(driver, make_small(), "forward", (16, 1, ROW))
    assert entered == [3]


def test_what_a_cuda_graph_captures_has_to_be_compiled_before(driver, monkeypatch):
    kernel = make_small()
    pretend_cuda(monkeypatch)
    call(driver, kernel, "forward", (16, 1, ROW))
    pretend_cuda(monkeypatch, capturing=True)
    call(driver, kernel, "forward", (12, 2, ROW))
    with pytest.raises(tt.fused.BackendError, match=r"forward kernel.*before the capture, run the same call once"):
        call(driver, kernel, "forward", (12, 1, 32))
    assert (driver.loaded, len(driver.launched)) == (1, 2)


def test_threads_that_launch_first_at_once_load_a_kernel_once(driver, monkeypatch):
    kernel, start = make_small(), threading.Barrier(4)
    load = driver.load_binary

    def slow(*given):
        time.sleep(0.2)
        return load(*given)

    driver.utils.load_binary = slow
    functions = []
    monkeypatch.setattr(Driver, "launcher_cls", lambda *_: lambda *given: functions.append(given[4]))

    def run(_):
        start.wait()
        names = kernel.signature.forward_pointers
        pointers = [None if "record" in name else torch.zeros(64) for name in names]
        kernel.call("forward", pointers, geometry(torch.Size((4, 1, ROW)), 0), ())

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert (driver.loaded, functions) == (1, [1] * 4)


def test_what_triton_cannot_compile_is_a_compiler_error_and_runs_step_by_step(driver, monkeypatch):
    def broken(*_, **__):
        raise OSError("no ptxas")

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "warmup", broken)
    with pytest.raises(tt.fused.CompilerError, match=r"forward kernel: OSError: no ptxas; it needs a C compiler"):
        call(driver, make_small(), "forward", (4, 1, ROW))
    monkeypatch.setattr(importlib.import_module("tracetorch.fused.executor"), "automatic", lambda device: "triton")
    monkeypatch.setattr(launch_triton, "interpreted", lambda: False)
    monkeypatch.setattr(importlib.import_module("tracetorch.fused.layers"), "_check", lambda *_: F32)
    xs, layer = torch.rand(5, 2, 16), make_layer()
    with pytest.warns(tt.fused.FuseWarning, match=r"runs step by step: .*no ptxas"), torch.no_grad():
        ys = layer.unroll(xs)
    with tt.backend("eager"), torch.no_grad():
        assert torch.equal(ys, make_layer().unroll(xs))


def test_why_layers_on_a_gpu_run_step_by_step_is_said_once(monkeypatch):
    executor = importlib.import_module("tracetorch.fused.executor")
    executor._cuda.cache_clear()
    monkeypatch.setattr(executor, "no_triton", lambda: "no Triton")
    with pytest.warns(tt.fused.FuseWarning, match=r"no Triton: layers on CUDA run step by step"):
        assert executor.automatic("cuda") == "eager"
    assert executor.automatic("cuda") == "eager"
    executor._cuda.cache_clear()


def test_a_number_on_the_cpu_reaches_the_gpu_without_waiting_for_it(monkeypatch):
    sequence = importlib.import_module("tracetorch.fused.sequence")
    monkeypatch.setattr(torch.Tensor, "to", forbidden)
    found = sequence._value(torch.tensor(0.5), torch.Size((3,)), torch.empty(2, 3, device="meta"))
    assert (found.device.type, found.shape, found.dtype) == ("meta", (), F32)
    monkeypatch.undo()
    made = Graph(
        (("x", F32), ("p", F32), ("q", F32)),
        (Node("div", (X, Ref(1)), F32), Node("mul", (Ref(3), Ref(2)), F32)),
        (("output", Ref(4)),),
    )
    assert (sequence._divides(made, "p"), sequence._divides(made, "q")) == (True, False)


def test_a_constant_on_a_gpu_is_not_read_again_until_it_is_written_to(monkeypatch):
    reads = importlib.import_module("tracetorch.fused.reads")
    constant = torch.tensor(True)
    assert reads._holds(constant, reads._writes(constant), True)
    assert not reads._holds(constant, reads._writes(constant), False)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    read: list[int] = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: (read.append(1), item(tensor))[1])
    before = reads._writes(constant)
    assert reads._holds(constant, before, True)
    assert not read
    constant.fill_(False)
    assert not reads._holds(constant, before, True)
    assert reads._holds(constant, before, False)
    assert len(read) == 2


@pytest.mark.parametrize("version", ["3.2.0", "3.5.1"])
def test_an_older_triton_is_refused(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    with (
        pytest.raises(tt.fused.BackendError, match=rf"Triton 3\.6 or newer.*{version}.*torch 2\.10"),
        tt.backend("triton"),
    ):
        pass


def launched(driver) -> Any:
    """A launch of a forward kernel as in a new process; the compiled kernel."""
    launch_triton._loaded.cache_clear()
    before = len(driver.launched)
    kernel = make_small()
    call(driver, kernel, "forward", (5, 1, ROW))
    assert len(driver.launched) == before + 1
    (found,) = launch_triton.load(kernel.source).compiled.values()
    return found


def forbidden(*_, **__):
    raise AssertionError("compiled again")


def test_a_compiled_kernel_is_kept_and_used_again(driver, monkeypatch, tmp_path):
    first = launched(driver)
    (entry,) = (tmp_path / "ours").glob("*.kernel")
    assert (entry.stat().st_mode & 0o777) == 0o600
    monkeypatch.setattr(cubins, "_packed", forbidden)  # what follows each compilation
    second = launched(driver)
    assert second is not first
    assert second.asm["cubin"] == first.asm["cubin"]
    assert second.packed_metadata == first.packed_metadata
    assert second.name == first.name


@pytest.mark.parametrize("damage", ["cut", "changed", "planted for another source"])
def test_a_compiled_kernel_that_is_not_what_was_kept_is_made_again(damage, driver, monkeypatch, tmp_path):
    good = launched(driver).asm["cubin"]
    (entry,) = (tmp_path / "ours").glob("*.kernel")
    content = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(content[:-100])
    elif damage == "changed":
        entry.write_bytes(content.replace(good[:64], bytes(64)))
    else:
        entry.write_bytes(b"PK not ours")
        entry.chmod(0o666)
    assert launched(driver).asm["cubin"] == good
    assert entry.read_bytes() != b"PK not ours"
    assert (entry.stat().st_mode & 0o777) == 0o600


def test_a_garbage_kernel_in_tritons_own_cache_is_not_loaded(driver, monkeypatch, tmp_path):
    good = launched(driver).asm["cubin"]
    for path in (tmp_path / "triton").rglob("*.cubin"):
        path.write_bytes(b"garbage")
    for path in (tmp_path / "ours").iterdir():
        path.unlink()
    assert launched(driver).asm["cubin"] == good


def test_another_version_of_triton_has_another_entry(driver, monkeypatch, tmp_path):
    launched(driver)
    monkeypatch.setattr(triton, "__version__", "3.6.0.other")
    launched(driver)
    monkeypatch.setattr(cubins, "_packed", forbidden)
    monkeypatch.setattr(triton, "__version__", "3.6.0.third")
    with pytest.raises(tt.fused.CompilerError, match="compiled again"):
        launched(driver)
    assert len(list((tmp_path / "ours").glob("*.kernel"))) == 2


# ---- source and refusals ---------------------------------------------------------------------------------------------


def test_source_is_deterministic_and_readable():
    text = tt.fused.source(make_layer(), "triton", backward=True)
    assert text == tt.fused.source(make_layer(), "triton", backward=True)
    assert re.findall(r"^def (\w+)\(", text, re.MULTILINE) == ["step", "prefetch", "vjp", "forward", "backward"]
    assert "def vjp(" not in tt.fused.source(make_layer(), "triton")
    assert "libdevice.exp" in text
    assert "tl.float64" in tt.fused.source(make_layer(), "triton", backward=True, dtype=F64)


def test_division_by_a_number_is_what_eager_torch_does_on_the_device():
    node = Node("div", (X, 10.0), F32)
    made = Graph((("x", F32),), (node,), (("output", Ref(1)),))
    assert Body(made, {"x": "x"}, "cuda").lines == ["v0 = x * 0.10000000149011612"]
    assert Body(made, {"x": "x"}, "cpu").lines == ["v0 = tl.div_rn(x, tl.full(x.shape, 10.0, tl.float32))"]
    made = Graph((("x", F64),), (Node("div", (X, 10.0), F64),), (("output", Ref(1)),))
    assert Body(made, {"x": "x"}, "cuda").lines == ["v0 = x * 0.1"]
    with pytest.raises(ValueError, match="xpu"):
        Body(made, {"x": "x"}, "xpu")


@pytest.mark.parametrize(("gpu", "line"), [(False, "in_x * 0.3333333432674408"), (True, "tl.div_rn(in_x, v")])
def test_division_by_a_constant_tensor_is_a_division_on_the_gpu_alone(gpu, line, monkeypatch):
    monkeypatch.setattr(sys.modules["tracetorch.fused.tracer"], "_on_gpu", lambda tensor: gpu)
    step = lambda given: [given["x"] / (torch.ones(()) * 3)]  # noqa: E731
    text = build(step, [], [], [], F32, backend="triton", device="cuda").source
    assert line in text, text


@pytest.mark.parametrize(
    ("word", "node"),
    [
        ("sine", Node("sine", (X,), F32)),
        (r"pow with the exponent 2\.5", Node("pow", (X, 2.5), F32)),
        ("pow with the exponent a tensor", Node("pow", (X, X), F32)),
        (r"cast on torch\.int64", Node("cast", (X,), torch.int64)),
        (r"add on torch\.bool", Node("add", (Ref(1), Ref(1)), BOOL)),
    ],
)
def test_what_cannot_be_rendered_is_refused_by_name(word, node):
    made = Graph((("x", F32), ("c", BOOL)), (node,), (("output", Ref(2)),))
    with pytest.raises(graph.GraphError, match=word):
        Body(made, {"x": "x", "c": "c"}, "cuda")


def test_paths_of_parameters_are_made_names():
    step = lambda given: [given["x"] * given["a.b"] + given["a_b"], given["v"]]  # noqa: E731
    text = build(step, ["v"], ["a.b", "a_b"], ["a.b"], F32, backend="triton", device="cuda").source
    assert "p_a_b = " in text
    compile(text, "source", "exec")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_is_refused():
    with pytest.raises(tt.fused.BackendError, match=r"triton.*CUDA GPU.*'cpu' or 'eager'"), tt.backend("triton"):
        pass


def test_without_triton_the_source_is_there_and_the_backend_refused():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import tracetorch as tt\n"
        "print('def backward(' in tt.fused.source(tt.snn.LI(4), 'triton', backward=True))\n"
        "try:\n    tt.backend('triton').__enter__()\n"
        "except tt.fused.BackendError as error: print(error)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True\nthe triton backend needs Triton"), done.stdout


def test_importing_tracetorch_does_not_load_triton():
    assert python("-c", "import sys, tracetorch; sys.exit('triton' in sys.modules)").returncode == 0
