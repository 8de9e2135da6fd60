"""Each of the 32 native layers against its own ceiling, and what it holds for the backward pass.

A layer's ceiling is the larger of two times: to move what must move, at the bandwidth of a copy, and to compute, as
measured on sequences that stay in the caches: the difference of a longer and a shorter one, so that no call's own
overhead is in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tracetorch as tt
from benchmarks.kernels import PASSES
from benchmarks.measure import medians, quiet, require_close, table

STEPS, LARGE = 100, (16, 2048)
FEW, MORE, SMALL = 32, 160, (1, 1024)  # the longer one's input and output: 1.3 MB, in the L2 of two cores


def names() -> list[str]:
    """The layers of `tt.snn` that are made of parts."""
    found = [name for name in dir(tt.snn) if isinstance(getattr(tt.snn, name), type)]
    return sorted((n for n in found if "parts" in vars(getattr(tt.snn, n))), key=lambda n: (len(n), n))


def held(layer: Any, x: Tensor) -> float:
    """Bytes that autograd holds between forward and backward, over those of the input."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.data_ptr()] = tensor.nbytes
        return tensor

    layer.reset_states()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.unroll(x)
    return sum(seen.values()) / x.nbytes


def times(layer: Any, steps: int, batch: int, neurons: int) -> tuple[dict[str, float], int]:
    """Seconds of a copy, of forward, and of forward and backward; elements."""
    x = torch.randn(steps, batch, neurons)
    leaf, grad, into = x.clone().requires_grad_(), torch.randn_like(x), torch.empty_like(x)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def forward() -> None:
        layer.reset_states()
        with torch.no_grad():
            layer.unroll(x)

    def both() -> None:
        layer.reset_states()
        torch.autograd.grad(layer.unroll(leaf), [leaf, *parameters], grad)

    quiet()
    runs = {"copy": lambda: into.copy_(x), "forward": forward, "forward+backward": both}
    return medians(runs, repeat=15), x.numel()


def check(layer: Any, neurons: int) -> None:
    """Kernel against the step loop, before anything is timed."""
    x = torch.randn(20, 2, neurons)
    layer.reset_states()
    found = layer.unroll(x).detach()
    layer.reset_states()
    with tt.backend("eager"):
        require_close(found, layer.unroll(x).detach(), type(layer).__name__)


def one(name: str) -> dict[str, float]:
    """Shares of the ceiling, and what is held."""
    make = getattr(tt.snn, name)
    options = {"quant_fn": tt.functional.round_ste()} if make.parts.output.fires else {}
    small, large = (make(n, **options) for n in (SMALL[1], LARGE[1]))
    check(small, SMALL[1])
    few, few_elements = times(small, FEW, *SMALL)
    more, more_elements = times(small, MORE, *SMALL)
    outside, many = times(large, STEPS, *LARGE)
    found = {}
    for way, passes in PASSES.items():
        compute = (more[way] - few[way]) / (more_elements - few_elements) * many
        ceiling = max(passes * outside["copy"], compute)
        found[f"{way}, ns an element"] = outside[way] / many * 1e9
        found[f"{way}, share"] = ceiling / outside[way]
    found["held"] = held(large, torch.randn(STEPS, *LARGE, requires_grad=True))
    return found


def main() -> dict[str, Any]:
    """All of them."""
    results = {name: one(name) for name in names()}
    header = ["layer", *next(iter(results.values()))]
    rows = [[name, *found.values()] for name, found in results.items()]
    print(table(f"Native layers, T={STEPS} B={LARGE[0]} N={LARGE[1]}; held: in inputs", header, rows))
    return results
