"""`tt.nn.LIFNeuron`: its equation, its periods, its buffers."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits


def by_hand(currents, beta=0.9, threshold=1.0, reset=0.0):
    v, spikes, potentials = 0.0, [], []
    for current in currents:
        v = beta * v + current
        s = 1.0 if v > threshold else 0.0
        v = reset if s else v
        spikes.append(s)
        potentials.append(v)
    return spikes, potentials


@pytest.mark.parametrize(
    ("threshold", "beta", "reset"), [(1.0, 0.9, 0.0), (0.6, 0.5, -0.3), (2.0, 1.0, 0.5), (1.0, 0, 0)]
)
def test_it_is_its_equation(threshold, beta, reset):
    rng = np.random.default_rng(0)
    currents = rng.normal(0.4, 0.7, 200)
    neuron = tt.nn.LIFNeuron(threshold, beta, reset).double()
    found = [(float(neuron(float(current))), float(neuron.potential), float(neuron.spike)) for current in currents]
    spikes, potentials = by_hand(currents, beta, threshold, reset)
    assert 10 < sum(spikes) < 190
    assert [s for s, _, _ in found] == spikes == [s for _, _, s in found]
    np.testing.assert_allclose([v for _, v, _ in found], potentials, rtol=0, atol=1e-12)


@pytest.mark.parametrize("current", [0.09, 0.1001, 0.12, 0.2, 0.35, 0.9, 1.5])
def test_a_constant_input_fires_with_the_interval_of_the_equation(current):
    neuron = tt.nn.LIFNeuron().double()
    spikes = neuron.unroll(torch.full((400,), current, dtype=torch.float64))
    times = torch.nonzero(spikes).flatten().tolist()
    if current / (1 - 0.9) <= 1:
        assert times == []
        assert float(neuron.potential) == pytest.approx(current / 0.1)
        return
    k = math.floor(math.log(1 - (1 - 0.9) / current) / math.log(0.9)) + 1
    assert times == list(range(k - 1, 400, k))


def test_exactly_at_the_threshold_it_does_not_fire():
    neuron = tt.nn.LIFNeuron(threshold=1.0, beta=0.5)
    assert neuron(1.0).item() == 0.0
    assert neuron(0.5).item() == 0.0
    assert neuron(0.500001).item() == 1.0


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 4)])
def test_any_shape_and_the_state_dict(shape):
    neuron = tt.nn.LIFNeuron()
    assert {name: tensor.shape for name, tensor in neuron.state_dict().items()} == {
        "potential": (),
        "spike": (),
    }
    xs = torch.rand(20, *shape) * 0.6
    spikes = torch.stack([neuron(x) for x in xs])
    assert spikes.shape == xs.shape
    assert 0 < spikes.sum() < spikes.numel()
    assert neuron.potential.shape == neuron.spike.shape == shape
    other = tt.nn.LIFNeuron()
    other.load_state_dict(neuron.state_dict())
    assert_bits(other.potential, neuron.potential)
    assert_bits(other.spike, spikes[-1])
    twins = [other, copy.deepcopy(neuron), pickle.loads(pickle.dumps(neuron))]
    rest = neuron(xs[0])
    for twin in twins:
        assert_bits(twin(xs[0]), rest)
    neuron.reset_states()
    assert neuron.potential.shape == ()
    assert_bits(torch.stack([neuron(x) for x in xs]), spikes)
    if shape:
        with pytest.raises(ValueError, match=r"LIFNeuron: the state 'potential'.*reset_states"):
            neuron(torch.rand(7))


def test_unrolled_and_fused_it_is_the_same():
    xs = torch.rand(50, 2, 7) * 0.6
    stepped, eager, fused = (tt.nn.LIFNeuron() for _ in range(3))
    spikes = torch.stack([stepped(x) for x in xs])
    with tt.backend("eager"):
        assert_bits(eager.unroll(xs), spikes)
    with tt.backend("cpu"):
        assert_bits(fused.unroll(xs), spikes)
    assert spikes.sum() > 50
    for neuron in (eager, fused):
        assert_bits(neuron.potential, stepped.potential)


def test_it_trains_through_the_surrogate():
    """dL/dI of the sum of spikes: the linearisation with atan in the place of the step, and none through the reset."""
    current = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    neuron = tt.nn.LIFNeuron(surrogate=tt.functional.Surrogate("atan")).double()
    total = sum(neuron(current) for _ in range(30))
    total.backward()
    v = slope = truth = 0.0
    for _ in range(30):
        v, slope = 0.9 * v + 0.3, 0.9 * slope + 1
        truth += slope / (1 + (math.pi * (v - 1)) ** 2)
        if v > 1:
            v = slope = 0.0
    assert total.item() > 3
    assert current.grad.item() == pytest.approx(truth, rel=1e-12)


def test_the_functions_of_models_know_it():
    net = nn.Sequential(nn.Linear(3, 3), tt.nn.LIFNeuron())
    net(torch.ones(2, 3)).sum().backward()
    tt.detach_states(net)
    assert list(tt.save_states(net)["1"]) == ["potential", "spike"]
    tt.zero_states(net)
    assert net[1].potential.shape == (2, 3)
    tt.reset_states(net)
    assert "1.potential" in net.state_dict()


@pytest.mark.parametrize(
    "bad", [{"beta": 1.1}, {"beta": -0.1}, {"threshold": math.nan}, {"reset_potential": 2.0}, {"surrogate": "steps"}]
)
def test_what_it_refuses(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        tt.nn.LIFNeuron(**bad)
