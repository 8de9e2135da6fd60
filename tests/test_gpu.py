"""Triton's kernels on a GPU: `make test-gpu`, or `python -m pytest -m gpu tests/test_gpu.py` with the Python that has
torch with CUDA. It needs torch, Triton, NumPy, pytest and this checkout, nothing installed and no network.

With TRITON_INTERPRET=1 those tests that need no hardware run on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import concurrent.futures
import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tracetorch as tt
from tests.engine_checks import check_rounded_function, loop, random_step
from tracetorch.fused import executor, launch_triton
from tracetorch.fused.build import build
from tracetorch.fused.scan import scan

# For deterministic matrix products, which `poisoned` asks for; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
INTERPRETED = executor.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS = INTERPRETED or torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not RUNS, reason="no CUDA GPU, and TRITON_INTERPRET=1 is not set"),
]
hardware = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
F32, F64 = torch.float32, torch.float64


def assert_bits(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    """Equal bit for bit, but for what a NaN is made of."""
    a, b = a.detach().cpu().contiguous().numpy(), b.detach().cpu().contiguous().numpy()
    assert (a.shape, a.dtype) == (b.shape, b.dtype), what
    nan = np.isnan(a)
    assert (nan == np.isnan(b)).all(), f"{what}: NaN in {int((nan != np.isnan(b)).sum())} other places"
    kind = np.uint32 if a.dtype == np.float32 else np.uint64
    different = (a.view(kind) != b.view(kind)) & ~nan
    assert not different.any(), f"{what}: {int(different.sum())} of {a.size} values differ"


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    assert float((a - b).abs().max()) <= tolerance * (float(b.abs().max()) or 1.0)


def normals(seed: int, dtype: torch.dtype = F32, device: str = DEVICE):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=dtype).to(device)


class Lif(tt.snn.Layer):
    """mem = beta*mem + x; a spike where mem > 1, with a gradient; mem -= spike."""

    def __init__(self, num_neurons: int) -> None:
        super().__init__(num_neurons)
        self.define_state("mem")
        self.define_decay("beta", 0.9)

    def step(self, x, mem):
        mem = self.beta * mem + x
        slope = (mem - 1) / (1 + (mem - 1).abs())
        spike = (mem > 1).to(mem.dtype) + slope - slope.detach()
        return spike, mem - spike


def both(layer, xs, weights, backend="triton", time_dim=0):
    """Outputs, the last state, and the gradients of the input and of every parameter."""
    leaf = xs.detach().requires_grad_()
    layer.reset_states()
    with tt.backend(backend):
        ys = layer.unroll(leaf, time_dim)
    slopes = torch.autograd.grad((ys * weights).sum() + layer.mem.sum(), [leaf, *layer.parameters()])
    return [ys.detach(), layer.mem.detach(), *slopes]


# ---- values ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (17, 3, 7), (40, 1, 513), (9, 2, 128), (100, 2, 65), (3, 1, 2048)]


@pytest.mark.parametrize("seed", range(24))
def test_random_steps_are_eager_torch_on_this_device(seed):
    T, B, N = SHAPES[seed % 6]
    time_dim, dtype = seed // 6 % 2, F64 if seed % 5 == 0 else F32
    count = [1, 2, 1, 3, 7][seed % 5]
    states, parameters = [f"s{k}" for k in range(count)], [f"p{k}" for k in range(count)]
    step, normal = random_step(seed, states, parameters), normals(seed, dtype)
    xs = normal(*((T, B, N) if time_dim == 0 else (B, T, N))).requires_grad_()
    first = [normal(B, N).requires_grad_() for _ in states]
    shapes = [(), (N,), (B, N)]
    values = {name: normal(*shapes[(seed + k) % 3]).requires_grad_() for k, name in enumerate(parameters)}
    leaves = [xs, *first, *values.values()]
    ys, last = loop(step, xs, time_dim, first, states, values)
    cotangents = [normal(*y.shape) for y in (ys, *last)]
    expected = torch.autograd.grad([ys, *last], leaves, cotangents, allow_unused=True)
    kernel = build(step, states, parameters, parameters, dtype, backend="triton", device=DEVICE)
    (ours,), our_last, _ = scan(kernel, [xs], time_dim, first, list(values.values()))
    for name, a, b in zip(("output", *states), (ours, *our_last), (ys, *last), strict=True):
        assert_bits(a, b, name)
    gradients = torch.autograd.grad([ours, *our_last], leaves, cotangents, allow_unused=True)
    for a, b in zip(gradients, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, 1e-5 if dtype is F32 else 1e-13)


# The 31 steps before the last of 32 have rows ahead; sizes of every plan, with tails, from one program to many.
SIZES = [(32, 1, 512), (37, 1, 2**16 + 5), (21, 1, 2**18 + 3), (13, 1, 2**20), (13, 4, 2**18 + 1), (300, 1, 33)]


@hardware
@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize(("T", "B", "N"), SIZES)
def test_every_plan_gives_the_bits_of_eager_torch(T, B, N, time_dim):
    layer, normal = Lif(N).to(DEVICE), normals(T)
    shape = (T, B, N) if time_dim == 0 else (B, T, N)
    xs, weights = normal(*shape) * 0.6 + 0.1, normal(*shape)
    given, expected = both(layer, xs, weights, "triton", time_dim), both(layer, xs, weights, "eager", time_dim)
    assert 0.01 < float(expected[0].mean()) < 0.9
    for name, a, b in zip(("outputs", "state", "input's gradient"), given, expected, strict=False):
        assert_bits(a, b, name) if name != "input's gradient" else assert_close(a, b)
    for a, b in zip(given[3:], expected[3:], strict=True):
        assert_close(a, b, 1e-4)  # sums over a million elements, in another order
    again = both(layer, xs, weights, "triton", time_dim)
    for a, b in zip(given, again, strict=True):
        assert_bits(a, b, "a second run")


def test_special_values_pass_as_in_eager_torch():
    special = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3e38, -3e38, 1e-38, 1.0, -1.5, 2.5]
    values = torch.tensor(special, device=DEVICE)
    pairs = torch.stack([values.repeat(13), values.repeat_interleave(13)])  # [T, N]
    steps = {
        "products": lambda g: [g["x"] * 3.0 - g["v"] * g["x"], g["x"]],
        "quotients": lambda g: [g["x"] / g["v"] + g["x"] / 3.0 + 1.0 / (g["x"] + 2.0), g["x"]],
        "extrema": lambda g: [torch.minimum(g["x"], g["v"]) * 2 + torch.maximum(g["x"], g["v"]), -g["x"]],
        "clamps": lambda g: [g["x"].clamp(-1, 1) + torch.relu(g["v"]) + (g["x"] * 1e-3).round(), g["x"]],
        "chosen": lambda g: [torch.where(g["x"] > g["v"], -g["x"], g["v"].abs()), torch.sqrt(g["x"].abs())],
        "subnormal": lambda g: [g["x"] * 1e-7 * 1e-7 + g["v"] * 1e-30, g["x"] * 1e-20 * 1e-20],
    }
    if INTERPRETED:
        # On the CPU torch takes the first or second of two zeros by their place, and its square root is not rounded.
        del steps["extrema"], steps["chosen"]
    for name, step in steps.items():
        kernel = build(step, ["v"], [], [], F32, False, "triton", DEVICE)
        (ys,), (last,), _ = scan(kernel, [pairs], 0, [values.repeat(13)], [])
        expected, (state,) = loop(step, pairs, 0, [values.repeat(13)], ["v"], {})
        assert_bits(ys, expected, name)
        assert_bits(last, state, name)


@pytest.mark.parametrize("name", ["exp", "sigmoid", "log", "tanh"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_rounded_functions_are_within_two_ulp_of_torch(name, dtype):
    check_rounded_function(getattr(torch, name), dtype, "triton", DEVICE)


def test_slices_that_begin_anywhere_give_the_same_bits():
    layer, memory = Lif(8).to(DEVICE), normals(3)(9 * 2 * 8 + 16)
    weights = normals(4)(9, 2, 8)
    expected = both(layer, memory[:144].clone().reshape(9, 2, 8), weights)
    for shift in (1, 2, 3, 4, 5):
        memory[shift : shift + 144] = memory[:144].clone()
        for a, b in zip(both(layer, memory[shift : shift + 144].view(9, 2, 8), weights), expected, strict=True):
            assert_bits(a, b, f"{shift} floats into the memory")
        memory[:144] = memory[shift : shift + 144].clone()


@hardware
def test_unaligned_rows_of_many_elements_give_the_bits_of_aligned_ones():
    n = 2**20
    step = lambda given: [given["v"] + 0.5 * given["x"], given["x"]]  # noqa: E731
    kernel = build(step, ["v"], [], [], F32, False, "triton", DEVICE)
    memory = normals(3)(5 * n + 4)
    for shift in (0, 1, 2, 4):
        xs = memory[shift : shift + 5 * n].view(5, n)
        (ys,), _, _ = scan(kernel, [xs], 0, [xs[0] * 2], [])
        expected, _ = loop(step, xs, 0, [xs[0] * 2], ["v"], {})
        assert_bits(ys, expected, f"{shift} floats into the memory")


@pytest.mark.parametrize("shape", [(0, 2, 7), (4, 0, 7)])
def test_empty_sequences(shape):
    layer = Lif(7).to(DEVICE)
    xs = torch.rand(shape, device=DEVICE, requires_grad=True)
    with tt.backend("triton"):
        ys = layer.unroll(xs)
    assert ys.shape == shape
    (slope,) = torch.autograd.grad(ys.sum() + layer.mem.sum(), [xs], allow_unused=True)
    assert slope is None or slope.shape == shape


@pytest.mark.parametrize("cut", [1, 13, 16, 29])
def test_chunks_compose_to_the_whole(cut):
    whole, parts = Lif(7).to(DEVICE), Lif(7).to(DEVICE)
    xs, weights = torch.rand(30, 3, 7, device=DEVICE, requires_grad=True), normals(1)(30, 3, 7)
    with tt.backend("triton"):
        a = whole.unroll(xs)
        b = torch.cat([parts.unroll(xs[:cut]), parts.unroll(xs[cut:])])
    assert_bits(a, b)
    for_a = torch.autograd.grad((a * weights).sum(), [xs, *whole.parameters()])
    for_b = torch.autograd.grad((b * weights).sum(), [xs, *parts.parameters()])
    assert_bits(for_a[0], for_b[0])
    for p, q in zip(for_a[1:], for_b[1:], strict=True):
        assert_close(p, q, 1e-6)


@pytest.mark.parametrize("T", [1, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("time_dim", [0, 1])
def test_recorded_states_and_their_gradients(T, time_dim):
    step, normal = random_step(3, ["v", "i"], ["p", "q"]), normals(T)
    kernel = build(step, ["v", "i"], ["p", "q"], ["p", "q"], F32, backend="triton", device=DEVICE)
    xs = normal(*((T, 3, 7) if time_dim == 0 else (3, T, 7)))
    first, values = [normal(3, 7).requires_grad_() for _ in range(2)], [normal(7).requires_grad_(), normal()]
    _, _, recorded = scan(kernel, [xs], time_dim, first, values, record=True)
    states, series = first, []
    for x in xs.unbind(time_dim):
        _, *states = step({"x": x, "v": states[0], "i": states[1], "p": values[0], "q": values[1]})
        series.append(states)
    expected = [torch.stack(each, time_dim) for each in zip(*series, strict=True)]
    weights = [normal(*xs.shape) for _ in expected]
    for a, b in zip(recorded, expected, strict=True):
        assert_bits(a, b)
    leaves = [*first, values[0]]
    slopes = [torch.autograd.grad(found, leaves, weights) for found in (recorded, expected)]
    for a, b in zip(*slopes, strict=True):
        assert_close(a, b)


def test_native_layers_are_their_step_loop():
    normal = normals(0)
    for name in ("LIB", "LIT", "DSRLITS", "RLIB", "SLI"):
        options = {} if name == "SLI" else {"quant_fn": tt.functional.round_ste()}
        layer = getattr(tt.snn, name)(9, **options).to(DEVICE)
        other, xs = copy.deepcopy(layer), normal(21, 3, 9) * 0.5 + 0.3
        found = []
        for each, backend in ((layer, "triton"), (other, "eager")):
            leaf = xs.clone().requires_grad_()
            with tt.backend(backend):
                ys = each.unroll(leaf)
            found.append((ys, *torch.autograd.grad(ys.sum(), leaf)))
        assert found[1][0].any(), name
        assert_close(found[0][0], found[1][0], 1e-5)
        assert_close(found[0][1], found[1][1], 1e-4)


def test_online_learning_is_that_of_the_step_loop():
    torch.manual_seed(0)
    nets = [tt.nn.Sequential(tt.nn.LIF(6, 16), tt.nn.LIS(16, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    xs = (torch.rand(40, 2, 6) < 0.3).float().to(DEVICE)
    found = []
    for net, backend in zip((net.to(DEVICE) for net in nets), ("triton", "eager"), strict=True):
        with tt.backend(backend if DEVICE == "cuda" else "auto"):
            for x in xs:
                out = net(x)
                out = out[0] if isinstance(out, tuple) else out
        out.pow(2).sum().backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert found[0]
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


# ---- the hardware ----------------------------------------------------------------------------------------------------


@hardware
def test_auto_takes_the_kernel_on_cuda(monkeypatch):
    monkeypatch.setattr(Lif, "step", Lif.step)
    layer, xs = Lif(16).cuda(), torch.rand(5, 2, 16, device="cuda")
    calls = []
    kept = launch_triton.TritonKernel.call
    monkeypatch.setattr(launch_triton.TritonKernel, "call", lambda *given: (calls.append(given[1]), kept(*given))[1])
    layer.unroll(xs).sum().backward()
    assert calls == ["forward", "backward"]


@hardware
def test_kernels_run_on_the_current_stream():
    layer, xs = Lif(512).cuda(), torch.empty(50, 64, 512, device="cuda")
    weights = normals(1)(50, 64, 512)
    expected = both(layer, normals(2)(50, 64, 512), weights)
    source, stream = normals(2)(50, 64, 512), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what comes on another stream now reads what xs was before
        xs.copy_(source)
        found = both(layer, xs, weights)
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_bits(a, b, "on another stream")


@hardware
def test_a_call_waits_for_nothing():
    layer, xs = Lif(64).cuda(), torch.rand(20, 4, 64, device="cuda")
    weights = torch.rand_like(xs)
    both(layer, xs, weights)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(layer, xs, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@hardware
def test_a_cuda_graph_replays_forward_and_backward():
    layer, normal = Lif(100).cuda(), normals(5)
    xs, weights, stream = normal(37, 8, 100), normal(37, 8, 100), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(layer, xs, weights)
    torch.cuda.current_stream().wait_stream(stream)
    static, graph = xs.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both(layer, static, weights)
    for _ in range(3):
        fresh = normal(37, 8, 100)
        static.copy_(fresh)
        graph.replay()
        for a, b in zip(found, both(layer, fresh, weights), strict=True):
            assert_bits(a, b, "replayed")


@hardware
def test_a_capture_of_what_is_not_compiled_is_refused_and_leaves_the_gpu_whole():
    step = lambda given: [given["v"] * 0.123 + given["x"], given["x"]]  # noqa: E731
    kernel = build(step, ["v"], [], [], F32, False, "triton", "cuda")
    xs, first = torch.rand(4, 9, device="cuda"), torch.rand(9, device="cuda")
    with (
        pytest.raises(tt.fused.BackendError, match="before the capture, run the same call once"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        scan(kernel, [xs], 0, [first], [])
    (ys,), _, _ = scan(kernel, [xs], 0, [first], [])
    assert_bits(ys, loop(step, xs, 0, [first], ["v"], {})[0])


@hardware
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one():
    layer, xs, weights = Lif(33), normals(1)(12, 3, 33), normals(2)(12, 3, 33)
    expected = both(layer.to("cuda:0"), xs, weights)
    found = both(layer.to("cuda:1"), xs.to("cuda:1"), weights.to("cuda:1"))
    for a, b in zip(found, expected, strict=True):
        assert a.device.index == 1
        assert_bits(a, b)


@hardware
def test_threads_that_launch_at_once():
    step = lambda given: [given["v"] * 0.321 + given["x"], given["x"]]  # noqa: E731
    kernel = build(step, ["v"], [], [], F32, False, "triton", "cuda")
    xs, first = torch.rand(4, 9, device="cuda"), torch.rand(9, device="cuda")

    def run(_):
        return scan(kernel, [xs], 0, [first], [])[0][0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, range(32)))
    for ys in found:
        assert_bits(ys, loop(step, xs, 0, [first], ["v"], {})[0])


CACHED = """
import sys, torch, tracetorch as tt
from tracetorch.fused import cubins
made = []
pack = cubins._packed
cubins._packed = lambda group: (made.append(1), pack(group))[1]
with tt.backend("triton"):
    tt.snn.LI(16).cuda().unroll(torch.ones(5, 2, 16, device="cuda", requires_grad=True)).sum().backward()
torch.cuda.synchronize()
print(len(made))
"""


@hardware
def test_another_process_takes_compiled_kernels_from_the_cache(tmp_path):
    given = {
        **os.environ,
        "TRACETORCH_CACHE": str(tmp_path / "ours"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    for damage, made in ((False, "2"), (False, "0"), (True, "2")):
        if damage:
            for path in (tmp_path / "ours").glob("*.kernel"):
                path.write_bytes(path.read_bytes()[:-100])
        done = subprocess.run([sys.executable, "-c", CACHED], env=given, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.split()) == (0, [made]), done.stderr


@hardware
def test_torch_compile_sees_one_operation():
    layer, xs, weights = Lif(24).cuda(), normals(1)(12, 3, 24), normals(2)(12, 3, 24)
    expected = both(layer, xs, weights)
    layer.reset_states()
    leaf = xs.clone().requires_grad_()
    ys = torch.compile(lambda x: layer.unroll(x), fullgraph=True, backend="aot_eager")(leaf)
    assert_bits(ys, expected[0])


@hardware
def test_offsets_past_two_to_the_31():
    n = 2**30
    if torch.cuda.mem_get_info()[0] < 10 * 4 * n:
        pytest.skip("needs 40 GiB of free GPU memory")
    step = lambda given: [given["x"] + given["v"], given["x"]]  # noqa: E731
    kernel = build(step, ["v"], [], [], F32, False, "triton", "cuda")
    xs = torch.arange(3 * n, device="cuda", dtype=torch.int64).remainder_(1021).to(F32).view(3, n)
    first = torch.zeros(n, device="cuda")
    (ys,), _, _ = scan(kernel, [xs], 0, [first], [])
    assert torch.equal(ys[2], xs[2] + xs[1])
