"""`adapters.Pipeline`: conventions, seams and their errors, probes, fusing, being one module."""

from __future__ import annotations

import re

import numpy as np
import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from norse.torch import LIF, LIFBoxCell, Lift, SequentialState
from spikingjelly.activation_based import neuron as sj
from torch import nn

pytest.importorskip("brainpy")

import tracetorch as tt
from tests.bits import assert_bits
from tests.pipeline_cases import N, four, leaky, lif, linear, native, pipeline, sinabs_lif, stimulus
from tracetorch import adapters
from tracetorch.adapters import JaxStage, Pipeline, SeamError, stage


class Odd(nn.Module):
    """A module of a user's own: what its call takes cannot be known."""

    def __init__(self, function=lambda x: x):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Leak(nn.Module):
    """Its state goes in and out."""

    def forward(self, x, state=None):
        state = x if state is None else 0.5 * state + x
        return state, state


# ---- conventions -----------------------------------------------------------------------------------------------------


def loop(module, xs):
    return torch.stack([module(x) for x in xs])


def explicit(module, xs, state=None):
    outputs = []
    for x in xs:
        y, state = module(x, state)
        outputs.append(y)
    return torch.stack(outputs)


def squeezed(module, xs):
    flat = module(xs.transpose(0, 1).flatten(0, 1))
    return flat.unflatten(0, (xs.shape[1], xs.shape[0])).transpose(0, 1)


CASES = {
    "snnTorch": (leaky, loop, "one step"),
    "snnTorch, state returned": (lambda: snn.Leaky(0.8), lambda m, xs: torch.stack([m(x)[0] for x in xs]), "one step"),
    "sinabs": (sinabs_lif, lambda m, xs: m(xs.transpose(0, 1)).transpose(0, 1), r"\[B, T"),
    "sinabs squeezed": (lambda: sl.LIFSqueeze(tau_mem=8.0, num_timesteps=12), squeezed, r"\[B\*T"),
    "spikingjelly s": (sj.LIFNode, loop, "one step"),
    "spikingjelly m": (lambda: sj.LIFNode(step_mode="m"), lambda m, xs: m(xs), r"\[T, B"),
    "norse cell": (LIFBoxCell, explicit, "state passed in and out"),
    "norse layer": (LIF, lambda m, xs: m(xs)[0], "state passed in and out"),
    "norse Lift": (lambda: Lift(LIFBoxCell()), lambda m, xs: m(xs)[0], "state passed in and out"),
    "norse SequentialState": (lambda: SequentialState(linear(), LIFBoxCell()), explicit, "state passed in and out"),
    "native": (native, lambda m, xs: m.unroll(xs), "a native layer"),
    "native model": (lambda: tt.Sequential(linear(), native()), loop, "stateless torch module.*native layer"),
    "lstm": (lambda: nn.LSTM(N, N), lambda m, xs: m(xs)[0], "nn.LSTM"),
    "gru, batch first": (
        lambda: nn.GRU(N, N, batch_first=True),
        lambda m, xs: m(xs.transpose(0, 1))[0].transpose(0, 1),
        r"\[B, T.*nn.GRU",
    ),
    "sinabs in a Sequential": (
        lambda: nn.Sequential(linear(), sinabs_lif(), nn.ReLU()),
        lambda m, xs: m(xs.transpose(0, 1)).transpose(0, 1),
        r"\[B, T.*Sequential",
    ),
    "steps in a Sequential": (lambda: nn.Sequential(linear(), leaky(), nn.Sequential(native())), loop, "1: one step"),
    "given": (lambda: Odd(lambda x: x * 2), lambda m, xs: m(xs), "as given"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stage_is_called_as_its_users_call_it(case):
    make, expected, words = CASES[case]
    torch.manual_seed(0)
    module = make()
    torch.manual_seed(0)
    alone = make()
    first = stage(module, kind="step") if case == "given" else module
    pipe, xs = Pipeline(first, fold="exact"), stimulus()
    (said,) = pipe.conventions
    assert re.search(words, said), said
    with torch.no_grad():
        truth = expected(alone, xs)
        whole = pipe(xs)
        tt.reset_states(pipe)
        batch_first = Pipeline(first, time_dim=1, fold="exact")(xs.transpose(0, 1)).transpose(0, 1)
    assert truth.shape == whole.shape
    torch.testing.assert_close(whole, truth.to(whole.dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch_first, whole, rtol=1e-6, atol=1e-6)


def test_brainpy_modules_become_stages():
    pipe, xs = Pipeline(linear(), lif(), dt=1.0), stimulus()
    assert isinstance(pipe.stages[1].module, JaxStage)
    assert_bits(pipe(xs), JaxStage(lif(), dt=1.0)(linear()(xs)))


def test_an_explicit_state_that_is_given():
    pipe, xs = Pipeline(stage(Leak(), kind="step", explicit_state=True)), stimulus()
    whole = pipe(xs)
    assert_bits(whole, explicit(Leak(), xs))
    tt.reset_states(pipe)
    assert_bits(torch.cat([pipe(xs[:5]), pipe(xs[5:])]), whole)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Pipeline(), ValueError, "at least one stage"),
        (lambda: Pipeline(linear(), Odd()), TypeError, r"stage 1 \(Odd\).*adapters\.stage\(module, kind='step'\)"),
        (lambda: Pipeline(linear(), 3), TypeError, "stage 1 is a int"),
        (lambda: Pipeline(linear(), time_dim=2), ValueError, "time_dim=2"),
        (lambda: Pipeline(linear(), fold="slow"), ValueError, "fold='slow'"),
        (lambda: Pipeline(nn.Sequential(leaky(), sinabs_lif())), TypeError, "one by one"),
        (lambda: stage(Odd(), kind="sequence"), ValueError, "needs time_dim"),
        (lambda: stage(Odd(), kind="steps"), ValueError, "kind='steps' is not known"),
        (lambda: stage(Odd(), kind="step", time_dim=1), ValueError, "time_dim=1"),
        (lambda: Pipeline((linear(), "step")), TypeError, "adapters.stage"),
    ],
)
def test_what_cannot_be_known_or_is_wrong_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_one_neuron_in_two_stages_is_refused():
    shared = leaky()
    with pytest.raises(ValueError, match=r"stages 0 and 2 hold one and the same module with states"):
        Pipeline(shared, linear(), shared)
    shared = linear()
    assert Pipeline(shared, leaky(), shared)(stimulus()).shape == stimulus().shape


# ---- seams -----------------------------------------------------------------------------------------------------------


def seams():
    xs = stimulus()
    swap = stage(Odd(lambda x: x.transpose(0, 1)), kind="sequence", time_dim=0)
    shorter = stage(Odd(lambda x: x[1:]), kind="sequence", time_dim=0)
    text = stage(Odd(lambda x: "spikes"), kind="sequence", time_dim=0)
    squeeze = sl.LIFSqueeze(tau_mem=8.0, num_timesteps=9)
    return {
        "features": (Pipeline(linear(), nn.Linear(7, 3)), xs, r"seam 1, stage 0 \(Linear\) -> stage 1.*shapes"),
        "dtype": (Pipeline(linear().double()), xs, r"seam 0, input -> stage 0.*its weight is torch.float64.*pipe\.to"),
        "integers": (Pipeline(linear()), xs.int(), r"the input is torch.int32.*x\.float"),
        "no time": (Pipeline(linear()), xs[0, 0], r"needed is \[T, B"),
        "no step": (Pipeline(linear()), xs[:0], "has no step"),
        "no tensor": (Pipeline(linear()), [1.0], "the input is list"),
        "exchanged": (Pipeline(linear(), swap), xs, r"seam 2.*time and batch are exchanged"),
        "shorter": (Pipeline(shorter, linear()), xs, r"seam 1.*12 steps of 3 samples went into stage 0.*\[11, 3, 5\]"),
        "text": (Pipeline(text), xs, "stage 0 returned str"),
        "squeezed": (Pipeline(linear(), squeeze), xs, r"seam 1.*num_timesteps=9, the input 12 steps"),
        "device": (Pipeline(linear(), leaky()).to("meta"), xs, r"seam 0.*its weight is on meta"),
        "in_size": (Pipeline(linear(), lif(size=4), dt=1.0), xs, r"seam 1.*in_size"),
        "no dt": (Pipeline(linear(), lif()), xs, r"seam 1.*needs a time step"),
        "float64 without x64": (Pipeline(linear(), lif(), dt=1.0).double(), xs.double(), r"seam 1.*x64"),
    }


@pytest.mark.parametrize("name", list(seams()))
def test_an_error_names_the_seam(name):
    pipe, xs, words = seams()[name]
    with pytest.raises(SeamError, match=words):
        pipe(xs)
    assert all(s is None for states in tt.save_states(pipe).values() for s in states.values())


def test_spikes_keep_the_pipelines_dtype():
    pipe = Pipeline(linear(), sinabs_lif(), linear(seed=1), leaky(), linear(seed=2)).double()
    assert pipe(stimulus(dtype=torch.float64)).dtype == torch.float64


def test_data_is_not_copied_where_strides_allow():
    seen = []
    look = stage(Odd(lambda x: (seen.append(x.data_ptr()), x)[1]), kind="sequence", time_dim=1)
    xs = stimulus().requires_grad_()
    ys = Pipeline(look, look)(xs)
    assert seen == [xs.data_ptr()] * 2
    assert ys.data_ptr() == xs.data_ptr()


# ---- one module ------------------------------------------------------------------------------------------------------


def test_it_is_one_module():
    pipe = four()
    names = {name for name, _ in pipe.named_parameters()}
    assert {"stages.0.module.weight", "stages.1.module.tau_mem", "stages.5.module.raw_beta"} <= names
    assert "stages.7.module.R" in pipe.state_dict()
    pipe.eval()
    assert not any(module.training for module in pipe.modules())
    text = str(pipe)
    assert "a sinabs layer" in text
    assert "JaxStage(LIF" in text
    assert pipe.conventions[1] == "[B, T, ...] a call (a sinabs layer)"


def test_fused_stages_are_the_same_and_share_parameters():
    pipe, xs = four(fold="exact"), stimulus(steps=40)
    fused = Pipeline(*(s.module for s in pipe.stages), fuse=True, fold="exact")
    assert_bits(fused(xs), pipe(xs))
    assert [id(p) for p in fused.parameters()] == [id(p) for p in pipe.parameters()]
    assert type(fused.stages[3].module).twin_of is snn.Leaky
    assert fused.stages[7].module.R is pipe.stages[7].module.R
    nested = Pipeline(Pipeline(leaky()), fuse=True)
    assert type(nested.stages[0].module.stages[0].module).twin_of is snn.Leaky
    found = []
    for each in (pipe, fused):
        each.zero_grad()
        tt.reset_states(each)
        each(xs).square().sum().backward()
        found.append([p.grad.clone() for p in each.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_folding_is_rounding():
    xs = stimulus()
    fast, exact = Pipeline(linear(), nn.Tanh(), fold="fast"), Pipeline(linear(), nn.Tanh(), fold="exact")
    torch.testing.assert_close(fast(xs), exact(xs), rtol=1e-5, atol=1e-6)


def test_with_stage_shares_the_others():
    pipe = four()
    other = pipe.with_stage(1, leaky())
    assert other.stages[0].module is pipe.stages[0].module
    assert isinstance(other.stages[1].module, snn.Leaky)
    assert other(stimulus()).shape == stimulus().shape
    with pytest.raises(ValueError, match="no stage 9"):
        pipe.with_stage(9, leaky())


def test_a_pipeline_inside_a_network_is_reached():
    net = nn.ModuleDict({"front": pipeline("others")})
    net["front"](stimulus())
    assert any(s is not None for states in tt.save_states(net).values() for s in states.values())
    tt.reset_states(net)
    assert all(s is None for states in tt.save_states(net).values() for s in states.values())


# ---- probes ----------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Returns the same spikes whatever goes in."""

    def __init__(self, spikes):
        super().__init__()
        self.register_buffer("spikes", spikes)

    def forward(self, x):
        return self.spikes


def test_probe_counts_by_hand():
    spikes = torch.zeros(6, 2, 4)
    spikes[:, :, 0] = 1.0  # always
    spikes[2, 1, 1] = 1.0  # once
    spikes[3, 0, 1] = 2.0
    probe = Pipeline(stage(Fixed(spikes), kind="sequence", time_dim=0)).probe(torch.full((6, 2, 4), 0.5))
    first, last = probe
    assert not first.spikes
    assert (last.spikes, last.silent, last.saturated, last.neurons) == (True, 2, 1, 4)
    assert last.rate == pytest.approx((12 + 1 + 2) / 48)
    assert last.shape == (6, 2, 4)
    assert (last.low, last.high, last.nan, last.infinite) == (0.0, 2.0, 0, 0)
    assert "2 of 4" in str(probe)
    assert probe.warnings == ()


def test_probe_finds_what_is_wrong():
    spikes = torch.zeros(6, 2, 4)
    silent = Pipeline(stage(Fixed(spikes), kind="sequence", time_dim=0)).probe(torch.full((6, 2, 4), 0.5))
    assert any("all 4 neurons are silent" in w for w in silent.warnings)
    loud = Pipeline(stage(Fixed(spikes + 1), kind="sequence", time_dim=0)).probe(torch.full((6, 2, 4), 0.5))
    assert any("fire in every step" in w for w in loud.warnings)
    broken = spikes.clone()
    broken[0, 0, 0], broken[1, 1, 1] = torch.nan, torch.inf
    bad = Pipeline(stage(Fixed(broken), kind="sequence", time_dim=0)).probe(torch.full((6, 2, 4), 0.5))
    assert (bad[1].nan, bad[1].infinite) == (1, 1)
    assert any("1 NaN, 1 infinite" in w for w in bad.warnings)


def test_probe_changes_nothing_and_draws():
    pipe, xs = pipeline("four"), stimulus()
    pipe(xs)
    kept = tt.save_states(pipe)
    probe = pipe.probe(xs)
    assert all(s is kept[p][n] for p, states in tt.save_states(pipe).items() for n, s in states.items())
    assert len(probe) == 9
    assert not probe[8].data.requires_grad
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = probe.raster()
    assert len(figure.axes) == 9
    marks = figure.axes[8].collections[0].get_offsets()
    assert len(marks) == int((probe[8].data[:, 0] > 0).sum())
    assert np.asarray(probe[8].raster(1).collections[0].get_offsets()).shape[1] == 2
    from matplotlib import pyplot

    pyplot.close("all")


def test_public_names():
    assert {"Pipeline", "stage", "JaxStage", "SeamError"} <= set(adapters.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = adapters.nothing
