"""Kernels as Triton compiles them for a GPU, launched by its own launcher and run on the CPU: they have C's bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.bits import assert_bits
from tests.engine_checks import assert_within_two_ulp, random_step
from tests.ptx_on_cpu import machine, translated
from tests.triton_without_gpu import F32, F64
from tracetorch.fused import launch_triton
from tracetorch.fused.build import build
from tracetorch.fused.kernel import geometry
from tracetorch.fused.scan import scan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which runs the kernels itself")


@pytest.fixture
def gpu(monkeypatch, fresh_kernels, tmp_path):
    launch_triton._loaded.cache_clear()
    yield machine(monkeypatch, tmp_path)
    launch_triton._loaded.cache_clear()


def results(backend, seed, dtype, shape, time_dim, record=False):
    """Outputs, last and recorded states, and every gradient of a random step over a sequence, by name."""
    T, B, N = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=random, dtype=dtype)

    states, parameters = ["v", "i"][: 1 + seed % 2], ["p", "q", "r"]
    sizes = itertools.cycle([(), (N,), (B, N)])
    xs = normal(*((T, B, N) if time_dim == 0 else (B, T, N))).requires_grad_()
    first = [normal(B, N).requires_grad_() for _ in states]
    values = [normal(*next(sizes)).requires_grad_() for _ in parameters]
    device = "cuda" if backend == "triton" else "cpu"
    kernel = build(
        random_step(seed, states, parameters), states, parameters, parameters, dtype, backend=backend, device=device
    )
    (ys,), last, recorded = scan(kernel, [xs], time_dim, first, values, record)
    ends = [ys, *last, *recorded]
    leaves, cotangents = [xs, *first, *values], [normal(*end.shape) for end in ends]
    gradients = torch.autograd.grad(ends, leaves, cotangents, allow_unused=True, materialize_grads=True)
    return [*ends, *gradients]


def check(*arguments):
    found, expected = (results(backend, *arguments) for backend in ("triton", "cpu"))
    for a, b in zip(found, expected, strict=True):
        assert_bits(a, b)


@pytest.mark.parametrize(
    "case", [(0, F32, (40, 3, 7), 0, False), (3, F64, (16, 1, 70), 1, True)], ids=["float32", "float64, recorded"]
)
def test_a_compiled_kernel_has_the_bits_of_the_one_in_c(gpu, case):
    check(*case)
    assert len(gpu.launched) == 2  # forward and backward


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(100, 140))
def test_any_step_has_c_s_bits_when_compiled(gpu, seed):
    """Random steps, lengths about the chunks', widths about the blocks', both layouts and dtypes, two generations."""
    gpu.capability = (80, 90)[seed // 2 % 2]
    shape = (1, 15, 16, 17, 40)[seed % 5], (1, 3)[seed // 5 % 2], (1, 4, 31, 64, 129, 260)[seed % 6]
    check(seed, (F32, F64)[seed // 3 % 2], shape, seed % 2, seed % 7 == 0)
    assert f".target sm_{gpu.capability}" in gpu.latest


def forward_kernels(dtype):
    """Of one state, by Triton and in C, without gradients."""
    step = random_step(4, ["v"], ["p"])
    devices = {"triton": "cuda", "cpu": "cpu"}
    return [build(step, ["v"], ["p"], [], dtype, False, backend, device) for backend, device in devices.items()]


def assert_alike(kernels, xs, first, values):
    ours, expected = (scan(kernel, [xs], 0, first, values) for kernel in kernels)
    assert_bits(ours[0][0], expected[0][0])
    assert_bits(ours[1][0], expected[1][0])


def test_vectors_of_aligned_sequences_and_single_elements_of_others_give_the_same_bits(gpu):
    """Of so many elements that a thread takes four, and asks for fewer rows ahead."""
    T, N, kernels = 11, 2**20, forward_kernels(F32)
    assert dict(launch_triton.spread("forward", 1, F32, N, N).constants)["AHEAD"] == 4
    random = torch.Generator().manual_seed(4)
    memory, values = torch.randn(T * N + 5, generator=random), [torch.randn(N, generator=random)]
    first = [torch.randn(1, N, generator=random)]
    for shift, name in ((0, "forward vectors"), (1, "forward"), (4, "forward vectors")):
        assert_alike(kernels, memory[shift : shift + T * N].view(T, 1, N), first, values)
        assert name in {key[0] for key in launch_triton.load(kernels[0].source).compiled}
    assert gpu.loaded == 2  # one of each


def test_more_elements_are_run_with_fewer_rows_ahead(gpu):
    T, N, kernels = 11, 2**18, forward_kernels(F64)
    assert dict(launch_triton.spread("forward", 1, F64, N, N).constants)["AHEAD"] == 8
    random = torch.Generator().manual_seed(5)
    xs, first, values = (torch.randn(size, generator=random, dtype=F64) for size in ((T, 1, N), (1, N), (N,)))
    assert_alike(kernels, xs, [first], [values])
    assert gpu.loaded == 1


@pytest.mark.parametrize("dtype", [F32, pytest.param(F64, marks=pytest.mark.sweep)])
def test_functions_that_are_rounded_are_within_two_ulp_of_torch_s(gpu, dtype):
    functions = {"exp": torch.exp, "log": torch.log, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, -1e-310], dtype=dtype)
    xs = torch.cat([torch.linspace(-110, 110, 4001, dtype=dtype), special])

    def step(given):
        return [*(function(given["x"]) for function in functions.values()), given["v"]]

    kernel = build(step, ["v"], [], [], dtype, False, "triton", "cuda", outputs=tuple(functions))
    outputs, _, _ = scan(kernel, [xs.view(1, 1, -1)], 0, [None], [])
    for found, function in zip(outputs, functions.values(), strict=True):
        assert_within_two_ulp(found.view(-1), function(xs))


# ---- the machine itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["short", "odd"])
def test_what_lies_outside_of_a_tensor_or_across_its_elements_is_noticed(gpu, damage):
    kernel = build(lambda given: [given["x"] + given["v"], given["x"]], ["v"], [], [], F32, False, "triton", "cuda")
    xs, ys, first, last = (torch.zeros(size) for size in (80, 80, 40, 40))
    given = [xs, ys, first, last, None, None]
    kernel.call("forward", given, geometry(torch.Size((2, 1, 40)), 0), ())
    given[0] = xs[:79] if damage == "short" else torch.zeros(81 * 4, dtype=torch.uint8)[1:-3]
    with pytest.raises(AssertionError, match=r"^1 reads" if damage == "short" else r"^80 reads"):
        kernel.call("forward", given, geometry(torch.Size((2, 1, 40)), 0), ())


def test_an_instruction_that_is_not_known_is_refused_by_name():
    text = "\n.visible .entry f(\n)\n{\n.reg .b32 %r<2>;\nshfl.sync.down.b32 %r1, %r0, 1;\nret;\n}\n"
    with pytest.raises(NotImplementedError, match=r"shfl\.sync\.down\.b32"):
        translated(text)
