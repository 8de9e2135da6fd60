"""sinabs's other classes, IAF, ALIF and ExpLeak, and its fused twins, are read, computed and built."""

import copy

import pytest
import sinabs.layers as sl
import torch
from torch import nn

import tracetorch as tt
from tests.adapter_checks import bits
from tests.sinabs_layers import SPIKES, B, N, T, lif
from tracetorch import adapters
from tracetorch.adapters import sinabs as ours
from tracetorch.adapters.base import Building, parameters
from tracetorch.adapters.registry import adapter, adapter_of

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


# ---- fused twins, and what an ALIF forgets ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["IAF", "ALIF", "IAF, synapse"])
def test_a_fused_twin_is_read_as_its_original(name):
    layer = OTHERS[name]()
    twin = tt.fuse(nn.Sequential(layer))[0]
    assert type(twin) is not type(layer)
    assert adapters.spec(twin) == adapters.spec(layer)
    assert adapters.spec(tt.fuse(nn.Sequential(lif()))[0]) == adapters.spec(lif())


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
