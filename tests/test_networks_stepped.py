"""Networks whose forward no graph can hold: run as it stands, with the target's layers in it, named and verified."""

import copy

import pytest
import snntorch as snn
import torch

import tracetorch as tt
from tests.networks import forget, sample
from tests.networks_stepped import (
    B,
    Base,
    Branches,
    Counts,
    CountsCalls,
    Depends,
    EveryConvention,
    FeedsBack,
    Gated,
    ResetsItsLayers,
    SinabsBranches,
    T,
    UsesAStranger,
    check_twin,
    drive,
)
from tracetorch import adapters

SAID = {
    Branches: "looks at a tensor's value",
    Depends: "does not repeat the same step",
    Counts: "does not repeat the same step",
    CountsCalls: "does not repeat the same step",
    UsesAStranger: "no parameter or buffer",
}


@pytest.mark.parametrize("net", SAID, ids=lambda cls: cls.__name__)
def test_it_is_stepped_and_said_so(net):
    source, x = net(), drive()
    result = adapters.convert(source, to="tracetorch", sample=x)
    assert result.agreement.ok, result.agreement
    assert result.agreement.spike_mismatches == 0
    assert result.agreement.steps == T
    remark = result.report.remarks[0]
    assert remark.startswith("stepped")
    assert SAID[net] in remark
    if net is not UsesAStranger:
        assert "line " in remark
    assert all(row.forward == "exact" for row in result.report)
    assert all(row.spikes > 10 for row in result.report if row.neuron)
    assert result.report[-1].name == "forward"
    assert result.report[-1].gradient == ""
    assert not [m for m in result.model.modules() if isinstance(m, snn.SpikingNeuron)]
    with torch.no_grad():
        for _ in range(2):  # a counter counts on in both
            assert torch.equal(source(x), result.run(x))


def test_the_line_of_the_branch_is_named():
    result = adapters.convert(Branches(), to="tracetorch", sample=drive())
    assert "__bool__ at line" in str(result.report)
    assert "__bool__ at line" in result.report.to_html()


def test_the_source_is_left_as_it_was():
    net = CountsCalls()
    before = copy.deepcopy(net.state_dict())
    result = adapters.convert(net, to="tracetorch", sample=drive())
    assert net.calls == 0
    assert net.lif1.mem.numel() == 0
    result.verify(drive())
    assert net.calls == result.model.calls == 0
    assert all(torch.equal(a, before[name]) for name, a in net.state_dict().items())


def test_what_the_forward_keeps_is_put_back():
    class Keeps(Branches):
        def __init__(self):
            super().__init__()
            self.seen, self.last = [], None
            self.table = {"calls": 0}
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("total", torch.zeros(()))

        def step(self, t, x, mem1, mem2, last):
            self.seen.append(t)
            self.table["calls"] += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.total += 1
            self.last, self.new = x, t
            return super().step(t, x + self.mean, mem1, mem2, last)

    net = Keeps()
    seen, table, mean = net.seen, net.table, net.mean
    result = adapters.convert(net, to="tracetorch", sample=drive())
    assert result.agreement.ok, result.agreement
    for model in (net, result.model):
        assert (model.seen, model.table, model.last) == ([], {"calls": 0}, None)
        assert not hasattr(model, "new")
        assert not model.mean.any()
        assert not model.total.any()
    assert net.seen is seen
    assert net.table is table
    assert net.mean is mean
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(net(drive()), result.run(drive()))


@pytest.mark.parametrize("share", [False, True])
def test_it_trains_and_still_verifies(share):
    net, x = Branches(), drive()
    result = adapters.convert(net, to="tracetorch", sample=x, share_weights=share)
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.05)
    before = result.model.fc1.weight.detach().clone()
    result.run(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(result.model.fc1.weight, before)
    assert (net.fc1.weight is result.model.fc1.weight) == share
    assert result.verify(x).ok == share
    assert result.verify(x, carry_back=True).ok


def test_gradients_are_the_sources_own():
    net, x = Branches(), drive()
    result = adapters.convert(net, to="tracetorch", sample=x, require_gradients=True)
    for model in (net, result.model):
        forget(net)
        model(x).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, result.model.get_parameter(name).grad), name


@pytest.mark.parametrize("tamper", ["threshold", "weight"])
def test_a_wrong_target_is_found(tamper):
    result = adapters.convert(Branches(), to="tracetorch", sample=drive())
    with torch.no_grad():
        if tamper == "threshold":
            result.model.lif1.layer.threshold.add_(0.3)
        else:
            result.model.fc2.weight.mul_(1.1)
    agreement = result.verify(drive())
    assert not agreement.ok
    row = next(row for row in agreement.rows if row.name == ("lif1" if tamper == "threshold" else "fc2"))
    assert row.forward == "approximate"
    assert agreement.parting[0] == ("lif1" if tamper == "threshold" else "lif2")


def test_another_forward_is_found():
    result = adapters.convert(Branches(), to="tracetorch", sample=drive())

    class Louder(type(result.model)):
        def step(self, t, x, mem1, mem2, last):
            spk, mem1, mem2 = super().step(t, x, mem1, mem2, last)
            return spk * 2, mem1, mem2

    result.model.__class__ = Louder
    agreement = result.verify(drive())
    assert agreement.rows[-1].forward == "approximate"
    assert not agreement.ok


def test_a_branch_that_the_sample_never_takes_is_no_proof():
    class Rare(Base):
        def step(self, t, x, mem1, mem2, last):
            if x.sum() > 1e6:
                return super().step(t, x, mem1, mem2, last)
            spk, mem1 = self.lif1(self.fc1(x), mem1)
            return spk, mem1, mem2

    with pytest.raises(adapters.ConversionError, match="no branch that calls it"):
        adapters.convert(Rare(), to="tracetorch", sample=drive())


def test_states_that_the_target_would_not_follow_are_refused():
    for to in ("tracetorch", "sinabs"):
        with pytest.raises(adapters.ConversionError, match="second one that follows"):
            adapters.convert(ResetsItsLayers(), to=to, sample=drive())
    assert adapters.convert(ResetsItsLayers(), to="snntorch", sample=drive()).agreement.ok  # snnTorch's own hear it


def test_one_step_per_call():
    net, x = Gated(), drive()
    result = adapters.convert(net, to="tracetorch", sample=x, time_dim=0)
    assert result.agreement.ok, result.agreement
    assert "stepped" in result.report.remarks[0]
    assert {row.name for row in result.report} == {"fc", "synaptic", "recurrent", "out", "forward"}
    forget(net)
    with torch.no_grad():
        steps = [net(step) for step in x]
        theirs = [torch.stack(series) for series in zip(*steps, strict=True)]
        ours = result.run(x)
    assert isinstance(ours, tuple)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    with torch.no_grad():
        result.model.gain.add_(1.0)
    assert "gain" in result.verify(x).changed_parameters


def test_every_layer_called_by_hand():
    net, x = EveryConvention(), drive()
    result = adapters.convert(net, to="tracetorch", sample=x, require_gradients=True)
    assert result.agreement.ok, result.agreement
    assert result.agreement.spike_mismatches == 0
    assert all((row.forward, row.gradient or "exact") == ("exact", "exact") for row in result.report)
    assert all(row.spikes > 10 for row in result.report if row.neuron)
    assert all(m.training for m in (net.norm, net.drop, result.model.norm, result.model.drop))
    assert "training mode" in str(result.report)


def test_a_sinabs_source():
    net, x = SinabsBranches(), sample(B, T, 8) * 2
    result = adapters.convert(net, to="tracetorch", sample=x)
    assert result.agreement.ok, result.agreement
    assert result.agreement.steps == T
    assert result.agreement.unexplained_mismatches == 0
    assert all(row.spikes > 10 for row in result.report if row.neuron)
    forget(net)
    result.reset()
    with torch.no_grad():
        for _ in range(2):  # states carry on, the feedback of the recurrent layer does not
            torch.testing.assert_close(net(x), result.model(x))


def test_a_recurrence_by_hand():
    source, x = FeedsBack(), drive()
    result = adapters.convert(source, to="tracetorch", sample=x)
    assert result.stepped
    check_twin(source, x, result)


def test_it_is_code_and_no_file_holds_it(tmp_path):
    result = adapters.convert(Branches(), to="tracetorch", sample=drive())
    with pytest.raises(tt.FileError, match=r"Branches, which cannot be saved"):
        tt.save(tmp_path / "net.tt", result.model)
    twin = copy.deepcopy(result.model)
    result.reset()
    assert torch.equal(twin(drive()), result.model(drive()))
