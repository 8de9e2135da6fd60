"""What a C kernel does without: states and gradients of zero, rows that repeat, values that stand for many elements."""

from __future__ import annotations

import pytest
import torch

import tracetorch as tt
from tests.bits import assert_bits
from tracetorch.fused import kernel as kernel_module
from tracetorch.fused.build import build
from tracetorch.fused.scan import scan

pytestmark = pytest.mark.usefixtures("poisoned")

SIZES = [(5, 3, 7), (33, 5, 300), (64, 2, 513), (65, 1, 40)]  # a block holds 512 elements, a chunk 32 steps


def step(given):
    """Two states, three outputs: a leaky sum, what passes its threshold, and the difference."""
    v = given["beta"] * given["v"] + given["x"]
    i = 0.5 * given["i"] + given["gain"] * v
    return [v - i, torch.where(v > 0.25, v, i), v * i, v, i]


OUTPUTS = ("difference", "larger", "product")


def kernel(learned=("beta", "gain")):
    return build(step, ["v", "i"], ["beta", "gain"], learned, torch.float32, outputs=OUTPUTS)


def case(T, B, N, time_dim, seed=0):
    """A sequence, and parameters for each neuron and for all of them."""
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn((T, B, N) if time_dim == 0 else (B, T, N), generator=generator).requires_grad_()
    beta = torch.rand(N, generator=generator).requires_grad_()
    return xs, [beta, torch.rand((), generator=generator).requires_grad_()], generator


def gradients(results, leaves, cotangents):
    """Of the leaves; None: an output that is not used."""
    used = [(y, c) for y, c in zip(results, cotangents, strict=True) if c is not None]
    return torch.autograd.grad([y for y, _ in used], leaves, [c for _, c in used], retain_graph=True)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert_bits(a.reshape(-1), b.reshape(-1))


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_a_state_that_is_not_given_is_zero(size, time_dim):
    xs, parameters, generator = case(*size, time_dim)
    zero = torch.zeros(size[1:])
    runs = (scan(kernel(), [xs], time_dim, states, parameters, True) for states in ([None] * 2, [zero] * 2))
    flat, wanted = ([tensor for group in each for tensor in group] for each in runs)
    assert_same(flat, wanted)
    cotangents = [torch.randn(y.shape, generator=generator) for y in flat]
    assert_same(*(gradients(ys, [xs, *parameters], cotangents) for ys in (flat, wanted)))


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_that_repeat_over_time_count_at_every_step(size, time_dim):
    """Of a sum over time, of a sum over all, and of an output that is not used."""
    xs, parameters, generator = case(*size, time_dim)
    states = [torch.randn(size[1:], generator=generator).requires_grad_() for _ in range(2)]
    outputs, last, _ = scan(kernel(), [xs], time_dim, states, parameters)
    row = torch.randn(size[1:], generator=generator).unsqueeze(time_dim)
    repeated = [row.expand(xs.shape), torch.tensor(0.7).expand(xs.shape), None]
    dense = [repeated[0].contiguous(), repeated[1].contiguous(), torch.zeros(xs.shape)]
    leaves = [xs, *states, *parameters]
    results, rest = [*outputs, *last], [None, torch.ones(size[1:])]
    found, expected = (gradients(results, leaves, [*each, *rest]) for each in (repeated, dense))
    assert_same(found, expected)
    assert float(found[0].abs().max()) > 0


def test_what_repeats_is_not_written_out(monkeypatch):
    """The loss on a count of spikes: its gradient is one row, whatever the length."""
    rows = []
    call = kernel_module.CKernel.call

    def noted(self, function, pointers, shape, sizes, still=()):
        if function == "backward":
            rows.append((pointers[1].shape, still))
        call(self, function, pointers, shape, sizes, still)

    monkeypatch.setattr(kernel_module.CKernel, "call", noted)
    layer, xs = tt.snn.LIB(6), torch.randn(50, 3, 6, requires_grad=True)
    with tt.backend("cpu"):
        layer.unroll(xs).sum(0).square().sum().backward()
    assert rows == [((3, 6), (True,))]


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_values_of_every_neuron_serve_every_sample(size, time_dim):
    xs, (beta, gain), generator = case(*size, time_dim)
    cotangent = torch.randn(xs.shape, generator=generator)
    results = []
    for value in (beta, beta.expand(size[1:]).contiguous()):
        outputs, last, _ = scan(kernel(), [xs], time_dim, [None, None], [value, gain])
        loss = (outputs[0] * cotangent).sum() + last[0].sum()
        results.append([*outputs, *last, *torch.autograd.grad(loss, [xs, beta, gain])])
    assert_same(*results)


def test_a_sequence_of_one_chunk_saves_no_state():
    layer = tt.snn.LIB(300)
    for steps, saved in ((32, []), (33, [1]), (64, [1]), (65, [2])):
        layer.reset_states()
        with tt.backend("cpu"):
            y = layer.unroll(torch.randn(steps, 4, 300, requires_grad=True))
        kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.ndim == 3 and t.shape[0] != steps]
        assert [t.shape[0] for t in kept] == saved
