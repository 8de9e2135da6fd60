"""`adapters.Pipeline` where a stage is not what it looks like: modules that come twice, hooks, modes, nested Norse."""

from __future__ import annotations

import copy

import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from norse.torch import LIF, LICell, LIFBoxCell, Lift, SequentialState
from spikingjelly.activation_based import functional as sj_functional
from spikingjelly.activation_based import neuron as sj
from torch import nn

pytest.importorskip("brainpy")

import tracetorch as tt
from tests.bits import assert_bits
from tests.pipeline_cases import N, leaky, lif, linear, native, sinabs_lif, stimulus
from tracetorch.adapters import JaxStage, Pipeline, SeamError, stage


def loop(module, xs):
    return torch.stack([module(x) for x in xs])


class Odd(nn.Module):
    """A module of a user's own."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def chunked(pipe, xs):
    tt.reset_states(pipe)
    return torch.cat([pipe(part) for part in (xs[:5], xs[5:6], xs[6:])])


# ---- a Sequential is what its call is --------------------------------------------------------------------------------


def twice(neuron):
    between = nn.Tanh()
    return nn.Sequential(linear(seed=1), between, neuron, linear(seed=2), between, neuron)


@pytest.mark.parametrize("neuron", [nn.ReLU, leaky, sj.IFNode], ids=["stateless", "snnTorch", "SpikingJelly"])
def test_a_module_that_comes_twice_runs_twice(neuron):
    xs, pipe = stimulus(), Pipeline(twice(neuron()), fold="exact")
    with torch.no_grad():
        expected = loop(twice(neuron()), xs)  # a matrix product may round otherwise in a slice of the input
        torch.testing.assert_close(pipe(xs), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(chunked(pipe, xs), expected, rtol=1e-6, atol=1e-6)


def test_hooks_of_a_sequential_run():
    xs, net, calls = stimulus(), nn.Sequential(linear(), nn.Sequential(leaky(), nn.Tanh())), []
    pipe = Pipeline(net, fold="exact")
    plain = pipe(xs)
    net[1].register_forward_hook(lambda module, inputs, output: (calls.append(1), 2 * output)[1])
    tt.reset_states(pipe)
    assert_bits(pipe(xs), 2 * plain)
    assert len(calls) == len(xs), "a hook that came after the pipeline was made counts too"
    cell = nn.Sequential(linear(), LIFBoxCell())
    cell.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(TypeError, match=r"with hooks.*state of 1 goes in and out.*one by one"):
        Pipeline(cell)


def test_stateless_modules_may_be_nested_around_sinabs():
    net = nn.Sequential(nn.Sequential(linear(), nn.ReLU()), sinabs_lif())
    xs = stimulus()
    whole = Pipeline(net)(xs)
    tt.reset_states(pipe := Pipeline(net))
    assert_bits(chunked(pipe, xs), whole)


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_spikingjellys_step_mode_may_change():
    node, xs = sj.LIFNode(), stimulus()
    pipe = Pipeline(linear(), node, fold="exact")
    single = pipe(xs)
    sj_functional.set_step_mode(pipe, "m")
    tt.reset_states(pipe)
    assert_bits(pipe(xs), single)
    assert "step_mode 'm'" in pipe.conventions[1]


def test_a_copy_stays_frozen_and_in_its_mode():
    pipe = Pipeline(linear(), sinabs_lif()).eval()
    pipe.stages[1].module.requires_grad_(False)
    twin = copy.deepcopy(pipe)
    flags = [parameter.requires_grad for parameter in twin.parameters()]
    assert flags == [parameter.requires_grad for parameter in pipe.parameters()]
    assert not all(flags)
    assert not any(module.training for module in twin.modules())


def test_sinabs_pooling_takes_no_time():
    xs = torch.rand(3, 2, 4, 8, 8)
    assert_bits(Pipeline(sl.SumPool2d(2))(xs), loop(sl.SumPool2d(2), xs))
    planes = torch.rand(3, 2, 8, 8)
    assert_bits(Pipeline(sl.SumPool2d((1, 2)))(planes), loop(sl.SumPool2d((1, 2)), planes))


# ---- Norse -----------------------------------------------------------------------------------------------------------


def cells():
    return SequentialState(linear(), LIFBoxCell(), SequentialState(linear(seed=2), LICell()))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("make", [cells, lambda: Lift(LIFBoxCell())], ids=["nested", "Lift"])
def test_norse_modules_carry_their_states(make, fuse):
    xs = 10 * stimulus()
    module, state, expected = make(), None, []
    for x in xs:
        y, state = module(x, state) if isinstance(module, SequentialState) else module.lifted_module(x, state)
        expected.append(y)
    assert any(y.any() for y in expected)
    pipe = Pipeline(make(), fuse=fuse, fold="exact")
    torch.testing.assert_close(pipe(xs), torch.stack(expected))
    torch.testing.assert_close(chunked(pipe, xs), torch.stack(expected))


def test_a_lift_of_a_stateless_module_has_no_state():
    xs = stimulus()
    assert_bits(Pipeline(Lift(linear()))(xs), loop(linear(), xs))


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SequentialState(LIFBoxCell(), LIF()), "one step and others that take a sequence"),
        (lambda: snn.StateLeaky(0.9, N), "starts anew at every call.*kind='sequence'"),
        (lambda: snn.LeakyParallel(N, N, beta=0.9), "starts anew at every call"),
        (lambda: nn.LSTM(N, N, bidirectional=True), "bidirectional=True.*Remedy"),
    ],
)
def test_what_cannot_carry_a_state_on_is_refused(make, words):
    with pytest.raises(TypeError, match=words):
        Pipeline(linear(), make())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: stage(sinabs_lif(), kind="step"), r"stage 0 \(LIF\): stated is one step.*it takes \[B, T, ...\]"),
        (lambda: stage(sinabs_lif(), kind="sequence", time_dim=0), r"stated is \[T, B, ...\].*takes \[B, T, ...\]"),
        (lambda: stage(leaky(), kind="sequence", time_dim=0), "it takes one step"),
        (lambda: stage(LIFBoxCell(), kind="step"), "its state passed in and out.*Remedy: the module itself"),
        (lambda: stage(LIF(), kind="step", explicit_state=True), r"it takes \[T, B, ...\]"),
        (lambda: stage(nn.LSTM(N, N), kind="sequence", time_dim=0), "its state passed in and out"),
        (lambda: stage(nn.GRU(N, N), kind="sequence", time_dim=1, explicit_state=True), r"it takes \[T, B, ...\]"),
        (lambda: stage(nn.Sequential(linear(), leaky()), kind="sequence", time_dim=0), "stated is"),
        (lambda: stage(Pipeline(leaky(), time_dim=1), kind="sequence", time_dim=0), "time_dim=1"),
        (lambda: stage(JaxStage(lif(), dt=1.0), kind="step"), "time_dim=0"),
    ],
)
def test_what_is_stated_must_not_contradict_what_is_known(make, words):
    with pytest.raises(ValueError, match=words):
        Pipeline(make())


@pytest.mark.parametrize(
    "make",
    [
        lambda: stage(leaky(), kind="step"),
        lambda: stage(sinabs_lif(), kind="sequence", time_dim=1),
        lambda: stage(LIFBoxCell(), kind="step", explicit_state=True),
        lambda: stage(nn.Sequential(linear(), leaky()), kind="step"),
        lambda: stage(nn.Tanh(), kind="sequence", time_dim=1),
    ],
    ids=["leaky", "sinabs", "norse", "sequential", "tanh"],
)
def test_what_is_stated_may_be_what_is_known(make):
    torch.manual_seed(0)
    pipe, xs = Pipeline(make(), fold="exact"), stimulus()
    assert_bits(pipe(xs), chunked(pipe, xs))


@pytest.mark.parametrize("other", [sj.LIFNode, LIFBoxCell, sinabs_lif, native])
def test_a_neuron_put_in_the_place_of_another_is_reached(other):
    held = nn.Sequential(linear(), leaky())
    pipe, xs = Pipeline(held, fold="exact"), stimulus()
    pipe(xs)
    held[1] = other()
    if other is sinabs_lif:  # takes all steps
        held[0] = nn.Identity()
    pipe.reset_states()
    whole = pipe(xs)
    assert_bits(chunked(pipe, xs), whole)


def test_states_out_of_reach_are_refused(monkeypatch):
    monkeypatch.setattr(snn.SpikingNeuron, "instances", [])
    with pytest.raises(TypeError, match="plain attributes, which nothing could reset"):
        Pipeline(snn.DeltaLeaky(1.0, beta=0.9, init_hidden=True))


def test_whole_sequences_may_be_stated():
    xs, layer = stimulus(), snn.StateLeaky(0.9, N)
    pipe = Pipeline(stage(layer, kind="sequence", time_dim=0))
    with torch.no_grad():
        first = pipe(xs)
        assert_bits(pipe(xs), first)
        result = layer(xs)
        assert_bits(first, result[0] if isinstance(result, tuple) else result)


def test_another_batch_size_is_refused_for_recurrent_modules_too():
    pipe = Pipeline(nn.LSTM(N, N))
    pipe(stimulus())
    with pytest.raises(SeamError, match=r"shape \[1, 3, 5\] from the last call.*7.*reset_states"):
        pipe(stimulus(batch=7))


def test_unroll_does_not_take_a_pipeline():
    with pytest.raises(TypeError, match="a call of Pipeline takes a whole sequence"):
        tt.unroll(Pipeline(leaky()), stimulus())


def raising(error):
    def function(x):
        raise error

    return stage(Odd(function), kind="step")


@pytest.mark.parametrize(
    "error", [KeyError("mem"), AssertionError("ndim"), AttributeError("v"), ZeroDivisionError("0")]
)
def test_whatever_a_stage_raises_the_seam_is_named(error):
    with pytest.raises(SeamError, match=r"seam 1, stage 0 \(Linear\) -> stage 1 \(Odd\)"):
        Pipeline(linear(), raising(error))(stimulus())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
def test_whole_numbers_do_not_enter_a_matrix(dtype):
    thresholded = stage(Odd(lambda x: (x > 0).to(dtype)), kind="step")
    assert Pipeline(linear(), thresholded)(stimulus()).dtype == dtype, "as the last stage it is the user's own affair"
    with pytest.raises(SeamError, match=r"seam 2.*Remedy: before it a stage that returns floating point"):
        Pipeline(linear(), thresholded, linear())(stimulus())


# ---- probes ----------------------------------------------------------------------------------------------------------


def test_probe_leaves_what_a_batch_norm_counts():
    norm = nn.BatchNorm1d(N)
    pipe = Pipeline(norm, leaky())
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    pipe.probe(stimulus())
    for name, value in norm.state_dict().items():
        assert_bits(value, before[name])
    pipe(stimulus())
    assert norm.num_batches_tracked == len(stimulus())


@pytest.mark.parametrize("end", ["brainpy", "native", "fused"])
def test_a_second_derivative_is_refused_and_not_left_out(end):
    """Where the gradient that comes in is a constant, torch's once_differentiable lets it pass."""
    stage = {"brainpy": lambda: JaxStage(lif(), dt=1.0), "native": native, "fused": leaky}[end]()
    pipe, xs = Pipeline(linear(), stage, fuse=end == "fused"), stimulus().requires_grad_()
    with tt.backend("cpu"):
        ys = pipe(xs)
        (grad,) = torch.autograd.grad((ys * stimulus(seed=3)).sum(), xs, create_graph=True)
    assert torch.isfinite(grad).all()
    with pytest.raises(RuntimeError, match="first derivatives alone"):
        grad.square().sum().backward()


def test_a_gradient_under_create_graph_is_that_without():
    found = []
    for create_graph in (False, True):
        pipe, xs = Pipeline(linear(), JaxStage(lif(), dt=1.0), native()), stimulus().requires_grad_()
        with tt.backend("cpu"):
            found.append(torch.autograd.grad(pipe(xs).sum(), xs, create_graph=create_graph)[0].detach())
    assert_bits(*found)
    assert found[0].any()


def test_an_empty_batch_has_no_rate():
    xs = torch.zeros(4, 0, N)
    probe = Pipeline(linear(), leaky()).probe(xs)
    assert not any(seam.spikes for seam in probe)
    assert probe.warnings == ()
