"""The engine: kernel == interpreter == eager, bit for bit where the arithmetic allows."""

from __future__ import annotations

import mmap

import pytest
import torch

from tests.bits import assert_bits
from tests.engine_checks import ROUNDED, assert_slopes, check_rounded_function, loop, random_step, slopes
from tracetorch.fused import graph
from tracetorch.fused import kernel as kernel_module
from tracetorch.fused.build import build
from tracetorch.fused.kernel import Geometry
from tracetorch.fused.scan import scan
from tracetorch.fused.trace import trace

pytestmark = pytest.mark.usefixtures("poisoned")

# ---- random steps ----------------------------------------------------------------------------------------------------

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
    expected = slopes([ys, *last], leaves, cotangents)
    assert_slopes(slopes([ours, *our_last], leaves, cotangents), expected, dtype)


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


# ---- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_functions_are_within_two_ulp_of_torch(name, dtype):
    check_rounded_function(ROUNDED[name], dtype, "cpu")


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


# ---- size ------------------------------------------------------------------------------------------------------------


def leaky(given):
    """A step whose state, output and gradients all count."""
    v = given["beta"] * given["v"] + given["x"]
    return [torch.where(v > 0.5, v - 0.5, v * v), v]


def run(N, time_dim, B=3, T=70):
    """Outputs, states, recorded states and gradients, of rows of N elements."""
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn((T, B, N) if time_dim == 0 else (B, T, N), generator=generator).requires_grad_()
    beta = torch.rand(N, generator=generator).requires_grad_()
    outputs, last, recorded = scan(
        build(leaky, ["v"], ["beta"], ["beta"], torch.float32), [xs], time_dim, [None], [beta], True
    )
    results = [*outputs, *last, *recorded]
    cotangents = [torch.randn(y.shape, generator=generator) for y in results]
    return [*results, *torch.autograd.grad(results, [xs, beta], cotangents)]


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("N", [1, 5, 17, 67])
def test_rows_written_past_the_caches_begin_and_end_anywhere(N, time_dim, monkeypatch):
    """Within a vector, even both in one: a row is narrower than a vector, and at any place of one."""
    expected = run(N, time_dim)
    monkeypatch.setattr(kernel_module, "_STREAMED", 1)
    kernel_module._integers.cache_clear()
    found = run(N, time_dim)
    kernel_module._integers.cache_clear()
    for a, b in zip(found, expected, strict=True):
        assert_bits(a, b)


@pytest.mark.parametrize("time_dim", [0, 1])
def test_threads_share_a_row_and_change_no_bit(time_dim):
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        try:
            found.append(run(300, time_dim))
        finally:
            torch.set_num_threads(threads)
    for each in found[1:]:
        for a, b in zip(each, found[0], strict=True):
            assert_bits(a, b)


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
