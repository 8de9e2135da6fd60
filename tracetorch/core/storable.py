"""What a network file may hold: the table of classes, with the arguments that rebuild each, and of dtypes.

One row a class; `construct` builds a module from a row for `load`, and for `save` to see that nothing is missing. Torch
layers are built on the meta device, so that an absurd size takes no memory before it is compared with its arrays.
This is the one place where core looks into `tracetorch.snn`; `tracetorch.core` itself must not import it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from tracetorch.core import graph_file
from tracetorch.core.graph import Graph, Loop
from tracetorch.core.model import Sequential
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.core.topology import FileError, ModuleRecord, check_fields
from tracetorch.functional.quantizers import probabilistic_ste, round_ste, stochastic_round_ste
from tracetorch.functional.spikes import sigmoid4x, surrogate_spike
from tracetorch.functional.surrogates import SURROGATES
from tracetorch.nn import LIF, LIS, Online
from tracetorch.nn import Sequential as OnlineSequential
from tracetorch.nn.parts import Eligibility, InputTrace, LeakyMembrane, SpikingMembrane
from tracetorch.snn.leaky import LAYERS
from tracetorch.snn.recurrent import Recurrent
from tracetorch.snn.spec_neuron import SpecNeuron

Tensors: TypeAlias = Mapping[str, Tensor | None]
Children: TypeAlias = Sequence[tuple[str, nn.Module]]
Build: TypeAlias = Callable[[type[nn.Module], dict[str, Any], Tensors, Children], nn.Module]


class Argument(NamedTuple):
    """What a constructor argument may be, in words and as a test (JSON lists are tuples by then)."""

    words: str
    accepts: Callable[[Any], bool]


def _or_none(kind: Argument) -> Argument:
    return Argument(f"{kind.words} or null", lambda value: value is None or kind.accepts(value))


def _tuple(kind: Argument, *lengths: int) -> Argument:
    counts = " or ".join(map(str, lengths))
    return Argument(
        f"a list of {counts}, each {kind.words}",
        lambda value: type(value) is tuple and len(value) in lengths and all(map(kind.accepts, value)),
    )


def _each(kind: Argument, n: int) -> Argument:
    """One for all `n` dimensions, or a tuple of `n`."""
    return _either(kind, _tuple(kind, n))


def _either(one: Argument, other: Argument) -> Argument:
    return Argument(f"{one.words} or {other.words}", lambda value: one.accepts(value) or other.accepts(value))


def _one_of(*names: str) -> Argument:
    return Argument(f"one of {', '.join(names)}", lambda value: type(value) is str and value in names)


INT = Argument("an integer", lambda value: type(value) is int)
BOOL = Argument("true or false", lambda value: type(value) is bool)
FLOAT = Argument("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))
_INDEX = _or_none(INT)
SHAPE = _tuple(INT, *range(1, 9))

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"tracetorch.functional.sigmoid4x": sigmoid4x})
# As modules they are children.
_FUNCTION_MODULES = (nn.Identity, round_ste, stochastic_round_ste, probabilistic_ste, surrogate_spike)
_FUNCTION = Argument(
    "tracetorch.functional.sigmoid4x, torch.nn.Identity(), or of tracetorch.functional round_ste(step_size), "
    "stochastic_round_ste(step_size), probabilistic_ste() or surrogate_spike(name)",
    lambda value: value is None or (type(value) is str and value in _FUNCTIONS),
)


# ---- building --------------------------------------------------------------------------------------------------------


def _build_torch(cls: type[nn.Module], arguments: dict[str, Any], tensors: Tensors, children: Children) -> nn.Module:
    if children:
        raise FileError(f"it has children ({[name for name, _ in children]!r:.100}), which its class has not")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's "Initializing zero-element tensors is a no-op"
        return cls(**arguments)


def _build_sequential(
    cls: type[nn.Module], arguments: dict[str, Any], tensors: Tensors, children: Children
) -> nn.Module:
    module = cls()
    for name, child in children:
        module.add_module(name, child)
    return module


def _build_leaky(cls: type[nn.Module], arguments: dict[str, Any], tensors: Tensors, children: Children) -> nn.Module:
    """The 32 layers: ranks and what is learnable are told by the tensors, a scalar or one per neuron."""
    given = dict(children)
    for name in [n for n in arguments if n.endswith("_fn")]:
        if (arguments[name] is None) != (name in given):
            raise FileError(f"{name} must be either named or a child")
        arguments[name] = _FUNCTIONS[arguments[name]] if name not in given else given.pop(name)
        if isinstance(arguments[name], nn.Module) and type(arguments[name]) not in _FUNCTION_MODULES:
            raise FileError(f"{name}={arguments[name]!r:.200}: must be {_FUNCTION.words}")
    if given:
        raise FileError(f"it has children ({list(given)!r:.100}), which its class has not")
    for name, tensor in tensors.items():
        shape, neurons = None if tensor is None else list(tensor.shape), arguments["num_neurons"]
        if tensor is None or not name.startswith("raw_") or shape not in ([], [neurons]):
            wanted = "[]" if neurons is None else f"[] or [{neurons}]"
            raise FileError(f"{name!r:.100} has the shape {shape}; must be {wanted}")
        arguments[f"{name[4:]}_rank"] = tensor.ndim
        arguments[f"learn_{name[4:]}"] = isinstance(tensor, nn.Parameter)
    with torch.device("cpu"):
        return cls(**arguments)


def _build_spec_neuron(
    cls: type[nn.Module], arguments: dict[str, Any], tensors: Tensors, children: Children
) -> nn.Module:
    data = arguments["spec"]
    entries = data.get("parameters")
    if children or type(entries) is not dict or set(entries) != set(tensors):
        raise FileError(f"spec: its parameters must be the tensors {list(tensors)!r:.200}, and there are no children")
    if type(data.get("time_unit")) not in (str, type(None)):
        raise FileError(f"spec: time_unit={data['time_unit']!r:.100} must be a text or null")
    values = {}
    for name, entry in entries.items():
        check_fields(entry, f"spec: parameter {name!r:.100}", {"raw": str, "learnable": bool})
        tensor = tensors[name]
        if tensor is None or not tensor.is_floating_point() or isinstance(tensor, nn.Parameter) != entry["learnable"]:
            raise FileError(f"spec: {name!r:.100} is not the tensor that it declares")
        tensor = tensor.detach().cpu()
        array = (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
        values[name] = Parameter(array, entry["learnable"], entry["raw"])
    return SpecNeuron(NeuronSpec.from_dict(data, values))


def _build_online(cls: type[nn.Module], arguments: dict[str, Any], tensors: Tensors, children: Children) -> nn.Module:
    """The online layers: their parts are children; whether there is a bias and what is learnable, the tensors tell."""
    given: dict[str, Any] = dict(children)
    sizes, weight = (arguments["in_features"], arguments["out_features"]), tensors.get("weight")
    kinds: dict[str, type[nn.Module]] = {
        "input_trace": InputTrace,
        "membrane": SpikingMembrane if cls is LIF else LeakyMembrane,
        "eligibility": Eligibility,
    }
    if list(given) != list(kinds) or any(type(given[name]) is not kind for name, kind in kinds.items()):
        raise FileError(f"its children must be {', '.join(f'{n} ({k.__name__})' for n, k in kinds.items())}")
    found = (given["input_trace"].num_neurons, given["membrane"].num_neurons)
    if found != sizes or weight is None or tuple(weight.shape) != sizes[::-1]:
        raise FileError(f"in_features, out_features are {list(sizes)}; its weight and children have other sizes")
    module = cls.__new__(cls)
    with torch.device("meta"):
        Online.__init__(
            cast(Online, module),
            *sizes,
            given["input_trace"],
            given["membrane"],
            tensors.get("bias") is not None,
            arguments["rule"],
            isinstance(weight, nn.Parameter),
        )
    module.add_module("eligibility", given["eligibility"])
    return module


def _build_surrogate_spike(
    cls: type[nn.Module], arguments: dict[str, Any], tensors: Tensors, children: Children
) -> nn.Module:
    pairs = arguments.pop("parameters")
    if children or len(dict(pairs)) != len(pairs):
        raise FileError(f"parameters={pairs!r:.200}: each name must be there once, and there are no children")
    return cls(**arguments, **dict(pairs))


def _build_recurrent(
    cls: type[nn.Module], arguments: dict[str, Any], tensors: Tensors, children: Children
) -> nn.Module:
    given = dict(children)
    if list(given) != ["neuron", "connection"] or type(given["neuron"]) is not SpecNeuron:
        raise FileError(f"its children must be neuron, a SpecNeuron, and connection; not {list(given)!r:.100}")
    return Recurrent(given["neuron"], given["connection"], **arguments)


# ---- the table -------------------------------------------------------------------------------------------------------


def _attributes(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


def _leaky_arguments(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    arguments = _attributes(module, names)
    for name in [n for n in names if n.endswith("_fn")]:
        function = arguments[name]
        named = next((n for n, known in _FUNCTIONS.items() if known is function), function)
        arguments[name] = None if type(function) in _FUNCTION_MODULES else named
    return arguments


def _surrogate_arguments(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    spike = cast(surrogate_spike, module)
    named = {"name": spike.surrogate.name, "parameters": spike.surrogate.parameters}
    return {**_attributes(module, ["threshold", "strict"]), **named}


def _spec_arguments(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """The spec without the values of its parameters, which are the tensors."""
    choices = cast(NeuronSpec, module._choices)
    data = choices.to_dict()
    data["parameters"] = {
        name: {"raw": parameter.raw, "learnable": name in module._parameters}
        for name, parameter in choices.parameters.items()
    }
    return {"spec": data}


@dataclass(frozen=True)
class Row:
    """One class: its constructor arguments, how they are read from a module, and how it is built from them."""

    cls: type[nn.Module]
    fields: Mapping[str, Argument]
    build: Build = _build_torch
    read: Callable[[nn.Module, Sequence[str]], dict[str, Any]] = _attributes

    def arguments(self, module: nn.Module) -> dict[str, Any]:
        """JSON-ready arguments that give this module. Raises `FileError` where there are none."""
        return self.checked({name: _plain(value) for name, value in self.read(module, list(self.fields)).items()})

    def checked(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments from JSON, lists as tuples. Raises `FileError` on a missing, unknown or wrong one."""
        if set(data) != set(self.fields):
            missing, unknown = sorted(set(self.fields) - set(data)), sorted(set(data) - set(self.fields))
            raise FileError(f"arguments missing: {missing}; unknown: {unknown!r:.200}")
        arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        for name, value in arguments.items():
            if not self.fields[name].accepts(value):
                raise FileError(f"{name}={value!r:.200} must be {self.fields[name].words}")
        return arguments


def _plain(value: Any) -> Any:
    """Lists as tuples and numpy's scalars as Python's, as they would come from JSON."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def _torch_rows() -> dict[str, Row]:
    rows: dict[str, dict[str, Argument]] = {}
    modes = _one_of("zeros", "reflect", "replicate", "circular")
    same = _one_of("same", "valid")
    for n in (1, 2, 3):
        size, size_or_none, tuple_n = _each(INT, n), _or_none(_each(INT, n)), _tuple(INT, n)
        conv = {
            "in_channels": INT,
            "out_channels": INT,
            "kernel_size": tuple_n,
            "stride": tuple_n,
            "dilation": tuple_n,
            "groups": INT,
            "padding_mode": modes,
        }
        rows[f"Conv{n}d"] = {**conv, "padding": _either(same, tuple_n)}
        rows[f"ConvTranspose{n}d"] = {**conv, "padding": tuple_n, "output_padding": tuple_n}
        pool = {"kernel_size": size, "stride": size_or_none, "padding": size, "ceil_mode": BOOL}
        rows[f"MaxPool{n}d"] = {**pool, "dilation": size, "return_indices": BOOL}
        divisor = {"divisor_override": _or_none(INT)} if n > 1 else {}
        rows[f"AvgPool{n}d"] = {**pool, "count_include_pad": BOOL, **divisor}
        adaptive = _or_none(_each(_or_none(INT), n))
        rows[f"AdaptiveAvgPool{n}d"] = {"output_size": adaptive}
        rows[f"AdaptiveMaxPool{n}d"] = {"output_size": adaptive, "return_indices": BOOL}
        rows[f"LPPool{n}d"] = {"norm_type": FLOAT, "kernel_size": size, "stride": size_or_none, "ceil_mode": BOOL}
        rows[f"Dropout{n}d"] = {"p": FLOAT, "inplace": BOOL}
        norm = {"num_features": INT, "eps": FLOAT, "momentum": _or_none(FLOAT), "affine": BOOL}
        rows[f"BatchNorm{n}d"] = rows[f"InstanceNorm{n}d"] = {**norm, "track_running_stats": BOOL}
        rows[f"ZeroPad{n}d"] = {"padding": _tuple(INT, 2 * n)}
    inplace = {"inplace": BOOL}
    for name in ("ReLU", "ReLU6", "SELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid"):
        rows[name] = inplace
    for name in ("Identity", "Sigmoid", "Tanh", "Softsign", "LogSigmoid"):
        rows[name] = {}
    for name in ("Dropout", "AlphaDropout", "FeatureAlphaDropout"):
        rows[name] = {"p": FLOAT, **inplace}
    rows |= {
        "Linear": {"in_features": INT, "out_features": INT},
        "Flatten": {"start_dim": INT, "end_dim": INT},
        "Unflatten": {"dim": INT, "unflattened_size": SHAPE},
        "LeakyReLU": {"negative_slope": FLOAT, **inplace},
        "ELU": {"alpha": FLOAT, **inplace},
        "CELU": {"alpha": FLOAT, **inplace},
        "Hardtanh": {"min_val": FLOAT, "max_val": FLOAT, **inplace},
        "PReLU": {"num_parameters": INT, "init": FLOAT},
        "GELU": {"approximate": _one_of("none", "tanh")},
        "Softplus": {"beta": FLOAT, "threshold": FLOAT},
        "Softmax": {"dim": _or_none(INT)},
        "LogSoftmax": {"dim": _or_none(INT)},
        "LayerNorm": {"normalized_shape": SHAPE, "eps": FLOAT, "elementwise_affine": BOOL},
        "GroupNorm": {"num_groups": INT, "num_channels": INT, "eps": FLOAT, "affine": BOOL},
        "Upsample": {
            "size": _or_none(_either(INT, _tuple(INT, 1, 2, 3))),
            "scale_factor": _or_none(_either(FLOAT, _tuple(FLOAT, 1, 2, 3))),
            "mode": _one_of("nearest", "linear", "bilinear", "bicubic", "trilinear", "nearest-exact", "area"),
            "align_corners": _or_none(BOOL),
            "recompute_scale_factor": _or_none(BOOL),
        },
    }
    return {f"torch.nn.{name}": Row(getattr(nn, name), fields) for name, fields in rows.items()}


_NODES = Argument("a list of nodes", lambda value: type(value) is tuple)
_NAMES = Argument("a list of names", lambda value: type(value) is tuple and bool(value))
_VALUE = Argument("an object, a nested value", lambda value: value is not None)
_GRAPH = {"nodes": _NODES, "output": _VALUE, "inputs": _NAMES}
_LOOP = {
    "cuts": Argument(
        "a list of integers or null", lambda value: type(value) is tuple and all(map(_INDEX.accepts, value))
    ),
    "steps": _or_none(INT),
    "carry": BOOL,
    "fold": _one_of("fast", "exact"),
}
_LEAKY = {"num_neurons": _INDEX, "dim": INT}
_FIRING = {**_LEAKY, "spike_fn": _FUNCTION, "quant_fn": _FUNCTION}
_ONLINE = {"in_features": INT, "out_features": INT, "rule": _one_of("average", "ottt", "bptt")}
_PART = {"num_neurons": INT}
_PAIR = Argument("a name and a finite number", lambda p: len(p) == 2 and type(p[0]) is str and FLOAT.accepts(p[1]))
_PAIRS = Argument(
    f"a list of pairs, each {_PAIR.words}",
    lambda value: type(value) is tuple and all(type(p) in (tuple, list) and _PAIR.accepts(p) for p in value),
)
_SPIKING = {
    **_PART,
    "surrogate": _one_of(*SURROGATES),
    "surrogate_parameters": _PAIRS,
    "emits": _one_of("spikes", "distance"),
}
_SURROGATE_SPIKE = {"name": _one_of(*SURROGATES), "threshold": FLOAT, "strict": BOOL, "parameters": _PAIRS}
_SPEC = Argument("an object, a NeuronSpec without the values of its parameters", lambda value: type(value) is dict)

# The name in the file -> its row. Nothing else can be in a file.
CLASSES: Mapping[str, Row] = MappingProxyType(
    {
        "torch.nn.Sequential": Row(nn.Sequential, {}, _build_sequential),
        "tracetorch.Sequential": Row(Sequential, {}, _build_sequential),
        "tracetorch.Graph": Row(Graph, _GRAPH, graph_file.build_graph, graph_file.graph_arguments),
        "tracetorch.Loop": Row(Loop, _LOOP, graph_file.build_loop, graph_file.loop_arguments),
        "tracetorch.functional.round_ste": Row(round_ste, {"step_size": FLOAT}),
        "tracetorch.functional.stochastic_round_ste": Row(stochastic_round_ste, {"step_size": FLOAT}),
        "tracetorch.functional.probabilistic_ste": Row(probabilistic_ste, {}),
        "tracetorch.functional.surrogate_spike": Row(
            surrogate_spike, _SURROGATE_SPIKE, _build_surrogate_spike, _surrogate_arguments
        ),
        **{
            f"tracetorch.snn.{cls.__name__}": Row(
                cls, _FIRING if cls.parts.output.fires else _LEAKY, _build_leaky, _leaky_arguments
            )
            for cls in LAYERS
        },
        "tracetorch.snn.Recurrent": Row(Recurrent, {"from_start": BOOL}, _build_recurrent),
        "tracetorch.snn.SpecNeuron": Row(SpecNeuron, {"spec": _SPEC}, _build_spec_neuron, _spec_arguments),
        "tracetorch.nn.LIF": Row(LIF, _ONLINE, _build_online),
        "tracetorch.nn.LIS": Row(LIS, _ONLINE, _build_online),
        "tracetorch.nn.Sequential": Row(OnlineSequential, {}, _build_sequential),
        "tracetorch.nn.parts.InputTrace": Row(InputTrace, _PART, _build_leaky),
        "tracetorch.nn.parts.LeakyMembrane": Row(LeakyMembrane, _PART, _build_leaky),
        "tracetorch.nn.parts.SpikingMembrane": Row(SpikingMembrane, _SPIKING, _build_leaky),
        "tracetorch.nn.parts.Eligibility": Row(Eligibility, {}),
        **_torch_rows(),
    }
)
NAMES: Mapping[type[nn.Module], str] = MappingProxyType({row.cls: name for name, row in CLASSES.items()})

# What constructors raise on arguments that make no sense: by their code, and by fuzzing.
_BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SpecError,
    TypeError,
    ValueError,
)


def construct(record: ModuleRecord, tensors: Tensors, children: Children) -> nn.Module:
    """The module of a record, with exactly these tensors and children.

    Raises:
        FileError: arguments or tensors that its class does not take; names the class and what is wrong.
    """
    row = CLASSES[record.name]
    try:
        module = row.build(row.cls, row.checked(record.arguments), tensors, children)
        _assign(module, tensors)
    except FileError as error:
        raise FileError(f"{record.name}: {error}") from error.__cause__
    except _BUILD_ERRORS as error:
        raise FileError(f"{record.name} cannot be built from {record.arguments!r:.300}: {error!s:.300}") from error
    module.training = record.training
    return module


def _assign(module: nn.Module, tensors: Tensors) -> None:
    """Put the tensors in place of those that the constructor made; of these only a bias may be missing."""
    made = {**module._parameters, **module._buffers}
    names = [name for name in made if name not in module._non_persistent_buffers_set]
    if set(names) != set(tensors):
        missing, surplus = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
        raise FileError(f"tensors missing: {missing}; surplus: {surplus!r:.200}")
    for name in names:
        expected, tensor = made[name], tensors[name]
        if tensor is None and (expected is None or name == "bias"):
            setattr(module, name, None)
            continue
        if tensor is None or expected is None:
            raise FileError(f"the tensor {name!r} must {'not ' if expected is None else ''}be there")
        if tensor.shape != expected.shape:
            raise FileError(
                f"{name!r} has the shape {list(tensor.shape)}, and its arguments ask for {list(expected.shape)}"
            )
        if isinstance(tensor, nn.Parameter) != (name in module._parameters):
            raise FileError(f"{name!r} must be a {'parameter' if name in module._parameters else 'buffer'}")
        setattr(module, name, tensor)
