"""What the judge must accept: the real frameworks, other orders of operations, float64, underflow, awkward shapes."""

import numpy as np
import pytest
import sinabs.activation as sa
import sinabs.layers as sl
import snntorch
import torch

import tracetorch as tt
from tests import naive
from tests.faulty_neurons import F32, drawn, judged, leaky32, leaky_spec, lif32, lif_spec, noise
from tracetorch import oracle
from tracetorch.functional.surrogates import Surrogate

STEPS, BATCH, NEURONS = 200, 4, 600


def snntorch_recording(reset, delay, seed):
    beta = torch.tensor(drawn(seed, NEURONS, low=-0.05, high=1.05))
    layer = snntorch.Leaky(
        beta=beta,
        threshold=torch.tensor(drawn(seed + 1, NEURONS, low=0.3, high=1.5)),
        graded_spikes_factor=torch.tensor(drawn(seed + 2, NEURONS, low=0.1, high=2.0)),
        reset_mechanism=reset,
        reset_delay=delay,
    )
    xs = noise(seed + 3, STEPS, BATCH, NEURONS)
    outputs, mems = [], []
    for x in torch.tensor(xs):
        spikes, mem = layer(x)
        outputs.append(spikes.numpy())
        mems.append(mem.numpy())
    spec = leaky_spec(
        beta.numpy(), layer.threshold.numpy(), g=layer.graded_spikes_factor.numpy(), reset=reset, delay=delay
    )
    return spec, oracle.Recording(xs, np.stack(outputs), {"v_mem": np.stack(mems)}, spec)


SPIKE_FNS = {"single": sa.SingleSpike, "multiple": sa.MultiSpike, "limited": sa.MaxSpike(2)}


def sinabs_recording(spikes, reset, norm_input, syn, min_v_mem, alphas, seed):
    tau = torch.tensor(drawn(seed, NEURONS, low=1.0, high=30.0))
    slow = torch.tensor(drawn(seed + 1, NEURONS, low=1.0, high=10.0)) if syn else None
    theta = torch.tensor(drawn(seed + 2, NEURONS, low=0.3, high=1.5))
    amount = torch.tensor(drawn(seed + 3, NEURONS, low=0.3, high=2.0)) if reset == "subtract a value" else None
    layer = sl.LIF(
        tau_mem=tau,
        tau_syn=slow,
        spike_threshold=theta,
        spike_fn=SPIKE_FNS[spikes],
        reset_fn=sa.MembraneReset(0.2) if reset == "reset" else sa.MembraneSubtract(amount),
        min_v_mem=min_v_mem,
        train_alphas=alphas,
        norm_input=norm_input,
        record_states=True,
    )
    xs = noise(seed + 4, STEPS, BATCH, NEURONS, mean=0.5 if norm_input else 0.1, deviation=4.0 if norm_input else 1.0)
    with torch.no_grad():
        outputs = layer(torch.tensor(xs).transpose(0, 1)).transpose(0, 1).contiguous().numpy()
    states = {name: state.transpose(0, 1).contiguous().numpy() for name, state in layer.recordings.items()}
    spec = lif_spec(
        layer.alpha_mem.detach().numpy() if alphas else tau.numpy(),
        theta.numpy(),
        spikes=(spikes, 2 if spikes == "limited" else None),
        reset=("reset", 0.2) if reset == "reset" else ("subtract", None if amount is None else amount.numpy()),
        norm_input=norm_input,
        syn=None if slow is None else layer.alpha_syn.detach().numpy() if alphas else slow.numpy(),
        min_v_mem=min_v_mem,
        raw="value" if alphas else "exp_tau",
    )
    return spec, oracle.Recording(xs, outputs, states, spec)


SNNTORCH = [(reset, delay) for reset in ("subtract", "zero", "none") for delay in (True, False)]
# spikes, reset, norm_input, synapse, clamp, train_alphas
SINABS = [
    ("single", "subtract", True, False, None, False),
    ("multiple", "subtract", True, False, -1.0, False),
    ("multiple", "subtract a value", False, True, None, False),
    ("limited", "subtract", False, False, -0.3, False),
    ("multiple", "reset", True, True, -0.5, False),
    ("single", "subtract a value", False, False, None, True),
    ("multiple", "subtract", True, True, None, True),
    ("limited", "reset", False, False, None, True),
    ("multiple", "subtract", False, False, -1.0, True),
    ("single", "subtract", True, False, -0.1, True),
]


def test_enough_is_judged():
    assert (len(SNNTORCH) + len(SINABS)) * STEPS * BATCH * NEURONS >= 5_000_000


def assert_accepted(spec, recording):
    verdict = oracle.judge(spec, recording)
    assert verdict.slots == STEPS * BATCH * NEURONS
    assert verdict.unexplained == 0, verdict
    assert verdict.state_violations == 0, verdict
    assert verdict.mismatches < 1e-5 * verdict.slots
    assert verdict.spikes > 0.03 * verdict.slots


@pytest.mark.parametrize("case", SNNTORCH, ids=lambda case: f"{case[0]}, delay {case[1]}")
def test_the_real_snntorch_is_accepted(case):
    spec, recording = snntorch_recording(*case, seed=100)
    assert_accepted(spec, recording)


@pytest.mark.parametrize("case", SINABS, ids=lambda case: ", ".join(map(str, case)))
def test_the_real_sinabs_is_accepted(case):
    spec, recording = sinabs_recording(*case, seed=200)
    assert_accepted(spec, recording)
    if case[0] != "single":
        assert recording.outputs.max() > 1
    if case[4] is not None:
        assert (recording.states["v_mem"] == F32(case[4])).mean() > 0.01


def test_another_order_of_operations_is_accepted():
    """The same neuron in sinabs's convention, theta / alpha in the spike's own step, against snnTorch's equations."""
    xs = noise(30, STEPS, BATCH, NEURONS)
    beta, theta = drawn(31, NEURONS, low=0.3, high=0.99), drawn(32, NEURONS, low=0.3, high=1.5)
    v, outputs, vs = torch.zeros(BATCH, NEURONS), [], []
    for x in torch.tensor(xs):
        v = x + v * torch.tensor(beta)
        s = (v > torch.tensor(theta)).float()
        v = v - s * (torch.tensor(theta) / torch.tensor(beta))
        outputs.append(s.numpy())
        vs.append(v.numpy())
    outputs, vs = np.stack(outputs), np.stack(vs)
    source = leaky_spec(beta, theta)
    own = lif_spec(beta, theta, spikes=("strict", None), reset=("over_alpha", None), norm_input=False)
    verdict = judged(source, xs, outputs, {"v_mem": vs}, own=own)
    assert verdict.ok, verdict
    assert verdict.max_state_error > 0
    spikes, _ = leaky32(xs, beta, theta)
    assert (spikes != outputs).sum() < 100, "and the free runs hardly part"


@pytest.mark.parametrize("case", SNNTORCH, ids=lambda case: f"{case[0]}, delay {case[1]}")
def test_a_subject_in_float64_is_accepted(case):
    """It rounds as well, only finer; the oracle's own roundings are of that size."""
    reset, delay = case
    layer = snntorch.Leaky(
        beta=torch.tensor(drawn(40, 50)), threshold=torch.tensor(drawn(41, 50)) + 0.3, reset_mechanism=reset
    ).double()
    layer.reset_delay = delay
    xs = noise(42, 100, 10, 50).astype(np.float64)
    outputs, mems = zip(*(layer(x) for x in torch.tensor(xs)), strict=True)
    spec = naive.leaky_spec(layer.beta.numpy(), layer.threshold.numpy(), reset=reset, delay=delay)
    verdict = judged(spec, xs, torch.stack(outputs).numpy(), {"v_mem": torch.stack(mems).numpy()})
    assert verdict.ok, verdict
    assert verdict.spikes > 1000


@pytest.mark.parametrize("alphas", [True, False])
def test_a_clamped_subject_in_float64_is_accepted(alphas):
    layer = sl.LIF(
        tau_mem=torch.tensor(drawn(43, 50, low=1, high=20)), min_v_mem=-1.0, train_alphas=alphas, record_states=True
    ).double()
    xs = noise(44, 100, 10, 50, deviation=4.0).astype(np.float64)
    with torch.no_grad():
        outputs = layer(torch.tensor(xs).transpose(0, 1)).transpose(0, 1).numpy()
    decay = (layer.alpha_mem if alphas else layer.tau_mem).detach().numpy()
    spec = naive.lif_spec(decay, 1.0, min_v_mem=-1.0, raw="value" if alphas else "exp_tau")
    verdict = judged(spec, xs, outputs, {"v_mem": layer.recordings["v_mem"].transpose(0, 1).numpy()})
    assert verdict.ok, verdict


def test_a_float64_fault_is_seen():
    """The bound of float64 is that much finer, too."""
    xs = noise(45, 60, 4, 7).astype(np.float64)
    spec = naive.leaky_spec(0.9, 1.0)
    spikes, mems = naive.columns(naive.snntorch_leaky, xs, {"beta": 0.9, "theta": 1.0})
    mems[30, 2, 3] *= 1 + 1e-13
    assert judged(spec, xs, spikes, {"v_mem": mems}).state_violations >= 1


def test_float32_spikes_of_a_float64_membrane_are_accepted():
    xs = (np.random.default_rng(46).integers(0, 9, (16, 4, 7)) / 8).astype(np.float64)
    spikes, mems = naive.columns(naive.snntorch_leaky, xs, {"beta": 0.5, "theta": 1.0})
    assert judged(naive.leaky_spec(0.5, 1.0), xs, spikes.astype(F32), {"v_mem": mems}).ok


@pytest.mark.parametrize("amount", [None, 0.5])
def test_a_count_at_a_rounded_multiple_of_the_threshold_is_explained(amount):
    """sinabs divides in float32: v = round(k theta) gives k, although k theta itself may lie above v."""
    theta = drawn(47, 4000, low=0.3, high=1.5)
    multiples = np.arange(2, 8, dtype=F32)[:, None]
    xs = (multiples * theta)[None]  # one step: the membrane is the input
    outputs, _ = lif32(xs, 0.9, theta, norm_input=False)
    below = outputs[0] * theta.astype(np.float64) > xs[0]
    assert (outputs[0] == multiples).mean() > 0.9
    assert below.sum() > 1000
    layer = sl.LIF(
        tau_mem=torch.tensor(5.0),
        spike_threshold=torch.tensor(theta),
        reset_fn=sa.MembraneSubtract(amount),
        train_alphas=True,
        norm_input=False,
        record_states=True,
    )
    with torch.no_grad():
        stock = layer(torch.tensor(xs).transpose(0, 1)).transpose(0, 1).numpy()
    np.testing.assert_array_equal(stock, outputs)
    spec = lif_spec(layer.alpha_mem.detach().numpy(), theta, reset=("subtract", amount), norm_input=False)
    verdict = judged(spec, xs, stock, {"v_mem": layer.recordings["v_mem"].transpose(0, 1).numpy()})
    assert verdict.ok, verdict
    assert verdict.explained > 500


@pytest.mark.parametrize("bias", [0.0, 0.3, -5.0, 20.0])
def test_the_native_lib_is_accepted(bias):
    """Through sigmoid and softplus; with a bias, the spike test adds up numbers larger than the membrane."""
    count = 2000
    layer = tt.snn.LIB(
        count,
        beta=torch.tensor(drawn(48, count, low=0.3, high=0.99)),
        threshold=torch.tensor(drawn(49, count, low=0.3, high=1.5)) + max(bias, 0.0),
        bias=bias,
        quant_fn=tt.functional.round_ste(),
    )
    xs = noise(50, 100, 2, count, mean=min(bias, 0.0) * -0.3 + 0.2)
    with torch.no_grad():
        outputs, states = layer.trace(torch.tensor(xs))
    spec = naive.leaky_spec(0.9, 1.0).replace(
        form="tracetorch.LIB",
        reset_timing="same_step",
        reset_gradient="attached",
        surrogate=Surrogate("logistic"),
        parameters={
            "mem_decay": naive.parameter(layer.raw_beta.detach().numpy(), F32, raw="sigmoid"),
            "threshold": naive.parameter(layer.raw_threshold.detach().numpy(), F32, raw="softplus"),
            "bias": naive.parameter(layer.raw_bias.detach().numpy(), F32),
        },
    )
    verdict = judged(spec, xs, outputs.numpy(), {"v_mem": states["mem"].numpy()})
    assert verdict.spikes > 1000
    assert verdict.ok, verdict


def test_underflow_is_accepted():
    """Membranes that die out pass through the subnormal numbers."""
    xs = np.zeros((400, 1, 50), F32)
    xs[0] = drawn(51, 50)
    beta = drawn(52, 50, low=0.3, high=0.8)
    spikes, states = leaky32(xs, beta, 2.0)
    mems = states["v_mem"]
    assert ((np.abs(mems) > 0) & (np.abs(mems) < np.finfo(F32).tiny)).sum() > 100
    assert judged(leaky_spec(beta, 2.0), xs, spikes, states).ok


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (63, 1, 7), (2, 1, 513), (3, 2, 4, 5)])
def test_awkward_shapes_are_judged(shape):
    xs = noise(53, *shape, mean=1.0)
    spikes, states = leaky32(xs, 0.9, 0.2)
    spec = leaky_spec(0.9, 0.2)
    verdict = judged(spec, xs, spikes, states)
    assert verdict.ok
    assert verdict.slots == xs.size
    states["v_mem"].reshape(-1)[-1] += F32(1e-3)
    assert judged(spec, xs, spikes, states).first == (shape[0] - 1, tuple(size - 1 for size in shape[1:]))
