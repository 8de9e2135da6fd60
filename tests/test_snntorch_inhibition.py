"""snnTorch's `inhibition=True`: one winner among a layer's neurons; the same bits, judged, refused by name."""

import itertools
import warnings

import numpy as np
import pytest
import snntorch as snn
import torch
from snntorch import surrogate
from torch import nn

import tracetorch as tt
from tests.adapter_checks import assert_native_is_the_same, recorded, traced
from tracetorch import adapters, oracle
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.fused.layers import FuseWarning
from tracetorch.oracle import winner

B, N = 4, 5
CASES = [
    (name, mechanism, delay)
    for name, mechanism, delay in itertools.product(
        ("Leaky", "Synaptic", "Lapicque", "Alpha"), ("subtract", "zero", "none"), (True, False)
    )
    if delay or name in ("Leaky", "Synaptic")
]


def layer_of(name, mechanism="subtract", delay=True, **options):
    """A layer that learns all it can. Its constructor warns that the option is new."""
    torch.manual_seed(0)
    options = {"reset_mechanism": mechanism, "init_hidden": True, "learn_threshold": True, "inhibition": True} | options
    options = {"threshold": 0.5 + 0.5 * torch.rand(N), "spike_grad": surrogate.fast_sigmoid(3)} | options
    beta = 0.6 + 0.3 * torch.rand(N)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Inhibition is an unstable feature")
        if name == "Leaky":
            return snn.Leaky(beta, learn_beta=True, reset_delay=delay, **options)
        if name == "Synaptic":
            return snn.Synaptic(0.5, beta, learn_alpha=True, learn_beta=True, reset_delay=delay, **options)
        return snn.Lapicque(0.8, **options) if name == "Lapicque" else snn.Alpha(0.9, beta - 0.1, **options)


@pytest.mark.parametrize(("name", "mechanism", "delay"), CASES)
def test_native_computes_the_same_bits_and_the_oracle_agrees(name, mechanism, delay):
    layer = layer_of(name, mechanism, delay)
    spec = adapters.spec(layer)
    assert spec.inhibition == "winner"
    assert NeuronSpec.from_json(spec.to_json()) == spec
    xs = 0.3 + torch.randn(120, B, N)
    outputs, verdict = assert_native_is_the_same(layer, xs)
    assert verdict.spikes > 20
    assert int(outputs.sum(-1).max()) == 1


def test_the_winner_alone_emits_and_all_above_the_threshold_are_reset():
    """Two of three above 1; beta 1, so that what is left is what the reset leaves."""
    layer = layer_of("Leaky", threshold=1.0)
    layer.beta.data = torch.ones(N)
    xs = torch.tensor([[[1.5, 2.0, 0.5, 0.0, 0.0]], [[0.0] * N]])
    outputs, states, _, _ = traced(adapters.build(adapters.spec(layer), "tracetorch"), xs)
    assert outputs[0].tolist() == [[0, 1, 0, 0, 0]]
    assert states["v_mem"][1].tolist() == [[0.5, 1.0, 0.5, 0, 0]]


def test_of_equal_membranes_the_first_wins():
    layer = layer_of("Leaky", threshold=1.0)
    layer.beta.data = torch.full((N,), 0.5)
    spec, xs = adapters.spec(layer), torch.randint(-1, 3, (60, B, N)).float()
    outputs, states, _, _ = traced(layer, xs)
    assert oracle.judge(spec, recorded(xs, outputs, states, spec)).ok
    assert bool(((states["v_mem"] == states["v_mem"].amax(-1, keepdim=True)).sum(-1) > 1).any())
    last = outputs.flip(-1)  # the last of equal ones would have won in the mirrored run
    mirrored, kept, _, _ = traced(layer, xs.flip(-1))
    assert not torch.equal(mirrored, last)
    wrong = recorded(xs, mirrored.flip(-1), {"v_mem": kept["v_mem"].flip(-1)}, spec)
    assert oracle.judge(spec, wrong).unexplained > 0


@pytest.mark.parametrize("delay", [True, False])
def test_neurons_that_spike_each_by_itself_are_seen(delay):
    spec = adapters.spec(layer_of("Leaky", "subtract", delay))
    alone = adapters.build(spec.replace(inhibition="none"), "tracetorch")
    xs = 0.3 + torch.randn(60, B, N)
    outputs, states, _, _ = traced(alone, xs)
    assert oracle.judge(spec, recorded(xs, outputs, states, spec)).unexplained > 20


def test_the_oracle_explains_another_winner_only_within_the_bound():
    z = np.array([[1.0, 1.0 + 1e-7, 0.2]])
    for bound, spikes, ok in (
        (0.0, [0, 1, 0], True),
        (0.0, [1, 0, 0], False),
        (1e-6, [1, 0, 0], True),
        (1e-6, [1, 1, 0], False),
        (1e-6, [0, 0, 1], False),
        (1e-8, [1, 0, 0], False),
        (0.0, [0, 0, 0], False),
        (0.0, [0, 2, 0], False),
    ):
        b = np.full(z.shape, bound)
        fits = winner.explained(np.array([spikes], float), z, b, (z - b > 0) * 1.0, (z + b > 0) * 1.0)
        assert bool(fits.all()) == ok, (bound, spikes)


@pytest.mark.parametrize(("to", "stock"), [("tracetorch", False), ("snntorch", False), ("snntorch", True)])
def test_a_network_is_converted_exactly(to, stock):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, N), layer_of("Leaky"), nn.Linear(N, 4), snn.Leaky(0.8, init_hidden=True))
    xs = torch.randn(40, B, 6)
    result = tt.convert(net, to=to, sample=xs, time_dim=0, stock=stock)
    assert result.verify(xs, grad=True).ok
    assert [row.forward for row in result.report.rows] == ["exact"] * 4
    assert "inhibition=True" in str(result.report)


def test_no_kernel_has_a_winner_and_the_layer_says_so_once():
    native = adapters.build(adapters.spec(layer_of("Leaky")), "tracetorch")
    xs = torch.randn(20, B, N)
    with pytest.warns(FuseWarning, match="step by step: aten.argmax.default: is not pointwise"):
        ys = native.unroll(xs)
    native.reset_states()
    again = native.unroll(xs)  # a warning would be an error
    assert torch.equal(ys, again)
    assert float(ys.detach().sum()) > 0


def test_images_have_no_winner():
    native = adapters.build(adapters.spec(layer_of("Leaky", threshold=1.0)), "tracetorch")
    with pytest.raises(ValueError, match=r"inhibition='winner': one neuron of \[B, N\].*shape \[2, 3, 4, 5\]"):
        native(torch.rand(2, 3, 4, N))


@pytest.mark.parametrize(("to", "stock"), [("sinabs", False), ("brainpy", False), ("tracetorch", True)])
def test_a_framework_without_it_refuses(to, stock):
    pytest.importorskip(to)
    with pytest.raises(adapters.ConversionError, match=r"inhibition='winner'.*Remedy: to='tracetorch'"):
        adapters.build(adapters.spec(layer_of("Leaky", "zero")), to, stock=stock)


@pytest.mark.parametrize("to", ["spikingjelly", "norse"])
def test_no_stock_node_loses_it_in_silence(to):
    pytest.importorskip(to)
    with pytest.raises(adapters.ConversionError, match=r"inhibition='winner'.*Remedy: stock=False"):
        adapters.build(adapters.spec(layer_of("Leaky", "zero")), to, stock=True)


def test_a_factor_that_divides_only_the_reset_is_refused():
    """snnTorch 1.0.0 emits the winner's spike unscaled, and subtracts threshold / factor with reset_delay=False."""
    with pytest.raises(SpecError, match=r"spike_scale=0.5.*graded_spikes_factor=1, or reset_delay=True"):
        adapters.spec(layer_of("Leaky", delay=False, graded_spikes_factor=0.5))
    with pytest.raises(SpecError, match="needs spike_count='single'"):
        adapters.spec(snn.Leaky(0.9)).replace(spike_count="multiple", comparison=">=", inhibition="winner")
