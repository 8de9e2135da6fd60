"""A neuron layer that is used twice in a step: a graph whose calls advance one state, in the source's order."""

import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from torch import nn

import tracetorch as tt
from tests.networks import excite, forget, sample
from tests.networks_stepped import B, T, UsesTwice, check_twin, drive
from tracetorch import adapters


class TwiceWithAGain(UsesTwice):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))

    def step(self, t, x, mem1, mem2, last):
        return super().step(t, x * self.gain, mem1, mem2, last)


@pytest.mark.parametrize("to", ["tracetorch", "snntorch"])
@pytest.mark.parametrize("net", [UsesTwice, TwiceWithAGain], ids=lambda cls: cls.__name__)
def test_a_layer_used_twice_is_a_graph(net, to):
    source, x = net(), drive()
    result = adapters.convert(source, to=to, sample=x)
    assert not result.stepped
    check_twin(source, x, result)
    row = next(row for row in result.report if row.name == "lif1")
    assert row.slots == 2 * T * B * 8
    assert row.forward == row.gradient == "exact"
    assert "lif1: called several times in a step" in str(result.report)
    assert result.verify(x, carry_back=True).ok


def test_it_is_saved_and_trains(tmp_path):
    source, x = TwiceWithAGain(), drive()
    result = adapters.convert(source, to="tracetorch", sample=x, share_weights=True)
    tt.save(tmp_path / "net.tt", result.model)
    with torch.no_grad():
        assert torch.equal(tt.load(tmp_path / "net.tt")(x), source(x))
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.1)
    result.run(x).square().mean().backward()
    optimizer.step()
    assert result.verify(x).ok
    assert torch.equal(source(x), result.run(x))


def test_a_wrong_layer_that_is_used_twice_is_found():
    result = adapters.convert(UsesTwice(), to="tracetorch", sample=drive())
    with torch.no_grad():
        result.model.step.lif1.threshold.add_(0.3)
    agreement = result.verify(drive())
    assert not agreement.ok
    assert next(row for row in agreement.rows if row.name == "lif1").forward == "approximate"


def test_the_other_order_of_the_two_calls_is_found():
    result = adapters.convert(UsesTwice(), to="tracetorch", sample=drive())
    model = result.model
    names = [node.name for node in model.step.nodes]
    first, second = names.index("lif1"), names.index("lif1_1")
    nodes = list(model.step.nodes)
    nodes[second] = nodes[second]._replace(args=nodes[first].args)
    model.step.nodes = tuple(nodes)
    assert not result.verify(drive()).ok


@pytest.mark.parametrize("to", ["tracetorch", "snntorch"])
def test_a_chain_with_one_layer_twice(to):
    torch.manual_seed(0)
    lif = snn.Leaky(0.9, init_hidden=True)
    net = nn.Sequential(excite(nn.Linear(8, 8)), lif, excite(nn.Linear(8, 8)), lif)
    x = drive()
    result = adapters.convert(net, to=to, sample=x, time_dim=0)
    assert result.agreement.ok
    assert result.agreement.steps == T
    forget(net)
    with torch.no_grad():
        theirs = torch.stack([net(step) for step in x])
        assert torch.equal(theirs, result.run(x))


def test_a_layer_of_sinabs_used_twice_goes_on_after_the_first_sequence():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2, self.lif = excite(nn.Linear(8, 8), 20), excite(nn.Linear(8, 8), 20), sl.LIF(6.0)

        def forward(self, x):
            return self.lif(self.fc2(self.lif(self.fc1(x))))

    net, x = Twice(), sample(B, T, 8) * 2
    for to in ("tracetorch", "snntorch", "sinabs"):
        result = adapters.convert(net, to=to, sample=x)
        assert result.stepped
        assert result.agreement.ok, result.agreement
        forget(net)
        with torch.no_grad():
            torch.testing.assert_close(result.run(x), net(x))


def test_a_layer_used_twice_is_stepped_in_sinabs():
    source, x = TwiceWithAGain(), drive()
    result = adapters.convert(source, to="sinabs", sample=x, share_weights=True, require_gradients=True)
    assert result.stepped
    assert "used twice" in result.report.remarks[0]
    assert result.agreement.ok, result.agreement
    with torch.no_grad():
        torch.testing.assert_close(result.run(x), source(x))
