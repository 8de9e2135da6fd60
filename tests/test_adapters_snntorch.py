"""`snntorch.Leaky` 1.0.0: every option is read and computed bit for bit; what cannot be read is refused by name."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from snntorch import surrogate as stock
from snntorch.functional import quant
from torch import nn

import tracetorch as tt
from tracetorch import adapters
from tracetorch.adapters import snntorch as ours
from tracetorch.adapters.base import Building
from tracetorch.adapters.registry import adapter_of
from tracetorch.core.spec import SpecError
from tracetorch.functional.surrogates import Surrogate

T, B, N = 100, 3, 7

# (reset_mechanism, reset_delay) -> (reset, reset_timing or None if it has no meaning, reset_gradient likewise)
RESETS = {
    ("subtract", True): ("subtract", "next_step_after_decay", "detached"),
    ("subtract", False): ("subtract", "same_step_residual", "attached"),
    ("zero", True): ("value", "next_step_before_decay", "detached"),
    ("zero", False): ("value", "same_step_residual", "attached"),
    ("none", True): ("none", None, None),
    ("none", False): ("none", None, None),
}
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


def bits(tensor):
    """Dtype, shape and bytes: NaN equals itself, -0.0 is not 0.0."""
    return str(tensor.dtype), list(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def per_neuron(low, high, seed):
    return torch.rand(N, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def kinds(name, low, high, scalar, seed):
    """Scalar, tensor scalar, one per neuron; learnable or not."""
    for value in (scalar, torch.tensor(scalar), per_neuron(low, high, seed)):
        for learnable in (False, True):
            yield {name: value, f"learn_{name}": learnable}


def leaky(**options):
    values = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    return snn.Leaky(**{"beta": 0.85, "init_hidden": True, **values})


def run(layer, xs, states=("mem",)):
    """Outputs, states after every step, and gradients of the input and every trainable parameter, by name."""
    xs = xs.clone().requires_grad_()
    outputs, recorded = [], {name: [] for name in states}
    for x in xs:
        outputs.append(layer(x))
        for name in states:
            recorded[name].append(getattr(layer, name))
    outputs = torch.stack(outputs)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(9), dtype=outputs.dtype)
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    wanted = [xs, *named.values()]
    grads = [torch.zeros_like(t) for t in wanted]
    if outputs.requires_grad:
        found = torch.autograd.grad((outputs * weights).sum(), wanted, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return outputs, {n: torch.stack(r) for n, r in recorded.items()}, dict(zip(["x", *named], grads, strict=True))


def stimulus(scale=1.0, shape=(T, B, N)):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 0.25) * scale


NATIVE = {"beta": "mem_decay", "threshold": "threshold", "graded_spikes_factor": "spike_scale", "x": "x"}


def assert_bit_identical(layer, xs):
    native = tt.snn.SpecNeuron(adapters.spec(layer))
    theirs, mems, grads = run(layer, xs)
    mine, states, own = run(native, xs, ("v_mem",))
    fired = int((theirs != 0).sum())
    assert fired > 0.02 * theirs.numel(), "nothing fired: a trace without spikes proves nothing"
    assert fired < 0.98 * theirs.numel()
    assert bits(mine) == bits(theirs)
    assert bits(states["v_mem"]) == bits(mems["mem"])
    assert {NATIVE[name] for name in grads} == set(own)
    for name, gradient in grads.items():
        assert bits(own[NATIVE[name]]) == bits(gradient), name
    return theirs, mems["mem"], grads


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
        adapters.convert(net, to="sinabs", sample=torch.rand(5, B, 4), time_dim=0)
    error = caught.value
    assert error.layer == "'1'"
    assert error.field
    assert error.remedy
    assert "Remedy: " in str(error)
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
    with pytest.raises(SpecError) as caught:
        adapters.spec(make())
    for word in words:
        assert word in str(caught.value)


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


# ---- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reset", "delay"), RESETS)
def test_a_leaky_built_from_the_spec_of_a_leaky_is_stock_and_bit_identical(reset, delay):
    layer = leaky(
        reset_mechanism=reset,
        reset_delay=delay,
        beta=per_neuron(0.3, 0.95, 2),
        learn_beta=True,
        spike_grad=stock.fast_sigmoid(slope=7),
        graded_spikes_factor=0.5,
    )
    spec = adapters.spec(layer)
    for is_stock in (False, True):
        built = adapters.build(spec, "snntorch", stock=is_stock)
        assert type(built) is snn.Leaky
        assert built.spike_grad.__module__ == "snntorch.surrogate"
        assert (built.reset_mechanism, built.reset_delay) == (reset, delay if reset != "none" else True)
        assert built.init_hidden
        assert adapters.spec(built) == spec
        theirs, mine = run(layer, stimulus(2.0)), run(built, stimulus(2.0))
        assert bits(mine[0]) == bits(theirs[0])
        assert {n: bits(t) for n, t in {**mine[1], **mine[2]}.items()} == {
            n: bits(t) for n, t in {**theirs[1], **theirs[2]}.items()
        }
        layer.mem = torch.zeros(0)


def sinabs_layer(**options):
    given = {"spike_fn": activation.SingleSpike, "norm_input": False, **options}
    return sl.LIF(tau_mem=torch.linspace(2, 12, N), **given)


def test_a_subtracting_sinabs_layer_becomes_our_subclass_of_leaky_and_is_used_like_one():
    spec = adapters.spec(sinabs_layer())
    layer = adapters.build(spec, "snntorch")
    assert type(layer) is ours.Leaky
    assert isinstance(layer, snn.Leaky)
    xs = stimulus(2.0)
    alone = torch.stack([layer(x) for x in xs])
    layer.reset_mem()
    assert torch.equal(torch.stack([layer(x) for x in xs]), alone)
    layer.reset_mem()
    layer.output = True
    spikes, mem = layer(xs[0])
    assert torch.equal(spikes, alone[0])
    assert mem is layer.mem
    with pytest.raises(TypeError, match="init_hidden"):
        layer(xs[0], mem)
    layer.output, layer.init_hidden = False, False
    spikes, mem = layer(xs[0], torch.zeros(B, N))
    assert torch.equal(spikes, alone[0])
    assert adapters.spec(layer).differences(spec) == {}


def by_deepcopy(layer):
    return copy.deepcopy(layer)


def by_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def custom_layers():
    """Layers that hold callables of ours: our subclass, and a stock Leaky with a `SpikeGrad`."""
    tied = sinabs_layer(spike_threshold=per_neuron(0.5, 1.5, 3), reset_fn=activation.MembraneReset(0.0))
    for spec in (adapters.spec(sinabs_layer()), adapters.spec(tied)):
        names = ("mem_decay", "threshold")
        learnable = {n: tt.core.spec.Parameter(spec.parameters[n].value, True, spec.parameters[n].raw) for n in names}
        yield adapters.build(spec.replace(parameters={**spec.parameters, **learnable}), "snntorch")


@pytest.mark.parametrize("which", [0, 1], ids=["our subclass", "SpikeGrad"])
@pytest.mark.parametrize("how", [by_deepcopy, by_file])
def test_custom_callables_copy_pickle_and_follow_the_copy(which, how):
    layer = list(custom_layers())[which].eval()
    assert type(layer) is (ours.Leaky, snn.Leaky)[which]
    assert isinstance(layer.spike_grad, ours.SpikeGrad) or which == 0
    xs = stimulus(2.0)
    before = run(layer, xs)
    layer.mem = torch.zeros(0)
    twin = how(layer)
    assert type(twin) is type(layer)
    assert not twin.training
    assert adapters.spec(twin) == adapters.spec(layer)
    got = run(twin, xs)
    assert bits(got[0]) == bits(before[0])
    assert {n: bits(g) for n, g in got[2].items()} == {n: bits(g) for n, g in before[2].items()}
    with torch.no_grad():
        twin.threshold.mul_(0.5)
    twin.mem = torch.zeros(0)
    changed = run(twin, xs)
    assert (changed[0] != before[0]).any()
    # The surrogate's width is half the threshold: the gradients must be those of the copy's threshold.
    assert bits(changed[2]["x"]) == bits(run(adapters.build(adapters.spec(twin), "snntorch"), xs)[2]["x"])
    assert bits(run(layer, xs)[2]["x"]) == bits(before[2]["x"])


def test_state_dicts_keep_snntorchs_names():
    layer = adapters.build(adapters.spec(leaky(learn_beta=True)), "snntorch")
    assert set(layer.state_dict()) == set(leaky(learn_beta=True).state_dict())


def test_stock_refuses_what_the_stock_class_cannot_do():
    for options, field in (
        ({}, "reset"),
        ({"norm_input": True}, "input_gain"),
        ({"spike_fn": activation.MultiSpike}, "spike_count"),
        ({"min_v_mem": -1.0}, "clamp"),
        ({"tau_syn": 5.0}, "synapse"),
    ):
        spec = adapters.spec(sinabs_layer(**options))
        with pytest.raises(adapters.ConversionError) as caught:
            adapters.build(spec, "snntorch", stock=True)
        assert caught.value.field == field
        assert caught.value.remedy


def test_stock_turns_a_comparison_into_the_next_float():
    spec = adapters.spec(sinabs_layer(reset_fn=activation.MembraneReset(0.0)))
    layer = adapters.build(spec, "snntorch", stock=True)
    assert type(layer) is snn.Leaky
    assert layer.spike_grad.__module__ == "snntorch.surrogate"
    assert layer.threshold < 1
    assert torch.nextafter(layer.threshold, torch.tensor(2.0)) == 1


# ---- the other classes -----------------------------------------------------------------------------------------------

SYNAPTIC = {"alpha": 0.8, "beta": 0.7, "init_hidden": True}
# class -> (how it is made, the names of its tensors in the spec, its states in the spec)
OTHERS = {
    "Synaptic": (
        lambda **o: snn.Synaptic(**{**SYNAPTIC, **o}),
        {"alpha": "syn_decay", "beta": "mem_decay", "threshold": "threshold", "x": "x"},
        {"syn": "i_syn", "mem": "v_mem"},
    ),
    "Alpha": (
        lambda **o: snn.Alpha(**{**SYNAPTIC, **o}),
        {"beta": "mem_decay", "threshold": "threshold", "x": "x"},
        {"syn_exc": "i_exc", "syn_inh": "i_inh", "mem": "v_mem"},
    ),
    "Lapicque": (
        lambda **o: snn.Lapicque(beta=0.8, init_hidden=True, **o),
        {"threshold": "threshold", "x": "x"},
        {"mem": "v_mem"},
    ),
}
# (class, reset_mechanism, reset_delay) -> (reset, reset_timing, reset_gradient)
DISCARD, LATER = ("value", "next_step_discards_input", "detached"), ("subtract", "next_step_after_decay", "detached")
OTHER_RESETS = {
    **{(cls, "subtract", None): LATER for cls in ("Alpha", "Lapicque")},
    **{(cls, "zero", None): DISCARD for cls in ("Alpha", "Lapicque")},
    **{(cls, "none", None): ("none", None, None) for cls in ("Alpha", "Lapicque")},
    ("Synaptic", "subtract", True): LATER,
    ("Synaptic", "zero", True): DISCARD,
    ("Synaptic", "none", True): ("none", None, None),
    ("Synaptic", "subtract", False): ("subtract", "same_step_residual", "attached"),
    ("Synaptic", "zero", False): ("value", "same_step_residual", "attached"),
    ("Synaptic", "none", False): ("none", None, None),
}


def other(cls, reset, delay, **options):
    options |= {} if delay is None else {"reset_delay": delay}
    return OTHERS[cls][0](reset_mechanism=reset, **options)


@pytest.mark.parametrize(("cls", "reset", "delay"), OTHER_RESETS)
def test_the_other_classes_are_read_and_the_native_layer_has_their_bits(cls, reset, delay):
    learned = {"learn_threshold": True} | ({} if cls == "Lapicque" else {"learn_beta": True})
    layer = other(cls, reset, delay, **learned)
    spec = adapters.spec(layer)
    kind, timing, gradient = OTHER_RESETS[cls, reset, delay]
    assert spec.form == f"snntorch.{cls}"
    assert (spec.reset, spec.comparison, spec.spike_count) == (kind, ">", "single")
    if kind != "none":
        assert (spec.reset_timing, spec.reset_gradient) == (timing, gradient)
    names, states = OTHERS[cls][1:]
    xs = stimulus(4.0) if cls != "Synaptic" else stimulus(0.5) if reset != "none" else stimulus(1.0) - 0.2
    theirs, recorded, grads = run(layer, xs, tuple(states))
    mine, own, own_grads = run(tt.snn.SpecNeuron(spec), xs, tuple(states.values()))
    assert 0.02 < theirs.mean() < 0.98
    assert bits(mine) == bits(theirs)
    for theirs_name, own_name in states.items():
        assert bits(own[own_name]) == bits(recorded[theirs_name])
    assert bits(own_grads["x"]) == bits(grads["x"])
    for name, gradient in grads.items():
        torch.testing.assert_close(own_grads[names[name]], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cls", "reset", "delay"), OTHER_RESETS)
def test_each_class_is_built_from_its_own_spec_of_stock_parts(cls, reset, delay):
    layer = other(cls, reset, delay, learn_threshold=True)
    spec = adapters.spec(layer)
    for is_stock in (False, True):
        built = adapters.build(spec, "snntorch", stock=is_stock)
        assert type(built) is type(layer)
        again = adapters.spec(built)
        assert again == spec or cls == "Lapicque"
        states = tuple(OTHERS[cls][2])
        theirs, mine = run(layer, stimulus(4.0), states), run(built, stimulus(4.0), states)
        assert bits(mine[0]) == bits(theirs[0])
        if cls == "Lapicque":  # R and C are others, with the same 1 - dt/(R C) and dt/C
            torch.testing.assert_close(mine[2]["x"], theirs[2]["x"], rtol=1e-5, atol=1e-6)
        else:
            assert bits(mine[2]["x"]) == bits(theirs[2]["x"])
        for layer_ in (layer, built):
            for state in states:
                setattr(layer_, state, torch.zeros(0))


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_what_lapicque_really_decays_by_is_read(beta):
    """snnTorch 1.0.0: 1 + ln(beta), not beta; and the input is scaled by -ln(beta)."""
    spec = adapters.spec(snn.Lapicque(beta=beta))
    assert spec.parameters["mem_decay"].value == pytest.approx(1 + math.log(beta), abs=1e-6)
    assert spec.parameters["input_gain"].value == pytest.approx(-math.log(beta), abs=1e-6)
    building = Building("(one layer)", "snntorch")
    ours.build(spec, building)
    assert any("1 + ln(beta)" in note.text for note in building.notes)


def test_a_state_leaky_is_the_step_that_its_convolution_is():
    layer = snn.StateLeaky(torch.full((N,), 0.8), channels=N, learn_beta=True, graded_spikes_factor=0.5)
    spec = adapters.spec(layer)
    assert spec.parameters["mem_decay"].raw == "exp_tau"
    assert spec.parameters["mem_decay"].value == pytest.approx(5.0)
    assert spec.parameters["spike_scale"].value == 0.25
    xs = stimulus(2.0)
    spikes, mem = layer(xs)
    native = tt.snn.SpecNeuron(spec)
    mine, states = native.trace(xs)
    torch.testing.assert_close(states["v_mem"], mem, rtol=1e-5, atol=1e-5)
    assert (mine != spikes).float().mean() < 1e-3
    assert spikes.unique().tolist() == [0.0, 0.25]
    weights = torch.randn(T, B, N, generator=torch.Generator().manual_seed(2))
    (spikes * weights).sum().backward()
    (mine * weights).sum().backward()
    torch.testing.assert_close(native.mem_decay.grad, layer.tau.grad, rtol=1e-3, atol=1e-3)


def test_the_parts_of_a_linear_leaky():
    layer = snn.LinearLeaky(0.9, 4, N, learn_threshold=True)
    linear, spec = ours.parts(layer)
    assert linear is layer.linear
    assert spec.parameters["threshold"].learnable
    with pytest.raises(SpecError, match="only LinearLeaky and LeakyParallel have parts"):
        ours.parts(leaky())


def test_a_synaptic_that_discards_a_step_has_no_counterpart_in_sinabs():
    spec = adapters.spec(other("Synaptic", "zero", True))
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(spec, "sinabs")
    assert caught.value.field == "reset_timing"
    assert "reset_delay=False" in caught.value.remedy


def test_an_alpha_has_no_counterpart_in_sinabs():
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(adapters.spec(other("Alpha", "zero", None)), "sinabs")
    assert (caught.value.field, caught.value.value) == ("synapse", "difference_of_exponentials")


# ---- callables of the user's own -------------------------------------------------------------------------------------


def own_gradient(z, grad, spikes):
    """What `custom_surrogate` takes; not one of the named ones."""
    return grad * torch.exp(-torch.abs(z)) * (1 + spikes)


def test_a_custom_surrogate_is_carried_as_it_is():
    layer = leaky(spike_grad=stock.custom_surrogate(own_gradient), learn_beta=True)
    spec = adapters.spec(layer)
    assert spec.surrogate.function is own_gradient
    assert spec == adapters.spec(layer)
    _, _, grads = assert_bit_identical(layer, stimulus(2.0))
    assert grads["x"].abs().max() > 0
    back = adapters.build(spec, "snntorch", stock=True)
    assert back.spike_grad.__module__ == "snntorch.surrogate"
    assert adapters.spec(back) == spec
    result = adapters.convert(nn.Sequential(layer), to="sinabs", sample=stimulus(2.0), time_dim=0)
    row = result.report[0]
    assert row.gradient == "opaque"
    assert "own_gradient" in row.reason
    assert row.gradient_error < 1e-4


def test_a_custom_surrogate_copies_and_pickles_but_is_no_json(tmp_path):
    spec = adapters.spec(leaky(spike_grad=stock.custom_surrogate(own_gradient)))
    native = tt.snn.SpecNeuron(spec)
    file = io.BytesIO()
    torch.save(native, file)
    file.seek(0)
    for twin in (copy.deepcopy(native), torch.load(file, weights_only=False)):
        assert twin.spec == spec
        assert bits(run(twin, stimulus(2.0), ("v_mem",))[0]) == bits(run(native, stimulus(2.0), ("v_mem",))[0])
        native.reset_states()
    with pytest.raises(SpecError, match="own_gradient") as caught:
        spec.to_json()
    assert "callable of your own" in str(caught.value)
    with pytest.raises(Exception, match="callable of your own"):
        tt.save(tmp_path / "x.tt", tt.Sequential(native))
    assert hash(spec) == hash(spec.replace())


# ---- fused twins, and training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OTHERS)
def test_a_fused_twin_is_read_as_its_original(cls):
    layer = OTHERS[cls][0](learn_threshold=True)
    twin = tt.fuse(nn.Sequential(layer))[0]
    assert type(twin) is not type(layer)
    assert adapters.spec(twin) == adapters.spec(layer)


@pytest.mark.parametrize(("reset", "delay"), [("subtract", True), ("zero", False), ("none", True)])
@pytest.mark.parametrize("to", ["tracetorch", "snntorch", "sinabs"])
def test_one_optimizer_step_on_both_sides_gives_the_same_parameters(to, reset, delay):
    """Where the raw form is the same: alpha, beta and the threshold themselves."""
    layer = other("Synaptic", reset, delay, learn_alpha=True, learn_beta=True, learn_threshold=True)
    target = adapters.build(adapters.spec(layer), to)
    xs = stimulus(4.0)
    for module in (layer, target):
        own = adapter_of(module)
        out, _ = own.trace(module, xs)
        out.mean().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    spec, after = adapters.spec(layer), adapters.spec(target)
    for name in ("syn_decay", "mem_decay", "threshold"):
        np.testing.assert_allclose(after.parameters[name].value, spec.parameters[name].value, rtol=1e-5)
        assert spec.parameters[name].value != {"syn_decay": 0.8, "mem_decay": 0.7, "threshold": 1.0}[name]
