"""The nearest of many levels: halving gives the bits of comparing with one level after the other."""

import numpy as np
import pytest
import torch
from snntorch.functional import quant

import tracetorch as tt
from tracetorch.core.spec import NeuronSpec, Parameter
from tracetorch.functional.levels import nearest_by_halving, well_spaced
from tracetorch.functional.quantizers import nearest_level
from tracetorch.functional.surrogates import Surrogate


def one_after_the_other(x, levels):
    """The first level of the smallest distance, as `snntorch.functional.quant.StateQuant` finds it."""
    distances = (torch.tensor(levels, dtype=x.dtype) - x.unsqueeze(-1)).abs()
    best, at = distances[..., 0].clone(), torch.zeros(x.shape, dtype=torch.long)
    for k in range(1, len(levels)):
        nearer = distances[..., k] < best
        best, at = torch.where(nearer, distances[..., k], best), torch.where(nearer, k, at)
    return torch.tensor(levels, dtype=x.dtype)[at]


def awkward(levels, dtype):
    """Around every level and every middle, far away where distances are equal by rounding, infinite, NaN."""
    generator = torch.Generator().manual_seed(0)
    known = torch.tensor(levels, dtype=dtype)
    places = torch.cat([known, (known[1:] + known[:-1]) / 2])
    up, down = torch.full_like(places, torch.inf), torch.full_like(places, -torch.inf)
    near = [places, torch.nextafter(places, up), torch.nextafter(places, down)]
    signs = torch.where(torch.rand(4000, generator=generator) < 0.5, -1.0, 1.0).to(dtype)
    end = 125 if dtype is torch.float32 else 1000
    exponents = torch.cat([torch.linspace(-end, end, 2000), torch.linspace(-3, 40, 2000)]).to(dtype)
    far = signs * torch.exp2(exponents + torch.rand(4000, generator=generator).to(dtype))
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    return torch.cat([*near, far, torch.randn(2000, generator=generator).to(dtype), ends])


def stock_levels(bits, dtype, **options):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        (cell,) = quant.state_quant(num_bits=bits, **options).__closure__
        return tuple(float(level) for level in cell.cell_contents)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize(
    "options",
    [{}, {"threshold": 0.7, "lower_limit": 0.3}, {"uniform": False}, {"uniform": False, "thr_centered": False}],
    ids=["uniform", "limits", "around the threshold", "around 0"],
)
def test_the_framework_s_levels(options, bits, dtype):
    levels = stock_levels(bits, dtype, **options)
    x = awkward(levels, dtype)
    assert well_spaced(levels)
    found = nearest_by_halving(x, levels)
    assert found.dtype is dtype
    assert torch.equal(found, one_after_the_other(x, levels))
    assert torch.equal(found, nearest_level(x, levels))


@pytest.mark.parametrize("count", [8, 9, 15, 16, 17, 100, 255, 257])
def test_any_count_of_uneven_levels(count):
    levels = tuple(np.sort(np.random.default_rng(count).standard_normal(count)).astype(np.float32).tolist())
    x = awkward(levels, torch.float32)
    assert torch.equal(nearest_by_halving(x, levels), one_after_the_other(x, levels))


# The distances to the first two are equal, rounded, for most x below 1/2: the first is the result.
CROWDED = (0.0, 2**-26, 1.0, 1.125, 2.0, 2.5, 2.75, 3.0)
SHUFFLED = (3.0, 1.0, 2.0, 2.5, 0.0, -1.0, -2.0, 0.5)


@pytest.mark.parametrize("levels", [CROWDED, SHUFFLED, CROWDED[::-1], (0.0, *SHUFFLED), (1.0,) * 8, (0.0, 1.0), (0.5,)])
def test_levels_that_cannot_be_halved(levels):
    x = awkward(levels, torch.float32)
    assert not well_spaced(levels)
    assert torch.equal(nearest_level(x, levels), one_after_the_other(x, levels))


def test_crowded_levels_would_differ():
    x = awkward(CROWDED, torch.float32)
    assert not torch.equal(nearest_by_halving(x, CROWDED), one_after_the_other(x, CROWDED))


def test_a_kernel_of_256_levels_is_short():
    """A cold build takes time by its statements: 5 a level, one after the other, and 2 by halving."""
    spec = NeuronSpec(
        form="snntorch.Leaky",
        comparison=">",
        reset="none",
        reset_timing="next_step_after_decay",
        reset_gradient="detached",
        surrogate=Surrogate("atan", (("alpha", 2.0),)),
        state_levels=stock_levels(8, torch.float32),
        parameters={n: Parameter(np.asarray(v, np.float32)) for n, v in (("mem_decay", 0.9), ("threshold", 1.0))},
    )
    source = tt.fused.source(tt.snn.SpecNeuron(spec), "cpu", backward=False)
    assert sum(line.lstrip().startswith("const float v") for line in source.splitlines()) < 600
