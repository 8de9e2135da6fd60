"""A converted network trains as the report says: gradients, raw forms, what stays live, what a copy keeps."""

import copy

import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation

import tracetorch as tt
from tests.adapter_checks import bits
from tests.converting import B, T, generator, own_run, own_sinabs, sample, sinabs_net, snn_net
from tracetorch import adapters
from tracetorch.adapters import sinabs as sinabs_adapter

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
