"""What kernels of every backend are held against: random steps, rounded functions, a layer and its step loop."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch

import tracetorch as tt
from tests.bits import assert_bits
from tracetorch.fused.build import build
from tracetorch.fused.scan import scan

Slopes = tuple[torch.Tensor | None, ...]

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


def slopes(results: list[torch.Tensor], leaves: list[torch.Tensor], cotangents: list[torch.Tensor]) -> Slopes:
    """The gradients of the leaves; None of those that reach no result."""
    return torch.autograd.grad(results, leaves, cotangents, allow_unused=True)


def assert_slopes(given: Slopes, expected: Slopes, dtype: torch.dtype) -> None:
    """None where the step loop has none; elsewhere nearly equal, as sums in another order are."""
    assert [a is None for a in given] == [b is None for b in expected]
    assert any(b is not None for b in expected)
    for a, b in zip(given, expected, strict=True):
        if a is not None and b is not None:
            assert torch.isfinite(a).all()
            scale = float(b.abs().max()) or 1.0
            assert float((a - b).abs().max()) <= (1e-5 if dtype is torch.float32 else 1e-13) * scale


# ---- functions that are not correctly rounded ------------------------------------------------------------------------

ROUNDED = {
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "log": lambda a: torch.log(torch.abs(a) + 1e-3),
    # torch's own sqrt on the CPU is not correctly rounded where it calls MKL; the kernel's is.
    "sqrt": lambda a: torch.sqrt(torch.abs(a)),
}


def assert_within_two_ulp(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """And NaN in the same places."""
    a, b = ours.cpu().numpy(), truth.cpu().numpy()
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.size
    ulp = np.spacing(np.minimum(np.abs(b), np.finfo(b.dtype).max / 2))
    with np.errstate(invalid="ignore"):
        distance = np.where(a == b, 0, np.abs(a - b) / ulp)
    assert np.nanmax(distance) <= 2
    assert (np.isnan(a) == np.isnan(b)).all()


def check_rounded_function(function: Any, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """A kernel of one function, from -110 to 110 and around 0, against torch's."""
    xs = torch.cat([torch.linspace(-110, 110, 9001, dtype=dtype), torch.randn(9001, dtype=dtype) * 3])[None].to(device)
    step = lambda given: [function(given["x"]), given["v"]]  # noqa: E731
    kernel = build(step, ["v"], [], [], dtype, backward=False, backend=backend, device=device)
    (ours,), _, _ = scan(kernel, [xs], 0, [xs[0]], [])
    assert_within_two_ulp(ours, function(xs))


# ---- a layer ---------------------------------------------------------------------------------------------------------


def make_layer(n=300, **options):
    torch.manual_seed(0)
    return tt.snn.LIB(n, beta=torch.rand(n) * 0.5 + 0.4, quant_fn=tt.functional.round_ste(), **options)


def check_layer_unrolls(backend: str, T: int, B: int, N: int, time_dim: int) -> None:
    """Outputs and states bit for bit; gradients of parameters, which are sums in another order, nearly."""
    eager = make_layer(N)
    fused = copy.deepcopy(eager)
    xs = torch.randn((T, B, N) if time_dim == 0 else (B, T, N)) * 0.5 + 0.4
    with tt.backend("eager"):
        expected = eager.unroll(xs, time_dim)
    with tt.backend(backend):
        given = fused.unroll(xs, time_dim)
    assert T == 1 or expected.sum() > 0
    assert_bits(given, expected)
    assert_bits(fused.mem, eager.mem)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (given * weights).sum().backward()
    for a, b in zip(fused.parameters(), eager.parameters(), strict=True):
        assert float((a.grad - b.grad).abs().max()) <= 1e-5 * float(b.grad.abs().max())


def check_chunks_compose(backend: str, T: int, N: int, cut: int) -> None:
    """Two chunks, the second from the states of the first, are the whole: outputs and gradients."""
    whole, parts = make_layer(N), make_layer(N)
    xs = torch.rand(T, 3, N, requires_grad=True)
    with tt.backend(backend):
        a = whole.unroll(xs)
        b = torch.cat([parts.unroll(xs[:cut]), parts.unroll(xs[cut:])])
    assert_bits(a, b)
    weights = torch.randn_like(a)
    for_a = torch.autograd.grad((a * weights).sum(), [xs, *whole.parameters()])
    for_b = torch.autograd.grad((b * weights).sum(), [xs, *parts.parameters()])
    assert_bits(for_a[0], for_b[0])
    for p, q in zip(for_a[1:], for_b[1:], strict=True):
        assert float((p - q).abs().max()) <= 1e-6 * float(p.abs().max())
