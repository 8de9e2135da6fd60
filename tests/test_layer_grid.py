"""Every non-recurrent neuron layer of snnTorch, sinabs and the house, every option, into every framework, judged."""

import hypothesis
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from hypothesis import strategies as st
from sinabs import activation
from snntorch import surrogate as stock
from snntorch.functional import quant

import tracetorch as tt
from tests.layer_grid import Found, check
from tracetorch import adapters

N = 5


def user_surrogate(v, threshold):
    """A `surrogate_grad_fn` of a user's own."""
    return torch.exp(-torch.abs(v - threshold))


def user_gradient(z, grad, spikes):
    """What snnTorch's `custom_surrogate` takes."""
    return grad / (1 + torch.abs(z)) ** 2


SPIKE_GRADS = {
    "default": lambda: None,
    "atan": lambda: stock.atan(alpha=3.0),
    "fast_sigmoid": lambda: stock.fast_sigmoid(slope=10),
    "sigmoid": lambda: stock.sigmoid(slope=5),
    "straight_through": stock.straight_through_estimator,
    "triangular": lambda: stock.triangular(threshold=0.5),
    "heaviside": stock.heaviside,
    "spike_rate_escape": lambda: stock.spike_rate_escape(beta=1, slope=2),
    "SFS": lambda: stock.SFS(slope=4, B=0.25),
    "custom": lambda: stock.custom_surrogate(user_gradient),
}
SURROGATES = {
    "exponential": activation.SingleExponential(grad_width=0.7),
    "heaviside": activation.Heaviside(window=0.5),
    "gaussian": activation.Gaussian(sigma=0.4),
    "multi_gaussian": activation.MultiGaussian(),
    "periodic": activation.PeriodicExponential(),
    "custom": user_surrogate,
}
SPIKE_FNS = (activation.SingleSpike, activation.MultiSpike, activation.MaxSpike(2), activation.MaxSpike())
RESET_FNS = (
    activation.MembraneSubtract(),
    activation.MembraneSubtract(0.75),
    activation.MembraneReset(),
    activation.MembraneReset(0.125),
)


@st.composite
def numbers(draw, low, high):
    """A scalar, or one per neuron."""
    one = st.floats(low, high).map(lambda value: torch.tensor(value).item())
    if draw(st.booleans()):
        return draw(one)
    return torch.tensor(draw(st.lists(one, min_size=N, max_size=N)))


@st.composite
def snntorch_options(draw):
    options = {
        "threshold": draw(numbers(0.5, 1.5)),
        "learn_threshold": draw(st.booleans()),
        "spike_grad": SPIKE_GRADS[draw(st.sampled_from(sorted(SPIKE_GRADS)))](),
        "surrogate_disable": draw(st.integers(0, 9)) == 0,
        "reset_mechanism": draw(st.sampled_from(["subtract", "zero", "none"])),
        "init_hidden": draw(st.booleans()),
        "output": draw(st.booleans()),
    }
    return options


@st.composite
def leakies(draw):
    factor = draw(st.sampled_from([1.0, 0.5, 0.3, "per neuron"]))
    return snn.Leaky(
        beta=draw(numbers(0.0, 1.0)),
        learn_beta=draw(st.booleans()),
        reset_delay=draw(st.booleans()),
        graded_spikes_factor=draw(numbers(0.5, 2.0)) if factor == "per neuron" else factor,
        learn_graded_spikes_factor=draw(st.booleans()),
        **draw(snntorch_options()),
    )


@st.composite
def synaptics(draw):
    return snn.Synaptic(
        alpha=draw(numbers(0.0, 1.0)),
        learn_alpha=draw(st.booleans()),
        beta=draw(numbers(0.0, 1.0)),
        learn_beta=draw(st.booleans()),
        reset_delay=draw(st.booleans()),
        **draw(snntorch_options()),
    )


@st.composite
def lapicques(draw):
    options = draw(snntorch_options())
    if draw(st.booleans()):
        return snn.Lapicque(beta=draw(st.floats(0.5, 0.95)), **options)
    r, c = draw(st.floats(1.0, 5.0)), draw(st.floats(1.5, 5.0))
    return snn.Lapicque(R=r, C=c, time_step=draw(st.sampled_from([1, 0.5, 0.3])), **options)


@st.composite
def alphas(draw):
    beta = draw(numbers(0.1, 0.6))
    return snn.Alpha(
        alpha=beta + draw(st.floats(0.1, 0.35)), beta=beta, learn_beta=draw(st.booleans()), **draw(snntorch_options())
    )


@st.composite
def deltas(draw):
    options = draw(snntorch_options())
    options["threshold"] = 1.0  # which it does not compute
    return snn.DeltaLeaky(draw(st.floats(0.125, 1.0)), beta=draw(numbers(0.0, 1.1)), learn_beta=True, **options)


@st.composite
def coupled(draw, layers):
    """With states on levels, or one winner a sample, now and then. (Its constructor would warn that this is new.)"""
    layer = draw(layers)
    layer.state_quant = draw(st.sampled_from([False] * 5 + [quantizer(3), quantizer(5), quantizer(4, uniform=False)]))
    factor = layer.graded_spikes_factor
    # Refused: the winner's spike is not scaled, a reset in its own step is.
    scaled = not getattr(layer, "reset_delay", True) and (factor.requires_grad or bool((factor != 1).any()))
    layer.inhibition = draw(st.integers(0, 7)) == 0 and not scaled
    return layer


def quantizer(bits, **options):
    return quant.state_quant(num_bits=bits, lower_limit=0.5, upper_limit=1.0, **options)


@st.composite
def state_leakies(draw):
    options = draw(snntorch_options())
    for name in ("init_hidden", "reset_mechanism"):
        del options[name]
    if not options["output"]:  # the class warns of options that it then does not use
        options = {"output": False}
    return snn.StateLeaky(beta=draw(numbers(0.1, 0.95)), channels=N, learn_beta=draw(st.booleans()), **options)


@st.composite
def sinabs_options(draw):
    return {
        "spike_threshold": torch.as_tensor(draw(numbers(0.5, 1.5))),
        "spike_fn": draw(st.sampled_from(SPIKE_FNS)),
        "reset_fn": draw(st.sampled_from(RESET_FNS)),
        "surrogate_grad_fn": SURROGATES[draw(st.sampled_from(sorted(SURROGATES)))],
        "tau_syn": draw(st.none() | numbers(1.5, 10.0)),
        "min_v_mem": draw(st.sampled_from([None, None, -1.0, -0.25])),
        "record_states": draw(st.booleans()),
        "shape": draw(st.none() | st.just((3, N))),
    }


@st.composite
def lifs(draw):
    squeezed = draw(st.integers(0, 4)) == 0
    options = draw(sinabs_options())
    own = {
        "tau_mem": draw(numbers(1.0, 20.0)),
        "train_alphas": draw(st.booleans()),
        "norm_input": draw(st.booleans()),
    }
    layer = sl.LIFSqueeze(batch_size=3, **own, **options) if squeezed else sl.LIF(**own, **options)
    layer.spike_threshold.requires_grad_(draw(st.booleans()))
    return layer


@st.composite
def iafs(draw):
    squeezed = draw(st.integers(0, 4)) == 0
    options = draw(sinabs_options())
    return sl.IAFSqueeze(batch_size=3, **options) if squeezed else sl.IAF(**options)


@st.composite
def exp_leaks(draw):
    return sl.ExpLeak(
        tau_mem=draw(numbers(1.0, 20.0)),
        train_alphas=draw(st.booleans()),
        min_v_mem=draw(st.sampled_from([None, -0.25])),
        norm_input=draw(st.booleans()),
    )


@st.composite
def alifs(draw):
    options = draw(sinabs_options())
    if isinstance(options["tau_syn"], torch.Tensor):  # sinabs 3.1.3 takes the truth value of tau_syn
        options["tau_syn"] = 3.0
    return sl.ALIF(
        tau_mem=draw(numbers(1.5, 20.0)),
        tau_adapt=draw(numbers(1.5, 20.0)),
        adapt_scale=draw(numbers(0.25, 2.0)),
        train_alphas=draw(st.booleans()),
        norm_input=draw(st.booleans()),
        **options,
    )


@st.composite
def natives(draw):
    names = ["LI", "LIEMA", "SLI", "SLIEMA", "LIB", "SLIB", "LIT", "SLIT", "LITS", "SLITS"]
    name = draw(st.sampled_from(names))
    options = {"beta": draw(numbers(0.1, 0.95)), "learn_beta": draw(st.booleans())}
    if name.startswith("S"):
        options |= {"alpha": draw(numbers(0.1, 0.95)), "learn_alpha": draw(st.booleans())}
    if name.endswith("LIB"):
        options |= {"threshold": draw(numbers(0.5, 1.5))}
    if "LIT" in name:
        options |= {"pos_threshold": draw(numbers(0.5, 1.5)), "neg_threshold": draw(numbers(0.1, 1.0))}
        options["learn_neg_threshold"] = draw(st.booleans())
    if name.endswith("LITS"):
        options |= {"pos_scale": draw(numbers(-1.0, 2.0)), "neg_scale": draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0]))}
        options["learn_pos_scale"] = draw(st.booleans())
    if "LIB" in name or "LIT" in name:
        options |= {"bias": draw(st.sampled_from([0.0, 0.25])), "learn_bias": draw(st.booleans())}
        quantized = {"quant_fn": tt.functional.round_ste()}
        strict = draw(st.booleans())
        atan = {"spike_fn": tt.functional.surrogate_spike("atan", alpha=3.0, strict=strict)}
        options |= draw(st.sampled_from([{}, quantized, atan]))
    return getattr(tt.snn, name)(N, **options)


KINDS = {
    "Leaky": coupled(leakies()),
    "Synaptic": coupled(synaptics()),
    "Lapicque": coupled(lapicques()),
    "Alpha": coupled(alphas()),
    "DeltaLeaky": deltas(),
    "StateLeaky": state_leakies(),
    "LIF": lifs(),
    "IAF": iafs(),
    "ExpLeak": exp_leaks(),
    "ALIF": alifs(),
    "native": natives(),
}


@st.composite
def stimuli(draw, longest):
    """Random numbers, or eighths, on which membranes meet thresholds exactly; T up to `longest`."""
    steps = draw(st.sampled_from([1, 7, min(40, longest), longest]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    xs = torch.rand(steps, 3, N, generator=generator) - 0.25
    if draw(st.integers(0, 3)) == 0:
        xs = torch.round(xs * 8) / 8
    return xs * draw(st.sampled_from([0.5, 1.0, 2.0, 4.0]))


def grid(kind, examples, longest, seed):
    """Run it; returns the tally."""
    found = Found()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(KINDS[kind], stimuli(longest))
    def run(layer, xs):
        check(found, layer, xs)
        assert not found.faults, found.faults[0]

    run()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_every_layer_and_option_is_carried_or_refused(kind):
    found = grid(kind, examples=12, longest=40, seed=1)
    assert found.counts["layers"] >= 12
    assert found.counts["pairs"] >= 12
    if kind not in ("ExpLeak",):
        assert found.counts["spikes"] > 100
        assert found.counts["refusals"] > 0


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_grid(kind):
    found = grid(kind, examples=250, longest=200, seed=2)
    print(kind, dict(found.counts))  # noqa: T201 - the figures of a sweep
    assert found.counts["layers"] >= 250
    assert found.counts["pairs"] >= 500
    assert found.counts["gradients that show nothing"] <= 0.01 * found.counts["gradients"]
    if kind != "ExpLeak":
        assert found.counts["spikes"] > 10_000


# ---- which pairs are equal, which need a callable of ours, which are impossible --------------------------------------

SINGLE = {"spike_fn": activation.SingleSpike, "norm_input": False}
SUBTRACT_LATER = {"reset_mechanism": "subtract"}
ZERO = {"reset_mechanism": "zero"}
NONE = {"reset_mechanism": "none"}
# (source, target) -> "stock"; "ours", with callables or a subclass of ours alone; or the field that it is refused for
CLASSES = {
    "Leaky, subtract": (
        lambda: snn.Leaky(0.9, **SUBTRACT_LATER),
        {"snntorch": "stock", "sinabs": "stock"},
    ),
    "Leaky, subtract, no delay": (
        lambda: snn.Leaky(0.9, reset_delay=False),
        {"snntorch": "stock", "sinabs": "reset_timing"},
    ),
    "Leaky, zero": (lambda: snn.Leaky(0.9, **ZERO), {"snntorch": "stock", "sinabs": "stock"}),
    "Leaky, none": (lambda: snn.Leaky(0.9, **NONE), {"snntorch": "stock", "sinabs": "stock"}),
    "Leaky, graded": (
        lambda: snn.Leaky(0.9, graded_spikes_factor=0.5),
        {"snntorch": "stock", "sinabs": "spike_scale"},
    ),
    "Leaky, subtract, beta 0": (lambda: snn.Leaky(0.0), {"snntorch": "stock", "sinabs": "mem_decay"}),
    "Synaptic, subtract": (lambda: snn.Synaptic(0.8, 0.9), {"snntorch": "stock", "sinabs": "ours"}),
    "Synaptic, zero": (lambda: snn.Synaptic(0.8, 0.9, **ZERO), {"snntorch": "stock", "sinabs": "reset_timing"}),
    "Synaptic, zero, no delay": (
        lambda: snn.Synaptic(0.8, 0.9, **ZERO, reset_delay=False),
        {"snntorch": "stock", "sinabs": "ours"},
    ),
    "Synaptic, subtract, no delay": (
        lambda: snn.Synaptic(0.8, 0.9, reset_delay=False),
        {"snntorch": "stock", "sinabs": "reset_timing"},
    ),
    "Synaptic, none": (lambda: snn.Synaptic(0.8, 0.9, **NONE), {"snntorch": "stock", "sinabs": "ours"}),
    "Alpha": (lambda: snn.Alpha(0.9, 0.8), {"snntorch": "stock", "sinabs": "synapse"}),
    "Lapicque, subtract": (lambda: snn.Lapicque(0.9), {"snntorch": "stock", "sinabs": "ours"}),
    "Lapicque, zero": (lambda: snn.Lapicque(0.9, **ZERO), {"snntorch": "stock", "sinabs": "reset_timing"}),
    "LIF, single, subtract": (lambda: sl.LIF(9.0, **SINGLE), {"snntorch": "ours", "sinabs": "stock"}),
    "LIF, multi, subtract": (lambda: sl.LIF(9.0), {"snntorch": "ours", "sinabs": "stock"}),
    "LIF, hard": (
        lambda: sl.LIF(9.0, **SINGLE, reset_fn=activation.MembraneReset()),
        {"snntorch": "stock", "sinabs": "stock"},
    ),
    "LIF, hard, a value added": (
        lambda: sl.LIF(9.0, **SINGLE, reset_fn=activation.MembraneReset(0.1)),
        {"snntorch": "ours", "sinabs": "stock"},
    ),
    "LIF, synapse": (lambda: sl.LIF(9.0, 3.0), {"snntorch": "ours", "sinabs": "stock"}),
    "IAF": (lambda: sl.IAF(), {"snntorch": "ours", "sinabs": "stock"}),
    "IAF, hard": (
        lambda: sl.IAF(spike_fn=activation.SingleSpike, reset_fn=activation.MembraneReset()),
        {"snntorch": "stock", "sinabs": "stock"},
    ),
    "ExpLeak": (lambda: sl.ExpLeak(9.0), {"snntorch": "ours", "sinabs": "stock"}),
    "ALIF": (lambda: sl.ALIF(9.0, 9.0), {"snntorch": "adapt_scale", "sinabs": "stock"}),
    "Leaky, rounded": (
        lambda: snn.Leaky(0.9, state_quant=quantizer(4)),
        {"snntorch": "stock", "sinabs": "state_levels"},
    ),
    "Leaky, unevenly rounded": (
        lambda: snn.Leaky(0.9, state_quant=quantizer(4, uniform=False)),
        {"snntorch": "ours", "sinabs": "state_levels"},
    ),
}


@pytest.mark.parametrize("to", ["snntorch", "sinabs"])
@pytest.mark.parametrize("name", CLASSES)
def test_equal_with_a_callable_or_impossible(name, to):
    make, expected = CLASSES[name][0], CLASSES[name][1][to]
    spec = adapters.spec(make())
    assert isinstance(adapters.build(spec, "tracetorch"), tt.snn.SpecNeuron)
    if expected in ("stock", "ours"):
        built = adapters.build(spec, to)
        assert type(built).__module__.startswith((to, "tracetorch"))
    if expected == "stock":
        built = adapters.build(spec, to, stock=True)
        assert type(built).__module__.startswith(to)
        return
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(spec, to, stock=expected == "ours")
    error = caught.value
    if expected != "ours":
        assert error.field == expected
    message = str(error)
    assert all(part in message for part in ("the layer: ", error.field, error.remedy, "Remedy: "))


@pytest.mark.parametrize("wrong", ["mem_decay", "threshold"])
def test_the_grid_notices_a_wrong_parameter(wrong):
    """A target one hundredth off must be a fault."""
    from tests import layer_grid

    layer = snn.Leaky(0.9, init_hidden=True)
    xs = torch.rand(40, 3, N, generator=torch.Generator().manual_seed(1))
    cotangent = torch.ones_like(xs)
    found = Found()
    source = layer_grid.check_source(found, layer, xs, cotangent)
    assert not found.faults
    values = dict(source.spec.parameters)
    values[wrong] = tt.Parameter(values[wrong].value * values[wrong].value.dtype.type(1.01), False, values[wrong].raw)
    honest = source.spec
    source.spec = honest.replace(parameters=values)
    target = tt.snn.SpecNeuron(honest)
    seen = layer_grid.observe(target, xs, cotangent)
    assert not layer_grid.oracle.judge(source.spec, seen.recording).ok
    assert layer_grid.oracle.judge(honest, seen.recording).ok
