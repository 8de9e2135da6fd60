"""Quantizers, time constants and surrogate spikes of `tt.functional`."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import tracetorch as tt
from tracetorch.functional import SURROGATES, Surrogate
from tracetorch.oracle.surrogates import DERIVATIVES


def test_stochastic_rounding_is_right_in_the_mean_and_passes_the_gradient():
    torch.manual_seed(0)
    x = torch.tensor([-1.3, -0.5, 0.0, 0.2, 0.75, 1.0], requires_grad=True)
    for step_size in (1.0, 0.4):
        quantizer = tt.functional.stochastic_round_ste(step_size)
        many = quantizer(x.expand(40_000, 6))
        levels = many.detach() / step_size
        assert torch.equal(levels, levels.round())
        assert ((many - x).abs() < step_size * (1 + 1e-6)).all(), "one of the two nearest"
        assert ((many.mean(0) - x).abs() < 0.015 * step_size).all()
        whole = (x / step_size) % 1 == 0
        assert (many[:, whole] == x[whole]).all(), "a multiple stays"
        if step_size == 1.0:
            assert set(many[:, 3].detach().unique().tolist()) == {0.0, 1.0}
    x.grad = None
    tt.functional.stochastic_round_ste()(x).backward(torch.arange(6.0))
    assert x.grad.tolist() == list(range(6))
    state = torch.get_rng_state()
    first = tt.functional.stochastic_round_ste()(x)
    torch.set_rng_state(state)
    assert torch.equal(tt.functional.stochastic_round_ste()(x), first)


def test_probabilistic_is_p_with_probability_p():
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], requires_grad=True)
    many = tt.functional.probabilistic_ste()(p.expand(40_000, 5))
    assert ((many == 0) | (many == p)).all()
    assert ((many.mean(0) - p**2).abs() < 0.01).all()
    assert (many[:, 2] > 0).any()
    assert (many[:, 2] == 0).any()
    tt.functional.probabilistic_ste()(p).backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    torch.testing.assert_close(p.grad, torch.tensor([0.0, 0.4, 3.0, 7.2, 10.0]))
    with pytest.raises(RuntimeError, match="p_in"):
        tt.functional.probabilistic_ste()(torch.tensor([1.5]))


@pytest.mark.parametrize("name", ["round_ste", "stochastic_round_ste"])
@pytest.mark.parametrize("step_size", [0.0, -1.0, math.nan, math.inf])
def test_a_step_size(name, step_size):
    with pytest.raises(ValueError, match=f"{name}: step_size .*{step_size!r}"):
        getattr(tt.functional, name)(step_size)


@pytest.mark.parametrize("quantizer", [tt.functional.stochastic_round_ste(0.5), tt.functional.probabilistic_ste()])
def test_layers_with_random_quantizers(quantizer):
    layer = tt.snn.LIB(50, threshold=0.5, quant_fn=quantizer)
    xs = torch.rand(20, 4, 50)
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with tt.backend("eager"):
            ys = twin.unroll(xs)
        assert 0 < (ys > 0).sum() < ys.numel()
        ys.sum().backward()
        assert all((parameter.grad != 0).all() for parameter in twin.parameters())


def test_decays():
    f = tt.functional
    assert f.halflife_to_decay(1.0) == 0.5
    assert f.halflife_to_decay(100) == pytest.approx(0.993092495437)
    assert f.decay_to_halflife(0.9) == pytest.approx(6.57881347896)
    assert f.timesteps_to_decay(10) == pytest.approx(0.9)
    assert f.decay_to_timesteps(0.99) == pytest.approx(100)
    for there, back, number in (
        (f.halflife_to_decay, f.decay_to_halflife, 7.3),
        (f.timesteps_to_decay, f.decay_to_timesteps, 7.3),
    ):
        assert isinstance(there(number), float)
        assert back(there(number)) == pytest.approx(number)
        tensor = torch.tensor([[1.5, number], [40.0, 3.0]], dtype=torch.float64, requires_grad=True)
        assert there(tensor).requires_grad
        torch.testing.assert_close(back(there(tensor)), tensor)
    trace = 0.0
    for _ in range(7):
        trace = f.halflife_to_decay(7.0) * (trace or 1.0)
    assert trace == pytest.approx(0.5)
    assert sum(f.timesteps_to_decay(5.0) ** k for k in range(1000)) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("halflife_to_decay", bad) for bad in (0.0, -1.0, math.inf, math.nan)),
        *(("timesteps_to_decay", bad) for bad in (1.0, 0.5, math.inf, math.nan)),
        *((name, bad) for name in ("decay_to_halflife", "decay_to_timesteps") for bad in (0.0, 1.0, 1.5, math.nan)),
    ],
)
def test_what_is_no_decay_is_named(name, bad):
    with pytest.raises(ValueError, match=f"{name}: .*must be"):
        getattr(tt.functional, name)(bad)
    with pytest.raises(ValueError, match=f"{name}: .*must be"):
        getattr(tt.functional, name)(torch.tensor([2.0 if "to_decay" in name else 0.5, bad]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_spike_is_a_step_with_the_named_gradient(name, dtype):
    z = torch.tensor([-1.2, -0.3, -1e-3, 0.0, 1e-3, 0.4, 1.7], dtype=dtype, requires_grad=True)
    spike = tt.functional.surrogate_spike(name, threshold=0.8)
    ys = spike(z)
    assert ys.dtype == dtype
    assert ys.tolist() == [0, 0, 0, 0, 1, 1, 1]
    ys.sum().backward()
    numbers = z.detach().double().numpy()
    truth = DERIVATIVES[name](numbers, 0.8, **dict(Surrogate(name).parameters))
    torch.testing.assert_close(z.grad.double(), torch.as_tensor(truth), rtol=1e-5, atol=1e-6)


def test_a_surrogate_spike_in_a_layer():
    layer = tt.snn.LIB(9, 0.8, spike_fn=tt.functional.surrogate_spike("fast_sigmoid", slope=10.0))
    assert "fast_sigmoid(slope=10)" in repr(layer)
    xs = torch.rand(30, 2, 9)
    with tt.backend("eager"):
        stepped = copy.deepcopy(layer).unroll(xs)
    with tt.backend("cpu"):
        fused = layer.unroll(xs)
    assert torch.equal(fused, stepped)
    assert set(fused.unique().tolist()) == {0.0, 1.0}
    fused.sum().backward()
    assert (layer.raw_beta.grad != 0).all()
    for bad, word in (({"name": "steps"}, "not known"), ({"name": "atan", "slope": 2.0}, "has no parameter 'slope'")):
        with pytest.raises(ValueError, match=word):
            tt.functional.surrogate_spike(**bad)
