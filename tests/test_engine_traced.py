"""What the tracer takes and what it refuses, on steps traced by themselves: no layer, no kernel."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch

from tests.layer_cases import assert_bits, noise
from tracetorch.fused.build import build
from tracetorch.fused.graph import Graph, GraphError, Node, Ref, evaluate
from tracetorch.fused.precision import refuse_rounding
from tracetorch.fused.scan import scan
from tracetorch.fused.trace import name_draws, trace

F32, F64 = torch.float32, torch.float64


def graph_of(step, dtype=F32):
    example = {name: torch.full((8,), 0.5, dtype=dtype) for name in ("x", "v")}
    return trace(lambda given: [step(given["x"], given["v"]), given["v"]], example, ["v"]).forward


# ---- float32 within float64 ------------------------------------------------------------------------------------------


def test_a_parameter_that_stands_for_float32_and_is_not_is_refused():
    """A number in a tensor without dimensions does not widen float32: its graph has float32, its memory float64."""
    inputs, total = (("x", F64), ("p", F32)), Node("add", (Ref(1), 0.5), F32)
    graph = Graph(inputs, (total,), (("output", Ref(2)),))
    refuse_rounding(graph, {"p"})
    with pytest.raises(GraphError, match="add computes in float32"):
        refuse_rounding(graph, {"x"})


EXACT = {
    "neg": lambda a, b: -a,
    "abs": lambda a, b: abs(a),
    "sign": lambda a, b: torch.sign(a),
    "floor": lambda a, b: torch.floor(3 * a),
    "ceil": lambda a, b: torch.ceil(3 * a),
    "trunc": lambda a, b: torch.trunc(3 * a),
    "round": lambda a, b: torch.round(3 * a),
    "where": lambda a, b: torch.where(a > b, a, 0.1),
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "a bound": lambda a, b: a.clamp(-0.1, 0.7),
    "full_like": lambda a, b: torch.full_like(a, 0.1) * b,
    "spikes": lambda a, b: (1 - (a > b).float()) * 0.1 + (a > 0).float() * b,
}


@pytest.mark.parametrize("name", EXACT)
def test_float32_within_float64_has_torch_s_bits(name):
    def step(given):
        x, v = given["x"], given["v"]
        return [EXACT[name](x.float(), v.float()).double(), x]

    kernel = build(step, ["v"], [], [], F64, backward=False)
    xs, v = noise(4, 2, 33).double() * 1.1, noise(2, 33, seed=1).double() * 1.3
    (ours,), _, _ = scan(kernel, [xs], 0, [v], [])
    for x, y in zip(xs, ours, strict=True):
        assert_bits(y, step({"x": x, "v": v})[0])
        v = x


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "sigmoid"])
def test_functions_of_float32_within_float64_are_refused(name):
    with pytest.raises(GraphError, match=f"{name} computes in float32"):
        graph_of(lambda x, v: getattr(torch, name)(x.float()).double(), F64)


# ---- values that leave torch -----------------------------------------------------------------------------------------

LEAVING = {
    "untyped_storage": pickle.dumps,
    "storage": lambda x: x.storage(),
    "__dlpack__": lambda x: x.__dlpack__(),
    "__deepcopy__": copy.deepcopy,
    "__repr__": repr,
    "__format__": lambda x: f"{x:.1f}",
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("name", LEAVING)
def test_memory_and_text_of_a_tensor_are_its_value(name):
    def step(x, v):
        LEAVING[name](x.detach())
        return x

    with pytest.raises(GraphError, match=f"^{name}: the step reads the value"):
        graph_of(step)


def test_a_constant_s_value_is_the_step_s_own_business():
    graph = graph_of(lambda x, v: x * float(np.float32(torch.full((1,), 0.25).numpy()[0])))
    xs = noise(8)
    assert_bits(evaluate(graph, {"x": xs, "v": xs})["output"], xs * 0.25)


# ---- generators ------------------------------------------------------------------------------------------------------

COINS = {
    "Python's": random.random,
    "NumPy's, of which one number of a row of 624 is used": np.random.rand,
    "NumPy's, of which every number is used": lambda: np.random.rand(400),
    "NumPy's second normal number, kept for the next call": np.random.randn,
}


@pytest.mark.parametrize("name", COINS)
def test_another_generator_is_noticed_and_put_back(name):
    random.seed(1), np.random.seed(1)
    ours, theirs = random.getstate(), np.random.get_state()

    def step(x, v):
        COINS[name]()
        return x

    with pytest.raises(GraphError, match="Python's or NumPy's generator"):
        graph_of(step)
    assert random.getstate() == ours
    after = np.random.get_state()
    assert (after[1] == theirs[1]).all()
    assert after[2:] == theirs[2:]


def test_what_a_step_itself_refuses_is_said_as_it_said_it():
    def step(x, v):
        raise GraphError("of its own")

    with pytest.raises(GraphError, match=r"^of its own$"):
        graph_of(step)


# ---- operations ------------------------------------------------------------------------------------------------------


def in_place(change):
    def step(x, v):
        target = x * 1
        change(target, v)
        return target

    return step


def forgets(x, v):
    """Results that nobody keeps leave their places in memory to tensors that have nothing to do with them."""
    for _ in range(4):
        x + v
        x = x * torch.full((1,), 0.5)
    return x


TAKEN = {
    "what is forgotten": forgets,
    "maximum of truth values": lambda x, v: torch.maximum(x > 0, v > 0).float(),
    "minimum of truth values": lambda x, v: torch.minimum(x > 0, v > 0).float(),
    "logical_and of numbers": lambda x, v: torch.logical_and(x.round(), v > 0).float(),
    "logical_or of numbers": lambda x, v: torch.logical_or(x.round(), v.round()).float(),
    "logical_not of numbers": lambda x, v: torch.logical_not(x.round()).float(),
    "new_ones": lambda x, v: x + x.new_ones(x.shape) * v,
    "new_zeros": lambda x, v: x.new_zeros(x.shape) - v,
    "ones_like": lambda x, v: torch.ones_like(x) - v,
    "pow_": in_place(lambda x, v: x.pow_(2)),
    "add_ of float64": in_place(lambda x, v: x.add_(v.double() * 0.1)),
    "copy_ of a mask": in_place(lambda x, v: x.mul_(v > 0)),
    "clamp by name": lambda x, v: torch.clamp(x, max=0.5) + torch.clamp(v, min=-0.25),
    "rsub": lambda x, v: torch.rsub(x, v) + torch.rsub(x, 2.0),
    "a number that float32 has not": lambda x, v: torch.where(x > 0, 0.1, v),
    "infinity": lambda x, v: torch.where(x > 0, x, -torch.inf) + torch.where(v > 0, v, torch.inf).clamp(max=3),
    "NaN": lambda x, v: torch.where(x > 0, x, torch.nan),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_is_computed_as_torch_does(name):
    xs, v = noise(64, mean=0), noise(64, seed=1, mean=0)
    kernel = build(lambda given: [TAKEN[name](given["x"], given["v"]), given["v"]], ["v"], [], [], F32, backward=False)
    expected = TAKEN[name](xs, v)
    (ours,), _, _ = scan(kernel, [xs[None, None]], 0, [v[None]], [])
    for found in (evaluate(graph_of(TAKEN[name]), {"x": xs, "v": v})["output"], ours[0, 0]):
        assert torch.equal(found.isnan(), expected.isnan())
        assert_bits(found.nan_to_num(7.0), expected.nan_to_num(7.0))


REFUSED = {
    "div.*rounding_mode='floor'": lambda x, v: torch.div(x, v, rounding_mode="floor"),
    "rsub": lambda x, v: torch.rsub(x, v, alpha=2),
    "writes in place": lambda x, v: torch.ones(8).mul_(x),
    "torch.int32": lambda x, v: (x.int() & v.int()) * x,
    "pow with the exponent": lambda x, v: x**0.3,
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_not_taken_is_refused_by_name(word):
    with pytest.raises(GraphError, match=word):
        build(lambda given: [REFUSED[word](given["x"], given["v"]), given["v"]], ["v"], [], [], F32, backward=False)


def test_a_power_of_minus_a_half_is_near():
    xs = noise(64).abs()
    found = evaluate(graph_of(lambda x, v: x**-0.5), {"x": xs, "v": xs})["output"]
    torch.testing.assert_close(found, xs**-0.5, rtol=3e-7, atol=0)


@pytest.mark.parametrize(("p", "spike"), [(0.0, 0.0), (0.5, 0.0), (0.75, 1.0), (1.0, 1.0)])
def test_a_chance_is_a_number_below_it(p, spike):
    """Of the number that stands for the draw, 0.5, or 0 where p is 0: the smallest that is drawn."""

    def step(given):
        return [torch.bernoulli(given["x"])]

    given = {"x": torch.full((8,), 0.5)}
    draws = name_draws(step, given)
    given |= {name: torch.full((8,), 0.5) for name in draws}
    graph = trace(step, given, [], draws=draws).forward
    drawn = torch.full((1,), 0.5 if p else 0.0)
    assert float(evaluate(graph, {"x": torch.full((1,), p), draws[0]: drawn})["output"]) == spike


def test_two_tensors_of_one_name_are_refused():
    for inputs, outputs, states in ((("x",), ("v",), ["d_v"]), (("x", "v"), ("y",), ["v"])):
        with pytest.raises(GraphError, match=r"two tensors of one name, (d_v|v);"):
            build(lambda given: [given["x"], given["x"]], states, [], [], F32, inputs=inputs, outputs=outputs)


@pytest.mark.parametrize("axis", [-1, 0])
def test_a_size_is_no_number_of_a_step(axis):
    with pytest.raises(GraphError, match="depends on the shape"):
        build(lambda given: [given["x"] * given["x"].shape[axis], given["v"]], ["v"], [], [], F32)
    with pytest.raises(GraphError, match="depends on the shape"):
        build(lambda given: [given["x"] * given["x"].ndim, given["v"]], ["v"], [], [], F32)


def test_a_step_of_other_shapes_or_fewer_results_is_refused():
    with pytest.raises(GraphError, match="inputs of different shapes"):
        trace(lambda given: [given["x"], given["v"]], {"x": torch.ones(8), "v": torch.ones(4)}, ["v"])
    with pytest.raises(GraphError, match="returned 1 values, expected 2: output, v'"):
        trace(lambda given: [given["x"]], {"x": torch.ones(8), "v": torch.ones(8)}, ["v"])


def test_a_trace_in_inference_mode_is_the_same():
    def step(x, v):
        return torch.square(x) * torch.where(v > 0, x, v).clip(-1, 1)

    with torch.inference_mode():
        inside = graph_of(step)
    assert inside == graph_of(step)
