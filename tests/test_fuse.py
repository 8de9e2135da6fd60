"""`tt.fuse`: the fused twin computes what the framework's own layer computes, and is it in every other respect."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from types import SimpleNamespace

import norse.torch as no
import numpy as np
import pytest
import sinabs
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation as sa
from snntorch import surrogate as sg
from snntorch import utils as snn_utils
from spikingjelly.activation_based import functional as sf
from spikingjelly.activation_based import neuron as sn
from torch import nn

import tracetorch as tt
from tests.fuse_cases import CASES, LONG, Case, leaky, run_sinabs
from tracetorch import adapters
from tracetorch.adapters.fusing.twin import Twin
from tracetorch.fused import compiler, sequence
from tracetorch.fused.reads import read
from tracetorch.fused.sequence import FuseWarning

SIZES = [(63, 2, 7), (1, 1, 1), (40, 1, 513)]
EXACT = [name for name, case in CASES.items() if case.exact]


def marked(names):
    """Parameters of a test; the long ones run in `make sweep`."""
    return [pytest.param(name, marks=pytest.mark.sweep if name in LONG else ()) for name in names]


pytestmark = pytest.mark.usefixtures("poisoned")


def assert_bits(a, b, what=""):
    a, b = a.detach().contiguous().numpy(), b.detach().contiguous().numpy()
    assert a.shape == b.shape, (what, a.shape, b.shape)
    assert a.dtype == b.dtype, (what, a.dtype, b.dtype)
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    different = a.view(np.uint8).reshape(a.size, -1) != b.view(np.uint8).reshape(b.size, -1)
    assert not different.any(), f"{what}: {different.any(1).sum()} of {a.size} values differ"


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


def compare(case, T, B, N, xs=None):
    """Runs a layer and its twin on two calls; returns the layer's own runs."""
    layer = case.make(N)
    fused = fused_twin(layer)
    xs = normal(case, T, B, N) if xs is None else xs
    cuts = [T] if T == 1 else [T // 2, T - T // 2]
    own, expected = run(case, layer, xs, cuts)
    with tt.backend("cpu"):
        ours, given = run(case, fused, xs, cuts)
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


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", marked(EXACT))
def test_twin_is_the_layer_bit_for_bit(name, size):
    case = CASES[name]
    T, B, N = size
    B = 2 if "Squeeze" in name else B
    own = compare(case, T, B, N)
    if T > 1 and case.spikes:
        spikes = torch.cat([one.outputs[0] for one in own])
        assert spikes.sum() > 0
        assert (spikes == 0).any()


@pytest.mark.parametrize("name", marked(name for name, case in CASES.items() if not case.exact))
def test_twin_whose_step_has_an_exp_is_the_layer_within_rounding(name):
    case = CASES[name]
    layer = case.make(513)
    fused = tt.fuse(layer)
    assert "exp may round" in fused.fuse_report.rows[0].reason
    xs = normal(case, 40, 1, 513)
    (own, *_), expected = run(case, layer, xs, [40])
    with tt.backend("cpu"):
        (ours, *_), given = run(case, fused, xs, [40])
    assert own.outputs[0].sum() > 0
    assert_bits(ours.outputs[0], own.outputs[0])
    for state in own.states:
        torch.testing.assert_close(ours.states[state], own.states[state], rtol=1e-5, atol=1e-5)
    assert_gradients(given.values(), expected.values(), expected)


@pytest.mark.parametrize(
    "name", ["sinabs.LIF norm", "sinabs.IAF", "spikingjelly.LIFNode to 0.25", "spikingjelly.IFNode"]
)
def test_several_spikes_at_once_and_none(name):
    case = CASES[name]
    own = compare(Case(case.make, case.run, 8.0, 3.0), 63, 2, 7)
    counts = torch.cat([one.outputs[0] for one in own])
    assert (counts == 0).any()
    assert (counts > 1).any() == ("sinabs" in name)


# On a binary grid every value is exact, so that membranes meet thresholds exactly.
TIES = {
    "sinabs.LIF": Case(
        lambda n: sl.LIF(tau_mem=-1 / np.log(0.5), norm_input=False, spike_fn=sa.SingleSpike), CASES["sinabs.LIF"].run
    ),
    "sinabs.IAF": CASES["sinabs.IAF"],
    "sinabs.ALIF": Case(lambda n: sl.ALIF(tau_mem=1.0, tau_adapt=1.0, norm_input=False), run_sinabs),
    "snntorch.Leaky": leaky(beta=0.5, init_hidden=False),
    "snntorch.Leaky zero": leaky(beta=0.5, reset_mechanism="zero", reset_delay=False),
    "snntorch.Synaptic": Case(lambda n: snn.Synaptic(alpha=0.5, beta=0.5), CASES["snntorch.Synaptic"].run),
    "spikingjelly.LIFNode": CASES["spikingjelly.LIFNode"],
    "spikingjelly.IFNode": CASES["spikingjelly.IFNode"],
    "spikingjelly.ParametricLIFNode": CASES["spikingjelly.ParametricLIFNode"],
    "norse.IAFCell": CASES["norse.IAFCell"],
    "norse.LIFBoxCell": Case(
        lambda n: no.LIFBoxCell(no.LIFBoxParameters(tau_mem_inv=torch.tensor(0.5)), dt=1.0),
        CASES["norse.LIFBoxCell"].run,
    ),
}


@pytest.mark.parametrize("name", TIES)
def test_exact_threshold_ties(name):
    case = TIES[name]
    generator = torch.Generator().manual_seed(5)
    xs = torch.randint(-4, 13, (63, 2, 513), generator=generator) / 8
    own = compare(case, 63, 2, 513, xs)
    assert torch.cat([one.outputs[0] for one in own]).sum() > 0
    if name in ("snntorch.Leaky", "snntorch.Synaptic"):
        assert (torch.cat([one.outputs[-1] for one in own]) == 1).any()


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("name", ["snntorch.Leaky", "snntorch.Leaky hidden", "norse.LIFBoxCell"])
def test_unroll_either_way_round(name, time_dim):
    case = CASES[name]
    layer = case.make(7)
    by_hand, fused = copy.deepcopy(layer), fused_twin(layer)
    xs = normal(case, 20, 3, 7)
    own, _ = case.run(by_hand, xs, None)
    results = fused.unroll(xs if time_dim == 0 else xs.transpose(0, 1), time_dim)
    spikes = results if isinstance(results, torch.Tensor) else results[0]
    assert spikes.sum() > 0
    assert_bits(spikes if time_dim == 0 else spikes.transpose(0, 1), own.outputs[0])


@pytest.mark.parametrize("name", ["sinabs.IAF", "sinabs.ExpLeak", "snntorch.Leaky", "spikingjelly.LIFNode", "norse.LI"])
def test_more_dimensions_and_strided_input(name):
    case = CASES[name]
    layer = case.make(1)
    fused = fused_twin(layer)
    xs = normal(case, 12, 2, 3 * 4 * 5).reshape(12, 2, 3, 4, 5).transpose(2, 4)
    own, ours = case.run(layer, xs, None)[0], case.run(fused, xs, None)[0]
    for a, b in zip(ours.outputs, own.outputs, strict=True):
        assert_bits(a, b)


@pytest.mark.parametrize("name", ["sinabs.LIF single", "snntorch.Leaky", "spikingjelly.LIFNode", "norse.LIFBoxCell"])
def test_float64(name):
    case = CASES[name]
    layer = case.make(7)
    fused = fused_twin(layer)
    xs = normal(case, 30, 2, 7, torch.float64)
    own, ours = case.run(layer, xs, None)[0], case.run(fused, xs, None)[0]
    assert own.outputs[0].sum() > 0
    for a, b in zip(ours.outputs, own.outputs, strict=True):
        assert_bits(a, b)
    for state in own.states:
        assert_bits(ours.states[state], own.states[state])


def test_float64_that_counts_in_float32_runs_the_layers_own_code_and_says_so():
    layer = sl.LIF(tau_mem=5.0, norm_input=False)  # its spikes are float32, times a threshold of float32
    fused = fused_twin(layer)
    xs = normal(CASES["sinabs.LIF"], 30, 2, 7, torch.float64).transpose(0, 1)
    with pytest.warns(FuseWarning, match="mul computes in float32 on an input of float64"):
        ours = fused(xs)
    assert_bits(ours, layer(xs))
    assert_bits(fused.v_mem, layer.v_mem)


def test_without_gradients_nothing_requires_them():
    for name in ("sinabs.LIF", "snntorch.Leaky hidden", "spikingjelly.LIFNode", "norse.Lift"):
        case = CASES[name]
        layer = case.make(7)
        fused = fused_twin(layer)
        xs = normal(case, 30, 2, 7)
        with torch.no_grad():
            own, ours = case.run(layer, xs, None)[0], case.run(fused, xs, None)[0]
        assert not ours.outputs[0].requires_grad
        assert_bits(ours.outputs[0], own.outputs[0])


@pytest.mark.parametrize("grad", [False, True])
def test_recordings_of_sinabs(grad):
    layer = sl.LIF(tau_mem=5.0, tau_syn=3.0, norm_input=False, min_v_mem=-0.5, record_states=True)
    fused = fused_twin(layer)
    xs = normal(CASES["sinabs.LIF"], 30, 2, 7).transpose(0, 1).contiguous().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        layer(xs)
        with tt.backend("cpu"):
            fused(xs)
    assert fused.recordings.keys() == layer.recordings.keys() == {"v_mem", "i_syn"}
    for name, series in layer.recordings.items():
        assert_bits(fused.recordings[name], series)
    assert_bits(fused.firing_rate, layer.firing_rate)
    if grad:
        expected = torch.autograd.grad(layer.recordings["v_mem"].square().sum(), xs)
        given = torch.autograd.grad(fused.recordings["v_mem"].square().sum(), xs)
        assert_gradients(given, expected, ["xs"])


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


def test_sinabs_takes_another_batch_size_as_ever():
    layer = sl.LIF(tau_mem=5.0, norm_input=False)
    fused = fused_twin(layer)
    xs = torch.rand(4, 20, 7) * 2
    for part in (xs, xs[:2], xs[:, :, :3]):
        results = []
        for module in (layer, fused):
            torch.manual_seed(3)
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


def by_steps(network, xs, state):
    outputs = []
    for x in xs:
        y, state = network(x, state)
        outputs.append(y)
    return torch.stack(outputs), state


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


# ---- source ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sinabs.LIF", "snntorch.Leaky", "spikingjelly.LIFNode", "norse.LIFBoxCell"])
def test_the_kernel_of_a_fused_layer_can_be_read(name):
    layer = tt.fuse(CASES[name].make(7))
    text = tt.fused.source(layer, "cpu", backward=True)
    assert text == tt.fused.source(layer, "cpu", backward=True)
    assert "void forward(" in text
    assert "void backward(" in text
    assert "void backward(" not in tt.fused.source(layer, "cpu")
    assert "def backward(" in tt.fused.source(layer, "triton", backward=True)
    assert "def backward(" not in tt.fused.source(layer, "triton")
    with pytest.raises(ValueError, match="not fused"):
        tt.fused.source(CASES[name].make(7), "cpu")


# ---- guards ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "reset_fn": ("sinabs.LIF", lambda layer: setattr(layer, "reset_fn", sa.MembraneReset())),
    "inside reset_fn": ("sinabs.LIF subtract value", lambda layer: setattr(layer.reset_fn, "subtract_value", 0.25)),
    "spike_fn": ("sinabs.LIF", lambda layer: setattr(layer, "spike_fn", sa.SingleSpike)),
    "norm_input": ("sinabs.LIF", lambda layer: setattr(layer, "norm_input", True)),
    "integer threshold": ("sinabs.LIF integer clamp", lambda layer: layer.spike_threshold.data.fill_(1)),
    "threshold": ("sinabs.LIF", lambda layer: layer.spike_threshold.data.fill_(0.5)),
    "adapt_scale": ("sinabs.ALIF", lambda layer: setattr(layer, "adapt_scale", 0.5)),
    "v_threshold": ("spikingjelly.LIFNode", lambda layer: setattr(layer, "v_threshold", 0.5)),
    "v_reset": ("spikingjelly.LIFNode", lambda layer: setattr(layer, "v_reset", None)),
    "tau": ("spikingjelly.LIFNode", lambda layer: setattr(layer, "tau", 3.0)),
    "reset_delay": ("snntorch.Leaky", lambda layer: setattr(layer, "reset_delay", False)),
    "beta": ("snntorch.Leaky", lambda layer: setattr(layer, "beta", torch.tensor(0.25))),
    "state_quant": ("snntorch.Leaky hidden", lambda layer: setattr(layer, "state_quant", lambda mem: mem.round())),
    "dt": ("norse.LIFBoxCell", lambda layer: setattr(layer, "dt", 0.002)),
    "p": ("norse.LIFBoxCell", lambda layer: setattr(layer, "p", layer.p._replace(v_th=torch.tensor(0.5)))),
    "v_reset of norse": (
        "norse.LIFCell",
        lambda layer: setattr(layer, "p", layer.p._replace(v_reset=torch.tensor(0.25))),
    ),
}
GRADIENTS = {
    "detach_reset": ("spikingjelly.LIFNode", lambda layer: setattr(layer, "detach_reset", True)),
    "surrogate alpha": ("spikingjelly.LIFNode", lambda layer: setattr(layer.surrogate_function, "alpha", 1.0)),
    "surrogate_grad_fn": ("sinabs.LIF", lambda layer: setattr(layer, "surrogate_grad_fn", sa.Gaussian())),
    "spike_grad": ("snntorch.Leaky", lambda layer: setattr(layer, "spike_grad", sg.fast_sigmoid(5))),
    "method": (
        "norse.LIFCell",
        lambda layer: setattr(layer, "p", layer.p._replace(method="tanh", alpha=torch.tensor(1.0))),
    ),
}


def begin_again(layer):
    """Back to the initial state."""
    for state in ("v_mem", "b", "mem", "syn"):
        if isinstance(getattr(layer, state, None), torch.Tensor):
            setattr(layer, state, torch.zeros(0))
    if isinstance(layer, sn.LIFNode):
        layer.v = 0.0


@pytest.mark.parametrize("change", [*CHANGES, *GRADIENTS])
def test_a_changed_configuration_is_traced_again(change):
    name, edit = {**CHANGES, **GRADIENTS}[change]
    case = CASES[name]
    # snnTorch's and sinabs's default tensors and functions are shared by all layers: the edits must not reach others.
    layer, fused = copy.deepcopy(case.make(7)), fused_twin(case.make(7))
    for module in (layer, fused):
        if hasattr(module, "spike_threshold") and isinstance(module.spike_threshold, nn.Parameter):
            module.spike_threshold = nn.Parameter(module.spike_threshold.detach().clone(), requires_grad=False)
        if hasattr(module, "reset_fn"):
            module.reset_fn = copy.copy(module.reset_fn)
    xs = normal(case, 40, 2, 7)
    if change in CHANGES:
        before = case.run(fused, xs.clone().requires_grad_(), None)[0]
        for module in (layer, fused):
            edit(module)
        begin_again(fused)
        with torch.no_grad(), tt.backend("cpu"):
            ours, own = case.run(fused, xs, None)[0], case.run(layer, xs, None)[0]
        assert_bits(ours.outputs[0], own.outputs[0])
        assert not torch.equal(ours.outputs[-1], before.outputs[-1])
        return
    before, old = run(case, fused, xs, [40])
    for module in (layer, fused):
        edit(module)
    (own,), expected = run(case, layer, xs, [40])
    begin_again(fused)
    with tt.backend("cpu"):
        (ours,), given = run(case, fused, xs, [40])
    for a, b in zip(ours.outputs, own.outputs, strict=True):
        assert_bits(a, b)
    assert_gradients([given["x"]], [expected["x"]], ["x"])
    assert_bits(ours.outputs[0], before[0].outputs[0])
    assert not torch.allclose(given["x"], old["x"])


def test_every_kind_of_change_is_noticed():
    amount = [0.5]
    scale = 2.0

    def reset(spikes, state, threshold, factor=1.0):
        return {**state, "v_mem": state["v_mem"] - spikes * amount[0] * scale * factor}

    layer = sl.LIF(tau_mem=5.0, norm_input=False, reset_fn=reset)
    reads = read(layer, ("v_mem",))
    assert reads.unchanged()
    layer.v_mem = torch.ones(3)
    assert reads.unchanged()

    def edits():
        yield "a list behind a closure", lambda: amount.__setitem__(0, 0.25)
        yield "a closure's variable", lambda: setattr(reset.__closure__[1], "cell_contents", 3.0)
        yield "a default argument", lambda: setattr(reset, "__defaults__", (0.5,))
        yield "a new attribute", lambda: setattr(layer, "flag", True)
        yield "a tensor's dtype", lambda: layer.double()
        yield "a parameter", lambda: setattr(layer, "tau_mem", nn.Parameter(torch.tensor(4.0)))
        yield "the mode", lambda: layer.eval()
        yield "a function", lambda: setattr(layer, "spike_fn", sa.SingleSpike)

    for what, edit in edits():
        before = read(layer, ("v_mem",))
        assert before.unchanged(), what
        edit()
        assert not before.unchanged(), what
        after = read(layer, ("v_mem",))
        assert after.guard != before.guard or after.tensors["tau_mem"] is not before.tensors["tau_mem"], what
    assert scale == 3.0


def test_another_length_or_size_needs_no_other_kernel():
    fused = fused_twin(sl.IAF())
    for shape in ((2, 5, 7), (1, 63, 1), (3, 2, 513)):
        sinabs.reset_states(nn.Sequential(fused))
        fused(torch.rand(shape))
    plans = fused._sequencer.plans
    assert len(plans) == 1
    assert len(next(iter(plans.values())).kernels) == 1


def test_freezing_a_parameter_is_seen():
    layer = sl.LIF(tau_mem=5.0, norm_input=False)
    fused = fused_twin(layer)
    xs = torch.rand(2, 20, 7) * 2
    fused(xs).sum().backward()
    assert layer.tau_mem.grad is not None
    layer.tau_mem.grad = None
    layer.tau_mem.requires_grad_(False)
    sinabs.reset_states(nn.Sequential(fused))
    assert not fused(xs).requires_grad


# ---- what is not fused -----------------------------------------------------------------------------------------------


class Louder(sl.LIF):
    """A subclass with a forward of its own."""

    def forward(self, input_data):
        return super().forward(input_data * 2)


class Gentle(sl.LIF):
    """A subclass that changes what the step reads, not the call."""

    @property
    def alpha_mem_calculated(self):
        return super().alpha_mem_calculated.clamp(0, 0.5)


class NoisyReset:
    """Draws random numbers."""

    def __call__(self, spikes, state, threshold):
        return {**state, "v_mem": state["v_mem"] - spikes * threshold + 0.1 * torch.rand(1)}


class ByMean:
    """Reads all neurons."""

    def __call__(self, spikes, state, threshold):
        return {**state, "v_mem": state["v_mem"] - spikes.mean()}


class ByShape:
    """Depends on how many neurons there are."""

    def __call__(self, spikes, state, threshold):
        return {**state, "v_mem": state["v_mem"] - spikes / spikes.shape[-1]}


def replaced():
    layer = sl.LIF(tau_mem=5.0)
    layer.forward = functools.partial(sl.LIF.forward, layer)
    return layer


LEFT = {
    "rec_connect": lambda: sl.LIFRecurrent(tau_mem=5.0, rec_connect=nn.Linear(7, 7)),
    "matrix": lambda: snn.RLeaky(beta=0.9, all_to_all=False),
    "through a matrix": lambda: no.LIFRecurrentCell(7, 7),
    "not one of sinabs": lambda: Louder(tau_mem=5.0),
    "random": lambda: sl.LIF(tau_mem=5.0, reset_fn=NoisyReset()),
    "mean": lambda: sl.LIF(tau_mem=5.0, reset_fn=ByMean()),
    "shape of the input": lambda: sl.LIF(tau_mem=5.0, reset_fn=ByShape()),
    "argmax": lambda: snn.Leaky(beta=0.9, inhibition=True),
    "replaced on this instance": replaced,
    "named tuple": lambda: no.LIFRefracCell(),
}


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature:UserWarning")
@pytest.mark.parametrize("word", LEFT)
def test_what_cannot_be_fused_is_left_and_named(word):
    net = nn.Sequential(LEFT[word](), nn.Linear(7, 7))
    fused = tt.fuse(net)
    (row,) = fused.fuse_report.rows
    assert not row.fused
    assert word in row.reason
    assert row.path == "0"
    assert "0 of 1" in str(fused.fuse_report)
    assert word in str(fused.fuse_report)
    assert not isinstance(fused[0], Twin)
    assert type(fused[0]) is type(net[0])


def test_left_layers_run_as_ever():
    torch.manual_seed(0)
    net = nn.Sequential(
        Louder(tau_mem=5.0), sl.LIFRecurrent(tau_mem=5.0, rec_connect=nn.Linear(7, 7)), Gentle(tau_mem=5.0)
    )
    fused = tt.fuse(net)
    assert [row.fused for row in fused.fuse_report.rows] == [False, False, True]
    xs = torch.rand(2, 20, 7) * 4
    assert_bits(fused(xs), net(xs))
    net[0].reset_states()
    assert fused[0].v_mem.any()


NOTES = {
    "step_mode 's'": lambda: sn.LIFNode(),
    "record_states": lambda: sl.ALIF(tau_mem=5.0, tau_adapt=5.0, record_states=True),
    "a call is one step": lambda: snn.Leaky(beta=0.9),
    "unroll(xs, time_dim) is fused": lambda: no.LIFBoxCell(),
}


@pytest.mark.parametrize("words", NOTES)
def test_the_report_says_what_stays_its_own_code(words):
    fused = fused_twin(NOTES[words]())
    assert words in str(fused.fuse_report)
    assert "fused: " in str(fused.fuse_report)


def test_an_alif_records_as_ever():
    layer = sl.ALIF(tau_mem=5.0, tau_adapt=5.0, record_states=True)
    fused = fused_twin(layer)
    xs = torch.rand(2, 20, 7) * 8
    assert_bits(fused(xs), layer(xs))
    for name, series in layer.recordings.items():
        assert_bits(fused.recordings[name], series)


def test_modules_without_neurons_and_things_that_are_none():
    fused = tt.fuse(nn.Sequential(nn.Linear(2, 3)))
    assert fused.fuse_report.rows == ()
    with pytest.raises(TypeError, match="str"):
        tt.fuse("network")
    assert tt.fuse(sn.NonSpikingLIFNode()).fuse_report.left
    layer = tt.snn.LIB(3)
    layer(torch.ones(2, 3))
    native = tt.fuse(layer)
    assert "native" in native.fuse_report.rows[0].reason
    assert native.raw_beta is layer.raw_beta
    assert_bits(native.unroll(torch.ones(4, 2, 3)), layer.unroll(torch.ones(4, 2, 3)))
    native.reset_states()
    assert layer.mem is not None
    twice = tt.fuse(tt.fuse(sl.IAF()))
    assert twice.fuse_report.rows[0].reason == "already"
    assert twice(torch.rand(1, 3, 2)).shape == (1, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_run_the_layers_own_code(dtype):
    layer = sn.LIFNode(step_mode="m")
    fused = fused_twin(layer)
    xs = (torch.rand(10, 2, 7) * 3).to(dtype)
    assert_bits(fused(xs).float(), layer(xs).float())
    with tt.backend("cpu"), pytest.raises(tt.fused.FuseError, match=str(dtype)):
        fused(xs)


def test_backends_are_obeyed():
    layer = sl.IAF()
    fused = fused_twin(layer)
    xs = torch.rand(2, 20, 7)
    with tt.backend("eager"):
        assert_bits(fused(xs), layer(xs))
    assert fused._sequencer.plans == {}
    sinabs.reset_states(nn.Sequential(fused))
    fused(xs)
    assert len(fused._sequencer.plans) == 1


def test_without_a_compiler_the_layers_own_code_runs_and_says_so_once(monkeypatch):
    layer = sl.IAF()
    fused = fused_twin(layer)
    monkeypatch.setattr(compiler, "find", lambda: None)
    sequence._warn_once.cache_clear()
    xs = torch.rand(2, 20, 7)
    with pytest.warns(FuseWarning, match="no C compiler found"):
        first = fused(xs)
    assert_bits(first, layer(xs))
    assert_bits(fused(xs), layer(xs))
    assert fused_twin(sl.ExpLeak(tau_mem=5.0))(xs).sum() > 0


def test_a_step_that_stops_being_pointwise_says_so_once():
    layer = sl.LIF(tau_mem=5.0, norm_input=False)
    fused = fused_twin(layer)
    layer.reset_fn = fused.reset_fn = ByMean()
    xs = torch.rand(2, 20, 7) * 2
    with pytest.warns(FuseWarning, match="mean"):
        ours = fused(xs)
    assert_bits(ours, layer(xs))
    assert_bits(fused(xs), layer(xs))


def test_hooks_on_a_lifted_cell_see_every_step():
    net = no.Lift(no.LIFBoxCell())
    calls = []
    net.lifted_module.register_forward_hook(lambda *_: calls.append(1))
    fused = tt.fuse(net)
    xs = torch.rand(20, 2, 7) * 20
    assert_bits(fused(xs)[0], net(xs)[0])
    assert len(calls) == 40
    whole = tt.fuse(nn.Sequential(sl.IAF()))
    whole[0].register_forward_hook(lambda *_: calls.append(2))
    whole(torch.rand(1, 3, 2))
    assert calls[-1] == 2


def test_parameters_that_do_not_broadcast_run_the_layers_own_code():
    layer = sl.LIF(tau_mem=torch.rand(2, 1, 7) + 3, norm_input=False)
    fused = fused_twin(layer)
    xs = torch.rand(2, 20, 7)
    assert_bits(fused(xs), layer(xs))


def test_wide_parameters_run_the_layers_own_code():
    layer = snn.Leaky(beta=torch.tensor([0.5, 0.75], dtype=torch.float64))
    fused = fused_twin(layer)
    xs = torch.rand(20, 3, 2)
    ours, own = fused.unroll(xs)[0], torch.stack([layer(x)[0] for x in xs])
    assert_bits(ours, own)


class OfTheUser(nn.Module):
    """A user's neuron: one call is one step, the state is passed."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.8))
        self.threshold = 1.0

    def forward(self, x, state=None):
        v, trace = state if state is not None else (torch.zeros_like(x), torch.zeros_like(x))
        v = self.decay * v + x
        spikes = sg.fast_sigmoid()(v - self.threshold - 0.1 * trace)
        return spikes, (v - spikes.detach() * self.threshold, 0.5 * trace + spikes)


class NoNeuron(nn.Module):
    """Called like one, and mixes its neurons."""

    def forward(self, x, state=None):
        state = torch.zeros_like(x) if state is None else state
        return x.cumsum(-1), state


def test_a_users_own_neuron_gains_unroll():
    fused = tt.fuse(nn.Sequential(OfTheUser(), NoNeuron(), nn.Bilinear(2, 2, 2)))
    assert [(row.path, row.fused) for row in fused.fuse_report.rows] == [("0", True)]
    layer, twin = OfTheUser(), fused[0]
    twin.load_state_dict(layer.state_dict())
    xs = torch.rand(40, 3, 7, requires_grad=True)
    own, state = by_steps(layer, xs, None)
    with tt.backend("cpu"):
        ours, our_state = twin.unroll(xs)
    assert own.sum() > 0
    assert_bits(ours, own)
    for a, b in zip(our_state, state, strict=True):
        assert_bits(a, b)
    leaves = [xs, layer.decay]
    expected = torch.autograd.grad((own * xs.detach()).sum(), leaves)
    given = torch.autograd.grad((ours * xs.detach()).sum(), [xs, twin.decay])
    assert_gradients(given, expected, ["xs", "decay"])
    again = twin.unroll(xs.transpose(0, 1), 1, our_state)[0]
    assert_bits(again.transpose(0, 1), by_steps(layer, xs, state)[0])


def test_fuse_is_reached_from_both_places():
    assert tt.fuse is adapters.fuse
    assert SimpleNamespace(f=tt.fuse).f(nn.Identity()).fuse_report.rows == ()


# ---- long ------------------------------------------------------------------------------------------------------------


@pytest.mark.sweep
@pytest.mark.parametrize("name", EXACT)
def test_ten_million_neuron_steps(name):
    case = CASES[name]
    T, B, N = 100, 4, 25_000
    layer = case.make(N)
    fused = fused_twin(layer)
    xs = normal(case, T, B, N)
    with torch.no_grad():
        own, ours = case.run(layer, xs, None)[0], case.run(fused, xs, None)[0]
    assert not case.spikes or own.outputs[0].sum() > 0
    for k, (a, b) in enumerate(zip(ours.outputs, own.outputs, strict=True)):
        assert_bits(a, b, f"output {k}")
    for state in own.states:
        assert_bits(ours.states[state], own.states[state], state)
