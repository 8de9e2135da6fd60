"""A `Graph` as JSON and back: calls by whitelisted names, arguments as tagged values. Nothing is looked up by name
beyond the tables here, so that a file from anyone names no code.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tracetorch.core.graph import Graph, Loop, Node, Ref, Size, State, leaves
from tracetorch.core.layer import Layer
from tracetorch.core.rows import Children, Tensors
from tracetorch.core.topology import DTYPES, FileError

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "getitem")
_TORCH = (
    *("abs", "add", "amax", "amin", "argmax", "bmm", "cat", "ceil", "chunk", "clamp", "concat", "cos", "cumsum", "div"),
    *(
        "einsum",
        "exp",
        "flatten",
        "floor",
        "ge",
        "gt",
        "hstack",
        "le",
        "log",
        "logical_and",
        "logical_not",
        "logical_or",
    ),
    *("lt", "matmul", "max", "maximum", "mean", "min", "minimum", "movedim", "mul", "neg", "permute", "pow", "prod"),
    *(
        "relu",
        "reshape",
        "round",
        "sigmoid",
        "sign",
        "sin",
        "softmax",
        "split",
        "sqrt",
        "squeeze",
        "stack",
        "sub",
        "sum",
    ),
    *("tanh", "tensordot", "tile", "transpose", "unbind", "unflatten", "unsqueeze", "vstack", "where", "zeros_like"),
    *(
        "ones_like",
        "std",
        "var",
        "logsumexp",
        "log_softmax",
        "square",
        "rsqrt",
        "eq",
        "ne",
        "dropout",
        "conv2d",
        "conv1d",
    ),
)
_FUNCTIONAL = (
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("batch_norm", "conv1d", "conv2d", "conv3d", "dropout", "elu", "gelu", "hardtanh", "interpolate", "layer_norm"),
    *("leaky_relu", "linear", "log_softmax", "lp_pool1d", "lp_pool2d", "max_pool1d", "max_pool2d", "max_pool3d"),
    *("normalize", "one_hot", "pad", "relu", "relu6", "sigmoid", "silu", "softmax", "softplus", "tanh", "group_norm"),
)
_METHODS = (
    *("abs", "add", "amax", "amin", "argmax", "bmm", "ceil", "chunk", "clamp", "clamp_max", "clamp_min", "clone"),
    *(
        "contiguous",
        "cumsum",
        "detach",
        "div",
        "double",
        "eq",
        "exp",
        "expand",
        "expand_as",
        "flatten",
        "flip",
        "float",
    ),
    *(
        "floor",
        "ge",
        "gt",
        "le",
        "log",
        "logical_and",
        "logical_not",
        "logical_or",
        "lt",
        "matmul",
        "max",
        "mean",
        "min",
    ),
    *(
        "movedim",
        "mul",
        "narrow",
        "ne",
        "neg",
        "permute",
        "pow",
        "prod",
        "relu",
        "repeat",
        "reshape",
        "round",
        "select",
    ),
    *("sigmoid", "sign", "softmax", "split", "sqrt", "square", "squeeze", "std", "sub", "sum", "swapaxes", "t", "tanh"),
    *("tile", "transpose", "type_as", "unbind", "unflatten", "unsqueeze", "var", "view", "view_as", "where", "rsqrt"),
    *(
        "maximum",
        "minimum",
        "log_softmax",
        "masked_fill",
        "new_zeros",
        "new_ones",
        "half",
        "bfloat16",
        "mode",
        "median",
    ),
)


def _functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    found.update({f"torch.{name}": getattr(torch, name) for name in _TORCH})
    found.update({f"torch.nn.functional.{name}": getattr(F, name) for name in _FUNCTIONAL})
    return found


# Nothing else can be called by a graph in a file: none of these reads or writes anything but its arguments.
FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(_functions())
METHODS = frozenset(_METHODS)
_NAMES: Mapping[int, str] = MappingProxyType({id(function): name for name, function in FUNCTIONS.items()})


# ---- to JSON ---------------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """A nested argument as JSON. Raises `FileError` where it holds something that a file cannot."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, State):
        return {"state": [value.name, value.attribute]}
    if isinstance(value, Size):
        return {"size": [value.dim, value.times]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [encode(item) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": [[key, encode(item)] for key, item in value.items()]}
    for row in DTYPES.values():
        if value is row.torch:
            return {"dtype": row.name}
    raise FileError(f"an argument of a node, {value!r:.100}, cannot be saved")


def graph_arguments(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """The constructor arguments of a `Graph`, JSON-ready."""
    assert isinstance(module, Graph)
    nodes = []
    for node in module.nodes:
        target = node.target
        if node.kind == "function":
            if id(target) not in _NAMES:
                raise FileError(f"its node {node.name!r} calls {target!r:.100}, which a file cannot name")
            target = _NAMES[id(target)]
        if node.kind == "method" and target not in METHODS:
            raise FileError(f"its node {node.name!r} calls the method {target!r:.100}, which a file cannot name")
        nodes.append([node.name, node.kind, target, encode(tuple(node.args)), encode(dict(node.kwargs))])
    return {"nodes": nodes, "output": encode(module.output), "inputs": list(module.inputs)}


# ---- from JSON -------------------------------------------------------------------------------------------------------


def decode(data: Any) -> Any:
    """The value of `encode`'s JSON. Raises `FileError` for anything else."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is not dict or len(data) != 1:
        raise FileError(f"{data!r:.100} is no argument of a node")
    ((kind, content),) = data.items()
    if kind == "ref" and type(content) is str:
        return Ref(content)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "ellipsis" and content is True:
        return Ellipsis
    if kind == "dtype" and type(content) is str and content in DTYPES:
        return DTYPES[content].torch
    if type(content) not in (list, tuple):
        raise FileError(f"{data!r:.100} is no argument of a node")
    return _decode_sequence(kind, list(content))


def _decode_sequence(kind: str, content: list[Any]) -> Any:
    types = [type(item) for item in content]
    if kind == "state" and types == [str, str]:
        return State(*content)
    if kind == "size" and types in ([int, int], [int, type(None)]):
        return Size(*content)
    if kind == "slice" and len(content) == 3:
        return slice(*map(decode, content))
    if kind == "tuple":
        return tuple(map(decode, content))
    if kind == "list":
        return list(map(decode, content))
    pairs = all(
        t in (list, tuple) and len(item) == 2 and type(item[0]) is str for t, item in zip(types, content, strict=True)
    )
    if kind == "dict" and pairs:
        return {key: decode(item) for key, item in content}
    raise FileError(f"{kind!r:.100} with {content!r:.100} is no argument of a node")


def _node(data: Any) -> Node:
    if type(data) not in (list, tuple) or len(data) != 5 or not all(type(part) is str for part in data[:3]):
        raise FileError(f"{data!r:.100} is no node: [name, kind, target, args, kwargs]")
    name, kind, target, args, kwargs = data[0], data[1], data[2], decode(data[3]), decode(data[4])
    if type(args) is not tuple or type(kwargs) is not dict:
        raise FileError(f"the node {name!r:.100} has no tuple and dict of arguments")
    if kind == "function":
        if target not in FUNCTIONS:
            raise FileError(f"the node {name!r:.100} calls {target!r:.100}, which is not one that a file may name")
        return Node(name, kind, FUNCTIONS[target], args, kwargs)
    if kind == "method" and (target not in METHODS or not args):
        raise FileError(
            f"the node {name!r:.100} calls the method {target!r:.100}, which is not one that a file may name"
        )
    return Node(name, kind, target, args, kwargs)


def build_graph(cls: type[nn.Module], arguments: dict[str, Any], tensors: Tensors, children: Children) -> nn.Module:
    """The graph of a record."""
    nodes = [_node(data) for data in arguments["nodes"]]
    inputs = arguments["inputs"]
    if not all(type(name) is str for name in inputs):
        raise FileError(f"inputs={inputs!r:.100} must be names")
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len(held) != len(tensors):
        raise FileError(f"its tensors {sorted(set(tensors) - set(held))!r:.100} must be there")
    graph = Graph(dict(children), nodes, decode(arguments["output"]), inputs, held)
    called = {node.name: graph.called(node) for node in nodes if node.kind == "module"}
    for leaf in leaves(([(node.args, dict(node.kwargs)) for node in nodes], graph.output)):
        if isinstance(leaf, State):
            layer = called[leaf.name]
            if not isinstance(layer, Layer) or leaf.attribute not in layer.state_names:
                raise FileError(f"{leaf.attribute!r:.100} is no state of {leaf.name!r:.100}")
    return graph


def build_loop(cls: type[nn.Module], arguments: dict[str, Any], tensors: Tensors, children: Children) -> nn.Module:
    """The loop of a record."""
    given = dict(children)
    if not {"step"} <= set(given) <= {"step", "before", "after"} or not all(type(g) is Graph for g in given.values()):
        raise FileError(f"its children must be graphs: step, and perhaps before and after; not {list(given)!r:.100}")
    step = given.pop("step")
    assert isinstance(step, Graph)
    return Loop(step, **arguments, **given)  # type: ignore[arg-type]
