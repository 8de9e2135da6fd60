"""A native network of three linear layers over 100 steps: `tt.unroll` beside its own step loop and snnTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tracetorch as tt
from benchmarks.measure import medians, quiet, require_same, table

STEPS, BATCH, WIDTHS = 100, 32, (128, 256, 256, 10)


def native() -> tt.Sequential:
    """Two layers of hard spikes, a read-out of membranes."""
    a, b, c, d = WIDTHS
    quant = {"quant_fn": tt.functional.round_ste()}
    return tt.Sequential(
        *(nn.Linear(a, b), tt.snn.LIB(b, **quant), nn.Linear(b, c), tt.snn.LIB(c, **quant)),
        *(nn.Linear(c, d), tt.snn.LI(d)),
    )


def of_snntorch(net: tt.Sequential) -> Callable[[Tensor], Tensor]:
    """The same network in snnTorch, with its loop: same weights, decays, reset and surrogate."""
    import snntorch
    from snntorch import surrogate

    hard: dict[str, Any] = {"reset_delay": False, "spike_grad": surrogate.sigmoid(slope=4), "learn_beta": True}
    linear = nn.ModuleList([nn.Linear(m.in_features, m.out_features) for m in net if isinstance(m, nn.Linear)])
    linear.load_state_dict({f"{k}.{name}": t for k in range(3) for name, t in net[2 * k].state_dict().items()})
    betas = [net[2 * k + 1].beta.detach().clone() for k in range(3)]
    thresholds = [net[2 * k + 1].threshold.detach().clone() for k in range(2)]
    first, second = (snntorch.Leaky(betas[k], threshold=thresholds[k], **hard) for k in range(2))
    last = snntorch.Leaky(betas[2], reset_mechanism="none", learn_beta=True)

    def loop(xs: Tensor) -> Tensor:
        mems, outputs = [first.reset_mem(), second.reset_mem(), last.reset_mem()], []
        for x in xs:
            s, mems[0] = first(linear[0](x), mems[0])
            s, mems[1] = second(linear[1](s), mems[1])
            _, mems[2] = last(linear[2](s), mems[2])
            outputs.append(mems[2])
        return torch.stack(outputs)

    return loop


def main() -> dict[str, Any]:
    """Milliseconds of forward and backward; the loop and `fold="exact"` must agree in every bit, the others nearly."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, xs = native(), torch.rand(STEPS, BATCH, WIDTHS[0])

    def fold(how: str) -> Callable[[Tensor], Tensor]:
        def run(xs: Tensor) -> Tensor:
            net.reset_states()
            return torch.stack([net(x) for x in xs]) if how == "loop" else tt.unroll(net, xs, fold=how)

        return run

    ways = {"own step loop": fold("loop"), 'unroll, "exact"': fold("exact"), 'unroll, "fast"': fold("fast")}
    ways["snnTorch's loop"] = of_snntorch(net)
    with torch.no_grad():
        outputs = {name: run(xs) for name, run in ways.items()}
        spikes = net[1].unroll(net[0](xs))
    if not 0.005 < float(spikes.mean()) < 0.5:
        raise AssertionError(f"{float(spikes.mean()):.3g} spikes a step show nothing")
    require_same(outputs['unroll, "exact"'], outputs["own step loop"], "exact")
    # A rounding, or a membrane above 2 theta, may move a spike, and with it the rest of that sample.
    for name in ('unroll, "fast"', "snnTorch's loop"):
        apart = (outputs[name] - outputs["own step loop"]).abs() > 1e-4
        samples = int(apart.any(0).any(-1).sum())
        if samples > BATCH // 10:
            raise AssertionError(f"{name}: {samples} of {BATCH} samples differ from the step loop's")
    quiet()
    times = medians({name: (lambda run=run: run(xs).sum().backward()) for name, run in ways.items()}, repeat=9)
    best = times['unroll, "fast"']
    rows = [(name, 1e3 * seconds, seconds / best) for name, seconds in times.items()]
    print(table(f"A network {WIDTHS}, T={STEPS}, B={BATCH}, forward+backward", ("way", "ms", "of fast"), rows))
    return {name: 1e3 * seconds for name, seconds in times.items()}
