"""What a trace makes of a step: a graph with the step's bits, or a refusal by name; malformed graphs are refused."""

from __future__ import annotations

import pytest
import torch

from tests.bits import assert_bits
from tracetorch.fused import graph
from tracetorch.fused.trace import trace

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
