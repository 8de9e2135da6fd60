"""Native layers step by step and unrolled: `LI`, `LIB`, a user's own."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tests import naive
from tests.bits import assert_bits
from tests.layer_cases import LAYERS, SMOOTH, Mine, hard, noise
from tracetorch.functional.surrogates import Surrogate

# ---- unroll ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 7), (63, 1, 7), (5, 2, 513), (20, 3, 1)])
@pytest.mark.parametrize("name", LAYERS)
def test_unroll_is_stepping(name, shape, time_dim):
    """Bit for bit, outputs and states, with both orders of the dimensions; through a kernel, a sigmoid is rounding."""
    a, xs = LAYERS[name](shape[-1]), noise(*shape)
    b, c = copy.deepcopy(a), copy.deepcopy(a)
    stepped = torch.stack([a(x) for x in xs])
    given = xs if time_dim == 0 else xs.transpose(0, 1)
    with tt.backend("eager"):
        unrolled = b.unroll(given, time_dim=time_dim)
    fused = c.unroll(given, time_dim=time_dim)
    assert unrolled.shape == fused.shape == given.shape
    assert_bits(unrolled if time_dim == 0 else unrolled.transpose(0, 1), stepped)
    alike = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6) if name in SMOOTH else assert_bits
    alike(fused if time_dim == 0 else fused.transpose(0, 1), stepped)
    for state in a.save_states():
        assert_bits(getattr(a, state), getattr(b, state))
        alike(getattr(a, state), getattr(c, state))
    if name == "LIB hard" and xs.numel() > 100:
        assert 0 < stepped.sum() < stepped.numel()


def test_unroll_over_no_step_changes_nothing():
    layer = hard(3)
    layer(noise(2, 3))
    state = layer.mem
    assert layer.unroll(torch.ones(0, 2, 3)).shape == (0, 2, 3)
    assert layer.unroll(torch.ones(2, 0, 3), time_dim=1).shape == (2, 0, 3)
    assert layer.mem is state


def test_a_batch_of_no_sample():
    layer = hard(3)
    assert layer.unroll(torch.ones(4, 0, 3)).shape == (4, 0, 3)
    assert layer.mem.shape == (0, 3)


def test_trace_records_the_states_after_every_step():
    layer, xs = Mine(3), noise(20, 2, 3)
    outputs, states = layer.trace(xs)
    assert list(states) == ["mem", "slow"]
    layer.reset_states()
    for t, x in enumerate(xs):
        assert_bits(layer(x), outputs[t])
        assert_bits(layer.mem, states["mem"][t])
        assert_bits(layer.slow, states["slow"][t])
    layer.reset_states()
    outputs, states = layer.trace(xs.transpose(0, 1), time_dim=1, states=("slow",))
    assert set(states) == {"slow"}
    assert states["slow"].shape == (2, 20, 3)
    assert_bits(states["slow"][:, -1], layer.slow)


def test_gradients_of_unroll_are_those_of_stepping():
    a, xs = tt.snn.LIB(7), noise(63, 2, 7)
    b = copy.deepcopy(a)
    inputs = [xs.clone().requires_grad_() for _ in range(2)]
    torch.stack([a(x) for x in inputs[0]]).square().sum().backward()
    b.unroll(inputs[1]).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-7)
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("time_dim", [0, 1])
def test_unroll_of_a_model(time_dim):
    torch.manual_seed(0)
    model = tt.Sequential(nn.Linear(4, 6), hard(6), nn.Sequential(nn.Linear(6, 3), tt.snn.LI(3)))
    xs = noise(25, 2, 4)
    stepped = torch.stack([model(x) for x in xs])
    model.reset_states()
    given = xs if time_dim == 0 else xs.transpose(0, 1)
    found = tt.unroll(model, given, time_dim=time_dim, fold="exact")
    assert found.shape == ((25, 2, 3) if time_dim == 0 else (2, 25, 3))
    assert_bits(found if time_dim == 0 else found.transpose(0, 1), stepped)


def test_unroll_of_a_model_names_what_it_cannot_do():
    model = tt.Sequential(nn.Linear(4, 3), hard(3))
    with pytest.raises(ValueError, match="fold='sideways'"):
        tt.unroll(model, noise(5, 2, 4), fold="sideways")
    with pytest.raises(ValueError, match="no time step"):
        tt.unroll(model, noise(0, 2, 4))
    with pytest.raises(ValueError, match="no time step"):
        tt.unroll(model, noise(2, 0, 4), time_dim=1)


# ---- the feature dimension -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "shape"), [(-3, (2, 7, 4, 5)), (1, (2, 7, 4, 5)), (-1, (2, 3, 7)), (-2, (2, 7, 3))])
@pytest.mark.parametrize("name", LAYERS)
def test_neurons_at_another_dimension(name, dim, shape):
    """Feature maps [B, C, H, W] with one neuron a channel: the same as with the channels last."""
    beta = torch.linspace(0.3, 0.95, 7)
    layer, last = LAYERS[name](7, beta=beta, dim=dim), LAYERS[name](7, beta=beta)
    xs = noise(20, *shape)
    place = dim if dim < 0 else dim + 1
    outputs = layer.unroll(xs)
    assert outputs.shape == xs.shape
    assert_bits(outputs.movedim(place, -1), last.unroll(xs.movedim(place, -1)))
    for state in layer.save_states():
        assert getattr(layer, state).shape == shape
        assert_bits(getattr(layer, state).movedim(dim, -1), getattr(last, state))
    outputs.sum().backward()
    assert all((parameter.grad != 0).any() for parameter in layer.parameters())


def test_a_single_sample_without_a_batch():
    layer, batched = hard(7), hard(7)
    xs = noise(30, 7)
    outputs = layer.unroll(xs)
    assert_bits(outputs, batched.unroll(xs[:, None])[:, 0])
    assert layer.mem.shape == (7,)
    assert outputs.sum() > 5


# ---- LIB is its equation ---------------------------------------------------------------------------------------------

BETA, THRESHOLD, BIAS = [0.5, 0.8, 0.95], [0.6, 1.0, 1.4], [0.2, 0.0, -0.3]


def double_lib(quantized):
    def array(values):
        return torch.tensor(values, dtype=torch.float64)

    return tt.snn.LIB(
        3,
        beta=array(BETA),
        threshold=array(THRESHOLD),
        bias=array(BIAS),
        quant_fn=tt.functional.round_ste() if quantized else None,
    )


@pytest.mark.parametrize("quantized", [True, False])
def test_lib_is_its_equation(quantized):
    layer, xs = double_lib(quantized), noise(60, 2, 3).double()
    outputs, states = layer.trace(xs)
    truth, mems = naive.columns(
        lambda x, beta, theta, bias: naive.tracetorch_lib(x, beta, theta, bias, hard=quantized),
        xs.numpy(),
        {"beta": BETA, "theta": THRESHOLD, "bias": BIAS},
    )
    np.testing.assert_allclose(outputs.detach().numpy(), truth, rtol=0, atol=1e-12)
    np.testing.assert_allclose(states["mem"].detach().numpy(), mems, rtol=0, atol=1e-12)
    if quantized:
        assert set(np.unique(truth)) == {0.0, 1.0}
        assert 30 < truth.sum() < truth.size - 30
    else:
        assert ((truth > 0.01) & (truth < 0.99)).sum() > 100


@pytest.mark.parametrize("quantized", [True, False])
def test_the_gradients_of_lib_are_the_derivatives_of_its_equation(quantized):
    layer, xs = double_lib(quantized), noise(40, 2, 3).double().requires_grad_()
    weights = noise(40, 2, 3, seed=1, mean=0).double()
    (layer.unroll(xs) * weights).sum().backward()
    numbers = {
        "beta": layer.raw_beta.detach().numpy(),
        "theta": layer.raw_threshold.detach().numpy(),
        "bias": layer.raw_bias.detach().numpy(),
    }

    def loop(x, beta, theta, bias):
        return naive.tracetorch_lib(x, naive.sigmoid(beta), naive.softplus(theta), bias, hard=quantized)

    for own, parameter in (("beta", layer.raw_beta), ("theta", layer.raw_threshold), ("bias", layer.raw_bias)):
        moved, _ = naive.columns(loop, xs.detach().numpy(), numbers, {own: 1.0})
        truth = (weights.numpy() * moved).sum((0, 1))
        np.testing.assert_allclose(parameter.grad.numpy(), truth, rtol=1e-9, atol=1e-11)
        assert np.abs(truth).max() > 0.1
    direction = noise(40, 2, 3, seed=2).double().numpy()
    moved, _ = naive.columns(loop, xs.detach().numpy(), numbers, {"x": direction})
    found = (xs.grad.numpy() * direction).sum(0)
    np.testing.assert_allclose(found, (weights.numpy() * moved).sum(0), rtol=1e-9, atol=1e-11)
    if quantized:
        return
    h = 1e-6  # without the quantizer the whole map is smooth

    def loss(x):
        return (weights.numpy() * naive.columns(loop, x, numbers)[0]).sum(0)

    x = xs.detach().numpy()
    slope = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    np.testing.assert_allclose(found, slope, rtol=1e-6, atol=1e-7)


def test_li_is_its_equation():
    layer, xs = tt.snn.LI(3, beta=torch.tensor(BETA, dtype=torch.float64)), noise(60, 2, 3).double()
    (truth,) = naive.columns(naive.leaky_integrator, xs.numpy(), {"decay": BETA})
    np.testing.assert_allclose(layer.unroll(xs).detach().numpy(), truth, rtol=0, atol=1e-12)
    np.testing.assert_allclose(layer.mem.detach().numpy(), truth[-1], rtol=0, atol=1e-12)


def test_a_hard_lib_spikes_above_its_threshold_and_not_at_it():
    """sigmoid(0) = 1/2 rounds to 0: a strict comparison, on exact ties."""
    layer = hard(3, beta=0.5, threshold=1.0)
    threshold = layer.threshold.detach()
    below = torch.nextafter(threshold, torch.tensor(0.0))
    for x, spike in ((threshold, 0.0), (below, 0.0), (threshold + 1e-6, 1.0), (threshold + 5, 1.0), (-threshold, 0.0)):
        layer.reset_states()
        assert (layer(x[None]) == spike).all(), x


def test_the_quantizer_rounds_to_even_and_passes_the_gradient():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 0.49, 0.51], requires_grad=True)
    y = tt.functional.round_ste()(x)
    assert y.tolist() == [-2.0, 0.0, 0.0, 2.0, 2.0, 0.0, 1.0]
    y.backward(torch.arange(7.0))
    assert x.grad.tolist() == list(range(7))
    y = tt.functional.round_ste(0.25)(torch.tensor([0.1, 0.13, 0.3, -0.4]))
    assert y.tolist() == [0.0, 0.25, 0.25, -0.5]


def test_heaviside_and_count():
    surrogate, one = Surrogate("straight_through"), torch.tensor(1.0)
    z = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 1.0, float("nan"), float("inf")], requires_grad=True)
    assert tt.functional.heaviside(z, one, surrogate).tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert tt.functional.heaviside(z, one, surrogate, strict=False).tolist() == [0, 1, 1, 1, 1, 0, 1]
    tt.functional.heaviside(z, one, surrogate).backward(torch.arange(7.0))
    assert z.grad.tolist() == list(range(7))
    v, theta = torch.tensor([-3.0, 0.0, 0.4, 0.5, 1.2, 1.5, 9.9]), torch.tensor(0.5)
    assert tt.functional.spike_count(v, theta, v - theta, surrogate).tolist() == [0, 0, 0, 1, 2, 3, 19]
    assert tt.functional.spike_count(v, theta, v - theta, surrogate, 2).tolist() == [0, 0, 0, 1, 2, 2, 2]


def test_time_constants():
    alpha = tt.functional.tau_to_alpha(10.0)
    assert alpha.item() == pytest.approx(np.exp(-0.1), rel=1e-6)
    assert tt.functional.tau_to_alpha(10.0, dt=0.5).item() == pytest.approx(np.exp(-0.05), rel=1e-6)
    tau = torch.tensor([0.5, 3.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(tt.functional.alpha_to_tau(tt.functional.tau_to_alpha(tau)), tau)
    torch.testing.assert_close(tt.functional.alpha_to_tau(tt.functional.tau_to_alpha(tau, 0.1), 0.1), tau)


# ---- a user's own layer ----------------------------------------------------------------------------------------------


class Beta(tt.snn.Layer):
    """A layer of a user's own, with one state."""

    def __init__(self, num_neurons, beta=0.9, dim=-1):
        super().__init__(num_neurons, dim)
        self.define_state("mem")
        self.define_decay("beta", beta, rank=1, learnable=True)

    def step(self, x, mem):
        mem = self.beta * mem + x
        return mem, mem


def test_a_user_s_layer():
    xs = noise(30, 2, 5)
    mine, stock = Beta(5, 0.8), tt.snn.LI(5, 0.8)
    assert_bits(mine.unroll(xs), stock.unroll(xs))
    mine.unroll(xs).sum().backward()
    assert (mine.raw_beta.grad != 0).all()
    model = tt.Sequential(nn.Linear(5, 5), mine)
    model.reset_states()
    assert mine.mem is None


def test_a_user_s_layer_of_any_shape_and_with_every_kind_of_parameter():
    class Free(tt.snn.Layer):
        def __init__(self):
            super().__init__()
            self.define_state("v")
            self.define_positive("scale", 2.0, learnable=False)
            self.define_parameter("shift", -1.0)

        def step(self, x, v):
            v = torch.maximum(v, x * self.scale + self.shift)
            return v * 2, v

    layer = Free()
    outputs = layer.unroll(noise(9, 2, 3, 4))
    assert outputs.shape == (9, 2, 3, 4)
    assert (outputs[1:] >= outputs[:-1]).all()
    assert layer.raw_shift.shape == ()
    assert [name for name, _ in layer.named_parameters()] == ["raw_shift"]
    with pytest.raises(ValueError, match="Free: the state 'v'"):
        layer(noise(2, 3))


def test_a_state_cannot_be_declared_twice():
    """The second would silently take the place of the first in every step."""
    layer = tt.snn.Layer(3)
    layer.define_state("mem")
    with pytest.raises((ValueError, KeyError), match="mem"):
        layer.define_state("mem")
