"""Whole networks as people write them, ported in every direction: `tests/networks.py` has them."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import tracetorch as tt
from tests.networks import CASES, FRAMEWORKS, STEPS, excite, forget, make, own, sample, tensors
from tracetorch import adapters
from tracetorch.adapters.networks import recorded
from tracetorch.adapters.observing import check_walk


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_a_network_keeps_its_meaning(name, to):
    net, x, time_dim = make(name)
    result = adapters.convert(net, to=to, sample=x, time_dim=time_dim)
    agreement = result.agreement
    assert agreement.ok, agreement
    assert agreement.unexplained_mismatches == 0
    spiking = [row for row in result.report if row.neuron and row.slots and row.name != "readout"]
    assert all(row.spikes > 20 for row in spiking)
    with torch.no_grad():
        theirs, ours = own(net, x, time_dim), tensors(result.run(x))
    assert [t.shape for t in theirs] == [t.shape for t in ours]
    if to == "tracetorch":
        assert agreement.spike_mismatches == 0
        assert all(row.forward == "exact" for row in result.report if row.neuron), agreement
    if agreement.spike_mismatches == 0:
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["static", "conv", "hidden conv", "events", "skips", "one step", "regression", "recurrent", "sinabs skips"]
)
def test_native_gives_the_sources_own_bits(name):
    net, x, time_dim = make(name)
    result = adapters.convert(net, to="tracetorch", sample=x, time_dim=time_dim)
    with torch.no_grad():
        theirs, ours = own(net, x, time_dim), tensors(result.run(x))
    assert all(same_bits(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("name", ["static", "skips", "events", "sinabs mnist", "sinabs skips"])
def test_another_batch_size_and_length(name):
    net, x, time_dim = make(name)
    result = adapters.convert(net, to="tracetorch", sample=x, time_dim=time_dim)
    other = torch.cat([x, x.flip(0)]) if name == "sinabs mnist" else torch.cat([x, x[:1].flip(-1)])
    if name == "events":
        other = torch.cat([x, x[:, :1]], 1)[: STEPS - 3]
    with torch.no_grad():
        theirs, ours = own(net, other, time_dim), tensors(result.run(other))
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# name -> what a second sample, of which both networks' own forwards are compared too, is longer by.
SECOND = {
    "events": {0: 1, 1: 2},
    "one step": {0: 1, 1: 2},
    "static": {0: 1},
    "sinabs skips": {0: 1, 1: 2},
    "sinabs events": {1: 2},
    "sinabs mnist": {0: 4},
}


@pytest.mark.parametrize("to", ["tracetorch", "sinabs"])
@pytest.mark.parametrize("name", SECOND)
def test_a_second_sample_is_compared(name, to, monkeypatch):
    seen = []

    def check(network, x, outputs):
        seen.append((network.framework, tuple(x.shape)))
        check_walk(network, x, outputs)

    monkeypatch.setattr(recorded, "check_walk", check)
    net, x, time_dim = make(name)
    adapters.convert(net, to=to, sample=x, time_dim=time_dim)
    shape = tuple(size + SECOND[name].get(dim, 0) for dim, size in enumerate(x.shape))
    assert seen == [("sinabs" if "sinabs" in name else "snntorch", shape), (to, shape)]


def test_a_batch_size_that_a_network_of_sinabs_holds_is_said():
    for name in ("sinabs mnist", "sinabs events"):
        net, x, _ = make(name)
        assert "batch size is a constant of the source: 4" in str(adapters.convert(net, to="snntorch", sample=x).report)
    net, x, _ = make("sinabs skips")
    assert "constant" not in str(adapters.convert(net, to="snntorch", sample=x).report)


@pytest.mark.parametrize("name", ["static", "conv", "skips", "events", "one step", "recurrent", "sinabs events"])
def test_it_is_saved_and_loaded(name, tmp_path):
    net, x, time_dim = make(name)
    result = adapters.convert(net, to="tracetorch", sample=x, time_dim=time_dim)
    tt.save(tmp_path / "net.tt", result.model)
    again = tt.load(tmp_path / "net.tt")
    with torch.no_grad():
        results = []
        for model in (result.model, again, copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
            model.reset_states()
            results.append(tensors(model(x) if time_dim is None else tt.unroll(model, x, time_dim, "exact")))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    assert "def forward(self, x):" in repr(again)
    assert again.state_dict().keys() == result.model.state_dict().keys()


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_it_trains_and_still_verifies(to):
    net, x, time_dim = make("skips")
    result = adapters.convert(net, to=to, sample=x, time_dim=time_dim, share_weights=True)
    parameters = [p for p in net.parameters() if p.requires_grad]
    assert {id(p) for p in parameters} <= {id(p) for p in result.model.parameters()}
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.05)
    sum(y.square().mean() for y in tensors(result.run(x))).backward()
    before = net.gain.detach().clone()
    optimizer.step()
    assert not torch.equal(net.gain, before)
    assert result.verify(x).ok


def test_hidden_states_of_the_source_are_left_alone():
    net, x, time_dim = make("hidden conv")
    forget(net)
    net(x[0])
    before = [m.mem.clone() for m in net if hasattr(m, "mem")]
    adapters.convert(net, to="tracetorch", sample=x, time_dim=time_dim)
    after = [m.mem for m in net if hasattr(m, "mem")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_first_layer_and_step_where_two_networks_part():
    net, x, time_dim = make("static")
    result = adapters.convert(net, to="tracetorch", sample=x, time_dim=time_dim)
    assert result.agreement.parting is None
    with torch.no_grad():
        result.model.step.lif2.threshold.add_(0.2)
    parted = result.verify(x).parting
    assert parted is not None
    assert parted[0] == "lif2"
    source, target = own(net, x, None)[0], result.run(x)[0]
    assert parted[1] == int((source != target).flatten(1).any(1).nonzero()[0])


def test_the_report_as_html_escapes_names():
    net, x, time_dim = make("static")
    result = adapters.convert(net, to="tracetorch", sample=x, time_dim=time_dim)
    page = result.report.to_html()
    assert page.count("<tr>") == 1 + len(result.report)
    assert "lif1" in page
    assert "-&gt;" in page
    assert "<script" not in page


class Carries(torch.nn.Module):
    """Hidden states that no call resets."""

    def __init__(self):
        super().__init__()
        self.layers = hidden_dense()

    def forward(self, x):
        return torch.stack([self.layers(step) for step in x])


def hidden_dense():
    import snntorch as snn

    return torch.nn.Sequential(
        excite(torch.nn.Linear(8, 8)), snn.Leaky(0.9, init_hidden=True), excite(torch.nn.Linear(8, 8)),
        snn.Leaky(0.9, init_hidden=True),
    )  # fmt: skip


@pytest.mark.parametrize("to", ["tracetorch", "snntorch"])
def test_states_that_carry_on_from_call_to_call(to):
    torch.manual_seed(0)
    net, x = Carries(), sample(STEPS, 4, 8)
    result = adapters.convert(net, to=to, sample=x)
    assert result.model.carry
    forget(net)
    result.reset()
    with torch.no_grad():
        first, again = (net(x), result.model(x)), (net(x), result.model(x))
    assert same_bits(*first)
    assert same_bits(*again)
    assert not torch.equal(first[0], again[0])
    assert torch.equal(result.run(x), first[0])


def test_states_of_a_sinabs_source_carry_on_too():
    net, x, _ = make("sinabs mnist")
    result = adapters.convert(net, to="tracetorch", sample=x)
    forget(net)
    result.reset()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(net(x), result.model(x))


CHILD = """
import sys
for name in ("samna", "snntorch", "sinabs"):
    sys.modules[name] = None
import torch
import tracetorch as tt

torch.set_num_threads(1)
net = tt.load(sys.argv[1])
data = torch.load(sys.argv[2], weights_only=True)
net.reset_states()
with torch.no_grad():
    found = net(data["x"])
assert [torch.equal(a, b) for a, b in zip(found, data["y"], strict=True)] == [True] * len(data["y"])
print("same")
"""


@pytest.mark.parametrize("name", ["static", "recurrent"])
def test_a_saved_network_runs_where_its_source_cannot_be_imported(name, tmp_path):
    net, x, time_dim = make(name)
    with torch.no_grad():
        expected = own(net, x, time_dim)
    result = adapters.convert(net, to="tracetorch", sample=x, time_dim=time_dim)
    tt.save(tmp_path / "net.tt", result.model)
    torch.save({"x": x, "y": expected}, tmp_path / "data.pt")
    command = [sys.executable, "-W", "error", "-c", CHILD, str(tmp_path / "net.tt"), str(tmp_path / "data.pt")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "same\n"


# ---- recurrent layers over several calls -----------------------------------------------------------------------------


def recurrent_pair(to):
    net, x, _ = make("sinabs recurrent")
    result = adapters.convert(net, to=to, sample=x)
    forget(net)
    result.reset()
    return net, x, result


def test_native_forgets_its_feedback_between_calls_as_sinabs_does():
    net, x, result = recurrent_pair("tracetorch")
    model = result.model
    with torch.no_grad():
        theirs = torch.cat([net(chunk) for chunk in x.split(5, 1)], 1)
        chunks = torch.cat([tt.unroll(model, chunk, 1, "exact") for chunk in x.split(5, 1)], 1)
        forget(net)
        at_once = net(x)
    assert not torch.equal(theirs, at_once)  # sinabs itself: a chunked call is another computation
    torch.testing.assert_close(chunks, theirs)
    rows = [row for row in result.report if row.neuron]
    assert all("starts without feedback" in row.reason for row in rows)


def test_a_native_recurrent_layer_alone_and_saved(tmp_path):
    net, x, result = recurrent_pair("tracetorch")
    tt.save(tmp_path / "net.tt", result.model)
    layer, theirs = tt.load(tmp_path / "net.tt")[1], net[1]
    assert layer.from_start is False
    x = net[0](x).detach()
    with torch.no_grad():
        for chunk in x.split(5, 1):
            torch.testing.assert_close(layer.unroll(chunk, 1), theirs(chunk))


def test_snntorch_says_that_it_keeps_its_feedback_and_can_begin_anew():
    net, x, result = recurrent_pair("snntorch")
    assert all("begin_sequence()" in row.reason for row in result.report if row.neuron)
    found = []
    with torch.no_grad():
        theirs = torch.cat([net(chunk) for chunk in x.split(5, 1)], 1)
        for chunk in x.split(5, 1):
            for module in result.model.modules():
                getattr(module, "begin_sequence", int)()
            found += [result.model(step) for step in chunk.unbind(1)]
    torch.testing.assert_close(torch.stack(found, 1), theirs)


def test_sinabs_keeps_the_feedback_of_a_snntorch_source():
    import snntorch as snn

    torch.manual_seed(0)
    net = torch.nn.Sequential(excite(torch.nn.Linear(8, 8)), snn.RLeaky(beta=0.9, linear_features=8, init_hidden=True))
    x = sample(STEPS, 4, 8)
    result = adapters.convert(net, to="sinabs", sample=x, time_dim=0)
    assert result.agreement.ok
    forget(net)
    result.reset()
    with torch.no_grad():
        theirs = torch.stack([net(step) for step in x])
        ours = torch.cat([result.model(chunk.transpose(0, 1)) for chunk in x.split(5)], 1).transpose(0, 1)
    assert theirs.sum() > 20
    torch.testing.assert_close(ours, theirs)
