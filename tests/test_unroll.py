"""`tt.unroll`: exact is the step loop bit for bit, fast but for rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits
from tests.unroll_models import B, Net, Scale, T, assert_near, hard, loop
from tracetorch.functional import round_ste, stochastic_round_ste

pytestmark = pytest.mark.usefixtures("one_thread")


def dense():
    second = hard(21, tt.snn.SLIB)
    return tt.Sequential(nn.Linear(7, 33), hard(33), nn.Linear(33, 21), second, nn.Linear(21, 5), tt.snn.LI(5))


def smooth():
    return tt.Sequential(nn.Linear(7, 33), tt.snn.LIB(33), nn.Linear(33, 5), Scale(), tt.snn.DSRLITS(5))


def conv():
    return tt.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), hard(6, dim=-3), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 4, 3), hard(4, dim=1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 5), tt.snn.LI(5)),
    )


def channels_last():
    return conv().to(memory_format=torch.channels_last)


MODELS = {
    "dense": (dense, (B, 7)),
    "no batch": (dense, (7,)),
    "conv": (conv, (B, 2, 8, 8)),
    "conv channels_last": (channels_last, (B, 2, 8, 8)),
    "Net": (Net, (B, 1, 7)),
    "neurons first": (lambda: nn.Sequential(hard(7), tt.snn.DSLI(7), nn.Sequential(nn.Linear(7, 3))), (B, 7)),
    "one neuron": (lambda: hard(7), (B, 7)),
    "smooth": (smooth, (B, 7)),
    "stochastic": (
        lambda: nn.Sequential(nn.Linear(7, 9), tt.snn.LIT(9, quant_fn=stochastic_round_ste()), nn.Linear(9, 2)),
        (B, 7),
    ),
}


# A kernel's sigmoid is within 2 ulp of torch's: its bits are torch's in eager.
EAGER = ("smooth",)


def made(name, train=True):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().train(train)
    xs = torch.randn(T, *shape) + 0.4
    if name.endswith("channels_last"):
        xs = torch.stack([x.contiguous(memory_format=torch.channels_last) for x in xs])
    return model, xs


def spikes(model, xs):
    """How many spikes the hard layers give, so that a trace in which nothing fires proves nothing."""
    count = []
    for module in model.modules():
        if isinstance(module, tt.snn.LIB) and isinstance(module.quant_fn, round_ste):
            module.register_forward_hook(lambda m, i, o: count.append(int((o > 0).sum())))
    loop(model, xs)
    return sum(count)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_is_the_step_loop(name, train):
    """Outputs, final states, running statistics, random numbers, bit for bit; gradients but for the order of sums."""
    model, xs = made(name, train)
    twin = copy.deepcopy(model)
    inputs = [xs.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(1)
    stepped = loop(model, inputs[0])
    torch.manual_seed(1)
    with tt.backend("eager" if name in EAGER else "cpu"):
        found = tt.unroll(twin, inputs[1], fold="exact")
    assert_bits(found, stepped)
    assert tt.save_states(model).keys() == tt.save_states(twin).keys()
    for path, states in tt.save_states(model).items():
        for state, value in states.items():
            assert_bits(tt.save_states(twin)[path][state], value)
    for buffer, value in model.state_dict().items():
        assert_bits(twin.state_dict()[buffer], value)
    weights = torch.randn_like(stepped)
    (stepped * weights).sum().backward()
    (found * weights).sum().backward()
    assert_near(inputs[1].grad, inputs[0].grad)
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        assert_near(a.grad, b.grad, 1e-4)
    if name in ("dense", "conv", "Net"):
        assert spikes(copy.deepcopy(made(name)[0]), xs) > 50


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "stochastic"])
def test_fast_is_the_step_loop_but_for_rounding(name, time_dim):
    """Smooth layers, so that a rounding stays a rounding; in eval mode, where the dropout draws nothing."""
    if name == "no batch" and time_dim == 1:
        time_dim = -2  # [T, 7] has no other: the same dimension, counted from the end
    model, xs = made(name, train=False)
    for module in model.modules():
        if isinstance(module, tt.snn.LIB):
            module.quant_fn = nn.Identity()
        assert not isinstance(module, stochastic_round_ste)
    twin = copy.deepcopy(model)
    stepped = loop(model, xs)
    found = tt.unroll(twin, xs.movedim(0, time_dim), time_dim=time_dim)
    assert_near(found.movedim(time_dim, 0), stepped)
    for path, states in tt.save_states(model).items():
        for state, value in states.items():
            assert_near(tt.save_states(twin)[path][state], value)


@pytest.mark.parametrize("fold", ["fast", "exact"])
def test_kernels_and_chunks(fold):
    model, xs = made("dense")
    whole = tt.unroll(model, xs, fold=fold)
    for backend in ("cpu", "eager"):
        tt.reset_states(model)
        with tt.backend(backend):
            parts = torch.cat([tt.unroll(model, part, fold=fold) for part in (xs[:7], xs[7:8], xs[8:])])
        assert_near(parts, whole, 1e-4)


def test_exact_with_time_second_and_in_the_middle():
    model, xs = made("dense")
    stepped = loop(model, xs)
    for dim in (1, 2, -1):
        tt.reset_states(model)
        given = xs.movedim(0, dim).contiguous()
        by_hand = torch.stack([model(x) for x in given.unbind(dim)], dim)
        tt.reset_states(model)
        assert_bits(tt.unroll(model, given, time_dim=dim, fold="exact"), by_hand)
        assert by_hand.movedim(dim, 0).shape == stepped.shape


def test_what_unroll_refuses():
    model, xs = made("dense")
    with pytest.raises(ValueError, match=r"fold='sideways'.*'fast', 'exact'"):
        tt.unroll(model, xs, fold="sideways")
    with pytest.raises(ValueError, match="no time step"):
        tt.unroll(model, xs[:0])
    with pytest.raises(ValueError, match="time_dim=3"):
        tt.unroll(model, xs, time_dim=3)
    with pytest.raises(ValueError, match="num_neurons=7"):
        tt.unroll(nn.Sequential(nn.Linear(7, 9), hard(7)), xs)


def test_a_model_must_give_one_tensor():
    with pytest.raises(TypeError, match="tensor of one shape"):
        tt.unroll(nn.Sequential(nn.RNN(7, 2)), torch.randn(T, B, 7))
