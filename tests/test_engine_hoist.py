"""What a step computes from its parameters alone is computed before the kernel; what it may not do is refused."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.layer_cases import assert_bits, noise
from tracetorch.fused.graph import GraphError, evaluate
from tracetorch.fused.hoist import Prelude, _Call, _Slot, prepare
from tracetorch.fused.sequence import traced_step

F32 = torch.float32


class Holder(nn.Module):
    """Two parameters, a buffer and a number."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(noise(4).abs() + 0.1), nn.Parameter(noise(4, seed=1))
        self.register_buffer("kept", noise(4, seed=2))
        self.number = 0.5


def prepared(step, layer=None):
    return prepare(layer or Holder(), lambda layer, x, states: (step(layer, x),), (), (), F32)


class Inside(torch.autograd.Function):
    """Its inside is no part of autograd's graph, and stays in the step."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x * torch.exp(w)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def forgotten(layer, x):
    """Results that nobody keeps leave their places in memory to others."""
    for _ in range(4):
        layer.w * 2
        x = x * 0.5
        x = x * x.abs() + layer.v
    return x


# a step, and the operations left in it
TAKEN = {
    "a decay": (lambda layer, x: torch.exp(-1 / layer.w) * x, {"mul"}),
    "a mask": (lambda layer, x: torch.where(layer.w > 0.5, x, -x), {"gt", "neg", "where"}),
    "several in a list": (lambda layer, x: torch.stack([layer.w, layer.v]).sum(0) * x, {"mul"}),
    "one by name": (lambda layer, x: torch.clamp(layer.w, min=layer.v) * x, {"mul"}),
    "the input by name": (lambda layer, x: torch.mul(layer.w, other=x), {"mul"}),
    "with a constant": (lambda layer, x: (layer.w * torch.full((4,), 2.0)) * x, {"mul"}),
    "with a constant of constants": (lambda layer, x: (layer.w * (torch.ones(4) + 1)) * x, {"mul"}),
    "with the input's own": (lambda layer, x: layer.w * (x * 0.5), {"mul"}),
    "the same tensor": (lambda layer, x: layer.w.float().contiguous() * x, {"mul"}),
    "in an autograd Function": (lambda layer, x: Inside.apply(x, layer.w), {"mul", "exp"}),
    "what is forgotten": (forgotten, {"mul", "abs", "add"}),
    "a size": (lambda layer, x: x * layer.w.numel() * layer.w.ndim, {"mul"}),
}


@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_out_has_the_step_s_bits(name, grads):
    step, left = TAKEN[name]
    layer = Holder()
    with torch.set_grad_enabled(grads):
        ready = prepared(step, layer)
        traced, names = traced_step(ready, (), False)
    assert {node.op for node in traced.forward.nodes} == left
    xs = noise(2, 4, seed=3)
    known = zip(names, ready.prelude.values(ready.reads.tensors, names), strict=True)
    given = {"x": xs, **{name: value.detach().expand(2, 4) for name, value in known}}
    assert_bits(evaluate(traced.forward, given)["output"], step(layer, xs).detach())


def test_only_what_a_kernel_takes_is_computed():
    """And what that needs: of a chain, all before it."""
    computed = []

    def noted(name, function):
        return lambda tensor: (computed.append(name), function(tensor))[1]

    def call(name, function, of):
        return _Call(name, noted(name, function), (_Slot(of),), {}, (of,), True)

    calls = [
        call("h0", torch.exp, "p0"),
        call("h1", torch.neg, "p0"),
        call("h2", torch.sqrt, "h0"),
        call("h3", torch.neg, "h2"),
    ]
    w = noise(4)
    (value,) = Prelude({"p0": "w"}, calls).values({"w": w}, ["h3"])
    assert computed == ["h0", "h2", "h3"]
    assert_bits(value, -torch.sqrt(torch.exp(w)))


def test_a_tensor_that_is_its_own_result_is_no_value_of_its_own():
    assert not prepared(lambda layer, x: layer.w.float().contiguous() * x).prelude.calls


WRITES = {
    "add_": lambda layer: layer.kept.add_(1),
    "__setitem__": lambda layer: layer.kept.__setitem__(0, 1.0),
    "__set__": lambda layer: setattr(layer.w, "data", torch.ones(4)),
    "add": lambda layer: torch.add(layer.kept, 1, out=layer.kept),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_step_that_writes_into_a_parameter_is_refused_before_it_has(name):
    layer = Holder()
    before = {path: tensor.detach().clone() for path, tensor in layer.state_dict().items()}

    def step(layer, x):
        WRITES[name](layer)
        return x * layer.w * layer.kept

    with pytest.raises(GraphError, match=f"^{name}: the step writes into a parameter"):
        prepared(step, layer)
    for path, tensor in layer.state_dict().items():
        assert_bits(tensor, before[path])


VALUES = {
    "item": lambda layer: layer.w[0].item(),
    "tolist": lambda layer: layer.w.tolist()[0],
    "__bool__": lambda layer: 1.0 if layer.w.detach()[0] else 2.0,
    "__float__": lambda layer: float(layer.w.detach()[0]),
    "equal": lambda layer: float(torch.equal(layer.w, layer.v)),
    "unbind": lambda layer: layer.w.unbind()[0],
    "max": lambda layer: torch.max(layer.w, 0)[0],
}


@pytest.mark.parametrize("name", VALUES)
def test_a_step_that_reads_a_parameter_s_value_is_refused(name):
    with pytest.raises(GraphError, match=r"the step reads the value of a (parameter|tensor)"):
        traced_step(prepared(lambda layer, x: x * VALUES[name](layer)), (), False)


def test_a_step_that_is_another_one_at_each_call_is_refused():
    functions = itertools.cycle((torch.exp, torch.sigmoid))
    ready = prepared(lambda layer, x: next(functions)(layer.w) * x)
    with pytest.raises(GraphError, match=r"^sigmoid: the step computes something else at each call"):
        ready.step({"x": noise(2, 4), **{name: noise(2, 4) for name in ready.prelude.names}})
    once = iter((1,))
    ready = prepared(lambda layer, x: x if next(once, None) else torch.exp(layer.w) * x)
    with pytest.raises(GraphError, match=r"^exp: the step computes something else at each call"):
        ready.step({"x": noise(2, 4), **{name: noise(2, 4) for name in ready.prelude.names}})


def test_a_step_that_changes_a_number_is_refused_and_the_layer_as_it_was():
    layer = Holder()

    def step(layer, x):
        layer.number += 1
        return x * layer.number

    with pytest.raises(GraphError, match="changes an attribute"):
        prepared(step, layer)
    assert layer.number == 0.5


COINS = {
    "torch's": lambda: torch.rand(1),
    "Python's": random.random,
    "NumPy's": np.random.rand,
    "NumPy's, a row of them": lambda: np.random.rand(400).max(),
}


@pytest.mark.parametrize("name", COINS)
def test_a_step_that_draws_is_refused_and_torch_s_generator_as_it_was(name):
    before = torch.get_rng_state()
    with pytest.raises(GraphError, match="draws random numbers"):
        prepared(lambda layer, x: x * float(COINS[name]() > 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ndim", [0, 1])
def test_a_number_of_float64_makes_no_state_float64_and_a_row_does(ndim):
    """As torch promotes: a tensor of no dimension does not widen the other."""
    layer = Holder()
    layer.gain = nn.Parameter(torch.full((4,) if ndim else (), 0.1, dtype=torch.float64))
    ready = prepare(layer, lambda layer, x, states: (layer.gain * x,), (), (), torch.float64)
    (path,) = (name for name, path in ready.prelude.paths.items() if path == "gain")
    assert ready.kind(path) is (torch.float64 if ndim else F32)
    assert ready.kind("x") is torch.float64


def test_what_is_not_dense_is_refused():
    layer = Holder()
    layer.register_buffer("odd", torch.eye(3).to_sparse())
    with pytest.raises(GraphError, match=r"odd is a Tensor .* only ordinary dense tensors"):
        prepared(lambda layer, x: x, layer)
