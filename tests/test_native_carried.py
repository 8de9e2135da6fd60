"""Native networks into native ones: any of the 32 layers is carried as it is, and judged by its own equations."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tracetorch import adapters, oracle
from tracetorch.adapters.native import described
from tracetorch.adapters.registry import adapter
from tracetorch.core.composition import Composition
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional import round_ste
from tracetorch.functional.quantizers import probabilistic_ste, stochastic_round_ste
from tracetorch.snn.leaky import LAYERS

T, B, N = 40, 2, 5
NAMES = [layer.__name__ for layer in LAYERS]
NATIVE = adapter("tracetorch")


class RLIEMA(tt.snn.Composed, family="LI", parts="R", ema=True):
    """A combination that is none of the 32."""


class DLITEMA(tt.snn.Composed, family="LIT", parts="D", ema=True):
    """Another."""


class Child(tt.snn.RLIB):
    """A subclass that computes something of its own."""

    def step(self, x, *states):
        return super().step(2 * x, *states)


def made(kind, hard=True, n=N, **options):
    """A layer with a value of its own for every neuron and parameter."""
    if kind.parts.output.fires and hard:
        options = {"quant_fn": round_ste(), **options}
    layer = kind(n, **options)
    generator = torch.Generator().manual_seed(len(kind.__name__))
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return layer


def stimulus(*shape, seed=1):
    return torch.randn(*(shape or (T, B, N)), generator=torch.Generator().manual_seed(seed)) * 1.2


def signs(outputs):
    return set(outputs.detach().sign().unique().tolist())


SMOOTH = (tt.snn.LIB, tt.snn.SLITS, tt.snn.DRLIB, tt.snn.DSRLIT)
EVERY = [*((kind, True) for kind in (*LAYERS, RLIEMA, DLITEMA)), *((kind, False) for kind in SMOOTH)]


@pytest.mark.parametrize(
    ("kind", "hard"), EVERY, ids=[f"{kind.__name__}-{'hard' if hard else 'smooth'}" for kind, hard in EVERY]
)
def test_a_native_layer_is_carried_as_it_is(kind, hard):
    layer, xs = made(kind, hard), stimulus() * (8 if kind.parts.ema else 1)
    source = nn.Sequential(layer)
    result = tt.convert(source, to="tracetorch", sample=xs, time_dim=0)
    twin, [row] = result.model[0], result.report
    assert type(twin) is kind
    assert twin is not layer
    assert (row.forward, row.gradient) == ("exact", "exact")
    assert row.gradient_error < 1e-5
    assert row.unexplained_mismatches == row.state_violations == row.spike_mismatches == 0
    outputs = result.run(xs)
    wanted = {"LI": {-1.0, 1.0}, "LIB": {0.0, 1.0} if hard else {1.0}}.get(kind.parts.family)
    assert signs(outputs) == wanted or (wanted is None and signs(outputs) >= {-1.0, 1.0})
    tt.reset_states(source)
    assert torch.equal(outputs, torch.stack([source(x) for x in xs]))


@pytest.mark.parametrize("name", ["SLI", "LIB", "RLIT", "DSLITS"])
def test_a_trained_copy_is_seen_and_can_be_carried_back(name):
    xs = stimulus()
    result = tt.convert(nn.Sequential(made(getattr(tt.snn, name))), to="tracetorch", sample=xs, time_dim=0)
    beta = "raw_pos_beta" if name[0] == "D" else "raw_beta"
    with torch.no_grad():
        getattr(result.model[0], beta).add_(0.5)
    assert result.verify(xs).changed_parameters == (f"0.{beta}",)
    assert result.verify(xs, carry_back=True).ok


@pytest.mark.parametrize("name", ["LIB", "DSLI", "DSRLITS"])
def test_shared_weights_are_the_source_s_own(name):
    source = nn.Sequential(nn.Linear(4, N), made(getattr(tt.snn, name)))
    result = tt.convert(source, to="tracetorch", sample=stimulus(T, B, 4), time_dim=0, share_weights=True)
    theirs, ours = dict(source.named_parameters()), dict(result.model.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(ours[key] is theirs[key] for key in theirs)


def test_the_copy_starts_fresh_and_leaves_the_source_s_states():
    layer = made(tt.snn.DSRLITS)
    layer.unroll(stimulus())
    before = {name: state.clone() for name, state in layer.save_states().items()}
    result = tt.convert(nn.Sequential(layer), to="tracetorch", sample=stimulus(), time_dim=0)
    assert all(state is None for state in result.model[0].save_states().values())
    assert all(torch.equal(state, before[name]) for name, state in layer.save_states().items())


def test_a_baked_layer_gives_one_that_trains():
    source, xs = tt.Sequential(made(tt.snn.DSLIB)), stimulus()
    source.TTcompile()
    result = tt.convert(source, to="tracetorch", sample=xs, time_dim=0)
    row = result.report[0]
    assert (row.forward, row.gradient) == ("exact", "rounding")
    result.run(xs).sum().backward()
    assert all(tensor.grad is not None for tensor in result.model.parameters())
    assert source[0].baked


class Skip(nn.Module):
    """A step with a skip connection, of layers that no spec describes."""

    def __init__(self):
        super().__init__()
        self.enter, self.spikes, self.leave = nn.Linear(4, N), made(tt.snn.DRLIT), made(tt.snn.DSLI)

    def forward(self, x):
        h = self.enter(x)
        return self.leave(h + self.spikes(h))


class Branches(Skip):
    """A forward that no graph holds."""

    def forward(self, x):
        return super().forward(2 * x if x.mean() > 0 else x)


@pytest.mark.parametrize("kind", [Skip, Branches])
def test_whole_networks_of_them(kind):
    torch.manual_seed(0)
    net, xs = kind(), stimulus(20, B, 4)
    result = tt.convert(net, to="tracetorch", sample=xs, time_dim=0)
    assert result.agreement.ok
    assert result.agreement.spike_mismatches == 0
    assert {row.forward for row in result.report} == {"exact"}
    tt.reset_states(net)
    assert torch.equal(result.run(xs), torch.stack([net(x) for x in xs]))


def test_a_converted_network_of_them_is_saved(tmp_path):
    atan = made(tt.snn.SLIT, hard=False, spike_fn=tt.functional.surrogate_spike("atan", strict=False, alpha=3.0))
    net = nn.Sequential(nn.Linear(4, N), made(tt.snn.SRLITS), atan, made(tt.snn.DLI))
    result = tt.convert(net, to="tracetorch", sample=stimulus(T, B, 4), time_dim=0)
    tt.save(tmp_path / "net.tt", result.model)
    again = tt.load(tmp_path / "net.tt")
    xs = stimulus(T, B, 4, seed=3)
    assert torch.equal(tt.unroll(again, xs), result.run(xs))
    assert adapters.spec(again[2]) == adapters.spec(atan)


@pytest.mark.parametrize("name", [name for name in NAMES if "D" in name or "R" in name])
@pytest.mark.parametrize("to", ["snntorch", "sinabs"])
def test_other_frameworks_have_no_place_for_pairs_and_own_traces(to, name):
    net = nn.Sequential(getattr(tt.snn, name)(N))
    with pytest.raises(adapters.ConversionError) as caught:
        tt.convert(net, to=to, sample=stimulus(), time_dim=0)
    error = caught.value
    letter = "D" if "D" in name else "R"
    assert (error.field, error.value) == ("parts", f"{letter} of {name}")
    equation = {"D": "neg = b*neg + min(x, 0)", "R": "rec = gamma*rec + (1-gamma)*s(t-1)"}[letter]
    assert equation in str(error)
    assert "to='tracetorch'" in error.remedy
    if letter == "R":
        assert {"snntorch": "RLeaky", "sinabs": "LIFRecurrent"}[to] in str(error)
    with pytest.raises(SpecError, match=f"{name}: parts {letter}"):
        adapters.spec(net[0])


def test_a_trace_of_weight_0_is_the_layer_without_it():
    """What the refusal says: the one case of R that another framework can have."""
    xs = stimulus()
    layer, other = made(tt.snn.RLIB, rec_weight=0.0, learn_rec_weight=False), made(tt.snn.LIB)
    with torch.no_grad():
        for name in ("raw_beta", "raw_threshold", "raw_bias"):
            getattr(other, name).copy_(getattr(layer, name))
    assert torch.equal(layer.unroll(xs), other.unroll(xs))


# ---- what is not carried ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quant_fn": stochastic_round_ste()}, "random numbers"),
        ({"quant_fn": probabilistic_ste()}, "random numbers"),
        ({"quant_fn": round_ste(0.5)}, "multiples of 0.5"),
        ({"quant_fn": torch.floor}, "known to no other framework"),
        ({"spike_fn": torch.tanh}, "sigmoid4x and surrogate_spike"),
        ({"dim": 1}, "count from the end"),
    ],
    ids=["stochastic", "probabilistic", "half steps", "a function", "another spike", "dim=1"],
)
@pytest.mark.parametrize("name", ["LIT", "DRLIB"])
def test_options_that_cannot_be_judged_are_refused(name, options, said):
    net = nn.Sequential(getattr(tt.snn, name)(N, **options))
    with pytest.raises(adapters.ConversionError, match=said) as caught:
        tt.convert(net, to="tracetorch", sample=stimulus(), time_dim=0)
    assert caught.value.field == next(iter(options))


def test_a_class_of_its_own_is_refused():
    with pytest.raises(adapters.ConversionError, match="made of parts alone"):
        tt.convert(nn.Sequential(Child(N)), to="tracetorch", sample=stimulus(), time_dim=0)


# ---- the judge -------------------------------------------------------------------------------------------------------


def recorded(layer, xs):
    outputs, states = NATIVE.trace(layer, xs)
    arrays = {name: state.detach().numpy() for name, state in states.items()}
    return oracle.Recording(xs.numpy(), outputs.detach().numpy(), arrays, described(layer))


@pytest.mark.parametrize("name", NAMES)
def test_the_judge_takes_the_layer_and_no_other_parameter(name):
    kind = getattr(tt.snn, name)
    dtype = torch.float64 if "S" in name[:2] else torch.float32
    layer = made(kind).to(dtype)
    recording = recorded(layer, (stimulus() * (8 if kind.parts.ema else 1)).to(dtype))
    truth = described(layer)
    judged = oracle.judge(truth, recording)
    assert judged.ok
    assert judged.mismatches == 0
    for parameter in truth.parameters:
        if "LIB" in name and parameter in ("neg_gamma", "neg_rec_weight"):
            continue  # an output of one sign never meets them
        moved = truth.parameters[parameter]
        step = 0.1 if parameter == "bias" else 0.01  # a bias shows only where a membrane is that near
        other = tt.Parameter(moved.value + np.asarray(step, moved.value.dtype), moved.learnable, moved.raw)
        wrong = truth.replace(parameters={**truth.parameters, parameter: other})
        assert not oracle.judge(wrong, recording).ok, parameter


def test_the_judge_rejects_other_spikes_states_and_gradients():
    layer = made(tt.snn.DSRLITS)
    xs = stimulus()
    recording, truth = recorded(layer, xs), described(layer)
    assert isinstance(truth, Composition)

    def ok(**changes):
        return oracle.judge(truth, dataclasses.replace(recording, **changes)).ok

    assert ok()
    silent = np.argwhere(recording.outputs == 0)[7]
    extra = recording.outputs.copy()
    extra[tuple(silent)] = layer.pos_scale[silent[-1]].item()
    swapped = np.where(recording.outputs > 0, -recording.outputs, recording.outputs)
    assert not ok(outputs=extra)
    assert not ok(outputs=swapped)
    assert not ok(outputs=recording.outputs * np.float32(1 + 2**-20))
    for name, state in recording.states.items():
        moved = state.copy()
        moved[10, 1, 2] += 1e-4
        assert not ok(states={**recording.states, name: moved}), name
    weights = np.random.default_rng(0).normal(size=recording.x.shape).astype(np.float32)
    right = oracle.gradients(truth, recording, weights)
    assert set(right) == {"x", *truth.parameters}
    other = truth.replace(surrogate=tt.functional.Surrogate("atan"))
    assert oracle.gradient_error(oracle.gradients(other, recording, weights)["x"], right["x"]) > 0.01


def test_the_bounds_are_no_wider_than_roundings():
    """A relative change of 2^-18 in one state, 64 roundoffs, is seen in every one of the seven."""
    layer = made(tt.snn.DSRLIT)
    recording, truth = recorded(layer, stimulus()), described(layer)
    for name, state in recording.states.items():
        if name == "prev_output":
            continue
        seen = 0
        for t in range(5, T):
            moved = state.copy()
            place = (t, 0, 0)
            moved[place] *= np.float32(1 + 2**-18)
            seen += not oracle.judge(truth, dataclasses.replace(recording, states={**recording.states, name: moved})).ok
        assert seen > 5, name


# ---- channels --------------------------------------------------------------------------------------------------------


CHANNELS = [(to, name) for to in ("tracetorch", "sinabs", "snntorch") for name in ("LI", "LIB", "SLITS")]


@pytest.mark.parametrize(("to", "name"), [*CHANNELS, ("tracetorch", "DSRLITS")])
def test_channels_are_carried(to, name):
    layer = made(getattr(tt.snn, name), n=4, dim=-3)
    torch.manual_seed(0)
    net, xs = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), layer), 3 * stimulus(20, 2, 2, 5, 5)
    result = tt.convert(net, to=to, sample=xs, time_dim=0)
    row = result.report[1]
    assert row.forward == "exact"
    assert row.gradient in ("exact", "rounding", "reparametrised")
    assert row.unexplained_mismatches == row.state_violations == 0
    result.run(xs).square().mean().backward()
    with torch.no_grad():
        for tensor in result.model.parameters():
            tensor.sub_(0.01 * tensor.grad.sign() if tensor.grad is not None else 0)
    assert result.verify(xs, carry_back=True).ok
    assert f"1.raw_{'pos_' if name[0] == 'D' else ''}beta" in result.verify(xs).changed_parameters


@pytest.mark.parametrize("stock", [False, True])
def test_channels_come_back(stock):
    layer = made(tt.snn.SLITS, n=4, dim=-3)
    spec = adapters.spec(layer)
    assert isinstance(spec, NeuronSpec)
    assert {p.value.shape for p in spec.parameters.values()} == {(4, 1, 1)}
    built = adapters.build(spec, "tracetorch", stock=stock)
    xs = 2 * stimulus(20, 2, 4, 5, 5)
    assert torch.equal(built.unroll(xs), layer.unroll(xs))
    assert adapters.spec(built) == spec
    if stock:
        assert (type(built), built.dim, built.num_neurons) == (tt.snn.SLITS, -3, 4)
    twin = copy.deepcopy(built)
    assert adapters.spec(twin) == spec


def test_parameters_over_two_dimensions_are_no_channels():
    spec = adapters.spec(made(tt.snn.LIB))
    grid = tt.Parameter(np.full((3, N), 0.5, np.float32))
    wide = spec.replace(parameters={**spec.parameters, "mem_decay": grid})
    with pytest.raises(adapters.ConversionError, match="one dimension") as caught:
        adapters.build(wide, "tracetorch", stock=True)
    assert "SpecNeuron" in caught.value.remedy
