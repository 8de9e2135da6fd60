"""A parameter, an input or a first state that reaches no result with a gradient gets None, as in the step loop."""

import itertools

import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.layer_cases import assert_bits, noise
from tracetorch.fused import reaching
from tracetorch.fused.graph import Graph, Node, Ref
from tracetorch.fused.signature import Signature


class Chain(tt.snn.Layer):
    """Three states, each fed by the one before it one step later; the output reads the last. Some tensors lead away."""

    def __init__(self):
        super().__init__()
        self.define_outputs("output", "beside")
        for name in ("a", "b", "c", "idle"):
            self.define_state(name)
        names = ("first", "second", "third", "aside", "kept", "unread", "stopped")
        for k, name in enumerate(names):
            setattr(self, name, nn.Parameter(torch.tensor(0.5 + k / 10)))

    def step(self, x, a, b, c, idle):
        output = self.third * c + self.stopped.detach() * c
        beside = self.aside * x
        return output, beside, self.first * x, self.second * a, b + 0.5 * c, self.kept * idle


class Ring(tt.snn.Layer):
    """Two states that change places at every step."""

    def __init__(self):
        super().__init__()
        self.define_state("a"), self.define_state("b")
        self.w, self.u = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.25))

    def step(self, x, a, b):
        return self.u * x, b, a + 0 * self.w


class Ignoring(torch.autograd.Function):
    """A gradient that does not hang on the incoming one."""

    @staticmethod
    def forward(ctx, x, w):
        return x * w

    @staticmethod
    def backward(ctx, grad):
        return None, torch.ones_like(grad) * 0 + torch.ones(grad.shape)


class Careless(tt.snn.Layer):
    def __init__(self):
        super().__init__()
        self.define_state("mem")
        self.w, self.v = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.5))

    def step(self, x, mem):
        mem = Ignoring.apply(x, self.w) + self.v * mem
        return mem, mem


KINDS = {"Chain": Chain, "Ring": Ring, "Careless": Careless}


def found(kind, backend, steps, part):
    """Every gradient, None where there is none, of a loss of some of the results; None: it has no graph."""
    layer = KINDS[kind]()
    xs = noise(steps, 2, 3).requires_grad_()
    first = {name: noise(2, 3).requires_grad_() for name in layer.state_names}
    layer.load_states(first)
    with tt.backend(backend):
        outputs = layer.unroll(xs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = [*outputs, *layer.save_states().values()]
    chosen = [results[k] for k in part if k < len(results) and results[k].requires_grad and results[k].numel()]
    if not chosen:
        return None
    sum(each.sum() for each in chosen).backward()
    return {"x": xs.grad, **{n: t.grad for n, t in first.items()}, **{n: p.grad for n, p in layer.named_parameters()}}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_there_is_a_gradient_where_the_step_loop_has_one(kind, steps):
    missing = 0
    for part in [(k,) for k in range(6)] + list(itertools.combinations(range(4), 2)):
        eager, fused = found(kind, "eager", steps, part), found(kind, "cpu", steps, part)
        if eager is None:
            continue
        assert fused is not None
        assert {n for n, g in eager.items() if g is None} == {n for n, g in fused.items() if g is None}, part
        for name, gradient in eager.items():
            if gradient is not None:
                torch.testing.assert_close(fused[name], gradient, msg=f"{part} {name}")
        missing += sum(g is None for g in eager.values())
    assert missing > 0


def test_a_chain_of_states_is_followed_as_far_as_the_sequence_is_long():
    none = {n: {k for k, g in found("Chain", "cpu", n, (0,)).items() if g is None} for n in (1, 2, 3, 4)}
    always = {"aside", "kept", "unread", "stopped", "idle"}
    assert none[1] == always | {"first", "second", "x", "a", "b"}
    assert none[2] == always | {"first", "second", "x", "a"}
    assert none[3] == always | {"first", "x"}
    assert none[4] == always


@pytest.mark.parametrize("time_dim", [0, 1])
def test_a_sequence_goes_on_in_the_next_one(time_dim):
    """What one call's results do not reach, the next call's may, through the states."""
    grads = {}
    for backend in ("eager", "cpu"):
        layer, xs = Chain(), noise(4, 4, 3).requires_grad_()
        with tt.backend(backend):
            for part in xs.split(1, time_dim):
                last = layer.unroll(part, time_dim)[0]
        last.sum().backward()
        grads[backend] = {"x": xs.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    for name, gradient in grads["eager"].items():
        ours = grads["cpu"][name]
        assert (gradient is None) == (ours is None), name
        if gradient is not None:
            torch.testing.assert_close(ours, gradient)


def test_an_adaptation_of_one_step_has_no_gradient_in_a_fused_layer():
    sl = pytest.importorskip("sinabs.layers")
    none = {}
    for name, change in {"own": lambda layer: layer, "fused": tt.fuse}.items():
        layer = change(sl.ALIF(tau_mem=20.0, tau_adapt=10.0, adapt_scale=1.8, train_alphas=True))
        layer(noise(2, 1, 4)).sum().backward()
        none[name] = {n for n, p in layer.named_parameters() if p.grad is None}
    assert none["own"] == none["fused"] != set()


def test_an_optimizer_leaves_alone_what_has_no_gradient():
    layer = Chain()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    before = layer.aside.detach().clone()
    with tt.backend("cpu"):
        layer.unroll(noise(5, 2, 3))[0].sum().backward()
    optimizer.step()
    assert_bits(layer.aside.detach(), before)


def test_a_zero_times_the_incoming_gradient_is_a_gradient():
    class Zero(tt.snn.Layer):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5))

        def step(self, x):
            return (x + 0 * self.w,)

    layer = Zero()
    with tt.backend("cpu"):
        layer.unroll(noise(3, 2, 3)).sum().backward()
    assert_bits(layer.w.grad, torch.tensor(0.0))


def test_states_that_change_places_are_followed_to_the_right_one():
    """Exactly, over a sequence far longer than the walk: d_a = d_b', d_b = d_a'."""
    f = torch.float32
    inputs = tuple((name, f) for name in ("x", "a", "b", "d_output", "d_a'", "d_b'"))
    zero = Node("full_like", (0.0, Ref(0)), f)
    vjp = Graph(inputs, (zero,), (("d_x", Ref(6)), ("d_a", Ref(5)), ("d_b", Ref(4))))
    for steps in (0, 1, 2, 3, 1001, 10**6):
        expected = (False, steps % 2 == 0, steps % 2 == 1)
        assert reaching.gradients(vjp, Signature(("a", "b")), (False, True, False), steps) == expected
