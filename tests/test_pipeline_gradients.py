"""Gradients through sinabs, snnTorch, native and brainpy.state against a derivation by hand; training; twins."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from snntorch import surrogate
from torch import nn

pytest.importorskip("brainpy")

import jax

from tests import pipeline_by_hand as by_hand
from tests.pipeline_cases import leaky, lif, linear, native, sinabs_lif, stimulus
from tracetorch import adapters
from tracetorch.adapters import JaxStage, Pipeline

NAMES = ("sinabs", "snntorch", "native", "brainpy")


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def numbers(pipe):
    """Weights and parameters in float64, as the derivation takes them."""
    layers = []
    for k, name in enumerate(NAMES):
        matrix, neuron = pipe.stages[2 * k].module, pipe.stages[2 * k + 1].module
        value = {n: t.detach().double().numpy() for n, t in (*neuron.named_parameters(), *neuron.named_buffers())}
        if name == "sinabs":
            p = {"tau": value["tau_mem"]}
        elif name == "snntorch":
            p = {"beta": value["beta"]}
        elif name == "native":
            p = {n: getattr(neuron, n).detach().double().numpy() for n in ("beta", "threshold", "bias")}
        else:
            p = {**value, "dt": 1.0}
        layers.append((name, *(t.detach().double().numpy() for t in (matrix.weight, matrix.bias)), p))
    return layers


def errors(pipe, dtype):
    """max|difference| / max|gradient| of every tensor."""
    xs = stimulus(steps=60, batch=4, seed=3, dtype=dtype).requires_grad_()
    cotangent = stimulus(steps=60, batch=4, seed=4, dtype=dtype)
    ys = pipe(xs)
    (ys * cotangent).sum().backward()
    spikes, gradients, grad_x = by_hand.run(xs.detach().double().numpy(), numbers(pipe), cotangent.double().numpy())
    assert all(s.sum() > 20 and s.sum() < s.size - 20 for s in spikes), "every layer fires, and not always"
    assert np.array_equal(ys.detach().double().numpy(), spikes[-1])
    found = {"x": (xs.grad, grad_x)}
    for k, name in enumerate(NAMES):
        matrix, neuron = pipe.stages[2 * k].module, pipe.stages[2 * k + 1].module
        for own, truth in gradients[k].items():
            holder = matrix if own in ("weight", "bias") else neuron
            found[f"{name}.{own}"] = (getattr(holder, own).grad, truth)
    assert len(found) == 1 + 8 + 4
    return {n: float(np.abs(g.double().numpy() - t).max() / np.abs(t).max()) for n, (g, t) in found.items()}


def pipeline(dtype):
    stages = []
    for k, make in enumerate((sinabs_lif, leaky, native, lambda: JaxStage(lif(), dt=1.0, learn=["R"], dtype=dtype))):
        stages += [linear(seed=k), make()]
    return Pipeline(*stages).to(dtype)


def check_float32(pipe):
    found = errors(pipe, torch.float32)
    assert max(found.values()) < 1e-4, found


def test_gradients_in_float32():
    check_float32(pipeline(torch.float32))


def test_gradients_in_float64(x64):
    found = errors(pipeline(torch.float64), torch.float64)
    assert max(found.values()) < 1e-6, found


def test_a_wrong_gradient_would_be_seen():
    pipe = pipeline(torch.float32)
    pipe.stages[3].module.reset_delay = False  # a reset that is attached, and residual
    with pytest.raises(AssertionError):
        check_float32(pipe)


# ---- one neuron, every number ----------------------------------------------------------------------------------------


def neuron_by_hand(x, v, p, dt, hard, cotangent):
    """Spikes; gradients of x, of the first membrane v and of every number, by the equations of `docs/brainpy.md`."""
    th, below, e = p["V_th"], p["V_reset"], np.exp(-dt / p["tau"])
    rho, before, after, ys = th - below, [v], [], []
    for step in x:
        fired = before[-1] >= th
        after.append(before[-1] - (before[-1] - below if hard else rho) * fired)
        before.append(e * after[-1] + (1 - e) * (p["V_rest"] + p["R"] * step))
        ys.append(before[-1] >= th)
    g, grad_x, back = dict.fromkeys(p, 0.0), np.zeros_like(x), np.zeros_like(v)

    def through(spike, v):
        z = (v - th) / rho
        slope = spike * np.maximum(0.3 - 0.3 * np.abs(z), 0) / rho
        g["V_th"] -= (slope * (1 + z)).sum()
        g["V_reset"] += (slope * z).sum()
        return slope

    for t in reversed(range(len(x))):
        k = back + through(cotangent[t], before[t + 1])
        drive = p["V_rest"] + p["R"] * x[t]
        grad_x[t] = k * (1 - e) * p["R"]
        g["R"] += (k * (1 - e) * x[t]).sum()
        g["V_rest"] += (k * (1 - e)).sum()
        g["tau"] += (k * (after[t] - drive)).sum() * e * dt / p["tau"] ** 2
        fired = before[t] >= th
        g["V_reset"] += (k * e * fired).sum()
        g["V_th"] -= 0.0 if hard else (k * e * fired).sum()
        back = k * e + through(-k * e * ((before[t] - below) if hard else rho), before[t])
    return np.stack(ys), {"x": grad_x, "V": back, **g}


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_every_gradient_of_a_neuron_is_that_of_the_equations(hard, x64):
    """Also of the carried state, and of V_th and V_reset, which set the surrogate too."""
    learn = ["R", "tau", "V_th", "V_reset", "V_rest"]
    stage = JaxStage(lif("hard" if hard else "soft"), dt=0.5, dtype=torch.float64, learn=learn)
    xs = stimulus(steps=100, dtype=torch.float64).mul(2).requires_grad_()
    first = stimulus(steps=1, dtype=torch.float64, seed=2)[0].requires_grad_()
    cotangent = stimulus(steps=100, dtype=torch.float64, seed=1)
    stage.load_states({"V": first})
    ys = stage(xs)
    (ys * cotangent).sum().backward()
    numbers = {name: float(getattr(stage, name).detach()) for name in learn}
    arrays = (t.detach().numpy() for t in (xs, first))
    spikes, truth = neuron_by_hand(*arrays, numbers, 0.5, hard, cotangent.numpy())
    assert np.array_equal(ys.detach().numpy(), spikes)
    assert 50 < spikes.sum() < spikes.size - 50
    found = {"x": xs.grad, "V": first.grad, **{name: getattr(stage, name).grad for name in learn}}
    for name, gradient in found.items():
        error = np.abs(gradient.numpy() - truth[name]).max() / np.abs(truth[name]).max()
        assert error < 1e-11, (name, error)


# ---- training, and twins ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x = torch.from_numpy(data.data[:120] / 16.0).float()
    return x.expand(8, *x.shape).contiguous(), torch.from_numpy(data.target[:120])


def classifier():
    torch.manual_seed(0)
    sizes = (64, 32, 32, 32, 10)
    neurons = (sinabs_lif(), leaky(surrogate.atan()), native(size=32, learn_bias=False), lif(size=10))
    stages = []
    for k, neuron in enumerate(neurons):
        matrix = nn.Linear(sizes[k], sizes[k + 1])
        with torch.no_grad():
            matrix.weight.mul_(3.0)
        stages += [matrix, neuron]
    return Pipeline(*stages, dt=1.0)


def losses(pipe, digits, steps):
    """Of training all parameters but the neurons', whose raw forms may differ in a twin."""
    x, target = digits
    weights = [p for s in pipe.stages if isinstance(s.module, nn.Linear) for p in s.module.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.5, momentum=0.9)
    found = []
    for _ in range(steps):
        pipe.reset_states()
        loss = nn.functional.cross_entropy(pipe(x).mean(0) * 5, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_training_improves_it(digits):
    found = losses(classifier(), digits, 25)
    assert np.isfinite(found).all()
    assert found[-1] < 0.8 * found[0], found


TWINS = [(1, "tracetorch"), (7, "tracetorch")]
MORE = [(1, "snntorch"), (3, "tracetorch"), (3, "sinabs"), (5, "sinabs"), (5, "snntorch")]
MORE += [(7, "sinabs"), (7, "snntorch")]


@pytest.mark.parametrize(("place", "to"), [*TWINS, *(pytest.param(*pair, marks=pytest.mark.sweep) for pair in MORE)])
def test_a_converted_twin_leaves_the_loss_curve(digits, place, to):
    """Every loss of both is the same to rounding: no spike of theirs differs."""
    pipe = classifier()
    twin = copy.deepcopy(pipe)
    entering = Pipeline(*(s.module for s in list(pipe.stages)[:place]))(digits[0][:, :16]).detach()
    source = pipe.stages[place].module
    sample = entering.transpose(0, 1)
    if isinstance(source, JaxStage):
        source = JaxStage(source.to_jax(), dt=1.0, time_dim=1)
    conversion = adapters.convert(source, to=to, sample=sample, time_dim=1)
    assert conversion.report[0].forward in ("exact", "rounding")
    assert conversion.report[0].gradient in ("exact", "rounding", "reparametrised")
    assert conversion.report[0].spikes > 0
    pipe.reset_states()
    twin = twin.with_stage(place, conversion.model)
    steps = 6
    a, b = losses(pipe, digits, steps), losses(twin, digits, steps)
    assert np.allclose(a, b, rtol=2e-5, atol=0), (a, b)
    assert a[0] != a[-1]
