"""The 32 native layers: against their float64 oracle, stepped, unrolled and through the kernel, and how they are made.

The oracle's own derivatives are checked against finite differences of its smooth form; nothing here is read from the
parts that the layers are made of.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tracetorch.functional import round_ste, sigmoid4x
from tracetorch.oracle import native
from tracetorch.oracle.raw import RAW
from tracetorch.snn.leaky import LAYERS

NAMES = [
    *("LI", "DLI", "SLI", "DSLI", "LIEMA", "DLIEMA", "SLIEMA", "DSLIEMA"),
    *("LIB", "DLIB", "SLIB", "RLIB", "DSLIB", "DRLIB", "SRLIB", "DSRLIB"),
    *("LIT", "DLIT", "SLIT", "RLIT", "DSLIT", "DRLIT", "SRLIT", "DSRLIT"),
    *("LITS", "DLITS", "SLITS", "RLITS", "DSLITS", "DRLITS", "SRLITS", "DSRLITS"),
]
FIRING = [name for name in NAMES if "LIB" in name or "LIT" in name]
T, B, N = 200, 2, 5

pytestmark = pytest.mark.usefixtures("poisoned")


def letters(name):
    """("DSR", "LITS", ema) from a name."""
    prefix, family = name[: name.index("LI")], name[name.index("LI") :]
    return prefix, family.removesuffix("EMA"), family.endswith("EMA")


def kind_of(name, hard=True):
    prefix, family, ema = letters(name)
    return native.Native(family, "D" in prefix, "S" in prefix, "R" in prefix, ema, hard)


def parameters_of(name):
    """The names of a layer's parameters in the order of its arguments, as the issue spells it."""
    prefix, family, _ = letters(name)
    signs = ["pos_", "neg_"] if "D" in prefix else [""]
    names = [s + d for d, letter in (("alpha", "S"), ("beta", ""), ("gamma", "R")) for s in signs if letter in prefix]
    names += {"LI": [], "LIB": ["threshold", "bias"]}.get(family, ["pos_threshold", "neg_threshold", "bias"])
    names += ["pos_scale", "neg_scale"] if family == "LITS" else []
    return names + [f"{s}rec_weight" for s in signs if "R" in prefix]


def form_of(parameter):
    """The raw form of a parameter."""
    if parameter.endswith(("alpha", "beta", "gamma")):
        return "sigmoid"
    return "softplus" if parameter.endswith("threshold") else "value"


RANGES = MappingProxyType(
    {
        "alpha": (0.2, 0.8),
        "beta": (0.6, 0.95),
        "gamma": (0.3, 0.9),
        "threshold": (0.5, 1.3),
        "bias": (-0.2, 0.2),
        "scale": (0.5, 2.0),
        "rec_weight": (-0.7, 0.7),
    }
)


def values_of(name, n=N, seed=0):
    """Parameter values by name, float64 [n], different for every neuron, sign and parameter."""
    rng = np.random.default_rng([seed, NAMES.index(name)])
    ranges = {p: next(r for stem, r in RANGES.items() if p.endswith(stem)) for p in parameters_of(name)}
    return {p: rng.uniform(*r, n) for p, r in ranges.items()}


def make(name, hard=True, n=N, dtype=torch.float64, seed=0, **options):
    """A layer of `values_of`; `hard` with the quantizer."""
    values = {p: torch.tensor(v, dtype=dtype) for p, v in values_of(name, n, seed).items()}
    if name in FIRING and hard:
        options = {"quant_fn": round_ste(), **options}
    return getattr(tt.snn, name)(n, **{**values, **options})


def stimulus(*shape, seed=0, dtype=torch.float64):
    """Both signs, so that every branch, threshold and reset is met; some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.9 + 0.15
    return torch.where(torch.rand(xs.shape, generator=generator) < 0.05, 0.0, xs).to(dtype)


def assert_bits(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    a, b = a.detach().contiguous().numpy().reshape(-1), b.detach().contiguous().numpy().reshape(-1)
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    assert a.size
    different = a.view(np.uint8).reshape(a.size, -1) != b.view(np.uint8).reshape(b.size, -1)
    assert not different.any(), f"{different.any(1).sum()} of {a.size} values differ"


def assert_near(found, truth, tolerance, what=""):
    """max|difference| / max|truth|; shapes equal, everything finite, the truth not all zero."""
    found, truth = np.asarray(found), np.asarray(truth)
    assert found.shape == truth.shape, (what, found.shape, truth.shape)
    assert np.isfinite(found).all(), what
    assert np.abs(truth).max() > 0, f"{what}: a truth of zeros shows nothing"
    error = np.abs(found - truth).max() / np.abs(truth).max()
    assert error <= tolerance, f"{what}: {error:.3g}"


def assert_events(name, outputs):
    """Spikes, of both signs where there are two, and steps without any."""
    _, family, _ = letters(name)
    outputs = np.asarray(outputs)
    assert 0.02 * outputs.size < (outputs > 0).sum() < 0.9 * outputs.size
    assert (outputs == 0).sum() > 0.05 * outputs.size
    if family in ("LIT", "LITS"):
        assert (outputs < 0).sum() > 0.02 * outputs.size


# ---- the layers are their equations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "smooth"])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_its_oracle(name, hard):
    """Outputs, states after every step and the gradients of input and raw parameters, float64, T=200."""
    kind, values = kind_of(name, hard), values_of(name)
    layer, xs = make(name, hard), stimulus(T, B, N).requires_grad_()
    outputs, states = layer.trace(xs)
    tapes = native.run(kind, values, xs.detach().numpy())
    truth = np.stack([tape.output for tape in tapes])
    if name in FIRING and hard:
        assert_events(name, truth)
        assert np.array_equal(outputs.detach().numpy() != 0, truth != 0)
    assert_near(outputs.detach().numpy(), truth, 1e-12, "output")
    assert set(states) == set(tapes[0].new)
    for state, recorded in states.items():
        if not (family_is_binary(name) and state in ("neg_rec",)):  # outputs of one sign leave it at zero
            assert_near(recorded.detach().numpy(), np.stack([tape.new[state] for tape in tapes]), 1e-12, state)
    weights = stimulus(T, B, N, seed=1)
    (outputs * weights).sum().backward()
    gradients = native.backward(kind, values, tapes, weights.numpy())
    assert_near(xs.grad.numpy(), gradients["x"], 1e-10, "x")
    for parameter in parameters_of(name):
        raw = getattr(layer, f"raw_{parameter}")
        slope = RAW[form_of(parameter)].slope(raw.detach().numpy())
        expected = gradients[parameter].sum(0) * slope
        if family_is_binary(name) and parameter in ("neg_gamma", "neg_rec_weight"):
            assert (expected == 0).all()
            assert (raw.grad == 0).all()
        else:
            assert_near(raw.grad.numpy(), expected, 1e-9, parameter)


def family_is_binary(name):
    return letters(name)[1] == "LIB"


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_s_gradients_are_its_derivatives(name):
    """The hand-derived backward pass of the smooth form against central differences along random directions."""
    kind, values = kind_of(name, hard=False), values_of(name)
    rng = np.random.default_rng(7)
    xs, weights = rng.normal(0.15, 0.9, (30, B, N)), rng.normal(size=(30, B, N))
    gradients = native.backward(kind, values, native.run(kind, values, xs), weights)

    def loss(moved, x):
        return sum((tape.output * w).sum() for tape, w in zip(native.run(kind, moved, x), weights, strict=True))

    h = 1e-6
    for parameter in ("x", *values):
        target = xs if parameter == "x" else values[parameter]
        direction = rng.normal(size=target.shape)
        ends = []
        for sign in (h, -h):
            moved = {**values} if parameter == "x" else {**values, parameter: target + sign * direction}
            ends.append(loss(moved, xs + sign * direction if parameter == "x" else xs))
        found = (gradients[parameter] * direction).sum()
        assert found == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-6), parameter


def test_the_oracle_and_its_checkers_reject():
    values, xs = values_of("DSRLITS"), stimulus(40, B, N).numpy()
    kind = kind_of("DSRLITS", hard=False)
    truth = np.stack([tape.output for tape in native.run(kind, values, xs)])
    for wrong in (
        {**values, "pos_beta": values["neg_beta"]},
        {**values, "neg_gamma": values["pos_gamma"]},
        {**values, "bias": -values["bias"]},
    ):
        with pytest.raises(AssertionError):
            assert_near(np.stack([tape.output for tape in native.run(kind, wrong, xs)]), truth, 1e-12)
    for found in (truth[:-1], truth + 1e-6, np.where(truth > 0, np.nan, truth), np.zeros_like(truth)):
        with pytest.raises(AssertionError):
            assert_near(found, truth, 1e-9)
    with pytest.raises(AssertionError):
        assert_events("LIT", np.abs(truth))
    with pytest.raises(AssertionError):
        assert_events("LIB", np.zeros(100))


# ---- stepped, unrolled, and through the kernel -----------------------------------------------------------------------


def within_two_ulp(found, truth):
    found, truth = found.detach().numpy(), truth.detach().numpy()
    assert found.shape == truth.shape
    assert found.dtype == truth.dtype
    assert (np.abs(found - truth) <= 2 * np.spacing(np.abs(truth))).all()


def run_both(name, hard, dtype, shape, time_dim, dim=-1):
    """Step by step, unrolled, and unrolled by the kernel; layers, outputs and inputs."""
    n = shape[1:][dim]
    results = []
    for way in ("step", "unroll", "cpu"):
        layer = make(name, hard, n=n, dtype=dtype, dim=dim)
        xs = stimulus(*shape, dtype=dtype)
        xs = (xs if time_dim == 0 else xs.transpose(0, 1)).detach().requires_grad_()
        if way == "step":
            ys = torch.stack([layer(x) for x in xs.unbind(time_dim)], time_dim)
        else:
            with tt.backend("eager" if way == "unroll" else "cpu"):
                ys = layer.unroll(xs, time_dim)
        results.append((layer, xs, ys))
    return results


def compare(name, hard, results, dtype):
    """Bits where the arithmetic is + - * and a rounded sigmoid; else what two ulp of each sigmoid may have become."""
    (step, x0, y0), (unrolled, x1, y1), (fused, x2, y2) = results
    exact = hard or name not in FIRING
    assert_bits(y1, y0)
    for state in step.state_names:
        assert_bits(getattr(unrolled, state), getattr(step, state))
        a, b = getattr(fused, state), getattr(step, state)
        assert_bits(a, b) if exact else assert_close(a, b, dtype)
    assert_bits(y2, y0) if exact else assert_close(y2, y0, dtype)
    weights = stimulus(*y0.shape, seed=3, dtype=dtype)
    for ys in (y0, y1, y2):
        (ys * weights).sum().backward()
    for x in (x1, x2):
        assert_close(x.grad, x0.grad, dtype)
    for parameter, raw in step.named_parameters():
        for other in (unrolled, fused):
            assert_close(getattr(other, parameter).grad, raw.grad, dtype, parameter)


def assert_close(a, b, dtype, what=""):
    assert torch.isfinite(a).all(), what
    scale = float(b.detach().abs().max()) or 1.0
    error = float((a - b).detach().abs().max()) / scale
    assert error <= (1e-5 if dtype is torch.float32 else 1e-13), (what, error)


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "smooth"])
@pytest.mark.parametrize("name", NAMES)
def test_stepped_unrolled_and_fused_are_equal(name, hard):
    results = run_both(name, hard, torch.float32, (63, 2, 7), NAMES.index(name) % 2)
    if name in FIRING and hard:
        assert_events(name, results[0][2].detach())
    compare(name, hard, results, torch.float32)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 2, 513), (200, 3, 7), (40, 1, 300)])
@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "smooth"])
@pytest.mark.parametrize("name", NAMES)
def test_stepped_unrolled_and_fused_are_equal_at_awkward_sizes(name, hard, dtype, time_dim, shape):
    compare(name, hard, run_both(name, hard, dtype, shape, time_dim), dtype)


@pytest.mark.parametrize("name", ["LI", "DSLIEMA", "RLIB", "DSRLIB", "DLIT", "DSRLITS"])
def test_neurons_in_front_of_a_picture(name):
    """`dim=-3` on [T, B, C, H, W] is the layer with the channels last."""
    results = run_both(name, True, torch.float32, (40, 2, 6, 3, 4), 0, dim=-3)
    compare(name, True, results, torch.float32)
    last = make(name, dtype=torch.float32, n=6)
    ys = last.unroll(stimulus(40, 2, 6, 3, 4, dtype=torch.float32).movedim(-3, -1))
    assert_bits(results[0][2].movedim(-3, -1), ys)


# ---- how they are made -----------------------------------------------------------------------------------------------


def test_there_are_thirty_two():
    assert [cls.__name__ for cls in LAYERS] == NAMES
    assert all(getattr(tt.snn, name) is cls for name, cls in zip(NAMES, LAYERS, strict=True))


SPELLED = {
    "LI": "num_neurons beta=0.9 dim=-1 beta_rank=1 learn_beta=True",
    "DSLIEMA": "num_neurons pos_alpha=0.5 neg_alpha=0.5 pos_beta=0.9 neg_beta=0.9 dim=-1 pos_alpha_rank=1 "
    "neg_alpha_rank=1 pos_beta_rank=1 neg_beta_rank=1 learn_pos_alpha=True learn_neg_alpha=True learn_pos_beta=True "
    "learn_neg_beta=True",
    "SRLIB": "num_neurons alpha=0.5 beta=0.9 gamma=0.9 threshold=1.0 bias=0.0 rec_weight=0.0 dim=-1 alpha_rank=1 "
    "beta_rank=1 gamma_rank=1 threshold_rank=1 bias_rank=1 rec_weight_rank=1 learn_alpha=True learn_beta=True "
    "learn_gamma=True learn_threshold=True learn_bias=True learn_rec_weight=True spike_fn quant_fn",
    "DRLITS": "num_neurons pos_beta=0.9 neg_beta=0.9 pos_gamma=0.9 neg_gamma=0.9 pos_threshold=1.0 neg_threshold=1.0 "
    "bias=0.0 pos_scale=1.0 neg_scale=1.0 pos_rec_weight=0.0 neg_rec_weight=0.0 dim=-1 pos_beta_rank=1 "
    "neg_beta_rank=1 pos_gamma_rank=1 neg_gamma_rank=1 pos_threshold_rank=1 neg_threshold_rank=1 bias_rank=1 "
    "pos_scale_rank=1 neg_scale_rank=1 pos_rec_weight_rank=1 neg_rec_weight_rank=1 learn_pos_beta=True "
    "learn_neg_beta=True learn_pos_gamma=True learn_neg_gamma=True learn_pos_threshold=True learn_neg_threshold=True "
    "learn_bias=True learn_pos_scale=True learn_neg_scale=True learn_pos_rec_weight=True learn_neg_rec_weight=True "
    "spike_fn quant_fn",
}
DEFAULTS = {"alpha": 0.5, "beta": 0.9, "gamma": 0.9, "threshold": 1.0, "bias": 0.0, "scale": 1.0, "rec_weight": 0.0}


def spelled(cls):
    rows = list(inspect.signature(cls).parameters.values())
    assert all(row.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for row in rows)
    shown = [row for row in rows if not row.name.endswith("_fn") and row.name != "num_neurons"]
    words = {row.name: f"{row.name}={row.default!r}" for row in shown}
    return " ".join(words.get(row.name, row.name) for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    own = parameters_of(name)
    default = {p: next(v for stem, v in DEFAULTS.items() if p.endswith(stem)) for p in own}
    words = ["num_neurons", *(f"{p}={default[p]}" for p in own), "dim=-1", *(f"{p}_rank=1" for p in own)]
    words += [*(f"learn_{p}=True" for p in own), *(["spike_fn", "quant_fn"] if name in FIRING else [])]
    cls = getattr(tt.snn, name)
    assert spelled(cls) == " ".join(words) == SPELLED.get(name, " ".join(words))
    if name in FIRING:
        rows = inspect.signature(cls).parameters
        assert rows["spike_fn"].default is sigmoid4x
        assert type(rows["quant_fn"].default) is nn.Identity
    layer = cls(3)
    for p, value in default.items():
        torch.testing.assert_close(getattr(layer, p), torch.full((3,), value))
        assert isinstance(getattr(layer, f"raw_{p}"), nn.Parameter)
    assert len(list(layer.parameters())) == len(own)


def test_arguments_go_by_position():
    layer = tt.snn.DSRLITS(2, 0.11, 0.12, 0.21, 0.22, 0.31, 0.32, 0.41, 0.42, 0.5, 0.61, 0.62, 0.71, 0.72, -3)
    for p, value in zip(
        parameters_of("DSRLITS"),
        (0.11, 0.12, 0.21, 0.22, 0.31, 0.32, 0.41, 0.42, 0.5, 0.61, 0.62, 0.71, 0.72),
        strict=True,
    ):
        torch.testing.assert_close(getattr(layer, p), torch.full((2,), value))
    assert layer.dim == -3


@pytest.mark.parametrize("bad", [{"beat": 0.5}, {"num_neurons": 3}, {}])
def test_a_wrong_argument_is_named(bad):
    arguments = () if not bad else (3,)
    with pytest.raises(TypeError, match=r"DLIB: .*num_neurons, pos_beta, neg_beta"):
        tt.snn.DLIB(*arguments, **bad)


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_have_the_equations_and_the_arguments(name):
    cls = getattr(tt.snn, name)
    text = inspect.getdoc(cls)
    for p in parameters_of(name):
        assert f"{p}: " in text
        assert f"*{p}" in text or f"{p}*" in text or f"- {p}" in text or f"-{p}" in text or f"+ {p}" in text, p
    assert all(line == line.rstrip() and len(line) <= 116 for line in text.splitlines())
    for state in cls(2).state_names:
        assert state in text
    assert ("(1 - beta)*" in text or "(1 - pos_beta)*" in text) is name.endswith("EMA")


@pytest.mark.parametrize("name", NAMES)
def test_state_names(name):
    prefix, _, _ = letters(name)
    signs = ["pos_", "neg_"] if "D" in prefix else [""]
    traces = ["mem", *(["syn"] if "S" in prefix else []), *(["rec"] if "R" in prefix else [])]
    expected = {s + trace for s in signs for trace in traces} | ({"prev_output"} if "R" in prefix else set())
    layer = make(name)
    assert set(layer.state_names) == expected
    layer(torch.ones(2, N, dtype=torch.float64))
    assert all(getattr(layer, state).shape == (2, N) for state in expected)
    assert not expected & set(layer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_ranks_and_what_is_not_learned(name):
    own = parameters_of(name)
    values = {p: float(v[0]) for p, v in values_of(name).items()}
    quant = {"quant_fn": round_ste()} if name in FIRING else {}
    cls, xs = getattr(tt.snn, name), stimulus(60, B, N, dtype=torch.float32)
    shared = cls(N, **values, **{f"{p}_rank": 0 for p in own}, **quant)
    each = cls(N, **values, **quant)
    given = cls(N, **{p: torch.tensor(v) for p, v in values.items()}, **quant)
    assert all(getattr(shared, f"raw_{p}").shape == () for p in own)
    assert all(getattr(each, f"raw_{p}").shape == (N,) for p in own)
    assert all(getattr(given, f"raw_{p}").shape == () for p in own), "a scalar tensor is one shared value"
    outputs = [layer.unroll(xs) for layer in (shared, each, given)]
    assert_bits(outputs[0], outputs[1])
    assert_bits(outputs[0], outputs[2])
    fixed = cls(N, **{f"learn_{p}": False for p in own})
    assert not list(fixed.parameters())
    assert {f"raw_{p}" for p in own} == set(dict(fixed.named_buffers())) - set(fixed.state_names)
    assert {f"raw_{p}" for p in own} == set(fixed.state_dict())
    assert not fixed.unroll(xs).requires_grad
    for p in own:
        layer = cls(N, **{f"learn_{p}": False})
        assert len(list(layer.parameters())) == len(own) - 1
        with pytest.raises(ValueError, match=f"{name}: {p}"):
            cls(N, **{p: [0.5] * (N + 1)})
        with pytest.raises(ValueError, match=f"{p}_rank=2"):
            cls(N, **{f"{p}_rank": 2})


@pytest.mark.parametrize("name", NAMES)
def test_an_input_of_another_size_is_named(name):
    layer = make(name)
    with pytest.raises(ValueError, match=rf"{name}: .*size 4 at dim=-1.*num_neurons=5"):
        layer(torch.ones(2, 4, dtype=torch.float64))
    layer = make(name, dim=1)
    with pytest.raises(ValueError, match=rf"{name}: .*size 7 at dim=1.*num_neurons=5"):
        layer(torch.ones(5, 7, 5, dtype=torch.float64))
    assert all(state is None for state in layer.save_states().values())


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_files(name, tmp_path):
    layer, xs = make(name, dtype=torch.float32), stimulus(20, B, N, dtype=torch.float32)
    layer.unroll(xs[:10])
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    rest = layer.unroll(xs[10:])
    for twin in twins:
        assert type(twin) is type(layer)
        assert_bits(twin.unroll(xs[10:]), rest)
    layer.reset_states()
    tt.save(tmp_path / "net.tt", layer)
    loaded = tt.load(tmp_path / "net.tt")
    assert type(loaded) is type(layer)
    assert_bits(loaded.unroll(xs), layer.unroll(xs))


def test_two_layers_share_no_quantizer():
    one, other = tt.snn.LIB(3), tt.snn.LIB(3)
    assert type(one.quant_fn) is nn.Identity
    assert one.quant_fn is not other.quant_fn
    assert one.quant_fn is not inspect.signature(tt.snn.LIB).parameters["quant_fn"].default


class Shifted(tt.snn.DLIB):
    """A subclass with a constructor of its own, and one more state."""

    def __init__(self, num_neurons, shift=0.5):
        super().__init__(num_neurons, pos_beta=0.5, quant_fn=round_ste())
        self.shift = shift
        self.define_state("count")

    def step(self, x, *states):
        *own, count = states
        output, *own = super().step(x - self.shift, *own)
        return (output, *own, count + output)


def test_a_layer_can_be_subclassed():
    layer, stock = Shifted(N), tt.snn.DLIB(N, 0.5, quant_fn=round_ste())
    assert str(inspect.signature(Shifted)) == "(num_neurons, shift=0.5)"
    xs = 2 * stimulus(50, B, N, dtype=torch.float32)
    with tt.backend("cpu"):
        ys = layer.unroll(xs)
    assert_bits(ys, stock.unroll(xs - 0.5))
    assert_bits(layer.count, ys.sum(0))
    assert ys.sum() > 5
    assert_bits(copy.deepcopy(layer).unroll(xs), layer.unroll(xs))
    pickle.loads(pickle.dumps(layer))


class RLIEMA(tt.snn.Composed, family="LI", parts="R", ema=True):
    """A thirty-third combination:"""


def test_a_thirty_third_combination_is_one_line():
    values = {"beta": np.array(0.8), "gamma": np.array(0.6), "rec_weight": np.array(0.4)}
    layer = RLIEMA(N, **{p: torch.tensor(float(v), dtype=torch.float64) for p, v in values.items()})
    xs = stimulus(50, B, N)
    tapes = native.run(native.Native("LI", recurrent=True, ema=True), values, xs.numpy())
    assert_near(layer.unroll(xs).detach().numpy(), np.stack([tape.output for tape in tapes]), 1e-12)
    assert spelled(RLIEMA).startswith("num_neurons beta=0.9 gamma=0.9 rec_weight=0.0 dim=-1")
    assert "rec_weight*rec" in RLIEMA.__doc__
    with pytest.raises(ValueError, match="parts 'DX'"):

        class Wrong(tt.snn.Composed, family="LI", parts="DX"):
            pass

    with pytest.raises(TypeError, match="need family="):

        class Forgotten(tt.snn.LIB, parts="S"):
            pass

    with pytest.raises(TypeError, match="in a subclass of it"):

        class Own(tt.snn.Composed, family="LI"):
            def __init__(self):
                super().__init__(3)

    with pytest.raises(TypeError, match="has no parts"):
        tt.snn.Composed(3)


def test_no_step_equation_is_written_twice():
    """The forward code of all 32 layers, and what there is of each layer, in lines."""
    from tracetorch.snn import composed, leaky

    assert len(inspect.getsource(composed).splitlines()) < 300
    assert len(inspect.getsource(leaky).splitlines()) < 6 * 32 + 30
    assert all("step" not in vars(cls) and "forward" not in vars(cls) for cls in LAYERS)


# Quirk: torch 2.13's Dynamo asks a state that hangs on a graph for its `.grad`, and makes an object of an autograd
# Function; torch warns of both. Goes when it does neither.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [n if n in ("DSLIEMA", "LIB", "DSRLITS") else pytest.param(n, marks=pytest.mark.sweep) for n in NAMES],
)
def test_torch_compile_of_the_whole_step(name):
    """`fullgraph=True`: no break; two steps, the second from the states of the first."""
    torch._dynamo.reset()
    layer, xs = make(name, dtype=torch.float32), stimulus(3, B, N, dtype=torch.float32)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")
    for x in xs:
        assert_bits(compiled(x), layer(x))
    for state in layer.state_names:
        assert_bits(getattr(compiled._orig_mod, state), getattr(layer, state))
