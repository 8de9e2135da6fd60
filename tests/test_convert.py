"""`adapters.convert`: the trap that it avoids, what `run` gives, what it leaves alone, how weights are shared."""

import copy
import random

import numpy as np
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from snntorch import utils
from torch import nn

import tracetorch as tt
from tracetorch import adapters
from tracetorch.adapters import sinabs as sinabs_adapter

T, B = 60, 5


def bits(tensor):
    return str(tensor.dtype), list(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(inputs, outputs, seed=0, scale=3.0):
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator(seed)) * scale / inputs**0.5)
        layer.bias.copy_(torch.randn(outputs, generator=generator(seed + 1)) * 0.1)
    return layer


def snn_net(last=None, **options):
    """Two layers of Leaky; options go to both, `last` to the second."""
    first = snn.Leaky(**{"beta": torch.linspace(0.5, 0.95, 12), "init_hidden": True, **options})
    second = snn.Leaky(**{"beta": 0.8, "init_hidden": True, **options, **(last or {})})
    return nn.Sequential(linear(8, 12), first, linear(12, 4, 3), second)


def sinabs_net(**options):
    given = {"spike_fn": activation.SingleSpike, "norm_input": False, **options}
    scale = 12.0 if given["norm_input"] else 3.0
    first = sl.LIF(torch.linspace(2, 15, 12), spike_threshold=torch.tensor(1.0), **given)
    second = sl.LIF(6.0, spike_threshold=torch.tensor(1.0), **given)
    return nn.Sequential(linear(8, 12, scale=scale), first, linear(12, 4, 3, scale), second)


def sample(*shape, seed=7):
    return torch.rand(shape or (T, B, 8), generator=generator(seed))


def own_run(net, xs):
    """An snnTorch network over [T, B, ...] as its users run it: spikes, and membranes of the last layer if returned."""
    for layer in net.modules():
        if isinstance(layer, snn.Leaky):
            layer.mem = torch.zeros(0)
    results = [net(x) for x in xs]
    if isinstance(results[0], tuple):
        return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])
    return torch.stack(results)


def own_sinabs(net, xs):
    for layer in net.modules():
        if isinstance(layer, sl.StatefulLayer):
            layer.reset_states()
    return net(xs)


# ---- the trap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "about"), [(0.5, 2759), (0.8, 10398), (0.9, 15468), (0.95, 19145), (0.99, 22241)])
def test_the_naive_mapping_is_wrong_in_thousands_of_spikes_and_ours_in_none(beta, about):
    """SEMANTICS.md, traps, (a): snnTorch subtracts the threshold one step later and undecayed, sinabs at once."""
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
    """snnTorch starts anew on another shape; sinabs keeps random rows of the old state. Equal, or an error."""
    net, xs = snn_net(), sample()
    result = adapters.convert(net, to=to, sample=xs[0])
    own_run(net, xs[:20])
    for x in xs[:20]:
        result.run(x)
    theirs = torch.stack([net(x[:2]) for x in xs])
    state = torch.get_rng_state()
    try:
        ours = torch.stack([result.run(x[:2]) for x in xs])
    except ValueError as error:
        assert "shape" in str(error) or "batch" in str(error)  # noqa: PT017
    else:
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


def test_a_float64_network_of_two_layers_is_carried_or_refused():
    """snnTorch's spikes become float64 with a graded factor per neuron; sinabs's are float32 always."""
    net = snn_net(graded_spikes_factor=torch.ones(1)).double()
    x = sample().double()
    assert own_run(net, x).dtype == torch.float64
    assert adapters.convert(net, to="tracetorch", sample=x, time_dim=0).agreement.ok
    try:
        assert adapters.convert(net, to="sinabs", sample=x, time_dim=0).agreement.ok
    except adapters.ConversionError as error:
        assert "float" in str(error)  # noqa: PT017


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


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(loss_of, net, x):
    x = x.clone().requires_grad_()
    wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
    return [g.detach() for g in torch.autograd.grad(loss_of(x), wanted)]


@pytest.mark.parametrize("reset", [("subtract", True), ("zero", True), ("zero", False), ("none", True)], ids=str)
def test_gradients_of_both_agree_as_the_report_says(reset):
    net = snn_net(learn_beta=True, learn_threshold=True, reset_mechanism=reset[0], reset_delay=reset[1])
    xs = sample()
    weights = torch.randn(T, B, 4, generator=generator(9))
    theirs = gradients(lambda x: (own_run(net, x) * weights).sum(), net, xs)
    result = adapters.convert(net, to="sinabs", sample=xs, time_dim=0, require_gradients=True)
    result.reset()
    model = result.model
    order = [model[0].weight, model[0].bias, model[1].spike_threshold, model[1].alpha_mem]
    order += [model[2].weight, model[2].bias, model[3].spike_threshold, model[3].alpha_mem]
    assert [n for n, _ in net.named_parameters()] == [
        *("0.weight", "0.bias", "1.threshold", "1.beta", "2.weight", "2.bias", "3.threshold", "3.beta")
    ]
    x = xs.clone().requires_grad_()
    loss = (model(x.transpose(0, 1)).transpose(0, 1) * weights).sum()
    ours = torch.autograd.grad(loss, [x, *order])
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0
        assert (mine - other).abs().max() <= 1e-4 * other.abs().max()
    assert {row.gradient for row in result.report} <= {"exact", "rounding"}
    native = adapters.convert(net, to="tracetorch", sample=xs, time_dim=0, require_gradients=True)
    assert {row.gradient for row in native.report} == {"exact"}
    ours = gradients(lambda x: (tt.unroll(native.model, x) * weights).sum(), native.model, xs)
    assert bits(ours[0]) == bits(theirs[0])


def test_gradients_that_overflow_in_the_source_are_no_difference():
    """A straight-through spike and an attached reset: the gradient grows with every step, in both alike."""
    options = {"reset_mechanism": "zero", "reset_delay": False}
    net = snn_net(spike_grad=snn.surrogate.straight_through_estimator(), **options)
    xs = sample(300, B, 8) * 3
    result = adapters.convert(net, to="tracetorch", sample=xs, time_dim=0)
    x = xs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(own_run(net, x).sum(), x)
    assert not torch.isfinite(gradient).all()
    assert result.agreement.ok
    assert {row.forward for row in result.report} == {"exact"}


def test_a_learned_tau_is_reparametrised_and_said_so():
    result = adapters.convert(sinabs_net(), to="snntorch", sample=sample(B, T, 8))
    assert [row.gradient for row in result.report if row.neuron] == ["reparametrised"] * 2
    assert "learned as beta, in the source as exp_tau" in result.report[1].reason
    assert result.report[1].carried[0] == "tau_mem -> beta, learnable"


def test_stock_uses_only_stock_parts_and_the_report_says_what_their_gradient_lacks():
    net, xs = snn_net(), sample()
    result = adapters.convert(net, to="sinabs", sample=xs, time_dim=0, stock=True)
    for k in (1, 3):
        layer, row = result.model[k], result.report[k]
        assert type(layer) is sl.LIF
        assert layer.spike_fn is activation.SingleSpike
        assert type(layer.reset_fn) is activation.MembraneSubtract
        assert type(layer.surrogate_grad_fn) is activation.SingleExponential
        assert (row.forward, row.gradient) == ("rounding", "differs")
        assert "reset_gradient: the reset stays in the graph; the source detaches it" in row.reason
        assert row.gradient_error > 0.01, "and it was measured"
        assert not row.unexpected
    assert result.agreement.ok
    assert torch.equal(result.run(xs), own_run(net, xs))
    assert not any(isinstance(layer, sinabs_adapter.LIF) for layer in result.model.modules())


def test_stock_back_to_snntorch():
    net = sinabs_net(reset_fn=activation.MembraneReset())
    result = adapters.convert(net, to="snntorch", sample=sample(B, T, 8), stock=True)
    for k in (1, 3):
        assert type(result.model[k]) is snn.Leaky
        assert result.model[k].spike_grad.__module__ == "snntorch.surrogate"
        assert result.report[k].gradient == "differs"
        assert "atan in its place" in result.report[k].reason
    assert result.agreement.ok


def test_a_learnable_threshold_of_sinabs_differs_only_where_it_does():
    """Our subclass of Leaky gives the threshold no gradient through the spikes, nor does sinabs: equal, and said so."""
    net, x = sinabs_net(), sample(B, T, 8)
    net[1].spike_threshold.requires_grad_()
    result = adapters.convert(net, to="snntorch", sample=x, require_gradients=True)
    assert result.report[1].gradient in ("rounding", "reparametrised")
    assert result.report[1].gradient_error < 1e-4


# ---- what is left alone ----------------------------------------------------------------------------------------------


def everything(net):
    """All that a user could notice: tensors by identity and bits, gradients, hidden states, flags, generators."""
    rows = {}
    for path, module in net.named_modules():
        rows[path] = (module.training, sorted(vars(module)), sorted(module._buffers), sorted(module._parameters))
        stores = [module._parameters, module._buffers, {k: v for k, v in vars(module).items() if torch.is_tensor(v)}]
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None:
                    grad = None if not tensor.is_leaf or tensor.grad is None else (id(tensor.grad), bits(tensor.grad))
                    rows[path, name] = (id(tensor), bits(tensor), tensor.requires_grad, id(tensor.grad_fn), grad)
    rows["random"] = (bits(torch.get_rng_state()), str(np.random.get_state()), random.getstate())
    return rows


def used(net, x):
    """A network in the middle of its user's work: gradients there, hidden states hanging on a graph."""
    net.train()
    net[0].eval()
    for _ in range(2):  # the second goes on from the first, and its graph hangs on the first's
        outputs = torch.stack([net(step) for step in x]) if isinstance(net[1], snn.Leaky) else net(x)
        outputs.square().sum().backward(retain_graph=True)
    states = [layer.mem if isinstance(layer, snn.Leaky) else layer.v_mem for layer in (net[1], net[3])]
    assert all(state.grad_fn is not None for state in states)
    assert net[0].weight.grad.abs().max() > 0
    return net


SOURCES = {
    "snntorch": (lambda: snn_net(learn_beta=True), {"time_dim": 0}, (T, B, 8)),
    "sinabs": (lambda: sinabs_net(norm_input=False), {}, (B, T, 8)),
    "sinabs, recording": (lambda: sinabs_net(record_states=True, tau_syn=3.0), {}, (B, T, 8)),
}


@pytest.mark.parametrize("to", ["tracetorch", "sinabs", "snntorch"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_users_network_is_left_as_it_was(source, to):
    make, options, shape = SOURCES[source]
    net, x = make(), sample(*shape)
    used(net, x)
    before = everything(net)
    result = adapters.convert(net, to=to, sample=x, **options)
    assert everything(net) == before
    result.run(x)
    assert everything(net) == before
    state = result.model[1].save_states() if to == "tracetorch" else None
    result.verify(x)
    assert everything(net) == before
    if state is not None:
        assert {k: v is state[k] for k, v in result.model[1].save_states().items()} == dict.fromkeys(state, True)
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.mul_(1.01)
    result.verify(x, carry_back=True)
    assert everything(net) == before


def test_nothing_is_left_behind_when_it_is_refused_or_fails():
    net, x = used(snn_net(reset_delay=False), sample()), sample()
    before = everything(net)
    with pytest.raises(adapters.ConversionError):
        adapters.convert(net, to="sinabs", sample=x, time_dim=0)
    assert everything(net) == before
    with pytest.raises(RuntimeError):
        adapters.convert(net, to="tracetorch", sample=sample(T, B, 9), time_dim=0)
    assert everything(net) == before


def test_the_target_shares_nothing_unless_asked_to():
    for net, x, options in ((snn_net(), sample(), {"time_dim": 0}), (sinabs_net(), sample(B, T, 8), {})):
        theirs = {t.data_ptr() for t in [*net.parameters(), *net.buffers()] if t.numel()}
        for to in ("tracetorch", "sinabs", "snntorch"):
            model = adapters.convert(net, to=to, sample=x, **options).model
            assert not theirs & {t.data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}


# ---- shared weights --------------------------------------------------------------------------------------------------

SHARED = {
    "tracetorch": ("mem_decay", "threshold"),
    "sinabs": ("alpha_mem", "spike_threshold"),
    "snntorch": ("beta", "threshold"),
}


@pytest.mark.parametrize("to", SHARED)
@pytest.mark.parametrize("learn", [True, False])
def test_shared_weights_are_the_same_tensors_and_train_together(to, learn):
    net, xs = snn_net(learn_beta=learn, learn_threshold=learn), sample()
    result = adapters.convert(net, to=to, sample=xs, time_dim=0, share_weights=True)
    model = result.model
    assert model[0].weight is net[0].weight
    assert model[2].bias is net[2].bias
    for k in (1, 3):
        for name, own in zip(("beta", "threshold"), SHARED[to], strict=True):
            assert getattr(model[k], own).data_ptr() == getattr(net[k], name).data_ptr()
            assert getattr(model[k], own).requires_grad == learn
            if learn:
                assert getattr(model[k], own) is getattr(net[k], name)
    before = result.run(xs)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (own_run(net, xs).mean(0) - 1).square().sum().backward()
        optimizer.step()
    after = result.run(xs)
    assert (after != before).any(), "training the source trains the target"
    assert (after != own_run(net, xs)).sum() <= 1
    agreement = result.verify(xs)
    assert agreement.ok
    assert agreement.changed_parameters == ()


@pytest.mark.parametrize("to", SHARED)
def test_integer_thresholds_can_be_shared(to):
    net, xs = snn_net(threshold=1, graded_spikes_factor=1), sample()
    assert net[1].threshold.dtype == torch.int64
    result = adapters.convert(net, to=to, sample=xs, time_dim=0, share_weights=True)
    assert torch.equal(result.run(xs), own_run(net, xs))
    assert result.model[0].weight is net[0].weight


def test_another_raw_form_cannot_be_shared():
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.convert(sinabs_net(), to="snntorch", sample=sample(B, T, 8), share_weights=True)
    assert (caught.value.layer, caught.value.field, caught.value.value) == ("'1'", "tau_mem", "exp_tau")
    assert caught.value.remedy == "share_weights=False"


def test_a_module_used_twice_stays_shared():
    shared = linear(8, 8)
    parts = [shared, snn.Leaky(0.9, init_hidden=True), nn.Sequential(shared), snn.Leaky(0.8, init_hidden=True)]
    net, xs = nn.Sequential(*parts), sample()
    spikes = own_run(net, xs)
    for to in ("tracetorch", "sinabs", "snntorch"):
        result = adapters.convert(net, to=to, sample=xs, time_dim=0)
        assert result.agreement.ok
        assert torch.equal(result.run(xs), spikes)
        assert result.model[0].weight is result.model[2][0].weight


@pytest.mark.parametrize("nested", [False, True])
def test_a_stateless_module_used_twice_stands_in_both_places(nested):
    """`named_children` names a module once, where it stands first."""
    relu = nn.ReLU()
    place = nn.Sequential(relu) if nested else relu
    net = nn.Sequential(relu, linear(8, 12), place, snn.Leaky(0.9, init_hidden=True))
    with torch.no_grad():
        net[1].weight.abs_()
        net[1].bias.abs_()
    xs = sample()  # positive, so that on this sample the second one changes nothing
    result = adapters.convert(net, to="tracetorch", sample=xs, time_dim=0)
    assert [row.source for row in result.report] == ["torch.ReLU", "torch.Linear", "torch.ReLU", "snntorch.Leaky"]
    with torch.no_grad():
        for network in (net, result.model):
            network[1].bias.fill_(-1.0)
    assert torch.equal(result.run(xs), own_run(net, xs))


# ---- derived values stay live ----------------------------------------------------------------------------------------


def test_a_converted_network_trains_as_the_source_would():
    """Steps of SGD on either side, from the same start, lead to the same parameters (within rounding)."""
    net, xs = snn_net(learn_beta=True, learn_threshold=True), sample(20, B, 8)
    result = adapters.convert(net, to="sinabs", sample=xs, time_dim=0)
    target = torch.rand(4, generator=generator(3))
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.003) for module in (net, result.model)]
    start = net[1].beta.detach().clone()
    for _ in range(10):
        for optimizer, run in zip(
            optimizers,
            (lambda: own_run(net, xs), lambda: own_sinabs(result.model, xs.transpose(0, 1)).transpose(0, 1)),
            strict=True,
        ):
            optimizer.zero_grad()
            (run().mean((0, 1)) - target).square().sum().backward()
            optimizer.step()
    assert (net[1].beta - start).abs().max() > 1e-4
    assert (result.model[1].alpha_mem - net[1].beta).abs().max() < 1e-5
    assert (result.model[1].spike_threshold - net[1].threshold).abs().max() < 1e-5
    assert result.verify(xs, carry_back=True).ok


def test_a_copy_of_the_converted_model_is_a_converted_model():
    net, xs = snn_net(learn_beta=True), sample()
    x = sample(B, T, 8)
    for result, run in (
        (adapters.convert(net, to="sinabs", sample=xs, time_dim=0), lambda m: own_sinabs(m, x)),
        (adapters.convert(net, to="tracetorch", sample=xs, time_dim=0), lambda m: tt.unroll(m, xs)),
        (adapters.convert(sinabs_net(), to="snntorch", sample=x), lambda m: own_run(m, xs)),
    ):
        result.reset()
        twin = copy.deepcopy(result.model)
        spikes = run(result.model)
        assert spikes.sum() > 20
        assert torch.equal(run(twin), spikes)
