"""The 32 native layers: against their float64 oracle, stepped, unrolled and through the kernel.

The oracle's own derivatives are checked against finite differences of its smooth form; nothing here is read from the
parts that the layers are made of.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tracetorch as tt
from tests.bits import assert_bits
from tests.native_cases import (
    FIRING,
    NAMES,
    B,
    N,
    T,
    assert_events,
    assert_near,
    letters,
    make,
    parameters_of,
    stimulus,
    values_of,
)
from tracetorch.oracle import native
from tracetorch.oracle.raw import RAW

pytestmark = pytest.mark.usefixtures("poisoned")


def kind_of(name, hard=True):
    prefix, family, ema = letters(name)
    return native.Native(family, "D" in prefix, "S" in prefix, "R" in prefix, ema, hard)


def form_of(parameter):
    """The raw form of a parameter."""
    if parameter.endswith(("alpha", "beta", "gamma")):
        return "sigmoid"
    return "softplus" if parameter.endswith("threshold") else "value"


# ---- the layers are their equations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "smooth"])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_its_oracle(name, hard):
    """Outputs, states after every step and the gradients of input and raw parameters, float64, T=200."""
    kind, values = kind_of(name, hard), values_of(name)
    layer, xs = make(name, hard), stimulus(T, B, N).requires_grad_()
    outputs, states = layer.trace(xs)
    tapes = native.run(kind, values, xs.detach().numpy())
    truth = np.stack([tape.output for tape in tapes])
    if name in FIRING and hard:
        assert_events(name, truth)
        assert np.array_equal(outputs.detach().numpy() != 0, truth != 0)
    assert_near(outputs.detach().numpy(), truth, 1e-12, "output")
    assert set(states) == set(tapes[0].new)
    for state, recorded in states.items():
        if not (family_is_binary(name) and state in ("neg_rec",)):  # outputs of one sign leave it at zero
            assert_near(recorded.detach().numpy(), np.stack([tape.new[state] for tape in tapes]), 1e-12, state)
    weights = stimulus(T, B, N, seed=1)
    (outputs * weights).sum().backward()
    gradients = native.backward(kind, values, tapes, weights.numpy())
    assert_near(xs.grad.numpy(), gradients["x"], 1e-10, "x")
    for parameter in parameters_of(name):
        raw = getattr(layer, f"raw_{parameter}")
        slope = RAW[form_of(parameter)].slope(raw.detach().numpy())
        expected = gradients[parameter].sum(0) * slope
        if family_is_binary(name) and parameter in ("neg_gamma", "neg_rec_weight"):
            assert (expected == 0).all()
            assert (raw.grad == 0).all()
        else:
            assert_near(raw.grad.numpy(), expected, 1e-9, parameter)


def family_is_binary(name):
    return letters(name)[1] == "LIB"


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_s_gradients_are_its_derivatives(name):
    """The hand-derived backward pass of the smooth form against central differences along random directions."""
    kind, values = kind_of(name, hard=False), values_of(name)
    rng = np.random.default_rng(7)
    xs, weights = rng.normal(0.15, 0.9, (30, B, N)), rng.normal(size=(30, B, N))
    gradients = native.backward(kind, values, native.run(kind, values, xs), weights)

    def loss(moved, x):
        return sum((tape.output * w).sum() for tape, w in zip(native.run(kind, moved, x), weights, strict=True))

    h = 1e-6
    for parameter in ("x", *values):
        target = xs if parameter == "x" else values[parameter]
        direction = rng.normal(size=target.shape)
        ends = []
        for sign in (h, -h):
            moved = {**values} if parameter == "x" else {**values, parameter: target + sign * direction}
            ends.append(loss(moved, xs + sign * direction if parameter == "x" else xs))
        found = (gradients[parameter] * direction).sum()
        assert found == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-6), parameter


def test_the_oracle_and_its_checkers_reject():
    values, xs = values_of("DSRLITS"), stimulus(40, B, N).numpy()
    kind = kind_of("DSRLITS", hard=False)
    truth = np.stack([tape.output for tape in native.run(kind, values, xs)])
    for wrong in (
        {**values, "pos_beta": values["neg_beta"]},
        {**values, "neg_gamma": values["pos_gamma"]},
        {**values, "bias": -values["bias"]},
    ):
        with pytest.raises(AssertionError):
            assert_near(np.stack([tape.output for tape in native.run(kind, wrong, xs)]), truth, 1e-12)
    for found in (truth[:-1], truth + 1e-6, np.where(truth > 0, np.nan, truth), np.zeros_like(truth)):
        with pytest.raises(AssertionError):
            assert_near(found, truth, 1e-9)
    with pytest.raises(AssertionError):
        assert_events("LIT", np.abs(truth))
    with pytest.raises(AssertionError):
        assert_events("LIB", np.zeros(100))


# ---- stepped, unrolled, and through the kernel -----------------------------------------------------------------------


def within_two_ulp(found, truth):
    found, truth = found.detach().numpy(), truth.detach().numpy()
    assert found.shape == truth.shape
    assert found.dtype == truth.dtype
    assert (np.abs(found - truth) <= 2 * np.spacing(np.abs(truth))).all()


def run_both(name, hard, dtype, shape, time_dim, dim=-1):
    """Step by step, unrolled, and unrolled by the kernel; layers, outputs and inputs."""
    n = shape[1:][dim]
    results = []
    for way in ("step", "unroll", "cpu"):
        layer = make(name, hard, n=n, dtype=dtype, dim=dim)
        xs = stimulus(*shape, dtype=dtype)
        xs = (xs if time_dim == 0 else xs.transpose(0, 1)).detach().requires_grad_()
        if way == "step":
            ys = torch.stack([layer(x) for x in xs.unbind(time_dim)], time_dim)
        else:
            with tt.backend("eager" if way == "unroll" else "cpu"):
                ys = layer.unroll(xs, time_dim)
        results.append((layer, xs, ys))
    return results


def compare(name, hard, results, dtype):
    """Bits where the arithmetic is + - * and a rounded sigmoid; else what two ulp of each sigmoid may have become."""
    (step, x0, y0), (unrolled, x1, y1), (fused, x2, y2) = results
    exact = hard or name not in FIRING
    assert_bits(y1, y0)
    for state in step.state_names:
        assert_bits(getattr(unrolled, state), getattr(step, state))
        a, b = getattr(fused, state), getattr(step, state)
        assert_bits(a, b) if exact else assert_close(a, b, dtype)
    assert_bits(y2, y0) if exact else assert_close(y2, y0, dtype)
    weights = stimulus(*y0.shape, seed=3, dtype=dtype)
    for ys in (y0, y1, y2):
        (ys * weights).sum().backward()
    for x in (x1, x2):
        assert_close(x.grad, x0.grad, dtype)
    for parameter, raw in step.named_parameters():
        for other in (unrolled, fused):
            assert_close(getattr(other, parameter).grad, raw.grad, dtype, parameter)


def assert_close(a, b, dtype, what=""):
    assert torch.isfinite(a).all(), what
    scale = float(b.detach().abs().max()) or 1.0
    error = float((a - b).detach().abs().max()) / scale
    assert error <= (1e-5 if dtype is torch.float32 else 1e-13), (what, error)


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "smooth"])
@pytest.mark.parametrize("name", NAMES)
def test_stepped_unrolled_and_fused_are_equal(name, hard):
    results = run_both(name, hard, torch.float32, (63, 2, 7), NAMES.index(name) % 2)
    if name in FIRING and hard:
        assert_events(name, results[0][2].detach())
    compare(name, hard, results, torch.float32)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 2, 513), (200, 3, 7), (40, 1, 300)])
@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "smooth"])
@pytest.mark.parametrize("name", NAMES)
def test_stepped_unrolled_and_fused_are_equal_at_awkward_sizes(name, hard, dtype, time_dim, shape):
    compare(name, hard, run_both(name, hard, dtype, shape, time_dim), dtype)


@pytest.mark.parametrize("name", ["LI", "DSLIEMA", "RLIB", "DSRLIB", "DLIT", "DSRLITS"])
def test_neurons_in_front_of_a_picture(name):
    """`dim=-3` on [T, B, C, H, W] is the layer with the channels last."""
    results = run_both(name, True, torch.float32, (40, 2, 6, 3, 4), 0, dim=-3)
    compare(name, True, results, torch.float32)
    last = make(name, dtype=torch.float32, n=6)
    ys = last.unroll(stimulus(40, 2, 6, 3, 4, dtype=torch.float32).movedim(-3, -1))
    assert_bits(results[0][2].movedim(-3, -1), ys)
