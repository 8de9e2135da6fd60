"""`adapters.JaxStage`: the seam between torch and JAX, its aliasing, gradients, states, units, refusals."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("brainpy")

import brainpy.state as bp
import brainstate
import brainunit as u
import jax
import jax.numpy as jnp

import tracetorch as tt
from tests.bits import assert_bits
from tests.pipeline_cases import lif, stimulus
from tracetorch.adapters import JaxStage, Pipeline, SeamError
from tracetorch.adapters.jax import bridge as jax_bridge


class Plain(brainstate.nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def update(self, x):
        return self.function(x)


class Named(brainstate.nn.Module):
    """Its state has the name of an attribute of torch modules."""

    def __init__(self):
        super().__init__()
        self.trail = brainstate.ShortTermState(jnp.zeros(5))


def brainstates_own(module, xs, unit, dt=1.0 * u.ms, clock=False):
    """The module run as its users run it."""
    brainstate.nn.init_all_states(module, batch_size=xs.shape[1])

    def step(k):
        with brainstate.environ.context(**({"t": k * dt} if clock else {})):
            return module(jnp.asarray(xs.numpy())[k] * unit)

    with brainstate.environ.context(dt=dt):
        return torch.from_numpy(np.array(brainstate.transform.for_loop(step, jnp.arange(len(xs)))))


# ---- it computes what brainstate computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_a_neuron_is_brainstates_own(reset):
    xs = stimulus(steps=100)
    ys = JaxStage(lif(reset), dt=1.0)(xs)
    own = lif(reset)
    assert_bits(ys, brainstates_own(own, xs, u.mA))
    assert ys.sum() > 50


def test_any_neuron_runs():
    xs = stimulus(steps=100)
    for make in (bp.LIFRef, bp.ALIF, bp.IF):
        layer = make(5, R=4.0 * u.ohm)
        stage = JaxStage(layer, dt=1.0)
        ys = stage(xs)
        assert_bits(ys, brainstates_own(layer, xs, u.mA, clock=make is bp.LIFRef))
        assert ys.sum() > 50, make
        tt.reset_states(stage)
        assert_bits(torch.cat([stage(xs[:50]), stage(xs[50:])]), ys)


def test_a_network_of_brainstate():
    net = brainstate.nn.Sequential(
        brainstate.nn.Linear(5, 4),
        bp.LIF(4, R=1.0, V_th=1.0, V_reset=0.0, V_rest=0.0, tau=5.0 * u.ms, V_initializer=_zero),
    )
    stage = JaxStage(net, dt=1.0)
    assert {n for n, _ in stage.named_parameters()} == {"layers_0_weight_weight", "layers_0_weight_bias"}
    xs = 10 * stimulus(steps=50)
    ys = stage(xs)
    torch.testing.assert_close(ys, brainstates_own(net, xs, 1.0), rtol=0, atol=0)
    ys.sum().backward()
    assert stage.layers_0_weight_weight.grad.any()
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    tt.reset_states(stage)
    before = stage(xs).detach()
    optimizer.step()
    tt.reset_states(stage)
    assert (stage(xs) != before).any(), "what an optimizer writes is what the next call computes with"
    assert np.array_equal(
        np.asarray(stage.to_jax().layers[0].weight.value["weight"]), stage.layers_0_weight_weight.detach().numpy()
    )


def _zero(shape, **kwargs):
    return jnp.zeros(shape)


def test_writing_through_data_is_seen_too():
    """No version counter notices it."""
    stage, xs = JaxStage(lif(), dt=1.0, learn=["R"]), stimulus(steps=50)
    before = stage(xs).sum()
    stage.R.data.mul_(2.0)
    tt.reset_states(stage)
    assert stage(xs).sum() > before


# ---- aliasing --------------------------------------------------------------------------------------------------------


def aligned(*shape):
    """A tensor whose memory JAX can take as it is."""
    size = int(np.prod(shape))
    memory = torch.zeros(size + 16)
    start = (-memory.data_ptr() // 4) % 16
    return memory[start : start + size].reshape(shape).normal_()


def test_the_seam_copies_nothing_where_it_can_alias():
    x = aligned(64, 64)
    assert jax_bridge.aliases(x, jax_bridge.to_jax(x))
    array = jnp.ones((64, 64)) * 2
    assert jax_bridge.aliases(jax_bridge.to_torch(array), array)
    odd = torch.randn(5000)[1:4097]
    assert not jax_bridge.aliases(odd, jax_bridge.to_jax(odd)), "not aligned: one copy"
    strided = torch.randn(64, 64).T[:, ::2]
    assert np.array_equal(np.asarray(jax_bridge.to_jax(strided)), strided.numpy())
    for size in (8, 64):
        negative = torch.randn(size, size, dtype=torch.complex64).conj().imag
        assert negative.is_neg()
        assert np.array_equal(np.asarray(jax_bridge.to_jax(negative)), negative.resolve_neg().numpy())


def test_inputs_may_be_written_right_after_the_call():
    """Large, aliased inputs; the result must be that of the numbers at the call."""
    xs = aligned(200, 64, 64)
    truth = xs.clone()
    stage = JaxStage(lif(size=64), dt=1.0)
    expected = stage(truth)
    for _ in range(5):
        tt.reset_states(stage)
        xs.copy_(truth)
        ys = stage(xs)
        xs.fill_(1e6)
        assert_bits(ys, expected)
    for _ in range(5):  # and between forward and backward, torch says what it always says
        tt.reset_states(stage)
        xs = truth.clone().requires_grad_()
        ys = stage(xs)
        with torch.no_grad():
            xs.fill_(1e6)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            ys.sum().backward()


def test_results_are_the_callers_own():
    program = jax_bridge.Program(lambda a, b: (a, a, a * b))
    a, b = aligned(64, 64), aligned(64, 64)
    results = program.run(a, b)
    assert len({t.data_ptr() for t in (a, b, *results)}) == 5
    kept = results[2].clone()
    results[0].zero_()
    assert_bits(results[2], kept)
    assert a.any()


def test_results_written_before_backward_leave_the_gradient():
    """JAX keeps a value of its own for backward; were it the result's memory, torch would notice the writing."""
    program = jax_bridge.Program(lambda a: (jnp.exp(a),))
    a = aligned(64, 64).requires_grad_()
    (y,) = program.run(a)
    truth = y.detach().clone()
    with torch.no_grad():
        y.zero_()
    y.sum().backward()
    torch.testing.assert_close(a.grad, truth)


def test_results_that_jax_hands_through_are_copied():
    """XLA gives every result memory of its own (jax 0.10.2); nothing promises that another version does."""
    a = aligned(64, 64)
    array, kept = jax_bridge.to_jax(a), jnp.ones((64, 64)) * 2
    results = jax_bridge._own((a,), (kept,), (array, kept, kept + 1, kept))
    assert jax_bridge.aliases(a, array)
    pointers = [t.data_ptr() for t in (a, *results)] + [kept.unsafe_buffer_pointer()]
    assert len(set(pointers)) == len(pointers)
    for tensor, truth in zip(results, (a, kept, kept + 1, kept), strict=True):
        assert np.array_equal(tensor.numpy(), np.asarray(truth))


def test_a_call_waits_until_jax_has_finished(monkeypatch):
    """While JAX computes, it may still read the caller's memory."""

    def slow(a):
        return (jax.lax.fori_loop(0, 300, lambda k, x: jnp.tanh(x @ a), a),)

    program, a = jax_bridge.Program(slow), aligned(256, 256)
    program.run(a)
    running = program._run(jax_bridge.to_jax(a))[0]
    assert not running.is_ready(), "JAX does not run behind the caller's back here, so this shows nothing"
    own, ready = jax_bridge._own, []

    def watched(inputs, kept, arrays):
        ready.extend(array.is_ready() for array in arrays)
        return own(inputs, kept, arrays)

    monkeypatch.setattr(jax_bridge, "_own", watched)
    program.run(a)
    program.run(a.requires_grad_())[0].sum().backward()
    assert ready == [True] * 3


@pytest.mark.parametrize("written", ["input", "result"])
def test_what_backward_needs_is_torchs_own_where_jax_keeps_the_same_memory(written):
    """Compiled, JAX keeps a copy; a residual that is the result's very memory must be seen written."""
    program = jax_bridge.Program(lambda a: (jnp.exp(a),))
    program._forward = program._with_vjp  # not compiled: exp's residual is its result
    a = aligned(64, 64).requires_grad_()
    (y,) = program.run(a)
    with torch.no_grad():
        {"input": a, "result": y}[written].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_are_not_computed_where_none_is_wanted():
    stage, xs = JaxStage(lif(), dt=1.0), stimulus()
    assert not stage(xs).requires_grad
    with torch.no_grad():
        assert not JaxStage(lif(), dt=1.0, learn=["R"])(xs).requires_grad


def test_a_second_derivative_is_refused():
    xs = stimulus().requires_grad_()
    (grad,) = torch.autograd.grad(JaxStage(lif(), dt=1.0)(xs).sum(), xs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, x: s.double()(x.double()), "x64 mode is off, in which it would compute in float32 without a word"),
        (lambda s, x: s(x.double()), "float64"),
        (lambda s, x: s(x.half()), "float16.*float32 or float64"),
        (lambda s, x: s(x[..., :2]), r"\[12, 3, 2\].*\[5\] by in_size"),
        (lambda s, x: s(x[:0]), "no time step"),
        (lambda s, x: s(x[0, 0]), "needed is"),
        (lambda s, x: s(x.to("meta")), "device meta"),
        (lambda s, x: JaxStage(lif())(x), "neither the stage nor brainstate.environ"),
        (lambda s, x: JaxStage(lif(), dt=1.0 * u.mV)(x), "dt=.*Remedy: a dt in the unit of tau"),
        (lambda s, x: JaxStage(lif(), dt=np.ones(2))(x), "dt=array.*Remedy: a dt in the unit of tau"),
        (lambda s, x: JaxStage(lif(), dt=0.0)(x), "dt=0.0. Remedy: a dt above 0"),
        (lambda s, x: JaxStage(lif(), dt=float("nan"))(x), "dt=nan. Remedy: a dt above 0"),
        (lambda s, x: s.get_spike(x.double()), "get_spike: dtype torch.float64.*x64"),
        (lambda s, x: s.get_spike(x.int()), "get_spike: dtype torch.int32"),
        (lambda s, x: JaxStage(Plain(lambda y: (y, y)))(x), "a call returned a tuple.*its output alone"),
        (lambda s, x: JaxStage(Plain(lambda y: y + 1 * u.mV))(x), "the input has the unit none.*input_unit"),
        (lambda s, x: JaxStage(brainstate.nn.Sequential(brainstate.nn.Dropout(0.5)), dtype=torch.float32)(x), "random"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(SeamError, match=words), brainstate.environ.context(fit=True):
        call(JaxStage(lif(), dt=1.0), stimulus())


def test_a_module_without_neurons_needs_no_dt():
    with brainstate.environ.context(dt=0.1 * u.ms):
        assert JaxStage(brainstate.nn.Linear(5, 2))(stimulus()).shape == (12, 3, 2)
        stage, xs = JaxStage(Plain(lambda x: x * brainstate.environ.get("dt").to_decimal(u.ms))), stimulus()
        torch.testing.assert_close(stage(xs), 0.1 * xs)
    with brainstate.environ.context(dt=0.5 * u.ms):
        torch.testing.assert_close(stage(xs), 0.5 * xs)


def test_copies_may_run_in_threads():
    """They share what is compiled, and so the module that is traced."""
    first, inputs = JaxStage(lif(), dt=1.0), [stimulus(steps=k) for k in range(3, 11)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda xs: copy.deepcopy(first)(xs), inputs))
    for xs, ys in zip(inputs, found, strict=True):
        tt.reset_states(first)
        assert_bits(ys, first(xs))


def test_a_key_that_is_missing_is_not_taken_for_dt():
    with pytest.raises(KeyError, match="width"):
        JaxStage(Plain(lambda x: x * {}["width"]))(stimulus())


def test_what_a_module_reads_of_the_environment_is_live():
    stage, xs = JaxStage(Plain(lambda x: 2 * x if brainstate.environ.get("fit") else x)), stimulus()
    for fit, factor in ((True, 2), (False, 1), (True, 2)):
        with brainstate.environ.context(fit=fit):
            assert_bits(stage(xs), factor * xs)


def test_more_refusals():
    with pytest.raises(ValueError, match=r"running_mean is a BatchState.*Remedy"):
        JaxStage(brainstate.nn.BatchNorm0d((5,)))
    with pytest.raises(ValueError, match="'trail' has the name of an attribute"):
        JaxStage(Named())
    with pytest.raises(TypeError, match=r"no brainstate\.nn\.Module"):
        JaxStage(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"learn=.'gain'. not among"):
        JaxStage(lif(), learn=["gain"])
    with pytest.raises(ValueError, match="time_dim=2"):
        JaxStage(lif(), time_dim=2)
    stage = JaxStage(lif(), dt=1.0)
    stage(stimulus())
    with pytest.raises(ValueError, match=r"shape \[3, 5\].*batch size 2"):
        stage(stimulus(batch=2))
    with pytest.raises(AttributeError, match="get_spike"):
        JaxStage(brainstate.nn.Linear(2, 2)).get_spike(torch.zeros(2))


# ---- numbers, units, time --------------------------------------------------------------------------------------------


def test_units_are_those_of_the_threshold():
    stage = JaxStage(lif(V_rest=1e-4 * u.volt, R=3e-6 * u.Mohm, tau=0.005 * u.second), dt=1.0 * u.ms)
    assert stage.units["V_rest"] == stage.units["V"] == "mV"
    assert float(stage.V_rest) == pytest.approx(0.1)
    assert stage.units["tau"] == "s"
    assert stage.step_length() == pytest.approx(1e-3)
    xs = stimulus(steps=60)
    assert_bits(stage(xs * 1e6), JaxStage(lif(), dt=1.0)(xs))


class Membrane(brainstate.nn.Module):
    """Returns V, in some unit."""

    def __init__(self, unit):
        super().__init__()
        self.neuron, self.unit = lif(), unit

    def update(self, x):
        self.neuron(x)
        return self.neuron.V.value.in_unit(self.unit)


def test_the_unit_of_the_output_is_recorded():
    xs, found = stimulus(steps=20), {}
    for unit in (u.mV, u.volt):
        stage = JaxStage(Membrane(unit), dt=1.0, input_unit=u.mA)
        assert "output" not in stage.units, "not known before the first call"
        found[unit] = stage(xs)
        for each in (stage, copy.deepcopy(stage)):
            assert each.units["output"] == str(unit)
        twin = pickle.loads(pickle.dumps(stage))
        assert str(twin.output_unit) == str(unit)
    torch.testing.assert_close(found[u.mV], 1000 * found[u.volt])
    stage = JaxStage(lif(), dt=1.0)
    stage(xs)
    assert stage.units["output"] == "1"


def test_a_pipeline_does_not_take_millivolts_for_milliamperes():
    membrane = JaxStage(Membrane(u.mV), dt=1.0, input_unit=u.mA)
    pipe, xs = Pipeline(membrane, JaxStage(lif(), dt=1.0)), stimulus()
    with pytest.raises(SeamError, match=r"seam 1.*in mV.*numbers in mA.*Remedy"):
        pipe(xs)
    assert membrane.neuron_V is None, "no state has changed"
    assert Pipeline(membrane, torch.nn.Linear(5, 5), JaxStage(lif(), dt=1.0))(xs).shape == xs.shape
    assert Pipeline(JaxStage(lif(), dt=1.0), JaxStage(lif(), dt=1.0))(xs).sum() >= 0


def test_dt_is_the_calls_or_the_environments():
    xs = stimulus(steps=60)
    with brainstate.environ.context(dt=0.5 * u.ms):
        stage = JaxStage(lif())
        ys = stage(xs)
    assert_bits(ys, JaxStage(lif(), dt=0.5)(xs))
    with brainstate.environ.context(dt=2.0 * u.ms):
        tt.reset_states(stage)
        assert_bits(stage(xs), JaxStage(lif(), dt=2.0)(xs))


def test_name_and_get_spike_are_kept():
    layer = lif(name="front")
    stage = JaxStage(layer, dt=1.0)
    stage(stimulus())
    assert stage.to_jax().name == "front"
    v = torch.tensor([0.5, 1.0, 1.5]).requires_grad_()
    s = stage.get_spike(v)
    assert s.tolist() == [0.0, 1.0, 1.0], "a tie fires"
    s.sum().backward()
    assert v.grad.tolist() == pytest.approx([0.3 * (1 - 0.5 / 1.2) / 1.2, 0.3 / 1.2, 0.3 * (1 - 0.5 / 1.2) / 1.2])


def test_the_module_given_stays_as_it_is():
    layer = lif()
    stage = JaxStage(layer, dt=1.0, learn=["R"])
    stage(stimulus()).sum().backward()
    with torch.no_grad():
        stage.R.mul_(3.0)
    assert float(layer.R.mantissa) == 3.0
    assert "V" not in vars(layer)
    assert float(stage.to_jax().R.mantissa) == 9.0
    assert_bits(torch.from_numpy(np.array(stage.to_jax().V.value.mantissa)), stage.V)


def test_copies_and_pickles_go_on_alike():
    stage, xs = JaxStage(lif(), dt=1.0, learn=["R", "tau"]), stimulus()
    stage(xs[:4])
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert other.R is not stage.R
        saved = tt.save_states(stage)
        assert_bits(other(xs[4:8]), stage(xs[4:8]))
        tt.load_states(stage, saved)


def test_double_with_x64():
    jax.config.update("jax_enable_x64", True)
    try:
        xs = stimulus(steps=60, dtype=torch.float64)
        stage = JaxStage(lif(), dt=1.0, dtype=torch.float64)
        ys = stage(xs)
        assert ys.dtype == stage.V.dtype == torch.float64
        e, rho, v, found = np.exp(-1 / 5.0), 1.2, np.zeros((3, 5)), []
        for x in xs.numpy():
            v = v - rho * (v >= 1)
            v = e * v + (1 - e) * (0.1 + 3 * x)
            found.append(v >= 1)
        assert np.array_equal(ys.numpy(), np.stack(found))
        assert np.abs(stage.V.numpy() - v).max() < 1e-14
    finally:
        jax.config.update("jax_enable_x64", False)


def test_jax_is_imported_only_when_it_is_asked_for():
    code = (
        "import sys; sys.modules['samna'] = None\n"
        "import tracetorch as tt, torch\nfrom tracetorch import adapters\n"
        "adapters.Pipeline(torch.nn.Linear(2, 2), tt.snn.LIB(2))(torch.zeros(3, 1, 2))\n"
        "assert 'brainpy' in adapters.FRAMEWORKS\n"
        "assert not {'jax', 'brainstate', 'brainpy'} & set(sys.modules)\n"
        "for name in ('jax', 'brainstate', 'brainpy', 'saiunit'): sys.modules[name] = None\n"
        "try: adapters.build(adapters.spec(tt.snn.LIB(2)), 'brainpy')\n"
        "except ImportError as error: print(error)\n"
        "try: adapters.JaxStage\n"
        "except ImportError: print('no JAX')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "brainpy is not installed in this environment; from the checkout: pip install" in done.stdout
    assert "no JAX" in done.stdout
