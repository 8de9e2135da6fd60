"""The stationary firing rate against simulation, and its shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tracetorch as tt
from tests import online_reference as reference

DECAYS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def simulated(current, decay, threshold, steps=2000, warm=1000):
    m, count = np.zeros_like(current), np.zeros_like(current)
    for k in range(steps):
        m = m * decay + current
        spike = m > threshold
        m = m - spike * threshold
        count += spike * (k >= warm)
    return count / (steps - warm)


def rate(current, decay, threshold, **kwargs):
    given = [torch.as_tensor(value, dtype=torch.float64) for value in (current, decay, threshold)]
    return tt.nn.stationary_rate(*given, **kwargs).numpy()


def between(decay, threshold, n=301):
    """Currents from where a neuron begins to fire to where it fires in every step."""
    return threshold * np.linspace(1 - decay, 1, n + 2)[1:-1]


def logistic(current, decay, threshold):
    """The simple formula to do better than."""
    half = threshold * decay / 2
    return 1 / (1 + np.exp(-3 * (current - threshold * (1 - decay / 2)) / half))


@pytest.mark.parametrize("threshold", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("decay", DECAYS)
def test_it_is_what_a_simulation_counts(decay, threshold):
    current = between(decay, threshold)
    counted = simulated(current, decay, threshold)
    error = np.abs(rate(current, decay, threshold) - counted).mean()
    simple = np.abs(logistic(current, decay, threshold) - counted).mean()
    assert 0.4 < counted.mean() < 0.6
    assert error < (0.05 if decay < 0.5 else 0.03 if decay < 0.7 else 0.017)
    assert error < 0.25 * simple


def test_the_mean_error_over_all():
    ours, simple = [], []
    for decay in np.linspace(0.5, 0.99, 5):
        current = between(decay, 1.0)
        counted = simulated(current, decay, 1.0)
        ours.append(np.abs(rate(current, decay, 1.0) - counted).mean())
        simple.append(np.abs(logistic(current, decay, 1.0) - counted).mean())
    assert np.mean(ours) < 0.016
    assert np.mean(simple) > 0.09


@pytest.mark.parametrize("n", [2, 3, 4, 7])
@pytest.mark.parametrize("decay", [0.3, 0.6, 0.9])
def test_without_softness_it_is_exact_in_the_middle_of_a_plateau(n, decay):
    """The currents that give the rate 1/n are an interval, whose ends are known for a rotation that contracts."""
    ends = [(1 - decay) * (1 + decay**k / (1 - decay**n)) for k in (n - 1, n)]
    middle = np.asarray(sum(ends) / 2)
    assert rate(middle, decay, 1.0, softness=1e-9) == pytest.approx(1 / n, rel=1e-6)
    assert simulated(middle[None], decay, 1.0, steps=2000 + n * 500, warm=2000)[0] == pytest.approx(1 / n, abs=1e-3)
    high = 2 - decay - middle
    assert rate(high, decay, 1.0, softness=1e-9) == pytest.approx(1 - 1 / n, rel=1e-6)


@pytest.mark.parametrize("decay", DECAYS)
def test_its_shape(decay):
    current = np.linspace(-20, 20, 4001)
    found = rate(current, decay, 1.0)
    assert ((found > 0) & (found < 1)).all()
    assert (np.diff(found) > 0).all()
    np.testing.assert_allclose(rate(7.3 * current, decay, 7.3), found, rtol=1e-9)
    np.testing.assert_allclose(rate(2 - decay - current, decay, 1.0), 1 - found, atol=1e-9)
    assert rate(1 - decay / 2, decay, 1.0) == pytest.approx(0.5)
    if decay >= 0.5:
        assert rate(1 - decay, decay, 1.0) < 0.25
        assert rate(1.0, decay, 1.0) > 0.75
        assert rate(1 - decay, decay, 1.0, softness=1e-6) < 0.07
    assert found[0] < 0.1 or decay < 0.5


@pytest.mark.parametrize("decay", DECAYS)
def test_its_slopes(decay):
    current = np.linspace(-3, 3, 61) + 0.0137
    tensors = [
        torch.tensor(current, requires_grad=True),
        torch.full((61,), decay, dtype=torch.float64, requires_grad=True),
        torch.full((61,), 1.3, dtype=torch.float64, requires_grad=True),
    ]
    slopes = torch.autograd.grad(tt.nn.stationary_rate(*tensors).sum(), tensors)
    value, *expected = reference.rate(current, decay, 1.3)
    np.testing.assert_allclose(rate(current, decay, 1.3), value, rtol=1e-10)
    for found, wanted in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-8, atol=1e-12)
    assert (slopes[0] > 0).all()
    assert torch.autograd.gradcheck(tt.nn.stationary_rate, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_give_finite_slopes(dtype):
    tiny = torch.finfo(dtype).eps
    for current in (-1e6, -1e3, -1.0, 0.0, 1.0, 1e3, 1e6):
        for decay in (1e-3, 0.5, 0.999, 1 - tiny):
            for threshold in (1e-4, 1.0, 1e6):
                given = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (current, decay, threshold)]
                found = tt.nn.stationary_rate(*given)
                assert 0 <= float(found.detach()) <= 1
                slopes = torch.autograd.grad(found, given)
                assert all(bool(torch.isfinite(slope)) for slope in slopes), (current, decay, threshold)
