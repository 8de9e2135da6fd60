"""`snntorch.Leaky` 1.0.0: every option is read and computed bit for bit; what cannot be read is refused by name."""

import itertools

import pytest
import snntorch as snn
import torch
from snntorch import surrogate as stock
from snntorch.functional import quant
from torch import nn

import tracetorch as tt
from tests.adapter_checks import assert_refused, bits, refused_in_a_network
from tests.snntorch_layers import RESETS, B, N, T, assert_bit_identical, leaky, per_neuron, stimulus
from tracetorch import adapters
from tracetorch.core.spec import SpecError
from tracetorch.functional.surrogates import Surrogate

SURROGATES = {
    "default": ({}, Surrogate("atan", {"alpha": 2.0})),
    "atan": ({"spike_grad": stock.atan(alpha=3.0)}, Surrogate("atan", {"alpha": 3.0})),
    "fast_sigmoid": ({"spike_grad": stock.fast_sigmoid(slope=10)}, Surrogate("fast_sigmoid", {"slope": 10.0})),
    "sigmoid": ({"spike_grad": stock.sigmoid(slope=5)}, Surrogate("sigmoid", {"slope": 5.0})),
    "straight_through": ({"spike_grad": stock.straight_through_estimator()}, Surrogate("straight_through")),
    "triangular": ({"spike_grad": stock.triangular(threshold=0.5)}, Surrogate("triangular", {"scale": 0.5})),
    "heaviside": ({"spike_grad": stock.heaviside()}, Surrogate("heaviside")),
    "spike_rate_escape": (
        {"spike_grad": stock.spike_rate_escape(beta=2, slope=3)},
        Surrogate("spike_rate_escape", {"beta": 2.0, "slope": 3.0}),
    ),
    "SFS": (
        {"spike_grad": stock.SFS(slope=4, B=0.25)},
        Surrogate("sparse_fast_sigmoid", {"slope": 4.0, "cutoff": 0.25}),
    ),
    "disabled": ({"surrogate_disable": True}, Surrogate("zero")),
}


def kinds(name, low, high, scalar, seed):
    """Scalar, tensor scalar, one per neuron; learnable or not."""
    for value in (scalar, torch.tensor(scalar), per_neuron(low, high, seed)):
        for learnable in (False, True):
            yield {name: value, f"learn_{name}": learnable}


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_every_combination_of_options_is_read():
    count = 0
    for (reset, delay), beta, threshold, factor in itertools.product(
        RESETS,
        kinds("beta", 0.3, 0.95, 0.7, 2),
        kinds("threshold", 0.5, 1.5, 1.25, 3),
        kinds("graded_spikes_factor", 0.5, 1.5, 0.3, 4),
    ):
        layer = leaky(reset_mechanism=reset, reset_delay=delay, **beta, **threshold, **factor)
        spec = adapters.spec(layer)
        kind, timing, gradient = RESETS[reset, delay]
        assert spec.form == "snntorch.Leaky"
        assert (spec.output, spec.spike_count, spec.comparison, spec.clamp) == ("spikes", "single", ">", "none")
        assert (spec.synapse, spec.input_gain, spec.decay) == ("none", "one", "geometric")
        assert spec.threshold_gradient
        assert spec.reset == kind
        assert timing in (None, spec.reset_timing)
        assert gradient in (None, spec.reset_gradient)
        assert spec.surrogate == Surrogate("atan", {"alpha": 2.0})
        names = {"mem_decay": "beta", "threshold": "threshold", "spike_scale": "graded_spikes_factor"}
        for name, own in names.items():
            parameter = spec.parameters[name]
            assert parameter.value.tobytes() == getattr(layer, own).detach().numpy().tobytes()
            assert parameter.value.shape == tuple(getattr(layer, own).shape)
            assert parameter.learnable == getattr(layer, own).requires_grad
            assert parameter.raw == ("clamped" if own == "beta" else "value")
        assert tt.NeuronSpec.from_json(spec.to_json()) == spec
        count += 1
    assert count == 6 * 6**3


@pytest.mark.parametrize("name", SURROGATES)
def test_every_stock_surrogate_is_read(name):
    options, expected = SURROGATES[name]
    assert adapters.spec(leaky(**options)).surrogate == expected


def test_an_integer_threshold_is_read_as_a_float():
    spec = adapters.spec(leaky(threshold=1, graded_spikes_factor=2))
    assert spec.parameters["threshold"].value.dtype == "float32"
    assert (spec.parameters["threshold"].value, spec.parameters["spike_scale"].value) == (1, 2)


def test_reading_changes_nothing():
    layer = leaky(learn_beta=True, threshold=per_neuron(0.5, 1.5, 3))
    layer(torch.rand(B, N))
    before = {name: bits(t) for name, t in [*layer.named_parameters(), *layer.named_buffers()]}
    mem = layer.mem
    adapters.spec(layer)
    assert layer.mem is mem
    assert {name: bits(t) for name, t in [*layer.named_parameters(), *layer.named_buffers()]} == before


# ---- refusals --------------------------------------------------------------------------------------------------------


class Child(snn.Leaky):
    """A subclass may compute anything."""


def later(attribute, value):
    layer = leaky()
    setattr(layer, attribute, value)
    return layer


# what is refused, and what its message must say: field and value, and a remedy
REFUSED = {
    "a state_quant of one's own": (
        lambda: leaky(state_quant=lambda mem: mem.round()),
        ["state_quant=", "lambda", "snntorch.functional.quant.state_quant", "tt.fuse"],
    ),
    "levels of another dtype": (
        lambda: leaky(state_quant=quant.state_quant(num_bits=4)).double(),
        ["state_quant", "float32", "float64", "torch.set_default_dtype"],
    ),
    "a lambda as surrogate": (lambda: leaky(spike_grad=lambda z: (z > 0).float()), ["spike_grad=", "lambda", "atan"]),
    "SSO": (lambda: leaky(spike_grad=stock.SSO()), ["spike_grad=", "SSO"]),
    "LSO": (lambda: leaky(spike_grad=stock.LSO()), ["spike_grad=", "LSO"]),
    "an autograd function": (lambda: leaky(spike_grad=stock.FastSigmoid.apply), ["spike_grad="]),
    "a module as surrogate": (lambda: leaky(spike_grad=nn.Sigmoid()), ["spike_grad=Sigmoid"]),
    "surrogate assigned later": (lambda: later("spike_grad", torch.relu), ["spike_grad=", "relu"]),
    "subclass": (lambda: Child(0.9), ["Child", "only Leaky"]),
    "reset assigned later": (
        lambda: later("reset_mechanism", "zero"),
        ["reset_mechanism='zero'", "after construction", "construct the layer anew"],
    ),
    "Lapicque that learns": (
        lambda: snn.Lapicque(beta=0.8, learn_beta=True),
        ["learn_beta=True", "second backward", "learn_beta=False"],
    ),
    "Synaptic with a lambda": (
        lambda: snn.Synaptic(alpha=0.9, beta=0.8, spike_grad=lambda z: (z > 0).float()),
        ["spike_grad=", "lambda", "tt.fuse"],
    ),
    "infinite threshold": (lambda: leaky(threshold=float("inf")), ["threshold", "not finite"]),
    "half precision": (lambda: leaky().half(), ["beta", "float16", "float32 or float64"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name):
    make, words = REFUSED[name]
    assert_refused(make(), words)


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_with_it_is_refused_with_layer_field_value_and_remedy(name):
    make, words = REFUSED[name]
    error = refused_in_a_network(make(), N, to="sinabs", sample=torch.rand(5, B, 4), time_dim=0)
    for word in words:
        assert all(part.strip("'") in str(error) for part in word.split("="))


def test_a_lapicque_that_learns_its_beta_cannot_be_trained_in_snntorch_itself():
    """Why it is refused: its C is computed once, of a graph that the first backward pass frees."""
    layer = snn.Lapicque(beta=0.8, learn_beta=True, init_hidden=True)
    layer(torch.rand(B, N)).sum().backward()
    layer.reset_mem()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        layer(torch.rand(B, N)).sum().backward()


# what is refused as a layer; a network may hold it
REFUSED_LAYERS = {
    "RLeaky": (lambda: snn.RLeaky(beta=0.9, linear_features=4), ["RLeaky", "only Leaky", "matrix", "tt.convert"]),
    "RSynaptic": (
        lambda: snn.RSynaptic(alpha=0.9, beta=0.8, linear_features=4),
        ["RSynaptic", "only Leaky", "matrix", "tt.convert"],
    ),
    "LeakyParallel": (
        lambda: snn.LeakyParallel(input_size=4, hidden_size=4, beta=0.9),
        ["LeakyParallel", "nn.RNN", "parts"],
    ),
    "LinearLeaky": (lambda: snn.LinearLeaky(0.9, 4, 3), ["LinearLeaky", "nn.Linear", "parts"]),
    "a rounded StateLeaky": (
        lambda: snn.StateLeaky(0.9, N, state_quant=quant.state_quant(num_bits=4)),
        ["state_quant", "StateLeaky", "state_quant=False"],
    ),
    "a truncated StateLeaky": (
        lambda: snn.StateLeaky(0.9, N, kernel_truncation_steps=5),
        ["kernel_truncation_steps=5", "kernel_truncation_steps=None"],
    ),
    "a StateLeaky with a learned factor": (
        lambda: snn.StateLeaky(0.9, N, graded_spikes_factor=0.5, learn_graded_spikes_factor=True),
        ["learn_graded_spikes_factor=True", "twice", "learn_graded_spikes_factor=False"],
    ),
}


@pytest.mark.parametrize("name", REFUSED_LAYERS)
def test_a_layer_that_has_no_step_of_its_own_is_refused_by_name(name, monkeypatch):
    # Quirk of snntorch 1.0.0: a DeltaLeaky's membrane is None, over which `utils.reset` of any other network stumbles.
    monkeypatch.setattr(snn.SpikingNeuron, "instances", [])
    make, words = REFUSED_LAYERS[name]
    assert_refused(make(), words)


@pytest.mark.parametrize("thing", [nn.Linear(3, 3), nn.RNN(3, 3)])
def test_what_is_no_neuron_layer_is_refused(thing):
    with pytest.raises(SpecError, match=f"{type(thing).__name__} is not a neuron layer"):
        adapters.spec(thing)


@pytest.mark.parametrize("disabled", [False, True])
def test_surrogate_disable_assigned_after_construction_changes_nothing_in_snntorch(disabled):
    """snnTorch 1.0.0 looks at `surrogate_disable` only when it constructs the layer."""
    layer = leaky(surrogate_disable=disabled)
    layer.surrogate_disable = not disabled
    assert adapters.spec(layer).surrogate == (Surrogate("zero") if disabled else Surrogate("atan"))


# ---- the native layer is bit-identical -------------------------------------------------------------------------------


@pytest.mark.parametrize(("reset", "delay"), RESETS)
def test_spec_neuron_is_bit_identical_for_every_kind_of_parameter(reset, delay):
    betas = [{}, {"learn_beta": True}, {"beta": per_neuron(0.3, 0.95, 2), "learn_beta": True}]
    thresholds = [{}, {"threshold": 1.25, "learn_threshold": True}]
    thresholds.append({"threshold": per_neuron(0.5, 1.5, 3), "learn_threshold": True})
    factors = [{}, {"graded_spikes_factor": 0.3}]
    factors.append({"graded_spikes_factor": per_neuron(0.5, 1.5, 4), "learn_graded_spikes_factor": True})
    for i, j in itertools.product(range(3), range(3)):
        options = betas[i] | thresholds[j] | factors[(i + j) % 3]
        assert_bit_identical(leaky(reset_mechanism=reset, reset_delay=delay, **options), stimulus(2.0))


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize(("reset", "delay"), RESETS)
def test_spec_neuron_is_bit_identical_for_every_surrogate(name, reset, delay):
    layer = leaky(
        reset_mechanism=reset, reset_delay=delay, learn_beta=True, learn_threshold=True, **SURROGATES[name][0]
    )
    _, mem, grads = assert_bit_identical(layer, stimulus(2.0))
    if name != "disabled":
        assert grads["beta"].abs() > 0
        assert grads["x"].abs().max() > 0
    if reset != "none" and not delay:
        assert mem.max() < 4


@pytest.mark.parametrize(("reset", "delay"), RESETS)
def test_spec_neuron_is_bit_identical_on_exact_ties(reset, delay):
    """Inputs in eighths and beta = 1/2: the membrane meets the threshold exactly, where > and >= differ."""
    xs = torch.randint(-4, 12, (T, 64, N), generator=torch.Generator().manual_seed(5)) / 8.0
    layer = leaky(beta=0.5, threshold=1.0, reset_mechanism=reset, reset_delay=delay, learn_threshold=True)
    spikes, mem, _ = assert_bit_identical(layer, xs)
    ties = mem == 1.0
    assert ties.sum() > 20
    assert (spikes[ties] == 0).all() or not delay


def test_spec_neuron_is_bit_identical_in_float64_and_on_images():
    assert_bit_identical(leaky(learn_beta=True).double(), stimulus(2.0).double())
    shape = (T, 2, 3, 4, N)
    assert_bit_identical(leaky(beta=torch.rand(3, 1, 1), learn_beta=True), stimulus(2.0, shape))


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.3, -0.2])
def test_a_beta_at_and_outside_the_ends_is_clamped_with_its_gradient(beta):
    layer = leaky(beta=beta, learn_beta=True)
    _, _, grads = assert_bit_identical(layer, stimulus(2.0))
    assert (grads["beta"] != 0).item() == (0 <= beta <= 1)
