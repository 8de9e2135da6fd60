"""The 32 native layers as source and target: those that a spec describes, bit for bit; the others refused by name."""

import copy

import numpy as np
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from torch import nn

import tracetorch as tt
from tests.adapter_checks import bits
from tracetorch import adapters, oracle
from tracetorch.adapters.registry import adapter_of
from tracetorch.core.spec import SpecError
from tracetorch.functional.surrogates import Surrogate

T, B, N = 60, 3, 5
ALL = [
    name
    for name in dir(tt.snn)
    if isinstance(getattr(tt.snn, name), type) and hasattr(getattr(tt.snn, name), "parts") and name != "Composed"
]
MEMBRANES = ("LI", "LIEMA", "SLI", "SLIEMA")
SPIKING = ("LIB", "SLIB")
# name -> (arguments, spike_count, surrogate)
FIRES = {
    "smooth": ({}, "smooth", Surrogate("logistic")),
    "hard": ({"quant_fn": tt.functional.round_ste()}, "single", Surrogate("logistic")),
    "atan": (
        {"spike_fn": tt.functional.surrogate_spike("atan", alpha=3.0)},
        "single",
        Surrogate("atan", {"alpha": 3.0}),
    ),
    "fast sigmoid, rounded": (
        {"spike_fn": tt.functional.surrogate_spike("fast_sigmoid"), "quant_fn": tt.functional.round_ste()},
        "single",
        Surrogate("fast_sigmoid"),
    ),
}


def stimulus():
    return torch.rand(T, B, N, generator=torch.Generator().manual_seed(1)) * 2 - 0.5


def layer_of(name, **options):
    torch.manual_seed(0)
    per_neuron = {"beta": torch.rand(N) * 0.5 + 0.3}
    if name.startswith("S"):
        per_neuron["alpha"] = torch.rand(N) * 0.5 + 0.3
    if name in SPIKING:
        per_neuron |= {"threshold": torch.rand(N) + 0.5, "bias": torch.rand(N) * 0.2}
    return getattr(tt.snn, name)(N, **per_neuron, **options)


def test_there_are_32_of_them():
    assert len(ALL) == 32
    assert set(MEMBRANES + SPIKING) < set(ALL)


def traced(layer, xs):
    """Outputs, states and the gradients of the input and of all that is trained, by the spec's names."""
    xs = xs.clone().requires_grad_()
    own = adapter_of(layer)
    outputs, states = own.trace(layer, xs)
    named = {n: getattr(layer, a) for n, a in own.attributes(layer).items()}
    named = {n: t for n, t in named.items() if t.requires_grad}
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((outputs * weights).sum(), [xs, *named.values()])
    return outputs, states, dict(zip(["x", *named], grads, strict=True))


def assert_same(layer, other):
    xs = stimulus()
    (theirs, states, grads), (mine, own, own_grads) = traced(layer, xs), traced(other, xs)
    assert bits(mine) == bits(theirs)
    assert {n: bits(s) for n, s in own.items()} == {n: bits(s) for n, s in states.items()}
    assert bits(own_grads["x"]) == bits(grads["x"])
    for name, gradient in grads.items():
        torch.testing.assert_close(own_grads[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MEMBRANES)
def test_a_membrane_layer_is_read_and_rebuilt(name):
    layer = layer_of(name)
    spec = adapters.spec(layer)
    assert (spec.output, spec.form) == ("membrane", "tracetorch.LI")
    assert (spec.synapse == "moving_average") == name.startswith("S")
    assert (spec.input_gain == "one_minus_decay") == name.endswith("EMA")
    built = adapters.build(spec, "tracetorch", stock=True)
    assert type(built) is type(layer)
    assert adapters.spec(built) == spec
    assert_same(layer, tt.snn.SpecNeuron(spec))
    assert_same(layer, built)


@pytest.mark.parametrize("fires", FIRES)
@pytest.mark.parametrize("name", SPIKING)
def test_a_spiking_layer_is_read_and_rebuilt(name, fires):
    options, count, surrogate = FIRES[fires]
    layer = layer_of(name, **options)
    spec = adapters.spec(layer)
    assert (spec.spike_count, spec.surrogate, spec.comparison) == (count, surrogate, ">")
    built = adapters.build(spec, "tracetorch", stock=True)
    assert type(built) is type(layer)
    assert adapters.spec(built) == spec
    assert_same(layer, tt.snn.SpecNeuron(spec))
    assert_same(layer, built)
    outputs, _, _ = traced(layer, stimulus())
    assert 0.02 < outputs.mean() < 0.98


@pytest.mark.parametrize("name", sorted(name for name in ALL if "D" in name or "R" in name))
def test_the_others_are_refused_by_name(name):
    """Those of two signs: test_native_signed.py."""
    layer = getattr(tt.snn, name)(N)
    with pytest.raises(SpecError) as caught:
        adapters.spec(layer)
    assert name in str(caught.value)
    expected = "parts D" if layer.parts.dual else "parts R"
    assert expected in str(caught.value)
    assert "to='tracetorch'" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 1}, "dim=1"),
        ({"spike_fn": torch.sigmoid}, "spike_fn="),
        ({"spike_fn": tt.functional.surrogate_spike("single_exponential")}, "scales with the threshold"),
        ({"quant_fn": tt.functional.round_ste(0.5)}, "quant_fn="),
    ],
)
def test_options_without_a_field_are_refused(options, said):
    with pytest.raises(SpecError, match=said):
        adapters.spec(tt.snn.LIB(N, **options))


class Child(tt.snn.LIB):
    """A subclass with code of its own may compute anything."""

    def step(self, x, *states):
        return super().step(-x, *states)


class Named(tt.snn.LIB):
    """A subclass without any computes what its parts say."""


def test_a_subclass_with_code_of_its_own_is_refused():
    with pytest.raises(SpecError, match="Child"):
        adapters.spec(Child(N))
    assert adapters.spec(Named(N)).form == "tracetorch.LIB"


# ---- from other frameworks into the 32 -------------------------------------------------------------------------------

INTO = {
    "LI": sl.ExpLeak(8.0),
    "LIEMA": sl.ExpLeak(8.0, norm_input=True),
    "LI of a StateLeaky": snn.StateLeaky(0.8, N, output=False),
}


@pytest.mark.parametrize("name", INTO)
def test_an_integrator_becomes_a_layer_of_its_own_name(name):
    spec = adapters.spec(INTO[name])
    built = adapters.build(spec, "tracetorch", stock=True)
    assert type(built).__name__ == name.split()[0]
    xs = stimulus()
    own = adapter_of(built)
    outputs, states = own.trace(built, xs)
    recording = oracle.Recording(
        xs.numpy(), outputs.detach().numpy(), {n: s.detach().numpy() for n, s in states.items()}, own.spec(built)
    )
    assert oracle.judge(spec, recording).ok


def lib_like(**changes):
    """sinabs's subtraction with a strict comparison: what the family LIB computes."""
    layer = sl.LIF(5.0, spike_fn=activation.SingleSpike, norm_input=False)
    spec = adapters.spec(layer)
    return spec.replace(**{"comparison": ">", "surrogate": Surrogate("atan"), **changes})


def test_a_strict_subtracting_layer_becomes_a_lib():
    built = adapters.build(lib_like(), "tracetorch", stock=True)
    assert type(built) is tt.snn.LIB
    assert built.spike_fn.surrogate == Surrogate("atan")
    assert not built.raw_bias.requires_grad
    assert built.raw_beta.requires_grad
    assert not built.raw_threshold.requires_grad
    np.testing.assert_allclose(built.beta.item(), np.exp(-1 / 5.0), rtol=1e-6)
    assert built(torch.rand(2, 9)).shape == (2, 9)
    assert adapters.spec(copy.deepcopy(built)) == adapters.spec(built)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"reset": "none"}, "reset"),
        ({"reset_amount": "threshold_over_decay"}, "reset_amount"),
        ({"reset_timing": "same_step_residual"}, "reset_timing"),
        ({"input_gain": "one_minus_decay"}, "input_gain"),
        ({"comparison": ">=", "spike_count": "multiple"}, "spike_count"),
    ],
)
def test_what_the_32_have_not_is_refused_by_name(changes, field):
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(lib_like(**changes), "tracetorch", stock=True)
    assert caught.value.field == field
    assert "SpecNeuron" in caught.value.remedy


def test_a_surrogate_that_scales_with_the_threshold_needs_a_constant_one():
    single = Surrogate("single_exponential")
    built = adapters.build(lib_like(surrogate=single), "tracetorch", stock=True)
    assert (built.spike_fn.surrogate, built.spike_fn.threshold) == (single, 1.0)
    assert adapters.spec(built).surrogate == single
    for threshold in (
        tt.Parameter(np.float32(1.0), learnable=True),
        tt.Parameter(np.array([1.0, 0.8], np.float32)),
    ):
        spec = lib_like(surrogate=single)
        wide = spec.replace(parameters={**spec.parameters, "threshold": threshold})
        with pytest.raises(adapters.ConversionError, match="one number") as caught:
            adapters.build(wide, "tracetorch", stock=True)
        assert caught.value.field == "surrogate"
    other = tt.functional.surrogate_spike("single_exponential", threshold=0.9)
    fixed = {"threshold_rank": 0, "learn_threshold": False}
    with pytest.raises(SpecError, match="must be the layer's"):
        adapters.spec(tt.snn.LIB(N, spike_fn=other, **fixed))


def test_a_detached_reset_is_noted():
    """The forward pass is the same; only the gradient is not."""
    source, xs = nn.Sequential(tt.snn.SpecNeuron(lib_like(reset_gradient="detached", form="sinabs.LIF"))), stimulus()
    row = adapters.convert(source, to="tracetorch", sample=xs, time_dim=0, stock=True).report[0]
    assert (row.target, row.gradient) == ("tracetorch.LIB", "differs")
    assert row.forward in ("exact", "rounding")
    assert not row.unexpected
    assert "reset_gradient" in row.reason


@pytest.mark.parametrize(
    ("layer", "field"),
    [
        (sl.IAF(spike_fn=activation.SingleSpike), "decay"),
        (sl.LIF(5.0, tau_syn=2.0), "synapse"),
        (sl.LIF(5.0, min_v_mem=-1.0, norm_input=False), "clamp"),
        (sl.ALIF(5.0, 5.0, norm_input=False), "adapt_scale"),
        (snn.Leaky(0.9, reset_mechanism="zero"), "reset"),
        (snn.Leaky(0.9, graded_spikes_factor=0.5), "spike_scale"),
        (snn.Alpha(0.9, 0.8), "synapse"),
        (snn.Leaky(1.0, reset_mechanism="none"), "reset"),
    ],
)
def test_layers_that_are_none_of_the_32_are_refused_by_name(layer, field):
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(adapters.spec(layer), "tracetorch", stock=True)
    assert caught.value.field == field


def test_a_decay_of_1_has_no_raw_beta():
    spec = adapters.spec(sl.ExpLeak(8.0, train_alphas=True))
    one = {"mem_decay": tt.Parameter(np.float32(1.0))}
    with pytest.raises(adapters.ConversionError, match="inside") as caught:
        adapters.build(spec.replace(parameters=one), "tracetorch", stock=True)
    assert caught.value.field == "mem_decay"


@pytest.mark.parametrize("name", [*MEMBRANES, *SPIKING])
@pytest.mark.parametrize("to", ["snntorch", "sinabs"])
def test_a_native_layer_into_the_frameworks(to, name):
    options = {"quant_fn": tt.functional.round_ste(), "bias": 0.0, "learn_bias": False} if name in SPIKING else {}
    layer = getattr(tt.snn, name)(N, **options)
    row = adapters.convert(nn.Sequential(layer), to=to, sample=stimulus(), time_dim=0).report[0]
    assert row.forward in ("exact", "rounding")
    assert row.gradient in ("exact", "rounding", "reparametrised")
    assert row.unexplained_mismatches == row.state_violations == 0
