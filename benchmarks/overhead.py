"""What a call costs before any arithmetic, and what a kernel's build costs, cold and from the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor

import tracetorch as tt
from benchmarks.kernels import LIF
from benchmarks.measure import per_call, table

_BUILD = """
import time, torch, tracetorch as tt
from benchmarks.kernels import LIF
from tracetorch.fused import compiler
compiler.compiler()
layer, x = LIF(64), torch.zeros(3, 2, 64, requires_grad=True)
with tt.backend("cpu"):
    start = time.perf_counter()
    layer.unroll(x)
    print(time.perf_counter() - start)
"""


def build(folder: str) -> float:
    """Seconds of a layer's first call in a new process."""
    environment = {**os.environ, "TRACETORCH_CACHE": folder, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _BUILD], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


_IMPORT = """
import time, torch
start = time.perf_counter()
import tracetorch
print(time.perf_counter() - start)
"""


def imported(folder: str) -> float:
    """Seconds that `import tracetorch` takes beside torch's own, its byte code compiled before."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", _IMPORT]
    times = []
    for _ in range(4):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    return sorted(times[1:])[1]


class Nothing(torch.autograd.Function):
    """As many tensors in and out as a layer of one state has, and no arithmetic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, last = torch.empty_like(x), torch.empty_like(state)
        ctx.save_for_backward(x, state)
        return y, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, state = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(state)


def main() -> dict[str, Any]:
    """Microseconds a call on tiny tensors, milliseconds a build and an import."""
    torch.set_num_threads(1)
    found = {}
    leaf, state = torch.zeros(2, 1, 4, requires_grad=True), torch.zeros(1, 4)
    empty = per_call(lambda: Nothing.apply(leaf, state)[0].sum().backward())
    found["torch's own, an empty autograd Function, forward+backward, us"] = 1e6 * empty
    layers = {"LIF (one fixed decay)": LIF(4), "LIB (three learned parameters)": tt.snn.LIB(4)}
    for name, layer in layers.items():
        x = torch.zeros(2, 1, 4)
        leaf = x.clone().requires_grad_()
        with tt.backend("cpu"):

            def forward(layer: Any = layer, x: Any = x) -> None:
                with torch.no_grad():
                    layer.unroll(x)

            def both(layer: Any = layer, leaf: Any = leaf) -> None:
                layer.detach_states()
                layer.unroll(leaf).sum().backward()

            found[f"{name}, forward, us"] = 1e6 * per_call(forward)
            found[f"{name}, forward+backward, us"] = 1e6 * per_call(both)
    with tempfile.TemporaryDirectory() as folder:
        found["build, cold, ms"] = 1e3 * build(folder)
        found["build, cached, ms"] = 1e3 * sorted(build(folder) for _ in range(3))[1]
        found["import beside torch, ms"] = 1e3 * imported(folder)
    print(table("Overhead", ("what", "value"), list(found.items())))
    return found
