"""What `tt.save` refuses, since the file would lose it; nothing is written then."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tracetorch as tt
from tracetorch.core import storage


class MyLinear(nn.Linear):
    pass


class MyLIB(tt.snn.LIB):
    pass


class MyParameter(nn.Parameter):
    pass


def changed(thing, *names, **attributes):
    """`thing` after calling the methods `names` with a function, and with other attributes."""
    for name in names:
        getattr(thing, name)(lambda *args: None)
    for name, value in attributes.items():
        setattr(thing, name, value)
    return thing


def containing_itself():
    net = nn.Sequential()
    return net.append(net)


def nested(depth):
    net = nn.Sequential()
    for _ in range(depth - 1):
        net = nn.Sequential(net)
    return net


def with_weight(weight):
    return changed(nn.Linear(2, 2), weight=weight)


def with_buffer(**buffers):
    net = nn.BatchNorm1d(2)
    for name, buffer in buffers.items():
        net.register_buffer(name, buffer)
    return net


def views():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight.data = net[0].weight.data.T
    return net


def spec_neuron(threshold=1.0):
    values = {"mem_decay": 0.9, "threshold": 1.0, "spike_scale": 1.0}
    layer = tt.snn.SpecNeuron(
        tt.NeuronSpec(
            "snntorch.Leaky",
            reset_timing="same_step_residual",
            surrogate=tt.functional.Surrogate("atan"),
            parameters={name: tt.Parameter(np.float32(value), True) for name, value in values.items()},
        )
    )
    layer.threshold.data.fill_(threshold)
    return layer


def foreign():
    return pytest.importorskip("snntorch").Leaky(0.9)


EYE = torch.eye(2)
REFUSED = {
    "foreign layer": (foreign, ["module 'a.1'", "snntorch", "Leaky", 'adapters.convert(net, to="tracetorch")']),
    "own subclass": (lambda: MyLinear(2, 2), ["module 'a.1'", "MyLinear", "state_dict"]),
    "own layer": (lambda: MyLIB(2), ["module 'a.1'", "MyLIB"]),
    "list": (nn.ModuleList, ["ModuleList"]),
    "lambda": (lambda: tt.snn.LIB(2, spike_fn=lambda x: x), ["module 'a.1'", "spike_fn", "sigmoid4x"]),
    "torch function": (lambda: tt.snn.LIB(2, quant_fn=torch.round), ["quant_fn", "round_ste"]),
    "own quantizer": (lambda: tt.snn.LIB(2, quant_fn=MyLinear(2, 2)), ["module 'a.1.quant_fn'", "MyLinear"]),
    "other quantizer": (lambda: tt.snn.LIB(2, quant_fn=nn.Tanh()), ["quant_fn", "Tanh"]),
    "forward hook": (lambda: changed(nn.Tanh(), "register_forward_hook"), ["module 'a.1'", "_forward_hooks", "remove"]),
    "pre-hook": (lambda: changed(nn.Tanh(), "register_forward_pre_hook"), ["_forward_pre_hooks"]),
    "backward hook": (lambda: changed(tt.snn.LI(2), "register_full_backward_hook"), ["_backward_hooks"]),
    "state hook": (lambda: changed(nn.Tanh(), "register_state_dict_post_hook"), ["_state_dict_hooks"]),
    "parametrization": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), ["parametrized", "weight"]),
    "pruning": (lambda: prune.random_unstructured(nn.Linear(2, 2), "weight", 1), ["_forward_pre_hooks"]),
    "own forward": (lambda: changed(nn.ReLU(), forward=torch.tanh), ["'forward'", "lost"]),
    "note": (lambda: changed(nn.ReLU(), note="mine"), ["'note'"]),
    "stale padding": (lambda: changed(nn.Conv1d(1, 1, 3), padding=(4,)), ["_reversed_padding"]),
    "stale size": (lambda: changed(nn.Linear(2, 2), in_features=3), ["weight", "[2, 2]", "[2, 3]"]),
    "infinite argument": (lambda: nn.ELU(float("inf")), ["alpha=inf"]),
    "odd argument": (lambda: nn.Softmax(dim="batch"), ["dim='batch'"]),
    "extra buffer": (lambda: with_buffer(mask=EYE), ["module 'a.1'", "mask"]),
    "extra parameter": (lambda: changed(nn.Sequential(), scale=nn.Parameter(EYE)), ["scale"]),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), ["'a.1.weight'", "meta"]),
    "sparse": (lambda: with_weight(nn.Parameter(EYE.to_sparse())), ["sparse"]),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), ["'a.1.weight'", "complex64", "bfloat16"]),
    "gradient hook": (
        lambda: with_weight(changed(nn.Parameter(EYE.clone()), "register_hook")),
        ["'a.1.weight'", "gradient hooks"],
    ),
    "tensor class": (lambda: with_weight(MyParameter(EYE)), ["'a.1.weight'", "MyParameter"]),
    "on a graph": (
        lambda: with_buffer(running_mean=torch.ones(2, requires_grad=True) * 2),
        ["'a.1.running_mean'", "detach"],
    ),
    "views": (views, ["'a.1.0.weight'", "'a.1.1.weight'", "one memory"]),
    "itself": (containing_itself, ["containing itself"]),
    "too deep": (lambda: nested(99), ["100 deep"]),
    "NaN in a spec": (lambda: spec_neuron(float("nan")), ["module 'a.1'", "not finite"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_save_refuses_what_would_be_lost(name, tmp_path):
    make, words = REFUSED[name]
    net = nn.Sequential()
    net.add_module("a", nn.Sequential(nn.Tanh(), make()))
    (tmp_path / "net.tt").write_bytes(b"before")
    with pytest.raises(tt.FileError) as caught:
        tt.save(tmp_path / "net.tt", net)
    assert [word for word in words if word not in str(caught.value)] == []
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"net.tt": b"before"}


@pytest.mark.parametrize("net", [None, 3, {"weight": EYE}, nn.Linear])
def test_save_refuses_what_is_no_module(net, tmp_path):
    with pytest.raises(tt.FileError, match="the network is a"):
        tt.save(tmp_path / "net.tt", net)


def test_the_deepest_network_that_saves_also_loads(tmp_path):
    tt.save(tmp_path / "net.tt", nested(100))
    assert len(list(tt.load(tmp_path / "net.tt").modules())) == 100


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file(step, tmp_path, monkeypatch):
    tt.save(tmp_path / "net.tt", nn.Linear(2, 2))
    before = (tmp_path / "net.tt").read_bytes()

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(storage.os, step, fail)
    with pytest.raises(OSError, match="the disk is full"):
        tt.save(tmp_path / "net.tt", nn.Linear(3, 3))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"net.tt": before}
