"""snnTorch's `state_quant`: read, computed bit for bit, judged, carried, and refused by name elsewhere."""

import copy
import importlib.util
import itertools
import pickle

import numpy as np
import pytest
import snntorch as snn
import torch
from snntorch import surrogate
from snntorch.functional import quant
from torch import nn

import tracetorch as tt
from tests.adapter_checks import assert_native_is_the_same, recorded, traced
from tracetorch import adapters, oracle
from tracetorch.adapters import snntorch as ours
from tracetorch.adapters.networks import rebuild
from tracetorch.adapters.registry import adapter
from tracetorch.adapters.snntorch.layers import StateLevels
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.quantizers import nearest_level
from tracetorch.oracle.levels import nearest, taken

B, N = 3, 5
RESETS = tuple(itertools.product(("subtract", "zero", "none"), (True, False)))
QUANTIZERS = {
    "uniform 2 bits": {"num_bits": 2},
    "uniform 5 bits": {"num_bits": 5, "threshold": 0.7, "lower_limit": 0.3},
    "around the threshold": {"num_bits": 4, "uniform": False},
    "around 0": {"num_bits": 3, "uniform": False, "thr_centered": False},
}


def levels_of(function):
    """What the framework's closure holds."""
    (cell,) = function.__closure__
    return cell.cell_contents


def layer_of(name, mechanism, delay, function, seed=0):
    """A layer that learns all it can, with parameters per neuron."""
    torch.manual_seed(seed)
    options = {"reset_mechanism": mechanism, "state_quant": function, "init_hidden": True, "learn_threshold": True}
    options |= {"threshold": 0.3 + 0.4 * torch.rand(N), "spike_grad": surrogate.fast_sigmoid(3)}
    beta = 0.6 + 0.3 * torch.rand(N)
    if name == "Leaky":
        return snn.Leaky(beta, learn_beta=True, graded_spikes_factor=0.7, reset_delay=delay, **options)
    if name == "Synaptic":
        return snn.Synaptic(0.5 * torch.rand(N), beta, learn_alpha=True, learn_beta=True, reset_delay=delay, **options)
    return snn.Lapicque(0.8, **options) if name == "Lapicque" else snn.Alpha(0.9, beta - 0.1, **options)


CASES = [
    (name, mechanism, delay)
    for name, (mechanism, delay) in itertools.product(("Leaky", "Synaptic", "Lapicque", "Alpha"), RESETS)
    if delay or name in ("Leaky", "Synaptic")
]


# ---- rounding itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_nearest_level_is_that_of_snntorch_for_any_number(name, dtype):
    levels = levels_of(quant.state_quant(**QUANTIZERS[name])).to(dtype)
    halfway = (levels[1:] + levels[:-1]) / 2
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 3e7, -3e7, 1e-40], dtype=dtype)
    around = [torch.nextafter(t, torch.full_like(t, end)) for t in (halfway, levels) for end in (9.0, -9.0)]
    x = torch.cat([3 * torch.randn(2000, dtype=dtype), halfway, levels, special, *around]).requires_grad_()
    theirs = quant.StateQuant.apply(x.detach(), levels)
    rounded = nearest_level(x, tuple(levels.tolist()))
    assert rounded.dtype == dtype
    assert torch.equal(rounded, theirs)
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("levels", [(0.0, 1.0, -1.0), (2.0,), (1.0, 1.0, 0.0), (-0.5, 0.25, 0.5, 4.0)])
def test_the_oracle_takes_the_first_of_two_levels_as_near(levels):
    u = np.concatenate([np.arange(-32, 33) / 8, [np.nan, np.inf, -np.inf]])
    finite = np.where(np.isfinite(u), u, 0.0)
    brute = np.asarray(levels)[np.abs(np.asarray(levels)[:, None] - finite).argmin(0)]
    assert np.array_equal(nearest(u, np.asarray(levels)), np.where(np.isfinite(u), brute, levels[0]))


def test_the_oracle_follows_a_subject_only_within_the_bound():
    levels = np.array([0.0, 1.0])
    third = 0.5 + 1 / 3 * 1e-6  # no float32, just above the midpoint
    for bound, own, follows in ((1e-6, 0.0, True), (1e-7, 0.0, False), (0.0, 1.0, True), (1e-6, 1.0, True)):
        found = taken(np.array([third]), np.array([bound]), levels, np.array([own]), 0.0)
        assert found == (own if follows else 1.0)
    exact = taken(np.array([0.5]), np.array([0.0]), levels, np.array([1.0]), 2.0**-24)
    assert exact == 0.0  # nothing is rounded: a tie is the first level's


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_levels_are_those_of_the_closure(name):
    function = quant.state_quant(**QUANTIZERS[name])
    spec = adapters.spec(snn.Leaky(0.9, state_quant=function))
    assert spec.state_levels == tuple(float(level) for level in levels_of(function))
    assert NeuronSpec.from_json(spec.to_json()) == spec
    assert hash(pickle.loads(pickle.dumps(spec))) == hash(spec)


def test_a_spec_without_levels_is_written_as_before():
    plain = adapters.spec(snn.Leaky(0.9))
    assert "state_levels" not in plain.to_dict()
    assert plain.differences(plain.replace(state_levels=(0.0, 1.0))) == {"state_levels": (None, (0.0, 1.0))}


@pytest.mark.parametrize("levels", [(), [0.0, 1.0], (0.0, float("nan")), ("0",), (True,), 3.0])
def test_levels_are_a_tuple_of_finite_numbers(levels):
    with pytest.raises(SpecError, match=r"state_levels="):
        adapters.spec(snn.Leaky(0.9)).replace(state_levels=levels)


@pytest.mark.parametrize("levels", [[], [0.0, "1"], [[0.0]], [True], "01", [1e999]])
def test_a_file_with_other_levels_is_refused(levels):
    data = {**adapters.spec(snn.Leaky(0.9)).to_dict(), "state_levels": levels}
    with pytest.raises(SpecError, match=r"^state_levels=|is not a number$"):
        NeuronSpec.from_dict(data)


# ---- bit for bit, and judged -----------------------------------------------------------------------------------------


def check(name, mechanism, delay, options, seed):
    """The layer, the native one and the oracle, forward and backward, over 200 steps."""
    layer = layer_of(name, mechanism, delay, quant.state_quant(**options), seed=seed)
    _, verdict = assert_native_is_the_same(layer, 1.5 * torch.randn(200, B, N))
    assert 0 < verdict.spikes < verdict.slots


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_native_computes_the_same_bits_and_the_oracle_agrees(number):
    """The quantizers in turn."""
    check(*CASES[number], list(QUANTIZERS.values())[number % len(QUANTIZERS)], seed=number)


@pytest.mark.sweep
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_every_quantizer_with_every_reset(number, quantizer):
    for seed in range(5):
        check(*CASES[number], QUANTIZERS[quantizer], seed=100 + seed)


def test_the_kernel_gives_the_bits_of_the_step_loop():
    layer = layer_of("Synaptic", "subtract", False, quant.state_quant(num_bits=4))
    native, xs = adapters.build(adapters.spec(layer), "tracetorch"), torch.randn(40, B, N, requires_grad=True)
    found = []
    for backend in ("cpu", "eager"):
        native.reset_states()
        with tt.backend(backend):
            ys = native.unroll(xs)
        found.append([ys, native.v_mem, native.i_syn, *torch.autograd.grad(ys.sum(), [xs, native.mem_decay])])
    assert all(torch.equal(a, b) for a, b in list(zip(*found, strict=True))[:4])
    assert torch.allclose(*(results[4] for results in found), rtol=1e-5)  # summed in another order


FAULTS = {
    "a level moved": lambda spec: {"state_levels": tuple(v + 0.01 * (k == 6) for k, v in enumerate(spec.state_levels))},
    "a level missing": lambda spec: {"state_levels": (*spec.state_levels[:6], *spec.state_levels[7:])},
    "not rounded": lambda spec: {"state_levels": None},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("name", ["Leaky", "Synaptic"])
def test_a_planted_fault_is_seen(name, delay, fault):
    """A layer that rounds otherwise, against the spec of one that rounds right."""
    spec = adapters.spec(layer_of(name, "subtract", delay, quant.state_quant(num_bits=4)))
    wrong = adapters.build(spec.replace(**FAULTS[fault](spec)), "tracetorch")
    xs = torch.randn(100, B, N)
    outputs, states, _, _ = traced(wrong, xs)
    judgement = oracle.judge(spec, recorded(xs, outputs, states, spec))
    assert judgement.state_violations > 0


def test_a_tie_that_goes_the_other_way_is_seen():
    """Multiples of 1/8, a decay of 1/2 and levels 1/4 apart: half of all states lie halfway, and none is rounded."""
    levels = tuple(k / 4 for k in range(-4, 6))
    layer = layer_of("Leaky", "none", True, StateLevels(levels, torch.float32))
    with torch.no_grad():
        layer.beta.fill_(0.5)
    spec = adapters.spec(layer)
    xs = torch.randint(-8, 9, (50, B, N)) / 8
    for other, ok in ((levels, True), (levels[::-1], False)):
        subject = adapters.build(spec.replace(state_levels=other), "tracetorch")
        outputs, states, _, _ = traced(subject, xs)
        assert oracle.judge(spec, recorded(xs, outputs, states, spec)).ok == ok


# ---- whole networks, targets, files ----------------------------------------------------------------------------------


def network(**options):
    torch.manual_seed(2)
    first = snn.Leaky(0.9, init_hidden=True, learn_beta=True, state_quant=quant.state_quant(num_bits=4), **options)
    second = snn.Synaptic(0.5, 0.8, init_hidden=True, state_quant=quant.state_quant(num_bits=3, uniform=False))
    return nn.Sequential(nn.Linear(6, 8), first, nn.Linear(8, 4), second)


@pytest.mark.parametrize("to", ["tracetorch", "snntorch"])
def test_a_network_is_converted_exactly(to, tmp_path):
    xs = 2 * torch.rand(40, B, 6)
    result = tt.convert(network(), to=to, sample=xs, time_dim=0)
    assert result.verify(xs, grad=True).ok
    assert [row.forward for row in result.report.rows] == ["exact"] * 4
    copied = copy.deepcopy(result.model)
    assert adapters.spec(copied[1]) == adapters.spec(result.model[1])
    if to == "tracetorch":
        tt.save(tmp_path / "net.tt", result.model)
        tt.reset_states(result.model)
        assert torch.equal(tt.unroll(tt.load(tmp_path / "net.tt"), xs), tt.unroll(result.model, xs))


def test_a_converted_layer_s_levels_pickle():
    layer = adapters.build(adapters.spec(network()[1]), "snntorch")
    assert isinstance(layer.state_quant, StateLevels)
    again = pickle.loads(pickle.dumps(layer.state_quant))
    x = torch.randn(50)
    assert torch.equal(again(x), layer.state_quant(x))
    assert "16 from -1 to 1.2" in repr(again)


@pytest.mark.parametrize(("bits", "upper"), [(1, 0.2), (3, 0.0), (4, 0.2), (8, 0.5)])
def test_with_stock_the_framework_makes_the_levels_itself(bits, upper):
    spec = adapters.spec(snn.Leaky(0.9, state_quant=quant.state_quant(num_bits=bits, upper_limit=upper)))
    layer = adapters.build(spec, "snntorch", stock=True)
    assert layer.state_quant.__module__ == quant.__name__
    assert adapters.spec(layer) == spec


def test_with_stock_uneven_levels_are_refused():
    spec = adapters.spec(snn.Leaky(0.9, state_quant=quant.state_quant(num_bits=4, uniform=False)))
    with pytest.raises(adapters.ConversionError, match=r"state_levels='16 levels'.*from each other.*stock=False"):
        adapters.build(spec, "snntorch", stock=True)


@pytest.mark.parametrize("mechanism", ["subtract", "zero"])
@pytest.mark.parametrize("to", ["sinabs", "brainpy"])
def test_a_framework_that_rounds_no_states_refuses(to, mechanism):
    pytest.importorskip(to)
    layer = layer_of("Leaky", mechanism, True, quant.state_quant(num_bits=4))
    layer.graded_spikes_factor.fill_(1.0)
    with pytest.raises(adapters.ConversionError, match=r"(?i)state_levels='16 levels.*rounds no state.*Remedy: to="):
        adapters.build(adapters.spec(layer), to)


@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("to", ["spikingjelly", "norse"])
def test_other_frameworks_round_in_a_class_of_ours_alone(to, mechanism):
    pytest.importorskip(to)
    layer = snn.Leaky(0.9, reset_mechanism=mechanism, init_hidden=True, state_quant=quant.state_quant(num_bits=4))
    spec = adapters.spec(layer)
    with pytest.raises(adapters.ConversionError, match=r"state_levels='16 levels'.*Remedy: stock=False"):
        adapters.build(spec, to, stock=True)
    built, xs = adapters.build(spec, to), torch.randn(80, B, N)
    assert adapters.spec(built).state_levels == spec.state_levels
    outputs, states = adapter(to).trace(built, xs)
    assert oracle.judge(spec, recorded(xs, outputs, states, adapters.spec(built))).ok
    assert torch.equal(outputs, ours.trace(layer, xs)[0])


@pytest.mark.parametrize("to", ["tracetorch", "snntorch"])
@pytest.mark.parametrize("name", ["RLeaky", "RSynaptic"])
def test_recurrent_layers_round_too(name, to):
    torch.manual_seed(0)
    options = {"linear_features": N, "init_hidden": True, "state_quant": quant.state_quant(num_bits=4)}
    layer = snn.RLeaky(0.8, **options) if name == "RLeaky" else snn.RSynaptic(0.5, 0.8, **options)
    net, xs = nn.Sequential(nn.Linear(6, N), layer), 2 * torch.randn(40, B, 6)
    result = tt.convert(net, to=to, sample=xs, time_dim=0)
    assert result.verify(xs, grad=True).ok
    assert [row.forward for row in result.report.rows] == ["exact", "exact"]


def test_a_network_written_as_a_file_keeps_its_levels(tmp_path):
    """The file must not fall back on a `Leaky` without them."""
    xs = 2 * torch.rand(20, B, 6)
    model = tt.convert(network(), to="snntorch", sample=xs, time_dim=0).model
    path = tmp_path / "net.py"
    path.write_text(rebuild.source(model))
    found = importlib.util.spec_from_file_location("net_with_levels", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    built = module.build()
    built.load_state_dict(model.state_dict())
    for number in (1, 3):
        assert adapters.spec(built[number]) == adapters.spec(model[number])
