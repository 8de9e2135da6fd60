"""What the versions of torch differ in, from 2.6 on: private names, inferred schemas, saved-tensor hooks."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import tracetorch as tt
from tests.test_checkpoint import B, Steps, T, results
from tracetorch.core import saved_hooks
from tracetorch.fused import library

ROOT = Path(__file__).parents[1]
INSTALLED = ("tracetorch", "adapters", "conformance", "cli")
# Private names of torch in use. Each was looked up in the files of torch 2.6.0, 2.7.0, 2.8.0, 2.10.0, 2.12.0 and 2.13.0
# and is in all of them: look a new one up before it comes here, or ask for it with `getattr` and a way without it.
PRIVATE = {
    "torch._C._autograd._saved_tensors_hooks_is_enabled",
    "torch._C._are_functorch_transforms_active",
    "torch._C._has_storage",
    "torch._C._is_tracing",
    "torch._C._len_torch_dispatch_stack",
    "torch._subclasses.fake_tensor.unset_fake_temporarily",
    "torch.autograd.Variable._execution_engine",
    "torch.autograd.forward_ad._current_level",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_map_only",
}


def private(source: str) -> set[str]:
    """The longest dotted names of torch in a file that have a part with a leading underscore, constants aside."""
    nodes = list(ast.walk(ast.parse(source)))
    known: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for each in node.names:
                root = each.name.partition(".")[0]
                known[each.asname or root] = each.name if each.asname else root
        elif isinstance(node, ast.ImportFrom):
            known |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            before = dotted(node.value)
            return before and f"{before}.{node.attr}"
        return known.get(node.id, "") if isinstance(node, ast.Name) else ""

    found = {dotted(node) for node in nodes if isinstance(node, ast.Attribute)} | set(known.values())
    found = {name for name in found if name.startswith("torch.") and ("._" in name and ".__" not in name)}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def test_every_private_name_of_torch_is_one_that_all_versions_have():
    found: set[str] = set()
    for folder in INSTALLED:
        for path in (ROOT / folder).rglob("*.py"):
            found |= private(path.read_text(encoding="utf-8"))
    assert found == PRIVATE


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import torch\ntorch._C._new()", "torch._C._new"),
        ("from torch import _C as c\nc._new", "torch._C._new"),
        ("from torch._new import thing", "torch._new.thing"),
        ("def f():\n    import torch._dynamo as d\n    d.reset()", "torch._dynamo.reset"),
    ],
)
def test_private_names_are_found(line, name):
    assert private(line) == {name}


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_a_private_name_exists_here(name):
    owner, _, attribute = name.rpartition(".")
    found = torch
    for part in owner.split(".")[1:]:
        found = getattr(found, part, None) or importlib.import_module(f"{found.__name__}.{part}")
    assert hasattr(found, attribute)


def test_the_library_s_operations_declare_their_schemas():
    """torch 2.6 infers none from `list[Tensor]`; newer ones infer the same."""
    for operation in (library.scan, library.scan_backward):
        assert operation._schema == torch.library.infer_schema(operation._init_fn, mutates_args=())
    source = ast.parse((ROOT / "tracetorch/fused/library.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and "custom_op" in ast.dump(node.func)]
    assert len(calls) == 2
    assert all("schema" in {keyword.arg for keyword in call.keywords} for call in calls)


# ---- torch 2.6 and 2.7, which do not say what saved-tensor hooks there are -------------------------------------------


@pytest.fixture
def older(monkeypatch):
    monkeypatch.setattr(saved_hooks, "_read", None)


@pytest.mark.parametrize("unrolled", [False, True])
def test_older_torch_refuses_checkpointing_too(unrolled, older):
    net, xs = Steps(unrolled), torch.rand(T, B, 5)
    with pytest.raises(RuntimeError, match=r"LIB: .*use tracetorch\.checkpoint"):
        checkpoint(net, xs, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"LIB: .*use tracetorch\.checkpoint"):
        checkpoint_sequential([net, torch.nn.Identity()], 2, xs, use_reentrant=False)
    net(xs).sum().backward()
    assert net.first.weight.grad.abs().sum() > 0


def test_older_torch_refuses_the_second_run_of_checkpointing(older):
    """A layer that the first run passed by."""
    net, xs, runs = tt.snn.LIB(4), torch.rand(B, 4, requires_grad=True), []

    def at_the_second(x):
        runs.append(0)
        y = x.exp()
        if len(runs) > 1:
            net(x)
        return y.exp()

    with pytest.raises(RuntimeError, match=r"LIB: .*use tracetorch\.checkpoint"):
        checkpoint(at_the_second, xs, use_reentrant=False).sum().backward()


def test_older_torch_lets_reentrant_checkpointing_be(older):
    """As newer versions do, which cannot see it."""
    checkpoint(Steps(False), torch.rand(T, B, 5, requires_grad=True), use_reentrant=True)


@pytest.mark.parametrize("unrolled", [False, True])
def test_older_torch_gives_the_same_gradients_through_our_own_checkpointing(unrolled, older):
    for a, b in zip(results(lambda net, xs: net(xs), unrolled), results(tt.checkpoint, unrolled), strict=True):
        assert torch.equal(a, b)


def test_older_torch_leaves_a_second_backward_to_torch_s_own_words(older):
    layer = tt.snn.LIB(4)
    layer(torch.rand(B, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        layer(torch.rand(B, 4)).sum().backward()


def test_older_torch_traces_a_fused_layer_past_a_user_s_hooks(older):
    snntorch = pytest.importorskip("snntorch")
    layer = snntorch.Leaky(0.9, learn_beta=True, init_hidden=True)
    fused, saved = tt.fuse(layer), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        fused.unroll(torch.rand(T, B, 4), 0).sum().backward()
    assert saved
    assert (2, 4) not in saved  # that of the tracer's examples
    assert fused.beta.grad is not None


@pytest.mark.parametrize("version", ["this", "older"])
@pytest.mark.parametrize("kind", ["native", "fused"])
def test_a_kernel_is_built_where_saved_tensor_hooks_are_disabled(kind, version, monkeypatch):
    """No hooks may be put there, and none are needed."""
    if version == "older":
        monkeypatch.setattr(saved_hooks, "_read", None)
    layer = tt.snn.LIB(4, quant_fn=tt.functional.round_ste())
    if kind == "fused":
        layer = tt.fuse(pytest.importorskip("snntorch").Leaky(0.9, learn_beta=True, init_hidden=True))
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"), tt.backend("cpu"):
        layer.unroll(torch.rand(T, B, 4), 0).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
