"""`adapters.convert`: the trap that it avoids, what `run` gives, round trips."""

import numpy as np
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from snntorch import utils
from torch import nn

import tracetorch as tt
from tests.adapter_checks import bits
from tests.converting import B, T, generator, linear, own_run, own_sinabs, sample, sinabs_net, snn_net
from tracetorch import adapters

# ---- the trap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "about"), [(0.5, 2759), (0.8, 10398), (0.9, 15468), (0.95, 19145), (0.99, 22241)])
def test_the_naive_mapping_is_wrong_in_thousands_of_spikes_and_ours_in_none(beta, about):
    """snnTorch subtracts the threshold one step later and undecayed, sinabs at once."""
    x = 0.12 + 0.5 * torch.randn(1000, 16, 16, generator=generator())
    net = nn.Sequential(snn.Leaky(beta, init_hidden=True))
    spikes = own_run(net, x)
    naive = sl.LIF(
        tau_mem=-1 / np.log(beta),
        spike_fn=activation.SingleSpike,
        reset_fn=activation.MembraneSubtract(),
        norm_input=False,
    )
    wrong = int((naive(x.transpose(0, 1)).transpose(0, 1) != spikes).sum())
    assert spikes.numel() == 256_000
    assert wrong == pytest.approx(about, rel=0.1)

    result = adapters.convert(net, to="sinabs", sample=x, time_dim=0)
    assert result.agreement.ok
    assert result.agreement.spike_slots == 256_000
    assert result.agreement.unexplained_mismatches == 0
    assert result.agreement.spike_mismatches <= 2
    assert result.report[0].spikes == spikes.sum() > 10_000
    right = result.model(x.transpose(0, 1)).transpose(0, 1)
    assert int((right != spikes).sum()) == result.agreement.spike_mismatches


def test_the_three_steps_of_the_trap():
    """beta = 0.9, x = 1.5, 0.46, 0.2: snnTorch fires once; a threshold taken off at once fires again."""
    x = torch.tensor([1.5, 0.46, 0.2]).reshape(3, 1, 1)
    net = nn.Sequential(snn.Leaky(0.9, init_hidden=True))
    assert own_run(net, x).flatten().tolist() == [1, 0, 0]
    naive = sl.LIF(-1 / np.log(0.9), spike_fn=activation.SingleSpike, norm_input=False)
    assert naive(x.transpose(0, 1)).flatten().tolist() == [1, 0, 1]
    for to in ("sinabs", "tracetorch"):
        assert adapters.convert(net, to=to, sample=x, time_dim=0).run(x).flatten().tolist() == [1, 0, 0]


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["tracetorch", "sinabs", "snntorch"])
@pytest.mark.parametrize("emits", [{}, {"output": True}, {"init_hidden": False}], ids=["spikes", "output", "no hidden"])
@pytest.mark.parametrize("time_dim", [0, 1])
def test_run_gives_the_sources_own_structure(to, emits, time_dim):
    net, xs = snn_net(last=emits), sample()
    x = xs.movedim(0, time_dim)
    result = adapters.convert(net, to=to, sample=x, time_dim=time_dim)
    theirs, ours = own_run(net, xs), result.run(x)
    if emits:
        assert isinstance(ours, tuple)
        (theirs, membranes), (ours, own_membranes) = theirs, ours
        own_membranes = own_membranes.movedim(time_dim, 0)
        assert (membranes > 1).any(), "the membrane before its reset"
        if to == "sinabs":
            assert (own_membranes - membranes).abs().max() < 1e-5
        else:
            assert bits(own_membranes) == bits(membranes)
    assert isinstance(ours, torch.Tensor)
    assert theirs.sum() > 20
    assert bits(ours.movedim(time_dim, 0)) == bits(theirs)


def test_run_of_a_sinabs_source_takes_batch_first():
    net, x = sinabs_net(), sample(B, T, 8)
    for to in ("tracetorch", "snntorch", "sinabs"):
        result = adapters.convert(net, to=to, sample=x)
        ours = result.run(x)
        assert ours.sum() > 20
        assert torch.equal(ours, own_sinabs(net, x))


@pytest.mark.parametrize("to", ["tracetorch", "sinabs", "snntorch"])
@pytest.mark.parametrize("emits", [{}, {"output": True}], ids=["spikes", "output"])
def test_single_steps_carry_the_state(to, emits):
    net, xs = snn_net(last=emits), sample()
    result = adapters.convert(net, to=to, sample=xs[0])
    assert result.agreement.steps == 1
    theirs = own_run(net, xs)
    for _ in range(2):
        results = [result.run(x) for x in xs]
        if emits:
            assert torch.stack([r[0] for r in results]).sum() > 20
            assert torch.equal(torch.stack([r[0] for r in results]), theirs[0])
            assert (torch.stack([r[1] for r in results]) - theirs[1]).abs().max() < 1e-5
        else:
            assert torch.equal(torch.stack(results), theirs)
        result.reset()


@pytest.mark.parametrize("to", ["tracetorch", "sinabs", "snntorch"])
def test_another_batch_size_in_single_steps_is_no_silent_difference(to):
    """snnTorch starts anew on another shape; sinabs's own layers would keep random rows of the old state."""
    net, xs = snn_net(), sample()
    result = adapters.convert(net, to=to, sample=xs[0])
    own_run(net, xs[:20])
    for x in xs[:20]:
        result.run(x)
    theirs = torch.stack([net(x[:2]) for x in xs])
    state = torch.get_rng_state()
    ours = torch.stack([result.run(x[:2]) for x in xs])
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_an_ordinary_model_of_its_framework():
    net, xs = snn_net(), sample()
    spikes = own_run(net, xs)
    native = adapters.convert(net, to="tracetorch", sample=xs, time_dim=0).model
    assert isinstance(native, tt.Model)
    assert torch.equal(tt.unroll(native, xs), spikes)
    sinabs = adapters.convert(net, to="sinabs", sample=xs, time_dim=0).model
    assert isinstance(sinabs[1], sl.LIF)
    assert torch.equal(sinabs(xs.transpose(0, 1)).transpose(0, 1), spikes)
    again = adapters.convert(net, to="snntorch", sample=xs, time_dim=0).model
    utils.reset(again)
    assert torch.equal(torch.stack([again(x) for x in xs]), spikes)


def test_names_flags_and_nesting_stay():
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(linear(8, 12), snn.Leaky(0.9, init_hidden=True, learn_beta=True)))
    net.add_module("head", nn.Sequential(nn.ReLU(), linear(12, 4), snn.Leaky(0.8, init_hidden=True)))
    net.head.eval()
    for to in ("tracetorch", "sinabs", "snntorch"):
        result = adapters.convert(net, to=to, sample=sample(), time_dim=0)
        assert [row.name for row in result.report] == ["body.0", "body.1", "head.0", "head.1", "head.2"]
        assert torch.equal(result.model.body[0].weight, net.body[0].weight)
        assert result.model.body[1].training
        assert not result.model.head[2].training
        assert [p.requires_grad for p in result.model.body[0].parameters()] == [True, True]


def test_sinabs_with_repeated_convolutions():
    parts = [sl.Repeat(nn.Conv2d(2, 4, 3)), sl.LIF(5.0, spike_fn=activation.SingleSpike, norm_input=False)]
    parts += [sl.Repeat(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 3, 3), nn.ReLU())), sl.LIF(8.0, norm_input=False)]
    net = nn.Sequential(*parts, nn.Flatten(2), nn.Linear(3, 5), sl.LIF(4.0, norm_input=False))
    with torch.no_grad():
        net[0].module.weight.copy_(torch.randn(4, 2, 3, 3, generator=generator()))
        net[2].module[1].weight.copy_(torch.randn(3, 4, 3, 3, generator=generator(1)))
        net[5].weight.copy_(torch.randn(5, 3, generator=generator(2)) * 2)
    x = sample(3, 40, 2, 8, 8)
    theirs = own_sinabs(net, x)
    assert theirs.sum() > 20
    for to in ("tracetorch", "snntorch", "sinabs"):
        result = adapters.convert(net, to=to, sample=x)
        assert result.agreement.ok
        names = ["0.module", "1", "2.module.0", "2.module.1", "2.module.2", "3", "4", "5", "6"]
        assert [row.name for row in result.report] == names
        assert {row.forward for row in result.report} <= {"exact", "rounding"}
        ours = result.run(x)
        assert ours.shape == theirs.shape
        assert (ours != theirs).float().mean() < 0.01
        assert int((ours != theirs).sum()) == result.report[-1].spike_mismatches


class Repeat(nn.Module):
    """Calls a module twice; it has no more than the name in common with `sinabs.layers.Repeat`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(self.module(x))


def test_a_class_of_ones_own_is_not_taken_for_sinabss_by_its_name():
    neuron = sinabs_net()[3]
    net = nn.Sequential(*sinabs_net()[:2], linear(12, 4, 3), Repeat(linear(4, 4)), neuron)
    x = sample(B, T, 8)
    theirs = own_sinabs(net, x)
    result = adapters.convert(net, to="tracetorch", sample=x)
    assert [row.name for row in result.report if row.name.startswith("3")] == ["3.module", "3.module"]
    assert torch.equal(result.run(x), theirs)
    assert theirs.sum() > 10


@pytest.mark.parametrize("to", ["tracetorch", "sinabs", "snntorch"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_network_that_ends_in_a_linear_readout(to, batch):
    """The bits of a matrix product with one row depend on where its input lies in memory."""
    net = nn.Sequential(linear(5, 13), snn.Leaky(0.9, init_hidden=True), linear(13, 3))
    xs = sample(T, batch, 5)
    result = adapters.convert(net, to=to, sample=xs, time_dim=0)
    assert result.agreement.ok
    assert result.report[1].spikes > 20
    assert (result.run(xs) - own_run(net, xs)).abs().max() < 1e-5
    if to != "sinabs":
        assert bits(result.run(xs)) == bits(own_run(net, xs))


def test_batch_norm_and_dropout_in_eval_mode_are_carried():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), snn.Leaky(0.9, init_hidden=True), nn.Dropout(0.5), nn.Flatten()
    )
    net.extend([linear(4 * 36, 5), snn.Leaky(0.8, init_hidden=True)])
    x = torch.randn(30, 3, 2, 8, 8, generator=generator()) * 2
    net.train()
    for step in x:
        net[1](net[0](step))
    net.eval()
    for to in ("tracetorch", "sinabs"):
        result = adapters.convert(net, to=to, sample=x, time_dim=0)
        assert result.agreement.ok
        assert result.report[2].spikes > 100
        theirs = own_run(net, x)
        assert (result.run(x) != theirs).float().mean() < 0.01
        inner = getattr(result.model[1], "module", result.model[1])
        assert not inner.training
        result.model.train()
        assert inner.training


@pytest.mark.parametrize("to", ["tracetorch", "sinabs", "snntorch"])
def test_float64_networks(to):
    one = nn.Sequential(linear(8, 12), snn.Leaky(0.9, init_hidden=True, learn_beta=True)).double()
    x = sample().double()
    result = adapters.convert(one, to=to, sample=x, time_dim=0)
    assert result.agreement.ok
    assert result.agreement.gradient_error < 1e-6  # spikes, and so their gradients, are float32 in both
    assert result.agreement.max_state_difference < 1e-12
    assert torch.equal(result.run(x), own_run(one, x))
    other = nn.Sequential(linear(8, 12), sl.LIF(5.0, norm_input=False)).double()
    assert adapters.convert(other, to=to, sample=x.transpose(0, 1)).agreement.ok


def test_a_float64_network_of_two_layers_is_carried_by_the_native_layers_and_refused_by_sinabs():
    """snnTorch's spikes become float64 with a graded factor per neuron; sinabs's are float32 always."""
    net = snn_net(graded_spikes_factor=torch.ones(1)).double()
    x = sample().double()
    assert own_run(net, x).dtype == torch.float64
    assert adapters.convert(net, to="tracetorch", sample=x, time_dim=0).agreement.ok
    with pytest.raises(adapters.ConversionError, match=r"dtype=torch\.float64: .*Remedy: a float32 network"):
        adapters.convert(net, to="sinabs", sample=x, time_dim=0)


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learn_beta": True, "learn_threshold": True},
        {"reset_mechanism": "zero"},
        {"reset_mechanism": "zero", "reset_delay": False},
        {"reset_mechanism": "none"},
        {"spike_grad": snn.surrogate.fast_sigmoid(slope=5)},
    ],
    ids=lambda options: ", ".join(options) or "defaults",
)
def test_there_and_back_again(options):
    net, xs = snn_net(**options), sample()
    there = adapters.convert(net, to="sinabs", sample=xs, time_dim=0)
    back = adapters.convert(there.model, to="snntorch", sample=xs.transpose(0, 1))
    assert torch.equal(back.run(xs.transpose(0, 1)).transpose(0, 1), own_run(net, xs))
    for k in (1, 3):
        first, last = adapters.spec(net[k]), adapters.spec(back.model[k])
        assert type(back.model[k]) is snn.Leaky
        assert last.differences(first) == {}
        assert last.parameters["mem_decay"].value.tobytes() == first.parameters["mem_decay"].value.tobytes()
        assert last.parameters["threshold"] == first.parameters["threshold"]
        assert last.parameters["mem_decay"].learnable == first.parameters["mem_decay"].learnable


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spike_fn": activation.MultiSpike, "norm_input": True},
        {"reset_fn": activation.MembraneSubtract(0.7), "min_v_mem": -0.5},
        {"reset_fn": activation.MembraneReset(0.1), "spike_fn": activation.MaxSpike(2)},
        {"train_alphas": True, "surrogate_grad_fn": activation.Gaussian()},
    ],
    ids=str,
)
def test_from_sinabs_and_back_again(options):
    net, x = sinabs_net(**options), sample(B, T, 8)
    there = adapters.convert(net, to="snntorch", sample=x)
    back = adapters.convert(there.model, to="sinabs", sample=x.transpose(0, 1), time_dim=0)
    assert torch.equal(back.run(x.transpose(0, 1)).transpose(0, 1), own_sinabs(net, x))
    for k in (1, 3):
        first, last = adapters.spec(net[k]), adapters.spec(back.model[k])
        assert last.differences(first) == {}
        assert last.parameters["threshold"] == first.parameters["threshold"]


def test_a_native_network_is_a_source_too():
    net, xs = snn_net(), sample()
    native = adapters.convert(net, to="tracetorch", sample=xs, time_dim=0)
    for to in ("snntorch", "sinabs", "tracetorch"):
        result = adapters.convert(native.model, to=to, sample=xs, time_dim=0)
        assert result.agreement.ok
        assert torch.equal(result.run(xs), own_run(net, xs))
