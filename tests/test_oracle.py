"""The float64 oracle against naive scalar loops, finite differences, a forward-mode derivative and the frameworks."""

import itertools
import math
import random

import numpy as np
import pytest
import sinabs.activation as sa
import sinabs.layers as sl
import snntorch
import torch
from snntorch import surrogate as snntorch_surrogate

import tracetorch as tt
from tests import naive
from tracetorch import oracle
from tracetorch.core.raw import from_raw
from tracetorch.core.spec import RAW_FORMS, NeuronSpec
from tracetorch.functional.surrogates import SURROGATES, Surrogate
from tracetorch.oracle.raw import RAW
from tracetorch.oracle.surrogates import DERIVATIVES

CLOSE = 1e-12


def stimulus(seed, shape=(60, 2, 3), mean=0.3, deviation=0.8):
    return np.random.default_rng(seed).normal(mean, deviation, shape)


def ran(spec, xs):
    """The oracle's own run: outputs, the membrane as the spec stores it, the synaptic current."""
    eq = oracle.equations(spec)
    step = oracle.run(eq, xs).step
    outputs = step.w if spec.output == "membrane" else np.broadcast_to(eq.g, xs.shape[1:]) * step.s
    return outputs, step.w if spec.stores_before_reset else step.v, step.i


def recorded(spec, xs):
    """The oracle's own run as the recording of a subject in float64."""
    outputs, v, i = ran(spec, xs)
    return oracle.Recording(xs, outputs, {"v_mem": v, "i_syn": i} if "i_syn" in spec.states else {"v_mem": v}, spec)


def assert_same(found, truth, tolerance=CLOSE):
    assert found.shape == truth.shape, (found.shape, truth.shape)
    assert found.dtype == truth.dtype == np.float64
    assert np.isfinite(truth).all()
    assert found.size
    error = np.abs(found - truth).max()
    assert error <= tolerance * max(1.0, np.abs(truth).max()), error


# ---- forward: the oracle is the naive loop ----------------------------------------------------------------------------

BETAS, THETAS = np.array([0.5, 0.83, 0.97]), np.array([0.7, 1.0, 1.3])


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_forward_of_snntorch_leaky(reset, delay):
    xs = stimulus(1)
    outputs, mems = naive.columns(
        lambda x, **p: naive.snntorch_leaky(x, reset=reset, delay=delay, **p),
        xs,
        {"beta": BETAS, "theta": THETAS, "g": 0.3},
    )
    found, v, _ = ran(naive.leaky_spec(BETAS, THETAS, 0.3, reset, delay), xs)
    np.testing.assert_array_equal(found, outputs)
    assert_same(v, mems)
    assert (outputs > 0).sum() > 30, "a trace without spikes proves nothing"
    assert (outputs == 0).sum() > 30
    if reset == "subtract" and not delay:
        residual = (mems[:-1] > THETAS).sum()
        assert residual > 3, "no membrane was left above the threshold: the residual reset was never tried"


@pytest.mark.parametrize("beta", [-0.5, 0.0, 1.0, 1.7])
def test_forward_of_a_beta_at_and_beyond_its_range(beta):
    """snnTorch clamps beta to [0, 1] when it runs."""
    xs = stimulus(2, mean=0.1)
    outputs, mems = naive.columns(
        lambda x, beta, theta: naive.snntorch_leaky(x, naive.clamped(beta), theta), xs, {"beta": beta, "theta": THETAS}
    )
    found, v, _ = ran(naive.leaky_spec(beta, THETAS), xs)
    np.testing.assert_array_equal(found, outputs)
    assert_same(v, mems)
    assert 10 < outputs.sum() < outputs.size


def test_the_reset_after_the_decay_is_threshold_over_beta_in_the_same_step():
    """SEMANTICS.md, equivalence classes: snn Leaky subtract with delay has rho = theta / beta."""
    xs = stimulus(3)
    trace = oracle.run(oracle.equations(naive.leaky_spec(BETAS, THETAS)), xs)
    spikes, mems = naive.columns(naive.snntorch_leaky, xs, {"beta": BETAS, "theta": THETAS})
    assert_same(trace.step.v, mems - spikes * THETAS / BETAS)
    strict, vs, _ = naive.columns(
        lambda x, **p: naive.sinabs_lif(x, spikes=("strict", None), reset=("over_alpha", None), norm_input=False, **p),
        xs,
        {"alpha": BETAS, "theta": THETAS},
    )
    np.testing.assert_array_equal(strict, spikes)
    assert_same(trace.step.v, vs)
    naively, _, _ = naive.columns(
        lambda x, **p: naive.sinabs_lif(x, spikes=("strict", None), norm_input=False, **p),
        xs,
        {"alpha": BETAS, "theta": THETAS},
    )
    assert (naively != spikes).any(), "subtracting theta itself is another neuron"


SPIKES = [("single", None), ("strict", None), ("multiple", None), ("limited", 2)]
RESETS = [
    ("subtract", None),
    ("subtract", np.array([0.4, 0.9, 1.5])),
    ("over_alpha", None),
    ("reset", 0.0),
    ("reset", 0.25),
    ("zero", None),
    ("none", None),
]
WAYS = [
    {"norm_input": True},
    {"norm_input": False, "min_v_mem": -0.3},
    {"norm_input": True, "syn": 0.6, "min_v_mem": np.array([-0.5, -0.1, 0.0])},
    {"norm_input": False, "syn": np.array([0.3, 0.6, 0.9])},
]


def lif_columns(xs, alpha, theta, spikes, reset, norm_input, syn=None, min_v_mem=None, direction=None, **options):
    """`naive.sinabs_lif` for every neuron, the optional parameters spread over the neurons as the others."""
    parameters = {"alpha": alpha, "theta": theta}
    parameters |= {} if syn is None else {"alpha_syn": syn}
    parameters |= {} if min_v_mem is None else {"min_v_mem": min_v_mem}
    parameters |= {} if reset[1] is None else {"amount": reset[1]}

    def loop(x, amount=None, **p):
        return naive.sinabs_lif(
            x, spikes=spikes, reset=(reset[0], amount), norm_input=norm_input, **p, **options
        )

    return naive.columns(loop, xs, parameters, direction)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way))
@pytest.mark.parametrize("reset", RESETS, ids=lambda reset: f"{reset[0]} {np.ndim(reset[1])}")
@pytest.mark.parametrize("spikes", SPIKES, ids=lambda spikes: spikes[0])
def test_forward_of_sinabs_lif(spikes, reset, way):
    xs = stimulus(4, mean=1.2 if way["norm_input"] else 0.3, deviation=3.0 if way["norm_input"] else 1.2)
    alpha = np.array([0.6, 0.8, 0.9])
    outputs, vs, currents = lif_columns(xs, alpha, THETAS, spikes, reset, **way)
    found, v, i = ran(naive.lif_spec(alpha, THETAS, spikes, reset, **way), xs)
    np.testing.assert_array_equal(found, outputs)
    assert_same(v, vs)
    assert_same(i, currents)
    assert (outputs > 0).sum() > 20
    if spikes[0] in ("multiple", "limited"):
        assert (outputs > 1).sum() > 2, "no step with several spikes"
    if spikes[0] == "limited":
        assert outputs.max() == 2
        assert (lif_columns(xs, alpha, THETAS, ("multiple", None), reset, **way)[0] > 2).any(), "the limit did nothing"
    if "min_v_mem" in way:
        assert (vs == way["min_v_mem"]).sum() > 5, "the clamp was never reached"
        assert (vs > way["min_v_mem"]).sum() > 5


def test_forward_of_a_time_constant():
    xs, tau = stimulus(5, mean=1.5, deviation=4.0), np.array([2.0, 5.0, 20.0])
    outputs, vs, _ = naive.columns(
        lambda x, tau, theta: naive.sinabs_lif(x, naive.exp_tau(tau), theta), xs, {"tau": tau, "theta": 1.0}
    )
    found, v, _ = ran(naive.lif_spec(tau, 1.0, raw="exp_tau"), xs)
    np.testing.assert_array_equal(found, outputs)
    assert_same(v, vs)
    assert outputs.max() > 1


@pytest.mark.parametrize("strict", [True, False])
def test_exact_ties_are_decided_as_the_comparison_says(strict):
    """Inputs on a grid of 1/8 and a decay of 1/2: every number is exact, and some membranes are the threshold itself."""
    xs = np.random.default_rng(6).integers(-4, 9, (40, 4, 50)) / 8
    kind = ("strict" if strict else "single", None)
    outputs, vs, _ = lif_columns(xs, 0.5, 1.0, kind, ("zero", None), False)
    spec = naive.lif_spec(0.5, 1.0, kind, ("zero", None), norm_input=False)
    found, v, _ = ran(spec, xs)
    np.testing.assert_array_equal(found, outputs)
    np.testing.assert_array_equal(v, vs)
    membranes = np.concatenate([np.zeros((1, 4, 50)), vs[:-1]]) * 0.5 + xs
    ties = membranes == 1.0
    assert ties.sum() > 50
    assert (outputs[ties] == (0.0 if strict else 1.0)).all()
    snn, mems = naive.columns(
        lambda x, **p: naive.snntorch_leaky(x, reset="zero", **p), xs, {"beta": 0.5, "theta": 1.0}
    )
    assert ((snn == outputs).all()) == strict
    assert ((mems == 1.0) & (snn == 0)).sum() > 50


@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_exact_ties_of_snntorch(reset, delay):
    xs = np.random.default_rng(7).integers(0, 9, (40, 4, 50)) / 8
    outputs, mems = naive.columns(
        lambda x, **p: naive.snntorch_leaky(x, reset=reset, delay=delay, **p), xs, {"beta": 0.5, "theta": 1.0}
    )
    found, v, _ = ran(naive.leaky_spec(0.5, 1.0, reset=reset, delay=delay), xs)
    np.testing.assert_array_equal(found, outputs)
    np.testing.assert_array_equal(v, mems)
    loose, _, _ = ran(naive.leaky_spec(0.5, 1.0, reset=reset, delay=delay, comparison=">="), xs)
    assert (loose != outputs).sum() > 10, "no exact tie"


def test_forward_of_gain_leak_bias_and_synapse():
    """Choices that no framework of this version has."""
    xs = stimulus(8)
    numbers = {"decay": BETAS, "gain": np.array([0.5, 1.0, 2.0]), "leak": 0.4, "syn": 0.7, "min_v_mem": 0.1}
    (vs,) = naive.columns(naive.leaky_integrator, xs, numbers)
    found, v, _ = ran(integrator_spec(numbers), xs)
    assert_same(v, vs)
    assert (vs == 0.1).any()
    assert_same(found[vs > 0.1], vs[vs > 0.1])
    spikes, mems = naive.columns(naive.tracetorch_lib, xs, {"beta": BETAS, "theta": THETAS, "bias": [0.2, 0.0, -0.2]})
    found, v, _ = ran(lib_spec(BETAS, THETAS, [0.2, 0.0, -0.2]), xs)
    np.testing.assert_array_equal(found, spikes)
    assert_same(v, mems)
    assert spikes.sum() > 30


def integrator_spec(numbers):
    names = {"decay": "mem_decay", "gain": "input_gain", "leak": "leak", "syn": "syn_decay", "min_v_mem": "min_v_mem"}
    return NeuronSpec(
        form="anything",
        output="membrane",
        spike_count="none",
        reset="none",
        threshold_gradient=False,
        synapse="add_then_decay" if "syn" in numbers else "none",
        input_gain="value",
        clamp="after_reset" if "min_v_mem" in numbers else "none",
        parameters={names[n]: naive.parameter(p) for n, p in numbers.items()},
    )


def lib_spec(beta, theta, bias, raws=("value", "value")):
    return NeuronSpec(
        form="tracetorch.LIB",
        comparison=">",
        surrogate=Surrogate("logistic"),
        parameters={
            "mem_decay": naive.parameter(beta, raw=raws[0]),
            "threshold": naive.parameter(theta, raw=raws[1]),
            "bias": naive.parameter(bias),
        },
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 1, 7), (5, 1, 513), (4, 3)])
def test_awkward_shapes(shape):
    xs = stimulus(9, shape, mean=0.6)
    outputs, mems = naive.columns(naive.snntorch_leaky, xs, {"beta": 0.9, "theta": 0.5})
    found, v, _ = ran(naive.leaky_spec(0.9, 0.5), xs)
    np.testing.assert_array_equal(found, outputs)
    assert_same(v, mems)
    assert (outputs > 0).any()


# ---- forward: the oracle is the framework in float64 ------------------------------------------------------------------


def snntorch_run(layer, xs):
    outputs, mems = [], []
    for x in xs:
        spikes, mem = layer(x)
        outputs.append(spikes)
        mems.append(mem)
    return torch.stack(outputs), torch.stack(mems)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_forward_of_the_real_snntorch(reset, delay):
    xs = stimulus(10, (100, 4, 3))
    layer = snntorch.Leaky(
        beta=torch.tensor(BETAS), threshold=torch.tensor(THETAS), reset_mechanism=reset, reset_delay=delay
    ).double()
    outputs, mems = snntorch_run(layer, torch.tensor(xs))
    found, v, _ = ran(naive.leaky_spec(BETAS, THETAS, 1.0, reset, delay), xs)
    np.testing.assert_array_equal(found, outputs.numpy())
    assert_same(v, mems.numpy())
    assert outputs.sum() > 100


SPIKE_FNS = {"single": sa.SingleSpike, "multiple": sa.MultiSpike, "limited": sa.MaxSpike(2)}


def sinabs_layer(tau, theta, spikes, reset, norm_input, syn=None, min_v_mem=None):
    """A sinabs LIF in float64; `tau` and `syn` are time constants."""
    amount = torch.tensor(reset[1]) if isinstance(reset[1], np.ndarray) else reset[1]
    layer = sl.LIF(
        tau_mem=1.0,
        tau_syn=None if syn is None else 1.0,
        spike_threshold=torch.tensor(theta),
        spike_fn=SPIKE_FNS[spikes[0]],
        reset_fn=sa.MembraneSubtract(amount) if reset[0] == "subtract" else sa.MembraneReset(reset[1]),
        min_v_mem=None if min_v_mem is None else torch.tensor(min_v_mem),
        norm_input=norm_input,
        record_states=True,
    ).double()
    layer.tau_mem = torch.nn.Parameter(torch.tensor(tau))
    if syn is not None:
        layer.tau_syn = torch.nn.Parameter(torch.tensor(syn, dtype=torch.float64))
    return layer


SINABS_SPIKES = [s for s in SPIKES if s[0] in SPIKE_FNS]
SINABS_RESETS = [r for r in RESETS if r[0] in ("subtract", "reset")]
SINABS_WAYS = [
    {"norm_input": True},
    {"norm_input": False, "min_v_mem": -0.3},
    {"norm_input": True, "syn": 2.5, "min_v_mem": np.array([-0.5, -0.1, 0.0])},
    {"norm_input": False, "syn": np.array([0.8, 2.0, 9.0])},
]
TAUS = np.array([1.5, 4.0, 15.0])


@pytest.mark.parametrize("way", SINABS_WAYS, ids=lambda way: "-".join(way))
@pytest.mark.parametrize("reset", SINABS_RESETS, ids=lambda reset: f"{reset[0]} {np.ndim(reset[1])}")
@pytest.mark.parametrize("spikes", SINABS_SPIKES, ids=lambda spikes: spikes[0])
def test_forward_of_the_real_sinabs(spikes, reset, way):
    xs = stimulus(11, (100, 4, 3), 0.3, 3.0 if way["norm_input"] else 1.2)
    layer = sinabs_layer(TAUS, THETAS, spikes, reset, **way)
    with torch.no_grad():
        outputs = layer(torch.tensor(xs).transpose(0, 1)).transpose(0, 1).numpy()
    found, v, i = ran(naive.lif_spec(TAUS, THETAS, spikes, reset, raw="exp_tau", **way), xs)
    np.testing.assert_array_equal(found, outputs)
    assert_same(v, layer.recordings["v_mem"].transpose(0, 1).numpy())
    if "syn" in way:
        assert_same(i, layer.recordings["i_syn"].transpose(0, 1).numpy())
    assert (outputs > 0).sum() > 50
    assert spikes[0] == "single" or outputs.max() > 1


# ---- gradients --------------------------------------------------------------------------------------------------------


def adjoint_of(loop, xs, names, spec, seed=0, tolerance=1e-10):
    """Every gradient of the oracle against the forward-mode derivative of the naive loop, neuron by neuron.

    The oracle's sum over a parameter's neurons is <G, J 1>; for the input, random directions are tried. `names`:
    {argument of the loop: parameter of the spec}. Returns the gradients, for tests that look closer.
    """
    generator = np.random.default_rng(seed)
    weights = generator.normal(size=xs.shape)
    recording = recorded(spec, xs)
    found = oracle.gradients(spec, recording, weights)
    numbers = {own: spec.parameters[name].value for own, name in names.items()}
    outputs, *_ = naive.columns(loop, xs, numbers)
    np.testing.assert_array_equal(outputs, recording.outputs)
    for _ in range(2):
        direction = generator.normal(size=xs.shape)
        moved, *_ = naive.columns(loop, xs, numbers, {"x": direction})
        assert_same((found["x"] * direction).sum(0), (weights * moved).sum(0), tolerance)
        assert np.abs(moved).max() > 1e-3
    for own, name in names.items():
        moved, *_ = naive.columns(loop, xs, numbers, {own: 1.0})
        truth = (weights * moved).sum((0, 1)) if spec.parameters[name].value.ndim else (weights * moved).sum()
        assert_same(np.asarray(found[name]), np.asarray(truth), tolerance)
    assert set(found) == {"x", *spec.parameters}
    return found


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("per_neuron", [True, False])
def test_gradients_of_snntorch_leaky(reset, delay, per_neuron):
    beta, theta, g = (BETAS, THETAS, np.array([0.3, 1.0, 2.0])) if per_neuron else (0.9, 1.0, 1.5)
    spec = naive.leaky_spec(beta, theta, g, reset, delay)
    found = adjoint_of(
        lambda x, **p: naive.snntorch_leaky(x, reset=reset, delay=delay, **p),
        stimulus(12),
        {"beta": "mem_decay", "theta": "threshold", "g": "spike_scale"},
        spec,
    )
    for name in ("mem_decay", "threshold", "spike_scale"):
        assert np.abs(found[name]).max() > 0.1, name


@pytest.mark.parametrize("raw", ["value", "clamped", "exp_tau", "sigmoid"])
def test_gradients_through_the_raw_form_of_the_decay(raw):
    of = {"value": lambda p: p, "clamped": naive.clamped, "exp_tau": naive.exp_tau, "sigmoid": naive.sigmoid}[raw]
    beta = {"value": BETAS, "clamped": np.array([0.5, 0.9, 1.4]), "exp_tau": TAUS, "sigmoid": np.array([-0.5, 1.0, 3.0])}
    spec = naive.leaky_spec(beta[raw], THETAS, raw=raw)
    found = adjoint_of(
        lambda x, beta, **p: naive.snntorch_leaky(x, of(beta), **p),
        stimulus(13),
        {"beta": "mem_decay", "theta": "threshold", "g": "spike_scale"},
        spec,
    )
    if raw == "clamped":
        assert found["mem_decay"][2] == 0, "no gradient passes a clamp"
    assert (found["mem_decay"][:2] != 0).all()


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("threshold_gradient", [True, False])
@pytest.mark.parametrize("reset", RESETS, ids=lambda reset: f"{reset[0]} {np.ndim(reset[1])}")
@pytest.mark.parametrize("spikes", SPIKES, ids=lambda spikes: spikes[0])
def test_gradients_of_sinabs_lif(spikes, reset, threshold_gradient, detached):
    if reset[0] == "zero" and spikes[0] in ("multiple", "limited"):
        pytest.skip("v - s*v is no reset to zero for more than one spike")
    way = WAYS[hash_of(spikes[0], reset[0], threshold_gradient) % len(WAYS)]
    spec = naive.lif_spec(
        np.array([0.6, 0.8, 0.9]), THETAS, spikes, reset, **way, detached=detached, threshold_gradient=threshold_gradient
    )
    names = {"alpha": "mem_decay", "theta": "threshold"}
    names |= {"alpha_syn": "syn_decay"} if "syn" in way else {}
    names |= {"min_v_mem": "min_v_mem"} if "min_v_mem" in way else {}
    names |= {"amount": "reset_amount" if reset[0] == "subtract" else "reset_value"} if reset[1] is not None else {}

    def loop(x, amount=None, **p):
        return naive.sinabs_lif(
            x,
            spikes=spikes,
            reset=(reset[0], amount),
            norm_input=way["norm_input"],
            threshold_gradient=threshold_gradient,
            detached=detached,
            **p,
        )

    xs = stimulus(14, mean=1.2 if way["norm_input"] else 0.3, deviation=3.0 if way["norm_input"] else 1.2)
    if reset[0] == "zero":
        spec = spec.replace(parameters=dict(spec.parameters))
        found = adjoint_of_some(loop, xs, names, spec)
    else:
        found = adjoint_of(loop, xs, names, spec)
    trace = recorded(spec, xs)
    assert (trace.outputs > 0).sum() > 20
    if "min_v_mem" in way:
        assert (trace.states["v_mem"] == way["min_v_mem"]).sum() > 5
        assert np.abs(found["min_v_mem"]).max() > 0
    if reset[0] in ("subtract", "over_alpha") and reset[1] is None:
        assert np.abs(found["threshold"]).max() > 0.01, "the threshold's way through the reset"
    if not threshold_gradient and reset[1] is not None:
        assert not found["threshold"].any(), "nothing is left that could reach the threshold"


def hash_of(*parts):
    return sum(ord(letter) for letter in repr(parts))


def adjoint_of_some(loop, xs, names, spec):
    """A reset to zero has a `reset_value` of 0, which the naive loop has no argument for."""
    value = spec.parameters["reset_value"].value
    assert not value.any()
    return adjoint_of(lambda x, **p: loop(x, **{k: v for k, v in p.items() if k != "unused"}), xs, names, spec)
