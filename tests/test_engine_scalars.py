"""Parameters of no dimension in a float64 step: torch does not widen float32 for them, nor may a kernel."""

import pytest
import sinabs.layers as sl
import torch

import tracetorch as tt
from tests.layer_cases import assert_bits
from tracetorch import adapters
from tracetorch.fused.executor import FuseWarning
from tracetorch.fused.graph import GraphError

F32, F64 = torch.float32, torch.float64
T, B, N = 40, 3, 5
WAYS = ("both", "float32 first", "float64 first")
COMPARED = {
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


def inputs():
    return 0.3 + 0.8 * torch.randn(T, B, N, generator=torch.Generator().manual_seed(0), dtype=F64)


class Neuron(tt.snn.Layer):
    """A membrane whose step is `body(x, v, threshold)`."""

    def __init__(self, body, threshold):
        super().__init__(N)
        self.body = body
        self.define_state("v")
        self.define_parameter("threshold", threshold, learnable=False)
        self.double()

    def step(self, x, v):
        return self.body(x, v, self.threshold)


def run(layer, backend, xs):
    layer.reset_states()
    with tt.backend(backend):
        return layer.unroll(xs), layer.v


def spiking(x, v, threshold):
    """Spikes of float32, times the threshold: rounded to float32 where it has no dimension."""
    v = 0.9 * v + x
    spikes = (v >= threshold).float()
    return spikes.to(v.dtype), v - spikes * threshold


def said(x, v, threshold):
    """The same with the rounding written out."""
    v = 0.9 * v + x
    spikes = (v >= threshold).float()
    return spikes.to(v.dtype), v - spikes * threshold.to(spikes.dtype)


def test_a_number_beside_float32_is_refused_and_stepped_as_torch_steps_it():
    layer = Neuron(spiking, torch.tensor(0.3, dtype=F64))
    expected, v = run(layer, "eager", inputs())
    assert expected.any()
    with pytest.raises(GraphError, match=r"because of threshold, of no dimension.*threshold\.to\("):
        run(layer, "cpu", inputs())
    with pytest.warns(FuseWarning, match="step by step"):
        found, found_v = run(layer, "auto", inputs())
    assert_bits(found, expected)
    assert_bits(found_v, v)


@pytest.mark.parametrize("body", [spiking, said])
def test_what_is_said_or_has_a_dimension_runs_as_one_kernel(body):
    threshold = torch.tensor(0.3, dtype=F64) if body is said else torch.full((N,), 0.3, dtype=F64)
    layer = Neuron(body, threshold)
    (expected, v), (found, found_v) = (run(layer, backend, inputs()) for backend in ("eager", "cpu"))
    assert expected.any()
    assert_bits(found, expected)
    assert_bits(found_v, v)


def test_a_threshold_that_loses_its_dimension_gets_another_kernel():
    layer = Neuron(spiking, torch.full((N,), 0.3, dtype=F64))
    run(layer, "cpu", inputs())
    layer.raw_threshold = torch.tensor(0.3, dtype=F64)
    with pytest.raises(GraphError, match="of no dimension"):
        run(layer, "cpu", inputs())


def test_a_number_within_a_float32_step_is_as_free_as_it_was():
    layer = Neuron(spiking, torch.tensor(0.3)).float()
    (expected, v), (found, found_v) = (run(layer, backend, inputs().float()) for backend in ("eager", "cpu"))
    assert_bits(found, expected)
    assert_bits(found_v, v)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", COMPARED)
def test_a_comparison_of_two_types_is_in_the_wider_one(name, way):
    """0.1 of float32 is more than 0.1 of float64."""
    ends = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=F64)

    def body(x, v, threshold):
        a, b = {"both": (v, v), "float32 first": (v.float(), v), "float64 first": (v, v.float())}[way]
        return COMPARED[name](a, b).to(x.dtype), x

    layer = Neuron(body, torch.tensor(1.0, dtype=F64))
    xs = ends.expand(T, B, N).contiguous()
    (expected, _), (found, _) = (run(layer, backend, xs) for backend in ("eager", "cpu"))
    assert_bits(found, expected)


def double(value):
    return torch.tensor(value, dtype=F64)


SINABS = {
    "LIF": lambda: sl.LIF(tau_mem=double(10.0), spike_threshold=double(0.3)),
    "LIF, several spikes": lambda: sl.LIF(tau_mem=double(10.0), spike_threshold=double(0.3), norm_input=False),
    "LIF with a synapse": lambda: sl.LIF(tau_mem=double(10.0), tau_syn=double(5.0), spike_threshold=double(0.3)),
    "LIF, bounded": lambda: sl.LIF(tau_mem=double(10.0), spike_threshold=double(0.3), min_v_mem=double(-0.1)),
    "IAF": lambda: sl.IAF(spike_threshold=double(0.3)),
    "IAF, single spikes": lambda: sl.IAF(
        spike_threshold=double(0.3), spike_fn=sinabs_single(), reset_fn=sinabs_reset(0.7)
    ),
    "ALIF": lambda: sl.ALIF(
        tau_mem=double(10.0), tau_adapt=double(7.0), adapt_scale=double(0.3), spike_threshold=double(0.3)
    ),
}


def sinabs_single():
    from sinabs.activation import SingleSpike

    return SingleSpike


def sinabs_reset(value):
    from sinabs.activation import MembraneReset

    return MembraneReset(reset_value=value)


@pytest.mark.parametrize("name", SINABS)
def test_a_native_layer_of_sinabs_s_form_has_its_own_bits_in_a_kernel(name):
    layer = adapters.build(adapters.spec(SINABS[name]().double()), "tracetorch")
    layer.reset_states()
    states = layer.state_names
    found = {}
    for backend in ("eager", "cpu"):
        layer.reset_states()
        with tt.backend(backend):
            found[backend] = (layer.unroll(inputs().abs()), *(getattr(layer, state) for state in states))
    assert found["eager"][0].any()
    for a, b in zip(*found.values(), strict=True):
        assert_bits(b, a)
