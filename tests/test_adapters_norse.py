"""Norse's neurons read into a spec, computed natively to the bit, built from one, and refused by name."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from norse import torch as nt
from norse.torch.functional.iaf import IAFParameters
from norse.torch.functional.leaky_integrator import LIParameters
from norse.torch.functional.leaky_integrator_box import LIBoxParameters
from norse.torch.functional.lif import LIFParameters
from norse.torch.functional.lif_box import LIFBoxParameters
from norse.torch.functional.reset import reset_subtract
from norse.torch.module.iaf import IAFCell
from norse.torch.module.leaky_integrator_box import LIBoxCell
from torch import nn, tensor

import tracetorch as tt
from tests.adapter_checks import assert_judged, assert_native_is_the_same, inputs
from tracetorch import adapters, oracle
from tracetorch.adapters.base import Building, ConversionError
from tracetorch.adapters.registry import adapter
from tracetorch.conformance.cases import neuron as made
from tracetorch.core.spec import SpecError
from tracetorch.functional.surrogates import Surrogate

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = adapter("norse")


LIF = LIFParameters(
    tau_mem_inv=tensor(300.0), tau_syn_inv=tensor(150.0), v_leak=tensor(0.1), v_th=tensor(0.4), v_reset=tensor(-0.1)
)
PER_NEURON = torch.linspace(100, 700, 5)


def box(**options):
    return nt.LIFBoxCell(LIFBoxParameters(tau_mem_inv=tensor(300.0), v_th=tensor(0.3), **options))


LAYERS = {
    "LIFBoxCell": lambda: box(),
    "LIFBoxCell, leak": lambda: box(v_leak=tensor(0.2), v_reset=tensor(-0.3)),
    "LIFBoxCell, subtract": lambda: box(reset_method=reset_subtract),
    "LIFBoxCell, per neuron": lambda: nt.LIFBoxCell(LIFBoxParameters(PER_NEURON, v_th=tensor(0.3)), dt=0.002),
    "LIFCell": lambda: nt.LIFCell(LIF),
    "LIF": lambda: nt.LIF(LIF),
    "LICell": lambda: nt.LICell(LIParameters(v_leak=tensor(0.2))),
    "LI": lambda: nt.LI(LIParameters(v_leak=tensor(0.2))),
    "LIBoxCell": lambda: LIBoxCell(LIBoxParameters(tau_mem_inv=PER_NEURON)),
    "IAFCell": lambda: IAFCell(IAFParameters(v_reset=tensor(-0.25))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_native_layer_to_the_bit(name):
    layer, x = LAYERS[name](), inputs()
    outputs, _ = assert_native_is_the_same(layer, x)
    assert torch.equal(adapters.build(adapters.spec(layer), "tracetorch").unroll(x), outputs)


@pytest.mark.parametrize("method", ["super", "triangle", "tanh", "circ", "heavi_erfc"])
def test_every_method_is_the_native_surrogate_to_the_bit(method):
    layer = box(method=method, alpha=tensor(0.7))
    assert_native_is_the_same(layer, inputs())
    back = adapters.build(adapters.spec(layer), "norse")
    assert back.p.method == method


def test_a_heaviside_passes_no_gradient():
    assert adapters.spec(box(method="heaviside")).surrogate == Surrogate("zero")


@pytest.mark.parametrize("name", ["LIFBoxCell", "LIFCell", "LI", "IAFCell"])
def test_in_float64_too(name):
    x = inputs(torch.float64)
    layer = LAYERS[name]()
    native = adapters.build(adapters.spec(layer), "tracetorch")
    ys, states = OURS.trace(layer, x)
    zs, recorded = adapter("tracetorch").trace(native, x)
    assert torch.equal(ys, zs)
    assert ys.dtype == zs.dtype == torch.float64
    assert all(torch.equal(states[n], recorded[n]) for n in states)


def test_learned_parameters_are_read_as_such_and_their_gradients_are_the_oracles():
    p = LIFParameters(*(nn.Parameter(value.clone()) for value in LIF[:5]))
    layer, x = nt.LIFCell(p), inputs()
    spec = adapters.spec(layer)
    assert all(parameter.learnable for parameter in spec.parameters.values())
    ys, states = OURS.trace(layer, x)
    weights = torch.linspace(-1, 1, ys.numel()).reshape(ys.shape)
    found = torch.autograd.grad(ys, list(p[:5]), weights)
    arrays = {name: state.detach().numpy() for name, state in states.items()}
    truth = oracle.gradients(spec, oracle.Recording(x.numpy(), ys.detach().numpy(), arrays, spec), weights.numpy())
    for name, gradient in zip(("syn_decay", "mem_decay", "leak", "threshold", "reset_value"), found, strict=True):
        assert oracle.gradient_error(gradient.numpy(), truth[name]) < 1e-4, name
        assert np.abs(truth[name]).max() > 0


def test_the_default_reset_of_iaf_is_no_parameter():
    """Quirk of 1.1.0: a call requires a gradient of the default v_reset, which is one tensor for all."""
    layer = IAFCell(IAFParameters(v_reset=tensor(-0.25)))
    layer(torch.zeros(2, 3))
    assert not adapters.spec(layer).parameters["reset_value"].learnable


def test_a_fused_twin_is_read_as_the_layer_it_was_made_from():
    cell = LAYERS["LIFBoxCell, leak"]()
    assert adapters.spec(tt.fuse(nt.SequentialState(cell))[0]) == adapters.spec(cell)


class Mine(nt.LIFBoxCell):
    pass


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: nt.LIFRecurrentCell(3, 3), "LIFRecurrentCell"),
        (lambda: nt.LSNNCell(), "LSNNCell"),
        (lambda: Mine(LIFBoxParameters()), "Mine"),
        (lambda: box(method="logistic"), "method='logistic'"),
        (lambda: nt.LIFCell(LIFParameters(method="adjoint")), "method='adjoint'"),
        (lambda: box(reset_method=lambda z, v, reset, th: v), "reset_method="),
        (lambda: box(method="tanh", alpha=nn.Parameter(tensor(1.0))), "alpha="),
    ],
)
def test_what_cannot_be_read_is_named(layer, words):
    with pytest.raises(SpecError, match=words):
        adapters.spec(layer())


# ---- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_there_and_back_is_the_same_layer(name, stock):
    layer = LAYERS[name]()
    spec = adapters.spec(layer)
    back = adapters.build(spec, "norse", stock=stock)
    assert type(back) is {nt.LIF: nt.LIFCell, nt.LI: nt.LICell}.get(type(layer), type(layer))
    assert adapters.spec(back) == spec
    x = inputs()
    assert torch.equal(OURS.trace(layer, x)[0], OURS.trace(back, x)[0])


NORMAL = {"comparison": ">", "input_gain": "one_minus_decay", "reset_gradient": "attached"}
SPECS = {
    "an inclusive comparison": made(**{**NORMAL, "comparison": ">="}),
    "a gain of one": made(comparison=">"),
    "a detached reset": made(**{**NORMAL, "reset_gradient": "detached"}),
    "several spikes": made(spike_count="multiple", reset="subtract", reset_gradient="attached"),
    "a lower bound": made(reset="subtract", clamp="after_reset", min_v_mem=-0.25),
    "another synapse": made(synapse="add_then_decay", syn_decay=0.5),
    "another surrogate": made(**{**NORMAL, "surrogate": Surrogate("gaussian")}),
    "over the decay": made(reset="subtract", reset_amount="threshold_over_decay"),
    "a synapse and a subtraction": made(**{**NORMAL, "synapse": "read_then_decay", "syn_decay": 0.5, "reset": "none"}),
}


@pytest.mark.parametrize("name", [name for name in SPECS if name != "a synapse and a subtraction"])
def test_what_its_own_cells_have_not_ours_has(name):
    spec, x = SPECS[name], inputs()
    layer = OURS.build(spec, Building("layer", "norse"))
    outputs = assert_judged(spec, layer, x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(OURS.trace(again, x)[0], outputs)
    first, state = layer(x[0])
    second, _ = layer(x[1], state)
    assert torch.equal(torch.stack([first, second]), outputs[:2])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a gain of one", "input_gain='one'.*scale of the weights"),
        ("several spikes", "spike_count='multiple'"),
        ("a lower bound", "clamp='after_reset'"),
        ("another synapse", "synapse='add_then_decay'"),
        ("over the decay", "reset_amount='threshold_over_decay'"),
        ("a synapse and a subtraction", "reset='none'"),
    ],
)
def test_stock_refuses_by_name(name, words):
    with pytest.raises(ConversionError, match=words):
        adapters.build(SPECS[name], "norse", stock=True)


@pytest.mark.parametrize("name", ["an inclusive comparison", "a detached reset", "another surrogate"])
def test_stock_meets_what_it_can_and_says_what_differs(name):
    building = Building("layer", "norse", stock=True)
    layer = OURS.build(SPECS[name], building)
    assert type(layer) is nt.LIFBoxCell
    assert_judged(SPECS[name], layer, inputs())
    assert any(note.gradient == "differs" for note in building.notes)


def test_a_tie_is_decided_as_asked():
    """v reaches the threshold exactly: only the inclusive comparison fires."""
    x = torch.full((1, 1, 1), 2.0)
    for name, spikes in (("an inclusive comparison", 1), ("a detached reset", 0)):
        layer = OURS.build(SPECS[name], Building("layer", "norse", stock=True))
        assert OURS.trace(layer, x)[0].item() == spikes


@pytest.mark.parametrize("net", [box, lambda: nt.LIF(), lambda: nt.SequentialState(nn.Linear(5, 5), box())])
def test_networks_to_read_are_refused_by_name(net):
    with pytest.raises(ConversionError, match=r"norse.*layers one by one"):
        tt.convert(net(), to="tracetorch", sample=inputs(), time_dim=0)


def test_networks_are_refused_by_name():
    net = torch.nn.Sequential(torch.nn.Linear(5, 5), tt.snn.SpecNeuron(made().replace(form="sinabs.LIF")))
    with pytest.raises(ConversionError, match="networks of Norse"):
        tt.convert(net, to="norse", sample=inputs(), time_dim=0)
