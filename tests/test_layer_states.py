"""Hidden states of native layers and of models: kept, reset, detached, saved, copied."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tests import naive
from tests.bits import assert_bits
from tests.layer_cases import LAYERS, Mine, hard, noise

# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_states_carry_on_until_they_are_reset(name):
    layer = LAYERS[name](3)
    xs = noise(20, 2, 3)
    assert all(state is None for state in layer.save_states().values())
    whole = layer.unroll(xs)
    layer.reset_states()
    assert all(state is None for state in layer.save_states().values())
    parts = torch.cat([layer.unroll(xs[:7]), layer.unroll(xs[7:8]), layer.unroll(xs[8:])])
    assert_bits(parts, whole)
    assert not torch.equal(layer.unroll(xs), whole), "without a reset another sequence goes on from here"
    layer.zero_states()
    assert all((state == 0).all() and state.shape == (2, 3) for state in layer.save_states().values())
    assert_bits(layer.unroll(xs), whole)


@pytest.mark.parametrize("name", LAYERS)
def test_states_are_no_part_of_the_state_dict(name):
    layer = LAYERS[name](3)
    before = set(layer.state_dict())
    layer(noise(2, 3))
    assert set(layer.state_dict()) == before
    assert not before & set(layer.save_states())
    other = LAYERS[name](3)
    other(noise(7, 3))
    other.load_state_dict(layer.state_dict())
    assert next(iter(other.save_states().values())).shape == (7, 3), "loading weights leaves the states alone"


def test_states_follow_to():
    layer = Mine(3)
    layer(noise(2, 3))
    layer.double()
    assert layer.mem.dtype == layer.slow.dtype == torch.float64
    assert layer(noise(2, 3).double()).dtype == torch.float64


def test_detached_states_cut_the_graph():
    layer = tt.snn.LIB(3)
    x = noise(2, 3).requires_grad_()
    layer(x)
    assert layer.mem.requires_grad
    value = layer.mem.clone()
    layer.detach_states()
    assert not layer.mem.requires_grad
    assert_bits(layer.mem, value)
    layer(noise(2, 3)).sum().backward()
    assert x.grad is None
    fresh = tt.snn.LIB(3)
    fresh.detach_states()
    assert fresh.mem is None


def test_truncated_backpropagation():
    """Two chunks with a detach between: each backward ends at the cut."""
    layer, xs = tt.snn.LIB(3), noise(20, 2, 3)
    gradients = []
    for chunk in xs.split(10):
        layer.zero_grad()
        layer.unroll(chunk).sum().backward()
        gradients.append(layer.raw_beta.grad.clone())
        layer.detach_states()
    layer.zero_grad()
    layer.reset_states()
    layer.unroll(xs).sum().backward()
    assert not torch.allclose(sum(gradients), layer.raw_beta.grad, rtol=1e-3), "the cut has an effect"


def test_saved_states_continue_where_they_were_saved():
    layer, xs = Mine(3), noise(20, 2, 3)
    layer.unroll(xs[:10])
    saved = layer.save_states()
    assert list(saved) == ["mem", "slow"]
    rest = layer.unroll(xs[10:])
    layer.load_states(saved)
    assert_bits(layer.unroll(xs[10:]), rest)
    other = copy.deepcopy(layer)
    other.reset_states()
    other.load_states(saved)
    assert_bits(other.unroll(xs[10:]), rest)


def test_states_of_another_layer_are_refused():
    layer = Mine(3)
    layer(noise(2, 3))
    kept = layer.save_states()
    for bad in ({}, {"mem": None}, {**kept, "third": None}):
        with pytest.raises(ValueError, match=r"Mine: states .*'mem', 'slow'"):
            layer.load_states(bad)
    assert layer.mem is kept["mem"], "and nothing was changed"
    layer.load_states({"slow": None, "third": None}, strict=False)
    assert layer.mem is kept["mem"]
    assert layer.slow is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_in_the_middle_of_a_sequence(name, duplicate):
    """The state hangs on a graph; the copy gets its value, and the original keeps its graph."""
    layer, xs = LAYERS[name](3), noise(20, 2, 3)
    first = layer.unroll(xs[:10])
    other = duplicate(layer)
    states = other.save_states()
    assert set(states) == set(layer.save_states())
    for state, value in states.items():
        mine = getattr(layer, state)
        assert mine.requires_grad
        assert not value.requires_grad
        assert value.data_ptr() != mine.data_ptr()
        assert_bits(value, mine)
    assert_bits(other.unroll(xs[10:]), layer.unroll(xs[10:]))
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()
    first.sum().backward()
    assert all(parameter.grad is None for parameter in other.parameters())
    assert any(parameter.grad.any() for parameter in layer.parameters())


def test_a_copy_of_a_spec_neuron_in_the_middle_of_a_sequence():
    spec = naive.lif_spec(np.float32(5.0), np.float32(1.0), syn=np.float32(3.0), dtype=np.float32, raw="exp_tau")
    layer, xs = tt.snn.SpecNeuron(spec), noise(20, 2, 3) * 4
    layer.unroll(xs[:10])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            saved = layer.save_states()
            assert_bits(other.unroll(xs[10:]), layer.unroll(xs[10:]))
            layer.load_states(saved)
        assert other.spec == layer.spec


def test_torch_save_of_a_model_in_the_middle_of_a_sequence():
    model, xs = tt.Sequential(nn.Linear(4, 3), hard(3)), noise(20, 2, 4)
    tt.unroll(model, xs[:10], fold="exact")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert_bits(tt.unroll(other, xs[10:], fold="exact"), tt.unroll(model, xs[10:], fold="exact"))


# ---- models ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """No `tt.Model`: native layers at several depths, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 3), hard(3))
        self.blocks = nn.ModuleDict({"a": tt.snn.LI(3), "b": nn.ModuleList([Mine(3)])})
        self.again = self.blocks["a"]

    def forward(self, x):
        return self.blocks["b"][0](self.blocks["a"](self.first(x)))


class Ours(tt.Model, Net):
    pass


@pytest.mark.parametrize("cls", [Net, Ours])
def test_the_state_functions_reach_every_native_layer(cls):
    torch.manual_seed(0)
    net, xs = cls(), noise(20, 2, 4)
    paths = {"first.1": ["mem"], "blocks.a": ["mem"], "blocks.b.0": ["mem", "slow"]}
    whole = tt.unroll(net, xs, fold="exact")
    saved = tt.save_states(net)
    assert {path: list(states) for path, states in saved.items()} == paths
    assert all(state.requires_grad for states in saved.values() for state in states.values())
    tt.detach_states(net)
    detached = tt.save_states(net)
    assert not any(state.requires_grad for states in detached.values() for state in states.values())
    tt.reset_states(net)
    assert all(state is None for states in tt.save_states(net).values() for state in states.values())
    assert_bits(tt.unroll(net, xs, fold="exact"), whole)
    tt.reset_states(net)
    tt.unroll(net, xs[:9], fold="exact")
    middle = tt.save_states(net)
    rest = tt.unroll(net, xs[9:], fold="exact")
    assert_bits(rest, whole[9:])
    tt.load_states(net, middle)
    assert_bits(tt.unroll(net, xs[9:], fold="exact"), rest)


def test_a_model_has_them_as_methods():
    torch.manual_seed(0)
    for net in (Ours(), tt.Sequential(nn.Linear(4, 3), nn.Sequential(hard(3), Mine(3)))):
        xs = noise(20, 2, 4)
        whole = tt.unroll(net, xs, fold="exact")
        saved = net.save_states()
        assert saved.keys() == tt.save_states(net).keys()
        net.zero_states()
        for states in net.save_states().values():
            assert all((state == 0).all() for state in states.values())
        net.load_states(saved)
        net.detach_states()
        assert not any(s.requires_grad for states in net.save_states().values() for s in states.values())
        net.reset_states()
        assert all(s is None for states in net.save_states().values() for s in states.values())
        assert_bits(tt.unroll(net, xs, fold="exact"), whole)


def test_loading_is_strict_and_all_or_nothing():
    net = Ours()
    net(noise(2, 4))
    saved = tt.save_states(net)
    kept = {path: dict(states) for path, states in saved.items()}
    reset = {path: dict.fromkeys(states) for path, states in saved.items()}
    for bad, named in (
        ({path: reset[path] for path in ("first.1", "blocks.a")}, r"blocks\.b\.0"),
        ({**reset, "other": {}}, "other"),
        ({**reset, "blocks.b.0": {"mem": None}}, "Mine"),
        ({**reset, "blocks.b.0": {"mem": None, "slow": None, "third": None}}, "third"),
        ({}, "blocks"),
    ):
        with pytest.raises(ValueError, match=named):
            tt.load_states(net, bad)
        now = tt.save_states(net)
        assert all(now[path][name] is kept[path][name] for path in kept for name in kept[path]), "nothing was changed"
    tt.load_states(net, {"first.1": {"mem": None}, "other": {}}, strict=False)
    assert net.first[1].mem is None
    assert net.blocks["a"].mem is kept["blocks.a"]["mem"]


def test_a_module_without_native_layers_has_no_states():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    tt.reset_states(net)
    tt.detach_states(net)
    assert tt.save_states(net) == {}
    tt.load_states(net, {})


def test_a_bare_layer_is_a_module_too():
    layer = hard(3)
    layer(noise(2, 3))
    saved = tt.save_states(layer)
    assert list(saved) == [""]
    tt.reset_states(layer)
    assert layer.mem is None
    tt.load_states(layer, saved)
    assert layer.mem is saved[""]["mem"]


def test_copies_of_a_model_do_not_share_states():
    net = Ours()
    net(noise(2, 4))
    other = copy.deepcopy(net)
    other.reset_states()
    assert net.first[1].mem is not None
    assert other.again is other.blocks["a"], "a layer used twice is one layer in the copy"


def test_training_changes_the_raw_values_and_the_values_with_them():
    torch.manual_seed(0)
    layer = hard(3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    beta, threshold = layer.beta.detach().clone(), layer.threshold.detach().clone()
    for _ in range(3):
        layer.reset_states()
        optimizer.zero_grad()
        layer.unroll(noise(30, 4, 3)).mean().backward()
        optimizer.step()
    assert (layer.beta != beta).all()
    assert (layer.threshold != threshold).all()
    assert torch.equal(layer.beta, torch.sigmoid(layer.raw_beta))
