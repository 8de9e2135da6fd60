"""Networks of snnTorch's layers over whole sequences, [T, B, C]: `StateLeaky` and `LinearLeaky`."""

import pytest
import snntorch as snn
import torch
from torch import nn

import tracetorch as tt
from tests.networks import FRAMEWORKS, excite, sample, tensors
from tracetorch import adapters

T, B = 12, 4


def x_of(seed=7):
    return sample(T, B, 8, seed=seed) * 2


class Whole(nn.Module):
    """A forward of its own: a skip, a function between, a sum over time, a membrane out."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = excite(nn.Linear(8, 8))
        self.first = snn.StateLeaky(beta=torch.rand(8) * 0.8, channels=8, **options)
        self.second = snn.LinearLeaky(beta=0.7, in_features=16, out_features=5, **options)
        excite(self.second.linear)

    def forward(self, x):
        spikes, _ = self.first(self.fc1(x))
        spikes, membranes = self.second(torch.cat([torch.relu(spikes), x], 2))
        return {"counts": spikes.sum(0), "membranes": membranes}


def membranes():
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8), nn.Linear(8, 5)
    quiet = {"output": False}
    return nn.Sequential(first, snn.StateLeaky(0.8, 8, **quiet), nn.ReLU(), second, snn.StateLeaky(0.6, 5, **quiet))


def spikes():
    torch.manual_seed(0)
    return nn.Sequential(excite(nn.Linear(8, 8)), snn.StateLeaky(0.8, 8))


def alone():
    torch.manual_seed(0)
    return snn.LinearLeaky(0.8, 8, 5, graded_spikes_factor=1.0)


LEARNABLE = {"learn_beta": True, "learn_threshold": True}
NETS = {
    "class": Whole,
    "learnable": lambda: Whole(**LEARNABLE),
    "membranes": membranes,
    "spikes": spikes,
    "alone": alone,
}


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize("name", NETS)
def test_a_network_of_whole_sequences(name, to):
    net, x = NETS[name](), x_of()
    result = adapters.convert(net, to=to, sample=x, require_gradients=True)
    assert result.agreement.ok, result.agreement
    assert result.agreement.unexplained_mismatches == 0
    assert result.agreement.steps == T
    assert not result.stepped
    assert not result.report.remarks
    assert all(row.spikes > 10 for row in result.report if row.neuron and row.slots)
    for other in (x, torch.cat([x, x[:3]]).repeat(1, 2, 1)):
        for _ in range(2):  # nothing is kept from call to call
            with torch.no_grad():
                theirs, ours = tensors(net(other)), tensors(result.run(other))
            for a, b in zip(theirs, ours, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_the_source_is_left_as_it_was():
    net = Whole()
    net(x_of(1))
    before, values = (net.first.spk, net.second.spk, net.second.mem), dict(net.state_dict())
    adapters.convert(net, to="tracetorch", sample=x_of())
    after = (net.first.spk, net.second.spk, net.second.mem)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())


def test_a_matrix_and_its_neuron_have_a_row_each():
    result = adapters.convert(Whole(), to="tracetorch", sample=x_of())
    rows = {row.name: row for row in result.report}
    assert rows["second.linear"].target == "torch.Linear"
    assert rows["second.neuron"].neuron
    assert rows["second.neuron"].source == "snntorch.StateLeaky"


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_it_trains_and_still_verifies(to):
    net, x = Whole(**LEARNABLE), x_of()
    result = adapters.convert(net, to=to, sample=x)
    optimizer = torch.optim.SGD(result.model.parameters(), lr=1e-4)
    sum(y.square().mean() for y in tensors(result.run(x))).backward()
    optimizer.step()
    assert not result.verify(x).ok
    assert result.verify(x, carry_back=True).ok
    with torch.no_grad():
        net.second.linear.weight.mul_(1.5)  # seen, though the matrix and the neuron are read apart
    assert "second.linear" in {row.name for row in result.verify(x).rows if row.forward == "approximate"}


def test_shared_weights():
    net, x = Whole(**LEARNABLE), x_of()
    result = adapters.convert(net, to="tracetorch", sample=x, share_weights=True)
    ours = {id(parameter) for parameter in result.model.parameters()}
    assert {id(net.second.linear.weight), id(net.second.tau), id(net.first.tau), id(net.fc1.weight)} <= ours


def test_it_is_saved_and_loaded(tmp_path):
    net, x = Whole(), x_of()
    result = adapters.convert(net, to="tracetorch", sample=x)
    tt.save(tmp_path / "net.tt", result.model)
    with torch.no_grad():
        found = zip(tensors(tt.load(tmp_path / "net.tt")(x)), tensors(result.run(x)), strict=True)
        assert all(torch.equal(a, b) for a, b in found)


def test_what_is_refused():
    x = x_of()
    mixed = nn.Sequential(snn.StateLeaky(0.8, 8, output=False), snn.Leaky(0.9, init_hidden=True))
    with pytest.raises(adapters.ConversionError, match="layers of one kind"):
        adapters.convert(mixed, to="tracetorch", sample=x)
    with pytest.raises(adapters.ConversionError, match="runs over time itself"):
        adapters.convert(membranes(), to="tracetorch", sample=x, time_dim=0)
    norm = nn.Sequential(nn.BatchNorm1d(4), snn.StateLeaky(0.8, 8)).eval()
    with pytest.raises(adapters.ConversionError, match="mix time with its own dimensions"):
        adapters.convert(norm, to="tracetorch", sample=x)
    short = nn.Sequential(snn.StateLeaky(0.8, 8, kernel_truncation_steps=3))
    with pytest.raises(adapters.ConversionError, match="kernel_truncation_steps"):
        adapters.convert(short, to="tracetorch", sample=x)
