"""Gradients of recurrent layers: the oracle's against finite differences, the frameworks' against the oracle's."""

import warnings

import numpy as np
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from snntorch.functional import quant
from torch import nn

import tracetorch as tt
from tracetorch import adapters, oracle
from tracetorch.adapters.feedback import Feedback
from tracetorch.adapters.networks.recurrent import adapter_of
from tracetorch.adapters.registry import adapter
from tracetorch.functional.surrogates import Surrogate
from tracetorch.snn.recurrent import Recurrent

T, B, N = 7, 2, 3


def parameter(number):
    return tt.Parameter(np.asarray(number, np.float64), True)


def smooth(reset, synapse, gain):
    numbers = {"mem_decay": parameter(0.8), "threshold": parameter([0.5, 0.7, 0.6]), "spike_scale": parameter(1.5)}
    if reset == "value":
        numbers["reset_value"] = parameter(0.1)
    if synapse != "none":
        numbers["syn_decay"] = parameter(0.6)
    return tt.NeuronSpec(
        "tracetorch",
        reset=reset,
        synapse=synapse,
        input_gain=gain,
        spike_count="smooth",
        surrogate=Surrogate("logistic", (("slope", 3.0),)),
        parameters=numbers,
    )


def run(spec, x, weight, bias, from_start):
    """The recurrent layer as a loop over the oracle's own steps: outputs, what the neuron received, states."""
    eq = oracle.equations(spec)
    i = np.zeros(x.shape[1:])
    v = np.broadcast_to(eq.v_first, x.shape[1:])
    out, drives, states = np.zeros(x.shape[1:]), [], []
    outputs = []
    for t, x_t in enumerate(x):
        drive = x_t + (out @ weight.T + bias if t or from_start else 0.0)
        step = oracle.advance(eq, drive, i, v)
        i, v, out = step.i, step.v, eq.g * step.s
        drives.append(drive)
        outputs.append(out)
        states.append({"v_mem": v, "i_syn": i})
    kept = {name: np.stack([s[name] for s in states]) for name in spec.states}
    return np.stack(outputs), oracle.Recording(np.stack(drives), np.stack(outputs), kept, spec)


def linear(weight, bias):
    layer = nn.Linear(N, N).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


class Layer(Recurrent):
    """A recurrent layer of which only the connection counts."""

    def __init__(self, connection, from_start):
        super().__init__(tt.snn.SpecNeuron(adapters.spec(snn.Leaky(0.9, init_hidden=True))), connection, from_start)


CASES = [
    ("subtract", "none", "one", True),
    ("subtract", "decay_then_add", "one", False),
    ("value", "moving_average", "one_minus_decay", True),
    ("none", "read_then_decay", "one", False),
    ("value", "none", "one_minus_decay", False),
]


@pytest.mark.parametrize(("reset", "synapse", "gain", "from_start"), CASES)
def test_the_oracle_s_gradients_are_finite_differences(reset, synapse, gain, from_start):
    """A smooth spike is differentiable: every gradient, the connection's too, by moving every number a little."""
    generator = np.random.default_rng(5)
    spec, x = smooth(reset, synapse, gain), generator.uniform(0, 1.2, (T, B, N))
    weight, bias, g = generator.normal(size=(N, N)), generator.normal(size=N), generator.normal(size=(T, B, N))

    def loss(x=x, weight=weight, bias=bias, spec=spec):
        return float((run(spec, x, weight, bias, from_start)[0] * g).sum())

    def slope(name, value, at):
        moved = [value.copy(), value.copy()]
        moved[0][at] += 1e-6
        moved[1][at] -= 1e-6
        return (loss(**{name: moved[0]}) - loss(**{name: moved[1]})) / 2e-6

    outputs, recording = run(spec, x, weight, bias, from_start)
    layer = Layer(linear(weight, bias), from_start)
    back = Feedback(layer, layer, torch.tensor(outputs))
    found = oracle.gradients(spec, recording, g, back.backward)
    own = back.parameters(found["x"])
    for name, value, gradient in (
        ("x", x, found["x"]),
        ("weight", weight, own["connection.weight"]),
        ("bias", bias, own["connection.bias"]),
    ):
        truth = np.array([slope(name, value, at) for at in np.ndindex(value.shape)]).reshape(value.shape)
        assert np.abs(gradient - truth).max() < 1e-7 * np.abs(truth).max() + 1e-8, name
    for name, parameter_ in spec.parameters.items():
        truth = np.zeros(parameter_.value.shape)
        for at in np.ndindex(parameter_.value.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = parameter_.value.copy()
                moved[at] += step
                ends.append(loss(spec=spec.replace(parameters={**spec.parameters, name: parameter(moved)})))
            truth[at] = (ends[0] - ends[1]) / 2e-6
        assert np.abs(found[name] - truth).max() < 1e-7 * np.abs(truth).max() + 1e-8, name
    without = oracle.gradients(spec, recording, g)
    assert np.abs(without["x"] - found["x"]).max() > 1e-2, "the feedback is a part of it"


def layers():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(6, 6))
    return {
        "RLeaky": snn.RLeaky(0.9, linear_features=6, init_hidden=True, learn_beta=True, learn_threshold=True),
        "RLeaky, zero": snn.RLeaky(0.8, linear_features=6, init_hidden=True, reset_mechanism="zero", learn_beta=True),
        "RLeaky, one to one": snn.RLeaky(
            0.9,
            V=torch.tensor([-0.5, 0.5, 0.2, 1.0, -1.0, 0.3]),
            all_to_all=False,
            init_hidden=True,
            learn_threshold=True,
        ),
        "RLeaky, frozen": snn.RLeaky(0.9, linear_features=6, init_hidden=True, learn_recurrent=False, learn_beta=True),
        "RLeaky, fixed": snn.RLeaky(
            0.9, V=torch.tensor(0.4), all_to_all=False, init_hidden=True, learn_recurrent=False, learn_beta=True
        ),
        "RSynaptic": snn.RSynaptic(0.7, 0.9, linear_features=6, init_hidden=True, learn_alpha=True, learn_beta=True),
        "LIFRecurrent": sl.LIFRecurrent(10.0, dense, norm_input=False),
        "IAFRecurrent": sl.IAFRecurrent(dense),
    }


def converted(name, to):
    layer = layers()[name]
    x = torch.rand(30, 2, 6, generator=torch.Generator().manual_seed(2)) * 2 - 0.4
    x = x if name[0] == "R" else x.transpose(0, 1)
    result = adapters.convert(nn.Sequential(layer), to=to, sample=x, time_dim=0 if name[0] == "R" else 1)
    return result, x


@pytest.mark.parametrize("to", ["tracetorch", "snntorch", "sinabs"])
@pytest.mark.parametrize("name", layers())
def test_the_oracle_judges_every_recurrent_layer(name, to):
    if name == "RLeaky, zero" and to != "tracetorch":
        with pytest.raises(adapters.ConversionError, match="next_step_discards_input"):
            converted(name, to)
        return
    result, _ = converted(name, to)
    row = result.agreement.rows[0]
    assert result.agreement.ok
    assert row.spikes > 30
    assert row.gradient in ("exact", "rounding", "reparametrised")
    assert 0 < row.gradient_error < 1e-4, "against float64; 0 would be no measurement"


class CutLinear(nn.Linear):
    """A connection that gives its input no gradient."""

    def forward(self, x):
        return super().forward(x.detach())


class CutSequential(nn.Sequential):
    """Likewise."""

    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize("to", ["tracetorch", "snntorch", "sinabs"])
@pytest.mark.parametrize("name", ["RLeaky", "LIFRecurrent"])
def test_a_feedback_without_a_gradient_is_seen(name, to):
    result, x = converted(name, to)
    layer = next(m for m in result.model.modules() if hasattr(m, "connection") or hasattr(m, "rec_connect"))
    connection = layer.connection if hasattr(layer, "connection") else layer.rec_connect
    connection.__class__ = CutLinear if isinstance(connection, nn.Linear) else CutSequential
    row = result.verify(x).rows[0]
    assert row.gradient == "differs"
    assert row.unexpected


def test_the_bound_of_a_recurrent_layer_holds_and_tells():
    layer = Recurrent(tt.snn.SpecNeuron(adapters.spec(snn.Leaky(0.9, learn_beta=True))), linear_small(), True)
    x = torch.rand(20, 2, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
    ys, states = adapter_of(layer, adapter("tracetorch")).trace(layer, x)
    weights = torch.randn(ys.shape, generator=torch.Generator().manual_seed(4))
    wanted = {"x": x, "mem_decay": layer.neuron.mem_decay, "connection.weight": layer.connection.weight}
    found = dict(zip(wanted, torch.autograd.grad(ys, list(wanted.values()), weights), strict=True))
    spec = layer.neuron.spec
    kept = {name: states[name].detach().numpy() for name in spec.states}
    recording = oracle.Recording(states["drive"].detach().numpy(), ys.detach().numpy(), kept, spec)
    back = Feedback(layer, layer, ys)
    truth = oracle.gradients(spec, recording, weights.numpy(), back.backward)
    bound = oracle.gradient_bounds(spec, recording, weights.numpy(), (back.backward, back.magnitudes))
    bound |= back.parameter_bounds(truth["x"], bound["x"], torch.float32)
    truth |= back.parameters(truth["x"])
    for name, gradient in found.items():
        off = np.abs(gradient.numpy() - truth[name])
        assert off.max() > 0, name
        assert (off <= bound[name]).all(), name
        assert bound[name].max() < 0.01 * np.abs(truth[name]).max(), name


def linear_small():
    torch.manual_seed(1)
    return nn.Linear(6, 6)


def test_a_connection_that_is_not_linear_has_no_bound():
    layer = Recurrent(
        tt.snn.SpecNeuron(adapters.spec(snn.Leaky(0.9))), nn.Sequential(linear_small(), nn.Tanh()), from_start=True
    )
    assert not Feedback(layer, layer, torch.zeros(3, 2, 6)).bounded
    x = torch.rand(20, 2, 6, generator=torch.Generator().manual_seed(3)) * 2
    result = adapters.convert(nn.Sequential(layer), to="snntorch", sample=x, time_dim=0)
    assert result.agreement.ok
    assert result.agreement.rows[0].gradient_error < 1e-4


def inhibited():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Inhibition is an unstable feature")
        return snn.Leaky(0.9, threshold=0.5, init_hidden=True, learn_beta=True, inhibition=True)


ROUND = tt.functional.round_ste()
NEURONS = {
    "a difference of exponentials": lambda: snn.Alpha(0.9, 0.8, threshold=0.3, init_hidden=True, learn_beta=True),
    "spikes of two signs": lambda: tt.snn.LIT(6, pos_threshold=0.6, neg_threshold=0.4, quant_fn=ROUND),
    "one winner": inhibited,
    "states on levels": lambda: snn.Synaptic(
        0.8, 0.9, threshold=0.5, init_hidden=True, learn_beta=True, state_quant=quant.state_quant(num_bits=4)
    ),
}


@pytest.mark.parametrize("name", NEURONS)
def test_a_recurrence_around_any_neuron(name):
    """The oracle's gradients, derived by hand, against those of the native layer by autograd."""
    layer = Recurrent(tt.snn.SpecNeuron(adapters.spec(NEURONS[name]())), linear_small(), from_start=True)
    x = (torch.rand(20, 2, 6, generator=torch.Generator().manual_seed(3)) - 0.3) * 2
    row = adapters.convert(nn.Sequential(layer), to="tracetorch", sample=x, time_dim=0).agreement.rows[0]
    assert row.spikes > 3
    assert row.gradient == "exact"
    assert 0 < row.gradient_error < 1e-4
