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


# ---- forward: the oracle is the naive loop --------------------------------------------------------------------------

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
    ("value", 0.0),
    ("value", np.array([-0.4, 0.1, 0.3])),
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
        return naive.sinabs_lif(x, spikes=spikes, reset=(reset[0], amount), norm_input=norm_input, **p, **options)

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
    """Inputs on a grid of 1/8, a decay of 1/2: every number is exact, and some membranes are the threshold itself."""
    xs = np.random.default_rng(6).integers(-4, 9, (40, 4, 50)) / 8
    kind = ("strict" if strict else "single", None)
    outputs, vs, _ = lif_columns(xs, 0.5, 1.0, kind, ("value", 0.0), False)
    spec = naive.lif_spec(0.5, 1.0, kind, ("value", 0.0), norm_input=False)
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
    xs = stimulus(9, shape, mean=1.2)
    outputs, mems = naive.columns(naive.snntorch_leaky, xs, {"beta": 0.9, "theta": 0.5})
    found, v, _ = ran(naive.leaky_spec(0.9, 0.5), xs)
    np.testing.assert_array_equal(found, outputs)
    assert_same(v, mems)
    assert (outputs > 0).any()


# ---- forward: the oracle is the framework in float64 ----------------------------------------------------------------


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
        min_v_mem=None if min_v_mem is None else torch.tensor(min_v_mem, dtype=torch.float64),
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


# ---- gradients ------------------------------------------------------------------------------------------------------


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
    beta = {
        "value": BETAS,
        "clamped": np.array([0.5, 0.9, 1.4]),
        "exp_tau": TAUS,
        "sigmoid": np.array([-0.5, 1.0, 3.0]),
    }
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


CASES = [
    (*case, WAYS[(k + k // 4) % len(WAYS)])
    for k, case in enumerate(itertools.product(SPIKES, RESETS, (True, False), (True, False)))
]


def case_name(case):
    spikes, reset, threshold_gradient, detached, way = case
    words = [spikes[0], f"{reset[0]} {np.ndim(reset[1])}" if reset[1] is not None else reset[0], *way]
    return ", ".join([*words, *(["threshold"] if threshold_gradient else []), *(["detached"] if detached else [])])


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_gradients_of_sinabs_lif(case):
    spikes, reset, threshold_gradient, detached, way = case
    spec = naive.lif_spec(
        np.array([0.6, 0.8, 0.9]),
        THETAS,
        spikes,
        reset,
        **way,
        detached=detached,
        threshold_gradient=threshold_gradient,
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
            detached=detached or reset[0] == "reset",
            **p,
        )

    xs = stimulus(14, mean=1.2 if way["norm_input"] else 0.3, deviation=3.0 if way["norm_input"] else 1.2)
    found = adjoint_of(loop, xs, names, spec)
    trace = recorded(spec, xs)
    assert (trace.outputs > 0).sum() > 20
    assert np.abs(found["mem_decay"]).max() > 0.01
    if "min_v_mem" in way:
        assert (trace.states["v_mem"] == way["min_v_mem"]).sum() > 5
        assert np.abs(found["min_v_mem"]).max() > 0
    if "amount" in names:
        assert np.abs(found[names["amount"]]).max() > 0.01
    if reset[0] in ("subtract", "over_alpha") and reset[1] is None:
        assert np.abs(found["threshold"]).max() > 0.01, "the threshold's way through the reset"
    elif not threshold_gradient:
        assert not found["threshold"].any(), "nothing is left that could reach the threshold"


def test_gradients_of_lib():
    """Through sigmoid and softplus, and the bias."""
    spec = lib_spec([0.5, 1.5, 3.0], [0.1, 0.6, 1.2], [0.2, 0.0, -0.2], ("sigmoid", "softplus"))
    found = adjoint_of(
        lambda x, beta, theta, bias: naive.tracetorch_lib(x, naive.sigmoid(beta), naive.softplus(theta), bias),
        stimulus(15),
        {"beta": "mem_decay", "theta": "threshold", "bias": "bias"},
        spec,
    )
    assert min(np.abs(found[name]).max() for name in spec.parameters) > 0.1


def test_gradients_of_gain_leak_and_synapse():
    numbers = {"decay": BETAS, "gain": np.array([0.5, 1.0, 2.0]), "leak": 0.4, "syn": 0.7, "min_v_mem": 0.1}
    names = {"decay": "mem_decay", "gain": "input_gain", "leak": "leak", "syn": "syn_decay", "min_v_mem": "min_v_mem"}
    spec = integrator_spec(numbers)
    xs, weights = stimulus(16), np.random.default_rng(0).normal(size=(60, 2, 3))
    (vs,) = naive.columns(naive.leaky_integrator, xs, numbers)
    assert 5 < (vs == 0.1).sum() < vs.size / 2
    # The output of the oracle is the membrane before its clamp, so the weights of clamped steps are left out.
    weights = np.where(vs == 0.1, 0.0, weights)
    found = oracle.gradients(spec, recorded(spec, xs), weights)
    for own, name in names.items():
        (moved,) = naive.columns(naive.leaky_integrator, xs, numbers, {own: 1.0})
        truth = (weights * moved).sum((0, 1) if np.ndim(numbers[own]) else None)
        assert_same(np.asarray(found[name]), np.asarray(truth), 1e-10)


def test_gradients_of_a_map_without_spikes_are_its_finite_differences():
    """Below the threshold the output is smooth; central differences know nothing of any derivation."""
    numbers = {"decay": BETAS, "gain": np.array([0.5, 1.0, 2.0]), "leak": 0.4, "syn": 0.7, "min_v_mem": -0.5}
    names = {"decay": "mem_decay", "gain": "input_gain", "leak": "leak", "syn": "syn_decay", "min_v_mem": "min_v_mem"}
    xs, h = stimulus(17, (12, 1, 3), 0.0), 1e-6

    def loss(xs, numbers):
        return (weights * naive.columns(naive.leaky_integrator, xs, numbers)[0]).sum()

    (vs,) = naive.columns(naive.leaky_integrator, xs, numbers)
    clamped = vs == -0.5
    assert 2 < clamped.sum() < 20
    weights = np.where(clamped, 0.0, np.random.default_rng(1).normal(size=xs.shape))
    spec = integrator_spec(numbers)
    found = oracle.gradients(spec, recorded(spec, xs), weights)
    for own, name in names.items():
        for k in range(np.size(numbers[own])):
            shift = np.zeros(np.shape(numbers[own]))
            shift.reshape(-1)[k] = h
            up, down = ({**numbers, own: numbers[own] + sign * shift} for sign in (1, -1))
            slope = (loss(xs, up) - loss(xs, down)) / (2 * h)
            assert np.atleast_1d(found[name])[k] == pytest.approx(slope, rel=1e-6, abs=1e-7), name
    for index in np.ndindex(*xs.shape):
        shift = np.zeros(xs.shape)
        shift[index] = h
        slope = (loss(xs + shift, numbers) - loss(xs - shift, numbers)) / (2 * h)
        assert found["x"][index] == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("reset", [("subtract", None), ("over_alpha", None), ("value", 0.0), ("reset", 0.2)])
def test_gradients_against_reverse_mode_autograd(reset):
    """The naive loop on torch scalars: another derivation still, reverse like the oracle's, but torch's own."""
    xs, weights = stimulus(18, (25, 1, 3)), np.random.default_rng(2).normal(size=(25, 1, 3))
    spec = naive.lif_spec(TAUS, THETAS, ("multiple", None), reset, True, raw="exp_tau", threshold_gradient=True)
    xs = 4 * xs
    recording = recorded(spec, xs)
    assert recording.outputs.max() > 1
    if reset[0] == "value":
        spec = naive.lif_spec(TAUS, THETAS, ("single", None), reset, True, raw="exp_tau", threshold_gradient=True)
        recording = recorded(spec, xs)
    found = oracle.gradients(spec, recording, weights)
    for n in range(3):
        x = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in xs[:, 0, n]]
        tau, theta = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (TAUS[n], THETAS[n]))
        outputs, _, _ = naive.sinabs_lif(
            x,
            naive.exp_tau(tau),
            theta,
            spikes=(spec.spike_count, None),
            reset=reset,
            threshold_gradient=True,
            detached=reset[0] == "reset",
        )
        sum(float(w) * s for w, s in zip(weights[:, 0, n], outputs, strict=True)).backward()
        assert_same(found["x"][:, 0, n], np.array([v.grad.item() for v in x]), 1e-11)
        assert found["mem_decay"][n] == pytest.approx(tau.grad.item(), rel=1e-10)
        assert found["threshold"][n] == pytest.approx(theta.grad.item(), rel=1e-10)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_gradients_of_the_real_snntorch(reset, delay):
    xs, weights = stimulus(19, (80, 4, 3)), np.random.default_rng(3).normal(size=(80, 4, 3))
    layer = snntorch.Leaky(
        beta=torch.tensor(BETAS),
        threshold=torch.tensor(THETAS),
        graded_spikes_factor=torch.tensor([0.3, 1.0, 2.0]),
        learn_beta=True,
        learn_threshold=True,
        learn_graded_spikes_factor=True,
        reset_mechanism=reset,
        reset_delay=delay,
    ).double()
    x = torch.tensor(xs, requires_grad=True)
    outputs, mems = snntorch_run(layer, x)
    (outputs * torch.tensor(weights)).sum().backward()
    g = layer.graded_spikes_factor.detach().numpy()
    spec = naive.leaky_spec(BETAS, THETAS, g, reset, delay)
    recording = oracle.Recording(xs, outputs.detach().numpy(), {"v_mem": mems.detach().numpy()}, spec)
    found = oracle.gradients(spec, recording, weights)
    # snnTorch makes its spikes float32: what multiplies them in the backward pass is so rounded.
    assert_same(found["x"], x.grad.numpy(), 1e-6)
    for name, parameter in (
        ("mem_decay", layer.beta),
        ("threshold", layer.threshold),
        ("spike_scale", layer.graded_spikes_factor),
    ):
        assert_same(found[name], parameter.grad.numpy(), 1e-6)
        assert parameter.grad.abs().max() > 0.1


@pytest.mark.parametrize("way", SINABS_WAYS, ids=lambda way: "-".join(way))
@pytest.mark.parametrize("reset", SINABS_RESETS, ids=lambda reset: f"{reset[0]} {np.ndim(reset[1])}")
@pytest.mark.parametrize("spikes", SINABS_SPIKES, ids=lambda spikes: spikes[0])
def test_gradients_of_the_real_sinabs(spikes, reset, way):
    xs, weights = stimulus(20, (50, 4, 3), 0.3, 3.0), np.random.default_rng(4).normal(size=(50, 4, 3))
    layer = sinabs_layer(TAUS, THETAS, spikes, reset, **way)
    layer.spike_threshold.requires_grad_(True)
    own = {"mem_decay": layer.tau_mem, "threshold": layer.spike_threshold}
    own |= {"syn_decay": layer.tau_syn} if "syn" in way else {}
    if "min_v_mem" in way:
        own["min_v_mem"] = layer.min_v_mem.requires_grad_(True)
    x = torch.tensor(xs, requires_grad=True)
    outputs = layer(x.transpose(0, 1)).transpose(0, 1)
    (outputs * torch.tensor(weights)).sum().backward()
    states = {name: state.transpose(0, 1).detach().numpy() for name, state in layer.recordings.items()}
    spec = naive.lif_spec(TAUS, THETAS, spikes, reset, raw="exp_tau", **way)
    found = oracle.gradients(spec, oracle.Recording(xs, outputs.detach().numpy(), states, spec), weights)
    assert_same(found["x"], x.grad.numpy(), 1e-6)
    for name, parameter in own.items():
        if parameter.grad is None:
            assert not found[name].any(), name
        else:
            assert_same(found[name], parameter.grad.numpy(), 1e-6)
            assert found[name].any()


# ---- the native layer of a spec is the oracle, whatever the choices -------------------------------------------------


# The form resets to 0, or adds a value.
COMPUTED = [case for case in CASES if not (case[1][0] == "value" and np.any(case[1][1]))]


@pytest.mark.parametrize("case", COMPUTED, ids=case_name)
def test_the_native_layer_of_a_spec(case):
    """Outputs, states and every gradient of `SpecNeuron` in float64, for each combination that the form accepts."""
    spikes, reset, threshold_gradient, detached, way = case
    spec = naive.lif_spec(
        np.array([0.6, 0.8, 0.9]),
        THETAS,
        spikes,
        reset,
        **way,
        detached=detached,
        threshold_gradient=threshold_gradient,
    )
    compare_native(spec, stimulus(21, (40, 2, 3), mean=0.6, deviation=3.0 if way["norm_input"] else 1.2))


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_the_native_layer_of_a_leaky_spec(reset, delay):
    compare_native(naive.leaky_spec(BETAS, THETAS, np.array([0.3, 1.0, 2.0]), reset, delay), stimulus(22))


@pytest.mark.parametrize(
    "spec", [naive.leaky_spec(0.9, 1.0, reset="zero"), naive.lif_spec(0.9, 1.0, reset=("value", 0.0))]
)
def test_a_reset_value_that_the_form_never_reads_cannot_be_learned(spec):
    """The form resets to 0: a trainable `reset_value` would be accepted and left out of every equation."""
    learned = naive.parameter(0.0, learnable=True)
    with pytest.raises(tt.SpecError, match="reset_value"):
        tt.snn.SpecNeuron(spec.replace(parameters={**spec.parameters, "reset_value": learned}))


def test_a_membrane_stopped_gradient_is_refused_by_the_forms():
    """No form computes it; to take it for "attached" would be silent."""
    with pytest.raises(tt.SpecError, match="membrane_stopped"):
        tt.snn.SpecNeuron(naive.lif_spec(0.9, 1.0, reset_gradient="membrane_stopped"))


@pytest.mark.parametrize("raw", ["exp_tau", "value"])
def test_a_raw_form_that_is_not_computed_is_refused_by_the_forms(raw):
    """When the layer is made, as `SpecNeuron` promises, and not in its first step."""
    spec = naive.lif_spec(0.9, 1.0, ("single", None), raw=raw)
    with pytest.raises(tt.SpecError, match=raw):
        tt.snn.SpecNeuron(spec.replace(form="spikingjelly.LIF"))


def test_a_raw_form_that_counts_time_needs_a_dt():
    for name in ("exp_dt_tau", "one_minus_dt_rate"):
        with pytest.raises(ValueError, match=f"dt=None.*{name}"):
            from_raw(name, torch.ones(1))


@pytest.mark.parametrize("missing", ["spike_scale", "bias"])
def test_an_optional_parameter_left_out_has_its_neutral_value(missing):
    """A spec without `spike_scale` or `bias` is valid: they are 1 and 0. The native layer must run it, or refuse it."""
    spec = naive.leaky_spec(0.9, 1.0) if missing == "spike_scale" else lib_spec(0.9, 1.0, 0.0)
    spec = spec.replace(parameters={n: p for n, p in spec.parameters.items() if n != missing})
    xs = stimulus(24)
    try:
        layer = tt.snn.SpecNeuron(spec)
    except tt.SpecError as error:
        assert missing in str(error)  # noqa: PT017 - a refusal by name is as good
        return
    np.testing.assert_array_equal(layer.unroll(torch.tensor(xs)).detach().numpy(), ran(spec, xs)[0])


def test_the_native_layer_of_a_lib_spec():
    compare_native(lib_spec([0.5, 1.5, 3.0], [0.1, 0.6, 1.2], [0.2, 0.0, -0.2], ("sigmoid", "softplus")), stimulus(23))


def compare_native(spec, xs):
    if spec.reset == "value":  # the form resets to 0 and never reads it
        fixed = naive.parameter(spec.parameters["reset_value"].value)
        spec = spec.replace(parameters={**spec.parameters, "reset_value": fixed})
    layer = tt.snn.SpecNeuron(spec)
    x = torch.tensor(xs, requires_grad=True)
    outputs, states = layer.trace(x)
    weights = np.random.default_rng(5).normal(size=xs.shape)
    (outputs * torch.tensor(weights)).sum().backward()
    eq_outputs, v, i = ran(spec, xs)
    np.testing.assert_array_equal(outputs.detach().numpy(), eq_outputs)
    assert_same(states["v_mem"].detach().numpy(), v)
    if "i_syn" in states:
        assert_same(states["i_syn"].detach().numpy(), i)
    recording = oracle.Recording(
        xs, outputs.detach().numpy().astype(np.float64), {n: s.detach().numpy() for n, s in states.items()}, spec
    )
    found = oracle.gradients(spec, recording, weights)
    assert_same(x.grad.numpy(), found["x"], 1e-6)
    for name, parameter in layer.named_parameters():
        gradient = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        assert_same(gradient, found[name], 1e-6)


# ---- surrogates -----------------------------------------------------------------------------------------------------

# sinabs and Norse compute these with a float32 pi, whatever the precision of the membrane; so do we, bit for bit.
FLOAT32_PI = ("gaussian", "multi_gaussian", "erfc")
SCALED_BY_THRESHOLD = ("single_exponential", "heaviside_window", "periodic_exponential")


def drawn(name, seed):
    """Random legal parameters of a surrogate."""
    generator = random.Random(f"{name} {seed}")
    defaults = SURROGATES[name].defaults
    return {key: default if seed == 0 else generator.uniform(0.2, 3.0) for key, default in defaults.items()}


def test_the_tables_of_surrogates_have_the_same_names():
    assert set(SURROGATES) == set(DERIVATIVES)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_surrogates_in_torch_and_in_the_oracle(name, seed):
    """In float64, at random points, at 0, and for negative thresholds where the formula has a meaning there."""
    generator = np.random.default_rng(seed)
    # 25 z must not overflow: there snnTorch's `sigmoid` is NaN by its own formula.
    z = np.concatenate([[0.0, -0.0, 1.0, -1.0, 0.5], generator.normal(0, 1.5, 2000)])
    low = 0.2 if name in SCALED_BY_THRESHOLD else -2.0
    threshold = generator.uniform(low, 2.0, z.shape)
    assert name in SCALED_BY_THRESHOLD or (threshold < 0).any()
    grad = generator.normal(size=z.shape)
    numbers = drawn(name, seed)
    surrogate = Surrogate(name, tuple(numbers.items()))
    found = surrogate.vjp(torch.tensor(grad), torch.tensor(z), torch.tensor(threshold))
    assert found.dtype == torch.float64
    truth = grad * DERIVATIVES[name](z, threshold, **numbers)
    assert_same(found.numpy(), truth, 1e-7 if name in FLOAT32_PI else CLOSE)
    if name != "zero":
        assert np.abs(truth).max() > 1e-4


@pytest.mark.parametrize("slope", [1.0, 4.0, 25.0])
def test_surrogates_are_the_slopes_of_the_functions_they_are_named_after(slope):
    """Finite differences of the smooth step of each surrogate that has one in closed form."""
    z, h = np.linspace(-1.0, 1.0, 41) + 0.0123, 1e-6
    steps = {
        "atan": (lambda z: np.arctan(math.pi / 2 * slope * z) / math.pi, {"alpha": slope}),
        "fast_sigmoid": (lambda z: z / (1 + slope * np.abs(z)), {"slope": slope}),
        "sigmoid": (lambda z: 1 / (1 + np.exp(-slope * z)), {"slope": slope}),
        "logistic": (lambda z: 1 / (1 + np.exp(-slope * z)), {"slope": slope}),
        "gaussian": (
            lambda z: np.array([0.5 * math.erf(v * slope / math.sqrt(2)) for v in z]),
            {"mu": 0.0, "sigma": 1 / slope, "grad_scale": 1.0},
        ),
        "straight_through": (lambda z: z, {}),
    }
    for name, (step, numbers) in steps.items():
        truth = (step(z + h) - step(z - h)) / (2 * h)
        np.testing.assert_allclose(DERIVATIVES[name](z, np.ones(()), **numbers), truth, rtol=1e-5, atol=1e-8)


STOCK_SNNTORCH = {
    "atan": [snntorch_surrogate.atan(), snntorch_surrogate.atan(3.7)],
    "fast_sigmoid": [snntorch_surrogate.fast_sigmoid(), snntorch_surrogate.fast_sigmoid(3.7)],
    "sigmoid": [snntorch_surrogate.sigmoid(), snntorch_surrogate.sigmoid(3.7)],
    "straight_through": [snntorch_surrogate.straight_through_estimator()],
    "triangular": [snntorch_surrogate.triangular(), snntorch_surrogate.triangular(3.7)],
    "heaviside": [snntorch_surrogate.heaviside()],
    "spike_rate_escape": [snntorch_surrogate.spike_rate_escape(), snntorch_surrogate.spike_rate_escape(3.7, 2.1)],
    "sparse_fast_sigmoid": [snntorch_surrogate.SFS(), snntorch_surrogate.SFS(3.7, 0.3)],
}
OWN_NUMBERS = {"spike_rate_escape": (3.7, 2.1), "sparse_fast_sigmoid": (3.7, 0.3)}


def torch_bits(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.float32
    different = a.view(torch.int32) != b.view(torch.int32)
    different &= ~(a.isnan() & b.isnan())
    assert not different.any(), f"{different.sum()} of {a.numel()} differ"


@pytest.mark.parametrize("name", sorted(STOCK_SNNTORCH))
def test_surrogates_are_snntorch_s_bit_for_bit(name):
    torch.manual_seed(0)
    z = torch.cat([torch.tensor([0.0, -0.0, 1.0, -1.0]), torch.randn(50_000) * 2])
    grad = torch.randn_like(z)
    for k, stock in enumerate(STOCK_SNNTORCH[name]):
        own = z.clone().requires_grad_(True)
        stock(own).backward(grad)
        numbers = dict(zip(SURROGATES[name].defaults, OWN_NUMBERS.get(name, (3.7,)), strict=False)) if k else {}
        torch_bits(Surrogate(name, tuple(numbers.items())).vjp(grad, z, torch.tensor(1.0)), own.grad)


STOCK_SINABS = {
    "single_exponential": (sa.SingleExponential, (0.3, 2.1)),
    "heaviside_window": (sa.Heaviside, (0.37,)),
    "gaussian": (sa.Gaussian, (0.1, 0.37, 2.1)),
    "multi_gaussian": (sa.MultiGaussian, (0.1, 0.37, 0.21, 5.5, 2.1)),
    "periodic_exponential": (sa.PeriodicExponential, (0.3, 2.1)),
}


@pytest.mark.parametrize("name", sorted(STOCK_SINABS))
def test_surrogates_are_sinabs_s_bit_for_bit(name):
    """sinabs takes the membrane itself: v and the threshold, where ours takes z = v - threshold."""
    torch.manual_seed(1)
    v = torch.randn(50_000) * 3
    threshold = torch.rand(50_000) + 0.3
    grad = torch.randn_like(v)
    cls, own = STOCK_SINABS[name]
    for numbers in ((), own):
        truth = grad * cls(*numbers)(v, threshold)
        given = dict(zip(SURROGATES[name].defaults, numbers, strict=False))
        torch_bits(Surrogate(name, tuple(given.items())).vjp(grad, v - threshold, threshold, v), truth)


# ---- raw forms ------------------------------------------------------------------------------------------------------

RAW_RANGES = {
    "value": (-2.0, 2.0),
    "clamped": (-0.5, 1.5),
    "exp_tau": (0.3, 30.0),
    "sigmoid": (-6.0, 6.0),
    "softplus": (-6.0, 6.0),
    "exp_dt_tau": (0.3, 30.0),
    "one_minus_inverse_tau": (1.1, 60.0),
    "one_minus_dt_rate": (0.05, 1.2),
    "one_minus_sigmoid": (-5.0, 2.0),
}
# For the raw forms with a dt; not a float32 number.
DT = 0.7


def test_the_tables_of_raw_forms_have_the_same_names():
    assert set(RAW) == set(RAW_RANGES)
    for name in RAW_FORMS:
        if name in RAW:
            from_raw(name, torch.ones(1), DT)
        else:
            with pytest.raises(NotImplementedError, match=name):
                from_raw(name, torch.ones(1))


@pytest.mark.parametrize("name", sorted(RAW_RANGES))
def test_raw_forms_in_torch_and_in_the_oracle(name):
    raw = np.random.default_rng(0).uniform(*RAW_RANGES[name], 500)
    raw = np.concatenate([raw, [0.0, 1.0]]) if name == "clamped" else raw
    tensor = torch.tensor(raw, requires_grad=True)
    from_raw(name, tensor, DT).sum().backward()
    assert_same(RAW[name].value(raw, DT), from_raw(name, tensor, DT).detach().numpy())
    assert_same(RAW[name].slope(raw, DT), tensor.grad.numpy())
    h, inner = 1e-6, np.abs(raw * (1 - raw)) > 1e-5
    slope = (RAW[name].value(raw + h, DT) - RAW[name].value(raw - h, DT)) / (2 * h)
    np.testing.assert_allclose(RAW[name].slope(raw, DT)[inner], slope[inner], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", sorted(RAW_RANGES))
def test_a_float32_value_is_as_close_as_the_raw_form_says(name):
    """`RawForm.error`, in unit roundoffs, bounds the float32 value of a float32 raw number."""
    torch.manual_seed(0)
    low, high = RAW_RANGES[name]
    raw = (torch.rand(200_000) * (high - low) + low).float()
    exact = RAW[name].value(raw.numpy().astype(np.float64), DT)
    found = from_raw(name, raw, DT).numpy().astype(np.float64)
    allowed = RAW[name].error(raw.numpy().astype(np.float64), DT) * 2.0**-24 * np.abs(exact)
    assert (np.abs(found - exact) <= allowed).all()
    if name not in ("value", "clamped"):
        assert np.abs(found - exact).max() > 0
        assert (RAW[name].error(raw.numpy().astype(np.float64), DT) < 64).all(), "a bound that allows anything"


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reset": "subtract", "reset_timing": "next_step_discards_input"}, "reset='subtract'"),
        ({"reset_timing": "same_step_residual", "reset_gradient": "membrane_stopped"}, "same_step_residual"),
        ({"spike_count": "smooth", "surrogate": Surrogate("triangular")}, "surrogate=triangular"),
        ({"spike_count": "smooth", "surrogate": None}, "surrogate=None"),
        ({"spike_count": "smooth", "reset_timing": "next_step_before_decay"}, "same step"),
        ({"spike_count": "smooth", "refractory": "hold", "refractory_steps": 2}, "same step"),
    ],
)
def test_combinations_without_equations_are_refused_by_name(changes, message):
    with pytest.raises(oracle.OracleError, match=message):
        oracle.equations(naive.lif_spec(0.9, 1.0).replace(**{"surrogate": Surrogate("atan"), **changes}))


def test_every_raw_form_has_equations():
    assert set(RAW_FORMS) == set(RAW_RANGES)
