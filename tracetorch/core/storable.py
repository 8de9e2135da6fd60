"""What a network file may hold: the table of classes, with the arguments that rebuild each.

One row a class (`rows.py`, those of torch's own in `torch_rows.py`); `construct` builds a module from a row for `load`,
and for `save` to see that nothing is missing. This is the one place where core looks into `tracetorch.snn`;
`tracetorch.core` itself must not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from tracetorch.core import graph_file
from tracetorch.core.graph import Graph, Loop
from tracetorch.core.model import Sequential
from tracetorch.core.rows import BOOL, FLOAT, INT, Argument, Children, Row, Tensors, attributes, one_of, or_none
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.core.topology import FileError, ModuleRecord, check_fields
from tracetorch.core.torch_rows import torch_rows
from tracetorch.functional.quantizers import probabilistic_ste, round_ste, stochastic_round_ste
from tracetorch.functional.spikes import sigmoid4x, surrogate_spike
from tracetorch.functional.surrogates import SURROGATES
from tracetorch.nn import LIF, LIS, Online
from tracetorch.nn import Sequential as OnlineSequential
from tracetorch.nn.parts import Eligibility, InputTrace, LeakyMembrane, SpikingMembrane
from tracetorch.snn.leaky import LAYERS
from tracetorch.snn.recurrent import Recurrent
from tracetorch.snn.spec_neuron import SpecNeuron

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"tracetorch.functional.sigmoid4x": sigmoid4x})
# As modules they are children.
_FUNCTION_MODULES = (nn.Identity, round_ste, stochastic_round_ste, probabilistic_ste, surrogate_spike)
_FUNCTION = Argument(
    "tracetorch.functional.sigmoid4x, torch.nn.Identity(), or of tracetorch.functional round_ste(step_size), "
    "stochastic_round_ste(step_size), probabilistic_ste() or surrogate_spike(name)",
    lambda value: value is None or (type(value) is str and value in _FUNCTIONS),
)


# ---- building --------------------------------------------------------------------------------------------------------


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


def _leaky_arguments(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    arguments = attributes(module, names)
    for name in [n for n in names if n.endswith("_fn")]:
        function = arguments[name]
        named = next((n for n, known in _FUNCTIONS.items() if known is function), function)
        arguments[name] = None if type(function) in _FUNCTION_MODULES else named
    return arguments


def _surrogate_arguments(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    spike = cast(surrogate_spike, module)
    named = {"name": spike.surrogate.name, "parameters": spike.surrogate.parameters}
    return {**attributes(module, ["threshold", "strict"]), **named}


def _spec_arguments(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """The spec without the values of its parameters, which are the tensors."""
    choices = cast(NeuronSpec, module._choices)
    data = choices.to_dict()
    data["parameters"] = {
        name: {"raw": parameter.raw, "learnable": name in module._parameters}
        for name, parameter in choices.parameters.items()
    }
    return {"spec": data}


_INDEX = or_none(INT)
_NODES = Argument("a list of nodes", lambda value: type(value) is tuple)
_NAMES = Argument("a list of names", lambda value: type(value) is tuple and bool(value))
_VALUE = Argument("an object, a nested value", lambda value: value is not None)
_GRAPH = {"nodes": _NODES, "output": _VALUE, "inputs": _NAMES}
_LOOP = {
    "cuts": Argument(
        "a list of integers or null", lambda value: type(value) is tuple and all(map(_INDEX.accepts, value))
    ),
    "steps": or_none(INT),
    "carry": BOOL,
    "fold": one_of("fast", "exact"),
}
_LEAKY = {"num_neurons": _INDEX, "dim": INT}
_FIRING = {**_LEAKY, "spike_fn": _FUNCTION, "quant_fn": _FUNCTION}
_ONLINE = {"in_features": INT, "out_features": INT, "rule": one_of("average", "ottt", "bptt")}
_PART = {"num_neurons": INT}
_PAIR = Argument("a name and a finite number", lambda p: len(p) == 2 and type(p[0]) is str and FLOAT.accepts(p[1]))
_PAIRS = Argument(
    f"a list of pairs, each {_PAIR.words}",
    lambda value: type(value) is tuple and all(type(p) in (tuple, list) and _PAIR.accepts(p) for p in value),
)
_SPIKING = {
    **_PART,
    "surrogate": one_of(*SURROGATES),
    "surrogate_parameters": _PAIRS,
    "emits": one_of("spikes", "distance"),
}
_SURROGATE_SPIKE = {"name": one_of(*SURROGATES), "threshold": FLOAT, "strict": BOOL, "parameters": _PAIRS}
_SPEC = Argument("an object, a NeuronSpec without the values of its parameters", lambda value: type(value) is dict)

# The name in the file -> its row. Nothing else can be in a file.
CLASSES: Mapping[str, Row] = MappingProxyType(
    {
        "torch.nn.Sequential": Row(nn.Sequential, {}, _build_sequential),
        "tracetorch.Sequential": Row(Sequential, {}, _build_sequential),
        "tracetorch.Graph": Row(Graph, _GRAPH, graph_file.build_graph, graph_file.graph_arguments),
        "tracetorch.Loop": Row(Loop, _LOOP, graph_file.build_loop),
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
        **torch_rows(),
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
