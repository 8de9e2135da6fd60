"""Generated Triton kernels in Triton's interpreter, on CPU tensors: run by test_triton_values.py.

The interpreter proves the structure (loops, layouts, tails, recomputation) and the choice of operations; not their
rounding on a GPU, which test_triton_operations.py reads in the PTX.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

import tracetorch as tt
from tests.bits import assert_bits
from tests.engine_checks import (
    ROUNDED,
    assert_slopes,
    check_chunks_compose,
    check_layer_unrolls,
    check_rounded_function,
    loop,
    make_layer,
    random_step,
    slopes,
)
from tests.fuse_cases import CASES
from tracetorch.fused import graph
from tracetorch.fused.build import build
from tracetorch.fused.graph import OPS, Graph, Node, Ref
from tracetorch.fused.kernel import Geometry
from tracetorch.fused.launch_triton import kernel as triton_kernel
from tracetorch.fused.scan import scan
from tracetorch.fused.signature import Signature
from tracetorch.fused.trace import Traced

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_triton_values.py"

pytestmark = pytest.mark.usefixtures("poisoned")

# Every T with every N; B is 1 and 3 with each of them. Two layouts each.
SHAPES = [(T, 1 + 2 * ((i + k) % 2), N) for i, T in enumerate((1, 17, 40)) for k, N in enumerate((1, 7, 513))]


def normals(seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)


# ---- whole sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(18))
def test_kernel_is_eager_and_the_c_kernel_on_random_steps(seed):
    T, B, N = SHAPES[seed % 9]
    time_dim, dtype = seed // 9, torch.float64 if seed % 5 == 0 else torch.float32
    count = [1, 2, 1, 3][seed % 4]
    states, parameters = [f"s{k}" for k in range(count)], [f"p{k}" for k in range(count)]
    step, normal = random_step(seed, states, parameters), normals(seed, dtype)
    shapes = itertools.cycle([(), (N,), (B, N)])
    learned = parameters[: 1 + seed % 3]
    xs = normal(*((T, B, N) if time_dim == 0 else (B, T, N))).requires_grad_()
    first = [normal(B, N).requires_grad_() for _ in states]
    values = {name: normal(*next(shapes)).requires_grad_(name in learned) for name in parameters}
    leaves = [xs, *first, *(values[name] for name in learned)]
    ys, last = loop(step, xs, time_dim, first, states, values)
    cotangents = [normal(*y.shape) for y in (ys, *last)]
    expected = slopes([ys, *last], leaves, cotangents)
    found = {}
    for backend in ("triton", "cpu"):
        kernel = build(step, states, parameters, learned, dtype, backend=backend)
        (ours,), our_last, _ = scan(kernel, [xs], time_dim, first, list(values.values()))
        for a, b in zip((ours, *our_last), (ys, *last), strict=True):
            assert_bits(a, b)
        found[backend] = slopes([ours, *our_last], leaves, cotangents)
    assert_slopes(found["triton"], expected, dtype)
    for a, b in zip(found["triton"], found["cpu"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_bits(a.reshape(-1), b.reshape(-1))


@pytest.mark.parametrize(("count", "T"), [(7, 19), (10, 35), (18, 18)])
def test_many_states_are_replayed_from_fewer_saved_ones(count, T):
    states, parameters = [f"s{k}" for k in range(count)], [f"p{k}" for k in range(count)]
    inner, normal = random_step(count, states, parameters), normals(count, torch.float32)

    def step(given):
        """Each state feeds the next, so that the gradient of the input passes through all of them."""
        y, *new = inner(given)
        before = [given["x"], *(given[s] for s in states[:-1])]
        new = [a + 0.25 * b for a, b in zip(new, before, strict=True)]
        return [y + sum(new[1:], new[0]), *new]

    xs = normal(T, 2, 5).requires_grad_()
    first, values = [normal(2, 5) for _ in states], [normal(5).requires_grad_() for _ in parameters]
    found = []
    for backend in ("triton", "cpu"):
        kernel = build(step, states, parameters, parameters, torch.float32, backend=backend)
        (ys,), _, _ = scan(kernel, [xs], 0, first, values)
        found.append([ys, *torch.autograd.grad(ys.sum(), [xs, *values])])
    for a, b in zip(*found, strict=True):
        assert_bits(a, b)
    assert found[0][1].any(), "the input's gradient"


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize(("T", "B", "N"), [(1, 1, 1), (40, 3, 7), (17, 1, 513)])
def test_layer_unrolls_through_the_kernel(time_dim, T, B, N):
    check_layer_unrolls("triton", T, B, N, time_dim)


def test_states_after_every_step_are_recorded():
    step, normal = random_step(3, ["v", "i"], ["p", "q"]), normals(3, torch.float32)
    kernel = build(step, ["v", "i"], ["p", "q"], [], torch.float32, backend="triton")
    for time_dim in (0, 1):
        xs, first, values = normal(3, 19, 7), [normal(3, 7), normal(3, 7)], [normal(7), normal()]
        if time_dim == 0:
            xs = xs.transpose(0, 1)
        with torch.no_grad():
            _, last, recorded = scan(kernel, [xs], time_dim, first, values, record=True)
        names = {"p": values[0], "q": values[1]}
        for t in range(19):
            _, first = loop(step, xs.narrow(time_dim, t, 1), time_dim, first, ["v", "i"], names)
            for a, b in zip(recorded, first, strict=True):
                assert_bits(a.select(time_dim, t), b)
        for a, b in zip(last, first, strict=True):
            assert_bits(a, b)


def test_chunks_compose_to_the_whole():
    check_chunks_compose("triton", T=30, N=7, cut=13)


@pytest.mark.parametrize("shape", [(0, 2, 7), (4, 0, 7)])
def test_empty_sequences(shape):
    layer = make_layer(7)
    xs = torch.rand(shape, requires_grad=True)
    with tt.backend("triton"):
        ys = layer.unroll(xs)
    assert ys.shape == shape
    (gradient,) = torch.autograd.grad(ys.sum() + layer.mem.sum(), [xs], allow_unused=True)
    assert gradient is None or gradient.shape == shape


def test_only_the_initial_state_wants_a_gradient():
    kernel = build(
        lambda given: [given["v"], 0.5 * given["v"] + given["x"]], ["v"], [], [], torch.float32, True, "triton"
    )
    first = torch.ones(2, 7, requires_grad=True)
    (ys,), _, _ = scan(kernel, [torch.ones(11, 2, 7)], 0, [first], [])
    (gradient,) = torch.autograd.grad(ys.sum(), [first])
    assert_bits(gradient, torch.full((2, 7), 2.0 - 0.5**10))


def test_another_dtype_or_backend_is_refused():
    layer = make_layer(7)
    with tt.backend("triton"), pytest.raises(tt.fused.FuseError, match="complex64"):
        layer.unroll(torch.rand(3, 2, 7).to(torch.complex64))
    with tt.backend("triton"), pytest.raises(tt.fused.FuseError, match=r"is torch\.float32"):
        layer.unroll(torch.rand(3, 2, 7).double())


FRAMEWORKS = (
    "sinabs.LIF",
    "sinabs.ExpLeak",
    "snntorch.Leaky",
    "snntorch.Synaptic",
    "spikingjelly.LIFNode",
    "norse.LIFBoxCell",
)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_fused_layer_of_a_framework_is_the_layer_bit_for_bit(name):
    case = CASES[name]
    layer, normal = case.make(7), normals(1, torch.float32)
    fused = tt.fuse(layer)
    assert not fused.fuse_report.left
    xs = normal(37, 2, 7) * case.scale + case.offset
    found = []
    for each, backend in ((layer, "auto"), (fused, "triton")):
        x = xs.clone().requires_grad_()
        with tt.backend(backend):
            first, state = case.run(each, x[:20], None)
            second, _ = case.run(each, x[20:], state)
        outputs = [torch.cat(pair) for pair in zip(first.outputs, second.outputs, strict=True)]
        (gradient,) = torch.autograd.grad(sum(y.sum() for y in outputs), [x])
        found.append(([*outputs, *second.states.values()], gradient))
    (expected, slope), (given, ours) = found
    for a, b in zip(given, expected, strict=True):
        assert_bits(a, b)
    assert slope.abs().max() > 0
    assert float((ours - slope).abs().max()) <= 1e-5 * float(slope.abs().max())


def test_random_numbers_are_those_of_the_step_loop():
    xs, found = torch.randn(21, 3, 7) * 2, []
    for backend in ("eager", "triton"):
        torch.manual_seed(2)
        layer, x = tt.snn.LIT(7, quant_fn=tt.functional.stochastic_round_ste()), xs.clone().requires_grad_()
        with tt.backend(backend):
            ys = layer.unroll(x)
        found.append((ys, *torch.autograd.grad(ys.pow(2).sum(), x), torch.get_rng_state()))
    for a, b in zip(*found, strict=True):
        assert_bits(a, b)


def test_several_inputs_and_outputs_and_gradients_of_recorded_states():
    """The two renderers alike, both against autograd through the loop."""

    def step(given):
        gate = torch.sigmoid(given["gate"]) * 0 + given["gate"]
        v = given["v"] * given["p"] + given["x"] * gate
        return v - gate, v * given["gate"], v

    for T, time_dim in ((19, 0), (19, 1), (8, 0), (3, 1)):
        normal = normals(T, torch.float32)
        shape = (T, 2, 5) if time_dim == 0 else (2, T, 5)
        leaves = [normal(*shape).requires_grad_() for _ in range(2)]
        leaves += [normal(2, 5).requires_grad_(), normal(5).requires_grad_()]
        x, gate, first, p = leaves
        v, series = first, []
        for t in range(T):
            *outputs, v = step({"x": x.select(time_dim, t), "gate": gate.select(time_dim, t), "v": v, "p": p})
            series.append((*outputs, v))
        expected = [torch.stack(each, time_dim) for each in zip(*series, strict=True)]
        weights = [normal(*shape) for _ in expected]
        gradients = torch.autograd.grad(expected, leaves, weights)
        for backend in ("triton", "cpu"):
            names = (["v"], ["p"], ["p"], torch.float32)
            kernel = build(step, *names, backend=backend, inputs=("x", "gate"), outputs=("spikes", "current"))
            ys, _, recorded = scan(kernel, [x, gate], time_dim, [first], [p], record=True)
            for a, b in zip((*ys, *recorded), expected, strict=True):
                assert_bits(a, b)
            found = torch.autograd.grad([*ys, *recorded], leaves, weights)
            for a, b in zip(found[:3], gradients[:3], strict=True):
                assert_bits(a, b)
            assert float((found[3] - gradients[3]).abs().max()) <= 1e-5 * float(gradients[3].abs().max())


def test_offsets_past_two_to_the_31(tmp_path):
    far = 2**31 + 64
    kernel = build(lambda given: [given["x"] + given["v"], given["x"]], ["v"], [], [], torch.float32, False, "triton")
    # Sparse files: only the touched pages exist.
    x, y = (torch.from_numpy(np.memmap(tmp_path / name, np.float32, "w+", shape=(far + 7,))) for name in "xy")
    x[:7], x[far:] = torch.arange(7.0), torch.arange(7.0) * 10
    for shape in (Geometry(2, 1, 7, far, 0), Geometry(1, 2, 7, 0, far)):
        y[far:] = 0
        kernel.call("forward", [x, y, torch.zeros(14), torch.zeros(14), None, None], shape, ())
        assert_bits(y[far:], x[far:] + (x[:7] if shape.T == 2 else 0))


# ---- one operation at a time -----------------------------------------------------------------------------------------

X, V = Ref(0), Ref(1)
EXACT = {
    **{
        name: [(X,)] for name in ("neg", "abs", "sign", "reciprocal", "sqrt", "floor", "ceil", "trunc", "round", "relu")
    },
    **{name: [(X, V), (X, 0.3), (0.3, X), (X, -0.0)] for name in ("add", "sub", "mul", "div")},
    **{name: [(X, V), (X, 0.3), (X, -0.0)] for name in ("minimum", "maximum")},
    **{name: [(X, V), (X, 0.5), (X, float("inf")), (X, True)] for name in ("gt", "ge", "lt", "le", "eq", "ne")},
    **{name: [(X, V)] for name in ("and", "or")},
    "not": [(X,)],
    "pow": [(X, exponent) for exponent in (1, 2, 3, 0.5, -1, -2)],
    "sigmoid_backward": [(X, V)],
    "threshold_backward": [(X, V, 0), (X, V, 0.3)],
    "where": [(Ref(2), X, V), (Ref(2), 0.1, X), (Ref(2), X, -0.0), (Ref(2), 0.5, float("nan"))],
    "cast": [(X,), (Ref(2),)],
    "full_like": [(0.1, X), (-0.0, X), (float("-inf"), X), (float("nan"), X)],
}
TWO_ULP = {"exp", "log", "sigmoid", "tanh"}
# The interpreter rounds twice; that a GPU rounds once is read in the PTX.
FUSED = {
    "add_scaled": lambda a, b, c: a + b * c,
    "sub_scaled": lambda a, b, c: a - b * c,
    "tanh_backward": lambda g, t: g * (1 - t * t),
}


def run_node(node: Node, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """A node on inputs x and v, and `Ref(2)`: x > v."""
    condition = Node("gt", (X, V), torch.bool)
    made = Graph((("x", dtype), ("v", dtype)), (condition, node), (("output", Ref(3)), ("v'", V)))
    graph.verify(made)
    kernel = triton_kernel(Traced(made, None), Signature(("v",)), dtype, (node.dtype,), "cpu")
    return scan(kernel, [inputs["x"][None]], 0, [inputs["v"]], [])[0][0][0]


def grid(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every pair of values that matter, special ones and halves among them."""
    tiny = 1e-45 if dtype is torch.float32 else 5e-324
    special = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), tiny, -tiny, 3e38, 0.5, -0.5, 1.5, -2.5, 2.0**24]
    values = torch.tensor(
        [*special, *torch.randn(19, generator=torch.Generator().manual_seed(0)).tolist()], dtype=dtype
    )
    n = len(values)
    return {"x": values.repeat(n).reshape(1, -1), "v": values.repeat_interleave(n).reshape(1, -1)}


def test_every_operation_is_tried():
    assert set(EXACT) | TWO_ULP | set(FUSED) == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("op", "args"), [(op, args) for op, every in EXACT.items() for args in every])
def test_exact_operations_are_torch_bitwise(op, args, dtype):
    result = torch.bool if OPS[op].result == "bool" else dtype
    node = Node(op, args, torch.bool if op == "cast" and args == (X,) else result)
    inputs = grid(dtype)
    condition = {**inputs, "c": inputs["x"] > inputs["v"]}
    made = Graph((("x", dtype), ("v", dtype), ("c", torch.bool)), (node,), (("output", Ref(3)),))
    expected = graph.evaluate(made, condition)["output"]
    if op == "sqrt" or (op == "pow" and args[1] == 0.5):
        # torch's own float32 sqrt on the CPU is not correctly rounded where it calls MKL; the kernel's is.
        expected = inputs["x"].double().sqrt().to(dtype)
    given = run_node(node, inputs, dtype)
    assert given.dtype is expected.dtype
    assert torch.equal(given.isnan(), expected.isnan())
    kept = ~expected.isnan()
    if args == (X, V) and op in ("minimum", "maximum"):
        # Of +0 and -0 torch takes the first or the second, by their place in the tensor.
        kept &= (inputs["x"] != 0) | (inputs["v"] != 0)
        assert torch.equal(given[~kept & ~expected.isnan()].abs(), torch.zeros(4, dtype=dtype))
    if kept.any():
        assert_bits(given[kept], expected[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", sorted(FUSED))
def test_fused_operations_have_their_operands_in_place(op, dtype):
    inputs = {name: torch.randn(1, 500, dtype=dtype) for name in ("x", "v")}
    for scale in (0.3, -2.0):
        scales = [scale] if OPS[op].arity == 3 else []
        given = run_node(Node(op, (X, V, *scales), dtype), inputs, dtype)
        assert_bits(given, FUSED[op](*inputs.values(), *(torch.tensor(c, dtype=dtype) for c in scales)))


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_functions_are_within_two_ulp_of_torch(name, dtype):
    check_rounded_function(ROUNDED[name], dtype, "triton")
