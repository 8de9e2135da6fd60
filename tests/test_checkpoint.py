"""Activation checkpointing of layers that keep states: right gradients by `tt.checkpoint`, a refusal by torch's own."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tracetorch as tt

T, B = 12, 3


class Steps(tt.Model):
    """[T, B, 5] -> [T, B, 4], step by step or through kernels."""

    def __init__(self, unrolled):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.neuron = nn.Linear(5, 6), tt.snn.LIB(6, quant_fn=tt.functional.round_ste())
        self.second, self.read_out = nn.Linear(6, 4), tt.snn.LI(4)
        self.unrolled = unrolled

    def forward(self, xs):
        if self.unrolled:
            with tt.backend("cpu"):
                return self.read_out.unroll(self.second(self.neuron.unroll(self.first(xs))))
        return torch.stack([self.read_out(self.second(self.neuron(self.first(x)))) for x in xs])


def results(run, unrolled):
    """Three chunks of a sequence, states carried on, one backward through all of them."""
    net = Steps(unrolled)
    xs = (torch.rand(3 * T, B, 5, generator=torch.Generator().manual_seed(1)) * 3).requires_grad_()
    ys = torch.cat([run(net, chunk) for chunk in xs.split(T)])
    before = {path: {n: s.detach().clone() for n, s in states.items()} for path, states in net.save_states().items()}
    (ys * torch.linspace(-1, 1, ys.numel()).view_as(ys)).sum().backward()
    after = net.save_states()
    for path, states in before.items():  # the backward pass left the states alone
        for name, state in states.items():
            assert torch.equal(state, after[path][name])
    return [ys.detach(), xs.grad, *before["neuron"].values(), *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("unrolled", [False, True])
def test_checkpointing_changes_no_value_and_no_gradient(unrolled):
    plain = results(lambda net, xs: net(xs), unrolled)
    for a, b in zip(plain, results(tt.checkpoint, unrolled), strict=True):
        assert torch.equal(a, b)
    assert plain[0].abs().sum() > 0
    assert plain[1].abs().sum() > 0


@pytest.mark.parametrize("unrolled", [False, True])
def test_torch_s_own_checkpointing_is_refused(unrolled):
    net = Steps(unrolled)
    with pytest.raises(RuntimeError, match=r"LIB: .*use tracetorch\.checkpoint"):
        checkpoint(net, torch.rand(T, B, 5), use_reentrant=False)
    assert net.neuron.mem is None
    net(torch.rand(T, B, 5))


def test_other_saved_tensor_hooks_are_no_checkpointing():
    net = Steps(False)
    with torch.autograd.graph.save_on_cpu():
        net(torch.rand(T, B, 5)).sum().backward()


def test_a_module_that_fails_leaves_its_states_as_they_were():
    net = Steps(False)
    net(torch.rand(T, B, 5))
    before = net.neuron.mem
    with pytest.raises(ValueError, match="reset_states"):
        tt.checkpoint(net, torch.rand(T, B + 1, 5))
    assert net.neuron.mem is before
