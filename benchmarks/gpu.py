"""The Triton kernel of a hard-threshold LIF on a GPU, against a copy on the device and SpikingJelly's GPU backends."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import tracetorch as tt
from benchmarks.kernels import LIF
from benchmarks.measure import require_close, require_same, table

SIZES = [(100, 16, 16384), (100, 64, 512), (1000, 64, 1024), (32, 128, 65536)]


def _medians(runs: dict[str, Callable[[], Any]], repeat: int = 30) -> dict[str, float]:
    """Median seconds of each on the device, by events, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(repeat + 5):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            if k >= 5:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _peers() -> dict[str, Callable[[], Any]]:
    try:
        from spikingjelly.activation_based import neuron
    except ImportError:
        return {}
    found = {}
    for backend in ("triton", "cupy"):
        try:
            node = neuron.LIFNode(tau=2.0, detach_reset=True, step_mode="m", backend=backend).cuda()
        except (TypeError, ValueError, ImportError, AssertionError, NotImplementedError) as error:
            print(f"SpikingJelly's {backend} backend is not here: {error}")
            continue
        found[f"SpikingJelly {backend}"] = node
    return found


def one(steps: int, batch: int, neurons: int) -> dict[str, float]:
    """Shares of the copy bound, and peers' times over ours."""
    layer = LIF(neurons).cuda()
    x = torch.randn(steps, batch, neurons, device="cuda").mul_(0.7)
    leaf, grad, into = x.clone().requires_grad_(), torch.randn_like(x), torch.empty_like(x)

    def forward() -> Any:
        layer.reset_states()
        with tt.backend("triton"), torch.no_grad():
            return layer.unroll(x)

    def both(backend: str = "triton") -> Any:
        layer.reset_states()
        with tt.backend(backend):
            y = layer.unroll(leaf)
        return y, torch.autograd.grad(y, leaf, grad)[0]

    (y, d_x), (expected, d_expected) = both(), both("eager")
    require_same(y.detach(), expected.detach(), f"T={steps} B={batch} N={neurons}")
    require_close(d_x, d_expected, "input gradient")
    runs = {"copy": lambda: into.copy_(x), "forward": forward, "forward+backward": both}
    for name, node in _peers().items():

        def peer(node: Any = node) -> None:
            node.reset()
            torch.autograd.grad(node(leaf), leaf, grad)

        runs[name] = peer
    times = _medians(runs)
    found = {"copy GB/s": 8 * x.numel() / times["copy"] / 1e9, "forward": times["copy"] / times["forward"]}
    found["forward+backward"] = 2.5 * times["copy"] / times["forward+backward"]
    found |= {f"{name} over ours": times[name] / times["forward+backward"] for name in _peers()}
    return found


def main() -> dict[str, Any]:
    """Every size; nothing without a GPU, which it says."""
    if not torch.cuda.is_available():
        print("\nGPU: no CUDA device here, not measured")
        return {}
    results = {f"T={t} B={b} N={n}": one(t, b, n) for t, b, n in SIZES}
    rows = [[size, *found.values()] for size, found in results.items()]
    print(table(f"LIF on {torch.cuda.get_device_name()}", ["size", *next(iter(results.values()))], rows))
    return results
