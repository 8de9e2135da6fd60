"""Models that tests of `tt.unroll` share, and what their outputs are compared with."""

from __future__ import annotations

import torch
from torch import nn

import tracetorch as tt
from tracetorch.functional import round_ste

T, B = 24, 3


def hard(n, cls=tt.snn.LIB, **options):
    return cls(n, threshold=0.4, quant_fn=round_ste(), **options)


class Scale(nn.Module):
    """No listed module."""

    def forward(self, x):
        return x * 1.5 - x.mean()


class Block(nn.Module):
    """A residual block with a neuron inside."""

    def __init__(self, n):
        super().__init__()
        self.linear, self.neuron = nn.Linear(n, n), hard(n)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, n))

    def forward(self, x):
        h = self.neuron(self.linear(x) + self.shift)
        return x + self.gain * h


class Net(tt.Model):
    """Layers in a list, a residual block, functions, methods and shapes."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(7, 16)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.leave = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
        self.read = tt.snn.LI(4)

    def forward(self, x):
        h = torch.relu(self.enter(x.flatten(1)))
        for block in self.blocks:
            h = block(h)
        h = torch.cat([h[:, :8], h[:, 8:].tanh()], dim=-1)
        return self.read(self.leave(h) - 0.1 * h.view(x.shape[0], 4, 4).sum(-1))


def loop(model, xs):
    return torch.stack([model(x) for x in xs])


def assert_near(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    assert float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())
