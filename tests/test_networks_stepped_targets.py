"""Networks whose forward is run as it stands, with layers of snnTorch or sinabs that are called as the source's."""

import copy
import pickle

import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from torch import nn

from tests.networks import excite, forget, sample
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
    drive,
)
from tracetorch import adapters

OTHERS = ("snntorch", "sinabs")
NETS = (Branches, Depends, Counts, CountsCalls, UsesAStranger, FeedsBack)


def stepped(net, to, x, **options):
    """A conversion that is stepped, and agrees."""
    result = adapters.convert(net, to=to, sample=x, require_gradients=True, **options)
    assert result.stepped
    assert result.agreement.ok, result.agreement
    assert result.agreement.unexplained_mismatches == 0
    assert result.report[-1].name == "forward"
    return result


@pytest.mark.parametrize("to", OTHERS)
@pytest.mark.parametrize("net", NETS, ids=lambda cls: cls.__name__)
def test_a_forward_of_snntorch(net, to):
    source, x = net(), drive()
    result = stepped(source, to, x)
    assert all(row.spikes > 10 for row in result.report if row.neuron)
    with torch.no_grad():
        for _ in range(2):  # a counter counts on in both
            torch.testing.assert_close(source(x), result.run(x))
        longer = torch.cat([x, x[:3]]).repeat(1, 2, 1)
        torch.testing.assert_close(source(longer), result.run(longer))
    ours = {type(module).__module__.split(".")[0] for module in result.model.modules() if hasattr(module, "threshold")}
    if to == "snntorch":
        assert ours == {"snntorch"}
        assert result.agreement.spike_mismatches == 0
        assert all(row.forward == "exact" for row in result.report)
        assert not result.model.lif1.init_hidden
    else:
        assert isinstance(result.model.lif1.layer, sl.LIF)
        assert not [m for m in result.model.modules() if isinstance(m, snn.SpikingNeuron)]


class Truncated(Base):
    """Backpropagation through time, truncated every four steps; a decay and a threshold that learn."""

    def __init__(self):
        super().__init__()
        self.lif1 = snn.Leaky(beta=torch.rand(8) * 0.5 + 0.4, learn_beta=True, learn_threshold=True)

    def step(self, t, x, mem1, mem2, last):
        if t % 4 == 3:
            mem1, mem2 = mem1.detach(), mem2.detach()
        return super().step(t, x, mem1, mem2, last)


class TruncatedCurrents(nn.Module):
    """Detached currents and membranes of a second-order layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = excite(nn.Linear(8, 8))
        self.lif1 = snn.Synaptic(alpha=0.6, beta=0.8, learn_alpha=True, learn_beta=True)

    def forward(self, x):
        syn, mem = self.lif1.init_synaptic()
        series = []
        for t, step in enumerate(x):
            spk, syn, mem = self.lif1(self.fc1(step), syn, mem)
            series.append(spk + 0.1 * mem)
            if t % 5 == 2:
                syn, mem = syn.detach(), mem.detach()
        return torch.stack(series)


@pytest.mark.parametrize("to", ["tracetorch", *OTHERS])
@pytest.mark.parametrize("net", [Truncated, TruncatedCurrents], ids=lambda cls: cls.__name__)
def test_truncated_gradients_are_the_sources(net, to):
    source, x = net(), drive()
    result = stepped(source, to, x)
    found = {}
    for key, run in (("source", source), ("target", result.run)):
        forget(source)
        source.zero_grad(), result.model.zero_grad()
        run(x).square().mean().backward()
        model = source if key == "source" else result.model
        layer = model.lif1 if key == "source" or to == "snntorch" else model.lif1.layer
        names = {"beta": ("beta", "mem_decay", "alpha_mem"), "alpha": ("alpha", "syn_decay", "alpha_syn")}
        learnt = [name for name in names if hasattr(source.lif1, name) and getattr(source.lif1, name).requires_grad]
        own = {name: next(getattr(layer, n) for n in names[name] if hasattr(layer, n)) for name in learnt}
        found[key] = {"weight": model.fc1.weight.grad, **{name: p.grad for name, p in own.items()}}
    for name, gradient in found["source"].items():
        assert gradient.any()
        torch.testing.assert_close(found["target"][name], gradient, rtol=1e-4, atol=1e-6)


class Reads(nn.Module):
    """A membrane that the forward reads off the layer, behind a branch."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif = excite(nn.Linear(8, 8)), snn.Leaky(0.9, init_hidden=True, learn_threshold=True, **options)

    def forward(self, x):
        self.lif.reset_mem()
        series = []
        for step in x:
            spk = self.lif(self.fc(step) * (2.0 if step.sum() > 12 else 1.0))
            series.append(spk + 0.1 * self.lif.mem * self.lif.threshold)
        return torch.stack(series)


class Hidden(Reads):
    """The same, which reads no membrane."""

    def forward(self, x):
        self.lif.reset_mem()
        return torch.stack([self.lif(self.fc(step) * (2.0 if step.sum() > 12 else 1.0)) for step in x])


@pytest.mark.parametrize("to", OTHERS)
def test_a_membrane_is_read_as_the_source_shows_it(to):
    source, x = Reads(), drive()
    result = stepped(source, to, x)
    for model, run in ((source, source), (result.model, result.run)):
        forget(model)
        run(x).square().mean().backward()
    torch.testing.assert_close(result.run(x), source(x))
    torch.testing.assert_close(result.model.fc.weight.grad, source.fc.weight.grad)
    layer = result.model.lif if to == "snntorch" else result.model.lif.layer
    threshold = layer.threshold if to == "snntorch" else layer.spike_threshold
    torch.testing.assert_close(threshold.grad, source.lif.threshold.grad)


def test_a_membrane_that_its_reset_loses_is_refused_where_it_is_read():
    with pytest.raises(adapters.ConversionError, match="does not keep it"):
        adapters.convert(Reads(reset_mechanism="zero"), to="sinabs", sample=drive())
    result = stepped(Hidden(reset_mechanism="zero"), "sinabs", drive())
    assert result.report[1].spikes > 10

    class Shown(Branches):
        def __init__(self):
            super().__init__()
            self.lif1 = snn.Leaky(0.9, reset_mechanism="zero")

    with pytest.raises(adapters.ConversionError, match="returns the membrane before its reset"):
        adapters.convert(Shown(), to="sinabs", sample=drive())
    assert stepped(Shown(), "snntorch", drive()).agreement.spike_mismatches == 0


def test_a_membrane_that_is_not_the_shown_one_is_refused():
    layer = stepped(Branches(), "sinabs", drive()).model.lif1
    _, mem = layer(torch.ones(B, 8) * 3, layer.reset_mem())
    layer(torch.ones(B, 8), mem)
    with pytest.raises(adapters.ConversionError, match="unchanged or detached"):
        layer(torch.ones(B, 8), mem + 1)
    with pytest.raises(adapters.ConversionError, match="unchanged or detached"):
        layer(torch.ones(B, 8), mem)  # of the step before the last one


@pytest.mark.parametrize("to", OTHERS)
def test_one_step_per_call(to):
    net, x = Gated(), drive()
    result = stepped(net, to, x, time_dim=0)
    forget(net)
    with torch.no_grad():
        theirs = [torch.stack(series) for series in zip(*[net(step) for step in x], strict=True)]
        ours = result.run(x)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b)


def test_every_layer_of_snntorch():
    net, x = EveryConvention(), drive()
    result = stepped(net, "snntorch", x)
    assert type(result.model.lapicque) is snn.Lapicque
    assert type(result.model.alpha) is snn.Alpha
    with pytest.raises(adapters.ConversionError, match="difference_of_exponentials"):
        adapters.convert(net, to="sinabs", sample=x)


@pytest.mark.parametrize("to", OTHERS)
def test_a_forward_of_sinabs(to):
    net, x = SinabsBranches(), sample(B, T, 8) * 2
    result = stepped(net, to, x)
    assert type(result.model.lif1) is sl.LIF if to == "sinabs" else isinstance(result.model.lif1.layer, snn.Leaky)
    forget(net)
    result.reset()
    with torch.no_grad():
        for _ in range(2):  # states carry on, the feedback of the recurrent layer does not
            torch.testing.assert_close(net(x), result.model(x))


@pytest.mark.parametrize("to", OTHERS)
@pytest.mark.parametrize("share", [False, True])
def test_it_trains_and_still_verifies(share, to):
    net, x = Branches(), drive()
    result = adapters.convert(net, to=to, sample=x, share_weights=share)
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.05)
    before = result.model.fc1.weight.detach().clone()
    result.run(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(result.model.fc1.weight, before)
    assert (net.fc1.weight is result.model.fc1.weight) == share
    assert result.verify(x).ok == share
    assert result.verify(x, carry_back=True).ok


@pytest.mark.parametrize("to", OTHERS)
def test_a_wrong_target_is_found(to):
    result = adapters.convert(Branches(), to=to, sample=drive())
    layer = result.model.lif1 if to == "snntorch" else result.model.lif1.layer
    with torch.no_grad():
        (layer.threshold if to == "snntorch" else layer.spike_threshold).add_(0.3)
    agreement = result.verify(drive())
    assert not agreement.ok
    assert agreement.parting[0] == "lif1"


def test_states_are_put_back_and_copies_run():
    net, x = Branches(), drive()
    result = adapters.convert(net, to="sinabs", sample=x)
    layer = result.model.lif1
    with torch.no_grad():
        spk, mem = layer(x[0] * 9)
    result.verify(x)
    assert spk.any()
    assert layer.mem is mem
    result.run(x)  # with a graph
    result.reset()
    assert layer.mem.numel() == 0
    for twin in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        assert torch.equal(twin(x), result.run(x))


@pytest.mark.parametrize("to", ["tracetorch", *OTHERS])
def test_a_single_state_is_set(to):
    class Currents(Hidden):
        def __init__(self):
            super().__init__()
            self.lif = snn.Synaptic(alpha=0.7, beta=0.8, init_hidden=True)

    source, x = Currents(), drive()
    layers = (source.lif, stepped(source, to, x).model.lif)
    found = []
    for layer in layers:
        layer.syn = torch.ones(B, 8) * 2
        found.append((layer(x[0]), layer.mem, layer.syn))
    assert found[0][0].any()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_membrane_after_a_reset_from_outside_is_found():
    class ReadsToo(ResetsItsLayers):
        """Found to a rounding."""

        def step3(self, x):
            return self.lif3(x) + 0.1 * self.lif3.mem

    with pytest.raises(adapters.ConversionError, match="second one that follows"):
        adapters.convert(ReadsToo(), to="sinabs", sample=drive())


class Watched(nn.Module):
    """A sinabs layer behind a branch, whose membrane is read after its call."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.layer = excite(nn.Linear(8, 8), 20), layer

    def forward(self, x):
        spikes = self.layer(self.fc(x) if x.sum() > 1 else x)
        return spikes, self.layer.v_mem


@pytest.mark.parametrize("to", ["tracetorch", *OTHERS])
@pytest.mark.parametrize("layer", [lambda: sl.LIF(6.0, tau_syn=3.0), lambda: sl.ExpLeak(5.0)], ids=["LIF", "ExpLeak"])
def test_a_membrane_of_sinabs_that_is_read(layer, to):
    net, x = Watched(layer()), sample(B, T, 8) * 2
    result = stepped(net, to, x)
    forget(net)
    with torch.no_grad():
        for ours, theirs in zip(result.run(x), net(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_stock_native_layers():
    class Leaks(Watched):
        def forward(self, x):
            return super().forward(x)[0]

    net, x = Leaks(sl.ExpLeak(5.0, norm_input=False)), sample(B, T, 8) * 2
    result = adapters.convert(net, to="tracetorch", sample=x, stock=True)
    assert result.stepped
    assert result.agreement.ok, result.agreement
    assert type(result.model.layer.layer).__name__ == "LI"
