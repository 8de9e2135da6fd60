"""`tt.unroll`: exact is the step loop bit for bit, fast but for rounding, and what is no plain graph is looped."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.native_cases import assert_bits
from tracetorch.core import folding
from tracetorch.core.program import NotPlain, program
from tracetorch.functional import round_ste, stochastic_round_ste

pytestmark = pytest.mark.usefixtures("one_thread")

T, B = 24, 3


def hard(n, cls=tt.snn.LIB, **options):
    return cls(n, threshold=0.4, quant_fn=round_ste(), **options)


class Scale(nn.Module):
    """No listed module."""

    def forward(self, x):
        return x * 1.5 - x.mean()


class Block(nn.Module):
    """A residual block with a neuron inside."""

    def __init__(self, n):
        super().__init__()
        self.linear, self.neuron = nn.Linear(n, n), hard(n)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, n))

    def forward(self, x):
        h = self.neuron(self.linear(x) + self.shift)
        return x + self.gain * h


class Net(tt.Model):
    """Layers in a list, a residual block, functions, methods and shapes."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(7, 16)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.leave = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
        self.read = tt.snn.LI(4)

    def forward(self, x):
        h = torch.relu(self.enter(x.flatten(1)))
        for block in self.blocks:
            h = block(h)
        h = torch.cat([h[:, :8], h[:, 8:].tanh()], dim=-1)
        return self.read(self.leave(h) - 0.1 * h.view(x.shape[0], 4, 4).sum(-1))


def dense():
    second = hard(21, tt.snn.SLIB)
    return tt.Sequential(nn.Linear(7, 33), hard(33), nn.Linear(33, 21), second, nn.Linear(21, 5), tt.snn.LI(5))


def smooth():
    return tt.Sequential(nn.Linear(7, 33), tt.snn.LIB(33), nn.Linear(33, 5), Scale(), tt.snn.DSRLITS(5))


def conv():
    return tt.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), hard(6, dim=-3), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 4, 3), hard(4, dim=1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 5), tt.snn.LI(5)),
    )


def channels_last():
    return conv().to(memory_format=torch.channels_last)


MODELS = {
    "dense": (dense, (B, 7)),
    "no batch": (dense, (7,)),
    "conv": (conv, (B, 2, 8, 8)),
    "conv channels_last": (channels_last, (B, 2, 8, 8)),
    "Net": (Net, (B, 1, 7)),
    "neurons first": (lambda: nn.Sequential(hard(7), tt.snn.DSLI(7), nn.Sequential(nn.Linear(7, 3))), (B, 7)),
    "one neuron": (lambda: hard(7), (B, 7)),
    "smooth": (smooth, (B, 7)),
    "stochastic": (
        lambda: nn.Sequential(nn.Linear(7, 9), tt.snn.LIT(9, quant_fn=stochastic_round_ste()), nn.Linear(9, 2)),
        (B, 7),
    ),
}
# A kernel's sigmoid is within 2 ulp of torch's: its bits are torch's in eager.
EAGER = ("smooth",)


def made(name, train=True):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().train(train)
    xs = torch.randn(T, *shape) + 0.4
    if name.endswith("channels_last"):
        xs = torch.stack([x.contiguous(memory_format=torch.channels_last) for x in xs])
    return model, xs


def loop(model, xs):
    return torch.stack([model(x) for x in xs])


def assert_near(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    assert float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


def spikes(model, xs):
    """How many spikes the hard layers give, so that a trace in which nothing fires proves nothing."""
    count = []
    for module in model.modules():
        if isinstance(module, tt.snn.LIB) and isinstance(module.quant_fn, round_ste):
            module.register_forward_hook(lambda m, i, o: count.append(int((o > 0).sum())))
    loop(model, xs)
    return sum(count)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_is_the_step_loop(name, train):
    """Outputs, final states, running statistics, random numbers, bit for bit; gradients but for the order of sums."""
    model, xs = made(name, train)
    twin = copy.deepcopy(model)
    inputs = [xs.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(1)
    stepped = loop(model, inputs[0])
    torch.manual_seed(1)
    with tt.backend("eager" if name in EAGER else "cpu"):
        found = tt.unroll(twin, inputs[1], fold="exact")
    assert_bits(found, stepped)
    assert tt.save_states(model).keys() == tt.save_states(twin).keys()
    for path, states in tt.save_states(model).items():
        for state, value in states.items():
            assert_bits(tt.save_states(twin)[path][state], value)
    for buffer, value in model.state_dict().items():
        assert_bits(twin.state_dict()[buffer], value)
    weights = torch.randn_like(stepped)
    (stepped * weights).sum().backward()
    (found * weights).sum().backward()
    assert_near(inputs[1].grad, inputs[0].grad)
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        assert_near(a.grad, b.grad, 1e-4)
    if name in ("dense", "conv", "Net"):
        assert spikes(copy.deepcopy(made(name)[0]), xs) > 50


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "stochastic"])
def test_fast_is_the_step_loop_but_for_rounding(name, time_dim):
    """Smooth layers, so that a rounding stays a rounding; in eval mode, where the dropout draws nothing."""
    if name == "no batch" and time_dim == 1:
        time_dim = -1 - 1  # [T, 7]: the only other dimension is no time
    model, xs = made(name, train=False)
    for module in model.modules():
        if isinstance(module, tt.snn.LIB):
            module.quant_fn = nn.Identity()
        assert not isinstance(module, stochastic_round_ste)
    twin = copy.deepcopy(model)
    stepped = loop(model, xs)
    given = xs.movedim(0, time_dim) if time_dim == 1 else xs
    found = tt.unroll(twin, given, time_dim=time_dim if time_dim == 1 else 0)
    assert_near(found.movedim(time_dim, 0) if time_dim == 1 else found, stepped)
    for path, states in tt.save_states(model).items():
        for state, value in states.items():
            assert_near(tt.save_states(twin)[path][state], value)


@pytest.mark.parametrize("fold", ["fast", "exact"])
def test_kernels_and_chunks(fold):
    model, xs = made("dense")
    whole = tt.unroll(model, xs, fold=fold)
    for backend in ("cpu", "eager"):
        tt.reset_states(model)
        with tt.backend(backend):
            parts = torch.cat([tt.unroll(model, part, fold=fold) for part in (xs[:7], xs[7:8], xs[8:])])
        assert_near(parts, whole, 1e-4)


def test_exact_with_time_second_and_in_the_middle():
    model, xs = made("dense")
    stepped = loop(model, xs)
    for dim in (1, 2, -1):
        tt.reset_states(model)
        given = xs.movedim(0, dim).contiguous()
        by_hand = torch.stack([model(x) for x in given.unbind(dim)], dim)
        tt.reset_states(model)
        assert_bits(tt.unroll(model, given, time_dim=dim, fold="exact"), by_hand)
        assert by_hand.movedim(dim, 0).shape == stepped.shape


# ---- what folds, and what runs per step ------------------------------------------------------------------------------


class Counted(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, x):
        self.calls += 1
        return self.module(x)


def calls_of(module, xs, fold="fast"):
    """How often `tt.unroll` calls a module."""
    shapes = []
    kind = type(module)
    forward = kind.forward
    try:
        kind.forward = lambda self, x: shapes.append(tuple(x.shape)) or forward(self, x)
        ys = tt.unroll(nn.Sequential(module, nn.Identity()), xs, fold=fold)
    finally:
        kind.forward = forward
    return len(shapes), ys


X1, X2, X3 = (B, 4, 9), (B, 4, 8, 8), (B, 4, 6, 6, 6)
FOLDED = [
    *((nn.Linear(9, 2), X1), (nn.LayerNorm(9), X1), (nn.ReLU(), X1), (round_ste(0.5), X1), (nn.GroupNorm(2, 4), X1)),
    *((nn.Flatten(), X2), (nn.Flatten(-2), X2), (nn.Unflatten(1, (2, 2)), X2), (nn.Softmax(1), X1), (nn.PReLU(4), X1)),
    *((nn.Upsample(scale_factor=2), X2), (nn.Dropout(0.5).eval(), X1), (nn.BatchNorm1d(4).eval(), X1[:2])),
    *((nn.Conv1d(4, 2, 3), X1), (nn.Conv2d(4, 2, 3), X2), (nn.Conv3d(4, 2, 3), X3), (nn.ConvTranspose2d(4, 2, 3), X2)),
    *((nn.MaxPool1d(2), X1), (nn.AvgPool2d(2), X2), (nn.AdaptiveAvgPool2d(2), X2), (nn.ZeroPad2d(1), X2)),
    *((nn.BatchNorm2d(4).eval(), X2), (nn.InstanceNorm2d(4), X2), (nn.LPPool2d(2.0, 2), X2)),
]
STEPPED = [
    *((nn.BatchNorm1d(4), X1), (nn.BatchNorm2d(4), X2), (nn.Dropout(0.5), X1), (nn.Flatten(0), X1), (Scale(), X1)),
    *((nn.Softmax(0), X1), (nn.Conv2d(4, 2, 3), X2[1:]), (nn.BatchNorm2d(4, track_running_stats=False).eval(), X2)),
    *((nn.InstanceNorm1d(4, track_running_stats=True), X1), (nn.RNN(9, 2), X1)),
]


@pytest.mark.parametrize(("module", "shape"), FOLDED, ids=lambda value: type(value).__name__)
def test_what_is_listed_runs_once(module, shape):
    xs = torch.randn(T, *shape)
    expected = torch.stack([module(x) for x in xs])
    calls, ys = calls_of(module, xs)
    assert calls == 1
    assert_near(ys, expected)
    swapped = tt.unroll(nn.Sequential(module), xs.transpose(0, 1), time_dim=1)
    assert_near(swapped.transpose(0, 1), expected)
    calls, ys = calls_of(module, xs, "exact")
    assert calls == T
    assert_bits(ys, expected)


@pytest.mark.parametrize(("module", "shape"), STEPPED, ids=lambda value: type(value).__name__)
def test_what_is_not_listed_or_depends_on_the_batch_runs_per_step(module, shape):
    if isinstance(module, nn.RNN):
        module = nn.Sequential()  # gives a tuple: see test_a_model_must_give_one_tensor
        module.append(Scale())
        module = module[0]
    xs = torch.randn(T, *shape)
    torch.manual_seed(2)
    expected = torch.stack([copy.deepcopy(module)(x) for x in xs]) if not module.training else None
    torch.manual_seed(2)
    calls, ys = calls_of(module, xs)
    assert calls == T
    if expected is not None and not isinstance(module, nn.Dropout):
        assert_bits(ys, expected)


class MyLinear(nn.Linear):
    """A subclass may compute anything: it is not listed."""

    def forward(self, x):
        return super().forward(x) + x.mean()


def test_a_subclass_and_a_hooked_module_run_per_step():
    xs = torch.randn(T, B, 7)
    assert folding.fold(MyLinear(7, 2), xs) is None
    linear = nn.Linear(7, 2)
    assert folding.fold(linear, xs) is not None
    seen = []
    linear.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    tt.unroll(nn.Sequential(linear), xs)
    assert seen == [(B, 2)] * T


# ---- what is no plain graph ------------------------------------------------------------------------------------------


class Branching(Net):
    def forward(self, x):
        h = super().forward(x)
        return h if h.sum() > 0 else -h


class Remembering(Net):
    def forward(self, x):
        self.last = self.enter(x.flatten(1))
        return self.read(self.leave(self.last))


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return super().forward(x)


class Reading(Net):
    """Gives a state where there is one, as after the first step."""

    def forward(self, x):
        h = super().forward(x)
        return h if self.blocks[0].neuron.mem is None else h + self.blocks[0].neuron.mem.mean()


class InPlace(Net):
    def forward(self, x):
        return super().forward(x).add_(1)


class Twice(Net):
    def forward(self, x):
        return self.read(self.read(self.leave(self.enter(x.flatten(1)))))


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.blocks[1].register_forward_hook(lambda module, inputs, output: output * 2)


class TwoRandom(Net):
    def forward(self, x):
        return self.read(self.leave(nn.functional.dropout(torch.randn_like(self.enter(x.flatten(1))), 0.5)))


class Keyword(Net):
    def forward(self, x, scale=2.0):
        return super().forward(x) * scale


class Plain(Net):
    def forward(self, x):
        return x.flatten(1) + 1


ODD = [Branching, Remembering, Counting, Reading, InPlace, Twice, Hooked, TwoRandom, Keyword]


@pytest.mark.parametrize("cls", ODD)
def test_what_is_no_plain_graph_runs_step_by_step_and_says_so_once(cls):
    torch.manual_seed(0)
    model, xs = cls(), torch.randn(T, B, 1, 7)
    with torch.no_grad():
        model(xs[0])
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        stepped = loop(twin, xs)
        attributes = {name: type(value) for name, value in vars(model).items()}
        torch.manual_seed(1)
        with pytest.warns(tt.UnrollWarning, match=f"runs {cls.__name__} step by step: "):
            found = tt.unroll(model, xs, fold="exact")
        assert_bits(found, stepped)
        for path, states in tt.save_states(twin).items():
            for state, value in states.items():
                assert value is None or value.isfinite().all()
                if value is not None:
                    assert_bits(tt.save_states(model)[path][state], value)
        assert {name: type(value) for name, value in vars(model).items()} == attributes, "tracing left nothing behind"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tt.unroll(model, xs, fold="exact")
        if cls is Counting:
            assert len(model.seen) == 1 + 2 * T
            assert not any(isinstance(x, torch.fx.Proxy) for x in model.seen)


def test_inplace_modules_and_shared_neurons_are_no_plain_graph():
    neuron, xs = hard(7), torch.randn(T, B, 7)
    for model, word in (
        (nn.Sequential(tt.snn.LI(7), nn.ReLU(inplace=True)), "inplace"),
        (nn.Sequential(neuron, nn.Linear(7, 7), neuron), "twice"),
        (nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 7), nn.Dropout(0.5)), "random"),
        (nn.Sequential(Scale(), tt.snn.LIB(7, quant_fn=stochastic_round_ste())), "random"),
    ):
        torch.manual_seed(1)
        with torch.no_grad():
            stepped = loop(copy.deepcopy(model), xs)
            torch.manual_seed(1)
            with pytest.warns(tt.UnrollWarning, match=word):
                assert_bits(tt.unroll(model, xs, fold="exact"), stepped)


def test_the_program_of_a_forward():
    calls = program(Net()).calls
    modules = [type(call.target).__name__ for call in calls if isinstance(call.target, nn.Module)]
    assert modules == ["Linear", "Linear", "LIB", "Linear", "LIB", "LayerNorm", "Linear", "LI"]
    with pytest.raises(NotPlain, match="empty"):
        program(nn.Sequential())
    net = Net()
    before = {name: id(value) for name, value in vars(net).items()}
    program(net)
    assert {name: id(value) for name, value in vars(net).items()} == before
    assert net.read.mem is None


def test_what_unroll_refuses():
    model, xs = made("dense")
    with pytest.raises(ValueError, match=r"fold='sideways'.*'fast', 'exact'"):
        tt.unroll(model, xs, fold="sideways")
    with pytest.raises(ValueError, match="no time step"):
        tt.unroll(model, xs[:0])
    with pytest.raises(ValueError, match="time_dim=3"):
        tt.unroll(model, xs, time_dim=3)
    with pytest.raises(ValueError, match="num_neurons=7"):
        tt.unroll(nn.Sequential(nn.Linear(7, 9), hard(7)), xs)


def test_a_model_must_give_one_tensor():
    with pytest.raises(TypeError, match="tensor of one shape"):
        tt.unroll(nn.Sequential(nn.RNN(7, 2)), torch.randn(T, B, 7))
