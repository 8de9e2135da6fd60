"""The engine: kernel == interpreter == eager, bit for bit where the arithmetic allows, and what it refuses."""

from __future__ import annotations

import copy
import mmap
import multiprocessing
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tracetorch.fused import graph
from tracetorch.fused import kernel as kernel_module
from tracetorch.fused.build import build
from tracetorch.fused.kernel import Geometry, Kernel
from tracetorch.fused.scan import scan
from tracetorch.fused.trace import trace

pytestmark = pytest.mark.usefixtures("poisoned")


def assert_bits(a, b):
    a, b = a.detach().contiguous().numpy(), b.detach().contiguous().numpy()
    assert a.shape == b.shape, (a.shape, b.shape)
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    different = a.view(np.uint8).reshape(a.size, -1) != b.view(np.uint8).reshape(b.size, -1)
    assert not different.any(), f"{different.any(1).sum()} of {a.size} values differ"


# ---- random steps ----------------------------------------------------------------------------------------------------

UNARY = [
    lambda a: -a,
    torch.abs,
    torch.relu,
    torch.floor,
    torch.trunc,
    torch.round,
    lambda a: a.clamp(-0.75, 1.5),
    lambda a: a.clamp(min=0.25),
    lambda a: a**2,
    lambda a: 1.0 / (2.0 + torch.abs(a)),
    lambda a: (a > 0.5).to(a.dtype),
    lambda a: (a >= 0).to(a.dtype) * a,
    lambda a: a.detach() + 0.1,
    lambda a: 1 - a,
    lambda a: a * 0.9,
]
BINARY = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.minimum,
    torch.maximum,
    lambda a, b: a / (torch.abs(b) + 0.5),
    lambda a, b: torch.where(a > b, a, b * 0.5),
    lambda a, b: torch.where((a > 0) & ~(b < 0.25), b, a),
    lambda a, b: a.masked_fill(b > 1, 0.5),
]


def random_step(seed: int, states: list[str], parameters: list[str]):
    """A step of a dozen random operations that keeps its states bounded."""
    choose = random.Random(seed)
    plan = [
        (choose.choice("ub"), choose.randrange(1000), choose.randrange(1000), choose.randrange(1000)) for _ in range(12)
    ]

    def step(given):
        pool = [given["x"], *(given[s] for s in states), *(given[p] for p in parameters)]
        for kind, op, left, right in plan:
            # Recent values are preferred, so that the expression is deep.
            a, b = pool[-1 - left % min(4, len(pool))], pool[right % len(pool)]
            pool.append(UNARY[op % len(UNARY)](a) if kind == "u" else BINARY[op % len(BINARY)](a, b))
        new = [
            (0.8 * given[s] + given[p] * pool[-1 - k]).clamp(-8, 8)
            for k, (s, p) in enumerate(zip(states, parameters, strict=False))
        ]
        return [(pool[-1] - 0.3 * new[0]), *new]

    return step


def loop(step, xs, time_dim, states, names, parameters):
    ys = []
    for x in xs.unbind(time_dim):
        y, *states = step({"x": x, **dict(zip(names, states, strict=True)), **parameters})
        ys.append(y)
    return torch.stack(ys, time_dim), states


SHAPES = [(1, 1, 1), (63, 2, 7), (5, 3, 513), (40, 1, 300)]


@pytest.mark.parametrize("seed", range(24))
def test_kernel_is_eager_on_random_steps(seed):
    states, parameters = ["v", "i"][: 1 + seed % 2], ["p", "q"]
    step = random_step(seed, states, parameters)
    T, B, N = SHAPES[seed % len(SHAPES)]
    time_dim, dtype = seed // 4 % 2, torch.float64 if seed % 5 == 0 else torch.float32
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    shapes = {"p": [(), (N,), (B, N)][seed % 3], "q": ()}
    kernel = build(step, states, parameters, ["p"], dtype)
    xs = normal(*((T, B, N) if time_dim == 0 else (B, T, N))).requires_grad_()
    first = [normal(B, N).requires_grad_() for _ in states]
    values = {"p": normal(*shapes["p"]).requires_grad_(), "q": normal()}
    ys, last = loop(step, xs, time_dim, first, states, values)
    (ours,), our_last, _ = scan(kernel, [xs], time_dim, first, list(values.values()))
    assert_bits(ours, ys)
    for a, b in zip(our_last, last, strict=True):
        assert_bits(a, b)
    leaves = [xs, *first, values["p"]]
    cotangents = [normal(*y.shape) for y in (ys, *last)]
    expected = torch.autograd.grad([ys, *last], leaves, cotangents, allow_unused=True, materialize_grads=True)
    given = torch.autograd.grad([ours, *our_last], leaves, cotangents)
    for a, b in zip(given, expected, strict=True):
        assert torch.isfinite(a).all()
        scale = float(b.abs().max()) or 1.0
        assert float((a - b).abs().max()) <= (1e-5 if dtype is torch.float32 else 1e-13) * scale


@pytest.mark.parametrize("seed", range(12))
def test_interpreter_and_its_gradient_are_eager_bitwise(seed):
    states, parameters = ["v"], ["p"]
    step = random_step(seed, states, parameters)
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(1000, generator=generator) for name in ("x", "v", "p")}
    traced = trace(step, {k: t[:8].clone() for k, t in inputs.items()}, states, ("x", "v", "p"))
    for (name, value), result in zip(graph.evaluate(traced.forward, inputs).items(), step(inputs), strict=True):
        assert_bits(value, result)
        assert name in ("output", "v'")
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    results = step(leaves)
    cotangents = [torch.randn(1000, generator=generator) for _ in results]
    expected = torch.autograd.grad(
        results, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    given = {**inputs, "d_output": cotangents[0], "d_v'": cotangents[1]}
    for value, gradient in zip(graph.evaluate(traced.vjp, given).values(), expected, strict=True):
        assert_bits(value, gradient)


def test_special_values_pass_as_in_torch():
    def step(given):
        x, v = given["x"], given["v"]
        a = torch.relu(x) + torch.minimum(x, v) - torch.maximum(x, v).clamp(-1e30, 1e30)
        return [torch.where(x > 0, a, -x), -torch.abs(x).clamp(max=2.0)]

    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3e38])
    xs = special.repeat(8).reshape(1, 1, 64)
    first = special.repeat_interleave(8).reshape(1, 64)
    kernel = build(step, ["v"], [], [], torch.float32)
    (ours,), last, _ = scan(kernel, [xs], 0, [first], [])
    y, v = step({"x": xs[0], "v": first})
    for a, b in ((ours[0], y), (last[0], v)):
        assert torch.equal(a.isnan(), b.isnan())
        kept = ~a.isnan()
        assert_bits(a[kept], b[kept])


ROUNDED = {
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "log": lambda a: torch.log(torch.abs(a) + 1e-3),
    # torch's own sqrt on the CPU is not correctly rounded where it calls MKL; the kernel's is.
    "sqrt": lambda a: torch.sqrt(torch.abs(a)),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_functions_are_within_two_ulp_of_torch(name, dtype):
    xs = torch.cat([torch.linspace(-110, 110, 9001, dtype=dtype), torch.randn(9001, dtype=dtype) * 3])[None, None]
    kernel = build(lambda given: [ROUNDED[name](given["x"]), given["v"]], ["v"], [], [], dtype)
    ours = scan(kernel, [xs], 0, [xs[0]], [])[0][0][0].numpy()
    truth = ROUNDED[name](xs[0]).numpy()
    ulp = np.spacing(np.minimum(np.abs(truth), np.finfo(truth.dtype).max / 2))
    with np.errstate(invalid="ignore"):
        distance = np.where(ours == truth, 0, np.abs(ours - truth) / ulp)
    assert np.nanmax(distance) <= 2
    assert (np.isnan(ours) == np.isnan(truth)).all()


aten = torch.ops.aten
EXACT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "div by a number": lambda a, b: a / 3.0,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: abs(a),
    "sign": lambda a, b: torch.sign(a),
    "reciprocal": lambda a, b: torch.reciprocal(a),
    "floor": lambda a, b: torch.floor(a),
    "ceil": lambda a, b: torch.ceil(a),
    "trunc": lambda a, b: torch.trunc(a),
    "div trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "round": lambda a, b: torch.round(a),
    "relu": lambda a, b: torch.relu(a),
    "minimum": lambda a, b: torch.minimum(a, b),
    "maximum": lambda a, b: torch.maximum(a, b),
    "clamp": lambda a, b: torch.clamp(a, -0.5, 2.0),
    "pow 2": lambda a, b: a**2,
    "pow 3": lambda a, b: a**3,
    "pow -1": lambda a, b: a**-1,
    "pow -2": lambda a, b: a**-2,
    "add scaled": lambda a, b: torch.add(a, b, alpha=0.3),
    "sub scaled": lambda a, b: torch.sub(a, b, alpha=0.3),
    "sigmoid_backward": lambda a, b: aten.sigmoid_backward(a, b),
    "tanh_backward": lambda a, b: aten.tanh_backward(a, b),
    "threshold_backward": lambda a, b: aten.threshold_backward(a, b, 0.1),
    "gt": lambda a, b: (a > b).to(a.dtype),
    "ge": lambda a, b: (a >= b).to(a.dtype),
    "lt": lambda a, b: (a < b).to(a.dtype),
    "le": lambda a, b: (a <= b).to(a.dtype),
    "eq": lambda a, b: (a == b).to(a.dtype),
    "ne": lambda a, b: (a != b).to(a.dtype),
    "and, or, not": lambda a, b: (((a > 0) & (b > 0)) | ~(a > 1)).to(a.dtype),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 0.25),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_exact_operation_has_torch_s_bits(name, dtype):
    special = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.5, 2.5, float("nan"), float("inf"), -float("inf")], dtype=dtype)
    tiny = torch.tensor([1e-45, -1e-45, 1e-38, 3e38, -3e38], dtype=dtype)
    odd = torch.cat([special, tiny])
    generator = torch.Generator().manual_seed(0)
    a = torch.cat([torch.randn(4096, generator=generator, dtype=dtype) * 2, odd.repeat(len(odd))])
    b = torch.cat([torch.rand(4096, generator=generator, dtype=dtype) * 2 - 1, odd.repeat_interleave(len(odd))])
    # A whole number of vectors: torch's scalar path for the rest of one is another code.
    a, b = (torch.cat([t, t.new_zeros(-len(t) % 64)]) for t in (a, b))
    step = lambda given: [EXACT[name](given["x"], given["v"]), given["v"]]  # noqa: E731
    kernel = build(step, ["v"], [], [], dtype, backward=False)
    with torch.no_grad():
        ours = scan(kernel, [a[None, None]], 0, [b[None]], [])[0][0][0, 0]
    truth = EXACT[name](a, b)
    assert torch.equal(ours.isnan(), truth.isnan())
    kept = ~truth.isnan()
    assert_bits(ours[kept], truth[kept])


# ---- layers ----------------------------------------------------------------------------------------------------------


def make_layer(n=300, **options):
    torch.manual_seed(0)
    return tt.snn.LIB(n, beta=torch.rand(n) * 0.5 + 0.4, quant_fn=tt.functional.round_ste(), **options)


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize(("T", "B", "N"), SHAPES)
def test_layer_unrolls_through_the_kernel(time_dim, T, B, N):
    eager = make_layer(N)
    fused = copy.deepcopy(eager)
    xs = torch.randn((T, B, N) if time_dim == 0 else (B, T, N)) * 0.5 + 0.4
    expected = eager.unroll(xs, time_dim)
    with tt.backend("cpu"):
        given = fused.unroll(xs, time_dim)
    assert T == 1 or expected.sum() > 0
    assert_bits(given, expected)
    assert_bits(fused.mem, eager.mem)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (given * weights).sum().backward()
    for a, b in zip(fused.parameters(), eager.parameters(), strict=True):
        assert float((a.grad - b.grad).abs().max()) <= 1e-5 * float(b.grad.abs().max())


def test_feature_dimension_in_the_middle():
    eager = make_layer(6, dim=-3)
    fused = copy.deepcopy(eager)
    xs = torch.rand(20, 2, 6, 5, 4)
    expected = eager.unroll(xs)
    with tt.backend("cpu"):
        given = fused.unroll(xs)
        by_batch = copy.deepcopy(make_layer(6, dim=-3)).unroll(xs.transpose(0, 1).contiguous(), 1)
    assert expected.sum() > 0
    assert_bits(given, expected)
    assert_bits(by_batch.transpose(0, 1), expected)


def test_chunks_compose_to_the_whole():
    whole, parts = make_layer(), make_layer()
    xs = torch.rand(100, 3, 300, requires_grad=True)
    with tt.backend("cpu"):
        a = whole.unroll(xs)
        b = torch.cat([parts.unroll(xs[:37]), parts.unroll(xs[37:])])
    assert_bits(a, b)
    weights = torch.randn_like(a)
    for_a = torch.autograd.grad((a * weights).sum(), [xs, *whole.parameters()])
    for_b = torch.autograd.grad((b * weights).sum(), [xs, *parts.parameters()])
    assert_bits(for_a[0], for_b[0])
    for p, q in zip(for_a[1:], for_b[1:], strict=True):
        assert float((p - q).abs().max()) <= 1e-6 * float(p.abs().max())


@pytest.mark.parametrize("shape", [(0, 2, 300), (4, 0, 300)])
def test_empty_sequences(shape):
    layer = make_layer()
    with tt.backend("cpu"):
        assert layer.unroll(torch.rand(shape)).shape == shape


def test_another_length_needs_no_other_kernel_and_a_changed_value_does():
    class Scaled(tt.snn.Layer):
        def __init__(self):
            super().__init__(4)
            self.define_state("mem")
            self.scale = 2.0

        def step(self, x, mem):
            mem = 0.5 * mem + self.scale * x
            return mem, mem

    layer = Scaled()
    with tt.backend("cpu"):
        for T in (1, 5, 50):
            layer.reset_states()
            layer.unroll(torch.ones(T, 2, 4))
        assert sum(isinstance(kernel, Kernel) for kernel in layer.kernels.values()) == 1
        layer.reset_states()
        layer.scale = 3.0
        assert float(layer.unroll(torch.ones(1, 1, 4)).max()) == 3.0


def test_a_layer_with_kernels_copies_and_pickles():
    layer = make_layer()
    with tt.backend("cpu"):
        layer.unroll(torch.rand(5, 2, 300))
        twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        expected = layer.unroll(torch.ones(5, 2, 300))
        for twin in twins:
            assert_bits(twin.unroll(torch.ones(5, 2, 300)), expected)


def test_source_is_deterministic_and_speaks_c():
    text = tt.fused.source(make_layer(), "cpu", backward=True)
    assert text == tt.fused.source(make_layer(), "cpu", backward=True)
    assert "void forward(" in text
    assert "void backward(" in text
    assert "void backward(" not in tt.fused.source(make_layer(), "cpu")
    with pytest.raises(ValueError, match="eager"):
        tt.fused.source(make_layer(), "eager")


# ---- refusals --------------------------------------------------------------------------------------------------------

HIDDEN = torch.tensor([1.0, 2.0] * 4)
REFUSED = {
    "sum": lambda x, v: [x - x.sum(), v],
    "cumsum": lambda x, v: [torch.cumsum(x, 0), v],
    "joins tensors": lambda x, v: [torch.cat([x, v])[:8], v],
    "declare it": lambda x, v: [x * HIDDEN, v],
    "sin": lambda x, v: [torch.sin(x), v],
    "rand_like": lambda x, v: [x + torch.rand_like(x), v],
    "in place": lambda x, v: [x.view(2, 4).add_(1).view(8), v],
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_no_pointwise_graph_is_refused_by_name(word):
    example = {"x": torch.ones(8), "v": torch.ones(8)}
    with pytest.raises(graph.GraphError, match=word):
        trace(lambda given: REFUSED[word](given["x"], given["v"]), example, ["v"])


@pytest.mark.parametrize("step", [lambda x, v: [x, v] if x > 0 else [v, x], lambda x, v: [x * float(v), v]])
def test_a_branch_on_a_value_is_refused(step):
    with pytest.raises(graph.GraphError, match="reads the value"):
        trace(lambda given: step(given["x"], given["v"]), {"x": torch.ones(1), "v": torch.ones(1)}, ["v"])


def test_in_place_arithmetic_is_traced():
    def step(given):
        v = given["v"] * 0.5
        v += given["x"]
        v.clamp_(max=1.0)
        return [v, v]

    traced = trace(step, {"x": torch.ones(8), "v": torch.ones(8)}, ["v"])
    given = {"x": torch.randn(50), "v": torch.randn(50)}
    assert_bits(graph.evaluate(traced.forward, given)["output"], step(given)[0])


def test_the_verifier_refuses_malformed_graphs():
    f32 = torch.float32
    inputs = (("x", f32), ("c", torch.bool))
    bad = {
        "no operation": graph.Node("sine", (graph.Ref(0),), f32),
        "arguments": graph.Node("add", (graph.Ref(0),), f32),
        "before it": graph.Node("neg", (graph.Ref(2),), f32),
        "gives bool": graph.Node("gt", (graph.Ref(0), 0), f32),
        "cast is missing": graph.Node("add", (graph.Ref(0), graph.Ref(1)), f32),
        "condition": graph.Node("where", (graph.Ref(0), graph.Ref(0), 0), f32),
        "no tensor": graph.Node("add", (1, 2), f32),
    }
    for word, node in bad.items():
        with pytest.raises(graph.GraphError, match=word):
            graph.verify(graph.Graph(inputs, (node,), ()))


def test_backends_are_chosen_or_refused():
    with pytest.raises(ValueError, match="cuda"), tt.backend("cuda"):
        pass
    layer = make_layer()
    with tt.backend("cpu"), pytest.raises(tt.fused.FuseError, match="complex64"):
        layer.unroll(torch.rand(3, 2, 300).to(torch.complex64))
    with tt.backend("cpu"), pytest.raises(tt.fused.FuseError, match=r"is torch\.float32"):
        layer.unroll(torch.rand(3, 2, 300).double())
    with tt.backend("cpu"), pytest.raises(ValueError, match="num_neurons=300"):
        layer.unroll(torch.rand(3, 2, 299))
    assert layer.mem is None


def _in_child(queue, layer, xs):
    with tt.backend("cpu"), torch.no_grad():
        queue.put(layer.unroll(xs).tolist())


def test_a_forked_child_runs_serially_and_does_not_hang():
    # Everything but the kernel is done before the fork: torch's own parallel regions do hang in a forked child.
    layer, xs = make_layer(600), torch.ones(20, 1, 600)
    with tt.backend("cpu"), torch.no_grad():
        expected = layer.unroll(xs).tolist()
    layer.reset_states()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, layer, xs), daemon=True)
    child.start()
    assert queue.get(timeout=20) == expected
    child.join(timeout=20)


def test_training_through_the_kernel_learns():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 32), tt.snn.LIB(32, quant_fn=tt.functional.round_ste()), nn.Linear(32, 2))
    xs = torch.rand(25, 64, 10)
    target = (xs.mean(0)[:, 0] > 0.5).long()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        tt.reset_states(network)
        with tt.backend("cpu"):
            spikes = network[1].unroll(network[0](xs))
        loss = nn.functional.cross_entropy(network[2](spikes).mean(0), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


# ---- size ------------------------------------------------------------------------------------------------------------


def test_offsets_beyond_two_to_the_31_elements(monkeypatch):
    """Rows 2^31 + 11 elements apart, in memory of which only the pages of these rows exist."""
    apart, steps, n = 2**31 + 11, 2, 700
    whole = mmap.mmap(-1, 4 * (apart * (steps - 1) + 2 * n), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    x = torch.frombuffer(whole, dtype=torch.float32)
    y = x[n:]  # between the rows of x

    def step(given):
        mem = given["beta"] * given["mem"] + given["x"]
        return torch.where(mem > 1, mem, -mem), mem

    kernel = build(step, ["mem"], ["beta"], [], torch.float32)
    xs, mem, beta = torch.randn(steps, n), torch.zeros(n), torch.tensor(0.9)
    expected, state = [], mem
    for t in range(steps):
        x[t * apart : t * apart + n] = xs[t]
        output, state = step({"x": xs[t], "mem": state, "beta": beta})
        expected.append(output)
    last, shape = torch.empty(n), Geometry(steps, 1, n, apart, 0)
    for streamed in (2**62, 1):
        monkeypatch.setattr(kernel_module, "_STREAMED", streamed)
        kernel_module._integers.cache_clear()
        kernel.call("forward", [x, y, mem, last, None, None, beta], shape, (1,))
        for t in range(steps):
            assert_bits(y[t * apart : t * apart + n], expected[t])
            y[t * apart : t * apart + n] = 0
        assert_bits(last, state)
    kernel.call("backward", [x, x, y, mem, None, None, None, torch.empty(n), beta], shape, (1,))
    kernel_module._integers.cache_clear()
    leaf = xs.clone().requires_grad_()
    total, state = 0, mem
    for t in range(steps):
        output, state = step({"x": leaf[t], "mem": state, "beta": beta})
        total = total + (output * xs[t]).sum()
    total.backward()
    for t in range(steps):
        assert_bits(y[t * apart : t * apart + n], leaf.grad[t])
