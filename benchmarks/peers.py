"""Neuron layers of the frameworks, each against its own fused twin: the same dynamics, forward and backward.

Then a whole snnTorch network's training step (convolution, pooling, linear layers) against the same network converted
to native layers and unrolled, beside the time that its matrix products and convolutions alone take.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tracetorch as tt
from benchmarks.measure import medians, quiet, require_close, require_same, table

STEPS, BATCH, NEURONS = 100, 64, 512
Sequence = Callable[[Tensor], Tensor]


def _snntorch() -> tuple[Sequence, Sequence, int]:
    import snntorch

    def loop(layer: Any, xs: Tensor) -> Tensor:
        mem, spikes = layer.reset_mem(), []
        for x in xs:
            y, mem = layer(x, mem)
            spikes.append(y)
        return torch.stack(spikes)

    layer = snntorch.Leaky(beta=0.9)
    fused: Any = tt.fuse(layer)

    def unrolled(xs: Tensor) -> Tensor:
        fused.reset_mem()
        return fused.unroll(xs, time_dim=0)[0]

    return lambda xs: loop(layer, xs), unrolled, 0


def _sinabs() -> tuple[Sequence, Sequence, int]:
    import sinabs.layers

    def run(layer: Any) -> Sequence:
        def sequence(xs: Tensor) -> Tensor:
            layer.reset_states()
            return layer(xs)

        return sequence

    layer = sinabs.layers.LIF(tau_mem=20.0, norm_input=False)
    return run(layer), run(tt.fuse(layer)), 1


def _spikingjelly() -> tuple[Sequence, Sequence, int]:
    from spikingjelly.activation_based import functional, neuron

    def run(layer: Any) -> Sequence:
        def sequence(xs: Tensor) -> Tensor:
            functional.reset_net(layer)
            return layer(xs)

        return sequence

    layer = neuron.LIFNode(tau=2.0, step_mode="m")
    return run(layer), run(tt.fuse(layer)), 0


def _norse() -> tuple[Sequence, Sequence, int]:
    import norse.torch as norse

    layer = norse.Lift(norse.LIFBoxCell())
    fused = tt.fuse(layer)
    return lambda xs: layer(xs)[0], lambda xs: fused(xs)[0], 0


PEERS = {
    "snntorch.Leaky": _snntorch,
    "sinabs.LIF": _sinabs,
    "spikingjelly.LIFNode": _spikingjelly,
    "norse.LIFBox": _norse,
}
GAIN = {"norse.LIFBox": 6.0}  # of the input: its step takes a tenth of it
REACH = {"spikingjelly.LIFNode": 12.0}


def neuron_layers() -> dict[str, Any]:
    """Times of one forward and backward, and how many times faster the twin is."""
    results = {}
    for name, make in PEERS.items():
        theirs, ours, time_dim = make()
        x = torch.randn(STEPS, BATCH, NEURONS).mul_(0.8).add_(0.2).mul_(GAIN.get(name, 1.0))
        x = x.movedim(0, time_dim).contiguous().requires_grad_()
        grad = torch.randn_like(x)
        expected, found = theirs(x), ours(x)
        require_same(found, expected, name)
        if not float(expected.detach().sum()) > 0.01 * expected.numel():
            raise AssertionError(f"{name}: hardly a spike, which shows nothing")
        error = require_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)), name)

        def train(run: Sequence, x: Tensor = x, grad: Tensor = grad) -> None:
            torch.autograd.grad(run(x), x, grad)

        quiet()
        runs = {"theirs": lambda theirs=theirs: train(theirs), "ours": lambda ours=ours: train(ours)}
        times = medians(runs, repeat=9, twice=True)
        results[name] = {
            "theirs, ms": 1e3 * times["theirs"],
            "fused, ms": 1e3 * times["ours"],
            "ratio": times["theirs"] / times["ours"],
            "to reach": REACH.get(name, 40.0),
            "gradient error": error,
        }
    return results


def network() -> dict[str, Any]:
    """One training step of a network, the source in snnTorch and its conversion to native."""
    import snntorch

    from tracetorch import adapters

    torch.manual_seed(0)
    options = {"beta": 0.9, "init_hidden": True}
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), snntorch.Leaky(**options), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 128), snntorch.Leaky(**options), nn.Linear(128, 10), snntorch.Leaky(**options),
    )  # fmt: skip
    xs = torch.rand(50, 32, 1, 8, 8) * 2
    labels = torch.randint(0, 10, (32,))
    result = adapters.convert(net, to="tracetorch", sample=xs[:, :4], time_dim=0)
    model = result.model

    def source() -> Tensor:
        from snntorch import utils

        utils.reset(net)
        return torch.stack([net(x) for x in xs])

    def native(fold: str) -> Tensor:
        tt.reset_states(model)
        return tt.unroll(model, xs, time_dim=0, fold=fold)

    def products() -> Tensor:
        """The convolution, the pooling and the linear layers alone, once over all steps."""
        y = net[3](net[2](net[0](xs.flatten(0, 1))))
        return net[6](torch.relu(net[4](y))).unflatten(0, (50, 32))

    def train(run: Callable[[], Tensor], module: nn.Module) -> None:
        module.zero_grad()
        nn.functional.cross_entropy(run().sum(0), labels).backward()

    require_same(native("exact"), source(), "network")
    quiet()
    runs = {
        "snnTorch": lambda: train(source, net),
        "native, exact": lambda: train(lambda: native("exact"), model),
        "native, fast": lambda: train(lambda: native("fast"), model),
        "products alone": lambda: train(products, net),
    }
    times = medians(runs, repeat=7)
    return {name: {"ms": 1e3 * t, "snnTorch's over it": times["snnTorch"] / t} for name, t in times.items()}


def main() -> dict[str, Any]:
    """Both."""
    layers = neuron_layers()
    header = ["layer", *next(iter(layers.values()))]
    print(table(f"Neuron layers, forward and backward, T={STEPS} B={BATCH} N={NEURONS}", header,
                [[name, *row.values()] for name, row in layers.items()]))  # fmt: skip
    net = network()
    print(table("A network's training step, T=50 B=32", ("what", "ms", "snnTorch's over it"),
                [[name, *row.values()] for name, row in net.items()]))  # fmt: skip
    return {"neuron layers": layers, "network": net, "python": sys.version.split()[0]}
