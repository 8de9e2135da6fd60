"""brainpy.state's LIFRef and ALIF: their equations by hand, conversions there and back, the oracle, names, refusals."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("brainpy")

import brainpy.state as bp
import brainunit as u
from braintools import init

import tracetorch as tt
from tests.bits import assert_bits
from tests.pipeline_cases import N, lif, stimulus
from tracetorch import NeuronSpec, Parameter, adapters, oracle
from tracetorch.adapters import ConversionError, JaxStage
from tracetorch.core.spec import SpecError
from tracetorch.functional.surrogates import Surrogate


def ref(reset="soft", tau_ref=2.0, **changes):
    numbers = {"R": 2.0 * u.ohm, "tau": 6.0 * u.ms, "V_rest": 0.1 * u.mV, "V_reset": -0.1 * u.mV}
    return bp.LIFRef(N, spk_reset=reset, **{**numbers, "tau_ref": tau_ref * u.ms, **changes})


def alif(reset="soft", **changes):
    numbers = {"R": 2.0 * u.ohm, "tau": 6.0 * u.ms, "V_rest": 0.1 * u.mV, "V_reset": -0.1 * u.mV}
    return bp.ALIF(N, spk_reset=reset, **{**numbers, "tau_a": 40.0 * u.ms, "beta": 0.3 * u.mV, **changes})


def driven(steps, dt, batch=3, seed=0):
    """[T, B, N] that brings about a spike every few steps."""
    return stimulus(steps, batch, seed) * float(1.5 / np.sqrt(1 - np.exp(-dt / 6.0))) + 1.0


def refractory_by_hand(xs, dt, tau_ref, reset):
    """LIFRef as its class has it, in float64 but for the clock, which is in float32."""
    e, v, found, last = np.exp(-dt / 6.0), np.zeros(xs.shape[1:]), [], np.full(xs.shape[1:], -1e7, np.float32)
    for k, x in enumerate(xs.astype(np.float64)):
        fired = v >= 1.0
        v = np.where(fired, v - 1.1 if reset == "soft" else -0.1, v)
        t = np.float32(k) * np.float32(dt)
        v = np.where(t - last < np.float32(tau_ref), v, e * v + (1 - e) * (0.1 + 2 * x))
        last = np.where(v >= 1.0, t, last)
        found.append(v >= 1.0)
    return np.stack(found)


def adapting_by_hand(xs, dt, reset):
    """ALIF as its class has it, in float64."""
    e, e_a, v, a, found = np.exp(-dt / 6.0), np.exp(-dt / 40.0), np.zeros(xs.shape[1:]), 0.0, []
    for x in xs.astype(np.float64):
        fired = v >= 1.0 + 0.3 * a
        v = np.where(fired, v - 1.1 if reset == "soft" else -0.1, v)
        a = e_a * (a + fired)
        v = e * v + (1 - e) * (0.1 + 2 * x)
        found.append(v >= 1.0 + 0.3 * a)
    return np.stack(found)


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize(("dt", "tau_ref"), [(0.1, 2.0), (1.0, 3.0), (0.5, 2.2)])
def test_the_refractory_time_is_counted_in_the_floats_of_the_clock(reset, dt, tau_ref):
    xs = driven(500, dt)
    by_hand = refractory_by_hand(xs.numpy(), dt, tau_ref, reset)
    layer = ref(reset, tau_ref)
    stage, native = JaxStage(layer, dt=dt), tt.snn.SpecNeuron(adapters.spec(layer, dt=dt))
    assert np.array_equal(stage(xs).numpy(), by_hand)
    assert np.array_equal(native.unroll(xs).numpy(), by_hand)
    assert by_hand.sum() > 100
    if reset == "hard":
        assert np.diff(np.flatnonzero(by_hand[:, 0, 0])).min() >= round(tau_ref / dt)
    if dt == 0.1:  # twenty steps: held for twenty or for nineteen, as rounding has it
        whole = refractory_by_hand(xs.numpy(), dt, tau_ref + dt / 2, reset)
        short = refractory_by_hand(xs.numpy(), dt, tau_ref - dt / 2, reset)
        assert (whole != by_hand).any()
        assert (short != by_hand).any()


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_the_adaptation_is_that_of_the_class(reset):
    xs = driven(400, 1.0)
    by_hand = adapting_by_hand(xs.numpy(), 1.0, reset)
    stage, native = JaxStage(alif(reset), dt=1.0), tt.snn.SpecNeuron(adapters.spec(alif(reset), dt=1.0))
    assert np.array_equal(stage(xs).numpy(), by_hand)
    assert np.array_equal(native.unroll(xs).numpy(), by_hand)
    constant = JaxStage(alif(reset, beta=0.0 * u.mV), dt=1.0)(xs).numpy()
    assert 100 < by_hand.sum() < 0.8 * constant.sum()


def each(make):
    """Every number another for every neuron."""
    vary = lambda low, high: np.linspace(low, high, N).astype("f4")  # noqa: E731
    numbers = {"R": vary(1, 3) * u.ohm, "tau": vary(3, 12) * u.ms, "V_th": vary(0.8, 1.3) * u.mV}
    if make is ref:
        return {**numbers, "tau_ref": vary(0.4, 3.0)}
    return {**numbers, "tau_a": vary(20, 90) * u.ms, "beta": vary(0.1, 0.5) * u.mV}


MAKES = [ref, alif]


@pytest.mark.parametrize(
    ("make", "reset", "dt", "per_neuron"),
    [
        *((ref, "soft", 0.1, False), (ref, "hard", 0.4, True), (alif, "hard", 0.1, False), (alif, "soft", 1.0, True)),
        *(
            pytest.param(make, reset, dt, per_neuron, marks=pytest.mark.sweep)
            for make in MAKES
            for reset in ("soft", "hard")
            for dt in (0.01, 0.1, 0.25, 1.0)
            for per_neuron in (False, True)
        ),
    ],
)
def test_there_and_back(make, reset, dt, per_neuron):
    source = make(reset, name="front", **(each(make) if per_neuron else {}))
    xs = driven(1500 if dt < 0.05 else 200, dt).transpose(0, 1)
    there = adapters.convert(source, to="tracetorch", sample=xs, time_dim=1, dt=dt)
    back = adapters.convert(there.model, to="brainpy", sample=xs, time_dim=1)
    for conversion in (there, back):
        [row] = conversion.report
        assert row.forward in ("exact", "rounding"), str(conversion.report)
        assert row.gradient in ("exact", "rounding"), str(conversion.report)
        assert row.unexplained_mismatches == row.state_violations == 0
        assert row.spikes > 20
        assert row.max_state_difference < 1e-5
    layer = adapters.to_brainstate(back.model)
    assert (type(layer), layer.spk_reset, layer.name) == (type(source), reset, "front")
    names = ["tau", "tau_ref"] if make is ref else ["tau", "tau_a"]
    for name in ("R", "V_th", "V_reset", "V_rest", *(["beta"] if make is alif else []), *names):
        unit = u.ohm if name == "R" else u.ms if name.startswith("tau") else u.mV
        want, got = (np.asarray(getattr(one, name).to_decimal(unit)) for one in (source, layer))
        assert np.allclose(got, want, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("make", MAKES)
def test_kernels_copies_chunks_and_files(make, tmp_path):
    neuron = tt.snn.SpecNeuron(adapters.spec(make(), dt=0.1))
    xs = driven(120, 0.1)
    eager = torch.stack([neuron(x) for x in xs])
    assert eager.sum() > 10
    states = neuron.save_states()
    for run in ("unroll", "chunks", "copy", "pickle", "file"):
        tt.reset_states(neuron)
        other = neuron
        with tt.backend("cpu"):
            first = other.unroll(xs[:50])
            if run == "copy":
                other = copy.deepcopy(other)
            if run == "pickle":
                other = pickle.loads(pickle.dumps(other))
            if run == "file":
                tt.save(tmp_path / "n.tt", other)
                other = tt.load(tmp_path / "n.tt")
                first = other.unroll(xs[:50])
            rest = other.unroll(xs[50:]) if run != "chunks" else torch.cat([other.unroll(c) for c in xs[50:].split(7)])
        assert_bits(torch.cat([first, rest]), eager)
        for name, state in other.save_states().items():
            assert torch.equal(state, states[name]), (run, name)


def test_a_second_run_starts_with_no_spike_behind_it():
    neuron, xs = tt.snn.SpecNeuron(adapters.spec(ref(), dt=1.0)), driven(60, 1.0)
    first = neuron.unroll(xs)
    tt.reset_states(neuron)
    assert_bits(neuron.unroll(xs), first)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (ref, {"refractory_time": 0.5}),
        (ref, {"refractory_time": 1.5}),
        (alif, {"adapt_scale": 1.02}),
        (alif, {"adapt_decay": 1.1}),
        (alif, {"reset_amount": 1.01}),
        (alif, {"resistance": 1.01}),
    ],
)
def test_the_oracle_judges_it_and_rejects_another(make, wrong):
    spec, xs = adapters.spec(make(), dt=0.5), driven(300, 0.5)
    neuron = tt.snn.SpecNeuron(spec)
    ys, states = neuron.trace(xs, states=spec.states)
    found = {name: state.detach().numpy() for name, state in states.items()}
    recording = oracle.Recording(xs.numpy(), ys.detach().numpy(), found, spec)
    assert oracle.judge(spec, recording).ok
    numbers = dict(spec.parameters)
    for name, factor in wrong.items():
        numbers[name] = Parameter((numbers[name].value * factor).astype("f4"), False, numbers[name].raw)
    assert not oracle.judge(spec.replace(parameters=numbers), recording).ok


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("make", MAKES)
def test_trained_numbers_train_alike(make, reset):
    stage = JaxStage(make(reset), dt=1.0, learn=["R", "tau", "V_rest"])
    neuron = tt.snn.SpecNeuron(adapters.spec(stage))
    found = []
    for run in (neuron.unroll, stage):
        xs = driven(60, 1.0).requires_grad_()
        ys = run(xs)
        (ys * stimulus(60, 3, seed=9)).sum().backward()
        found.append((ys.detach(), xs.grad))
    assert_bits(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
    for ours, theirs in (("resistance", "R"), ("mem_decay", "tau"), ("leak", "V_rest")):
        torch.testing.assert_close(getattr(neuron, ours).grad, getattr(stage, theirs).grad, rtol=2e-4, atol=1e-4)


def held(**changes):
    """A spec of nobody's, held for whole steps."""
    parameters = {"mem_decay": Parameter(np.float32(8.0), raw="exp_dt_tau"), "threshold": Parameter(np.float32(1.0))}
    fields = {"form": "brainpy.LIFRef", "input_gain": "one_minus_decay", "reset_timing": "next_step_before_decay"}
    fields |= {"refractory": "hold", "refractory_steps": 3, "surrogate": Surrogate("atan"), "dt": 0.1}
    return NeuronSpec(**{**fields, "time_unit": "ms", "parameters": parameters, **changes})


def test_whole_steps_are_whatever_the_rounding_is():
    spec, xs = held(), 4 * driven(300, 0.1)
    ys = tt.snn.SpecNeuron(spec).unroll(xs)
    passed = np.diff(np.flatnonzero(ys[:, 0, 0].numpy()))
    layer = adapters.build(spec, "brainpy")
    assert float(layer.tau_ref.to_decimal(u.ms)) == pytest.approx(0.35)
    layer.in_size = (N,)
    assert_bits(JaxStage(layer, dt=0.1)(xs), ys)
    e, v, left, found = np.exp(-0.1 / 8.0), 0.0, 0, []
    for x in xs[:, 0, 0].double().numpy():
        v = v - (v >= 1)
        v = v if left > 0 else e * v + (1 - e) * x
        left = 3 if v >= 1 else left - 1
        found.append(v >= 1)
    assert np.array_equal(found, ys[:, 0, 0].numpy())
    assert len(passed) > 5


@pytest.mark.parametrize("to", ["sinabs", "snntorch", "spikingjelly", "norse"])
def test_no_other_framework_has_a_refractory_time(to):
    with pytest.raises(ConversionError, match=r"refractory='hold'.*Remedy") as refusal:
        adapters.build(adapters.spec(ref(), dt=1.0), to, stock=True)
    assert refusal.value.field == "refractory"
    with pytest.raises(ConversionError, match=r"refractory='hold'.*Remedy"):
        adapters.build(adapters.spec(ref(), dt=1.0), to)


def test_sinabs_has_an_adaptive_threshold():
    source = alif(R=1.0 * u.ohm, V_rest=0.0 * u.mV, V_reset=0.0 * u.mV)
    xs = 2 * driven(300, 1.0).transpose(0, 1)
    conversion = adapters.convert(source, to="sinabs", sample=xs, time_dim=1, dt=1.0)
    [row] = conversion.report
    assert (row.forward, row.gradient) == ("rounding", "rounding"), str(conversion.report)
    assert row.unexplained_mismatches == row.state_violations == 0
    assert row.spikes > 100
    with pytest.raises(ConversionError, match=r"resistance='2'"):
        adapters.build(adapters.spec(alif(), dt=1.0), "sinabs")
    for to in ("snntorch", "norse"):
        with pytest.raises(ConversionError, match=r"adapt"):
            adapters.build(adapters.spec(source, dt=1.0), to)


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_a_node_of_ours_in_spikingjelly_adapts(reset):
    node = adapters.build(adapters.spec(alif(reset), dt=1.0), "spikingjelly")
    node.step_mode = "m"
    xs = driven(200, 1.0)
    assert_bits(node(xs), JaxStage(alif(reset), dt=1.0)(xs))


def test_an_adaptive_threshold_of_sinabs_becomes_an_alif():
    import sinabs.activation as sa
    import sinabs.layers as sl

    adapting = {"tau_mem": 9.0, "tau_adapt": 30.0, "spike_fn": sa.SingleSpike}
    source = sl.ALIF(**adapting, reset_fn=sa.MembraneSubtract(0.7))
    for parameter in source.parameters():
        parameter.requires_grad_(False)
    xs = 9 * stimulus(200, 4).transpose(0, 1)
    conversion = adapters.convert(source, to="brainpy", sample=xs)
    [row] = conversion.report
    assert row.forward == "rounding", str(conversion.report)
    assert row.spikes > 100
    assert type(adapters.to_brainstate(conversion.model)) is bp.ALIF
    with pytest.raises(ConversionError, match=r"reset_amount='threshold'.*not as much as the threshold has risen to"):
        adapters.convert(sl.ALIF(**adapting), to="brainpy", sample=xs)


# ---- refusals and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ref(tau=0.006 * u.second), r"tau=s: tau_ref is in ms.*give both in ms"),
        (lambda: bp.LIFRef(N, tau_ref=2000.0 * u.us), r"tau_ref is in us"),
        (lambda: alif(tau_a=0.04 * u.second), r"tau=ms: tau_a is in s"),
        (lambda: alif(beta=0.3), r"mixture of units"),
        (lambda: alif(a_initializer=init.Constant(1.0)), r"a_initializer=.*starts at 0"),
        (lambda: alif(V_initializer=init.Constant(1.0 * u.mV)), r"V_initializer=.*before the first step"),
        (lambda: JaxStage(alif(), dt=1.0, learn=["beta"]), r"beta=learned"),
        (lambda: JaxStage(alif(), dt=1.0, learn=["tau_a"]), r"tau_a=learned"),
        (lambda: JaxStage(ref(), dt=1.0, learn=["tau_ref"]), r"tau_ref=learned: no gradient"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(make, words):
    with pytest.raises(SpecError, match=words):
        adapters.spec(make(), dt=1.0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (held(comparison=">", form="any"), r"comparison='>'"),
        (held(time_unit="s"), r"time_unit='s'"),
        (adapters.spec(alif(), dt=1.0).replace(refractory="hold", refractory_steps=2), r"refractory='hold'.*ALIF"),
        (adapters.spec(alif(), dt=1.0).replace(reset_timing="next_step_after_decay"), r"reset_timing="),
    ],
    ids=["tie", "unit", "both", "timing"],
)
def test_what_cannot_be_built_is_refused_by_name(spec, words):
    with pytest.raises(ConversionError, match=words):
        adapters.build(spec, "brainpy")


def test_a_refractory_time_is_not_counted_in_half_precision():
    neuron = tt.snn.SpecNeuron(adapters.spec(ref(), dt=1.0))
    with pytest.raises(TypeError, match=r"bfloat16.*float32"):
        neuron(torch.zeros(2, N, dtype=torch.bfloat16))


def test_a_spec_says_how_long_it_is_held_in_one_way():
    spec = adapters.spec(ref(), dt=1.0)
    assert NeuronSpec.from_json(spec.to_json()) == spec
    with pytest.raises(SpecError, match="refractory_steps=2"):
        spec.replace(refractory_steps=2)
    with pytest.raises(SpecError, match=r"refractory_time.*no part"):
        spec.replace(refractory="none")
    with pytest.raises(SpecError, match="dt=None"):
        spec.replace(
            dt=None,
            time_unit=None,
            parameters={n: p for n, p in spec.parameters.items() if n != "mem_decay"},
            decay="none",
        )


def test_a_name_is_carried_and_not_compared(tmp_path):
    named, nameless = adapters.spec(lif(name="front"), dt=1.0), adapters.spec(lif(), dt=1.0)
    assert (named.name, nameless.name) == ("front", None)
    assert named == nameless
    assert hash(named) == hash(nameless)
    assert named.differences(nameless) == {}
    assert "name" not in nameless.to_dict()
    assert pickle.loads(pickle.dumps(named)).name == NeuronSpec.from_json(named.to_json()).name == "front"
    tt.save(tmp_path / "n.tt", tt.snn.SpecNeuron(named))
    assert adapters.build(tt.load(tmp_path / "n.tt").spec, "brainpy").name == "front"
    with pytest.raises(SpecError, match="name=3"):
        named.replace(name=3)


@pytest.mark.parametrize("to", ["sinabs", "snntorch"])
def test_the_report_names_what_the_target_has_no_place_for(to):
    xs = driven(60, 1.0).transpose(0, 1)
    [row] = adapters.convert(lif(name="front"), to=to, sample=xs, time_dim=1, dt=1.0).report
    assert "name: 'front'" in row.reason
    assert "value_unit: the membrane's numbers are in mV, time in ms" in row.reason
    [row] = adapters.convert(lif(), to="tracetorch", sample=xs, time_dim=1, dt=1.0).report
    assert "name" not in row.reason
