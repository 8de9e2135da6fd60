"""snnTorch's layers in float64, whose spikes are float32: native layers have the same bits, by a kernel too."""

import itertools
import warnings

import pytest
import snntorch as snn
import torch
from torch import nn

import tracetorch as tt
from tracetorch import adapters
from tracetorch.core.spec import NeuronSpec, SpecError

T, B, N = 40, 3, 5


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def inputs():
    return 0.3 + 0.8 * torch.randn(T, B, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# 0.7 and 0.546 are no float32: beside float32 spikes torch rounds a number without dimensions to float32.
SCALES = {"one": double(1.0), "scalar": double(0.546), "per neuron": double([0.546] * N)}
LAYERS = {
    "Leaky": lambda mechanism, delay: snn.Leaky(
        double(0.28), threshold=double(0.7), reset_mechanism=mechanism, reset_delay=delay, init_hidden=True
    ),
    "Synaptic": lambda mechanism, delay: snn.Synaptic(
        double(0.8),
        double(0.28),
        threshold=double(0.7),
        reset_mechanism=mechanism,
        reset_delay=delay,
        init_hidden=True,
    ),
    "Lapicque": lambda mechanism, delay: snn.Lapicque(
        double(0.8), threshold=double(0.7), reset_mechanism=mechanism, init_hidden=True
    ),
    "Alpha": lambda mechanism, delay: snn.Alpha(
        double(0.8), double(0.28), threshold=double(0.7), reset_mechanism=mechanism, init_hidden=True
    ),
}
RESETS = tuple(itertools.product(("subtract", "zero"), (True, False)))
CASES = [
    *(("Leaky", *reset, scale) for reset, scale in itertools.product(RESETS, SCALES)),
    *(("Synaptic", *reset, "scalar") for reset in RESETS),
    *(("Lapicque", mechanism, True, "scalar") for mechanism in ("subtract", "zero")),
    *(("Alpha", mechanism, True, "scalar") for mechanism in ("subtract", "zero")),
]


@pytest.mark.parametrize(("name", "mechanism", "delay", "scale"), CASES)
def test_outputs_and_membranes_have_the_source_s_bits_and_dtype(name, mechanism, delay, scale):
    layer = LAYERS[name](mechanism, delay)
    layer.graded_spikes_factor = SCALES[scale]
    native = adapters.build(adapters.spec(layer), "tracetorch")
    expected = torch.stack([layer(x) for x in inputs()])
    assert expected.any()
    for backend in ("eager", "cpu"):
        native.reset_states()
        with tt.backend(backend):
            found = native.unroll(inputs())
        assert found.dtype is expected.dtype, backend
        assert torch.equal(found, expected), backend
        assert torch.equal(native.v_mem, layer.mem), backend


def test_a_lapicque_of_python_numbers_in_float64_is_built_to_float64_s_roundings():
    """Its R and C are float32, the layer is not."""
    layer = snn.Lapicque(R=2.0, C=1.5, threshold=double(1.0), init_hidden=True)
    result = tt.convert(nn.Sequential(layer), to="snntorch", sample=inputs(), time_dim=0)
    assert result.report[0].forward in ("exact", "rounding")
    assert (result.model[0].R.dtype, result.model[0].C.dtype) == (torch.float64, torch.float64)
    spec = adapters.spec(result.model[0])
    decay = adapters.spec(layer).parameters["mem_decay"].value
    assert abs(float(spec.parameters["mem_decay"].value) - float(decay)) < 1e-15


def test_a_winner_that_resets_in_its_own_step_is_saved(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Inhibition is an unstable feature")
        layer = snn.Synaptic(0.8, 0.5, reset_delay=False, inhibition=True, init_hidden=True)
    spec = adapters.spec(layer)
    tt.save(tmp_path / "winner.tt", adapters.build(spec, "tracetorch"))
    assert tt.load(tmp_path / "winner.tt").spec == spec


def test_a_spec_is_made_of_given_parameters_in_the_place_of_those_of_its_data():
    spec = adapters.spec(snn.Leaky(0.9))
    data = {**spec.to_dict(), "parameters": {}}
    assert NeuronSpec.from_dict(data, spec.parameters) == spec
    with pytest.raises(SpecError, match="'mem_decay' is missing"):
        NeuronSpec.from_dict(data)


def test_the_gradient_of_float32_spikes_is_no_fault_of_the_source():
    """snnTorch computes its spikes, and so their gradient, in float32, also where a float64 factor scales them."""
    layer = snn.Leaky(
        double(0.28),
        threshold=double(0.5),
        graded_spikes_factor=double([0.7] * N),
        learn_threshold=True,
        reset_mechanism="none",
        init_hidden=True,
    )
    result = tt.convert(nn.Sequential(layer), to="tracetorch", sample=inputs(), time_dim=0)
    assert result.verify(inputs(), grad=True).ok
    assert "please report" not in str(result.report)
