"""Random networks, converted, judged, run freely against their source, trained, and judged again. No silent difference.

`pytest` takes 40 networks a direction; `pytest -m sweep` all 200, each trained with copied and with shared weights. The
seed in a failing test's name builds the network again: `random_snntorch(seed)`, `random_sinabs(seed)`.
"""

import collections
import random
from dataclasses import dataclass, field

import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from snntorch import surrogate
from torch import nn

from tracetorch import adapters

SHORT, FULL = range(40), range(200)
STEPS = 20  # of the optimizer


@dataclass
class Case:
    """A network, its input, and the refusals that its layers must meet: {target: fields}."""

    net: nn.Module
    x: torch.Tensor
    steps: int
    emits: bool = False
    refused: dict = field(default_factory=lambda: {"tracetorch": set(), "sinabs": set(), "snntorch": set()})


def uniform(rng, shape, low, high):
    return torch.tensor([rng.uniform(low, high) for _ in range(torch.Size(shape).numel())]).reshape(shape)


def some(rng, channels, image, low, high):
    """A value for all neurons, or one for each (of an image: for each channel)."""
    if rng.random() < 0.4:
        return torch.tensor(rng.uniform(low, high))
    return uniform(rng, (channels, 1, 1) if image else (channels,), low, high)


def plan(rng):
    """Layers by name, 1 to 4 of them neurons: Linear, perhaps after convolutions with pooling; and the input shape."""
    neurons = rng.randint(1, 4)
    images = rng.randint(0, neurons) if rng.random() < 0.5 else 0
    layers, shape = [], [rng.randint(1, 3), 8, 8] if images else [rng.randint(1, 12)]
    given = list(shape)
    for k in range(neurons):
        if k < images:
            out = rng.randint(1, 4)
            layers.append(("conv", (shape[0], out, 3), {"padding": 1, "bias": rng.random() < 0.5}))
            shape[0] = out
            pool = rng.choice(["", "max", "average"]) if shape[1] > 2 else ""
            first = rng.random() < 0.5
            layers += [(pool, (2,), {})] if pool and first else []
            shape[1:] = [n // 2 for n in shape[1:]] if pool and first else shape[1:]
            layers.append(("neuron", out, True))
            layers += [(pool, (2,), {})] if pool and not first else []
            shape[1:] = [n // 2 for n in shape[1:]] if pool and not first else shape[1:]
        else:
            if len(shape) == 3:
                layers.append(("flatten", (), {}))
                shape = [shape[0] * shape[1] * shape[2]]
            out = rng.randint(1, 16)
            layers.append(("linear", (shape[0], out), {"bias": rng.random() < 0.7}))
            shape = [out]
            layers.append(("neuron", out, False))
    return layers, given


STATELESS = {"conv": nn.Conv2d, "max": nn.MaxPool2d, "average": nn.AvgPool2d, "linear": nn.Linear}


def excite(net, y, run, reach):
    """Scale the weights in order, so that a tenth of what each neuron layer receives is above its `reach`."""
    modules = list(net)
    with torch.no_grad():
        for k, module in enumerate(modules):
            inner = getattr(module, "module", module)
            if isinstance(inner, (nn.Linear, nn.Conv2d)):
                high = float(run(module, y).quantile(0.9))
                if high <= 0:
                    high = float((-run(module, y)).quantile(0.9))
                    inner.weight.neg_()
                wanted = reach(next(m for m in modules[k:] if hasattr(m, "spike_threshold") or hasattr(m, "threshold")))
                for parameter in inner.parameters():
                    parameter.mul_(wanted / max(high, 0.01))
            y = run(module, y)


def inputs(rng, given):
    steps, batch = rng.choice([1, 2, 3, rng.randint(4, 100), rng.randint(20, 100), 63, 100]), rng.randint(1, 4)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if rng.random() < 0.3:  # spikes, whose sums often tie
        return (torch.rand(steps, batch, *given, generator=generator) < 0.4).float()
    return torch.randn(steps, batch, *given, generator=generator) + 0.3


def random_leaky(rng, case, channels, image, last):
    choices = [("subtract", True)] * 4 + [("zero", True), ("zero", False), ("none", True), ("none", False)] * 2
    reset, delay = rng.choice([*choices, ("subtract", False)])
    factor = 0.5 if rng.random() < 0.03 else 1.0
    case.emits = last and rng.random() < 0.3
    if (reset, delay) == ("subtract", False):
        case.refused["sinabs"].add("reset_timing")
    if factor != 1:
        case.refused["sinabs"].add("spike_scale")
    if case.emits and (reset, delay) == ("zero", True):
        case.refused["sinabs"].add("output")
    grads = [None, surrogate.atan(alpha=1.0), surrogate.fast_sigmoid(slope=5), surrogate.spike_rate_escape()]
    if (reset, delay) != ("zero", False):  # there, the gradients of these two overflow float32 in snnTorch itself
        grads += [surrogate.straight_through_estimator(), surrogate.triangular()]
    return snn.Leaky(
        some(rng, channels, image, 0.3, 0.95),
        threshold=some(rng, channels, image, 0.5, 1.5),
        spike_grad=rng.choice(grads),
        init_hidden=True,
        output=case.emits,
        learn_beta=rng.random() < 0.5,
        learn_threshold=rng.random() < 0.4,
        reset_mechanism=reset,
        reset_delay=delay,
        graded_spikes_factor=factor,
    )


def random_snntorch(seed):
    """An snnTorch network over [T, B, ...]."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers, given = plan(rng)
    x = inputs(rng, given)
    case = Case(nn.Sequential(), x, len(x))
    for k, (kind, size, options) in enumerate(layers):
        if kind == "neuron":
            case.net.append(random_leaky(rng, case, size, options, k == len(layers) - 1))
        else:
            case.net.append(nn.Flatten() if kind == "flatten" else STATELESS[kind](*size, **options))

    def run(module, xs):
        results = [module(x) for x in xs]
        return torch.stack([r[0] if isinstance(r, tuple) else r for r in results])

    excite(case.net, x, run, lambda neuron: 1.0)
    forget(case.net)
    return case


def random_lif(rng, case, channels, image):
    spike = rng.choice([activation.SingleSpike, activation.SingleSpike, activation.MultiSpike, activation.MaxSpike(2)])
    amount = some(rng, channels, image, 0.4, 1.2)
    reset = rng.choice(
        [activation.MembraneSubtract()] * 3
        + [activation.MembraneSubtract(rng.choice([0.7, amount])), activation.MembraneReset()]
        + [activation.MembraneReset(), activation.MembraneReset(0.1)]
    )
    gradients = [activation.SingleExponential(), activation.SingleExponential(0.8), activation.Gaussian()]
    gradients += [activation.Heaviside(), activation.MultiGaussian(), activation.PeriodicExponential()]
    tau_syn = some(rng, channels, image, 1.5, 6) if rng.random() < 0.12 else None
    layer = sl.LIF(
        tau_mem=some(rng, channels, image, 1.5, 15),
        tau_syn=tau_syn,
        spike_threshold=some(rng, channels, image, 0.5, 1.5),
        spike_fn=spike,
        reset_fn=reset,
        surrogate_grad_fn=rng.choice(gradients),
        min_v_mem=rng.choice([None, None, -0.5]),
        train_alphas=rng.random() < 0.4,
        norm_input=rng.random() < 0.5,
    )
    if rng.random() < 0.2:
        getattr(layer, "alpha_mem" if layer.train_alphas else "tau_mem").requires_grad_(False)
    layer.spike_threshold.requires_grad_(rng.random() < 0.2)
    return layer


def random_sinabs(seed):
    """A sinabs network; its input is [B, T, ...]."""
    rng = random.Random(1000 + seed)
    torch.manual_seed(seed)
    layers, given = plan(rng)
    x = inputs(rng, given).transpose(0, 1).contiguous()
    case = Case(nn.Sequential(), x, x.shape[1])
    for kind, size, options in layers:
        if kind == "neuron":
            case.net.append(random_lif(rng, case, size, options))
        elif kind in ("flatten", "linear"):
            case.net.append(nn.Flatten(2) if kind == "flatten" else nn.Linear(*size, **options))
        else:
            case.net.append(sl.Repeat(STATELESS[kind](*size, **options)))

    def reach(neuron):
        return 1.0 / float((1 - neuron.alpha_mem_calculated).mean()) if neuron.norm_input else 1.0

    excite(case.net, x, lambda module, xs: module(xs), reach)
    forget(case.net)
    return case


# ---- running each as its users do ------------------------------------------------------------------------------------


def forget(model):
    """Every neuron back to its start, in the manner of its framework."""
    for module in model.modules():
        if isinstance(module, snn.SpikingNeuron):
            for name in ("mem", "syn"):
                if hasattr(module, name):
                    setattr(module, name, torch.zeros(0))
        elif isinstance(module, sl.StatefulLayer):
            for name, buffer in list(module.named_buffers()):
                module.register_buffer(name, torch.zeros(0, dtype=buffer.dtype))
        elif hasattr(module, "reset_states"):
            module.reset_states()


def call(framework, model, xs):
    """The outputs [T, B, ...] of a whole sequence [T, B, ...], and the last layer's membranes where it returns them."""
    forget(model)
    if framework == "sinabs":
        return model(xs.transpose(0, 1)).transpose(0, 1), None
    results = [model(x) for x in xs]
    if isinstance(results[0], tuple):
        return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])
    return torch.stack(results), None


def train(framework, model, xs):
    """Some steps of Adam on the mean activity, in the framework's own manner of calling. Returns whether it learned."""
    xs = xs[:24]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs, membranes = call(framework, model, xs)
        loss = (outputs.mean((0, 1)) - 0.5).square().sum()
        loss = loss if membranes is None else loss + 0.01 * membranes.square().mean()
        if not loss.requires_grad:
            return False
        loss.backward()
        optimizer.step()
    forget(model)
    return any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def same_bits(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return a.detach().contiguous().numpy().tobytes() == b.detach().contiguous().numpy().tobytes()


# ---- the totals ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def totals(request):
    """Counts by direction, printed at the end."""
    counts = collections.defaultdict(collections.Counter)
    yield counts
    write = request.config.get_terminal_writer().line
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for direction, count in sorted(counts.items()):
            write(f"\n{direction}")
            for name, n in sorted(count.items()):
                write(f"    {n:>9} {name}")


# Why a gradient may differ: snnTorch's threshold learns through the spikes too, sinabs's does not; and a reset that
# keeps its gradient can make it overflow float32, in the source as in the target, or grow until float32 tells nothing.
NAMED = (
    "threshold: its gradient also comes through the spikes",
    "the source's own gradient overflows on this input",
    "which shows nothing",
)


def check(agreement, count, what):
    """A verdict that leaves nothing unexplained; counted."""
    assert agreement.ok, f"{what}\n{agreement}"
    assert agreement.unexplained_mismatches == 0
    for row in agreement.rows:
        assert row.forward in ("exact", "rounding"), f"{what}\n{agreement}"
        assert row.gradient in ("exact", "rounding", "reparametrised", "differs"), f"{what}\n{agreement}"
        if row.gradient == "differs":
            assert any(reason in row.reason for reason in NAMED), f"{what}\n{agreement}"
        if row.neuron:
            count[f"neuron layers {row.forward}, gradient {row.gradient}, {what}"] += 1
            assert row.slots > 0
        count[f"spikes, {what}"] += int(row.spikes)
    count[f"spike slots, {what}"] += agreement.spike_slots
    count[f"mismatches (all explained), {what}"] += agreement.spike_mismatches


def convert(case, to, count, **options):
    """The conversion, or None where it was refused, and rightly so."""
    time_dim = 0 if any(isinstance(layer, snn.Leaky) for layer in case.net) else None
    try:
        result = adapters.convert(case.net, to=to, sample=case.x, time_dim=time_dim, **options)
    except adapters.ConversionError as refusal:
        if refusal.field not in case.refused[to] or not (refusal.layer and refusal.remedy):
            raise
        count[f"refused: {refusal.field}={refusal.value!r}"] += 1
        return None
    assert not case.refused[to], f"must be refused for {case.refused[to]}"
    return result


def check_free_run(case, result, source, to, count):
    """Without our verdicts: the target's own run against the source's own."""
    xs = case.x if source == "snntorch" else case.x.transpose(0, 1)
    with torch.no_grad():
        theirs, membranes = call(source, case.net, xs)
        forget(case.net)
        result.reset()
        given = result.run(case.x)
        direct, _ = call(to, result.model, xs)
    ours, our_membranes = given if case.emits else (given, None)
    ours = ours if source == "snntorch" else ours.transpose(0, 1)
    assert same_bits(direct, ours), "run() is not the model as its users call it"
    differ = int((ours != theirs).sum())
    count["free run: outputs that differ"] += differ
    count["free run: outputs"] += theirs.numel()
    if all(row.forward == "exact" for row in result.report):
        assert same_bits(ours + 0.0, theirs + 0.0)
    if to == "tracetorch" and source == "snntorch":
        assert same_bits(ours, theirs)
        assert membranes is None or same_bits(our_membranes, membranes)
    if membranes is not None:
        alike = (ours != theirs).cumsum(0) == 0
        assert (our_membranes - membranes)[alike].abs().max() <= 1e-4 * membranes.abs().max()
    assert differ <= 0.02 * theirs.numel() + 2
    return int((theirs != 0).sum())


def exercise(source, to, seed, totals, shares):
    """One network to one target: convert, judge, run freely, judge another input, train, judge again."""
    torch.set_num_threads(1)
    count = totals[f"{source} -> {to}"]
    for share in shares:
        case = (random_snntorch if source == "snntorch" else random_sinabs)(seed)
        snn.SpikingNeuron.init()  # it collects every layer ever made
        first = share == shares[0]
        count["networks"] += first
        result = convert(case, to, count if first else collections.Counter(), share_weights=share)
        if result is None:
            return
        if first:
            check(result.agreement, count, "converted")
            fired = sum(row.spikes for row in result.report)
            assert fired > 0 or case.steps < 4, "no spike in any layer: it proves nothing"
            check_free_run(case, result, source, to, count)
            if source == "snntorch" and to == "tracetorch":
                assert {row.forward for row in result.report} == {"exact"}
            other = case.x.flip(0 if source == "snntorch" else 1) * 1.1
            check(result.verify(other), count, "other input")
        xs = case.x if source == "snntorch" else case.x.transpose(0, 1)
        before = [p.detach().clone() for p in case.net.parameters()]
        learned = train(to, result.model, xs)
        moved = any(not torch.equal(a, b) for a, b in zip(before, case.net.parameters(), strict=True))
        assert moved == (learned and share)
        count[f"networks trained, {'shared' if share else 'copied'} weights"] += learned
        what = f"after {STEPS} steps"
        if share:
            check(result.verify(case.x), count, what)
        else:
            if learned:
                assert not result.verify(case.x, grad=False).ok, "the target changed, and the verdict did not"
            check(result.verify(case.x, carry_back=True), count, what)
            assert all(torch.equal(a, b) for a, b in zip(before, case.net.parameters(), strict=True))


DIRECTIONS = [("snntorch", "tracetorch"), ("snntorch", "sinabs"), ("sinabs", "tracetorch"), ("sinabs", "snntorch")]


def can_share(source, to):
    """sinabs learns tau, which snnTorch has not: weights are shared where every raw form is the target's own."""
    return (source, to) != ("sinabs", "snntorch")


@pytest.mark.parametrize("seed", SHORT)
@pytest.mark.parametrize(("source", "to"), DIRECTIONS)
def test_a_random_network_keeps_its_meaning(source, to, seed, totals):
    exercise(source, to, seed, totals, [seed % 2 == 0 and can_share(source, to)])


@pytest.mark.sweep
@pytest.mark.parametrize("seed", FULL)
@pytest.mark.parametrize(("source", "to"), DIRECTIONS)
def test_sweep_a_random_network_keeps_its_meaning(source, to, seed, totals):
    exercise(source, to, seed, totals, [False, True] if can_share(source, to) else [False])


def test_the_random_networks_had_events(totals):
    """Runs last: what the tests above saw was no silence."""
    for direction, count in totals.items():
        assert count["spikes, converted"] > 100 * count["networks"] / 4, direction
        assert count["spikes, after 20 steps"] > 0
