"""What tests of native layers share: layers, inputs, bits."""

import torch

import tracetorch as tt
from tests.bits import assert_bits as assert_bits


def hard(num_neurons, **options):
    return tt.snn.LIB(num_neurons, quant_fn=tt.functional.round_ste(), **options)


def noise(*shape, seed=0, mean=0.4, deviation=0.8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * deviation + mean


class Scaled(torch.autograd.Function):
    """x itself, whose gradient alone depends on w."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


class Mine(tt.snn.Layer):
    """A user's own neuron, as the design shows it: two states, one decay, one plain parameter."""

    def __init__(self, num_neurons, beta=0.9, dim=-1):
        super().__init__(num_neurons, dim)
        self.define_state("mem")
        self.define_state("slow")
        self.define_decay("beta", beta, rank=1, learnable=True)
        self.define_parameter("gain", 0.5, rank=0)

    def step(self, x, mem, slow):
        mem = self.beta * mem + x
        slow = 0.5 * slow + self.gain * mem
        return torch.tanh(mem - slow), mem, slow


LAYERS = {
    "LI": lambda n, **o: tt.snn.LI(n, **o),
    "LIB": lambda n, **o: tt.snn.LIB(n, **o),
    "LIB hard": hard,
    "Mine": lambda n, **o: Mine(n, **o),
}
SMOOTH = ("LIB", "Mine")  # with a sigmoid whose value is passed on
