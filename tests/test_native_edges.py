"""Edges of native layers from specs: shapes of parameters, other orders of operations, baked parameters, saving."""

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tracetorch import adapters
from tracetorch.adapters.registry import adapter_of
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional import round_ste
from tracetorch.functional.surrogates import Surrogate

VALUES = {"mem_decay": 0.5, "threshold": 1.0, "neg_threshold": 0.75}


def signed(shapes=(), form="tracetorch.LIT", only=tuple(VALUES), **changes):
    """A spec of two signs; the parameters `only` have the shape, the others none."""
    parameters = {
        name: tt.Parameter(np.full(shapes if name in only else (), value, np.float32)) for name, value in VALUES.items()
    }
    chosen = {"form": form, "comparison": ">", "surrogate": Surrogate("atan"), "parameters": parameters}
    return NeuronSpec(**{**chosen, **changes})


def steps(*shape):
    return 2 * torch.randn(12, *shape, generator=torch.Generator().manual_seed(3))


SHAPES = [
    ((), tuple(VALUES), None, -1),
    ((1,), tuple(VALUES), None, -1),
    ((1, 1, 1), tuple(VALUES), None, -1),
    ((5, 1, 1), tuple(VALUES), 5, -3),
    ((5, 1, 1), ("threshold",), 5, -3),
    ((5, 1, 1), ("mem_decay",), 5, -3),
    ((4,), ("neg_threshold",), 4, -1),
]


@pytest.mark.parametrize(("shape", "only", "neurons", "dim"), SHAPES, ids=str)
def test_a_named_layer_serves_every_shape_that_its_spec_does(shape, only, neurons, dim, tmp_path):
    """A bias that the spec leaves out has the shape of none; a single value is that of all neurons."""
    spec, xs = signed(shape, only=only), steps(2, 5, 3, 4)
    layer = adapters.build(spec, "tracetorch", stock=True)
    assert (type(layer).__name__, layer.num_neurons, layer.dim) == ("LIT", neurons, dim)
    assert {getattr(layer, f"raw_{name}").shape for name in layer.raw_forms} <= {
        torch.Size(()),
        torch.Size((neurons or 0,)),
    }
    with torch.no_grad():
        expected, outputs = tt.snn.SpecNeuron(spec).unroll(xs), layer.unroll(xs)
        assert torch.equal(outputs, expected)
        assert set(outputs.unique().tolist()) == {-1.0, 0.0, 1.0}
        tt.save(tmp_path / "layer.tt", nn.Sequential(layer))
        again = tt.load(tmp_path / "layer.tt")[0]
        assert (again.num_neurons, again.dim) == (neurons, dim)
        assert torch.equal(again.unroll(xs), expected)
    assert adapters.spec(again) == adapters.spec(layer)


def test_one_value_stands_beside_one_for_each_neuron():
    spec = signed((5,), only=("threshold",))
    mixed = {**spec.parameters, "mem_decay": tt.Parameter(np.full((1,), 0.5, np.float32), True)}
    layer = adapters.build(spec.replace(parameters=mixed), "tracetorch", stock=True)
    assert (layer.num_neurons, layer.raw_beta.shape, layer.raw_pos_threshold.shape) == (5, (), (5,))
    assert layer.raw_beta.requires_grad


@pytest.mark.parametrize(
    ("shape", "only", "field"), [((5, 3, 4), ("threshold",), "threshold"), ((1, 5), tuple(VALUES), "mem_decay")]
)
def test_values_along_two_dimensions_are_refused_by_the_parameter_that_has_them(shape, only, field):
    with pytest.raises(adapters.ConversionError, match="one value for each neuron") as caught:
        adapters.build(signed(shape, only=only), "tracetorch", stock=True)
    assert caught.value.field == field


def test_a_file_of_a_layer_for_any_number_of_neurons_holds_scalars_alone(tmp_path):
    layer = tt.snn.LIB(None)
    layer.raw_beta = nn.Parameter(torch.zeros(3))
    with pytest.raises(tt.FileError, match=r"raw_beta.*must be \[\]"):
        tt.save(tmp_path / "layer.tt", nn.Sequential(layer))


@pytest.mark.parametrize("form", ["any", "sinabs.LIF"])
@pytest.mark.parametrize("to", ["sinabs", "snntorch", "spikingjelly", "norse"])
def test_another_order_of_operations_is_found_for_two_signs(to, form):
    """A spec names the order of its source; where that has one sign, another order computes it."""
    xs = steps(2, 5)
    layer = adapters.build(signed(form=form), to)
    outputs, _ = adapter_of(layer).trace(layer, xs)
    assert torch.equal(outputs.detach(), tt.snn.SpecNeuron(signed()).unroll(xs))


@pytest.mark.parametrize("to", ["tracetorch", "sinabs", "snntorch", "spikingjelly", "norse", "brainpy"])
@pytest.mark.parametrize("form", ["any", "tracetorch.LIT"])
@pytest.mark.parametrize("changes", [{"reset": "none"}, {"reset_gradient": "detached"}, {"surrogate": None}], ids=str)
def test_choices_that_no_order_has_are_refused_and_crash_nowhere(changes, form, to):
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(signed(form=form, **changes), to)
    assert caught.value.field in ("form", "neg_threshold", *changes)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("kind", "to"), [("SLITS", "sinabs"), ("SpecNeuron", "sinabs"), ("DSRLITS", "tracetorch"), ("SLITS", "tracetorch")]
)
def test_stale_baked_parameters_are_refused_by_name(kind, to):
    """A layer that computes with other numbers than its raw tensors is no fault of its reading."""
    layer = tt.snn.SpecNeuron(signed((5,))) if kind == "SpecNeuron" else getattr(tt.snn, kind)(5, quant_fn=round_ste())
    xs, name = steps(2, 5), next(iter(layer.raw_forms))
    layer.TTcompile()
    if to == "tracetorch":
        assert tt.convert(nn.Sequential(layer), to=to, sample=xs, time_dim=0).report[0].forward == "exact"
    with torch.no_grad():
        getattr(layer, layer.raw_attribute(name)).add_(0.5)
    with pytest.raises(
        (adapters.ConversionError, SpecError), match=rf"{layer.raw_attribute(name)} was changed.*TTcompile"
    ):
        tt.convert(nn.Sequential(layer), to=to, sample=xs, time_dim=0)
    layer.TTcompile()
    if to == "tracetorch":
        assert tt.convert(nn.Sequential(layer), to=to, sample=xs, time_dim=0).report[0].forward == "exact"
