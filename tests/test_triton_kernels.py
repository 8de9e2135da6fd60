"""Whole kernels compiled for sm_80 and sm_90: no contraction, no spilled register, rows asked for ahead, vectors."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.triton_without_gpu import F32, F64, POINTERS, STEPS, instructions, make_kernel, owned, triton
from tracetorch.fused import kernel_triton, launch_triton
from tracetorch.fused.emit_triton import OPTIONS
from tracetorch.fused.kernel_triton import chunk, unroll

pytestmark = pytest.mark.usefixtures("fresh_kernels")


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


def is_loop(ptx: str, label: str) -> bool:
    """Whether a label is jumped to from below it, and memory is read in between."""
    start, jump = ptx.index(f"\n{label}:"), ptx.rindex(f"{label};")
    return jump > start and "ld.global" in ptx[start:jump]


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
