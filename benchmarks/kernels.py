"""The CPU kernel of a hard-threshold LIF against the copy of the same tensors, into given and into fresh outputs.

Every run begins with its tensors out of cache, whatever ran before it. The bound is the time to move what must move at
the bandwidth of a copy into a given tensor: forward, 1 read and 1 write (one copy); forward and backward, 3 reads and 2
writes (two and a half copies).

Before a run "as called" a tiny layer runs, so that the interpreter's own code is in cache, as in a network, whose other
layers ran just before; "all cold" is without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import tracetorch as tt
from benchmarks.measure import Evict, medians, quiet, require_same, table
from tracetorch.functional import heaviside
from tracetorch.functional.surrogates import Surrogate
from tracetorch.fused.build import build
from tracetorch.fused.kernel import Kernel, geometry

PASSES = {"forward": 1.0, "forward+backward": 2.5}
SWEEP = [(4, 64, 16384), (10, 64, 4096), (100, 16, 16384), (100, 64, 512), (1000, 16, 1024), (10_000, 4, 512)]


def step(given: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """mem = beta*mem + x; a spike where mem > 1; mem -= spike."""
    mem = given["beta"] * given["mem"] + given["x"]
    spikes = heaviside(mem - 1, torch.ones(()), Surrogate("atan"))
    return spikes, mem - spikes


class LIF(tt.snn.Layer):
    """The same as a user writes it."""

    def __init__(self, num_neurons: int) -> None:
        super().__init__(num_neurons)
        self.define_state("mem")
        self.define_decay("beta", 0.9, rank=0, learnable=False)

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """x, mem -> spikes, mem."""
        spikes, mem = step({"x": x, "mem": states[0], "beta": self.beta})
        return spikes, mem


class Given:
    """The kernel's two functions on tensors that exist already, from a state of zero."""

    def __init__(self, steps: int, batch: int, neurons: int) -> None:
        self.kernel: Kernel = build(step, ["mem"], ["beta"], [], torch.float32)
        self.x = torch.randn(steps, batch, neurons).mul_(0.7)
        self.y, self.d_x, self.d_y = torch.zeros_like(self.x), torch.zeros_like(self.x), torch.randn_like(self.x)
        self.beta = torch.tensor(0.9)
        self.last = torch.zeros(batch, neurons)
        self.saved = torch.zeros(self.kernel.saved(steps), batch, neurons)
        self.shape = geometry(self.x.shape, 0)

    def forward(self, save: bool = False) -> None:
        """All steps; with `save`, the states that the backward pass needs."""
        states = [None, self.last, self.saved if save else None, None]
        self.kernel.call("forward", [self.x, self.y, *states, self.beta], self.shape, (1,))

    def both(self) -> None:
        """Forward and backward."""
        self.forward(save=True)
        states = [None, self.saved, None, None, None]
        self.kernel.call("backward", [self.x, self.d_y, self.d_x, *states, self.beta], self.shape, (1,))

    def copy(self) -> None:
        """What the bound is made of."""
        self.y.copy_(self.x)

    def eager(self) -> Tensor:
        """The outputs of the step loop in torch."""
        mem, spikes = torch.zeros(self.x.shape[1:]), []
        for x in self.x:
            y, mem = step({"x": x, "mem": mem, "beta": self.beta})
            spikes.append(y)
        return torch.stack(spikes)


def one(steps: int, batch: int, neurons: int) -> dict[str, float]:
    """Ratios to the bound of one size, and the time of a layer as a user calls it over that of the bare kernel."""
    given = Given(steps, batch, neurons)
    expected = given.eager()
    given.forward()
    require_same(given.y, expected, f"T={steps} B={batch} N={neurons}")
    layer, x = LIF(neurons), given.x
    leaf = x.clone().requires_grad_()

    def user_forward() -> None:
        layer.reset_states()
        with tt.backend("cpu"), torch.no_grad():
            layer.unroll(x)

    def user_both() -> None:
        layer.reset_states()
        with tt.backend("cpu"):
            y = layer.unroll(leaf)
        torch.autograd.grad(y, leaf, given.d_y)

    evict, small, little = Evict(), LIF(4), torch.zeros(2, 1, 4, requires_grad=True)

    def before() -> None:
        evict()
        small.reset_states()
        with tt.backend("cpu"):
            small.unroll(little).sum().backward()

    called = {"forward": user_forward, "forward+backward": user_both}
    quiet()
    runs = {"copy": given.copy, "forward": given.forward, "forward+backward": given.both}
    times = medians({**runs, **{f"{name}, as called": run for name, run in called.items()}}, before=before)
    cold = medians(called, before=evict)
    found = {"MB": x.numel() * 4 / 1e6, "copy GB/s": x.numel() * 8 / times["copy"] / 1e9}
    for name, passes in PASSES.items():
        found[name] = passes * times["copy"] / times[name]
        found[f"{name}, as called"] = times[f"{name}, as called"] / times[name]
        found[f"{name}, all cold"] = cold[name] / times[name]
    return found


def main() -> dict[str, Any]:
    """Every size; the largest of them are out of cache."""
    results = {f"T={t} B={b} N={n}": one(t, b, n) for t, b, n in SWEEP}
    header = ["size", *next(iter(results.values()))]
    rows = [[size, *found.values()] for size, found in results.items()]
    print(table("LIF on the CPU: share of the copy bound; time as called over the bare kernel's", header, rows))
    return results
