"""The Triton kernels of a hard-threshold LIF on a GPU, beside a copy on the device and SpikingJelly's GPU backends.

    python -m benchmarks.gpu --out build/bench-gpu.json [--limit 480] [PART ...]

needs torch with CUDA, Triton 3.6 or newer, NumPy, a C compiler and this checkout as the current folder; nothing is
installed and no network used. Every part runs in a process of its own and under a limit of its own, so that a crash, a
hang or a CUDA error costs that part alone; the file is written anew after each. Equality with eager torch on the same
GPU comes before any time, in each part for the sizes it times.

A share is the time of the copies that move as many bytes as the kernel has to, over the kernel's time: forward 1 read
and 1 write, backward 2 and 1, both 3 and 2 (a copy is 1 and 1). Times of kernels are between two events on a stream
that is kept busy before, so that no Python is in them, and begin with nothing in the second cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tracetorch as tt
from benchmarks.kernels import LIF, step
from benchmarks.measure import per_call, require_close, require_same, table
from tracetorch.fused import executor
from tracetorch.fused.build import build
from tracetorch.fused.kernel import geometry

Run = Callable[[], Any]
# T, B, N and whether time is the second dimension: from few neurons for long to many for a short time.
SIZES = [
    (100, 64, 16384, 0),
    (100, 64, 16384, 1),
    (100, 64, 16381, 0),
    (1000, 64, 1024, 0),
    (100, 64, 512, 0),
    (100, 64, 512, 1),
    (10, 64, 4096, 0),
    (4, 64, 16384, 0),
    (10_000, 1, 512, 0),
    (10_000, 4, 512, 0),
    (10_000, 64, 512, 1),
]
TINY = [(7, 2, 5, 0), (7, 2, 5, 1)]
BUSY = 1_000_000  # cycles, half a millisecond: longer than Python takes for what is timed


class Device:
    """Where the kernels run: a GPU, or for a trial of this file the CPU under TRITON_INTERPRET=1."""

    def __init__(self) -> None:
        self.name = "cpu" if executor.interpreted() else "cuda"
        self.sizes = TINY if self.name == "cpu" else SIZES
        self.repeat = 1 if self.name == "cpu" else 15
        self.evicted = torch.empty(1 if self.name == "cpu" else 2**26, device=self.name)

    def wait(self) -> None:
        """Until all work is done."""
        if self.name == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Run) -> float:
        """Of one run, on the device."""
        if self.name == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.evicted.fill_(1)
        torch.cuda._sleep(BUSY)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(self, runs: dict[str, Run]) -> dict[str, float]:
        """Median seconds of each, in turns."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for k in range(2 + self.repeat):
            for name, run in runs.items():
                seconds = self.seconds(run)
                if k >= 2:
                    times[name].append(seconds)
        return {name: statistics.median(values) for name, values in times.items()}


class Given:
    """The kernel's two functions on tensors that exist already."""

    def __init__(self, device: str, T: int, B: int, N: int, time_dim: int) -> None:
        self.kernel = build(step, ["mem"], ["beta"], [], torch.float32, backend="triton", device=device)
        self.x = torch.randn((T, B, N) if time_dim == 0 else (B, T, N), device=device).mul_(0.7)
        self.y, self.d_y, self.d_x = torch.empty_like(self.x), torch.randn_like(self.x), torch.empty_like(self.x)
        state = torch.zeros(B, N, device=device)
        self.first, self.last, self.d_last, self.d_first = (state.clone() for _ in range(4))
        self.saved = state.new_empty(-(-T // self.kernel.chunk), B, N)
        self.beta = torch.tensor(0.9, device=device)
        self.shape = geometry(self.x.shape, time_dim)

    def forward(self) -> None:
        """All steps."""
        self.kernel.call("forward", [self.x, self.y, self.first, self.last, None, None, self.beta], self.shape, (1,))

    def saving(self) -> None:
        """All steps, and what the backward pass needs."""
        states = [self.first, self.last, self.saved, None]
        self.kernel.call("forward", [self.x, self.y, *states, self.beta], self.shape, (1,))

    def backward(self) -> None:
        """After `saving`."""
        states = [None, self.saved, self.d_last, None, self.d_first]
        self.kernel.call("backward", [self.x, self.d_y, self.d_x, *states, self.beta], self.shape, (1,))

    def both(self) -> None:
        """Forward and backward."""
        self.saving()
        self.backward()

    def copy(self) -> None:
        """What the shares are made of."""
        self.y.copy_(self.x)


def _through(layer: Any, xs: Tensor, time_dim: int, weights: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Outputs and the input's gradient."""
    leaf = xs.detach().requires_grad_()
    layer.reset_states()
    with tt.backend(backend):
        ys = layer.unroll(leaf, time_dim)
    return ys.detach(), torch.autograd.grad(ys, leaf, weights)[0]


def _require_equal(device: Device, given: Given, size: tuple[int, int, int, int]) -> None:
    """Raises `AssertionError` unless layer and kernel give what eager torch gives: outputs bit for bit."""
    T, _, N, time_dim = size
    layer = LIF(N).to(device.name)
    few = given.x.narrow(time_dim, 0, min(T, 300))  # eager torch keeps every step of it
    weights = given.d_y.narrow(time_dim, 0, min(T, 300))
    eager, slope = _through(layer, few, time_dim, weights, "eager")
    ours, ours_slope = _through(layer, few, time_dim, weights, "triton")
    require_same(ours, eager, f"{size}, outputs")
    require_close(ours_slope, slope, f"{size}, input gradient")
    whole, whole_slope = _through(layer, given.x, time_dim, given.d_y, "triton")
    given.y.fill_(float("nan"))
    given.d_x.fill_(float("nan"))
    given.both()
    require_same(given.y, whole, f"{size}, outputs of the bare kernel")
    require_same(given.d_x, whole_slope, f"{size}, gradient of the bare kernel")
    require_same(whole.narrow(time_dim, 0, few.shape[time_dim]), eager, f"{size}, outputs of the whole")
    if float(whole.mean()) in (0.0, 1.0):
        raise AssertionError(f"{size}: no events")


def sizes(device: Device) -> dict[str, Any]:
    """Shares of the copy bound, from T=4 to T=10,000."""
    found: dict[str, Any] = {}
    for T, B, N, time_dim in device.sizes:
        name = f"T={T} B={B} N={N}" + (", [B, T, N]" if time_dim else "")
        try:
            given = Given(device.name, T, B, N, time_dim)
            _require_equal(device, given, (T, B, N, time_dim))
            runs = {"copy": given.copy, "forward": given.forward, "backward": given.backward, "both": given.both}
            times = device.medians(runs)
            found[name] = {
                **{f"{run} µs": 1e6 * seconds for run, seconds in times.items()},
                "copy GB/s": 8 * given.x.numel() / times["copy"] / 1e9,
                "forward": times["copy"] / times["forward"],
                "backward": 1.5 * times["copy"] / times["backward"],
                "both": 2.5 * times["copy"] / times["both"],
            }
        except (AssertionError, torch.OutOfMemoryError) as error:  # this size alone
            found[name] = {"error": str(error)}
    return found


def peers(device: Device) -> dict[str, Any]:
    """SpikingJelly's GPU backends: their time over ours, forward and backward as a user calls it."""
    try:
        from spikingjelly.activation_based import functional, neuron
    except ImportError as error:
        return {"not here": str(error)}
    found: dict[str, Any] = {}
    for T, B, N, time_dim in device.sizes:
        if time_dim:
            continue
        x = torch.randn(T, B, N, device=device.name).mul_(0.7).requires_grad_()
        weights, layer = torch.randn_like(x), LIF(N).to(device.name)
        runs: dict[str, Run] = {"ours": partial(_through, layer, x, 0, weights, "triton")}
        row: dict[str, Any] = {}
        for backend in ("triton", "cupy"):
            try:
                node = neuron.LIFNode(tau=10.0, detach_reset=True, step_mode="m", backend=backend).to(device.name)

                def run(node: Any = node, x: Tensor = x, weights: Tensor = weights) -> None:
                    functional.reset_net(node)
                    torch.autograd.grad(node(x), x, weights)

                run()
                runs[backend] = run
            except Exception as error:  # whatever is missing for this backend
                row[backend] = f"{type(error).__name__}: {error}"[:300]
        times = device.medians(runs)
        row |= {f"{name} µs": 1e6 * seconds for name, seconds in times.items()}
        row |= {f"{name} over ours": times[name] / times["ours"] for name in times if name != "ours"}
        found[f"T={T} B={B} N={N}"] = row
    return found


def calls(device: Device) -> dict[str, Any]:
    """Microseconds of Python for a call on tiny tensors, and of the same replayed from a CUDA graph."""
    layer, x = LIF(8).to(device.name), torch.zeros(4, 2, 8, device=device.name)
    leaf, weights = x.clone().requires_grad_(), torch.ones_like(x)
    given = Given(device.name, 4, 2, 8, 0)

    def forward() -> None:
        with torch.no_grad(), tt.backend("triton"):
            layer.unroll(x)

    def both() -> None:
        layer.detach_states()
        with tt.backend("triton"):
            torch.autograd.grad(layer.unroll(leaf), leaf, weights)

    many = 300 if device.name == "cuda" else 2
    runs = {"torch.add": lambda: torch.add(x, x), "kernel": given.forward, "forward": forward, "both": both}
    found = {}
    for name, run in runs.items():
        found[f"{name} µs"] = 1e6 * per_call(run, many)
        device.wait()
    return found


def graphs(device: Device) -> dict[str, Any]:
    """A training step captured in a CUDA graph: the same bits as without, and its time."""
    if device.name == "cpu":
        return {"not here": "the interpreter has no CUDA graphs"}
    layer, x = LIF(512).cuda(), torch.randn(100, 64, 512, device="cuda").mul_(0.7).requires_grad_()
    weights, stream = torch.randn(100, 64, 512, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _through(layer, x, 0, weights, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    static, graph = x.detach().clone().requires_grad_(), torch.cuda.CUDAGraph()
    layer.reset_states()
    with torch.cuda.graph(graph), tt.backend("triton"):
        ys = layer.unroll(static)
        (slope,) = torch.autograd.grad(ys, static, weights)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = torch.randn_like(x).mul_(0.7)
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        expected, expected_slope = _through(layer, fresh, 0, weights, "triton")
        require_same(ys.detach(), expected, "replayed outputs")
        require_same(slope, expected_slope, "replayed gradient")
    times = device.medians({"replay": graph.replay, "called": lambda: _through(layer, x, 0, weights, "triton")})
    return {f"{name} µs": 1e6 * seconds for name, seconds in times.items()}


def memory(device: Device) -> dict[str, Any]:
    """Peak of a forward and backward pass beyond what it is given and gives, in inputs."""
    if device.name == "cpu":
        return {"not here": "the interpreter's memory is Python's"}
    layer, x = LIF(16384).cuda(), torch.randn(100, 16, 16384, device="cuda").requires_grad_()
    weights = torch.randn_like(x)
    _through(layer, x, 0, weights, "triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = _through(layer, x, 0, weights, "triton")
    beyond = torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in kept)
    return {"inputs": beyond / x.nbytes}


BUILD = """
import time, torch, tracetorch as tt
from benchmarks.gpu import Device
device = Device().name
if device == "cuda":
    torch.zeros(1, device=device)
    import triton
    triton.runtime.driver.active.get_current_device()  # builds Triton's own library, once for all kernels
x = torch.rand(9, 2, 128, device=device, requires_grad=True)
for layer in (tt.snn.LI(128), tt.snn.DSRLITS(128)):
    layer = layer.to(device)
    with tt.backend("triton"):
        start = time.perf_counter()
        ys = layer.unroll(x)
        forward = time.perf_counter() - start
        ys.sum().backward()
    print(type(layer).__name__, forward, time.perf_counter() - start)
"""


def builds(device: Device) -> dict[str, Any]:
    """Seconds of a layer's first calls, tracing included: nothing cached, then from our verified cache."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        given = {**os.environ, "TRACETORCH_CACHE": f"{folder}/ours", "TRITON_CACHE_DIR": f"{folder}/triton"}
        for name in ("cold", "cached"):
            done = subprocess.run(
                [sys.executable, "-c", BUILD], env=given, capture_output=True, text=True, timeout=120, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            for row in done.stdout.splitlines():
                layer, forward, both = row.split()
                found[f"{layer}, {name}"] = {"forward s": float(forward), "forward and backward s": float(both)}
    return found


# Seconds that each may take, the most telling first.
PARTS: dict[str, tuple[Callable[[Device], dict[str, Any]], int]] = {
    "sizes": (sizes, 150),
    "builds": (builds, 90),
    "graphs": (graphs, 60),
    "calls": (calls, 60),
    "memory": (memory, 45),
    "peers": (peers, 90),
}


def _about(device: Device) -> dict[str, Any]:
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if device.name == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    return found


def _apart(part: str, seconds: float) -> dict[str, Any]:
    """A part's results, from a process of its own; what went wrong, else."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--inside", part, "--out", str(file)]
        start = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
            said = f"exit {done.returncode}: {done.stderr[-3000:]}"
        except subprocess.TimeoutExpired:
            said = f"not done after {seconds:.0f} s"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"error": said}
        return {**found, "seconds": time.perf_counter() - start}


def _inside(part: str, out: Path) -> None:
    device = Device()
    try:
        found: dict[str, Any] = {"about": _about(device), "found": PARTS[part][0](device)}
    except Exception:  # the report is the place for it
        found = {"error": traceback.format_exc()[-3000:]}
    out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _shown(part: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"\n{part}: {result['error']}"
    found = result["found"]
    if not all(isinstance(row, dict) for row in found.values()):
        return f"\n{part}: " + ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in found.items()
        )
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    return table(part, [part, *names], [[key, *(row.get(name, "") for name in names)] for key, row in found.items()])


def main(out: Path | None = None, limit: float = 480, parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every part, or those named; nothing without a GPU, which it says.

    Args:
        out: where to write the results, anew after each part.
        limit: seconds after which no part begins or goes on.
    """
    reason = executor.no_triton()
    if reason is not None:
        print(f"\nGPU: not measured: {reason}")
        return {}
    end = time.monotonic() + limit
    results: dict[str, Any] = {}
    for part in parts or PARTS:
        left = end - time.monotonic()
        results[part] = _apart(part, min(left, PARTS[part][1])) if left > 5 else {"error": "no time was left for it"}
        print(_shown(part, results[part]), flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def _command() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Equality first, then medians beside a copy.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}; without any: all")
    parser.add_argument("--out", type=Path, default=Path("build/bench-gpu.json"))
    parser.add_argument("--limit", type=float, default=480, help="seconds for all of it")
    parser.add_argument("--inside", choices=list(PARTS), help="that part, in this process")
    given = parser.parse_args()
    if given.inside:
        _inside(given.inside, given.out)
    else:
        main(given.out, given.limit, tuple(given.parts))


if __name__ == "__main__":
    _command()
