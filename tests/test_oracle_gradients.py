"""The oracle's gradients against the naive loops' forward-mode derivative, finite differences and the frameworks."""

import numpy as np
import pytest
import snntorch
import torch

from tests import naive
from tests.oracle_cases import (
    BETAS,
    CASES,
    SINABS_RESETS,
    SINABS_SPIKES,
    SINABS_WAYS,
    TAUS,
    THETAS,
    assert_same,
    case_name,
    case_spec,
    integrator_spec,
    lib_spec,
    ran,
    sinabs_layer,
    snntorch_run,
    stimulus,
)
from tracetorch import oracle


def recorded(spec, xs):
    """The oracle's own run as the recording of a subject in float64."""
    outputs, v, i = ran(spec, xs)
    return oracle.Recording(xs, outputs, {"v_mem": v, "i_syn": i} if "i_syn" in spec.states else {"v_mem": v}, spec)


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


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_gradients_of_sinabs_lif(case):
    spikes, reset, threshold_gradient, detached, way = case
    spec = case_spec(case)
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
