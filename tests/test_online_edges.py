"""The online layers at the edges: extreme parameters, failed calls, mixed precision, other modules in the chain."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import tracetorch as tt

B, T, IN, HIDDEN = 3, 10, 6, 5
RULES = ("average", "ottt", "bptt")


def inputs(steps=T, seed=0):
    return torch.rand(B, steps, IN, generator=torch.Generator().manual_seed(seed)) < 0.6


def network(rule="average"):
    torch.manual_seed(0)
    net = tt.nn.Sequential(tt.nn.LIF(IN, HIDDEN, bias=True, rule=rule), tt.nn.LIS(HIDDEN, 2, rule=rule))
    with torch.no_grad():
        net[0].weight += 0.2
    return net


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("raw", [-1000.0, -104.0, -50.0, -20.0, 17.0, 40.0, 1000.0])
@pytest.mark.parametrize("name", ["membrane.raw_mem_decay", "membrane.raw_threshold", "input_trace.raw_trace_decay"])
def test_parameters_driven_to_their_ends_have_finite_gradients(name, raw, rule):
    for dtype in (torch.float32, torch.float64):
        for kind in (tt.nn.LIF, tt.nn.LIS):
            layer = kind(IN, HIDDEN, rule=rule).to(dtype)
            if name not in dict(layer.named_parameters()):
                continue
            with torch.no_grad():
                layer.weight += 0.2
                layer.get_parameter(name).fill_(raw)
            outputs, _ = layer(inputs())
            outputs.square().sum().backward()
            assert outputs.isfinite().all()
            assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_rate_at_the_ends_of_its_arguments(dtype):
    for decay in (0.0, 1e-30, 1e-6, 0.5, 1.0):
        for threshold in (0.0, 1e-30, 1.0, 1e6):
            values = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (decay, threshold)]
            current = (torch.linspace(-2, 3, 21, dtype=dtype) * max(threshold, 1e-3)).requires_grad_()
            rate = tt.nn.stationary_rate(current, *values)
            assert ((rate >= 0) & (rate <= 1)).all()
            assert all(slope.isfinite().all() for slope in torch.autograd.grad(rate.sum(), [current, *values]))


def test_the_rate_of_decays_next_to_one_is_its_own():
    """Without a leak a current of a quarter fires in every fourth step; dz/dd_m = 1 - current there."""
    below = torch.tensor(1.0).nextafter(torch.tensor(0.0)).requires_grad_()
    rate = tt.nn.stationary_rate(torch.tensor(0.25), below, torch.tensor(1.0), softness=1e-3)
    torch.testing.assert_close(rate, torch.tensor(0.25), rtol=1e-3, atol=0)
    rate.backward()
    assert below.grad > 0


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("rule", RULES)
def test_a_fused_optimizer_that_brought_nan_is_noticed(rule, kind):
    net = network(rule)
    optimizer = kind(net.parameters(), 0.1, fused=True)
    outputs, _ = net(inputs())
    outputs.square().sum().backward()
    net[0].weight.grad[0, 0] = torch.nan
    optimizer.step()
    tt.detach_states(net)
    with pytest.raises(ValueError, match="LIF: weight is not finite any more"):
        net(inputs())


@pytest.mark.parametrize("rule", ["average", "ottt", "bptt"])
def test_checkpointing_a_layer_that_never_ran(rule):
    """The check of the parameters, made once, saves nothing that a second run would miss."""
    found = []
    for run in (lambda module, x: module(x), tt.checkpoint):
        net = network(rule)
        run(Both(net), inputs()).square().sum().backward()
        found.append(net[0].weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rule", ["average", "ottt"])
def test_a_second_derivative_is_refused(rule):
    """Also of a loss whose gradient is a constant, of which torch's once_differentiable says nothing."""
    net = network(rule)
    with pytest.raises(RuntimeError, match="average and ottt have no second derivatives"):
        torch.autograd.grad(Both(net)(inputs()).sum(), net[0].weight, create_graph=True)


class Failing(nn.Module):
    """Fails when told to."""

    fail = False

    def forward(self, x):
        if self.fail:
            raise RuntimeError("told to")
        return x


@pytest.mark.parametrize("rule", ["average", "ottt"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_failed_call_does_not_touch_the_signal_of_earlier_outputs(rule, wrapped):
    found = []
    for fail in (False, True):
        net, gate = network(rule), Failing()
        chain = tt.nn.Sequential(nn.Sequential(Both(net), gate) if wrapped else net, gate)
        first, _ = chain(inputs())
        gate.fail = fail
        if fail:
            with pytest.raises(RuntimeError, match="told to"):
                chain(torch.ones(B, 30, IN))
        gate.fail = False
        second, _ = chain(inputs(seed=1))
        (first.square().sum() + second.square().sum()).backward()
        found.append(gradients(net))
    assert any(gradient is not None for gradient in found[0])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


class Both(nn.Module):
    """An ordinary module around a network."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


def test_a_failed_call_of_one_layer_does_not_touch_the_signal_of_earlier_outputs(monkeypatch):
    found = []
    for fail in (False, True):
        lis = network()[1]
        first, _ = lis(inputs()[..., :HIDDEN])
        if fail:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "softmax", None)
                with pytest.raises(TypeError, match="not callable"):
                    lis(torch.ones(B, 30, HIDDEN))
        first.square().sum().backward()
        found.append(lis.weight.grad)
    assert torch.equal(*found)


def test_a_layer_used_twice_is_as_before_after_an_error():
    lif, gate = tt.nn.LIF(IN, IN), Failing()
    chain = tt.nn.Sequential(lif, lif, gate)
    chain(inputs())
    kept = lif.membrane.mem
    gate.fail = True
    with pytest.raises(RuntimeError, match="told to"):
        chain(inputs())
    assert lif.membrane.mem is kept


@pytest.mark.parametrize("container", [nn.Sequential, tt.Sequential])
def test_native_layers_inside_a_member_run_through_time(container):
    torch.manual_seed(0)
    inner = container(nn.Linear(IN, HIDDEN), tt.snn.LIB(HIDDEN))
    net = tt.nn.Sequential(inner, tt.nn.LIS(HIDDEN, 2))
    whole, _ = net(inputs().float())
    assert all(state.shape == (B, HIDDEN) for state in tt.save_states(inner)["1"].values())
    net.reset_states()
    steps = torch.stack([net(x)[0] for x in inputs().float().unbind(1)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_autocast_keeps_the_weights_dtype(rule):
    net = network(rule)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        for xs in (inputs(), inputs()[:, 0]):
            outputs, states = net(xs)
            assert outputs.dtype is torch.float32
            assert all(state.dtype is torch.float32 for part in states for state in part)
            kept = net[0].eligibility.save_states().values()
            assert all(value is None or value.dtype is torch.float32 for value in kept)
    outputs.square().sum().backward()
    assert net[0].weight.grad.dtype is torch.float32


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [tt.nn.LIF, tt.nn.LIS])
def test_a_call_of_no_steps_in_the_middle_of_a_stream(kind, rule):
    torch.manual_seed(0)
    layer = kind(IN, HIDDEN, rule=rule)
    found = []
    for lengths in ((T,), (4, 0, T - 4)):
        layer.reset_states()
        layer.zero_grad()
        outputs = torch.cat([layer(part)[0] for part in inputs().split(lengths, 1)], 1)
        (outputs * torch.arange(T)[:, None]).square().sum().backward()
        found.append(layer.weight.grad.clone())
    torch.testing.assert_close(*found)


def test_unrolled_by_the_function_for_step_models():
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tt.UnrollWarning)
        outputs, states = tt.unroll(net, inputs().float(), time_dim=1)
    net.reset_states()
    torch.testing.assert_close(outputs, net(inputs())[0])
    assert states[0].trace.shape == (B, T, IN)


@pytest.mark.parametrize("rule", RULES)
def test_a_membrane_that_is_at_the_threshold_does_not_spike(rule):
    lif = tt.nn.LIF(1, 2, rule=rule)
    with torch.no_grad():
        lif.weight.copy_(lif.threshold[:, None])
    tie = lif.threshold.detach()[None]
    for xs in (torch.ones(1, 1, 1), torch.ones(1, 1)):
        lif.reset_states()
        outputs, states = lif(xs)
        assert not outputs.any()
        assert torch.equal(states.membrane, tie)
        if rule == "ottt":
            assert not lif.eligibility.by_threshold.any()
            lif(xs * 0)
            assert torch.equal(lif.eligibility.by_decay, tie)
    lif.reset_states()
    assert lif(torch.full((1, 1), 1.001))[0].all()


@pytest.mark.parametrize("last", RULES)
@pytest.mark.parametrize("first", RULES)
def test_a_change_of_the_rule_cuts_what_was_before(first, last):
    """The gradient of what comes after is that of the calls after; the states go on."""
    xs, ys = inputs(), inputs(seed=1)
    one, other = (tt.nn.LIF(IN, HIDDEN, rule=first) for _ in range(2))
    other.load_state_dict(one.state_dict())
    one(xs)
    one.rule = last
    other(xs)
    membrane, trace = other.membrane.mem.detach().clone(), other.input_trace.save_states()
    other.reset_states()
    other.rule = last
    other.membrane.load_states({"mem": membrane})
    other.input_trace.load_states(trace)
    for layer in (one, other):
        layer(ys)[0].square().sum().backward()
        layer.detach_states()
        layer(ys)[0].square().sum().backward()
    torch.testing.assert_close(one.weight.grad, other.weight.grad)
    torch.testing.assert_close(one.membrane.raw_mem_decay.grad, other.membrane.raw_mem_decay.grad)


@pytest.mark.parametrize("rule", RULES)
def test_in_inference_mode(rule):
    """Parameters made there have no version that tells whether they were changed."""
    with torch.inference_mode():
        made = tt.nn.LIF(IN, HIDDEN, rule=rule)
        whole, _ = made(inputs())
        made.reset_states()
        assert torch.equal(torch.stack([made(x)[0] for x in inputs().unbind(1)], 1), whole)
    normed = torch.nn.utils.parametrizations.weight_norm(tt.nn.LIF(IN, HIDDEN, rule=rule))
    expected, _ = normed(inputs())
    normed.reset_states()
    with torch.inference_mode():
        assert torch.equal(normed(inputs())[0], expected)
