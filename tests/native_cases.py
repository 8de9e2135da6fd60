"""The 32 native layers by name: their letters, parameters and values, and how two results are compared."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import torch

import tracetorch as tt
from tracetorch.functional import round_ste

NAMES = [
    *("LI", "DLI", "SLI", "DSLI", "LIEMA", "DLIEMA", "SLIEMA", "DSLIEMA"),
    *("LIB", "DLIB", "SLIB", "RLIB", "DSLIB", "DRLIB", "SRLIB", "DSRLIB"),
    *("LIT", "DLIT", "SLIT", "RLIT", "DSLIT", "DRLIT", "SRLIT", "DSRLIT"),
    *("LITS", "DLITS", "SLITS", "RLITS", "DSLITS", "DRLITS", "SRLITS", "DSRLITS"),
]
FIRING = [name for name in NAMES if "LIB" in name or "LIT" in name]
T, B, N = 200, 2, 5


def letters(name):
    """("DSR", "LITS", ema) from a name."""
    prefix, family = name[: name.index("LI")], name[name.index("LI") :]
    return prefix, family.removesuffix("EMA"), family.endswith("EMA")


def parameters_of(name):
    """The names of a layer's parameters in the order of its arguments."""
    prefix, family, _ = letters(name)
    signs = ["pos_", "neg_"] if "D" in prefix else [""]
    names = [s + d for d, letter in (("alpha", "S"), ("beta", ""), ("gamma", "R")) for s in signs if letter in prefix]
    names += {"LI": [], "LIB": ["threshold", "bias"]}.get(family, ["pos_threshold", "neg_threshold", "bias"])
    names += ["pos_scale", "neg_scale"] if family == "LITS" else []
    return names + [f"{s}rec_weight" for s in signs if "R" in prefix]


RANGES = MappingProxyType(
    {
        "alpha": (0.2, 0.8),
        "beta": (0.6, 0.95),
        "gamma": (0.3, 0.9),
        "threshold": (0.5, 1.3),
        "bias": (-0.2, 0.2),
        "scale": (0.5, 2.0),
        "rec_weight": (-0.7, 0.7),
    }
)


def values_of(name, n=N, seed=0):
    """Parameter values by name, float64 [n], different for every neuron, sign and parameter."""
    rng = np.random.default_rng([seed, NAMES.index(name)])
    ranges = {p: next(r for stem, r in RANGES.items() if p.endswith(stem)) for p in parameters_of(name)}
    return {p: rng.uniform(*r, n) for p, r in ranges.items()}


def make(name, hard=True, n=N, dtype=torch.float64, seed=0, **options):
    """A layer of `values_of`; `hard` with the quantizer."""
    values = {p: torch.tensor(v, dtype=dtype) for p, v in values_of(name, n, seed).items()}
    if name in FIRING and hard:
        options = {"quant_fn": round_ste(), **options}
    return getattr(tt.snn, name)(n, **{**values, **options})


def stimulus(*shape, seed=0, dtype=torch.float64):
    """Both signs, so that every branch, threshold and reset is met; some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.9 + 0.15
    return torch.where(torch.rand(xs.shape, generator=generator) < 0.05, 0.0, xs).to(dtype)


def assert_near(found, truth, tolerance, what=""):
    """max|difference| / max|truth|; shapes equal, everything finite, the truth not all zero."""
    found, truth = np.asarray(found), np.asarray(truth)
    assert found.shape == truth.shape, (what, found.shape, truth.shape)
    assert np.isfinite(found).all(), what
    assert np.abs(truth).max() > 0, f"{what}: a truth of zeros shows nothing"
    error = np.abs(found - truth).max() / np.abs(truth).max()
    assert error <= tolerance, f"{what}: {error:.3g}"


def assert_events(name, outputs):
    """Spikes, of both signs where there are two, and steps without any."""
    _, family, _ = letters(name)
    outputs = np.asarray(outputs)
    assert 0.02 * outputs.size < (outputs > 0).sum() < 0.9 * outputs.size
    assert (outputs == 0).sum() > 0.05 * outputs.size
    if family in ("LIT", "LITS"):
        assert (outputs < 0).sum() > 0.02 * outputs.size
