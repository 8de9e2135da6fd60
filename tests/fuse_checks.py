"""What tests of `tt.fuse` share: a layer and its twin run side by side, and compared."""

from __future__ import annotations

import pytest
import torch

import tracetorch as tt
from tests.bits import assert_bits
from tests.fuse_cases import CASES, LONG
from tracetorch.adapters.fusing.twin import Twin
from tracetorch.fused.reads import read

SIZES = [(63, 2, 7), (1, 1, 1), (40, 1, 513)]
EXACT = [name for name, case in CASES.items() if case.exact]


def marked(names):
    """Parameters of a test; the long ones run in `make sweep`."""
    return [pytest.param(name, marks=pytest.mark.sweep if name in LONG else ()) for name in names]


def assert_gradients(given, expected, names, tolerance=1e-5):
    for name, a, b in zip(names, given, expected, strict=True):
        assert a.shape == b.shape, name
        assert torch.isfinite(b).all(), name
        scale = float(b.abs().max()) or 1.0
        assert float((a - b).abs().max()) <= tolerance * scale, name


def learnable(layer):
    """The layer's own leaves by path; the fused twin shares them."""
    return {path: t for path, t in read(layer).tensors.items() if t.requires_grad and t.is_leaf}


def normal(case, T, B, N, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T + N)
    return torch.randn((T, B, N), generator=generator, dtype=dtype) * case.scale + case.offset


def run(case, layer, xs, cuts):
    """Several calls in a row on the parts of xs, states carried; all runs, and gradients of a random sum."""
    x = xs.clone().requires_grad_()
    state, runs = None, []
    for part in x.split(cuts):
        one, state = case.run(layer, part, state)
        runs.append(one)
    generator = torch.Generator().manual_seed(1)

    def weighted(tensor):
        # Positive weights: where a parameter's gradient is a sum that cancels to 1e-4 of its terms, the framework's own
        # is no nearer to the truth than 1e-5.
        return (tensor * torch.rand(tensor.shape, generator=generator)).sum()

    loss = sum(weighted(y) for one in runs for y in one.outputs) + sum(map(weighted, runs[-1].states.values()))
    leaves = learnable(layer)
    gradients = torch.autograd.grad(loss, [x, *leaves.values()], allow_unused=True, materialize_grads=True)
    return runs, dict(zip(["x", *leaves], gradients, strict=True))


def fused_twin(layer):
    fused = tt.fuse(layer)
    assert not fused.fuse_report.left, str(fused.fuse_report)
    return fused


def ran(*modules):
    """Whether each of these twins has run a kernel, and never its own code instead."""
    plans = [plan for module in modules for plan in module._sequencer.plans.values()]
    kernels = [kernel for plan in plans for kernel in plan.kernels.values()]
    refused = [plan.refused for plan in plans if plan.refused] + [k for k in kernels if isinstance(k, str)]
    return bool(kernels) and not refused


def compare(case, T, B, N, xs=None):
    """Runs a layer and its twin on two calls; returns the layer's own runs."""
    layer = case.make(N)
    fused = fused_twin(layer)
    assert "may round" not in str(fused.fuse_report)
    xs = normal(case, T, B, N) if xs is None else xs
    cuts = [T] if T == 1 else [T // 2, T - T // 2]
    own, expected = run(case, layer, xs, cuts)
    with tt.backend("cpu"):
        ours, given = run(case, fused, xs, cuts)
    assert ran(*(module for module in fused.modules() if isinstance(module, Twin) and module.neuron))
    for a, b in zip(ours, own, strict=True):
        for k, (u, v) in enumerate(zip(a.outputs, b.outputs, strict=True)):
            assert_bits(u, v, f"output {k}")
        assert a.states.keys() == b.states.keys()
        for name in a.states:
            assert_bits(a.states[name], b.states[name], name)
    # Parameters are shared, so their paths are the same too, though not always in the same order.
    assert set(given) == set(expected)
    assert_gradients([given[name] for name in expected], expected.values(), expected)
    return own


def by_steps(network, xs, state):
    outputs = []
    for x in xs:
        y, state = network(x, state)
        outputs.append(y)
    return torch.stack(outputs), state
