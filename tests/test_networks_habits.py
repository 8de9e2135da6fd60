"""Habits of forwards that a recording must not take for something else: each gives the source's own outputs."""

import importlib.util
from typing import NamedTuple

import numpy as np
import pytest
import sinabs
import sinabs.layers as sl
import snntorch as snn
import torch
import torch.nn.functional as F
from torch import nn

from tests.networks import FRAMEWORKS, excite, forget, tensors
from tests.networks_stepped import Base, drive
from tracetorch import adapters, cli


def converted(net, to, x, **options):
    """A conversion that agrees, and whose target gives what the source gives, gradients of the input included."""
    result = adapters.convert(net, to=to, sample=x, **options)
    assert result.agreement.ok, result.agreement
    assert result.agreement.unexplained_mismatches == 0
    assert sum(row.spikes for row in result.report if row.neuron) > 10
    check_same(net, result, x, options.get("time_dim"))
    return result


def check_same(net, result, x, time_dim=None):
    x = x.clone().requires_grad_()
    forget(net)
    theirs = tensors(net(x)) if time_dim is None else [torch.stack([net(step) for step in x])]
    ours = tensors(result.run(x))
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)
    expected, found = (torch.autograd.grad(sum(y.sum() for y in ys), x)[0] for ys in (theirs, ours))
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


class Named(nn.Module):
    """Names that a graph has for attributes of its own, or that are no Python."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inputs, self.output = excite(nn.Linear(8, 8)), excite(nn.Linear(8, 8))
        self.parts = nn.ModuleDict({"é 1": snn.Leaky(0.9), "for": snn.Leaky(0.8)})
        self.functions = nn.Identity()
        self.reads = nn.Parameter(torch.ones(8))
        self.register_buffer("nodes", torch.tensor(1.5))

    def forward(self, x):
        mem1, mem2 = self.parts["é 1"].init_leaky(), self.parts["for"].init_leaky()
        spikes = []
        for step in x:
            spk, mem1 = self.parts["é 1"](self.inputs(step) * self.reads, mem1)
            spk, mem2 = self.parts["for"](self.output(spk.to(x.dtype)) * self.nodes, mem2)
            spikes.append(self.functions(spk))
        return torch.stack(spikes)


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_names_that_a_graph_has_for_itself(to):
    net = Named()
    result = converted(net, to, drive())
    assert {"inputs_", "output_"} <= {row.name for row in result.report}
    again = adapters.convert(Named(), to=to, sample=drive())
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.zero_()
    result.reset()
    again.model.load_state_dict(result.model.state_dict())
    assert torch.equal(again.run(drive()), result.run(drive()))


class Computes(nn.Module):
    """Weights that are computed in the forward: a mask, weights of another layer, a normalised weight; no loop."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = excite(nn.Linear(8, 8))
        self.normed = nn.utils.parametrizations.weight_norm(excite(nn.Linear(8, 8)))
        self.register_buffer("mask", (torch.rand(8, 8) < 0.7).float())
        self.lif1, self.lif2, self.lif3 = (snn.Leaky(beta, init_hidden=True) for beta in (0.7, 0.8, 0.9))

    def forward(self, x):
        spk = self.lif1(self.fc(x))
        spk = self.lif2(F.linear(spk, self.fc.weight.t() * self.mask, self.fc.bias))
        return self.lif3(self.normed(spk))


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_weights_that_the_forward_computes(to):
    net = Computes()
    result = converted(net, to, drive(), time_dim=0, share_weights=True)
    named = {"net": net, "target": result.model}
    found = {}
    for which in named:
        forget(net)
        net.zero_grad()
        out = result.run(drive()) if which == "target" else torch.stack([net(step) for step in drive()])
        out.pow(2).sum().backward()
        found[which] = {name: p.grad.clone() for name, p in net.named_parameters()}
    for name, gradient in found["net"].items():
        torch.testing.assert_close(found["target"][name], gradient, rtol=1e-3, atol=1e-3, msg=name)


class ResetsItself(nn.Module):
    """A network of sinabs that starts anew in each call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif = excite(nn.Linear(8, 8)), sl.LIF(10.0, norm_input=False)

    def forward(self, x):
        sinabs.reset_states(self)
        return self.lif(self.fc(x))


@pytest.mark.parametrize("to", ["tracetorch", "snntorch"])
def test_a_network_of_sinabs_that_resets_itself_does_not_carry_on(to):
    net, x = ResetsItself(), drive().transpose(0, 1).contiguous()
    result = converted(net, to, x)
    first, second = (result.model(x) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, net(x))


class CarriesOn(ResetsItself):
    def forward(self, x):
        return self.lif(self.fc(x))


@pytest.mark.parametrize("silent", [False, True])
def test_one_that_does_not_reset_carries_on_whatever_the_sample(silent):
    net, x = CarriesOn(), drive().transpose(0, 1).contiguous()
    with torch.no_grad():
        net.fc.bias.zero_()
    result = adapters.convert(net, to="tracetorch", sample=x * 0 if silent else x)
    forget(net)
    for _ in range(2):
        torch.testing.assert_close(result.model(x), net(x))


class NormsBefore(nn.Module):
    """Batch norm of all steps at once, before the loop over them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.bn, self.lif = excite(nn.Linear(8, 8)), nn.BatchNorm1d(8), snn.Leaky(0.8)
        self.bn.weight.data.fill_(3.0)

    def forward(self, x):
        h, mem, spikes = self.bn(self.fc(x.flatten(0, 1))).view(x.shape), self.lif.init_leaky(), []
        for t in range(len(x)):
            spk, mem = self.lif(h[t], mem)
            spikes.append(spk)
        return torch.stack(spikes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("to", FRAMEWORKS)
def test_the_mode_of_what_comes_before_the_steps(to, training):
    net = NormsBefore().train(training)
    converted(net, to, drive())
    assert net.bn.training is training


def test_what_comes_before_the_steps_is_carried_back_and_named():
    net = NormsBefore().eval()
    result = adapters.convert(net, to="tracetorch", sample=drive())
    assert not result.report.remarks
    with torch.no_grad():
        result.model.before.fc.weight.neg_()
    assert result.verify(drive(), carry_back=True).ok
    agreement = result.verify(drive())
    assert not agreement.ok
    assert agreement.changed_parameters == ("fc.weight",)
    assert agreement.spike_mismatches
    said = adapters.convert(net, to="sinabs", sample=drive()).report.remarks
    assert any("not in result.model: fc, bn" in remark for remark in said)


class Both(NamedTuple):
    spikes: torch.Tensor
    total: torch.Tensor


class GivesNames(Base):
    def forward(self, x):
        spikes = super().forward(x)
        return Both(spikes, spikes.sum(0))


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_a_named_tuple_out(to):
    result = converted(GivesNames(), to, drive())
    assert not result.stepped
    assert isinstance(result.run(drive()), Both)


class Penalised(nn.Module):
    """One step per call, a sum of weights beside the spikes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif = excite(nn.Linear(8, 8)), snn.Leaky(0.9, init_hidden=True)

    def forward(self, x):
        return self.lif(self.fc(x)), self.fc.weight.square().sum(), torch.zeros(0)


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_an_output_without_time(to):
    net, x = Penalised(), drive()
    result = adapters.convert(net, to=to, sample=x, time_dim=0)
    assert result.stepped
    assert result.agreement.ok, result.agreement
    forget(net)
    for a, b in zip([torch.stack(each) for each in zip(*map(net, x), strict=True)], result.run(x), strict=True):
        torch.testing.assert_close(b, a)


class ScalesInside(nn.Module):
    """A network of sinabs with a parameter of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif = excite(nn.Linear(8, 8)), sl.LIF(10.0, norm_input=False)
        self.gain = nn.Parameter(torch.full((8,), 1.5))

    def forward(self, x):
        return self.lif(self.fc(x) * self.gain)


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_a_parameter_of_the_network_itself_in_sinabs(to):
    converted(ScalesInside(), to, drive().transpose(0, 1).contiguous())


class Folds(NormsBefore):
    """A product of two sizes."""

    def forward(self, x):
        h = self.fc(x.reshape(x.shape[0] * x.shape[1], 8)).view(x.shape[0], x.shape[1], 8)
        mem, spikes = self.lif.init_leaky(), []
        for t in range(len(x)):
            spk, mem = self.lif(h[t], mem)
            spikes.append(spk)
        return torch.stack(spikes)


def from_the_shell(net, to, folder, *options):
    np.save(folder / "x.npy", drive().numpy())
    torch.save(net().state_dict(), folder / "w.pt")
    given = [f"{__name__}:{net.__name__}", "--to", to, "--sample", str(folder / "x.npy"), *options]
    return cli.main(["convert", *given, "--weights", str(folder / "w.pt"), "--out", str(folder / "out")])


@pytest.mark.parametrize(
    ("net", "to"),
    [("Folds", "snntorch"), ("Attends", "sinabs"), ("Computes", "sinabs"), ("Computes", "snntorch")],
)
def test_the_file_gives_what_the_model_gives(net, to, tmp_path, capsys):
    cls = globals()[net]
    time_dim = 0 if cls is Computes else None
    options = [] if time_dim is None else ["--time-dim", "0"]
    assert from_the_shell(cls, to, tmp_path, *options) == 0, capsys.readouterr().err
    spec = importlib.util.spec_from_file_location("written", tmp_path / "out" / "network.py")
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    again, x = written.load(), drive()
    model = adapters.convert(cls().eval(), to=to, sample=x, time_dim=time_dim).model
    with torch.no_grad():
        if to == "sinabs":
            found, expected = (tensors(m(x.transpose(0, 1))) for m in (again, model))
        elif time_dim is None:
            found, expected = tensors(again(x)), tensors(model(x))
        else:
            found, expected = ([m(step) for step in x] for m in (again, model))
    assert all(map(torch.equal, found, expected))
    assert sum(float(y.sum()) for y in expected) > 10


@pytest.mark.parametrize(
    ("net", "to", "said"),
    [("Named", "snntorch", "'for': it cannot stand in a Python file"), ("Attends", "tracetorch", "cannot be saved")],
)
def test_what_no_file_holds_is_refused_by_name(net, to, said, tmp_path, capsys):
    assert from_the_shell(globals()[net], to, tmp_path) == 1
    error = capsys.readouterr().err
    assert "refused" in error
    assert said.split(": ")[-1] in error


class Masks(Base):
    def step(self, t, x, mem1, mem2, last):
        kept = x.mean(-1, keepdim=True) > 0.9
        return super().step(t, torch.where(kept, x, x * 0.2), mem1, mem2, last)


class Attends(Base):
    """A module that gives a tensor and `None`."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def step(self, t, x, mem1, mem2, last):
        both = torch.stack([x, x * 0.5], 1)
        return super().step(t, x + self.attention(both, both, both, need_weights=False)[0][:, 0], mem1, mem2, last)


class Rectifies(Base):
    """Rectifies in place what it uses again."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def step(self, t, x, mem1, mem2, last):
        h = self.fc1(x)
        spk, mem1 = self.lif1(self.relu(h) - h * 0.5, mem1)
        h = self.fc2(spk)
        spk, mem2 = self.lif2(F.relu(h, inplace=True) + h, mem2)
        return spk, mem1, mem2


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize("net", [Masks, Attends, Rectifies], ids=lambda cls: cls.__name__)
def test_calls_within_a_step(net, to):
    assert not converted(net(), to, drive()).stepped


class WritesAPart(Base):
    """Writes into a part of a tensor that it goes on to use."""

    def step(self, t, x, mem1, mem2, last):
        h = self.fc1(x)
        h[:, :4].mul_(2.0)
        spk, mem1 = self.lif1(h, mem1)
        return super().step(t, spk, mem1, mem2, last)


class WritesThroughAView(Base):
    def step(self, t, x, mem1, mem2, last):
        h = self.fc1(x)
        first = h[:, :1]
        h += 1.0
        return super().step(t, x + first, mem1, mem2, last)


class Moves(nn.Module):
    """A network of sinabs over [T, B, ...]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif = excite(nn.Linear(8, 8)), sl.LIF(10.0, norm_input=False)

    def forward(self, x):
        return self.lif(self.fc(x.transpose(0, 1))).transpose(0, 1)


class Truncates(Moves):
    """Backpropagation cut every five steps."""

    def forward(self, x):
        found = []
        for part in x.transpose(0, 1).split(5, 1):
            found.append(self.lif(self.fc(part)))
            self.lif.v_mem.detach_()
        return torch.cat(found, 1)


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize("net", [WritesAPart, WritesThroughAView, Moves, Truncates], ids=lambda cls: cls.__name__)
def test_what_no_graph_holds_is_stepped(net, to):
    assert converted(net(), to, drive()).stepped


def test_an_output_that_is_written_into_is_refused_by_name():
    class Scales(Base):
        def step(self, t, x, mem1, mem2, last):
            if x.sum() < -100:
                x = x * 2
            spk, mem1, mem2 = super().step(t, x, mem1, mem2, last)
            spk *= 2
            return spk, mem1, mem2

    with pytest.raises(adapters.ConversionError, match="the forward writes into what the layer gave"):
        adapters.convert(Scales(), to="tracetorch", sample=drive())


class Ties(Base):
    """A weight that two layers share and that the forward uses by itself, in a forward that is stepped."""

    def __init__(self):
        super().__init__()
        self.fc3 = nn.Linear(8, 8)
        self.fc3.weight = self.fc2.weight

    def step(self, t, x, mem1, mem2, last):
        x = x * 2 if x.sum() < -100 else x
        spk1, mem1 = self.lif1(self.fc1(x), mem1)
        spk2, mem2 = self.lif2(self.fc3(self.fc2(spk1)) + F.linear(x, self.fc1.weight), mem2)
        return spk2, mem1, mem2


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_a_shared_weight_is_no_false_alarm(to):
    assert converted(Ties(), to, drive()).stepped


class LouderInTraining(Base):
    def step(self, t, x, mem1, mem2, last):
        return super().step(t, x * 1.5 if self.training else x, mem1, mem2, last)


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_depends_on_the_mode_is_named(training):
    net = LouderInTraining().train(training)
    modes = {name: module.training for name, module in net.named_modules()}
    said = converted(net, "tracetorch", drive()).report.remarks
    other = "evaluation" if training else "training"
    assert [remark for remark in said if f"other calls in {other} mode" in remark]
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert not converted(Base().train(training), "tracetorch", drive()).report.remarks


class Anew(Base):
    """A loop of snnTorch's that begins with membranes of its own at every call."""

    def forward(self, x):
        mem1, mem2, out = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        for step in x:
            spk, mem1 = self.lif1(self.fc1(step), mem1)
            spk, mem2 = self.lif2(self.fc2(spk), mem2)
            out.append(spk)
        return torch.stack(out)


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_a_second_call_begins_anew_where_the_forward_does(to, training):
    net, x = Anew().train(training), drive()
    result = converted(net, to, x)
    xs = x.transpose(0, 1) if to == "sinabs" else x
    first, second = (tensors(result.model(xs))[0] for _ in range(2))
    assert first.any()
    assert torch.equal(first, second) == (to != "sinabs")
    assert result.model.training == training
