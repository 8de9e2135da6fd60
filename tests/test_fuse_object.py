"""A fused twin is the same object in every other respect: its tensors, copies, states, calls."""

from __future__ import annotations

import copy
import io
import pickle

import norse.torch as no
import pytest
import sinabs
import sinabs.layers as sl
import snntorch as snn
import torch
from snntorch import utils as snn_utils
from spikingjelly.activation_based import functional as sf
from spikingjelly.activation_based import neuron as sn
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits
from tests.fuse_cases import CASES
from tests.fuse_checks import by_steps, fused_twin, normal
from tracetorch.adapters.fusing.twin import Twin

pytestmark = pytest.mark.usefixtures("poisoned")


# ---- the same object in every other respect --------------------------------------------------------------------------


class Net(nn.Module):
    """A network with its own attributes: a list, a bound method, a submodule used twice."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.leaky = snn.Leaky(beta=0.9, learn_beta=True, init_hidden=True)
        self.head = nn.Sequential(nn.Linear(7, 7), self.leaky)
        self.norm = nn.BatchNorm1d(7)
        self.order = [self.linear, self.norm]
        self.act = self.activation

    def activation(self, x):
        return self.leaky(x)

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return self.head(self.act(x))


def test_a_tree_is_copied_and_its_tensors_are_shared():
    net = Net()
    net.leaky.eval()
    fused = tt.fuse(net)
    assert type(fused) is Net
    assert fused is not net
    assert fused.leaky is fused.head[1]
    assert isinstance(fused.leaky, snn.Leaky)
    assert isinstance(fused.leaky, Twin)
    assert fused.order[0] is fused.linear
    assert fused.act.__self__ is fused
    assert fused.leaky.state_function.__self__ is fused.leaky
    assert not fused.leaky.training
    assert fused.linear.training
    for (name, a), (other, b) in zip(fused.named_parameters(), net.named_parameters(), strict=True):
        assert name == other
        assert a is b
    for name, buffer in net.state_dict(keep_vars=True).items():
        assert fused.state_dict(keep_vars=True)[name] is buffer
    assert repr(fused) == repr(net)
    x = torch.rand(4, 5)
    assert_bits(fused(x), net(x))
    assert fused.leaky.mem is not net.leaky.mem
    assert [row.path for row in fused.fuse_report.rows] == ["leaky"]
    assert "1 of 1 neuron layers fused" in str(fused.fuse_report)


def test_training_the_twin_trains_the_original():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), sl.LIF(tau_mem=5.0, norm_input=False), nn.Linear(7, 2))
    fused = tt.fuse(net)
    before = net[1].tau_mem.detach().clone()
    optimizer = torch.optim.SGD(fused.parameters(), 0.1)
    xs = torch.rand(4, 20, 5)
    for _ in range(3):
        sinabs.reset_states(fused)
        optimizer.zero_grad()
        fused(xs).square().mean().backward()
        optimizer.step()
    assert net[1].tau_mem is fused[1].tau_mem
    assert not torch.equal(before, net[1].tau_mem)
    sinabs.reset_states(fused)
    assert_bits(fused(xs), net(xs))


@pytest.mark.parametrize(
    "name", ["sinabs.LIF synapse", "snntorch.Leaky no surrogate", "spikingjelly.ParametricLIFNode", "norse.IAFCell"]
)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_pickles(name, how):
    case = CASES[name]
    fused = fused_twin(case.make(7))
    xs = normal(case, 20, 2, 7)
    with torch.no_grad():
        case.run(fused, xs, None)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "copy": copy.copy}[how](
            fused
        )
    assert type(twin) is type(fused)
    assert repr(twin) == repr(fused)
    with torch.no_grad(), tt.backend("cpu"):
        a, b = case.run(twin, xs, None)[0], case.run(fused, xs, None)[0]
    assert_bits(a.outputs[0], b.outputs[0])


@pytest.mark.parametrize("name", ["sinabs.LIF synapse", "snntorch.Synaptic no delay", "spikingjelly.ParametricLIFNode"])
def test_state_dict_round_trip(name):
    case = CASES[name]
    layer, other = case.make(7), case.make(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.75)
    fused = fused_twin(layer)
    assert list(fused.state_dict()) == list(layer.state_dict())
    fused.load_state_dict(other.state_dict())
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    other.load_state_dict(fused.state_dict())
    xs = normal(case, 20, 2, 7)
    with tt.backend("cpu"):
        ours = case.run(fused, xs, None)[0]
    assert_bits(ours.outputs[0], case.run(other, xs, None)[0].outputs[0])


def test_spikingjelly_reset_net():
    net = nn.Sequential(sn.LIFNode(step_mode="m"), sn.IFNode(step_mode="m", v_reset=None))
    fused = tt.fuse(net)
    xs = torch.rand(20, 2, 7) * 3
    first = fused(xs)
    assert isinstance(fused[0].v, torch.Tensor)
    assert net[0].v == 0.0
    carried = fused(xs)
    assert not torch.equal(first, carried)
    sf.reset_net(fused)
    assert fused[0].v == 0.0
    assert_bits(fused(xs), first)
    sf.detach_net(fused)
    sf.set_step_mode(fused, "s")
    sf.reset_net(fused)
    assert_bits(torch.stack([fused(x) for x in xs]), first)


def test_sinabs_reset_states():
    net = nn.Sequential(sl.LIF(tau_mem=5.0, norm_input=False), sl.IAF())
    fused = tt.fuse(net)
    xs = torch.rand(2, 20, 7) * 2
    first = fused(xs)
    kept = net[0].v_mem
    assert not torch.equal(fused(xs), first)
    sinabs.reset_states(fused)
    assert not fused[0].v_mem.any()
    assert kept is net[0].v_mem
    assert_bits(fused(xs), first)
    sinabs.zero_grad(fused)
    assert fused[0].v_mem.grad_fn is None


@pytest.mark.parametrize("kind", [sl.LIF, sl.ALIF])
def test_sinabs_takes_another_batch_size_as_ever(kind):
    layer = sl.LIF(tau_mem=5.0, norm_input=False) if kind is sl.LIF else sl.ALIF(tau_mem=5.0, tau_adapt=5.0)
    fused = fused_twin(layer)
    xs = torch.rand(4, 20, 7) * 2
    for part in (xs, xs[:2], xs[:, :, :3]):
        results = []
        for module in (layer, fused):
            torch.manual_seed(3)
            with tt.backend("cpu"):
                results.append(module(part))
        assert_bits(*results)


def test_snntorch_resets():
    net = nn.Sequential(snn.Leaky(beta=0.9, init_hidden=True), snn.Synaptic(alpha=0.5, beta=0.9, init_hidden=True))
    fused = tt.fuse(net)
    xs = torch.rand(20, 2, 7)

    def through(module):
        return module[1].unroll(module[0].unroll(xs))

    first = through(fused)
    assert fused[0].mem.any()
    snn_utils.reset(fused)
    assert not fused[0].mem.any()
    assert not fused[1].syn.any()
    assert_bits(through(fused), first)
    by_hand = torch.stack([net(x) for x in xs])
    assert_bits(first, by_hand)
    assert fused[0].reset_mem().shape == (2, 7)


def test_calls_step_by_step_stay_the_frameworks():
    layer = snn.Leaky(beta=0.9)
    fused = fused_twin(layer)
    assert type(fused).forward is snn.Leaky.forward
    x = torch.rand(2, 7)
    spikes, mem = fused(x)
    again, _ = fused(x, mem)
    assert spikes.shape == again.shape
    cell = fused_twin(no.LIFBoxCell())
    z, state = cell(x)
    zs, last = cell.unroll(x[None])
    assert_bits(zs[0], z)
    assert_bits(last.v, state.v)


def test_states_given_to_unroll():
    layer = snn.Leaky(beta=0.9)
    fused = fused_twin(layer)
    xs, mem = torch.rand(20, 2, 7), torch.rand(2, 7)
    spikes, mems = fused.unroll(xs, mem=mem)
    state, expected = mem, []
    for x in xs:
        y, state = layer(x, state)
        expected.append(y)
    assert_bits(spikes, torch.stack(expected))
    assert_bits(mems[-1], state)
    with pytest.raises(TypeError, match="init_hidden"):
        fused_twin(snn.Leaky(beta=0.9, init_hidden=True)).unroll(xs, mem=mem)
    with pytest.raises(tt.fused.FuseError, match="time_dim=2"):
        fused.unroll(xs, 2)
    with pytest.raises(tt.fused.FuseError, match="T at least 1"):
        fused.unroll(xs[:0])


def norse_states(states):
    return [(name, tensor) for state in states if state is not None for name, tensor in state._asdict().items()]


def lifted(network, xs, state):
    return network(xs if state is None else (xs, state))


# How the framework's network and the fused one are run over a part of a sequence.
NETWORKS = {
    "layers": (lambda net, xs, state: net(xs, state), lambda net, xs, state: net(xs, state)),
    "cells": (by_steps, lambda net, xs, state: net.unroll(xs, state=state)),
    "lifted network": (lifted, lifted),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_norse_networks(kind):
    torch.manual_seed(0)
    cells = no.SequentialState(nn.Linear(5, 7), no.LIFBoxCell(), nn.BatchNorm1d(7), no.LIFCell(), no.LICell())
    nn.init.constant_(cells[2].weight, 20.0)
    net = {
        "layers": no.SequentialState(no.Lift(nn.Linear(5, 7)), no.LIF(), no.IAF(), no.LI()),
        "cells": cells,
        "lifted network": no.Lift(cells),
    }[kind]
    fused = tt.fuse(net)
    assert not fused.fuse_report.left
    assert len(fused.fuse_report.fused) == 3
    xs = torch.rand(30, 3, 5) * 60
    run_own, run_ours = NETWORKS[kind]
    state = our_state = None
    for part in xs.split(15):
        own, state = run_own(net, part, state)
        ours, our_state = run_ours(fused, part, our_state)
        assert own.any()
        assert_bits(ours, own)
        for (name, a), (_, b) in zip(norse_states(our_state), norse_states(state), strict=True):
            assert_bits(a, b, name)


def test_norse_dropout_in_training_keeps_its_order_of_chance():
    net = no.Lift(no.SequentialState(nn.Dropout(0.5), no.LIFBoxCell(), nn.Dropout(0.5)))
    fused = tt.fuse(net)
    xs = torch.rand(20, 3, 7) * 40
    results = []
    for module in (net, fused):
        torch.manual_seed(3)
        results.append(module(xs)[0])
    assert results[0].any()
    assert_bits(*results)
