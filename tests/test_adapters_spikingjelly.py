"""SpikingJelly's nodes read into a spec, computed natively to the bit, built from one, and refused by name."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate

import tracetorch as tt
from tests.adapter_checks import assert_judged, assert_native_is_the_same, inputs, slope
from tracetorch import adapters, oracle
from tracetorch.adapters.base import Building, ConversionError
from tracetorch.adapters.registry import adapter
from tracetorch.conformance.cases import neuron as made
from tracetorch.core.spec import SpecError
from tracetorch.functional.surrogates import Surrogate

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = adapter("spikingjelly")


KINDS = {
    "LIF": lambda **options: neuron.LIFNode(tau=2.3, decay_input=False, **options),
    "LIF, decay_input": lambda **options: neuron.LIFNode(tau=2.3, decay_input=True, **options),
    "PLIF": lambda **options: neuron.ParametricLIFNode(init_tau=2.3, decay_input=False, **options),
    "PLIF, decay_input": lambda **options: neuron.ParametricLIFNode(init_tau=2.3, decay_input=True, **options),
    "IF": lambda **options: neuron.IFNode(**options),
}


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_a_node_is_its_native_layer_to_the_bit(kind, v_reset, detach, mode):
    layer = KINDS[kind](v_threshold=0.9, v_reset=v_reset, detach_reset=detach, step_mode=mode)
    spec, x = adapters.spec(layer), inputs()
    outputs, _ = assert_native_is_the_same(layer, x)
    assert spec.reset_gradient == ("detached" if detach else "attached")
    assert (spec.reset, spec.comparison) == ("subtract" if v_reset is None else "value", ">=")
    assert torch.equal(adapters.build(spec, "tracetorch").unroll(x), outputs)


STOCK = [
    surrogate.Sigmoid(3.7),
    surrogate.ATan(1.3),
    surrogate.PiecewiseQuadratic(0.8),
    surrogate.PiecewiseExp(1.7),
    surrogate.SoftSign(1.9),
    surrogate.SuperSpike(0.6),
    surrogate.Erf(1.1),
    surrogate.Rect(0.7),
    surrogate.PiecewiseLeakyReLU(0.9, 0.02),
    surrogate.LeakyKReLU(0.1, 0.9),
    surrogate.DeterministicPass(),
]


@pytest.mark.parametrize("function", STOCK, ids=lambda function: type(function).__name__)
def test_every_surrogate_is_the_native_one_to_the_bit(function):
    layer = KINDS["LIF"](surrogate_function=function)
    assert_native_is_the_same(layer, inputs())
    built = adapters.build(adapters.spec(layer), "spikingjelly")
    assert type(built.surrogate_function) is type(function)
    assert built.surrogate_function._sg_params == function._sg_params


@pytest.mark.parametrize("kind", ["LIF", "LIF, decay_input", "IF"])
def test_in_float64_too(kind):
    layer, x = KINDS[kind](v_threshold=0.75), inputs(torch.float64)
    spec = adapters.spec(layer)
    if "mem_decay" in spec.parameters:
        layer.tau = float(spec.parameters["mem_decay"].value)  # the float32 number, in both
    native = adapters.build(spec, "tracetorch").double()
    ys, states = OURS.trace(layer, x)
    zs, recorded = adapter("tracetorch").trace(native, x)
    assert torch.equal(ys, zs)
    assert ys.dtype == zs.dtype == torch.float64
    assert torch.equal(states["v_mem"], recorded["v_mem"])


def test_the_gradient_of_w_is_the_oracles():
    layer = KINDS["PLIF, decay_input"](v_reset=None)
    spec, x = adapters.spec(layer), inputs()
    assert (spec.parameters["mem_decay"].raw, spec.parameters["mem_decay"].learnable) == ("one_minus_sigmoid", True)
    ys, states = OURS.trace(layer, x)
    found, weights = slope(ys, layer.w)
    recording = oracle.Recording(x.numpy(), ys.detach().numpy(), {"v_mem": states["v_mem"].detach().numpy()}, spec)
    truth = oracle.gradients(spec, recording, weights.numpy())["mem_decay"]
    assert oracle.gradient_error(found.numpy(), truth) < 1e-4
    native = adapters.build(spec, "tracetorch")
    assert torch.equal(native.mem_decay, layer.w)
    zs, _ = adapter("tracetorch").trace(native, x)
    assert oracle.gradient_error(slope(zs, native.mem_decay)[0].numpy(), truth) < 1e-4


def test_a_layer_is_read_as_it_is_now_and_its_state_is_left_alone_by_spec():
    layer = KINDS["PLIF"]()
    x = inputs()
    layer(x[0])
    kept = layer.v
    with torch.no_grad():
        layer.w.fill_(0.4)
    assert adapters.spec(layer).parameters["mem_decay"].value == np.float32(0.4)
    assert layer.v is kept
    layer.v_threshold = 0.5
    assert adapters.spec(layer).parameters["threshold"].value == np.float32(0.5)


def test_store_v_seq_and_the_step_mode_are_left_as_they_were():
    for mode in "sm":
        for shown in (False, True):
            layer = KINDS["LIF"](step_mode=mode, store_v_seq=shown)
            OURS.trace(layer, inputs())
            assert (layer.step_mode, layer.store_v_seq) == (mode, shown)


def test_a_fused_twin_is_read_as_the_layer_it_was_made_from():
    layer = KINDS["LIF, decay_input"](step_mode="m", v_reset=None)
    fused = tt.fuse(torch.nn.Sequential(layer))[0]
    assert adapters.spec(fused) == adapters.spec(layer)


# ---- refusals of reading --------------------------------------------------------------------------------------------


class Own(torch.nn.Module):
    def forward(self, x):
        return (x > 0).to(x)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: neuron.QIFNode(), "QIFNode"),
        (lambda: neuron.SimpleIFNode(), "SimpleIFNode"),
        (lambda: neuron.LIFNode(surrogate_function=Own()), "surrogate_function=Own"),
        (lambda: neuron.LIFNode(surrogate_function=surrogate.S2NN()), "surrogate_function=S2NN"),
        (lambda: neuron.LIFNode(surrogate_function=surrogate.Sigmoid(spiking=False)), "spiking=False"),
    ],
)
def test_what_cannot_be_read_is_named(layer, words):
    with pytest.raises(SpecError, match=words):
        adapters.spec(layer())


def test_a_number_that_is_no_float_is_named():
    layer = neuron.LIFNode()
    layer.v_threshold = torch.ones(5)
    with pytest.raises(SpecError, match="v_threshold"):
        adapters.spec(layer)


# ---- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.25])
def test_there_and_back_is_the_same_layer(kind, v_reset):
    layer = KINDS[kind](v_threshold=0.75, v_reset=v_reset, detach_reset=True, surrogate_function=surrogate.ATan())
    spec = adapters.spec(layer)
    for stock in (False, True):
        back = adapters.build(spec, "spikingjelly", stock=stock)
        assert type(back) is type(layer)
        assert adapters.spec(back) == spec
    x = inputs()
    assert torch.equal(OURS.trace(layer, x)[0], OURS.trace(back, x)[0])


SPECS = {
    "strict": made(comparison=">"),
    "a decay for each neuron": made(mem_decay=np.linspace(0.3, 0.9, 5).astype(np.float32)),
    "a threshold for each neuron": made(threshold=np.linspace(0.6, 1.4, 5).astype(np.float32)),
    "several spikes": made(spike_count="multiple", reset="subtract", reset_gradient="attached"),
    "a lower bound": made(reset="subtract", clamp="after_reset", min_v_mem=-0.25),
    "a synapse": made(synapse="add_then_decay", syn_decay=0.5),
    "no spikes": made(
        output="membrane", spike_count="none", reset="none", threshold=None, surrogate=None, threshold_gradient=False
    ),
    "learned thresholds": made(learn=("threshold", "mem_decay")),
    "another surrogate": made(surrogate=Surrogate("gaussian")),
    "added value": made(reset="add_value", reset_value=0.125),
    "over the decay": made(reset="subtract", reset_amount="threshold_over_decay"),
    "after the decay": made(reset="subtract", reset_timing="next_step_after_decay", comparison=">"),
}


@pytest.mark.parametrize("name", SPECS)
def test_what_its_own_nodes_have_not_ours_has(name):
    spec, x = SPECS[name], inputs()
    layer = OURS.build(spec, Building("layer", "spikingjelly"))
    outputs = assert_judged(spec, layer, x)
    functional.reset_net(layer)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(OURS.trace(again, x)[0], outputs)
    functional.reset_net(layer)
    layer.step_mode = "m"
    assert torch.equal(layer(x), outputs)
    functional.reset_net(layer)
    layer.step_mode = "s"
    assert torch.equal(torch.stack([layer(step) for step in x]), outputs)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a threshold for each neuron", "threshold=.*one number"),
        ("several spikes", "spike_count='multiple'"),
        ("a lower bound", "clamp='after_reset'"),
        ("a synapse", "synapse='add_then_decay'"),
        ("no spikes", "output='membrane'"),
        ("learned thresholds", "threshold=.*learn"),
        ("added value", "reset='add_value'"),
        ("over the decay", "reset_amount='threshold_over_decay'"),
        ("after the decay", "reset_timing='next_step_after_decay'"),
    ],
)
def test_stock_refuses_by_name(name, words):
    with pytest.raises(ConversionError, match=words):
        adapters.build(SPECS[name], "spikingjelly", stock=True)


@pytest.mark.parametrize("name", ["strict", "a decay for each neuron", "another surrogate"])
def test_stock_meets_what_it_can(name):
    building = Building("layer", "spikingjelly", stock=True)
    layer = OURS.build(SPECS[name], building)
    assert type(layer) in (neuron.LIFNode, neuron.ParametricLIFNode)
    assert_judged(SPECS[name], layer, inputs())
    differs = any(note.gradient == "differs" for note in building.notes)
    assert differs == (name == "another surrogate")


@pytest.mark.parametrize("mode", ["s", "m"])
def test_networks_to_read_are_refused_by_name(mode):
    net = torch.nn.Sequential(torch.nn.Linear(5, 5), neuron.LIFNode(step_mode=mode))
    with pytest.raises(ConversionError, match=r"spikingjelly.*layers one by one"):
        tt.convert(net, to="tracetorch", sample=inputs(), time_dim=0)


def test_networks_are_refused_by_name():
    net = torch.nn.Sequential(torch.nn.Linear(5, 5), tt.snn.SpecNeuron(made().replace(form="sinabs.LIF")))
    with pytest.raises(ConversionError, match="networks of SpikingJelly"):
        tt.convert(net, to="spikingjelly", sample=inputs(), time_dim=0)
