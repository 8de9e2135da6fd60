"""What all measurements share: interleaved timing, the copy that bounds a kernel, tables."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


def medians(
    runs: Mapping[str, Run], repeat: int = 15, warm: int = 2, before: Run | None = None, twice: bool = False
) -> dict[str, float]:
    """Median seconds of each, run in turns, so that a disturbance of the machine meets all of them.

    Args:
        before: called before each run, outside its time.
        twice: each run follows an untimed one of the same, as in a training loop, and not another framework's, after
            which a short one finds nothing of its own in cache.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(warm + repeat):
        for name, run in runs.items():
            if before is not None:
                before()
            if twice:
                run()
            start = time.perf_counter()
            run()
            if k >= warm:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def per_call(run: Run, calls: int = 300, repeat: int = 7) -> float:
    """Median seconds of one of many small calls."""
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def require_same(a: Tensor, b: Tensor, what: str) -> None:
    """Raises `AssertionError` unless both are identical bit for bit: what differs is not timed."""
    if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        raise AssertionError(f"{what}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}, or NaN")
    same = (a == b) | a.isnan()
    if not bool(same.all()):
        raise AssertionError(f"{what}: {int((~same).sum())} of {a.numel()} values differ")


def require_close(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-5) -> float:
    """max|difference| / max|b|. Raises `AssertionError` above the tolerance."""
    if a.shape != b.shape or not bool(a.isfinite().all()) or float(b.abs().max()) == 0:
        raise AssertionError(f"{what}: {list(a.shape)} against {list(b.shape)}, not finite, or all zero")
    error = float((a - b).abs().max() / b.abs().max())
    if error > tolerance:
        raise AssertionError(f"{what}: gradients differ by {error:.2g} of the largest")
    return error


class Evict:
    """Called: puts something else into the caches, so that what follows begins with none of its tensors there."""

    def __init__(self, megabytes: int = 128) -> None:
        self.others = torch.zeros(megabytes << 18)

    def __call__(self) -> None:
        self.others.add_(1)


def quiet() -> None:
    """Collect garbage now rather than during a measurement."""
    gc.collect()


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain table."""
    cells = [list(map(str, header)), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([f"\n{title}", lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
