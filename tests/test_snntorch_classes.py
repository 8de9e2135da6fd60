"""snnTorch's other classes and its fused twins are read, computed bit for bit and built of stock parts."""

import math

import pytest
import snntorch as snn
import torch
from torch import nn

import tracetorch as tt
from tests.adapter_checks import bits
from tests.snntorch_layers import OTHERS, B, N, T, leaky, other, run, stimulus
from tracetorch import adapters
from tracetorch.adapters import snntorch as ours
from tracetorch.adapters.base import Building
from tracetorch.core.spec import SpecError

# ---- the other classes -----------------------------------------------------------------------------------------------

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


# ---- fused twins -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OTHERS)
def test_a_fused_twin_is_read_as_its_original(cls):
    layer = OTHERS[cls][0](learn_threshold=True)
    twin = tt.fuse(nn.Sequential(layer))[0]
    assert type(twin) is not type(layer)
    assert adapters.spec(twin) == adapters.spec(layer)
