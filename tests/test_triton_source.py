"""Triton's source is deterministic and readable; what it cannot say, or this machine not run, is refused by name."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
import torch

import tracetorch as tt
from tests.triton_without_gpu import BOOL, F32, F64, X, make_layer, python, triton
from tracetorch.fused import graph
from tracetorch.fused.build import build
from tracetorch.fused.emit_triton import Body
from tracetorch.fused.graph import Graph, Node, Ref

pytestmark = pytest.mark.usefixtures("fresh_kernels")


def test_source_is_deterministic_and_readable():
    text = tt.fused.source(make_layer(), "triton", backward=True)
    assert text == tt.fused.source(make_layer(), "triton", backward=True)
    assert re.findall(r"^def (\w+)\(", text, re.MULTILINE) == ["step", "prefetch", "vjp", "forward", "backward"]
    assert "def vjp(" not in tt.fused.source(make_layer(), "triton")
    assert "libdevice.exp" in text
    assert "tl.float64" in tt.fused.source(make_layer(), "triton", backward=True, dtype=F64)


def test_division_by_a_number_is_what_eager_torch_does_on_the_device():
    node = Node("div", (X, 10.0), F32)
    made = Graph((("x", F32),), (node,), (("output", Ref(1)),))
    assert Body(made, {"x": "x"}, "cuda").lines == ["v0 = x * 0.10000000149011612"]
    assert Body(made, {"x": "x"}, "cpu").lines == ["v0 = tl.div_rn(x, tl.full(x.shape, 10.0, tl.float32))"]
    made = Graph((("x", F64),), (Node("div", (X, 10.0), F64),), (("output", Ref(1)),))
    assert Body(made, {"x": "x"}, "cuda").lines == ["v0 = x * 0.1"]
    with pytest.raises(ValueError, match="xpu"):
        Body(made, {"x": "x"}, "xpu")


@pytest.mark.parametrize(("gpu", "line"), [(False, "in_x * 0.3333333432674408"), (True, "tl.div_rn(in_x, v")])
def test_division_by_a_constant_tensor_is_a_division_on_the_gpu_alone(gpu, line, monkeypatch):
    monkeypatch.setattr(sys.modules["tracetorch.fused.tracer"], "_on_gpu", lambda tensor: gpu)
    step = lambda given: [given["x"] / (torch.ones(()) * 3)]  # noqa: E731
    text = build(step, [], [], [], F32, backend="triton", device="cuda").source
    assert line in text, text


@pytest.mark.parametrize(
    ("word", "node"),
    [
        ("sine", Node("sine", (X,), F32)),
        (r"pow with the exponent 2\.5", Node("pow", (X, 2.5), F32)),
        ("pow with the exponent a tensor", Node("pow", (X, X), F32)),
        (r"cast on torch\.int64", Node("cast", (X,), torch.int64)),
        (r"add on torch\.bool", Node("add", (Ref(1), Ref(1)), BOOL)),
    ],
)
def test_what_cannot_be_rendered_is_refused_by_name(word, node):
    made = Graph((("x", F32), ("c", BOOL)), (node,), (("output", Ref(2)),))
    with pytest.raises(graph.GraphError, match=word):
        Body(made, {"x": "x", "c": "c"}, "cuda")


def test_paths_of_parameters_are_made_names():
    step = lambda given: [given["x"] * given["a.b"] + given["a_b"], given["v"]]  # noqa: E731
    text = build(step, ["v"], ["a.b", "a_b"], ["a.b"], F32, backend="triton", device="cuda").source
    assert "p_a_b = " in text
    compile(text, "source", "exec")


@pytest.mark.parametrize("version", ["3.2.0", "3.5.1"])
def test_an_older_triton_is_refused(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    with (
        pytest.raises(tt.fused.BackendError, match=rf"Triton 3\.6 or newer.*{version}.*torch 2\.10"),
        tt.backend("triton"),
    ):
        pass


def test_why_layers_on_a_gpu_run_step_by_step_is_said_once(monkeypatch):
    executor = importlib.import_module("tracetorch.fused.executor")
    executor._cuda.cache_clear()
    monkeypatch.setattr(executor, "no_triton", lambda: "no Triton")
    with pytest.warns(tt.fused.FuseWarning, match=r"no Triton: layers on CUDA run step by step"):
        assert executor.automatic("cuda") == "eager"
    assert executor.automatic("cuda") == "eager"
    executor._cuda.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_is_refused():
    with pytest.raises(tt.fused.BackendError, match=r"triton.*CUDA GPU.*'cpu' or 'eager'"), tt.backend("triton"):
        pass


def test_without_triton_the_source_is_there_and_the_backend_refused():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import tracetorch as tt\n"
        "print('def backward(' in tt.fused.source(tt.snn.LI(4), 'triton', backward=True))\n"
        "try:\n    tt.backend('triton').__enter__()\n"
        "except tt.fused.BackendError as error: print(error)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True\nthe triton backend needs Triton"), done.stdout


def test_importing_tracetorch_does_not_load_triton():
    assert python("-c", "import sys, tracetorch; sys.exit('triton' in sys.modules)").returncode == 0
