"""The oracle's forward pass is that of naive scalar loops and of the frameworks in float64."""

import numpy as np
import pytest
import snntorch
import torch

from tests import naive
from tests.oracle_cases import (
    BETAS,
    RESETS,
    SINABS_RESETS,
    SINABS_SPIKES,
    SINABS_WAYS,
    SPIKES,
    TAUS,
    THETAS,
    WAYS,
    assert_same,
    integrator_spec,
    lib_spec,
    ran,
    sinabs_layer,
    snntorch_run,
    stimulus,
)
from tracetorch import oracle
from tracetorch.functional.surrogates import Surrogate

# ---- forward: the oracle is the naive loop ---------------------------------------------------------------------------


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
    """snnTorch's Leaky subtract with delay has rho = theta / beta."""
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


@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 1, 7), (5, 1, 513), (4, 3)])
def test_awkward_shapes(shape):
    xs = stimulus(9, shape, mean=1.2)
    outputs, mems = naive.columns(naive.snntorch_leaky, xs, {"beta": 0.9, "theta": 0.5})
    found, v, _ = ran(naive.leaky_spec(0.9, 0.5), xs)
    np.testing.assert_array_equal(found, outputs)
    assert_same(v, mems)
    assert (outputs > 0).any()


# ---- forward: the oracle is the framework in float64 -----------------------------------------------------------------


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


# ---- refusals --------------------------------------------------------------------------------------------------------


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
