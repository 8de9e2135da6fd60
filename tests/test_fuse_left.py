"""What `tt.fuse` leaves as it is, and names; a neuron of the user's own."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import norse.torch as no
import pytest
import sinabs
import sinabs.layers as sl
import snntorch as snn
import torch
from snntorch import surrogate as sg
from spikingjelly.activation_based import neuron as sn
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits
from tests.fuse_checks import assert_gradients, by_steps, fused_twin
from tracetorch import adapters
from tracetorch.adapters.fusing.twin import Twin
from tracetorch.fused import compiler, sequence
from tracetorch.fused.sequence import FuseWarning

pytestmark = pytest.mark.usefixtures("poisoned")


# ---- what is not fused -----------------------------------------------------------------------------------------------


class Louder(sl.LIF):
    """A subclass with a forward of its own."""

    def forward(self, input_data):
        return super().forward(input_data * 2)


class Gentle(sl.LIF):
    """A subclass that changes what the step reads, not the call."""

    @property
    def alpha_mem_calculated(self):
        return super().alpha_mem_calculated.clamp(0, 0.5)


class NoisyReset:
    """Draws random numbers."""

    def __call__(self, spikes, state, threshold):
        return {**state, "v_mem": state["v_mem"] - spikes * threshold + 0.1 * torch.rand(1)}


class ByMean:
    """Reads all neurons."""

    def __call__(self, spikes, state, threshold):
        return {**state, "v_mem": state["v_mem"] - spikes.mean()}


class ByShape:
    """Depends on how many neurons there are."""

    def __call__(self, spikes, state, threshold):
        return {**state, "v_mem": state["v_mem"] - spikes / spikes.shape[-1]}


def replaced():
    layer = sl.LIF(tau_mem=5.0)
    layer.forward = functools.partial(sl.LIF.forward, layer)
    return layer


LEFT = {
    "rec_connect": lambda: sl.LIFRecurrent(tau_mem=5.0, rec_connect=nn.Linear(7, 7)),
    "matrix": lambda: snn.RLeaky(beta=0.9, all_to_all=False),
    "through a matrix": lambda: no.LIFRecurrentCell(7, 7),
    "not one of sinabs": lambda: Louder(tau_mem=5.0),
    "random": lambda: sl.LIF(tau_mem=5.0, reset_fn=NoisyReset()),
    "mean": lambda: sl.LIF(tau_mem=5.0, reset_fn=ByMean()),
    "shape of the input": lambda: sl.LIF(tau_mem=5.0, reset_fn=ByShape()),
    "argmax": lambda: snn.Leaky(beta=0.9, inhibition=True),
    "replaced on this instance": replaced,
    "named tuple": lambda: no.LIFRefracCell(),
}


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature:UserWarning")
@pytest.mark.parametrize("word", LEFT)
def test_what_cannot_be_fused_is_left_and_named(word):
    net = nn.Sequential(LEFT[word](), nn.Linear(7, 7))
    fused = tt.fuse(net)
    (row,) = fused.fuse_report.rows
    assert not row.fused
    assert word in row.reason
    assert row.path == "0"
    assert "0 of 1" in str(fused.fuse_report)
    assert word in str(fused.fuse_report)
    assert not isinstance(fused[0], Twin)
    assert type(fused[0]) is type(net[0])


def test_left_layers_run_as_ever():
    torch.manual_seed(0)
    net = nn.Sequential(
        Louder(tau_mem=5.0), sl.LIFRecurrent(tau_mem=5.0, rec_connect=nn.Linear(7, 7)), Gentle(tau_mem=5.0)
    )
    fused = tt.fuse(net)
    assert [row.fused for row in fused.fuse_report.rows] == [False, False, True]
    xs = torch.rand(2, 20, 7) * 4
    assert_bits(fused(xs), net(xs))
    net[0].reset_states()
    assert fused[0].v_mem.any()


NOTES = {
    "step_mode 's'": lambda: sn.LIFNode(),
    "record_states": lambda: sl.ALIF(tau_mem=5.0, tau_adapt=5.0, record_states=True),
    "a call is one step": lambda: snn.Leaky(beta=0.9),
    "unroll(xs, time_dim) is fused": lambda: no.LIFBoxCell(),
}


@pytest.mark.parametrize("words", NOTES)
def test_the_report_says_what_stays_its_own_code(words):
    fused = fused_twin(NOTES[words]())
    assert words in str(fused.fuse_report)
    assert "fused: " in str(fused.fuse_report)


def test_an_alif_records_as_ever():
    layer = sl.ALIF(tau_mem=5.0, tau_adapt=5.0, record_states=True)
    fused = fused_twin(layer)
    xs = torch.rand(2, 20, 7) * 8
    assert_bits(fused(xs), layer(xs))
    for name, series in layer.recordings.items():
        assert_bits(fused.recordings[name], series)


def test_modules_without_neurons_and_things_that_are_none():
    fused = tt.fuse(nn.Sequential(nn.Linear(2, 3)))
    assert fused.fuse_report.rows == ()
    with pytest.raises(TypeError, match="str"):
        tt.fuse("network")
    assert tt.fuse(sn.NonSpikingLIFNode()).fuse_report.left
    layer = tt.snn.LIB(3)
    layer(torch.ones(2, 3))
    native = tt.fuse(layer)
    assert "native" in native.fuse_report.rows[0].reason
    assert native.raw_beta is layer.raw_beta
    assert_bits(native.unroll(torch.ones(4, 2, 3)), layer.unroll(torch.ones(4, 2, 3)))
    native.reset_states()
    assert layer.mem is not None
    twice = tt.fuse(tt.fuse(sl.IAF()))
    assert twice.fuse_report.rows[0].reason == "already"
    assert twice(torch.rand(1, 3, 2)).shape == (1, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_run_the_layers_own_code(dtype):
    layer = sn.LIFNode(step_mode="m")
    fused = fused_twin(layer)
    xs = (torch.rand(10, 2, 7) * 3).to(dtype)
    assert_bits(fused(xs).float(), layer(xs).float())
    with tt.backend("cpu"), pytest.raises(tt.fused.FuseError, match=str(dtype)):
        fused(xs)


def test_backends_are_obeyed():
    layer = sl.IAF()
    fused = fused_twin(layer)
    xs = torch.rand(2, 20, 7)
    with tt.backend("eager"):
        assert_bits(fused(xs), layer(xs))
    assert fused._sequencer.plans == {}
    sinabs.reset_states(nn.Sequential(fused))
    fused(xs)
    assert len(fused._sequencer.plans) == 1


def test_without_a_compiler_the_layers_own_code_runs_and_says_so_once(monkeypatch):
    layer = sl.IAF()
    fused = fused_twin(layer)
    monkeypatch.setattr(compiler, "find", lambda: None)
    sequence._warn_once.cache_clear()
    xs = torch.rand(2, 20, 7)
    with pytest.warns(FuseWarning, match="no C compiler found"):
        first = fused(xs)
    assert_bits(first, layer(xs))
    assert_bits(fused(xs), layer(xs))
    assert fused_twin(sl.ExpLeak(tau_mem=5.0))(xs).sum() > 0


def test_a_step_that_stops_being_pointwise_says_so_once():
    layer = sl.LIF(tau_mem=5.0, norm_input=False)
    fused = fused_twin(layer)
    layer.reset_fn = fused.reset_fn = ByMean()
    xs = torch.rand(2, 20, 7) * 2
    with pytest.warns(FuseWarning, match="mean"):
        ours = fused(xs)
    assert_bits(ours, layer(xs))
    assert_bits(fused(xs), layer(xs))


def test_hooks_on_a_lifted_cell_see_every_step():
    net = no.Lift(no.LIFBoxCell())
    calls = []
    net.lifted_module.register_forward_hook(lambda *_: calls.append(1))
    fused = tt.fuse(net)
    xs = torch.rand(20, 2, 7) * 20
    assert_bits(fused(xs)[0], net(xs)[0])
    assert len(calls) == 40
    whole = tt.fuse(nn.Sequential(sl.IAF()))
    whole[0].register_forward_hook(lambda *_: calls.append(2))
    whole(torch.rand(1, 3, 2))
    assert calls[-1] == 2


def test_parameters_that_do_not_broadcast_run_the_layers_own_code():
    layer = sl.LIF(tau_mem=torch.rand(2, 1, 7) + 3, norm_input=False)
    fused = fused_twin(layer)
    xs = torch.rand(2, 20, 7)
    assert_bits(fused(xs), layer(xs))


def test_wide_parameters_run_the_layers_own_code():
    layer = snn.Leaky(beta=torch.tensor([0.5, 0.75], dtype=torch.float64))
    fused = fused_twin(layer)
    xs = torch.rand(20, 3, 2)
    ours, own = fused.unroll(xs)[0], torch.stack([layer(x)[0] for x in xs])
    assert_bits(ours, own)


class OfTheUser(nn.Module):
    """A user's neuron: one call is one step, the state is passed."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.8))
        self.threshold = 1.0

    def forward(self, x, state=None):
        v, trace = state if state is not None else (torch.zeros_like(x), torch.zeros_like(x))
        v = self.decay * v + x
        spikes = sg.fast_sigmoid()(v - self.threshold - 0.1 * trace)
        return spikes, (v - spikes.detach() * self.threshold, 0.5 * trace + spikes)


class NoNeuron(nn.Module):
    """Called like one, and mixes its neurons."""

    def forward(self, x, state=None):
        state = torch.zeros_like(x) if state is None else state
        return x.cumsum(-1), state


def test_a_users_own_neuron_gains_unroll():
    fused = tt.fuse(nn.Sequential(OfTheUser(), NoNeuron(), nn.Bilinear(2, 2, 2)))
    assert [(row.path, row.fused) for row in fused.fuse_report.rows] == [("0", True)]
    layer, twin = OfTheUser(), fused[0]
    twin.load_state_dict(layer.state_dict())
    xs = torch.rand(40, 3, 7, requires_grad=True)
    own, state = by_steps(layer, xs, None)
    with tt.backend("cpu"):
        ours, our_state = twin.unroll(xs)
    assert own.sum() > 0
    assert_bits(ours, own)
    for a, b in zip(our_state, state, strict=True):
        assert_bits(a, b)
    leaves = [xs, layer.decay]
    expected = torch.autograd.grad((own * xs.detach()).sum(), leaves)
    given = torch.autograd.grad((ours * xs.detach()).sum(), [xs, twin.decay])
    assert_gradients(given, expected, ["xs", "decay"])
    again = twin.unroll(xs.transpose(0, 1), 1, our_state)[0]
    assert_bits(again.transpose(0, 1), by_steps(layer, xs, state)[0])


def test_fuse_is_reached_from_both_places():
    assert tt.fuse is adapters.fuse
    assert SimpleNamespace(f=tt.fuse).f(nn.Identity()).fuse_report.rows == ()
