"""How the 32 native layers are made: spelled, given arguments, documented, copied, saved and subclassed."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits
from tests.native_cases import FIRING, NAMES, B, N, assert_near, letters, make, parameters_of, stimulus, values_of
from tracetorch.functional import round_ste, sigmoid4x
from tracetorch.oracle import native
from tracetorch.snn.leaky import LAYERS

pytestmark = pytest.mark.usefixtures("poisoned")


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
