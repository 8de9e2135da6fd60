"""snnTorch's `LeakyParallel`: a matrix and neurons with a membrane not below 0; alone, in networks, in every target."""

import copy

import numpy as np
import pytest
import snntorch as snn
import torch
from snntorch import surrogate
from torch import nn

import tracetorch as tt
from tracetorch import adapters, oracle
from tracetorch.adapters import snntorch as ours
from tracetorch.adapters.registry import adapter
from tracetorch.core.spec import SpecError

T, B, FROM, TO = 80, 3, 6, 5

OPTIONS = {
    "a learned beta": {"beta": 0.9, "learn_beta": True},
    "a random diagonal": {"beta": None},
    "no bias": {"beta": 0.7, "bias": False},
    "a beta per neuron, which is ignored": {"beta": torch.linspace(0.1, 0.9, TO)},
    "a learned threshold per neuron": {"beta": 0.8, "threshold": torch.linspace(0.2, 1, TO), "learn_threshold": True},
    "a threshold below 0": {"beta": 0.8, "threshold": -0.125},
    "graded spikes": {"beta": 0.8, "graded_spikes_factor": 0.5, "spike_grad": surrogate.fast_sigmoid(5)},
}


def layer_of(name, into=FROM):
    torch.manual_seed(3)
    return snn.LeakyParallel(into, TO, **OPTIONS[name])


def recorded(xs, outputs, states, spec, terms=None):
    arrays = {name: state.detach().numpy() for name, state in states.items()}
    return oracle.Recording(xs.detach().numpy(), outputs.detach().numpy(), arrays, spec, terms)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_oracle_agrees_with_the_layer_forward_and_backward(name):
    layer = layer_of(name)
    linear, spec = ours.parts(layer)
    assert (spec.form, spec.clamp, spec.reset) == ("snntorch.LeakyParallel", "before_spikes", "none")
    xs = (2 * torch.randn(T, B, FROM)).requires_grad_()
    outputs, mem, drive = layer(xs), layer.rnn(xs)[0], linear(xs)
    terms = xs.abs() @ linear.weight.abs().T + 2 * mem
    recording = recorded(drive, outputs, {"v_mem": mem}, spec, terms.detach().numpy())
    judgement = oracle.judge(spec, recording)
    assert judgement.ok
    assert judgement.spikes > 50
    assert bool((mem == 0).any())
    weights = torch.randn_like(outputs)
    (outputs * weights).sum().backward()
    truth = oracle.gradients(spec, recording, weights.double().numpy())
    own = {"x": xs.grad.numpy() @ np.linalg.pinv(layer.rnn.weight_ih_l0.detach().double().numpy())}
    if layer.rnn.weight_hh_l0.requires_grad:
        own["mem_decay"] = torch.diagonal(layer.rnn.weight_hh_l0.grad).numpy()
    if layer.threshold.requires_grad:
        own["threshold"] = layer.threshold.grad.numpy()
    for tensor, gradient in own.items():
        assert oracle.gradient_error(gradient, truth[tensor]) < 1e-4, tensor


def test_the_diagonal_is_read_and_not_the_beta():
    """Quirk of snntorch 1.0.0: `_beta_to_weight_hh` does nothing with a beta per neuron."""
    layer = layer_of("a beta per neuron, which is ignored")
    decay = ours.parts(layer)[1].parameters["mem_decay"]
    assert np.array_equal(decay.value, torch.diagonal(layer.rnn.weight_hh_l0).detach().numpy())
    assert not np.allclose(decay.value, layer.beta)
    assert not decay.learnable


@pytest.mark.parametrize("to", ["tracetorch", "snntorch", "sinabs", "norse", "spikingjelly"])
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "graded spikes"])
def test_every_target_computes_it(name, to):
    pytest.importorskip(to)
    linear, spec = ours.parts(layer_of(name))
    built, own = adapters.build(spec, to), adapter(to)
    drive = linear(2 * torch.randn(T, B, FROM)).detach().requires_grad_()
    outputs, states = own.trace(built, drive)
    recording = recorded(drive, outputs, states, adapters.spec(built))
    assert oracle.judge(spec, recording).ok
    weights = torch.randn_like(outputs)
    (outputs * weights).sum().backward()
    truth = oracle.gradients(spec, recording, weights.double().numpy())
    assert oracle.gradient_error(drive.grad.numpy(), truth["x"]) < 1e-5


@pytest.mark.parametrize("fault", [{"clamp": "after_reset"}, {"clamp": "none"}])
def test_a_bound_at_another_place_is_seen(fault):
    """After the spikes: the same states, and a gradient below 0; or no bound."""
    linear, spec = ours.parts(layer_of("a learned beta"))
    kept = {
        n: p for n, p in spec.parameters.items() if n != "spike_scale" and (fault["clamp"] != "none" or n[:3] != "min")
    }
    wrong = adapters.build(
        spec.replace(form="sinabs.LIF", parameters=kept, reset_timing="same_step", **fault), "tracetorch"
    )
    drive = linear(2 * torch.randn(T, B, FROM)).detach().requires_grad_()
    outputs, states = adapter("tracetorch").trace(wrong, drive)
    recording = recorded(drive, outputs, states, spec)
    outputs.sum().backward()
    truth = oracle.gradients(spec, recording, np.ones(outputs.shape))
    seen = not oracle.judge(spec, recording).ok
    assert seen == (fault["clamp"] == "none")
    assert oracle.gradient_error(drive.grad.numpy(), truth["x"]) > 1e-2


class Net(nn.Module):
    """Two such layers and what stands between them."""

    def __init__(self, bias):
        super().__init__()
        self.first = snn.LeakyParallel(FROM, 10, beta=0.9, bias=bias, learn_beta=True, learn_threshold=True)
        self.between = nn.Linear(10, 8)
        self.second = snn.LeakyParallel(8, 4, beta=0.8, bias=bias)

    def forward(self, x):
        return self.second(torch.relu(self.between(self.first(x))))


@pytest.mark.parametrize("to", ["tracetorch", "snntorch", "sinabs"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_network_of_them_is_converted(to, bias):
    torch.manual_seed(0)
    net, xs = Net(bias), 2 * torch.randn(60, B, FROM)
    result = tt.convert(net, to=to, sample=xs)
    copy.deepcopy(result.model)
    assert result.verify(xs, grad=True).ok
    with torch.no_grad():
        assert torch.equal(result.run(xs), net(xs))
    assert len(result.report.rows) == (8 if bias else 6)
    assert "hidden matrix" in str(result.report)


def test_a_trained_network_still_verifies():
    """Weights, both biases, thresholds; the diagonal's gradient is that of the target's decay."""
    torch.manual_seed(0)
    net, xs = Net(True), 2 * torch.randn(40, B, FROM)
    result = tt.convert(net, to="tracetorch", sample=xs)
    net(xs).sum().backward()
    result.run(xs).sum().backward()
    decay = next(p for name, p in result.model.named_parameters() if name.endswith("mem_decay"))
    hidden = net.first.rnn.weight_hh_l0.grad
    assert torch.allclose(decay.grad, torch.diagonal(hidden), rtol=1e-4, atol=1e-5)
    assert torch.equal(hidden, torch.diag(torch.diagonal(hidden)))
    theirs = {tuple(p.shape): p.grad for name, p in net.named_parameters() if "bias_hh" in name}
    for shape, grad in theirs.items():
        assert any(
            tuple(p.shape) == shape and torch.allclose(p.grad, grad, rtol=1e-4) for p in result.model.parameters()
        )


@pytest.mark.parametrize("to", ["tracetorch", "snntorch", "sinabs"])
def test_a_learned_decay_is_carried_back_into_its_matrix(to):
    net, xs = nn.Sequential(layer_of("a learned beta")), 2 * torch.randn(30, B, FROM)
    before = net[0].rnn.weight_hh_l0.detach().clone()
    result = tt.convert(net, to=to, sample=xs)
    assert result.verify(xs).changed_parameters == ()
    result.run(xs).sum().backward()
    torch.optim.SGD(result.model.parameters(), lr=0.05).step()
    assert "0.neuron.weight_hh_l0" in result.verify(xs).changed_parameters
    assert result.verify(xs, carry_back=True).ok
    assert torch.equal(net[0].rnn.weight_hh_l0, before)


def test_a_learned_decay_cannot_be_shared():
    """It would train alone: the source has it as a matrix."""
    xs = torch.randn(20, B, FROM)
    with pytest.raises(adapters.ConversionError, match=r"mem_decay='learnable'.*weight_hh_l0.*share_weights=False"):
        tt.convert(nn.Sequential(layer_of("a learned beta")), to="tracetorch", sample=xs, share_weights=True)
    net = nn.Sequential(layer_of("no bias"))
    result = tt.convert(net, to="tracetorch", sample=xs, share_weights=True)
    assert any(p is net[0].rnn.weight_ih_l0 for p in result.model.parameters())


def test_a_full_hidden_matrix_is_refused():
    layer = snn.LeakyParallel(FROM, TO, weight_hh_enable=True)
    with pytest.raises(SpecError, match=r"weight_hh_enable=True: .* no neuron is left; use weight_hh_enable=False"):
        ours.parts(layer)
    with pytest.raises(adapters.ConversionError, match=r"layer '0.neuron': weight_hh_enable=True.*not diagonal"):
        tt.convert(nn.Sequential(layer), to="tracetorch", sample=torch.randn(20, B, FROM))


def test_a_hook_of_the_user_s_own_is_refused_still():
    layer = snn.LeakyParallel(FROM, TO, beta=0.9, learn_beta=True)
    layer.rnn.weight_ih_l0.register_hook(lambda grad: 2 * grad)
    with pytest.raises(adapters.ConversionError, match="hooks"):
        tt.convert(nn.Sequential(layer), to="tracetorch", sample=torch.randn(20, B, FROM))


@pytest.mark.parametrize("to", ["snntorch", "sinabs", "norse", "spikingjelly"])
def test_no_stock_class_has_the_bound(to):
    pytest.importorskip(to)
    with pytest.raises(adapters.ConversionError, match="clamp='before_spikes'"):
        adapters.build(ours.parts(layer_of("no bias"))[1], to, stock=True)


def test_a_converted_sinabs_layer_is_read_as_it_is():
    spec = ours.parts(layer_of("a learned beta"))[1]
    built = adapters.build(spec, "sinabs")
    again = adapters.spec(copy.deepcopy(built))
    assert again.clamp == "before_spikes"
    assert again == adapters.spec(built)
    assert "floor=True" in repr(built.spike_fn)
