"""The native layer of a spec is the oracle, whatever the choices; what the forms cannot compute is refused."""

import numpy as np
import pytest
import torch

import tracetorch as tt
from tests import naive
from tests.oracle_cases import BETAS, CASES, THETAS, assert_same, case_name, case_spec, lib_spec, ran, stimulus
from tracetorch import oracle
from tracetorch.core.raw import from_raw

# The form resets to 0, or adds a value.
COMPUTED = [case for case in CASES if not (case[1][0] == "value" and np.any(case[1][1]))]


@pytest.mark.parametrize("case", COMPUTED, ids=case_name)
def test_the_native_layer_of_a_spec(case):
    """Outputs, states and every gradient of `SpecNeuron` in float64, for each combination that the form accepts."""
    xs = stimulus(21, (40, 2, 3), mean=0.6, deviation=3.0 if case[-1]["norm_input"] else 1.2)
    compare_native(case_spec(case), xs)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_the_native_layer_of_a_leaky_spec(reset, delay):
    compare_native(naive.leaky_spec(BETAS, THETAS, np.array([0.3, 1.0, 2.0]), reset, delay), stimulus(22))


@pytest.mark.parametrize(
    "spec", [naive.leaky_spec(0.9, 1.0, reset="zero"), naive.lif_spec(0.9, 1.0, reset=("value", 0.0))]
)
def test_a_reset_value_that_the_form_never_reads_cannot_be_learned(spec):
    """The form resets to 0: a trainable `reset_value` would be accepted and left out of every equation."""
    learned = naive.parameter(0.0, learnable=True)
    with pytest.raises(tt.SpecError, match="reset_value"):
        tt.snn.SpecNeuron(spec.replace(parameters={**spec.parameters, "reset_value": learned}))


def test_a_membrane_stopped_gradient_is_refused_by_the_forms():
    """No form computes it; to take it for "attached" would be silent."""
    with pytest.raises(tt.SpecError, match="membrane_stopped"):
        tt.snn.SpecNeuron(naive.lif_spec(0.9, 1.0, reset_gradient="membrane_stopped"))


@pytest.mark.parametrize("raw", ["exp_tau", "value"])
def test_a_raw_form_that_is_not_computed_is_refused_by_the_forms(raw):
    """When the layer is made, as `SpecNeuron` promises, and not in its first step."""
    spec = naive.lif_spec(0.9, 1.0, ("single", None), raw=raw)
    with pytest.raises(tt.SpecError, match=raw):
        tt.snn.SpecNeuron(spec.replace(form="spikingjelly.LIF"))


def test_a_raw_form_that_counts_time_needs_a_dt():
    for name in ("exp_dt_tau", "one_minus_dt_rate"):
        with pytest.raises(ValueError, match=f"dt=None.*{name}"):
            from_raw(name, torch.ones(1))


@pytest.mark.parametrize("missing", ["spike_scale", "bias"])
def test_an_optional_parameter_left_out_has_its_neutral_value(missing):
    """A spec without `spike_scale` or `bias` is valid: they are 1 and 0."""
    spec = naive.leaky_spec(0.9, 1.0) if missing == "spike_scale" else lib_spec(0.9, 1.0, 0.0)
    spec = spec.replace(parameters={n: p for n, p in spec.parameters.items() if n != missing})
    xs = stimulus(24)
    layer = tt.snn.SpecNeuron(spec)
    np.testing.assert_array_equal(layer.unroll(torch.tensor(xs)).detach().numpy(), ran(spec, xs)[0])


def test_the_native_layer_of_a_lib_spec():
    compare_native(lib_spec([0.5, 1.5, 3.0], [0.1, 0.6, 1.2], [0.2, 0.0, -0.2], ("sigmoid", "softplus")), stimulus(23))


def compare_native(spec, xs):
    if spec.reset == "value":  # the form resets to 0 and never reads it
        fixed = naive.parameter(spec.parameters["reset_value"].value)
        spec = spec.replace(parameters={**spec.parameters, "reset_value": fixed})
    layer = tt.snn.SpecNeuron(spec)
    x = torch.tensor(xs, requires_grad=True)
    outputs, states = layer.trace(x)
    weights = np.random.default_rng(5).normal(size=xs.shape)
    (outputs * torch.tensor(weights)).sum().backward()
    eq_outputs, v, i = ran(spec, xs)
    np.testing.assert_array_equal(outputs.detach().numpy(), eq_outputs)
    assert_same(states["v_mem"].detach().numpy(), v)
    if "i_syn" in states:
        assert_same(states["i_syn"].detach().numpy(), i)
    recording = oracle.Recording(
        xs, outputs.detach().numpy().astype(np.float64), {n: s.detach().numpy() for n, s in states.items()}, spec
    )
    found = oracle.gradients(spec, recording, weights)
    assert_same(x.grad.numpy(), found["x"], 1e-6)
    for name, parameter in layer.named_parameters():
        gradient = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        assert_same(gradient, found[name], 1e-6)
