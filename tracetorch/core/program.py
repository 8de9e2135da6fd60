"""What a model does in one time step, as a list of calls: read from a `Sequential`, or traced from a `forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from tracetorch.core.layer import Layer
from tracetorch.core.states import named_layers
from tracetorch.functional.quantizers import probabilistic_ste, stochastic_round_ste

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_RANDOM_WORDS = ("rand", "dropout", "bernoulli", "normal", "poisson", "multinomial", "uniform", "exponential_")


class NotPlain(Exception):
    """Why a model is not a plain graph."""


class Ref(NamedTuple):
    """The value of an earlier call; number 0 is the input."""

    number: int


class Call(NamedTuple):
    """One call of a step: a module, a function, a method by its name, or `Kept`; arguments with `Ref`s inside."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Program:
    """The calls in their order, and what the model returns: nested `Ref`s; `None` stands for the value of the last."""

    calls: tuple[Call, ...]
    output: Any = None


class Kept(NamedTuple):
    """Instead of a function: the state that a layer keeps after the call that is its argument."""

    layer: Layer
    attribute: str


class Planned(nn.Module):
    """A model that says itself what it does in one step."""

    def program(self) -> Program:
        """Its calls. Raises `NotPlain` where they are more than what can be listed."""
        raise NotImplementedError


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks."""
    return any(getattr(module, name) for name in _HOOKS)


def program(model: nn.Module) -> Program:
    """The program of a model.

    Raises:
        NotPlain: the model is no plain graph; says why.
    """
    if isinstance(model, Planned):
        planned = model.program()
        _check_sharing(planned.calls)
        return planned
    chain = _chain(model) if _is_sequential(model) else None
    if chain is None:
        calls = _traced(model)
    else:
        calls = tuple(Call(module, (Ref(number),), {}) for number, module in enumerate(chain))
    if not calls:
        raise NotPlain("it is empty")
    _check_sharing(calls)
    return Program(calls)


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_leaf(module: nn.Module) -> bool:
    """A native layer, or a module without any inside."""
    return isinstance(module, Layer) or not any(True for _ in named_layers(module))


def _chain(model: nn.Module) -> list[nn.Module] | None:
    """The modules that a `Sequential` calls one after the other, or None where one of them must be traced."""
    if hooked(model):
        raise NotPlain(f"a {type(model).__name__} has hooks")
    found: list[nn.Module] = []
    for child in model._modules.values():  # `children` names a module that is used twice once
        assert child is not None
        if _is_sequential(child):
            inner = _chain(child)
            if inner is None:
                return None
            found += inner
        elif _is_leaf(child):
            found.append(child)
        else:
            return None
    return found


def may_be_random(target: nn.Module | Callable[..., Any] | str, listed: Callable[[nn.Module], bool]) -> bool:
    """Whether a call may draw random numbers, whose order among several calls the step loop decides."""
    if isinstance(target, nn.Module):
        if isinstance(target, _DROPOUT):
            return target.training
        if isinstance(target, Layer):
            return any(isinstance(m, (stochastic_round_ste, probabilistic_ste, *_DROPOUT)) for m in target.modules())
        return not listed(target)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return any(word in name for word in _RANDOM_WORDS)


def _check_sharing(calls: tuple[Call, ...]) -> None:
    seen: set[int] = set()
    for target, _, _ in calls:
        if not isinstance(target, nn.Module):
            continue
        if getattr(target, "inplace", False):
            raise NotPlain(f"{type(target).__name__}(inplace=True) may change what another layer keeps")
        stateless = not isinstance(target, Layer) and not any(True for _ in target.buffers())
        if id(target) in seen and not stateless:
            raise NotPlain(f"a {type(target).__name__} is used twice in a step")
        seen.add(id(target))


# ---- tracing a forward -----------------------------------------------------------------------------------------------


class _Poison:
    """In the place of a layer's state during tracing: a forward that reads it is no plain graph."""


class _Tracer(fx.Tracer):
    """Records the calls of a `forward`. Leaves are native layers, and modules without native layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not _is_sequential(m) and _is_leaf(m):
            return True
        if hooked(m):
            raise NotPlain(f"a {type(m).__name__} has hooks")
        return False

    def path_of_module(self, mod: nn.Module) -> str:
        return self._named(mod)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers as they are; where a call takes one, `create_arg` names it."""
        return attr_val

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _Poison):
            raise NotPlain("its forward reads a layer's state")
        if isinstance(a, Tensor):
            return self.create_node("get_attr", self._named(a), (), {})
        return super().create_arg(a)

    def _named(self, thing: Any) -> str:
        name = f"thing_{id(thing)}"
        self.values[name] = thing
        return name


@contextmanager
def _poisoned(model: nn.Module) -> Iterator[None]:
    layers = [layer for _, layer in named_layers(model) if isinstance(layer, Layer)]
    kept = [{name: layer._buffers[name] for name in layer.state_names} for layer in layers]
    try:
        for layer in layers:
            layer._buffers.update(dict.fromkeys(layer.state_names, _Poison()))  # type: ignore[arg-type]
        yield
    finally:
        for layer, states in zip(layers, kept, strict=True):
            layer._buffers.update(states)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, containers copied, to see what a forward changes."""
    found = {}
    for name, value in vars(module).items():
        found[name] = type(value)(value) if type(value) in (list, dict, set) else value
    return found


def _unchanged(module: nn.Module, before: dict[str, Any]) -> bool:
    after = _attributes(module)
    if after.keys() != before.keys():
        return False
    for name, value in before.items():
        if isinstance(value, dict):
            same = value.keys() == after[name].keys() and all(value[k] is after[name][k] for k in value)
        elif isinstance(value, (list, set)):
            same = len(value) == len(after[name]) and all(a is b for a, b in zip(value, after[name], strict=True))
        else:
            same = value is after[name]
        if not same:
            return False
    return True


def _traced(model: nn.Module) -> tuple[Call, ...]:
    if hooked(model):
        raise NotPlain(f"a {type(model).__name__} has hooks")
    tracer = _Tracer()
    modules = [m for m in model.modules() if not isinstance(m, Layer)]
    before = [_attributes(m) for m in modules]
    try:
        with _poisoned(model):
            graph = tracer.trace(model)
    except NotPlain:
        raise
    except Exception as error:  # a forward may do anything with what it is given
        raise NotPlain(f"its forward cannot be traced ({type(error).__name__}: {error!s:.200})") from error
    finally:
        changed = [m for m, attributes in zip(modules, before, strict=True) if not _unchanged(m, attributes)]
        for module, attributes in zip(modules, before, strict=True):
            if module in changed:
                vars(module).clear()
                vars(module).update(attributes)
    if changed:
        raise NotPlain(f"the forward of {type(changed[0]).__name__} sets attributes")
    return tuple(_calls(graph, tracer.values))


def _calls(graph: fx.Graph, values: Mapping[str, Any]) -> Iterator[Call]:
    refs: dict[fx.Node, Any] = {}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise NotPlain(f"its forward takes {len(inputs)} inputs")
    refs[inputs[0]] = Ref(0)
    number, result = 0, None
    for node in graph.nodes:
        if node.op == "get_attr":
            refs[node] = values[node.target]
        elif node.op == "output":
            result = node.args[0]
        elif node.op != "placeholder":
            if node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
                raise NotPlain(f"its forward calls {node.target}, which works in place")
            args = fx.node.map_arg(node.args, refs.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, refs.__getitem__)
            target = values[node.target] if node.op == "call_module" else node.target
            yield Call(target, tuple(args), dict(kwargs))
            number += 1
            refs[node] = Ref(number)
    if not isinstance(result, fx.Node) or refs[result] != Ref(number) or number == 0:
        raise NotPlain("its forward does not return the tensor of its last call")
