"""`tt.fuse`: what each framework's users do with its neurons, and neurons of one's own."""

from __future__ import annotations

import copy
import pickle

import norse.torch as no
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from spikingjelly.activation_based import neuron as sn
from spikingjelly.activation_based import surrogate as ss
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits
from tests.fuse_cases import OwnSurrogate
from tests.fuse_checks import assert_gradients, by_steps, fused_twin, ran

pytestmark = pytest.mark.usefixtures("poisoned")


# ---- SpikingJelly ----------------------------------------------------------------------------------------------------


def test_one_step_of_many_and_the_layer_alone_run_the_kernel():
    for layer, xs in (
        (sn.LIFNode(step_mode="m"), torch.rand(1, 2, 3)),
        (sn.IFNode(step_mode="m"), torch.rand(4)),
        (sl.ALIF(tau_mem=5.0, tau_adapt=5.0), torch.rand(2, 4)),
        (sl.IAF(), torch.rand(2, 4)),
    ):
        fused = fused_twin(layer)
        assert_bits(fused(xs), layer(xs))
        assert ran(fused)


def test_a_decay_for_each_neuron():
    layer = sn.ParametricLIFNode(step_mode="m", surrogate_function=ss.ATan())
    layer.w = nn.Parameter(torch.linspace(-2, 2, 7))
    fused = fused_twin(layer)
    xs = torch.rand(20, 2, 7) * 3
    with tt.backend("cpu"):
        ours = fused(xs)
    own = layer(xs)
    assert_bits(ours, own)
    weights = torch.rand_like(own)
    given, expected = (torch.autograd.grad((ys * weights).sum(), layer.w) for ys in (ours, own))
    assert_gradients(given, expected, ["w"])


def test_voltages_are_kept_only_where_asked_for():
    fused = fused_twin(sn.IzhikevichNode(step_mode="m"))
    fused(torch.rand(5, 2, 3))
    assert fused.v_seq is None
    layer = sl.LIF(tau_mem=5.0)
    twin = fused_twin(layer)
    twin(torch.rand(2, 5, 3))
    assert twin.recordings == {}


@pytest.mark.parametrize("shape", [(), (0, 2)], ids=str)
def test_calls_that_the_framework_refuses_are_refused_alike(shape):
    layer = sn.IFNode(step_mode="m", surrogate_function=ss.PiecewiseQuadratic())
    errors = []
    for module in (layer, fused_twin(layer)):
        with pytest.raises((TypeError, RuntimeError, IndexError)) as caught:
            module(torch.ones(shape))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


class Gated(sn.BaseNode):
    """A call may take a second sequence."""

    def single_step_functional_forward(self, inputs, states, gain=1.0):
        v = states[0] + gain * (inputs[0] * inputs[1] if len(inputs) > 1 else inputs[0])
        spikes = self.surrogate_function(v - self.v_threshold)
        return (spikes,), (v * (1.0 - spikes),)


def test_calls_with_more_arguments_run_the_node_s_own_code():
    layer = Gated(step_mode="m", surrogate_function=ss.ATan())
    fused = fused_twin(layer)
    xs, gates = torch.rand(6, 2, 3) * 2, torch.rand(6, 2, 3)
    for arguments, options in (((xs,), {}), ((xs, gates), {}), ((xs,), {"gain": 0.5})):
        own = layer(*arguments, **options)
        assert_bits(fused(*arguments, **options), own)
        assert_bits(fused.v, layer.v)
        assert own.sum() > 0
    assert ran(fused)


# ---- Norse -----------------------------------------------------------------------------------------------------------


def test_a_batch_norm_in_two_places_is_trained_in_the_order_of_steps():
    norm = nn.BatchNorm1d(5)
    net = no.SequentialState(norm, no.LIFCell(), norm, no.LICell())
    fused = tt.fuse(copy.deepcopy(net))
    xs = torch.rand(10, 4, 5) * 40
    for _ in range(2):
        own, _ = by_steps(net, xs, None)
        ours, _ = fused.unroll(xs)
        assert_bits(ours, own)
        assert_bits(fused[0].running_mean, net[0].running_mean)
        assert_bits(fused[0].running_var, net[0].running_var)
        net.eval()
        fused.eval()
    assert ran(fused[1])


def test_a_network_that_returns_every_layer_unrolls_to_a_list():
    net = no.SequentialState(nn.Linear(5, 3), no.LIFCell(), no.LICell(), return_hidden=True)
    fused = tt.fuse(net)
    xs, state, own = torch.rand(6, 2, 5) * 40, None, []
    for x in xs:
        hidden, state = net(x, state)
        own.append(hidden)
    ours, last = fused.unroll(xs.transpose(0, 1), 1)
    assert len(ours) == 3
    for k, ys in enumerate(ours):
        assert_bits(ys, torch.stack([hidden[k] for hidden in own], 1))
    assert_bits(last[2].v, state[2].v)
    assert [tuple(ys.shape) for ys in fused.unroll(xs[:1])[0]] == [(1, 2, 3)] * 3


def test_a_lifted_cell_without_steps_says_what_norse_says():
    net = no.Lift(no.LIFCell())
    messages = []
    for module in (net, tt.fuse(net)):
        with pytest.raises(RuntimeError) as caught:
            module(torch.rand(0, 2, 3))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("make", [no.LIFCell, lambda: no.SequentialState(no.LIFCell()), OwnSurrogate], ids=range(3))
def test_unroll_needs_a_step_and_a_time_dimension(make):
    twin = tt.fuse(make())
    for xs, time_dim in ((torch.rand(0, 2, 3), 0), (torch.rand(2, 0, 3), 1), (torch.rand(4, 2, 3), 2)):
        with pytest.raises(tt.fused.FuseError, match="unroll with time_dim"):
            twin.unroll(xs, time_dim)


def test_dropout_in_evaluation_folds():
    net = no.SequentialState(nn.Dropout(0.5), no.LIFCell()).eval()
    fused = tt.fuse(net)
    xs = torch.rand(6, 2, 5) * 40
    assert_bits(fused.unroll(xs)[0], by_steps(net, xs, None)[0])
    assert ran(fused[1])


# ---- snnTorch --------------------------------------------------------------------------------------------------------


def test_states_given_run_the_kernel_and_unknown_ones_are_refused_as_by_the_call():
    fused = fused_twin(snn.Leaky(beta=0.9))
    xs = torch.rand(6, 2, 5)
    with tt.backend("cpu"):
        fused.unroll(xs, mem=torch.rand(2, 5))
    assert ran(fused)
    with pytest.raises(TypeError, match="syn"):
        fused.unroll(xs, syn=torch.rand(2, 5))


class Halved(snn.Leaky):
    """A forward of its own."""

    def forward(self, input_, mem=None):
        return super().forward(input_ / 2, mem)


LEFT = {
    "RLeaky": (lambda: snn.RLeaky(beta=0.9, linear_features=3), "matrix"),
    "RSynaptic": (lambda: snn.RSynaptic(alpha=0.5, beta=0.9, linear_features=3), "matrix"),
    "SLSTM": (lambda: snn.SLSTM(3, 3), "matrix"),
    "SConv2dLSTM": (lambda: snn.SConv2dLSTM(1, 1, 3), "matrix"),
    "own forward": (lambda: Halved(beta=0.9), "its forward is not one of snnTorch"),
    "sparse": (lambda: with_attribute(torch.ones(2).to_sparse()), "only ordinary dense tensors"),
}


def with_attribute(tensor):
    layer = sl.IAF()
    layer.extra = tensor
    return layer


@pytest.mark.parametrize("name", LEFT)
def test_left_and_named(name):
    make, words = LEFT[name]
    rows = [row for row in tt.fuse(make()).fuse_report.rows if row.path == ""]
    assert [row.fused for row in rows] == [False]
    assert words in rows[0].reason


class Slope(nn.Module):
    """A surrogate with a parameter of the neuron's own name for another."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return torch.relu(self.beta * x)


def test_parameters_of_one_name_in_two_modules_are_two():
    layer = snn.Leaky(beta=0.5, learn_beta=True, spike_grad=Slope())
    fused = fused_twin(layer)
    xs = torch.rand(6, 2, 5)
    with tt.backend("cpu"):
        ours = fused.unroll(xs)[0]
    own = torch.stack([layer(x)[0] for x in xs])
    assert_bits(ours, own)
    leaves = [layer.beta, layer.spike_grad.beta]
    given, expected = (torch.autograd.grad(ys.sum(), leaves) for ys in (ours, own))
    assert_gradients(given, expected, ["beta", "slope"])


# ---- neurons of one's own --------------------------------------------------------------------------------------------


class WithMatrix(OwnSurrogate):
    """A network: one of its modules has weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)


class OfTwoForms(nn.Module):
    """Begins with a list and goes on with a tuple."""

    def forward(self, x, state=None):
        v = (torch.zeros_like(x) if state is None else state[0]) * 0.5 + x
        return v, [v] if state is None else (v,)


def test_a_neuron_with_one_state_a_surrogate_module_and_parameters_per_neuron():
    layer = OwnSurrogate()
    fused = tt.fuse(nn.ModuleDict({"own": layer, "matrix": WithMatrix(), "forms": OfTwoForms()}))
    assert [row.path for row in fused.fuse_report.rows] == ["own"]
    twin = fused["own"]
    xs = torch.rand(20, 2, 3) * 1.5
    own, state = by_steps(layer, xs, None)
    with tt.backend("cpu"):
        ours, last = twin.unroll(xs)
        again, _ = twin.unroll(xs, state=last)
    assert ran(twin)
    assert own.sum() > 0
    assert_bits(ours, own)
    assert_bits(last, state)
    assert_bits(again, by_steps(layer, xs, state)[0])
    weights = torch.rand_like(own)
    given, expected = (torch.autograd.grad((ys * weights).sum(), layer.decay) for ys in (ours, own))
    assert_gradients(given, expected, ["decay"])


class Trace(nn.Module):
    """Its output reads nothing that is learned."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, trace=None):
        trace = torch.zeros_like(x) if trace is None else trace
        return 2.0 * x, self.decay * trace + x


def test_an_output_that_no_gradient_reaches_requires_none():
    layer = Trace()
    twin = fused_twin(layer)
    xs = torch.rand(6, 2, 3)
    own, state = by_steps(layer, xs, None)
    with tt.backend("cpu"):
        ours, last = twin.unroll(xs)
    assert_bits(ours, own)
    assert_bits(last, state)
    assert not ours.requires_grad
    assert not own.requires_grad
    assert last.requires_grad
    assert state.requires_grad


def test_hooks_on_a_module_inside_a_neuron_see_every_step():
    twin, calls = fused_twin(OwnSurrogate()), []
    twin.spike.register_forward_hook(lambda *_: calls.append(1))
    twin.unroll(torch.rand(6, 2, 3))
    assert len(calls) == 6


class Rebuilt(sn.LIFNode):
    """Pickles in its own way."""

    def __reduce__(self):
        return _rebuilt, (Rebuilt, self.tau)


def _rebuilt(kind, tau):
    return kind(tau=tau, step_mode="m")


def test_a_class_that_pickles_in_its_own_way_keeps_to_it():
    fused = fused_twin(Rebuilt(tau=3.0, step_mode="m"))
    again = pickle.loads(pickle.dumps(fused))
    assert again.tau == 3.0
    assert type(again) is Rebuilt
