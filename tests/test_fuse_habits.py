"""`tt.fuse` on networks as people write, wrap, compile, checkpoint and copy them."""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque, namedtuple
from functools import partial

import norse.torch as no
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from norse.torch.module.snn import SNN
from sinabs.layers.alif import ALIFSqueeze
from spikingjelly.activation_based import functional as sf
from spikingjelly.activation_based import neuron as sn
from torch import nn
from torch.utils.checkpoint import checkpoint

import tracetorch as tt
from tests.bits import assert_bits
from tests.fuse_cases import OwnSurrogate
from tests.fuse_checks import assert_gradients, by_steps, fused_twin, ran
from tracetorch.adapters.fusing.twin import Twin

pytestmark = pytest.mark.usefixtures("poisoned")


# ---- fused twice, compiled, wrapped ----------------------------------------------------------------------------------


def test_fusing_a_fused_network_makes_one_with_kernels_of_its_own():
    once = fused_twin(sn.LIFNode(step_mode="m"))
    xs = torch.rand(8, 2, 7) * 3
    before = once(xs)
    twice = fused_twin(once)
    twice.v_threshold = 0.25
    sf.reset_net(twice)
    sf.reset_net(once)
    assert_bits(twice(xs), sn.LIFNode(step_mode="m", v_threshold=0.25)(xs))
    assert_bits(once(xs), before)


def test_the_report_of_a_network_fused_twice_names_its_neurons_only():
    once = tt.fuse(no.Lift(no.SequentialState(nn.Linear(3, 3), no.LIFCell())))
    twice = tt.fuse(once)
    assert [row.path for row in twice.fuse_report.rows] == ["lifted_module.1"]
    assert "lifted_module.1  norse.LIFCell  fused: already" in str(twice.fuse_report)


def distributed(net):
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = net
    return wrapped


@pytest.mark.parametrize(
    ("wrap", "name"),
    [(lambda net: torch.compile(net, backend="eager"), "OptimizedModule"), (distributed, "DistributedDataParallel")],
    ids=["torch.compile", "distributed"],
)
def test_a_wrapper_that_would_run_the_original_is_refused(wrap, name):
    net = nn.Sequential(nn.Linear(3, 3), sl.IAF())
    with pytest.raises(TypeError, match=f"the module is a {name}; fuse what it wraps"):
        tt.fuse(wrap(net))
    with pytest.raises(TypeError, match=f"0 is a {name}"):
        tt.fuse(nn.Sequential(wrap(net)))


def test_a_network_compiled_in_place_is_not_run_by_its_copy():
    net = nn.Sequential(nn.Linear(3, 3), sl.IAF())
    net.compile(backend="eager")
    fused = tt.fuse(net)
    fused(torch.rand(2, 5, 3))
    assert fused[1].v_mem.shape == (2, 3)
    assert net[1].v_mem.numel() == 0


# ---- whose states and hooks ------------------------------------------------------------------------------------------


STATEFUL = {
    "sinabs": (lambda: sl.LIF(tau_mem=5.0), lambda layer, xs: layer(xs), lambda layer: layer.v_mem),
    "sinabs Squeeze": (
        lambda: ALIFSqueeze(tau_mem=5.0, tau_adapt=5.0, batch_size=2),
        lambda layer, xs: layer(xs.flatten(0, 1)),
        lambda layer: layer.b,
    ),
    "snntorch": (lambda: snn.Leaky(beta=0.9), lambda layer, xs: layer(xs[:, 0]), lambda layer: layer.mem),
    "spikingjelly": (lambda: sn.LIFNode(step_mode="m"), lambda layer, xs: layer(xs), lambda layer: layer.v),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_states_written_in_place_in_one_tree_stay_in_it(name):
    make, call, state = STATEFUL[name]
    layer = make()
    call(layer, torch.rand(2, 5, 3))
    fused = fused_twin(layer)
    assert_bits(state(fused), state(layer))
    kept = state(layer).detach().clone()
    with torch.no_grad():
        state(fused).fill_(7.0)
    assert_bits(state(layer), kept)


def test_norse_s_state_hooks_are_removed_from_the_tree_that_is_asked():
    net = no.SequentialState(nn.Linear(5, 5), no.LIFCell())
    calls = []
    net.register_forward_state_hooks(lambda module, *_: calls.append(isinstance(module, Twin)))
    fused = tt.fuse(net)
    x = torch.rand(2, 5)
    fused(x)
    fused.remove_forward_state_hooks()
    fused(x)
    net(x)
    assert calls == [True, False]
    net.remove_forward_state_hooks()
    net(x)
    assert len(calls) == 2


@pytest.mark.parametrize("first", ["original", "fused"])
def test_lazy_modules_find_their_sizes_in_both_trees(first):
    net = nn.Sequential(nn.LazyLinear(4), sl.IAF())
    fused = tt.fuse(net)
    xs = torch.rand(2, 5, 3)
    order = (net, fused) if first == "original" else (fused, net)
    assert_bits(*(module(xs) for module in order))
    assert_bits(fused(xs), net(xs))
    assert type(fused[0]) is type(net[0]) is nn.Linear
    assert fused[0].weight is net[0].weight


def test_a_handle_of_somebody_else_s_hook_stays_that():
    net, other, calls = nn.Sequential(sl.IAF()), nn.Linear(2, 2), []
    net.handle = other.register_forward_hook(lambda *_: calls.append(1))
    tt.fuse(net).handle.remove()
    other(torch.rand(1, 2))
    assert not calls


def test_hooks_on_a_neuron_see_every_step_of_unroll():
    xs = torch.rand(6, 2, 3)
    for layer in (snn.Leaky(beta=0.9), no.LIFCell(), OwnSurrogate()):
        calls = []
        fused = fused_twin(layer)
        handle = fused.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        fused.unroll(xs)
        assert len(calls) == 6
        handle.remove()
        with tt.backend("cpu"):
            fused.unroll(xs)
        assert len(calls) in (6, 7)  # a module of the user's makes its own first state by a call
        assert ran(fused)


class Holder:
    """Of a user: refers to a module, or to nothing of the tree."""

    def __init__(self, held):
        self.held = held


Pair = namedtuple("Pair", "left right")


_NOBODY = Holder(None)


class Referring(nn.Module):
    """Attributes of every kind that lead to one of its neurons."""

    def __init__(self):
        super().__init__()
        self.neuron = sl.IAF()
        neuron = self.neuron
        self.held, self.foreign = Holder(self.neuron), Holder(3)
        self.deep = Holder({"all": [(neuron,)]})
        self.pair, self.plain_pair = Pair(neuron, 1), Pair(1, 2)
        self.closure = lambda xs, gain=2.0, *, more=1.0: neuron(xs * gain * more)
        self.free = lambda xs: xs * 2
        everything = [neuron]
        self.listed = lambda: everything[0]
        self.default = lambda neuron=neuron, *, again=neuron: (neuron, again)
        self.nested = partial(self.default, again=everything[0])
        self.queue, self.group, self.weak = deque([neuron], maxlen=3), {neuron}, weakref.ref(neuron)
        self.numbers, self.elsewhere = frozenset({1, 2}), weakref.ref(_NOBODY)
        self.by_module = OrderedDict({neuron: 1})
        self.tables = {"by name": {"neuron": neuron}}

    def forward(self, xs):
        return self.closure(xs)


def test_attributes_that_lead_to_a_neuron_lead_to_its_twin():
    net = Referring()
    fused = tt.fuse(net)
    twin = fused.neuron
    assert isinstance(twin, Twin)
    assert fused.held.held is fused.deep.held["all"][0][0] is twin
    assert fused.pair == Pair(twin, 1)
    assert type(fused.pair) is Pair
    assert fused.tables["by name"]["neuron"] is twin
    assert net.held.held is net.deep.held["all"][0][0] is net.pair.left is net.neuron
    assert fused.foreign is net.foreign
    assert fused.plain_pair is net.plain_pair
    assert fused.free is net.free
    assert fused.listed() is twin
    assert fused.default() == fused.nested() == (twin, twin)
    assert fused.queue == deque([twin])
    assert fused.queue.maxlen == 3
    assert fused.group == set(fused.by_module) == {twin}
    assert fused.weak() is twin
    assert fused.elsewhere() is _NOBODY
    assert fused.numbers == {1, 2}
    assert net.listed() is net.weak() is net.queue[0] is net.neuron
    assert net.group == set(net.by_module) == {net.neuron}
    xs = torch.rand(2, 5, 3)
    assert_bits(fused(xs), net(xs))
    assert twin.v_mem is not net.neuron.v_mem
    assert_bits(twin.v_mem, net.neuron.v_mem)
    assert ran(twin)


def test_a_forward_replaced_around_the_old_one_runs_the_twins():
    net = nn.Sequential(sl.IAF())
    old = net.forward
    net.forward = lambda xs: old(xs * 2)
    fused = tt.fuse(net)
    xs = torch.rand(2, 5, 3)
    assert_bits(fused(xs), net(xs))
    assert ran(fused[0])


def test_classes_that_act_on_their_subclasses_see_no_twin():
    seen = []

    class Registered(sn.LIFNode):
        def __init_subclass__(cls, tag):
            super().__init_subclass__()
            seen.append(tag)

    class Own(Registered, tag="own"):
        pass

    assert isinstance(fused_twin(Own(step_mode="m")), Own)
    assert seen == ["own"]


# ---- inference, checkpointing, what requires a gradient --------------------------------------------------------------


def test_inference_mode_runs_the_kernel():
    layer = sl.LIF(tau_mem=5.0, norm_input=False)
    fused = fused_twin(layer)
    xs = torch.rand(2, 20, 7)
    with torch.inference_mode(), tt.backend("cpu"):
        assert_bits(fused(xs), layer(xs))


def test_plain_checkpointing_of_a_layer_that_is_given_its_state():
    layer = no.LIF()
    fused = fused_twin(layer)
    xs = (torch.rand(20, 2, 7) * 30).requires_grad_()
    own = checkpoint(lambda x: layer(x)[0], xs, use_reentrant=False)
    expected = torch.autograd.grad(own.square().sum(), xs)
    for _ in range(2):
        with tt.backend("cpu"):
            ours = checkpoint(lambda x: fused(x)[0], xs, use_reentrant=False)
            given = torch.autograd.grad(ours.square().sum(), xs)
        assert_bits(ours, own)
        assert_gradients(given, expected, ["xs"])


def test_states_that_no_gradient_reaches_require_none():
    layer = no.LIFCell()
    fused = fused_twin(layer)
    xs = torch.rand(6, 2, 7)
    _, own = by_steps(layer, xs, None)
    _, ours = fused.unroll(xs)
    assert [s.requires_grad for s in ours] == [s.requires_grad for s in own] == [True, False]
    _, ours = fused.unroll(xs.requires_grad_())
    assert [s.requires_grad for s in ours] == [True, True]
    frozen = sl.LIF(tau_mem=5.0, tau_syn=3.0, record_states=True)
    frozen.tau_syn.requires_grad_(False)
    twin = fused_twin(frozen)
    for module in (frozen, twin):
        module(xs.detach())
        assert module.v_mem.requires_grad
        assert not module.i_syn.requires_grad
        assert [series.requires_grad for series in module.recordings.values()] == [True, False]


OWN_CODE = {
    "sinabs LIF": (lambda: sl.LIF(tau_mem=5.0), sl.LIF, "forward"),
    "sinabs ALIF": (lambda: sl.ALIF(tau_mem=5.0, tau_adapt=5.0), sl.ALIF, "forward"),
    "spikingjelly": (lambda: sn.IFNode(step_mode="m"), sn.IFNode, "multi_step_forward"),
    "norse": (lambda: no.LIF(), SNN, "forward"),
}


@pytest.mark.parametrize("name", OWN_CODE)
def test_what_the_kernel_has_computed_is_not_computed_again(name, monkeypatch):
    make, owner, method = OWN_CODE[name]
    fused = fused_twin(make())
    monkeypatch.setattr(owner, method, lambda *_: pytest.fail("its own code ran"))
    fused(torch.rand(2, 5, 3))


def test_one_step_with_a_hook_is_stacked_like_many():
    xs = torch.rand(1, 2, 3)
    for layer in (snn.Leaky(beta=0.9), snn.Leaky(beta=0.9, init_hidden=True)):
        twin = fused_twin(layer)
        plain = twin.unroll(xs)
        twin.mem.zero_()
        twin.register_forward_hook(lambda *_: None)
        hooked = twin.unroll(xs)
        assert type(hooked) is type(plain)
        for a, b in zip(hooked, plain, strict=True):
            assert_bits(a, b)
