"""A network ported to native, saved by `tt.save`, loads and runs bit for bit where its source cannot be imported."""

import subprocess
import sys

import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from torch import nn

import tracetorch as tt
from tracetorch import adapters

T, B = 50, 4

CHILD = """
import sys
for name in ("samna", "snntorch", "sinabs"):
    sys.modules[name] = None
for name in ("snntorch", "sinabs"):
    try:
        __import__(name)
    except ImportError:
        pass
    else:
        raise SystemExit(name + " can be imported")
import torch
import tracetorch as tt

torch.set_num_threads(int(sys.argv[4]))
net = tt.load(sys.argv[1])
data = torch.load(sys.argv[2], weights_only=True)
xs = data["x"].requires_grad_()
ys = torch.stack([net(x) for x in xs])
states = {f"{layer}.{name}": s for layer, named in tt.save_states(net).items() for name, s in named.items()}
wanted = {"x": xs, **{n: p for n, p in net.named_parameters() if p.requires_grad}}
grads = torch.autograd.grad((ys * data["weights"]).sum(), list(wanted.values()))
net.reset_states()
again = tt.unroll(net, xs.detach())
torch.save({"y": ys.detach(), "again": again.detach(), "states": {n: s.detach() for n, s in states.items()},
            "grads": dict(zip(wanted, grads))}, sys.argv[3])
loaded = [n for n in sys.modules if n.split(".")[0] in ("snntorch", "sinabs") and sys.modules[n] is not None]
assert not loaded, loaded
"""


def bits(tensor):
    return str(tensor.dtype), list(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def excite(module, scale):
    with torch.no_grad():
        module.weight.mul_(scale)
    return module


def snntorch_dense():
    layers = [excite(nn.Linear(6, 16), 4), snn.Leaky(torch.rand(16) * 0.5 + 0.4, init_hidden=True, learn_beta=True)]
    layers += [excite(nn.Linear(16, 12), 4), snn.Leaky(0.8, init_hidden=True, reset_mechanism="zero")]
    layers += [excite(nn.Linear(12, 12), 4), snn.Leaky(0.7, init_hidden=True, reset_delay=False, learn_threshold=True)]
    layers += [excite(nn.Linear(12, 8), 4), snn.Leaky(0.7, init_hidden=True, graded_spikes_factor=0.5)]
    layers[-1].spike_grad = snn.surrogate.fast_sigmoid(slope=5)
    return nn.Sequential(*layers), (T, B, 6), {"time_dim": 0}


def snntorch_images():
    layers = [excite(nn.Conv2d(2, 4, 3), 4), snn.Leaky(torch.rand(4, 1, 1) * 0.5 + 0.4, init_hidden=True)]
    layers += [nn.MaxPool2d(2), nn.Flatten(), excite(nn.Linear(36, 8), 3), snn.Leaky(0.8, init_hidden=True)]
    return nn.Sequential(*layers), (T, B, 2, 8, 8), {"time_dim": 0}


def sinabs_all_sorts():
    layers = [excite(nn.Linear(6, 16), 15), sl.LIF(torch.rand(16) * 9 + 2, tau_syn=3.0, min_v_mem=-0.5)]
    layers += [excite(nn.Linear(16, 12), 4)]
    options = {"spike_fn": activation.MaxSpike(2), "reset_fn": activation.MembraneReset(0.1), "norm_input": False}
    layers += [sl.LIF(6.0, train_alphas=True, surrogate_grad_fn=activation.Gaussian(), **options)]
    layers += [excite(nn.Linear(12, 8), 3)]
    options = {"spike_fn": activation.SingleSpike, "reset_fn": activation.MembraneSubtract(0.7), "norm_input": False}
    layers += [sl.LIF(6.0, **options)]
    return nn.Sequential(*layers), (B, T, 6), {}


@pytest.mark.parametrize("make", [snntorch_dense, snntorch_images, sinabs_all_sorts])
def test_it_runs_identically_where_the_source_cannot_be_imported(make, tmp_path):
    torch.manual_seed(0)
    net, shape, options = make()
    x = torch.rand(shape)
    result = adapters.convert(net, to="tracetorch", sample=x, **options)
    assert all(row.spikes > 20 for row in result.report if row.neuron)

    xs = (x if options else x.transpose(0, 1)).clone().requires_grad_()
    result.reset()
    ys = torch.stack([result.model(step) for step in xs])
    states = {
        f"{layer}.{name}": s for layer, named in tt.save_states(result.model).items() for name, s in named.items()
    }
    weights = torch.randn(ys.shape)
    wanted = {"x": xs, **{n: p for n, p in result.model.named_parameters() if p.requires_grad}}
    grads = dict(zip(wanted, torch.autograd.grad((ys * weights).sum(), list(wanted.values())), strict=True))

    tt.save(tmp_path / "net.tt", result.model)
    torch.save({"x": xs.detach(), "weights": weights}, tmp_path / "data.pt")
    files = [str(tmp_path / name) for name in ("net.tt", "data.pt", "result.pt")]
    command = [sys.executable, "-W", "error", "-c", CHILD, *files, str(torch.get_num_threads())]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr

    there = torch.load(tmp_path / "result.pt", weights_only=True)
    assert bits(there["y"]) == bits(ys)
    assert bits(there["again"]) == bits(ys)
    assert {n: bits(s) for n, s in there["states"].items()} == {n: bits(s) for n, s in states.items()}
    assert len(states) >= 2
    assert {n: bits(g) for n, g in there["grads"].items()} == {n: bits(g) for n, g in grads.items()}
    if not isinstance(net[1], sl.LIF):  # and both are the source's own bits
        for layer in net:
            if isinstance(layer, snn.Leaky):
                layer.mem = torch.zeros(0)
        assert bits(there["y"]) == bits(torch.stack([net(step) for step in x]))


def test_nothing_of_the_source_framework_is_in_the_file(tmp_path):
    net, shape, options = snntorch_dense()
    model = adapters.convert(net, to="tracetorch", sample=torch.rand(shape), **options).model
    for module in model.modules():
        assert type(module).__module__.split(".")[0] in ("tracetorch", "torch")
    tt.save(tmp_path / "net.tt", model)
    content = (tmp_path / "net.tt").read_bytes()
    assert content.count(b"snntorch") == content.count(b"snntorch.Leaky"), "only as the name of an order of operations"
    loaded = tt.load(tmp_path / "net.tt")
    assert adapters.convert(loaded, to="snntorch", sample=torch.rand(shape), time_dim=0).agreement.ok
