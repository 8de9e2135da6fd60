"""A snnTorch layer built from a spec: stock where it can be, and copies, files and training keep what it means."""

import copy
import io

import numpy as np
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from snntorch import surrogate as stock
from torch import nn

import tracetorch as tt
from tests.adapter_checks import bits, by_deepcopy, by_file
from tests.snntorch_layers import RESETS, B, N, assert_bit_identical, leaky, other, per_neuron, run, stimulus
from tracetorch import adapters
from tracetorch.adapters import snntorch as ours
from tracetorch.adapters.registry import adapter_of
from tracetorch.core.spec import SpecError

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


# ---- training --------------------------------------------------------------------------------------------------------


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
