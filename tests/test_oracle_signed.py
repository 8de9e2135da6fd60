"""The oracle's own runs of spikes of two signs, against a plain loop over one neuron at a time."""

import numpy as np
import pytest
import torch

import tracetorch as tt
from tracetorch import oracle
from tracetorch.adapters.registry import adapter
from tracetorch.conformance import catalogue
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional import round_ste
from tracetorch.functional.surrogates import Surrogate

T, N = 60, 4
RNG = np.random.default_rng(0)
VARIANTS = {
    "plain": {},
    "inclusive": {"comparison": ">="},
    "a bias and scales": {"bias": [0.1, -0.2, 0.3, 0.0], "spike_scale": 1.5, "neg_scale": [0.5, 2.0, -1.25, 0.25]},
    "a synapse": {"syn_decay": 0.6},
    "smooth": {"spike_count": "smooth", "surrogate": Surrogate("logistic"), "neg_scale": 0.5, "bias": 0.1},
    "both at once": {"threshold": 0.25, "neg_threshold": -0.5},
}


def made(**options):
    values = {"mem_decay": 0.8, "threshold": [0.5, 0.75, 1.0, 1.5], "neg_threshold": [1.0, 0.5, 0.8, 0.3]}
    choices = {"form": "tracetorch.LIT", "comparison": ">", "surrogate": Surrogate("atan")}
    for name, value in options.items():
        (choices if isinstance(value, (str, Surrogate)) else values)[name] = value
    choices["synapse"] = "moving_average" if "syn_decay" in values else "none"
    return NeuronSpec(parameters={n: tt.Parameter(np.asarray(v, np.float64)) for n, v in values.items()}, **choices)


def one(spec, xs, k):
    """Neuron k alone: outputs, currents, membranes."""
    p = {n: float(np.broadcast_to(q.value, (N,))[k]) for n, q in spec.parameters.items()}
    v = i = 0.0
    rows = []
    for x in xs:
        i = p["syn_decay"] * i + (1 - p["syn_decay"]) * x if "syn_decay" in p else x
        u = p["mem_decay"] * v + i
        above = u - p["threshold"] + p.get("bias", 0.0)
        below = -p["neg_threshold"] - u - p.get("bias", 0.0)
        if spec.spike_count == "smooth":
            up, down = (1 / (1 + np.exp(-4 * z)) for z in (above, below))
        else:
            up, down = (float(z >= 0 if spec.comparison == ">=" else z > 0) for z in (above, below))
        v = u - up * p["threshold"] + down * p["neg_threshold"]
        rows.append((p.get("spike_scale", 1.0) * up - p.get("neg_scale", 1.0) * down, i, v))
    return np.array(rows).T


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_that_of_the_loop(variant):
    spec, xs = made(**VARIANTS[variant]), 1.5 * RNG.normal(size=(T, N))
    recording, eq, trace = oracle.simulate(spec, xs)
    for k in range(N):
        outputs, i, v = one(spec, xs[:, k], k)
        np.testing.assert_allclose(recording.outputs[:, k], outputs, rtol=0, atol=1e-12)
        np.testing.assert_allclose(recording.states["v_mem"][:, k], v, rtol=0, atol=1e-12)
        if "syn_decay" in spec.parameters:
            np.testing.assert_allclose(recording.states["i_syn"][:, k], i, rtol=0, atol=1e-12)
    np.testing.assert_allclose(eq.shown(trace.step.w), recording.outputs, rtol=0, atol=1e-12)
    judged = oracle.judge(spec, recording)
    assert judged.ok
    assert judged.mismatches == 0
    truth = oracle.expected(spec, recording)
    np.testing.assert_allclose(truth.w, trace.step.w, rtol=0, atol=1e-12)
    np.testing.assert_allclose(truth.states["v_mem"], recording.states["v_mem"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["plain", "a bias and scales"])
def test_spikes_are_read_off_outputs_and_followed(variant):
    spec, xs = made(**VARIANTS[variant]), 1.5 * RNG.normal(size=(T, N))
    recording, eq, trace = oracle.simulate(spec, xs)
    spikes = eq.fired(recording.outputs)
    assert eq.readable
    assert {-1.0, 0.0, 1.0} == set(np.unique(spikes))
    assert np.array_equal(spikes, trace.step.s)
    assert np.isnan(eq.fired(recording.outputs + 0.01)).all()
    other = spikes.copy()
    other[7] = np.where(spikes[7] == 1, -1, 1)
    followed, _, moved = oracle.simulate(spec, xs, other)
    assert np.array_equal(moved.step.s, other)
    assert not np.array_equal(followed.outputs[7], recording.outputs[7])


def test_outputs_that_two_spikes_give_cannot_be_read():
    for scales in ({"spike_scale": 1.0, "neg_scale": -1.0}, {"spike_scale": 0.0}, {"neg_scale": 0.0}):
        assert not oracle.two_signs(made(**scales)).readable


@pytest.mark.parametrize("name", ["signed-bias", "signed-scale", "signed-smooth"])
def test_rounding_drifts_by_no_more_than_is_said(name):
    """A float32 run that fires the same spikes stays within the drift, which is far below a threshold."""
    case = catalogue()[name]
    spec = case.spec.replace(form="tracetorch.LIT")
    layer = tt.snn.SpecNeuron(spec)
    outputs, states = layer.trace(torch.from_numpy(case.x.copy()))
    recording, eq, _ = oracle.simulate(spec, case.x.astype(np.float64))
    assert np.array_equal(np.sign(outputs.detach().numpy()), np.sign(recording.outputs)) or name == "signed-smooth"
    of_u, of_v, others = oracle.drift(spec, recording, eq, *oracle.roundoff(case.x.dtype))
    assert (np.abs(states["v_mem"].detach().numpy() - recording.states["v_mem"]) <= of_v).all()
    assert max(of_u.max(), of_v.max()) < 1e-3 or name == "signed-smooth"
    for state, bound in others.items():
        assert (np.abs(states[state].detach().numpy() - recording.states[state]) <= bound).all()


def test_what_has_no_equations_on_its_own_is_refused():
    composition = adapter("tracetorch").described(tt.snn.DSRLIT(3, quant_fn=round_ste()))
    with pytest.raises(oracle.OracleError, match=r"DSRLIT.*along a recording"):
        oracle.simulate(composition, np.ones((3, 2, 3)))
    with pytest.raises(oracle.OracleError, match="reset_gradient"):
        oracle.simulate(made(reset_gradient="detached"), np.ones((3, 2, N)))
