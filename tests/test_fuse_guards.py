"""What a fused twin reads from its configuration: a change is traced again."""

from __future__ import annotations

import copy

import pytest
import sinabs
import sinabs.layers as sl
import torch
from sinabs import activation as sa
from snntorch import surrogate as sg
from spikingjelly.activation_based import neuron as sn
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits
from tests.fuse_cases import CASES
from tests.fuse_checks import assert_gradients, fused_twin, normal, run
from tracetorch.fused.reads import read

pytestmark = pytest.mark.usefixtures("poisoned")


# ---- guards ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "reset_fn": ("sinabs.LIF", lambda layer: setattr(layer, "reset_fn", sa.MembraneReset())),
    "inside reset_fn": ("sinabs.LIF subtract value", lambda layer: setattr(layer.reset_fn, "subtract_value", 0.25)),
    "spike_fn": ("sinabs.LIF", lambda layer: setattr(layer, "spike_fn", sa.SingleSpike)),
    "norm_input": ("sinabs.LIF", lambda layer: setattr(layer, "norm_input", True)),
    "integer threshold": ("sinabs.LIF integer clamp", lambda layer: layer.spike_threshold.data.fill_(1)),
    "threshold": ("sinabs.LIF", lambda layer: layer.spike_threshold.data.fill_(0.5)),
    "adapt_scale": ("sinabs.ALIF", lambda layer: setattr(layer, "adapt_scale", 0.5)),
    "v_threshold": ("spikingjelly.LIFNode", lambda layer: setattr(layer, "v_threshold", 0.5)),
    "v_reset": ("spikingjelly.LIFNode", lambda layer: setattr(layer, "v_reset", None)),
    "tau": ("spikingjelly.LIFNode", lambda layer: setattr(layer, "tau", 3.0)),
    "reset_delay": ("snntorch.Leaky", lambda layer: setattr(layer, "reset_delay", False)),
    "beta": ("snntorch.Leaky", lambda layer: setattr(layer, "beta", torch.tensor(0.25))),
    "state_quant": ("snntorch.Leaky hidden", lambda layer: setattr(layer, "state_quant", lambda mem: mem.round())),
    "dt": ("norse.LIFBoxCell", lambda layer: setattr(layer, "dt", 0.002)),
    "p": ("norse.LIFBoxCell", lambda layer: setattr(layer, "p", layer.p._replace(v_th=torch.tensor(0.5)))),
    "v_reset of norse": (
        "norse.LIFCell",
        lambda layer: setattr(layer, "p", layer.p._replace(v_reset=torch.tensor(0.25))),
    ),
}
GRADIENTS = {
    "detach_reset": ("spikingjelly.LIFNode", lambda layer: setattr(layer, "detach_reset", True)),
    "surrogate alpha": ("spikingjelly.LIFNode", lambda layer: setattr(layer.surrogate_function, "alpha", 1.0)),
    "surrogate_grad_fn": ("sinabs.LIF", lambda layer: setattr(layer, "surrogate_grad_fn", sa.Gaussian())),
    "spike_grad": ("snntorch.Leaky", lambda layer: setattr(layer, "spike_grad", sg.fast_sigmoid(5))),
    "method": (
        "norse.LIFCell",
        lambda layer: setattr(layer, "p", layer.p._replace(method="tanh", alpha=torch.tensor(1.0))),
    ),
}


def begin_again(layer):
    """Back to the initial state."""
    for state in ("v_mem", "b", "mem", "syn"):
        if isinstance(getattr(layer, state, None), torch.Tensor):
            setattr(layer, state, torch.zeros(0))
    if isinstance(layer, sn.LIFNode):
        layer.v = 0.0


@pytest.mark.parametrize("change", [*CHANGES, *GRADIENTS])
def test_a_changed_configuration_is_traced_again(change):
    name, edit = {**CHANGES, **GRADIENTS}[change]
    case = CASES[name]
    # snnTorch's and sinabs's default tensors and functions are shared by all layers: the edits must not reach others.
    layer, fused = copy.deepcopy(case.make(7)), fused_twin(case.make(7))
    for module in (layer, fused):
        if hasattr(module, "spike_threshold") and isinstance(module.spike_threshold, nn.Parameter):
            module.spike_threshold = nn.Parameter(module.spike_threshold.detach().clone(), requires_grad=False)
        if hasattr(module, "reset_fn"):
            module.reset_fn = copy.copy(module.reset_fn)
    xs = normal(case, 40, 2, 7)
    if change in CHANGES:
        before = case.run(fused, xs.clone().requires_grad_(), None)[0]
        for module in (layer, fused):
            edit(module)
        begin_again(fused)
        with torch.no_grad(), tt.backend("cpu"):
            ours, own = case.run(fused, xs, None)[0], case.run(layer, xs, None)[0]
        assert_bits(ours.outputs[0], own.outputs[0])
        assert not torch.equal(ours.outputs[-1], before.outputs[-1])
        return
    before, old = run(case, fused, xs, [40])
    for module in (layer, fused):
        edit(module)
    (own,), expected = run(case, layer, xs, [40])
    begin_again(fused)
    with tt.backend("cpu"):
        (ours,), given = run(case, fused, xs, [40])
    for a, b in zip(ours.outputs, own.outputs, strict=True):
        assert_bits(a, b)
    assert_gradients([given["x"]], [expected["x"]], ["x"])
    assert_bits(ours.outputs[0], before[0].outputs[0])
    assert not torch.allclose(given["x"], old["x"])


def test_every_kind_of_change_is_noticed():
    amount = [0.5]
    scale = 2.0

    def reset(spikes, state, threshold, factor=1.0):
        return {**state, "v_mem": state["v_mem"] - spikes * amount[0] * scale * factor}

    layer = sl.LIF(tau_mem=5.0, norm_input=False, reset_fn=reset)
    reads = read(layer, ("v_mem",))
    assert reads.unchanged()
    layer.v_mem = torch.ones(3)
    assert reads.unchanged()

    def edits():
        yield "a list behind a closure", lambda: amount.__setitem__(0, 0.25)
        yield "a closure's variable", lambda: setattr(reset.__closure__[1], "cell_contents", 3.0)
        yield "a default argument", lambda: setattr(reset, "__defaults__", (0.5,))
        yield "a new attribute", lambda: setattr(layer, "flag", True)
        yield "a tensor's dtype", lambda: layer.double()
        yield "a parameter", lambda: setattr(layer, "tau_mem", nn.Parameter(torch.tensor(4.0)))
        yield "the mode", lambda: layer.eval()
        yield "a function", lambda: setattr(layer, "spike_fn", sa.SingleSpike)

    for what, edit in edits():
        before = read(layer, ("v_mem",))
        assert before.unchanged(), what
        edit()
        assert not before.unchanged(), what
        after = read(layer, ("v_mem",))
        assert after.guard != before.guard or after.tensors["tau_mem"] is not before.tensors["tau_mem"], what
    assert scale == 3.0
    layer.register_buffer("count", torch.tensor(3))
    before = read(layer, ("v_mem",))
    assert before.unchanged()
    layer.count.add_(1)
    assert not before.unchanged()


def test_another_length_or_size_needs_no_other_kernel():
    fused = fused_twin(sl.IAF())
    for shape in ((2, 5, 7), (1, 63, 1), (3, 2, 513)):
        sinabs.reset_states(nn.Sequential(fused))
        fused(torch.rand(shape))
    plans = fused._sequencer.plans
    assert len(plans) == 1
    assert len(next(iter(plans.values())).kernels) == 1


def test_freezing_a_parameter_is_seen():
    layer = sl.LIF(tau_mem=5.0, norm_input=False)
    fused = fused_twin(layer)
    xs = torch.rand(2, 20, 7) * 2
    fused(xs).sum().backward()
    assert layer.tau_mem.grad is not None
    layer.tau_mem.grad = None
    layer.tau_mem.requires_grad_(False)
    sinabs.reset_states(nn.Sequential(fused))
    assert not fused(xs).requires_grad
