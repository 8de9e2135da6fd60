"""The judge of gradients: what it must see whatever the conditioning, what rounding explains, what shows nothing."""

import functools

import numpy as np
import pytest
import snntorch as snn
import torch
from snntorch import surrogate as stock
from torch import nn

import tracetorch as tt
from tests import layer_grid
from tracetorch import adapters, oracle
from tracetorch.adapters.gradients import of_neuron
from tracetorch.adapters.networks.chain import read
from tracetorch.adapters.observing import Observed, run_alone
from tracetorch.functional.surrogates import SURROGATES, Surrogate

F32 = np.float32
TOLERANCE = 1e-4

# (reset, its timing, whose reset has a gradient): every way of `oracle.lif._through_reset` but the detached ones.
RESETS = {
    "subtract": {"reset": "subtract", "reset_timing": "same_step"},
    "subtract later": {"reset": "subtract", "reset_timing": "next_step_after_decay"},
    "subtract the rest": {"reset": "subtract", "reset_timing": "same_step_residual"},
    "to a value": {"reset": "value", "reset_timing": "same_step"},
    "to 0, the rest": {"reset": "value", "reset_timing": "same_step_residual"},
}


def parameter(number, learnable=True, raw="value"):
    return tt.Parameter(np.asarray(number, F32), learnable, raw)


def spec_of(reset, surrogate, attached=True, **changes):
    numbers = {"mem_decay": parameter(0.9), "threshold": parameter(0.6), "spike_scale": parameter(0.8)}
    if RESETS[reset]["reset"] == "value":
        numbers["reset_value"] = parameter(0.0 if "rest" in reset else 0.1)
    way = "attached" if attached else "detached"
    return tt.NeuronSpec(
        "tracetorch", **RESETS[reset], reset_gradient=way, surrogate=surrogate, parameters=numbers, **changes
    )


def played(spec, steps=10, size=1.0, seed=0):
    """A float32 recording that is the oracle's own, and a gradient of its outputs."""
    generator = np.random.default_rng(seed)
    x = (generator.uniform(-0.25, 1, (steps, 3, 4)) * size).astype(F32)
    run, _, _ = oracle.simulate(spec, x.astype(np.float64))
    assert (run.outputs > 0).sum() > steps
    states = {name: state.astype(F32) for name, state in run.states.items()}
    return oracle.Recording(x, run.outputs.astype(F32), states, spec), generator.normal(size=x.shape).astype(F32)


def judged(spec, recording, weights, subject):
    """Every tensor of a subject's gradients, judged."""
    truth = oracle.gradients(spec, recording, weights)
    bounds = functools.cache(lambda: oracle.gradient_bounds(spec, recording, weights))
    found = {
        n: oracle.judge_gradient(subject[n].astype(F32), truth[n], TOLERANCE, lambda n=n: bounds()[n]) for n in truth
    }
    assert not bounds.cache_info().misses or {n: g.shape for n, g in bounds().items()} == {
        n: g.shape for n, g in truth.items()
    }
    return found


def faults(found):
    return [name for name, one in found.items() if not one.ok and not one.void]


def another(surrogate):
    """The same with another width; one without a width: another."""
    numbers = dict(surrogate.parameters)
    width = next((name for name, value in numbers.items() if value and name != "grad_scale"), None)
    if width is None:
        return Surrogate("atan")
    factor = 8 if surrogate.name == "heaviside_window" else 1.5  # few membranes lie between its edges
    return Surrogate(surrogate.name, tuple({**numbers, width: numbers[width] * factor}.items()))


@pytest.mark.parametrize("size", [1.0, 4.0])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("name", SURROGATES)
def test_a_wrong_reset_path_or_surrogate_is_seen(name, reset, size):
    """Also where gradients grow over time, as with large inputs and a surrogate that is large everywhere."""
    surrogate = Surrogate(
        name, {"sparse_fast_sigmoid": (("cutoff", 0.1),), "heaviside_window": (("window", 0.3),)}.get(name, ())
    )
    for attached in (True, False):
        spec = spec_of(reset, surrogate, attached)
        recording, weights = played(spec, size=size)
        right = oracle.gradients(spec, recording, weights)
        assert all(one.ok and not one.ill_conditioned for one in judged(spec, recording, weights, right).values())
        other_way = spec.replace(reset_gradient="detached" if attached else "attached")
        wrong = oracle.gradients(other_way, recording, weights)
        if name == "zero":
            assert all(np.array_equal(wrong[n], right[n]) for n in right)
        else:
            assert faults(judged(spec, recording, weights, wrong))
        wrong = oracle.gradients(spec.replace(surrogate=another(surrogate)), recording, weights)
        assert faults(judged(spec, recording, weights, wrong))


CASES = [
    (reset, name, attached)
    for reset in RESETS
    for name in ("atan", "straight_through", "single_exponential", "heaviside")
    for attached in (True, False)
]


def in_float32(spec, x, weights):
    """A neuron of plain torch operations in float32: recording and gradients."""
    values = {n: torch.tensor(p.value, requires_grad=True) for n, p in spec.parameters.items()}
    xs = torch.tensor(x, requires_grad=True)
    v, kept, spikes = torch.zeros(x.shape[1:]), [], []
    attached, later = spec.reset_gradient == "attached", spec.stores_before_reset
    theta, s = values["threshold"], torch.zeros(x.shape[1:])
    for x_t in xs:
        r = torch.zeros_like(v)
        if later:
            w = values["mem_decay"] * v + x_t - (s if attached else s.detach()) * theta
        else:
            if "residual" in spec.reset_timing:
                r = (v >= theta).float()
            w = values["mem_decay"] * (v * (1 - r) if spec.reset == "value" else v) + x_t
            w = w - r * theta if spec.reset == "subtract" else w
        s = spike(w, theta, spec.surrogate)
        back = s if attached else s.detach()
        if later:
            v = w
        elif spec.reset == "subtract":
            v = w - (back - r) * theta
        elif "residual" in spec.reset_timing:
            v = w - (back - r) * w
        else:
            v = w * (1 - back) + back * values["reset_value"]
        kept.append(v)
        spikes.append(s * values["spike_scale"])
    ys = torch.stack(spikes)
    found = torch.autograd.grad(ys, [xs, *values.values()], torch.tensor(weights), allow_unused=True)
    arrays = [
        np.zeros_like(x) if g is None else g.numpy()
        for g, x in zip(found, [x, *(p.value for p in spec.parameters.values())], strict=True)
    ]
    recording = oracle.Recording(x, ys.detach().numpy(), {"v_mem": torch.stack(kept).detach().numpy()}, spec)
    return recording, dict(zip(["x", *values], arrays, strict=True))


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, theta, surrogate):
        ctx.save_for_backward(w, theta)
        ctx.surrogate = surrogate
        return (w >= theta).float()

    @staticmethod
    def backward(ctx, grad):
        w, theta = ctx.saved_tensors
        slope = ctx.surrogate.vjp(grad, w - theta, theta)
        return slope, -slope.sum(), None


def spike(w, theta, surrogate):
    return _Spike.apply(w, theta, surrogate)


@pytest.mark.parametrize(("reset", "name", "attached"), CASES)
def test_float32_lies_within_the_bound_and_the_bound_tells(reset, name, attached):
    """Every element of every gradient, of 60 steps; and the bound is no wider than a hundred thousand roundoffs."""
    spec = spec_of(reset, Surrogate(name), attached)
    x = np.random.default_rng(3).uniform(-0.25, 1, (60, 3, 4)).astype(F32)
    weights = np.random.default_rng(4).normal(size=x.shape).astype(F32)
    recording, found = in_float32(spec, x, weights)
    assert oracle.judge(spec, recording).ok
    truth, bounds = oracle.gradients(spec, recording, weights), oracle.gradient_bounds(spec, recording, weights)
    for n, gradient in found.items():
        off = np.abs(gradient - truth[n])
        assert (off <= bounds[n]).all(), (n, float((off / bounds[n]).max()))
    assert bounds["x"].max() < 1e5 * 2.0**-24 * np.abs(truth["x"]).max()


def test_a_surrogate_that_jumps_within_the_bound_of_a_membrane_may_be_either():
    spec = spec_of("subtract", Surrogate("rectangle"), attached=False)
    recording, weights = played(spec, steps=8)
    _, trace, _ = oracle.trajectory(spec, recording)
    bounds = oracle.gradient_bounds(spec, recording, weights)
    # A threshold for which one membrane lies at the edge of the rectangle, to a rounding.
    t, b, n = 3, 1, 2
    w = trace.step.w[t, b, n]
    edge = spec.replace(parameters={**spec.parameters, "threshold": parameter(F32(w + 0.5))})
    at_edge = oracle.gradient_bounds(edge, recording, weights)
    assert at_edge["x"][t, b, n] > 0.1 * abs(weights[t, b, n]) > 1e3 * bounds["x"][t, b, n]


def exploding(steps=60):
    """Its reset keeps a gradient that is large everywhere, and goes through the factor of its spikes twice."""
    return snn.Leaky(
        0.9,
        threshold=0.58,
        learn_beta=True,
        learn_threshold=True,
        reset_mechanism="zero",
        reset_delay=False,
        graded_spikes_factor=0.9,
        learn_graded_spikes_factor=True,
        spike_grad=stock.straight_through_estimator(),
        init_hidden=True,
    ), (torch.rand(steps, 3, 5, generator=torch.Generator().manual_seed(1)) - 0.25) * 4


def test_what_no_precision_can_tell_is_named_and_is_no_difference():
    layer, x = exploding()
    result = adapters.convert(nn.Sequential(layer), to="tracetorch", sample=x, time_dim=0)
    row = result.agreement.rows[0]
    assert row.gradient_error > 0.1
    assert "gradient of spike_scale: error" in row.reason
    assert "ill-conditioned" in row.reason
    assert "which shows nothing" in row.reason
    assert result.agreement.ok


def test_a_wrong_reset_path_is_seen_there_too():
    layer, x = exploding()
    result = adapters.convert(nn.Sequential(layer), to="tracetorch", sample=x, time_dim=0)
    detached = result.model[0].spec.replace(reset_gradient="detached")
    recording, weights = played(result.model[0].spec, steps=60, size=4.0)
    wrong = oracle.gradients(detached, recording, weights)
    assert {"x", "mem_decay", "threshold"} <= set(faults(judged(result.model[0].spec, recording, weights, wrong)))


def test_what_leaves_the_range_is_explained_only_where_it_does():
    spec = spec_of("to 0, the rest", Surrogate("spike_rate_escape"))
    recording, weights = played(spec, steps=60, size=4.0)
    truth, bounds = oracle.gradients(spec, recording, weights), oracle.gradient_bounds(spec, recording, weights)
    assert np.abs(truth["x"]).max() > np.finfo(F32).max
    with np.errstate(over="ignore"):
        overflowed = truth["x"].astype(F32)
    found = oracle.judge_gradient(overflowed, truth["x"], TOLERANCE, lambda: bounds["x"])
    assert found.void
    assert "leaves the range" in str(found)
    late = overflowed.copy()
    assert np.isfinite(bounds["x"][-1]).all()
    late[-1] = np.nan
    assert faults({"x": oracle.judge_gradient(late, truth["x"], TOLERANCE, lambda: bounds["x"])})


def test_the_verdict_of_one_tensor():
    truth = np.array([1.0, -2.0])

    def of(subject, bound):
        return oracle.judge_gradient(np.asarray(subject, F32), truth, 1e-4, lambda: np.asarray(bound))

    assert of([1.0, -2.0], 0.0).ok
    assert not of([1.0, -2.1], 0.0).ok
    near = of([1.0, -2.01], [0.0, 0.02])
    assert (near.ok, near.void, near.ill_conditioned) == (True, False, True)
    assert near.bound == pytest.approx(0.01)
    assert "ill-conditioned: its precision explains up to 0.01" in str(near)
    assert not of([1.01, -2.0], [0.0, 0.02]).ok, "each element by its own bound"
    wide = of([1.0, 5.0], [0.0, 9.0])
    assert (wide.ok, wide.void) == (False, True)
    assert not of([np.nan, -2.0], [0.1, 0.1]).ok
    assert not of([np.nan, -2.0], [0.1, 0.1]).void
    assert of([np.nan, -2.0], [np.inf, 0.0]).void
    close = of([1.0, -2.02], [0.0, 9.0])
    assert (close.ok, close.void) == (True, False), "what was measured counts, not what might have been"
    assert not oracle.judge_gradient(np.asarray([1.0, -2.1], F32), truth, 1e-4).ok


def test_a_source_whose_gradient_is_not_that_of_its_spec_is_named():
    """Bits equal to the source's are no evidence for the spec."""
    layer = snn.Leaky(0.9, threshold=0.5, init_hidden=True, spike_grad=stock.atan(alpha=2.0))
    (stage,) = read(nn.Sequential(layer)).stages
    x, weights = torch.rand(2, 20, 3, 5, generator=torch.Generator().manual_seed(0))
    seen = run_alone(Observed(stage, (), torch.zeros(()), {}, stage.spec()), x, weights)
    honest = of_neuron(seen, seen, seen, ())
    assert (honest.verdict, honest.said) == ("exact", "")
    seen.spec = seen.spec.replace(surrogate=Surrogate("atan", (("alpha", 3.0),)))
    found = of_neuron(seen, seen, seen, ())
    assert found.verdict == "exact"
    assert "departs from its spec: please report this" in found.said


@pytest.mark.parametrize(
    ("spike_grad", "size", "steps"), [("straight_through_estimator", 4.0, 50), ("triangular", 4.0, 50)]
)
def test_gradients_that_overflow_are_judged_on_their_first_steps(spike_grad, size, steps):
    """A Synaptic whose reset to zero keeps its gradient, under a surrogate that does not fall off: all are judged."""
    options = {"reset_mechanism": "zero", "reset_delay": False, "spike_grad": getattr(stock, spike_grad)()}
    learnt = {"learn_alpha": True, "learn_beta": True, "learn_threshold": True}
    layer = snn.Synaptic(0.9, 0.9, threshold=0.6, init_hidden=True, **learnt, **options)
    x = (torch.rand(200, 3, 5, generator=torch.Generator().manual_seed(0)) - 0.25) * size
    plain = layer_grid.observe(layer, x, torch.ones_like(x)).gradients
    assert not np.isfinite(plain["x"]).all()
    assert layer_grid.telling(layer, x)[1] == steps
    found = layer_grid.Found()
    layer_grid.check(found, layer, x)
    assert not found.faults
    assert found.counts["gradients"] >= 16
    assert found.counts["gradients that show nothing"] == 0
