"""`sinabs.layers.LIF` 3.1.3: every option is read and computed bit for bit; what cannot be read is refused by name."""

import copy
import io
import itertools

import numpy as np
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from torch import nn

import tracetorch as tt
from tracetorch import adapters
from tracetorch.adapters import sinabs as ours
from tracetorch.adapters.base import Building, parameters
from tracetorch.adapters.registry import adapter, adapter_of
from tracetorch.core.spec import Parameter, SpecError
from tracetorch.functional.surrogates import Surrogate

T, B, N = 100, 3, 7


def bits(tensor):
    """Dtype, shape and bytes: NaN equals itself, -0.0 is not 0.0."""
    return str(tensor.dtype), list(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def per_neuron(low, high, seed):
    return torch.rand(N, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


# name -> (spike_fn, spike_count, max_spikes)
SPIKES = {
    "single": (activation.SingleSpike, "single", None),
    "multi": (activation.MultiSpike, "multiple", None),
    "max2": (activation.MaxSpike(2), "limited", 2),
    "max": (activation.MaxSpike(), "multiple", None),
}
# name -> (reset_fn, the fields that it sets, its parameter)
SUBTRACT = {"reset": "subtract", "reset_gradient": "attached"}
RESETS = {
    "subtract": (activation.MembraneSubtract(), {**SUBTRACT, "reset_amount": "threshold"}, None),
    "subtract 0.7": (
        activation.MembraneSubtract(0.7),
        {**SUBTRACT, "reset_amount": "value"},
        ("reset_amount", torch.tensor(0.7)),
    ),
    "subtract tensor": (
        activation.MembraneSubtract(per_neuron(0.4, 1.2, 8)),
        {**SUBTRACT, "reset_amount": "value"},
        ("reset_amount", per_neuron(0.4, 1.2, 8)),
    ),
    "reset": (
        activation.MembraneReset(),
        {"reset": "add_value", "reset_gradient": "detached"},
        ("reset_value", torch.tensor(0.0)),
    ),
    "reset 0.1": (
        activation.MembraneReset(0.1),
        {"reset": "add_value", "reset_gradient": "detached"},
        ("reset_value", torch.tensor(0.1)),
    ),
}
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


def lif(**options):
    """A layer that shares nothing with the tables above. sinabs's default threshold is one tensor for all layers."""
    values = {key: copy.deepcopy(value) for key, value in options.items()}
    return sl.LIF(**{"tau_mem": 5.0, "spike_threshold": torch.tensor(1.0), **values})


def stimulus(layer, shape=(B, T, N)):
    scale = 16.0 if layer.norm_input else 3.5
    scale = scale * 0.4 if layer.tau_syn_calculated is not None else scale
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 0.3) * scale


def run(layer, xs):
    """Outputs, states after every step [B, T, ...], gradients of input and parameters by name."""
    xs = xs.clone().requires_grad_()
    if isinstance(layer, sl.LIF):
        layer.reset_states()
        layer.record_states = True
        outputs = layer(xs)
        states = dict(layer.recordings)
        layer.record_states = False
    else:
        layer.reset_states()
        outputs, states = layer.trace(xs, 1)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(9), dtype=outputs.dtype)
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    wanted = [xs, *named.values()]
    found = torch.autograd.grad((outputs * weights).sum(), wanted, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return outputs, states, dict(zip(["x", *named], grads, strict=True))


NATIVE = {"x": "x", "spike_threshold": "threshold", "min_v_mem": "min_v_mem"}
NATIVE |= {"tau_mem": "mem_decay", "tau_syn": "syn_decay", "alpha_mem": "mem_decay", "alpha_syn": "syn_decay"}


def assert_same_gradient(mine, theirs, exact):
    """Bit for bit but for the sign of zeros. sinabs applies exp(-1/tau) once a call, a step layer once a step, so that
    the sum over time is taken behind it: not the same bits (DESIGN.md, Exactness: sums are `rounding`)."""
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
    with pytest.raises(SpecError) as caught:
        adapters.spec(cls(rec_connect=nn.Linear(N, N), **taus))
    for word in (cls.__name__, "only LIF, IAF, ExpLeak and ALIF", "rec_connect", "tt.convert"):
        assert word in str(caught.value)


def test_a_surrogate_that_is_no_callable_is_refused():
    with pytest.raises(SpecError, match="surrogate_grad_fn=3"):
        adapters.spec(lif(surrogate_grad_fn=3))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name):
    make, words = REFUSED[name]
    layer = make()
    with pytest.raises(SpecError) as caught:
        adapters.spec(layer)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_with_it_is_refused_with_layer_field_value_and_remedy(name):
    make, words = REFUSED[name]
    net = nn.Sequential(nn.Linear(4, N), make())
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.convert(net, to="snntorch", sample=torch.rand(B, 5, 4))
    assert caught.value.layer == "'1'"
    assert caught.value.field
    assert caught.value.remedy
    for word in [*words, "Remedy: "]:
        assert word in str(caught.value)


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


# ---- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("reset", RESETS)
def test_a_lif_built_from_the_spec_of_a_lif_is_stock_and_bit_identical(reset, stock):
    for spike, alphas in itertools.product(("single", "multi", "max2"), (True, False)):
        layer = lif(
            tau_mem=per_neuron(2, 12, 6),
            tau_syn=4.0,
            spike_fn=SPIKES[spike][0],
            reset_fn=RESETS[reset][0],
            surrogate_grad_fn=activation.Gaussian(0.0, 0.4),
            train_alphas=alphas,
            min_v_mem=-0.5,
        )
        spec = adapters.spec(layer)
        built = adapters.build(spec, "sinabs", stock=stock)
        assert type(built) is sl.LIF
        assert adapters.spec(built) == spec
        assert (built.norm_input, built.train_alphas) == (True, alphas)
        for own in (built.reset_fn, built.surrogate_grad_fn):
            assert type(own).__module__.startswith("sinabs.activation")
        assert type(built.spike_fn).__module__.startswith(("sinabs.activation", "builtins", "torch"))
        theirs, mine = run(layer, stimulus(layer)), run(built, stimulus(layer))
        assert bits(mine[0]) == bits(theirs[0])
        assert {n: bits(t) for n, t in {**mine[1], **mine[2]}.items()} == {
            n: bits(t) for n, t in {**theirs[1], **theirs[2]}.items()
        }


def snn_spec(**options):
    return adapters.spec(snn.Leaky(**{"beta": 0.9, **options}))


def test_the_default_reset_of_snntorch_becomes_a_live_threshold_over_alpha():
    layer = adapters.build(snn_spec(learn_beta=True, learn_threshold=True), "sinabs")
    assert isinstance(layer, sl.LIF)
    assert isinstance(layer.reset_fn, ours.Reset)
    assert layer.train_alphas
    assert not layer.norm_input
    spikes, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 3.0]])

    def subtracted():
        return (3.0 - layer.reset_fn(spikes, {"v_mem": v}, layer.spike_threshold)["v_mem"])[0, 0].item()

    assert subtracted() == pytest.approx(1 / 0.9, rel=1e-6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=2e-5)
    xs = torch.rand(4, 30, 2)
    for _ in range(3):
        layer.reset_states()
        optimizer.zero_grad()
        layer(xs).sum().backward()
        optimizer.step()
    alpha, threshold = layer.alpha_mem.item(), layer.spike_threshold.item()
    assert abs(alpha - 0.9) > 1e-3
    assert abs(threshold - 1) > 1e-3
    assert subtracted() == pytest.approx(threshold / alpha, rel=1e-6)


def test_stock_uses_only_sinabs_and_holds_the_reset_as_numbers():
    for reset, expected in (
        ("subtract", activation.MembraneSubtract),
        ("none", activation.MembraneSubtract),
        ("zero", activation.MembraneReset),
    ):
        layer = adapters.build(snn_spec(reset_mechanism=reset), "sinabs", stock=True)
        assert type(layer) is sl.LIF
        assert layer.spike_fn is activation.SingleSpike
        assert type(layer.reset_fn) is expected
        assert type(layer.surrogate_grad_fn) is activation.SingleExponential
        assert layer.spike_threshold == torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
        if reset == "subtract":
            assert layer.reset_fn.subtract_value == torch.tensor(1.0) / torch.tensor(0.9)


@pytest.mark.parametrize("options", [{"learn_beta": True}, {"learn_threshold": True}])
def test_stock_refuses_what_would_not_follow_training(options):
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(snn_spec(**options), "sinabs", stock=True)
    assert caught.value.field in ("reset_amount", "comparison")
    assert "stock=False" in caught.value.remedy


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"reset_delay": False}, "reset_timing"),
        ({"graded_spikes_factor": 0.3}, "spike_scale"),
        ({"graded_spikes_factor": 1.0, "learn_graded_spikes_factor": True}, "spike_scale"),
        ({"beta": 0.0}, "mem_decay"),
    ],
)
def test_what_a_lif_cannot_express_is_refused(options, field):
    for stock in (False, True):
        with pytest.raises(adapters.ConversionError) as caught:
            adapters.build(snn_spec(**options), "sinabs", stock=stock)
        assert caught.value.field == field
        assert caught.value.remedy


# ---- copies ----------------------------------------------------------------------------------------------------------


def by_deepcopy(layer):
    return copy.deepcopy(layer)


def by_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CUSTOM = {
    "subtract": {"learn_beta": True, "learn_threshold": True},
    "subtract, frozen": {},
    "subtract, only beta": {"learn_beta": True},
    "zero": {"learn_beta": True, "reset_mechanism": "zero"},
    "zero, attached": {"learn_beta": True, "reset_mechanism": "zero", "reset_delay": False},
    "none": {"learn_threshold": True, "reset_mechanism": "none"},
}


@pytest.mark.parametrize("name", CUSTOM)
@pytest.mark.parametrize("how", [by_deepcopy, by_file])
def test_copies_follow_the_copy_and_stay_frozen(how, name):
    """sinabs 3.1.3 copies by constructing anew: the copy shares `reset_fn` and thaws what was frozen."""
    layer = adapters.build(snn_spec(**CUSTOM[name]), "sinabs").eval()
    xs = torch.rand(B, T, N, generator=torch.Generator().manual_seed(1)) * 1.5 - 0.3
    before = run(layer, xs)
    layer.reset_states()  # a state that hangs on a graph comes back from a file as a leaf, which sinabs cannot zero
    twin = how(layer)
    assert type(twin) is type(layer)
    assert not twin.training
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in layer.named_parameters()
    }
    assert adapters.spec(twin) == adapters.spec(layer)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}
    got = run(twin, xs)
    assert bits(got[0]) == bits(before[0])
    assert {n: bits(g) for n, g in got[2].items()} == {n: bits(g) for n, g in before[2].items()}
    with torch.no_grad():
        twin.alpha_mem.fill_(0.6)
        twin.spike_threshold.fill_(0.8)
    fresh = adapters.build(adapters.spec(twin), "sinabs")
    changed, expected = run(twin, xs), run(fresh, xs)
    assert (changed[0] != before[0]).any()
    assert bits(changed[0]) == bits(expected[0])
    assert bits(changed[1]["v_mem"]) == bits(expected[1]["v_mem"])
    assert {n: bits(g) for n, g in changed[2].items()} == {n: bits(g) for n, g in expected[2].items()}
    again = run(layer, xs)
    assert bits(again[0]) == bits(before[0])
    assert bits(again[2]["x"]) == bits(before[2]["x"])


def test_a_copy_of_a_whole_converted_network_serves_itself():
    net = nn.Sequential(nn.Linear(4, N), snn.Leaky(0.9, init_hidden=True, learn_beta=True))
    model = adapters.convert(net, to="sinabs", sample=torch.rand(20, B, 4) * 3, time_dim=0).model
    twin = copy.deepcopy(model)
    assert twin[1].reset_fn.layer is twin[1]
    assert model[1].reset_fn.layer is model[1]
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.alpha_mem", "1.spike_threshold", "1.v_mem"}


def test_a_carried_beta_is_clamped_as_in_snntorch_with_a_learnable_beta_outside():
    spec = snn_spec(beta=1.2, learn_beta=True)
    layer = adapters.build(spec, "sinabs")
    assert layer.alpha_mem_calculated == 1
    assert layer.alpha_mem == torch.tensor(1.2)
    frozen = adapters.build(
        spec.replace(
            parameters={**spec.parameters, "mem_decay": Parameter(spec.parameters["mem_decay"].value, False, "clamped")}
        ),
        "sinabs",
    )
    assert frozen.alpha_mem_calculated == 1


# ---- the other classes -----------------------------------------------------------------------------------------------

ADAPTIVE = {"tau_mem": 6.0, "tau_adapt": 9.0, "adapt_scale": 0.7}
OTHERS = {
    "IAF": lambda **o: sl.IAF(**o),
    "IAF, synapse": lambda **o: sl.IAF(tau_syn=3.0, **o),
    "LIFSqueeze": lambda **o: sl.LIFSqueeze(batch_size=B, tau_mem=6.0, norm_input=False, **o),
    "IAFSqueeze": lambda **o: sl.IAFSqueeze(batch_size=B, **o),
    "ALIF": lambda **o: sl.ALIF(**ADAPTIVE, norm_input=False, **o),
    "ALIF, synapse": lambda **o: sl.ALIF(**ADAPTIVE, norm_input=False, tau_syn=3.0, **o),
    "ALIF, alphas": lambda **o: sl.ALIF(**ADAPTIVE, norm_input=False, train_alphas=True, **o),
}


def gradients_of(layer, xs, outputs):
    """Of the input and of everything trained, from a fixed random gradient of the output, by the spec's names."""
    named = {n: t for n, t in parameters(adapter_of(layer), layer).items() if t.requires_grad}
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(8))
    found = torch.autograd.grad((outputs * weights).sum(), [xs, *named.values()])
    return dict(zip(["x", *named], found, strict=True))


@pytest.mark.parametrize("spikes", SPIKES)
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_classes_are_read_and_the_native_layer_has_their_bits(name, spikes):
    layer = OTHERS[name](spike_fn=SPIKES[spikes][0], min_v_mem=-0.5)
    spec = adapters.spec(layer)
    assert spec.spike_count == SPIKES[spikes][1]
    assert spec.adaptive == name.startswith("ALIF")
    assert (spec.decay == "none") == name.startswith("IAF")
    assert spec.form == ("sinabs.ALIF" if spec.adaptive else "sinabs.LIF")
    xs = ((torch.rand(T, B, N, generator=torch.Generator().manual_seed(3)) - 0.3) * 1.5).requires_grad_()
    native = tt.snn.SpecNeuron(spec)
    theirs, states = adapter_of(layer).trace(layer, xs)
    grads = gradients_of(layer, xs, theirs)
    mine, own = adapter_of(native).trace(native, xs)
    assert 0.02 < (theirs > 0).float().mean() < 0.98
    assert bits(mine) == bits(theirs)
    assert set(own) == set(states) == set(spec.states)
    assert {n: bits(s) for n, s in own.items()} == {n: bits(s) for n, s in states.items()}
    found = gradients_of(native, xs, mine)
    assert bits(found["x"]) == bits(grads["x"])
    assert found.keys() == grads.keys()
    for key, gradient in grads.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_each_class_is_built_from_its_own_spec(name):
    layer = OTHERS[name]()
    spec = adapters.spec(layer)
    cls = next(c for c in (sl.ALIF, sl.IAF, sl.LIF) if isinstance(layer, c))
    xs = torch.rand(B, T, N, generator=torch.Generator().manual_seed(3))
    for is_stock in (False, True):
        built = adapters.build(spec, "sinabs", stock=is_stock)
        assert isinstance(built, cls)
        assert type(built) is cls or not is_stock
        assert adapters.spec(built) == spec
        adapter_of(layer).reset(layer)
        expected = cls.forward(layer, xs) if "Squeeze" in name else layer(xs)
        assert bits(built(xs)) == bits(expected)


def test_the_adaptation_really_adapts():
    layer = OTHERS["ALIF"]()
    xs = torch.full((T, 1, 1), 0.4)
    _, states = adapter_of(layer).trace(layer, xs)
    assert states["adaptation"][-1] > 0.05
    fixed = adapters.spec(layer)
    plain = {n: p for n, p in fixed.parameters.items() if not n.startswith("adapt_")}
    lif_like = tt.snn.SpecNeuron(fixed.replace(form="sinabs.LIF", parameters=plain))
    assert lif_like.unroll(xs).sum() > layer(xs.transpose(0, 1)).sum() + 5


@pytest.mark.parametrize("name", ["ALIF", "ALIF, synapse", "ALIF, alphas"])
def test_a_built_alif_copies_faithfully_where_sinabs_s_own_does_not(name):
    """sinabs 3.1.3 forgets norm_input=False in a copy, and cannot copy train_alphas without a synapse."""
    built = adapters.build(adapters.spec(OTHERS[name]()), "sinabs")
    twin = copy.deepcopy(built)
    assert type(twin) is type(built)
    assert not twin.norm_input
    assert adapters.spec(twin) == adapters.spec(built)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in built.parameters()}


def test_an_alif_has_no_counterpart_in_snntorch():
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(adapters.spec(OTHERS["ALIF"]()), "snntorch")
    assert caught.value.field == "adapt_scale"
    assert "to='tracetorch'" in caught.value.remedy


def test_the_current_that_an_alif_scales_is_what_its_synapse_keeps():
    spec = adapters.spec(sl.ALIF(**ADAPTIVE, tau_syn=3.0))
    assert spec.input_gain == "one_minus_decay_kept"
    building = Building("(one layer)", "sinabs")
    ours.build(spec, building)
    assert any("keeps the scaled current" in note.text for note in building.notes)


# ---- what snnTorch has and sinabs has not ----------------------------------------------------------------------------

SYNAPTIC = {"alpha": 0.8, "beta": 0.7, "init_hidden": True, "learn_alpha": True, "learn_beta": True}


@pytest.mark.parametrize(
    "options", [{}, {"reset_mechanism": "none"}, {"reset_mechanism": "zero", "reset_delay": False}]
)
def test_a_synaptic_becomes_a_lif_with_a_synapse_before_it(options):
    layer = snn.Synaptic(**SYNAPTIC, **options)
    spec = adapters.spec(layer)
    built = adapters.build(spec, "sinabs")
    assert isinstance(built, ours.LIF)
    assert built.synapse == "decay_then_add"
    xs = torch.rand(T, B, N, generator=torch.Generator().manual_seed(6)) * 0.4
    theirs, states = adapter_of(layer).trace(layer, xs)
    mine, own = adapter_of(built).trace(built, xs)
    assert 0.02 < theirs.mean() < 0.98
    assert (mine != theirs).float().mean() < 0.005
    assert bits(own["i_syn"]) == bits(states["i_syn"])
    twin = copy.deepcopy(built)
    assert adapters.spec(twin) == adapters.spec(built)
    adapter_of(twin).reset(twin)
    with torch.no_grad():
        halves = [twin(part) for part in xs.transpose(0, 1).split(T // 2, 1)]
    whole = adapter_of(built).trace(built, xs)[0].transpose(0, 1)
    twin_states = dict(twin.named_buffers())
    assert bits(torch.cat(halves, 1)) == bits(whole)
    assert bits(twin_states["i_syn"]) == bits(own["i_syn"][-1])
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(spec, "sinabs", stock=True)
    assert caught.value.field == "synapse"
    assert "stock=False" in caught.value.remedy


def test_an_input_gain_is_a_constant_before_the_layer():
    spec = adapters.spec(snn.Lapicque(beta=0.9, reset_mechanism="subtract"))
    built = adapters.build(spec, "sinabs")
    assert built.input_gain.item() == spec.parameters["input_gain"].value
    assert not built.input_gain.requires_grad
    assert adapters.spec(built).input_gain == "value"
    with pytest.raises(adapters.ConversionError, match="input_gain='value'"):
        adapters.build(spec, "sinabs", stock=True)


def test_a_reset_to_a_value_is_a_reset_of_ours():
    spec = adapters.spec(lif(spike_fn=activation.SingleSpike, reset_fn=activation.MembraneReset()))
    values = {**spec.parameters, "reset_value": Parameter(np.float32(-0.25))}
    for gradient in ("attached", "detached", "membrane_stopped"):
        wanted = spec.replace(reset="value", reset_gradient=gradient, parameters=values)
        built = adapters.build(wanted, "sinabs")
        assert adapters.spec(built) == wanted
        xs = torch.rand(B, T, N, generator=torch.Generator().manual_seed(2)) * 4
        native = tt.snn.SpecNeuron(wanted)
        assert bits(built(xs)) == bits(native.unroll(xs, time_dim=1))
        with pytest.raises(adapters.ConversionError):
            adapters.build(wanted, "sinabs", stock=True)


# ---- callables of the user's own -------------------------------------------------------------------------------------


def own_surrogate(v, threshold):
    """A `surrogate_grad_fn` that nobody has a name for."""
    return 1 / (1 + (3 * (v - threshold)) ** 4)


@pytest.mark.parametrize("to", ["tracetorch", "snntorch", "sinabs"])
def test_a_surrogate_of_one_s_own_is_carried_as_it_is(to):
    layer = lif(surrogate_grad_fn=own_surrogate, spike_fn=activation.SingleSpike, tau_syn=None)
    spec = adapters.spec(layer)
    assert spec.surrogate.function is own_surrogate
    xs = torch.rand(B, T, N, generator=torch.Generator().manual_seed(2)) * 3
    row = adapters.convert(nn.Sequential(layer), to=to, sample=xs).report[0]
    assert "own_surrogate" in row.reason
    assert row.gradient == "opaque"
    assert row.gradient_error < 1e-4
    if to == "sinabs":
        assert adapters.build(spec, to).surrogate_grad_fn is own_surrogate


@pytest.mark.parametrize("name", ["IAF", "ALIF", "IAF, synapse"])
def test_a_fused_twin_is_read_as_its_original(name):
    layer = OTHERS[name]()
    twin = tt.fuse(nn.Sequential(layer))[0]
    assert type(twin) is not type(layer)
    assert adapters.spec(twin) == adapters.spec(layer)
    assert adapters.spec(tt.fuse(nn.Sequential(lif()))[0]) == adapters.spec(lif())


@pytest.mark.parametrize("alphas", [False, True])
def test_one_optimizer_step_on_both_sides_gives_the_same_parameters(alphas):
    """tau as tau and alpha as alpha, in the native layer."""
    layer = sl.LIF(6.0, tau_syn=3.0, train_alphas=alphas)
    target = adapters.build(adapters.spec(layer), "tracetorch")
    xs = torch.rand(T, B, N, generator=torch.Generator().manual_seed(6)) * 3
    for module in (layer, target):
        adapter_of(module).trace(module, xs)[0].mean().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    before, after = adapters.spec(layer), adapters.spec(target)
    assert (
        before.parameters["mem_decay"].value
        != adapters.spec(sl.LIF(6.0, train_alphas=alphas)).parameters["mem_decay"].value
    )
    for key in ("mem_decay", "syn_decay"):
        assert before.parameters[key].raw == after.parameters[key].raw
        np.testing.assert_allclose(after.parameters[key].value, before.parameters[key].value, rtol=1e-6)


@pytest.mark.parametrize("norm_input", [False, True])
@pytest.mark.parametrize("tau_syn", [None, 5.0])
def test_that_an_alif_forgets_its_current_between_calls_is_named(norm_input, tau_syn):
    """Where there is a current to forget, and the target does not forget it too."""
    layer = sl.ALIF(tau_mem=10.0, tau_adapt=8.0, tau_syn=tau_syn, norm_input=norm_input)
    for framework in ("tracetorch", "sinabs"):
        building = Building("'neuron'", framework)
        adapter(framework).build(adapters.spec(layer), building)
        named = any("forgets its synaptic current" in note.text for note in building.notes)
        assert named == (tau_syn is not None and framework == "tracetorch")
