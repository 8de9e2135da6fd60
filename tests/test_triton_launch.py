"""Launches, on a driver that only takes notes: compiled once, on the GPU of the tensors, without waiting for it."""

from __future__ import annotations

import concurrent.futures
import importlib
import threading
import time

import pytest
import torch

import tracetorch as tt
from tests.triton_without_gpu import (
    F32,
    F64,
    ROW,
    Driver,
    X,
    call,
    forbidden,
    make_kernel,
    make_layer,
    make_small,
    triton,
)
from tracetorch.fused import launch_triton
from tracetorch.fused.build import build
from tracetorch.fused.emit_triton import OPTIONS
from tracetorch.fused.graph import Graph, Node, Ref
from tracetorch.fused.kernel import geometry

pytestmark = pytest.mark.usefixtures("fresh_kernels")


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
