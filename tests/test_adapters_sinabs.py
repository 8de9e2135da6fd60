"""`sinabs.layers.LIF` 3.1.3: every option is read and computed bit for bit; what cannot be read is refused by name."""

import itertools

import pytest
import sinabs.layers as sl
import torch
from sinabs import activation
from torch import nn

import tracetorch as tt
from tests.adapter_checks import assert_refused, bits, refused_in_a_network
from tests.sinabs_layers import RESETS, SPIKES, B, N, T, lif, per_neuron, run, stimulus
from tracetorch import adapters
from tracetorch.core.spec import SpecError
from tracetorch.functional.surrogates import Surrogate

SURROGATES = {
    "SingleExponential": (activation.SingleExponential(0.3, 2.0), {"grad_width": 0.3, "grad_scale": 2.0}),
    "Heaviside": (activation.Heaviside(window=0.5), {"window": 0.5}),
    "Gaussian": (activation.Gaussian(0.1, 0.4, 1.5), {"mu": 0.1, "sigma": 0.4, "grad_scale": 1.5}),
    "MultiGaussian": (
        activation.MultiGaussian(0.1, 0.4, 0.2, 5, 1.5),
        {"mu": 0.1, "sigma": 0.4, "h": 0.2, "s": 5.0, "grad_scale": 1.5},
    ),
    "PeriodicExponential": (activation.PeriodicExponential(0.4, 1.5), {"grad_width": 0.4, "grad_scale": 1.5}),
}
NAMES = {
    "SingleExponential": "single_exponential",
    "Heaviside": "heaviside_window",
    "Gaussian": "gaussian",
    "MultiGaussian": "multi_gaussian",
    "PeriodicExponential": "periodic_exponential",
}

NATIVE = {"x": "x", "spike_threshold": "threshold", "min_v_mem": "min_v_mem"}
NATIVE |= {"tau_mem": "mem_decay", "tau_syn": "syn_decay", "alpha_mem": "mem_decay", "alpha_syn": "syn_decay"}


def assert_same_gradient(mine, theirs, exact):
    """Bit for bit but for the sign of zeros. sinabs applies exp(-1/tau) once a call, a step layer once a step, so that
    the sum over time is taken behind it: not the same bits, as sums are `rounding`."""
    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    if exact:
        assert bits(mine + 0.0) == bits(theirs + 0.0)
    else:
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def assert_bit_identical(layer, xs=None):
    periodic = isinstance(layer.surrogate_grad_fn, activation.PeriodicExponential)  # our z + threshold is not v
    xs = stimulus(layer) if xs is None else xs
    native = tt.snn.SpecNeuron(adapters.spec(layer))
    theirs, states, grads = run(layer, xs)
    mine, own_states, own = run(native, xs)
    fired = int((theirs != 0).sum())
    assert fired > 0.02 * theirs.numel(), "nothing fired: a trace without spikes proves nothing"
    assert bits(mine) == bits(theirs)
    assert {n: bits(s) for n, s in own_states.items()} == {n: bits(s) for n, s in states.items()}
    assert {NATIVE[name] for name in grads} == set(own)
    for name, gradient in grads.items():
        assert_same_gradient(own[NATIVE[name]], gradient, not periodic and not name.startswith("tau"))
    return theirs, states, grads


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("spike", SPIKES)
def test_every_combination_of_options_is_read(spike, reset):
    spike_fn, count, limit = SPIKES[spike]
    reset_fn, fields, extra = RESETS[reset]
    for norm, tau_syn, low, alphas, tau, threshold in itertools.product(
        (True, False),
        (None, 4.0, per_neuron(2, 9, 5)),
        (None, -0.3),
        (True, False),
        (5.0, per_neuron(2, 12, 6)),
        (torch.tensor(1.5), per_neuron(0.5, 1.5, 7)),
    ):
        layer = lif(
            tau_mem=tau,
            tau_syn=tau_syn,
            spike_threshold=threshold,
            spike_fn=spike_fn,
            reset_fn=reset_fn,
            norm_input=norm,
            min_v_mem=low,
            train_alphas=alphas,
        )
        spec = adapters.spec(layer)
        assert (spec.form, spec.output, spec.comparison) == ("sinabs.LIF", "spikes", ">=")
        assert (spec.spike_count, spec.max_spikes) == (count, limit)
        assert (spec.reset_timing, spec.threshold_gradient) == ("same_step", False)
        assert {name: getattr(spec, name) for name in fields} == fields
        assert spec.input_gain == ("one_minus_decay" if norm else "one")
        assert spec.synapse == ("none" if tau_syn is None else "add_then_decay")
        assert spec.clamp == ("none" if low is None else "after_reset")
        assert spec.surrogate == Surrogate("single_exponential")
        kind = "alpha" if alphas else "tau"
        expected = {"mem_decay": getattr(layer, f"{kind}_mem"), "threshold": layer.spike_threshold}
        expected |= {} if tau_syn is None else {"syn_decay": getattr(layer, f"{kind}_syn")}
        expected |= {} if low is None else {"min_v_mem": layer.min_v_mem}
        expected |= {} if extra is None else {extra[0]: extra[1]}
        assert set(spec.parameters) == set(expected)
        for name, tensor in expected.items():
            parameter = spec.parameters[name]
            assert bits(torch.from_numpy(parameter.value.copy())) == bits(tensor), name
            assert parameter.learnable == tensor.requires_grad
            assert parameter.raw == ("exp_tau" if name.endswith("_decay") and not alphas else "value")
        assert tt.NeuronSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("name", SURROGATES)
def test_every_stock_surrogate_is_read(name):
    function, parameters = SURROGATES[name]
    assert adapters.spec(lif(surrogate_grad_fn=function)).surrogate == Surrogate(NAMES[name], parameters)


def test_trainability_is_read_from_the_layer_as_it_is():
    layer = lif(tau_syn=3.0)
    layer.tau_mem.requires_grad_(False)
    layer.spike_threshold.requires_grad_(True)
    learnable = {name: p.learnable for name, p in adapters.spec(layer).parameters.items()}
    assert learnable == {"mem_decay": False, "syn_decay": True, "threshold": True}


def test_a_layer_without_spikes_is_read_as_a_membrane():
    spec = adapters.spec(lif(spike_fn=None))
    assert (spec.output, spec.spike_count, spec.reset, spec.surrogate) == ("membrane", "none", "none", None)
    assert "threshold" not in spec.parameters
    leaky = adapters.build(spec, "snntorch")
    xs = torch.rand(T, B, N, generator=torch.Generator().manual_seed(4))
    expected = adapters.build(spec, "sinabs")(xs.transpose(0, 1)).transpose(0, 1)
    assert bits(torch.stack([leaky(x) for x in xs])) == bits(expected)
    with pytest.raises(adapters.ConversionError, match="output='membrane'"):
        adapters.build(spec, "snntorch", stock=True)


@pytest.mark.parametrize(
    ("reset_fn", "value"),
    [
        (activation.MembraneSubtract(0.7), ("reset_amount", 0.7)),
        (activation.MembraneReset(0.25), ("reset_value", 0.25)),
        (activation.MembraneReset(), ("reset_value", 0.0)),
    ],
)
def test_integers_are_read_as_floats_and_do_not_truncate_the_reset(reset_fn, value):
    """`LIF(spike_threshold=1)` holds an integer tensor; sinabs computes with it as with 1.0."""
    spec = adapters.spec(sl.LIF(5.0, spike_threshold=1, min_v_mem=-1, reset_fn=reset_fn))
    read = {name: p.value for name, p in spec.parameters.items()}
    assert {v.dtype.name for v in read.values()} == {"float32"}
    assert (read["threshold"], read["min_v_mem"]) == (1, -1)
    assert read[value[0]] == torch.tensor(value[1]).numpy()


# ---- refusals --------------------------------------------------------------------------------------------------------


class Child(sl.LIF):
    """A subclass may compute anything."""


class OwnReset(activation.MembraneSubtract):
    """A subclass of a reset may do anything."""


class OwnSpike(activation.SingleSpike):
    """Likewise."""


REFUSED = {
    "spike_fn": (lambda: lif(spike_fn=OwnSpike), ["spike_fn=", "OwnSpike", "SingleSpike, MultiSpike and MaxSpike"]),
    "reset_fn": (lambda: lif(reset_fn=OwnReset()), ["reset_fn=", "OwnReset", "MembraneSubtract and MembraneReset"]),
    "a plain function as reset": (lambda: lif(reset_fn=lambda s, state, t: state), ["reset_fn=", "lambda"]),
    "a spike_fn of an IAF": (lambda: sl.IAF(spike_fn=OwnSpike), ["spike_fn=", "OwnSpike", "tt.fuse"]),
    "a reset_fn of an ALIF": (
        lambda: sl.ALIF(tau_mem=5.0, tau_adapt=5.0, reset_fn=OwnReset()),
        ["reset_fn=", "OwnReset", "tt.fuse"],
    ),
    "subclass": (lambda: Child(5.0), ["Child", "only LIF"]),
    "infinite tau": (lambda: lif(tau_mem=float("inf")), ["tau_mem", "not finite"]),
    "half precision": (lambda: lif().half(), ["tau_mem", "float16", "float32 or float64"]),
}


@pytest.mark.parametrize("cls", [sl.LIFRecurrent, sl.ALIFRecurrent, sl.IAFRecurrent])
def test_a_recurrent_layer_has_no_step_of_its_own(cls):
    taus = {"tau_mem": 5.0} if cls is not sl.IAFRecurrent else {}
    taus |= {"tau_adapt": 5.0} if cls is sl.ALIFRecurrent else {}
    words = (cls.__name__, "only LIF, IAF, ExpLeak and ALIF", "rec_connect", "tt.convert")
    assert_refused(cls(rec_connect=nn.Linear(N, N), **taus), words)


def test_a_surrogate_that_is_no_callable_is_refused():
    with pytest.raises(SpecError, match="surrogate_grad_fn=3"):
        adapters.spec(lif(surrogate_grad_fn=3))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name):
    make, words = REFUSED[name]
    assert_refused(make(), words)


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_with_it_is_refused_with_layer_field_value_and_remedy(name):
    make, words = REFUSED[name]
    error = refused_in_a_network(make(), N, to="snntorch", sample=torch.rand(B, 5, 4))
    for word in words:
        assert word in str(error)


# ---- the native layer is bit-identical -------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("spike", ["single", "multi", "max2"])
def test_spec_neuron_is_bit_identical(spike, reset):
    choices = itertools.product((True, False), (None, 4.0), (None, -0.05), (True, False))
    for k, (norm, tau_syn, low, alphas) in enumerate(choices):
        layer = lif(
            tau_mem=per_neuron(2, 12, 6) if k % 3 else 5.0,
            tau_syn=tau_syn,
            spike_threshold=per_neuron(0.5, 1.5, 7) if k % 2 else torch.tensor(1.0),
            spike_fn=SPIKES[spike][0],
            reset_fn=RESETS[reset][0],
            norm_input=norm,
            min_v_mem=low,
            train_alphas=alphas,
        )
        layer.spike_threshold.requires_grad_(k % 4 < 2)
        if low is not None:
            layer.min_v_mem.requires_grad_(k % 8 < 4)
        spikes, states, _ = assert_bit_identical(layer)
        if spike != "single":
            assert spikes.max() > 1, "no step with several spikes"
        if low is not None:
            assert (states["v_mem"] <= low + 1e-6).any(), "never clamped"


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("spike", ["single", "multi", "max2"])
def test_spec_neuron_is_bit_identical_for_every_surrogate(name, spike):
    layer = lif(
        surrogate_grad_fn=SURROGATES[name][0], spike_fn=SPIKES[spike][0], spike_threshold=per_neuron(0.5, 1.5, 7)
    )
    layer.spike_threshold.requires_grad_()
    _, _, grads = assert_bit_identical(layer)
    assert all(gradient.abs().max() > 0 for gradient in grads.values())


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("spike", ["single", "multi"])
def test_spec_neuron_is_bit_identical_on_exact_ties(spike, reset):
    """Inputs in eighths and alpha = 1/2: the membrane meets the threshold exactly, where > and >= differ."""
    layer = lif(train_alphas=True, norm_input=False, spike_fn=SPIKES[spike][0], reset_fn=RESETS[reset][0])
    with torch.no_grad():
        layer.alpha_mem.fill_(0.5)
    xs = torch.randint(-4, 12, (64, T, N), generator=torch.Generator().manual_seed(5)) / 8.0
    spikes, states, _ = assert_bit_identical(layer, xs)
    if "reset" in reset or reset == "subtract":
        v = states["v_mem"]
        before = torch.cat([torch.zeros_like(v[:, :1]), v[:, :-1]], 1) * 0.5 + xs
        assert (before == 1).sum() > 20 or reset == "reset 0.1"
        assert (spikes[before == 1] == 1).all()


def test_spec_neuron_is_bit_identical_in_float64_on_images_and_without_spikes():
    assert_bit_identical(lif(tau_syn=4.0).double(), stimulus(lif(tau_syn=4.0)).double())
    images = lif(tau_mem=torch.rand(3, 1, 1) * 9 + 2)
    assert_bit_identical(images, stimulus(images, (2, T, 3, 4, N)))
    assert_bit_identical(lif(spike_fn=None, tau_syn=4.0, min_v_mem=-0.2))


@pytest.mark.parametrize("alpha", [1.3, 1.0, 0.0, -0.2])
def test_an_alpha_outside_its_range_is_not_clamped(alpha):
    """sinabs trains alpha without bounds."""
    layer = lif(train_alphas=True, norm_input=False)
    with torch.no_grad():
        layer.alpha_mem.fill_(alpha)
    _, _, grads = assert_bit_identical(layer)
    assert grads["alpha_mem"] != 0
