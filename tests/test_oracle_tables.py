"""Surrogates and raw forms, in torch and in the oracle: the two agree, and torch's have the frameworks' bits."""

import math
import random

import numpy as np
import pytest
import sinabs.activation as sa
import torch
from snntorch import surrogate as snntorch_surrogate

from tests.oracle_cases import CLOSE, assert_same
from tracetorch.core.raw import from_raw
from tracetorch.core.spec import RAW_FORMS
from tracetorch.functional.surrogates import SURROGATES, Surrogate
from tracetorch.oracle.raw import RAW
from tracetorch.oracle.surrogates import DERIVATIVES

# ---- surrogates ------------------------------------------------------------------------------------------------------

# sinabs and Norse compute these with a float32 pi, whatever the precision of the membrane; so do we, bit for bit.
FLOAT32_PI = ("gaussian", "multi_gaussian", "erfc")
SCALED_BY_THRESHOLD = ("single_exponential", "heaviside_window", "periodic_exponential")


def drawn(name, seed):
    """Random legal parameters of a surrogate."""
    generator = random.Random(f"{name} {seed}")
    defaults = SURROGATES[name].defaults
    return {key: default if seed == 0 else generator.uniform(0.2, 3.0) for key, default in defaults.items()}


def test_the_tables_of_surrogates_have_the_same_names():
    assert set(SURROGATES) == set(DERIVATIVES)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_surrogates_in_torch_and_in_the_oracle(name, seed):
    """In float64, at random points, at 0, and for negative thresholds where the formula has a meaning there."""
    generator = np.random.default_rng(seed)
    # 25 z must not overflow: there snnTorch's `sigmoid` is NaN by its own formula.
    z = np.concatenate([[0.0, -0.0, 1.0, -1.0, 0.5], generator.normal(0, 1.5, 2000)])
    low = 0.2 if name in SCALED_BY_THRESHOLD else -2.0
    threshold = generator.uniform(low, 2.0, z.shape)
    assert name in SCALED_BY_THRESHOLD or (threshold < 0).any()
    grad = generator.normal(size=z.shape)
    numbers = drawn(name, seed)
    surrogate = Surrogate(name, tuple(numbers.items()))
    found = surrogate.vjp(torch.tensor(grad), torch.tensor(z), torch.tensor(threshold))
    assert found.dtype == torch.float64
    truth = grad * DERIVATIVES[name](z, threshold, **numbers)
    assert_same(found.numpy(), truth, 1e-7 if name in FLOAT32_PI else CLOSE)
    if name != "zero":
        assert np.abs(truth).max() > 1e-4


@pytest.mark.parametrize("slope", [1.0, 4.0, 25.0])
def test_surrogates_are_the_slopes_of_the_functions_they_are_named_after(slope):
    """Finite differences of the smooth step of each surrogate that has one in closed form."""
    z, h = np.linspace(-1.0, 1.0, 41) + 0.0123, 1e-6
    steps = {
        "atan": (lambda z: np.arctan(math.pi / 2 * slope * z) / math.pi, {"alpha": slope}),
        "fast_sigmoid": (lambda z: z / (1 + slope * np.abs(z)), {"slope": slope}),
        "sigmoid": (lambda z: 1 / (1 + np.exp(-slope * z)), {"slope": slope}),
        "logistic": (lambda z: 1 / (1 + np.exp(-slope * z)), {"slope": slope}),
        "gaussian": (
            lambda z: np.array([0.5 * math.erf(v * slope / math.sqrt(2)) for v in z]),
            {"mu": 0.0, "sigma": 1 / slope, "grad_scale": 1.0},
        ),
        "straight_through": (lambda z: z, {}),
    }
    for name, (step, numbers) in steps.items():
        truth = (step(z + h) - step(z - h)) / (2 * h)
        np.testing.assert_allclose(DERIVATIVES[name](z, np.ones(()), **numbers), truth, rtol=1e-5, atol=1e-8)


STOCK_SNNTORCH = {
    "atan": [snntorch_surrogate.atan(), snntorch_surrogate.atan(3.7)],
    "fast_sigmoid": [snntorch_surrogate.fast_sigmoid(), snntorch_surrogate.fast_sigmoid(3.7)],
    "sigmoid": [snntorch_surrogate.sigmoid(), snntorch_surrogate.sigmoid(3.7)],
    "straight_through": [snntorch_surrogate.straight_through_estimator()],
    "triangular": [snntorch_surrogate.triangular(), snntorch_surrogate.triangular(3.7)],
    "heaviside": [snntorch_surrogate.heaviside()],
    "spike_rate_escape": [snntorch_surrogate.spike_rate_escape(), snntorch_surrogate.spike_rate_escape(3.7, 2.1)],
    "sparse_fast_sigmoid": [snntorch_surrogate.SFS(), snntorch_surrogate.SFS(3.7, 0.3)],
}
OWN_NUMBERS = {"spike_rate_escape": (3.7, 2.1), "sparse_fast_sigmoid": (3.7, 0.3)}


def torch_bits(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.float32
    different = a.view(torch.int32) != b.view(torch.int32)
    different &= ~(a.isnan() & b.isnan())
    assert not different.any(), f"{different.sum()} of {a.numel()} differ"


@pytest.mark.parametrize("name", sorted(STOCK_SNNTORCH))
def test_surrogates_are_snntorch_s_bit_for_bit(name):
    torch.manual_seed(0)
    z = torch.cat([torch.tensor([0.0, -0.0, 1.0, -1.0]), torch.randn(50_000) * 2])
    grad = torch.randn_like(z)
    for k, stock in enumerate(STOCK_SNNTORCH[name]):
        own = z.clone().requires_grad_(True)
        stock(own).backward(grad)
        numbers = dict(zip(SURROGATES[name].defaults, OWN_NUMBERS.get(name, (3.7,)), strict=False)) if k else {}
        torch_bits(Surrogate(name, tuple(numbers.items())).vjp(grad, z, torch.tensor(1.0)), own.grad)


STOCK_SINABS = {
    "single_exponential": (sa.SingleExponential, (0.3, 2.1)),
    "heaviside_window": (sa.Heaviside, (0.37,)),
    "gaussian": (sa.Gaussian, (0.1, 0.37, 2.1)),
    "multi_gaussian": (sa.MultiGaussian, (0.1, 0.37, 0.21, 5.5, 2.1)),
    "periodic_exponential": (sa.PeriodicExponential, (0.3, 2.1)),
}


@pytest.mark.parametrize("name", sorted(STOCK_SINABS))
def test_surrogates_are_sinabs_s_bit_for_bit(name):
    """sinabs takes the membrane itself: v and the threshold, where ours takes z = v - threshold."""
    torch.manual_seed(1)
    v = torch.randn(50_000) * 3
    threshold = torch.rand(50_000) + 0.3
    grad = torch.randn_like(v)
    cls, own = STOCK_SINABS[name]
    for numbers in ((), own):
        truth = grad * cls(*numbers)(v, threshold)
        given = dict(zip(SURROGATES[name].defaults, numbers, strict=False))
        torch_bits(Surrogate(name, tuple(given.items())).vjp(grad, v - threshold, threshold, v), truth)


# ---- raw forms -------------------------------------------------------------------------------------------------------

RAW_RANGES = {
    "value": (-2.0, 2.0),
    "clamped": (-0.5, 1.5),
    "exp_tau": (0.3, 30.0),
    "sigmoid": (-6.0, 6.0),
    "softplus": (-6.0, 6.0),
    "exp_dt_tau": (0.3, 30.0),
    "one_minus_inverse_tau": (1.1, 60.0),
    "one_minus_dt_rate": (0.05, 1.2),
    "one_minus_sigmoid": (-5.0, 2.0),
}
# For the raw forms with a dt; not a float32 number.
DT = 0.7


def test_the_tables_of_raw_forms_have_the_same_names():
    assert set(RAW) == set(RAW_RANGES)
    for name in RAW_FORMS:
        if name in RAW:
            from_raw(name, torch.ones(1), DT)
        else:
            with pytest.raises(NotImplementedError, match=name):
                from_raw(name, torch.ones(1))


@pytest.mark.parametrize("name", sorted(RAW_RANGES))
def test_raw_forms_in_torch_and_in_the_oracle(name):
    raw = np.random.default_rng(0).uniform(*RAW_RANGES[name], 500)
    raw = np.concatenate([raw, [0.0, 1.0]]) if name == "clamped" else raw
    tensor = torch.tensor(raw, requires_grad=True)
    from_raw(name, tensor, DT).sum().backward()
    assert_same(RAW[name].value(raw, DT), from_raw(name, tensor, DT).detach().numpy())
    assert_same(RAW[name].slope(raw, DT), tensor.grad.numpy())
    h, inner = 1e-6, np.abs(raw * (1 - raw)) > 1e-5
    slope = (RAW[name].value(raw + h, DT) - RAW[name].value(raw - h, DT)) / (2 * h)
    np.testing.assert_allclose(RAW[name].slope(raw, DT)[inner], slope[inner], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", sorted(RAW_RANGES))
def test_a_float32_value_is_as_close_as_the_raw_form_says(name):
    """`RawForm.error`, in unit roundoffs, bounds the float32 value of a float32 raw number."""
    torch.manual_seed(0)
    low, high = RAW_RANGES[name]
    raw = (torch.rand(200_000) * (high - low) + low).float()
    exact = RAW[name].value(raw.numpy().astype(np.float64), DT)
    found = from_raw(name, raw, DT).numpy().astype(np.float64)
    allowed = RAW[name].error(raw.numpy().astype(np.float64), DT) * 2.0**-24 * np.abs(exact)
    assert (np.abs(found - exact) <= allowed).all()
    if name not in ("value", "clamped"):
        assert np.abs(found - exact).max() > 0
        assert (RAW[name].error(raw.numpy().astype(np.float64), DT) < 64).all(), "a bound that allows anything"


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_every_raw_form_has_equations():
    assert set(RAW_FORMS) == set(RAW_RANGES)
