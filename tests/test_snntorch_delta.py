"""snnTorch's `DeltaLeaky`: spikes where the membrane changes; computed bit for bit, judged, and refused by name."""

import pickle

import pytest
import snntorch as snn
import torch
from snntorch import surrogate
from torch import nn

import tracetorch as tt
from tracetorch import adapters, oracle
from tracetorch.adapters.registry import adapter
from tracetorch.core.spec import NeuronSpec, SpecError

T, B, N = 150, 3, 5


@pytest.fixture(autouse=True)
def instances(monkeypatch):
    """Quirk of snntorch 1.0.0: a DeltaLeaky's membrane is None, over which `utils.reset` of any other net stumbles."""
    monkeypatch.setattr(snn.SpikingNeuron, "instances", [])


def layer_of(**options):
    options = {"beta": 0.9, "init_hidden": True, "spike_grad": surrogate.fast_sigmoid(3)} | options
    return snn.DeltaLeaky(options.pop("delta_threshold", 0.5), **options)


LAYERS = {
    "plain": {},
    "learned beta per neuron": {"beta": torch.linspace(0.5, 1.2, N), "learn_beta": True},
    "learned delta": {"delta_threshold": nn.Parameter(torch.linspace(0.2, 1, N))},
    "states handed in": {"init_hidden": False},
    "options without a part": {"threshold": 7.0, "reset_mechanism": "zero", "graded_spikes_factor": 0.5},
}


def run(framework, layer, xs):
    own = adapter(framework)
    xs = xs.detach().clone().requires_grad_()
    outputs, states = own.trace(layer, xs)
    weights = torch.linspace(-1, 1, outputs.numel()).reshape(outputs.shape)
    (outputs * weights).sum().backward()
    tensors = {name: getattr(layer, attribute) for name, attribute in own.attributes(layer).items()}
    return outputs, states, {"x": xs.grad, **{n: t.grad for n, t in tensors.items() if t.requires_grad}}, weights


def recorded(xs, outputs, states, spec):
    arrays = {name: state.detach().numpy() for name, state in states.items()}
    return oracle.Recording(xs.detach().numpy(), outputs.detach().numpy(), arrays, spec)


@pytest.mark.parametrize("name", LAYERS)
def test_native_computes_the_same_bits_and_the_oracle_agrees(name):
    torch.manual_seed(0)
    layer = layer_of(**LAYERS[name])
    spec = adapters.spec(layer)
    assert (spec.spike_test, spec.reset, spec.parameters["mem_decay"].raw) == ("change", "none", "value")
    assert NeuronSpec.from_json(spec.to_json()) == spec
    xs = torch.randn(T, B, N)
    outputs, states, grads, weights = run("snntorch", layer, xs)
    same, kept, slopes, _ = run("tracetorch", adapters.build(spec, "tracetorch"), xs)
    assert torch.equal(outputs, same)
    assert torch.equal(states["v_mem"], kept["v_mem"])
    assert torch.equal(grads["x"], slopes["x"])
    recording = recorded(xs, outputs, states, spec)
    judgement = oracle.judge(spec, recording)
    assert judgement.ok
    assert 50 < judgement.spikes < judgement.slots
    fallen = torch.diff(states["v_mem"], dim=0) < 0
    assert bool(outputs[1:][fallen].any())
    truth = oracle.gradients(spec, recording, weights.numpy())
    for own, gradient in slopes.items():
        assert oracle.gradient_error(gradient.numpy(), truth[own]) < 1e-4, own
        assert own not in grads or oracle.gradient_error(grads[own].numpy(), truth[own]) < 1e-4, own


def test_the_kernel_gives_the_bits_of_the_step_loop():
    native, xs = adapters.build(adapters.spec(layer_of()), "tracetorch"), torch.randn(40, B, N, requires_grad=True)
    found = []
    for backend in ("cpu", "eager"):
        native.reset_states()
        with tt.backend(backend):
            ys = native.unroll(xs)
        found.append([ys, native.v_mem, *torch.autograd.grad(ys.sum(), [xs])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_spikes_of_the_membrane_are_seen():
    spec = adapters.spec(layer_of())
    wrong = adapters.build(spec.replace(form="snntorch.Leaky", spike_test="membrane"), "tracetorch")
    xs = torch.randn(T, B, N)
    outputs, states, _, _ = run("tracetorch", wrong, xs)
    assert oracle.judge(spec, recorded(xs, outputs, states, spec)).unexplained > 50


def test_a_tie_with_delta_is_no_spike():
    spec = adapters.spec(layer_of(delta_threshold=0.5, beta=1.0))
    xs = torch.tensor([0.5, -0.5, 0.75, -0.75, 0.5]).reshape(5, 1, 1)
    outputs = run("tracetorch", adapters.build(spec, "tracetorch"), xs)[0]
    assert outputs.flatten().tolist() == [0, 0, 1, 1, 0]
    inclusive = adapters.build(spec.replace(comparison=">="), "tracetorch")
    wrong, kept, _, _ = run("tracetorch", inclusive, xs)
    assert oracle.judge(spec, recorded(xs, wrong, kept, spec)).unexplained == 3


@pytest.mark.parametrize(("to", "stock"), [("tracetorch", False), ("snntorch", False), ("snntorch", True)])
def test_a_network_that_ends_with_it_is_converted_exactly(to, stock):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, N), layer_of(learn_beta=True))
    xs = torch.randn(40, B, 6)
    result = tt.convert(net, to=to, sample=xs, time_dim=0, stock=stock)
    assert result.verify(xs, grad=True).ok
    assert [row.forward for row in result.report.rows] == ["exact", "exact"]


def test_a_converted_layer_pickles_and_returns_its_spikes():
    layer = adapters.build(adapters.spec(layer_of()), "snntorch")
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(B, N)
    assert torch.equal(again(x), layer(x))
    assert adapters.spec(again) == adapters.spec(layer)


@pytest.mark.parametrize(("to", "stock"), [("sinabs", False), ("brainpy", False), ("tracetorch", True)])
def test_a_framework_without_it_refuses(to, stock):
    pytest.importorskip(to)
    with pytest.raises(adapters.ConversionError, match=r"(spike_test='change'|reset='none').*Remedy: "):
        adapters.build(adapters.spec(layer_of()), to, stock=stock)


@pytest.mark.parametrize("to", ["spikingjelly", "norse"])
def test_no_stock_node_loses_it_in_silence(to):
    pytest.importorskip(to)
    with pytest.raises(adapters.ConversionError, match=r"spike_test='change'.*Remedy: stock=False"):
        adapters.build(adapters.spec(layer_of()), to, stock=True)


def test_it_goes_with_no_reset():
    with pytest.raises(SpecError, match="spike_test='change' needs reset='none', not 'subtract'"):
        adapters.spec(snn.Leaky(0.9)).replace(spike_test="change")
