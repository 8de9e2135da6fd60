"""Online learning: peak memory of forward plus backward as the stream gets longer, and the time of a step.

Each memory is the peak of a process of its own (Linux's VmHWM), so that no earlier run's memory counts.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tracetorch as tt
from benchmarks.measure import per_call, quiet, table

IN, HIDDEN, OUT = 64, 256, 10
LENGTHS = (100, 1_000, 20_000)
MODES = {"steps": 0, "chunks of 100": 100}
FLAT = 1.02


def network(rule: str) -> tt.nn.Sequential:
    """Two layers of spikes and a read-out."""
    torch.manual_seed(0)
    return tt.nn.Sequential(
        tt.nn.LIF(IN, HIDDEN, bias=True, rule=rule),
        tt.nn.LIF(HIDDEN, HIDDEN, bias=True, rule=rule),
        tt.nn.LIS(HIDDEN, OUT, rule=rule),
    )


def stream(net: tt.nn.Sequential, steps: int, chunk: int) -> Tensor:
    """The outputs' mean over the stream, with the gradient of the last call; one signal goes back."""
    net.reset_states()
    calls = steps // max(chunk, 1)
    total = torch.zeros(1, OUT)
    for _ in range(calls):
        outputs, _ = net(torch.rand(1, *([chunk] if chunk else []), IN) < 0.2)
        last = outputs.mean(1) if chunk else outputs
        total += last.detach()
    mean = last + (total / calls - last).detach()
    mean[0, 0].backward()
    return mean.detach()


def peak(rule: str, steps: int, chunk: int) -> tuple[float, float]:
    """Megabytes of this process at its peak, and the seconds of the stream."""
    torch.set_num_threads(1)
    net = network(rule)
    stream(net, 100, chunk)  # builds the kernels
    start = time.perf_counter()
    stream(net, steps, chunk)
    seconds = time.perf_counter() - start
    # Not getrusage: its peak begins with that of the process that started this one.
    [row] = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
    return int(row.split()[1]) / 1024, seconds


def measured(rule: str, steps: int, chunk: int) -> tuple[float, float]:
    """`peak` in a process of its own."""
    code = f"from benchmarks import online; print(*online.peak({rule!r}, {steps}, {chunk}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    megabytes, seconds = map(float, done.stdout.split())
    return megabytes, seconds


def memory() -> dict[str, Any]:
    """Peaks by rule, mode and length. Raises `AssertionError` where "average" is not flat within 2 %."""
    results: dict[str, Any] = {}
    rows = []
    for rule in ("average", "ottt", "bptt"):
        for mode, chunk in MODES.items():
            peaks = {steps: measured(rule, steps, chunk) for steps in LENGTHS}
            megabytes = [value for value, _ in peaks.values()]
            results[f"{rule}, {mode}"] = {str(steps): value for steps, (value, _) in peaks.items()}
            per_step = 1e6 * peaks[LENGTHS[-1]][1] / LENGTHS[-1]
            rows.append([rule, mode, *(f"{value:.1f}" for value in megabytes), megabytes[-1] / megabytes[0], per_step])
            if rule == "average" and megabytes[-1] > FLAT * megabytes[0]:
                raise AssertionError(
                    f"average, {mode}: the peak grew from {megabytes[0]:.1f} to {megabytes[-1]:.1f} MB"
                )
    head = ("rule", "calls", *(f"T = {steps:,}, MB" for steps in LENGTHS), "last / first", "µs a step")
    print(table("Peak memory of a process: a stream, then one learning signal", head, rows))
    return results


def speed() -> dict[str, Any]:
    """Forward and backward of one layer, over a whole sequence at once."""
    results: dict[str, Any] = {}
    rows = []
    for rule in ("average", "ottt", "bptt"):
        layer = tt.nn.LIF(IN, HIDDEN, rule=rule)
        inputs = torch.rand(16, 200, IN) < 0.2

        def train(layer: tt.nn.LIF = layer, inputs: Tensor = inputs) -> None:
            layer.reset_states()
            layer(inputs)[0].sum().backward()

        quiet()
        results[rule] = 1e3 * per_call(train, calls=5)
        rows.append([rule, results[rule]])
    print(table("One layer, B=16, T=200, 64 to 256: forward and backward", ("rule", "ms"), rows))
    return results


def main() -> dict[str, Any]:
    """Both."""
    return {"memory": memory(), "speed": speed()}
