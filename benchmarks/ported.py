"""Whole networks with a forward of their own, ported to native, against their sources: forward and training step.

The source is a snnTorch class as its users write it: a loop over time, membranes by hand, spikes and membranes out; and
a sinabs network with squeezed layers. Both must first give the same bits (sinabs: as sums in another order allow).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import medians, quiet, require_close, require_same, table

STEPS, BATCH = 25, 128


def _snntorch() -> tuple[nn.Module, Tensor, Callable[[nn.Module], None]]:
    import snntorch

    class Net(nn.Module):
        """Fully connected, a static image at every step."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(784, 1000), snntorch.Leaky(beta=0.95)
            self.fc2, self.lif2 = nn.Linear(1000, 10), snntorch.Leaky(beta=0.95)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """x: [B, 784] -> spikes and membranes [T, B, 10]."""
            mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
            spikes, membranes = [], []
            for _ in range(STEPS):
                spk1, mem1 = self.lif1(self.fc1(x), mem1)
                spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
                spikes.append(spk2)
                membranes.append(mem2)
            return torch.stack(spikes), torch.stack(membranes)

    return Net(), torch.rand(BATCH, 784), lambda net: None


def _sinabs() -> tuple[nn.Module, Tensor, Callable[[nn.Module], None]]:
    import sinabs
    import sinabs.layers as sl

    net = nn.Sequential(
        nn.Conv2d(1, 16, 5, bias=False), sl.IAFSqueeze(batch_size=16, min_v_mem=-1.0), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 5, bias=False), sl.IAFSqueeze(batch_size=16, min_v_mem=-1.0), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(512, 10, bias=False), sl.IAFSqueeze(batch_size=16, min_v_mem=-1.0),
    )  # fmt: skip
    return net, torch.rand(16 * STEPS, 1, 28, 28) * 4, lambda net: sinabs.reset_states(net)


def _first(value: Any) -> Tensor:
    found: Tensor = value[-1] if isinstance(value, tuple) else value
    return found


def _measure(name: str, make: Callable[[], Any]) -> dict[str, dict[str, float]]:
    from tracetorch import adapters

    torch.manual_seed(0)
    net, x, forget = make()
    sample = x[: 16 * 4] if name == "sinabs" else x[:4]
    result = adapters.convert(net, to="tracetorch", sample=sample)
    native: Any = result.model

    def source() -> Tensor:
        forget(net)
        return _first(net(x))

    def ported(fold: str) -> Tensor:
        native.fold = fold
        native.reset_states()
        return _first(native(x))

    if name == "sinabs":
        require_close(ported("exact").detach(), source().detach(), name)
    else:
        require_same(ported("exact"), source(), name)

    def train(run: Callable[[], Tensor], module: nn.Module) -> None:
        module.zero_grad()
        run().square().mean().backward()

    def forward(run: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            run()

    quiet()
    runs = {
        f"{name}": lambda: forward(source),
        "native, exact": lambda: forward(lambda: ported("exact")),
        "native, fast": lambda: forward(lambda: ported("fast")),
    }
    trained = {
        f"{name}": lambda: train(source, net),
        "native, exact": lambda: train(lambda: ported("exact"), native),
        "native, fast": lambda: train(lambda: ported("fast"), native),
    }
    found = {}
    for what, these in (("forward", runs), ("training step", trained)):
        times = medians(these, repeat=5, warm=1)
        found |= {f"{key}, {what}": {"ms": 1e3 * t, "source's over it": times[name] / t} for key, t in times.items()}
    return found


def main() -> dict[str, Any]:
    """Both networks."""
    results = {}
    for name, make in (("snnTorch", _snntorch), ("sinabs", _sinabs)):
        rows = results[name] = _measure(name, make)
        title = f"A {name} network with a forward of its own, ported to native, T={STEPS}"
        print(table(title, ("what", "ms", "source's over it"), [[key, *row.values()] for key, row in rows.items()]))
    return results
