"""What `tt.unroll` calls once for a whole sequence, and what once a step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits
from tests.unroll_models import B, Scale, T, assert_near
from tracetorch.core import folding
from tracetorch.functional import round_ste

pytestmark = pytest.mark.usefixtures("one_thread")


def calls_of(module, xs, fold="fast"):
    """How often `tt.unroll` calls a module."""
    shapes = []
    kind = type(module)
    forward = kind.forward
    try:
        kind.forward = lambda self, x: shapes.append(tuple(x.shape)) or forward(self, x)
        ys = tt.unroll(nn.Sequential(module, nn.Identity()), xs, fold=fold)
    finally:
        kind.forward = forward
    return len(shapes), ys


class MyLinear(nn.Linear):
    """A subclass may compute anything: it is not listed."""

    def forward(self, x):
        return super().forward(x) + x.mean()


class Rnn(nn.RNN):
    """One step is a sequence of its own; gives the outputs alone."""

    def forward(self, x):
        return super().forward(x)[0]


X1, X2, X3 = (B, 4, 9), (B, 4, 8, 8), (B, 4, 6, 6, 6)
FOLDED = [
    *((nn.Linear(9, 2), X1), (nn.LayerNorm(9), X1), (nn.ReLU(), X1), (round_ste(0.5), X1), (nn.GroupNorm(2, 4), X1)),
    *((nn.Flatten(), X2), (nn.Flatten(-2), X2), (nn.Unflatten(1, (2, 2)), X2), (nn.Softmax(1), X1), (nn.PReLU(4), X1)),
    *((nn.Upsample(scale_factor=2), X2), (nn.Dropout(0.5).eval(), X1), (nn.BatchNorm1d(4).eval(), X1[:2])),
    *((nn.Conv1d(4, 2, 3), X1), (nn.Conv2d(4, 2, 3), X2), (nn.Conv3d(4, 2, 3), X3), (nn.ConvTranspose2d(4, 2, 3), X2)),
    *((nn.MaxPool1d(2), X1), (nn.AvgPool2d(2), X2), (nn.AdaptiveAvgPool2d(2), X2), (nn.ZeroPad2d(1), X2)),
    *((nn.BatchNorm2d(4).eval(), X2), (nn.InstanceNorm2d(4), X2), (nn.LPPool2d(2.0, 2), X2)),
]
STEPPED = [
    *((nn.BatchNorm1d(4), X1), (nn.BatchNorm2d(4), X2), (nn.Dropout(0.5), X1), (nn.Flatten(0), X1), (Scale(), X1)),
    *((nn.Softmax(0), X1), (nn.Conv2d(4, 2, 3), X2[1:]), (nn.BatchNorm2d(4, track_running_stats=False).eval(), X2)),
    *((nn.InstanceNorm1d(4, track_running_stats=True), X1), (Rnn(9, 2), X1)),
]


@pytest.mark.parametrize(("module", "shape"), FOLDED, ids=lambda value: type(value).__name__)
def test_what_is_listed_runs_once(module, shape):
    xs = torch.randn(T, *shape)
    expected = torch.stack([module(x) for x in xs])
    calls, ys = calls_of(module, xs)
    assert calls == 1
    assert_near(ys, expected)
    swapped = tt.unroll(nn.Sequential(module), xs.transpose(0, 1), time_dim=1)
    assert_near(swapped.transpose(0, 1), expected)
    calls, ys = calls_of(module, xs, "exact")
    assert calls == T
    assert_bits(ys, expected)


@pytest.mark.parametrize(("module", "shape"), STEPPED, ids=lambda value: type(value).__name__)
def test_what_is_not_listed_or_depends_on_the_batch_runs_per_step(module, shape):
    xs, twin = torch.randn(T, *shape), copy.deepcopy(module)
    torch.manual_seed(2)
    expected = torch.stack([twin(x) for x in xs])
    torch.manual_seed(2)
    calls, ys = calls_of(module, xs)
    assert calls == T
    assert_bits(ys, expected)
    for name, value in twin.named_buffers():
        assert_bits(module.get_buffer(name), value, name)


def test_a_subclass_and_a_hooked_module_run_per_step():
    xs = torch.randn(T, B, 7)
    assert folding.fold(MyLinear(7, 2), xs) is None
    linear = nn.Linear(7, 2)
    assert folding.fold(linear, xs) is not None
    seen = []
    linear.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    tt.unroll(nn.Sequential(linear), xs)
    assert seen == [(B, 2)] * T
