"""`tt.fuse`: the fused twin computes what the framework's own layer computes."""

from __future__ import annotations

import copy
import warnings

import norse.torch as no
import numpy as np
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation as sa
from spikingjelly.activation_based import neuron as sn

import tracetorch as tt
from tests.bits import assert_bits
from tests.fuse_cases import CASES, Case, leaky, run_sinabs
from tests.fuse_checks import EXACT, SIZES, assert_gradients, compare, fused_twin, marked, normal, run
from tracetorch.fused.sequence import FuseWarning

pytestmark = pytest.mark.usefixtures("poisoned")


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", marked(EXACT))
def test_twin_is_the_layer_bit_for_bit(name, size):
    case = CASES[name]
    T, B, N = size
    B = 2 if "Squeeze" in name else B
    own = compare(case, T, B, N)
    if T > 1 and case.spikes:
        spikes = torch.cat([one.outputs[0] for one in own])
        assert spikes.sum() > 0
        assert (spikes == 0).any()


@pytest.mark.parametrize("decay_input", [True, False])
def test_what_depends_on_a_parameter_alone_has_torchs_bits_at_any_value(decay_input):
    layer = sn.ParametricLIFNode(step_mode="m", decay_input=decay_input)
    fused = fused_twin(layer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        with torch.no_grad():
            layer.w.normal_(0.0, 2.0, generator=generator)
            xs = torch.randn((6, 1, 64), generator=generator) * 3
            with tt.backend("cpu"):
                ours = fused(xs)
            assert_bits(ours, layer(xs))
        assert_bits(fused.v, layer.v)


@pytest.mark.parametrize("name", marked(name for name, case in CASES.items() if not case.exact))
def test_twin_whose_step_has_an_exp_is_the_layer_within_rounding(name):
    case = CASES[name]
    layer = case.make(513)
    fused = tt.fuse(layer)
    assert "exp may round" in fused.fuse_report.rows[0].reason
    xs = normal(case, 40, 1, 513)
    (own, *_), expected = run(case, layer, xs, [40])
    with tt.backend("cpu"):
        (ours, *_), given = run(case, fused, xs, [40])
    assert own.outputs[0].sum() > 0
    assert_bits(ours.outputs[0], own.outputs[0])
    for state in own.states:
        torch.testing.assert_close(ours.states[state], own.states[state], rtol=1e-5, atol=1e-5)
    assert_gradients(given.values(), expected.values(), expected)


@pytest.mark.parametrize(
    "name", ["sinabs.LIF norm", "sinabs.IAF", "spikingjelly.LIFNode to 0.25", "spikingjelly.IFNode"]
)
def test_several_spikes_at_once_and_none(name):
    case = CASES[name]
    own = compare(Case(case.make, case.run, 8.0, 3.0), 63, 2, 7)
    counts = torch.cat([one.outputs[0] for one in own])
    assert (counts == 0).any()
    assert (counts > 1).any() == ("sinabs" in name)


# On a binary grid every value is exact, so that membranes meet thresholds exactly.
TIES = {
    "sinabs.LIF": Case(
        lambda n: sl.LIF(tau_mem=-1 / np.log(0.5), norm_input=False, spike_fn=sa.SingleSpike), CASES["sinabs.LIF"].run
    ),
    "sinabs.IAF": CASES["sinabs.IAF"],
    "sinabs.ALIF": Case(lambda n: sl.ALIF(tau_mem=1.0, tau_adapt=1.0, norm_input=False), run_sinabs),
    "snntorch.Leaky": leaky(beta=0.5, init_hidden=False),
    "snntorch.Leaky zero": leaky(beta=0.5, reset_mechanism="zero", reset_delay=False),
    "snntorch.Synaptic": Case(lambda n: snn.Synaptic(alpha=0.5, beta=0.5), CASES["snntorch.Synaptic"].run),
    "spikingjelly.LIFNode": CASES["spikingjelly.LIFNode"],
    "spikingjelly.IFNode": CASES["spikingjelly.IFNode"],
    "spikingjelly.ParametricLIFNode": CASES["spikingjelly.ParametricLIFNode"],
    "norse.IAFCell": CASES["norse.IAFCell"],
    "norse.LIFBoxCell": Case(
        lambda n: no.LIFBoxCell(no.LIFBoxParameters(tau_mem_inv=torch.tensor(0.5)), dt=1.0),
        CASES["norse.LIFBoxCell"].run,
    ),
}


@pytest.mark.parametrize("name", TIES)
def test_exact_threshold_ties(name):
    case = TIES[name]
    generator = torch.Generator().manual_seed(5)
    xs = torch.randint(-4, 13, (63, 2, 513), generator=generator) / 8
    own = compare(case, 63, 2, 513, xs)
    assert torch.cat([one.outputs[0] for one in own]).sum() > 0
    if name in ("snntorch.Leaky", "snntorch.Synaptic"):
        assert (torch.cat([one.outputs[-1] for one in own]) == 1).any()


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("name", ["snntorch.Leaky", "snntorch.Leaky hidden", "norse.LIFBoxCell"])
def test_unroll_either_way_round(name, time_dim):
    case = CASES[name]
    layer = case.make(7)
    by_hand, fused = copy.deepcopy(layer), fused_twin(layer)
    xs = normal(case, 20, 3, 7)
    own, _ = case.run(by_hand, xs, None)
    results = fused.unroll(xs if time_dim == 0 else xs.transpose(0, 1), time_dim)
    spikes = results if isinstance(results, torch.Tensor) else results[0]
    assert spikes.sum() > 0
    assert_bits(spikes if time_dim == 0 else spikes.transpose(0, 1), own.outputs[0])


@pytest.mark.parametrize("name", ["sinabs.IAF", "sinabs.ExpLeak", "snntorch.Leaky", "spikingjelly.LIFNode", "norse.LI"])
def test_more_dimensions_and_strided_input(name):
    case = CASES[name]
    layer = case.make(1)
    fused = fused_twin(layer)
    xs = normal(case, 12, 2, 3 * 4 * 5).reshape(12, 2, 3, 4, 5).transpose(2, 4)
    own, ours = case.run(layer, xs, None)[0], case.run(fused, xs, None)[0]
    for a, b in zip(ours.outputs, own.outputs, strict=True):
        assert_bits(a, b)


@pytest.mark.parametrize("name", ["sinabs.LIF single", "snntorch.Leaky", "spikingjelly.LIFNode", "norse.LIFBoxCell"])
def test_float64(name):
    case = CASES[name]
    layer = case.make(7)
    fused = fused_twin(layer)
    xs = normal(case, 30, 2, 7, torch.float64)
    own, ours = case.run(layer, xs, None)[0], case.run(fused, xs, None)[0]
    assert own.outputs[0].sum() > 0
    for a, b in zip(ours.outputs, own.outputs, strict=True):
        assert_bits(a, b)
    for state in own.states:
        assert_bits(ours.states[state], own.states[state])


@pytest.mark.parametrize("threshold", [1.0, 0.3])
def test_float32_within_float64_is_rounded_as_the_layer_rounds_it(threshold):
    layer = sl.LIF(tau_mem=5.0, norm_input=False, spike_threshold=torch.tensor(threshold))
    fused = fused_twin(layer)  # its spikes are float32, times a threshold of float32
    xs = normal(CASES["sinabs.LIF"], 30, 2, 7, torch.float64).transpose(0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FuseWarning)
        ours = fused(xs)
    assert float(ours.detach().max()) > 1  # several spikes a step
    assert_bits(ours, layer(xs))
    assert_bits(fused.v_mem, layer.v_mem)


def test_without_gradients_nothing_requires_them():
    for name in ("sinabs.LIF", "snntorch.Leaky hidden", "spikingjelly.LIFNode", "norse.Lift"):
        case = CASES[name]
        layer = case.make(7)
        fused = fused_twin(layer)
        xs = normal(case, 30, 2, 7)
        with torch.no_grad():
            own, ours = case.run(layer, xs, None)[0], case.run(fused, xs, None)[0]
        assert not ours.outputs[0].requires_grad
        assert_bits(ours.outputs[0], own.outputs[0])


@pytest.mark.parametrize("grad", [False, True])
def test_recordings_of_sinabs(grad):
    layer = sl.LIF(tau_mem=5.0, tau_syn=3.0, norm_input=False, min_v_mem=-0.5, record_states=True)
    fused = fused_twin(layer)
    xs = normal(CASES["sinabs.LIF"], 30, 2, 7).transpose(0, 1).contiguous().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        layer(xs)
        with tt.backend("cpu"):
            fused(xs)
    assert fused.recordings.keys() == layer.recordings.keys() == {"v_mem", "i_syn"}
    for name, series in layer.recordings.items():
        assert_bits(fused.recordings[name], series)
    assert_bits(fused.firing_rate, layer.firing_rate)
    if grad:
        expected = torch.autograd.grad(layer.recordings["v_mem"].square().sum(), xs)
        given = torch.autograd.grad(fused.recordings["v_mem"].square().sum(), xs)
        assert_gradients(given, expected, ["xs"])


# ---- source ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sinabs.LIF", "snntorch.Leaky", "spikingjelly.LIFNode", "norse.LIFBoxCell"])
def test_the_kernel_of_a_fused_layer_can_be_read(name):
    layer = tt.fuse(CASES[name].make(7))
    text = tt.fused.source(layer, "cpu", backward=True)
    assert text == tt.fused.source(layer, "cpu", backward=True)
    assert "void forward(" in text
    assert "void backward(" in text
    assert "void backward(" not in tt.fused.source(layer, "cpu")
    assert "def backward(" in tt.fused.source(layer, "triton", backward=True)
    assert "def backward(" not in tt.fused.source(layer, "triton")
    with pytest.raises(ValueError, match="not fused"):
        tt.fused.source(CASES[name].make(7), "cpu")


# ---- long ------------------------------------------------------------------------------------------------------------


@pytest.mark.sweep
@pytest.mark.parametrize("name", EXACT)
def test_ten_million_neuron_steps(name):
    case = CASES[name]
    T, B, N = 100, 4, 25_000
    layer = case.make(N)
    fused = fused_twin(layer)
    xs = normal(case, T, B, N)
    with torch.no_grad():
        own, ours = case.run(layer, xs, None)[0], case.run(fused, xs, None)[0]
    assert not case.spikes or own.outputs[0].sum() > 0
    for k, (a, b) in enumerate(zip(ours.outputs, own.outputs, strict=True)):
        assert_bits(a, b, f"output {k}")
    for state in own.states:
        assert_bits(ours.states[state], own.states[state], state)
