"""brainpy.state: LIF and IF read, built and converted; every field, refusals by name, the oracle's equations."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("brainpy")

import brainpy.state as bp
import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
from braintools import init, surrogate

import tracetorch as tt
from tests.bits import assert_bits
from tests.pipeline_cases import N, lif, stimulus
from tracetorch import NeuronSpec, Parameter, adapters, oracle
from tracetorch.adapters import ConversionError, JaxStage
from tracetorch.core.spec import SpecError
from tracetorch.functional.surrogates import Surrogate


def grid():
    """(reset, V_rest and V_reset, per neuron, dt)."""
    return itertools.product(("soft", "hard"), ((0.0, 0.0), (0.2, -0.3)), (False, True), (0.01, 0.1, 1.0))


def layer_of(reset, rest, each):
    th = np.linspace(0.8, 1.3, N).astype("f4") if each else 1.0
    tau = np.linspace(2, 20, N).astype("f4") if each else 7.0
    r = np.linspace(1, 3, N).astype("f4") if each else 1.0 if rest == (0.0, 0.0) else 2.0
    numbers = {"R": r * u.ohm, "tau": tau * u.ms, "V_th": th * u.mV}
    numbers |= {"V_rest": rest[0] * u.mV, "V_reset": rest[1] * u.mV}
    return bp.LIF(N, spk_reset=reset, **numbers)


def sample(dt, steps=200, seed=0):
    gain = 1.5 / np.sqrt(1 - np.exp(-dt / 7.0))
    return stimulus(steps, 4, seed).transpose(0, 1) * float(gain) + 0.3


def checked(conversion):
    """Membranes to 1e-5 relative, no unexplained spike."""
    row = conversion.report[0]
    assert row.forward in ("exact", "rounding"), str(conversion.report)
    assert row.gradient in ("exact", "rounding", "reparametrised"), str(conversion.report)
    assert row.unexplained_mismatches == row.state_violations == 0
    assert row.spikes > 0
    assert row.max_state_difference < 1e-5, row.max_state_difference
    assert row.gradient_error < 1e-4
    return conversion.model


SOME = {("soft", (0.2, -0.3), True, 0.1, "snntorch"), ("hard", (0.2, -0.3), True, 1.0, "sinabs")}
CASES = [
    pytest.param(*case, to, marks=[] if (*case, to) in SOME else pytest.mark.sweep)
    for case in grid()
    for to in ("tracetorch", "sinabs", "snntorch")
]


@pytest.mark.parametrize(("reset", "rest", "each", "dt", "to"), CASES)
def test_there_and_back(reset, rest, each, dt, to):
    xs = sample(dt)
    there = checked(adapters.convert(layer_of(reset, rest, each), to=to, sample=xs, time_dim=1, dt=dt))
    back = checked(adapters.convert(there, to="brainpy", sample=xs, time_dim=1))
    layer, source = adapters.to_brainstate(back), layer_of(reset, rest, each)
    assert type(layer) is bp.LIF
    assert layer.spk_reset == reset
    for name in ("R", "V_th", "V_reset", "V_rest"):
        want, got = (np.asarray(getattr(each, name).to_decimal(_unit(name))) for each in (source, layer))
        assert np.allclose(got, want, rtol=1e-6, atol=1e-7), name
    assert repr(layer.spk_fun) == repr(source.spk_fun)


def _unit(name):
    return u.ohm if name == "R" else u.mV


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_the_native_layer_trains_alike(reset):
    """Gradients of the input and of the learned numbers, layer against layer."""
    stage = JaxStage(lif(reset), dt=1.0, learn=["R", "tau", "V_rest"], time_dim=1)
    spec = adapters.spec(stage)
    assert {n for n, p in spec.parameters.items() if p.learnable} == {"mem_decay", "resistance", "leak"}
    neuron = tt.snn.SpecNeuron(spec)
    found = []
    for run in (lambda x: neuron.unroll(x), lambda x: stage(x.transpose(0, 1)).transpose(0, 1)):
        xs = stimulus(steps=80).requires_grad_()
        ys = run(xs)
        (ys * stimulus(steps=80, seed=9)).sum().backward()
        found.append((ys.detach(), xs.grad))
    assert_bits(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
    for ours, theirs in (("resistance", "R"), ("mem_decay", "tau"), ("leak", "V_rest")):
        torch.testing.assert_close(getattr(neuron, ours).grad, getattr(stage, theirs).grad, rtol=1e-4, atol=1e-4)


def test_kernels_run_it():
    neuron = tt.snn.SpecNeuron(adapters.spec(layer_of("soft", (0.2, -0.3), True), dt=1.0))
    xs = stimulus(steps=60)
    eager = torch.stack([neuron(x) for x in xs])
    neuron.reset_states()
    with tt.backend("cpu"):
        assert_bits(neuron.unroll(xs), eager)
    assert eager.sum() > 20


# ---- the oracle ------------------------------------------------------------------------------------------------------


def record(spec, xs):
    neuron = tt.snn.SpecNeuron(spec)
    ys, states = neuron.trace(xs)
    return oracle.Recording(xs.numpy(), ys.detach().numpy(), {"v_mem": states["v_mem"].detach().numpy()}, spec)


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_the_oracle_judges_it_and_rejects_another(reset):
    spec = adapters.spec(lif(reset, V_initializer=init.Constant(0.4 * u.mV)), dt=0.5)
    recording = record(spec, stimulus(steps=150))
    assert oracle.judge(spec, recording).ok
    for name, factor in (("resistance", 1.01), ("leak", 1.5), ("mem_decay", 1.01), ("initial_v", 1.1)):
        wrong = dict(spec.parameters)
        wrong[name] = Parameter((wrong[name].value * factor).astype("f4"), False, wrong[name].raw)
        assert not oracle.judge(spec.replace(parameters=wrong), recording).ok, name


def test_a_start_above_the_threshold_fires_at_once():
    """brainpy: V starts at 0, V_th = -50 mV: a reset before the first step."""
    voltages = {"V_th": -50 * u.mV, "V_reset": -60 * u.mV, "V_rest": -65 * u.mV}
    layer = bp.LIF(N, R=20.0 * u.ohm, tau=10 * u.ms, spk_reset="hard", **voltages)
    spec = adapters.spec(layer, dt=1.0)
    xs = stimulus(steps=100) + 0.6
    stage = JaxStage(layer, dt=1.0)
    ys = stage(xs)
    neuron = tt.snn.SpecNeuron(spec)
    assert_bits(neuron.unroll(xs), ys)
    assert oracle.judge(spec, record(spec, xs)).ok
    assert float(stage.V.min()) < -52


@pytest.mark.parametrize("start", [0.3 * u.mV, np.linspace(-0.2, 0.6, N).astype("f4") * u.mV], ids=["one", "each"])
def test_an_initial_state_may_be_a_plain_number(start):
    layer, xs = lif(V_initializer=start), stimulus(steps=40)
    neuron = tt.snn.SpecNeuron(adapters.spec(layer, dt=1.0))
    ys, recorded = JaxStage(layer, dt=1.0).trace(xs)
    assert_bits(neuron.unroll(xs), ys)
    e = np.exp(np.float32(-0.2))
    first = e * np.asarray(start.to_decimal(u.mV)) + (1 - e) * (0.1 + 3.0 * xs[0].numpy())
    assert np.abs(recorded["V"][0].numpy() - first).max() < 1e-5


@pytest.mark.parametrize(
    ("start", "expected"),
    [(0.0, ("zero", None)), (0.1, ("leak", None)), (-0.2, ("reset_value", None)), (0.7, ("zero", 0.7))],
)
def test_initial_states(start, expected):
    spec = adapters.spec(lif("hard", V_initializer=init.Constant(start * u.mV)), dt=1.0)
    first = spec.parameters.get("initial_v")
    assert (spec.initial_state, None if first is None else pytest.approx(float(first.value))) == expected
    xs = stimulus()
    stage = JaxStage(lif("hard", V_initializer=init.Constant(start * u.mV)), dt=1.0)
    neuron = tt.snn.SpecNeuron(spec)
    torch.testing.assert_close(neuron.unroll(xs), stage(xs))
    torch.testing.assert_close(neuron.v_mem, stage.V, rtol=1e-5, atol=1e-6)


# ---- surrogates ------------------------------------------------------------------------------------------------------

STOCK = [
    *(surrogate.ReluGrad(0.3, 1.0), surrogate.ReluGrad(0.5, 2.0), surrogate.Sigmoid(4.0), surrogate.Arctan(1.5)),
    *(surrogate.PiecewiseQuadratic(0.8), surrogate.PiecewiseExp(1.2), surrogate.SoftSign(1.5), surrogate.ERF(1.3)),
    *(surrogate.PiecewiseLeakyRelu(0.02, 0.7), surrogate.LeakyRelu(0.1, 0.9), surrogate.GaussianGrad(0.6, 0.8)),
    *(surrogate.MultiGaussianGrad(0.15, 6.0, 0.5, 0.9), surrogate.InvSquareGrad(10.0)),
]


@pytest.mark.parametrize("function", STOCK, ids=lambda f: f"{type(f).__name__}-{f!r}")
def test_surrogates_are_read_and_written(function):
    spec = adapters.spec(lif(spk_fun=function), dt=1.0)
    v = torch.linspace(-1.0, 3.0, 400).requires_grad_()
    theta, scale = torch.tensor(1.0), torch.from_numpy(spec.parameters["surrogate_scale"].value.copy())
    ours = spec.surrogate.vjp(torch.ones(400), (v - theta) / scale, theta) / scale
    theirs = jax.vmap(jax.grad(lambda z: function(z)))((jnp.asarray(v.detach().numpy()) - 1.0) / 1.2) / np.float32(1.2)
    # At a corner of the surrogate the two may take either side.
    off = np.abs(ours.detach().numpy() - np.asarray(theirs)) > 1e-5 * float(np.abs(theirs).max())
    assert off.sum() <= 4, off.sum()
    again = adapters.build(spec, "brainpy")
    assert repr(again.spk_fun) == repr(function)


@pytest.mark.parametrize(
    ("surrogate_of_ours", "strict"),
    [
        (Surrogate("single_exponential"), False),
        (Surrogate("atan"), True),
        pytest.param(Surrogate("super_spike"), False, marks=pytest.mark.sweep),
        pytest.param(Surrogate("tanh"), True, marks=pytest.mark.sweep),
    ],
)
def test_surrogates_of_other_frameworks(strict, surrogate_of_ours):
    spec = adapters.spec(lif(), dt=1.0)
    one = {**spec.parameters, "surrogate_scale": Parameter(np.float32(1.0))}
    spec = spec.replace(surrogate=surrogate_of_ours, comparison=">" if strict else ">=", parameters=one)
    layer = adapters.build(spec, "brainpy")
    layer.in_size = (N,)
    back = adapters.spec(layer, dt=1.0)
    assert (back.surrogate, back.comparison) == (spec.surrogate, spec.comparison)
    stage, neuron = JaxStage(layer, dt=1.0), tt.snn.SpecNeuron(spec)
    grads = []
    for run in (stage, neuron.unroll):
        xs = stimulus(steps=40).requires_grad_()
        run(xs).sum().backward()
        grads.append(xs.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
    tie = stage.get_spike(torch.tensor([1.0]))
    assert tie.tolist() == [0.0 if strict else 1.0]
    twin = pickle.loads(pickle.dumps(stage))
    tt.reset_states(stage)
    tt.reset_states(twin)
    assert_bits(twin(stimulus()), stage(stimulus()))


# ---- reading: units, dt, refusals ------------------------------------------------------------------------------------


def test_units_are_recorded_and_used():
    spec = adapters.spec(lif(V_rest=1e-4 * u.volt, tau=0.005 * u.second), dt=0.001)
    assert (spec.value_unit, spec.time_unit, spec.dt) == ("mV", "s", 0.001)
    assert float(spec.parameters["leak"].value) == pytest.approx(0.1)
    layer = adapters.build(spec, "brainpy")
    assert str(layer.V_th.unit) == "mV"
    assert str(layer.tau.unit) == "s"
    assert NeuronSpec.from_json(spec.to_json()) == spec


def test_no_units_at_all():
    layer = bp.LIF(N, R=2.0, tau=5.0, V_th=1.0, V_reset=0.0, V_rest=0.0, V_initializer=init.Constant(0.0))
    spec = adapters.spec(layer, dt=1.0)
    assert (spec.value_unit, spec.time_unit) == ("1", "1")
    again = adapters.build(spec, "brainpy")
    assert (again.R, again.V_th) == (2.0, 1.0)
    torch.testing.assert_close(JaxStage(layer, dt=1.0)(stimulus()), tt.snn.SpecNeuron(spec).unroll(stimulus()))


def test_if_is_read():
    layer = bp.IF(N, R=3.0 * u.ohm, V_th=1.2 * u.mV, spk_reset="hard")
    spec = adapters.spec(layer, dt=0.5)
    xs = stimulus(steps=80)
    ys = JaxStage(layer, dt=0.5)(xs)
    assert_bits(tt.snn.SpecNeuron(spec).unroll(xs), ys)
    assert ys.sum() > 5


def test_dt_comes_from_the_call_or_the_environment():
    with brainstate.environ.context(dt=0.25 * u.ms):
        assert adapters.spec(lif()).dt == 0.25
        assert adapters.spec(lif(), dt=0.5).dt == 0.5
    with pytest.raises(SpecError, match=r"dt=None.*brainstate\.environ\.set"):
        adapters.spec(lif())


class Busy(bp.LIF):
    """A subclass may compute anything."""


def with_input(layer):
    layer.add_current_input("extra", lambda v: 1.0 * u.mA)
    return layer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bp.ExpIF(N), "ExpIF.*LIF, IF, LIFRef, ALIF can be read.*JaxStage runs it"),
        (lambda: Busy(N), "LIF, IF, LIFRef, ALIF can be read"),
        (lambda: lif(spk_fun=surrogate.SlayerGrad()), r"spk_fun=SlayerGrad.*ReluGrad"),
        (lambda: lif(V_initializer=init.Normal(0.0 * u.mV, 1.0 * u.mV)), "V_initializer=.*only a constant"),
        (lambda: with_input(lif()), "current_inputs"),
        (lambda: lif(V_rest=0.1), r"mixture of units"),
        (lambda: lif(tau=5.0 * u.mV), "tau=mV: no unit of time"),
        (lambda: lif(V_th=1.0, V_reset=0.0, V_rest=0.0, V_initializer=init.Constant(0.0)), "R=ohm.*V_th has none"),
        (lambda: lif(V_th=1.0, V_reset=0.0, V_rest=0.0, R=1.0), "V_initializer"),
        (lambda: JaxStage(lif(), dt=1.0, learn=["V_th"]), "V_th=learned"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(make, words):
    with pytest.raises(SpecError, match=words):
        adapters.spec(make(), dt=1.0)


# ---- building --------------------------------------------------------------------------------------------------------


def sinabs_spec(**changes):
    parameters = {"mem_decay": Parameter(np.float32(0.9)), "threshold": Parameter(np.float32(1.0))}
    parameters |= changes.pop("parameters", {})
    fields = {"form": "sinabs.LIF", "surrogate": Surrogate("atan"), **changes}
    return NeuronSpec(parameters=parameters, **fields)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (sinabs_spec(spike_count="multiple"), "spike_count='multiple'"),
        (sinabs_spec(synapse="add_then_decay", parameters={"syn_decay": Parameter(np.float32(0.5))}), "synapse="),
        (sinabs_spec(clamp="after_reset", parameters={"min_v_mem": Parameter(np.float32(0.0))}), "clamp="),
        (sinabs_spec(parameters={"mem_decay": Parameter(np.float32(1.0))}), "mem_decay=1.0.*between 0 and 1"),
        (sinabs_spec(parameters={"bias": Parameter(np.float32(0.5))}), "bias="),
        (sinabs_spec(reset="none"), "reset='none'"),
        (sinabs_spec(reset="value", parameters={"reset_value": Parameter(np.float32(2.0))}), "V_th must lie above"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(spec, words):
    with pytest.raises(ConversionError, match=words):
        adapters.build(spec, "brainpy")


@pytest.mark.parametrize("norm", [False, True])
def test_a_sinabs_layer_becomes_brainpys(norm):
    import sinabs.activation as sa
    import sinabs.layers as sl

    source = sl.LIF(tau_mem=9.0, norm_input=norm, spike_fn=sa.SingleSpike)
    for parameter in source.parameters():
        parameter.requires_grad_(False)
    xs = stimulus(200, 4).transpose(0, 1) * (4.0 if norm else 1.0)
    conversion = adapters.convert(source, to="brainpy", sample=xs)
    checked(conversion)
    layer = adapters.to_brainstate(conversion.model)
    assert float(layer.tau.to_decimal(u.ms)) == 9.0
    assert_bits(conversion.run(xs), source(xs))


def test_a_network_of_brainstate_converts():
    layers = [brainstate.nn.Linear(N, N), layer_of("hard", (0.0, 0.0), False)]
    layers[1] = bp.LIF(N, R=2.0, tau=5.0, V_th=1.0, V_reset=0.0, V_rest=0.0, V_initializer=init.Constant(0.0))
    net = brainstate.nn.Sequential(*layers)
    xs = stimulus(100, 4).transpose(0, 1) * 3
    conversion = adapters.convert(net, to="tracetorch", sample=xs, dt=1.0)
    assert [row.forward for row in conversion.report][1] == "rounding"
    assert conversion.agreement.ok
    theirs = JaxStage(net, dt=1.0, time_dim=1)(xs)
    assert (conversion.run(xs) != theirs).float().mean() < 1e-3
    back = adapters.to_brainstate(adapters.convert(conversion.model, to="brainpy", sample=xs, time_dim=1).model)
    mine, theirs = (np.asarray(each.layers[0].weight.value["weight"]) for each in (back, net))
    assert np.array_equal(mine, theirs)
    with pytest.raises(ConversionError, match="Sequential of Linear"):
        adapters.convert(brainstate.nn.GRUCell(2, 2), to="tracetorch", sample=xs, dt=1.0)


def test_computed_layers_copy_pickle_and_train():
    def run(module):
        return module(xs) if to == "sinabs" else torch.stack([module(x) for x in xs.unbind(1)], 1)

    for to in ("sinabs", "snntorch"):
        stage = JaxStage(lif(), dt=1.0, learn=["tau", "R"], time_dim=1)
        xs = stimulus(60, 4).transpose(0, 1)
        layer = adapters.convert(stage, to=to, sample=xs, time_dim=1).model
        layer = next(m for m in layer.modules() if type(m).__name__ == "Computed")
        owner = adapters.registry.adapter(to)
        owner.reset(layer)
        ys = run(layer)
        ys.sum().backward()
        assert layer.mem_decay.grad.any()
        assert layer.resistance.requires_grad
        assert not layer.threshold.requires_grad
        owner.reset(layer)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert adapters.spec(twin) == adapters.spec(layer)
            assert_bits(run(twin), ys)
