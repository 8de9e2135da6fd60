"""Recording what a network does with a sample: its module calls and torch function calls, in order, on real values.

Nothing of the network is changed, and nothing is guessed from its code: the source's own forward runs, under hooks on
its leaf modules and a `TorchFunctionMode`. What the forward does with Python numbers is not seen, only their effect on
the calls; what it does with a tensor's value (`if mem.max() > 1`) is seen, and reported.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from tracetorch.adapters.base import ConversionError
from tracetorch.core.graph import leaves as leaves_in
from tracetorch.core.graph import rewrite


class NoGraph(ConversionError):
    """What a forward does is no list of calls that every step repeats; it may still be run as it stands (`stepping`).

    Attributes:
        why: the reason alone.
    """

    def __init__(self, layer: str, field: str, value: object, why: str, remedy: str) -> None:
        super().__init__(layer, field, value, why, remedy)
        self.why = why


@dataclass(frozen=True)
class In:
    """An argument of the network's call, by number."""

    index: int


@dataclass(frozen=True)
class Out:
    """A result of an event; `path` leads to it where the result is a structure."""

    event: int
    path: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of the network, by name."""

    name: str


class Unknown:
    """A tensor of unknown origin: an attribute that is neither a parameter nor a buffer, or a global."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unknown) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)

    def __repr__(self) -> str:
        return f"a tensor of shape {list(self.tensor.shape)} that is no parameter or buffer"


REFS = (In, Out, Held, Unknown)


@dataclass(frozen=True)
class Event:
    """One call. `kind` is "module", "function" or "method"; args and kwargs with references for tensors."""

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: tuple[Any, ...]  # the arguments themselves
    result: Any
    where: str

    @property
    def name(self) -> str:
        """Of what is called."""
        if self.kind == "module":
            return type(self.target).__name__
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", repr(self.target))


@dataclass
class Tape:
    """The events of one call of a network, its result with references, and what cannot be put into a graph."""

    events: list[Event] = field(default_factory=list)
    output: Any = None
    value_reads: list[str] = field(default_factory=list)
    in_place: list[str] = field(default_factory=list)
    grad_modes: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)


_VALUE_READS = {
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__complex__",
    "item",
    "tolist",
    "numpy",
    "equal",
    "allclose",
}
_RENAMED = {"__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv}
_RENAMED |= {"__rpow__": operator.pow, "__rmatmul__": operator.matmul, "__rfloordiv__": operator.floordiv}
_RANDOM_WORDS = ("rand", "bernoulli", "normal", "poisson", "multinomial", "uniform", "exponential_")
_INERT = {"requires_grad_", "retain_grad", "register_hook", "__repr__", "__format__", "__len__", "__hash__", "__iter__"}


class _Recorder(TorchFunctionMode):
    def __init__(self, net: nn.Module, leaves: Sequence[nn.Module], args: Sequence[Any]) -> None:
        super().__init__()
        self.net, self.leaves, self.tape = net, leaves, Tape()
        self.depth = 0
        self.refs: dict[int, Any] = {}
        self.alive: list[Any] = []
        # The known tensors in each memory, by their ids; and those that a leaf module may write into: its own.
        self.memory: dict[int, set[int]] = {}
        self.inside = {id(t) for leaf in leaves for t in (*leaf.parameters(), *leaf.buffers())}
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            self._know(tensor, Held(name))
        for index, value in enumerate(args):
            self._know(value, In(index))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        # An argument is looked up before the call: one that works in place gives the same tensor another meaning.
        given, before = self._refer((tuple(args), dict(kwargs))), _versions((args, kwargs))
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        written = _written(before)
        if not written and not (name.endswith("_") and not name.endswith("__")) and name not in _INERT:
            result = _fresh(result, args)
        if any(map(self._elsewhere, written)):
            self.tape.in_place.append(f"{name} at {_where()}")
        self._note(func, given, (tuple(args), dict(kwargs)), result)
        return result

    def _know(self, value: Any, ref: Any) -> None:
        """Remember the tensors of a result by where they came from."""
        if isinstance(value, Tensor):
            self._remember(value, ref)
        elif isinstance(value, (tuple, list)) and isinstance(ref, Out):
            for k, item in enumerate(value):
                self._know(item, Out(ref.event, (*ref.path, k)))
        elif isinstance(value, dict) and isinstance(ref, Out):
            for key, item in value.items():
                self._know(item, Out(ref.event, (*ref.path, key)))

    def _remember(self, tensor: Tensor, ref: Any) -> None:
        self.refs[id(tensor)] = ref
        self.alive.append(tensor)
        if tensor.layout is torch.strided:
            self.memory.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))

    def _elsewhere(self, tensor: Tensor) -> bool:
        """Whether what is written into a tensor is seen in another one too, in the input, or after the call."""
        ref = self.refs.get(id(tensor))
        if isinstance(ref, In) or (isinstance(ref, Held) and id(tensor) not in self.inside):
            return True
        strided = tensor.layout is torch.strided
        return strided and bool(self.memory.get(tensor.untyped_storage().data_ptr(), set()) - {id(tensor)})

    def _refer(self, value: Any) -> Any:
        def change(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in self.refs:
                self._remember(leaf, Unknown(leaf))
            return self.refs[id(leaf)]

        return rewrite(value, change)

    def _note(self, func: Any, given: Any, values: Any, result: Any) -> None:
        name = getattr(func, "__name__", "")
        args, kwargs = given
        if name == "_set_grad_enabled":
            self.tape.grad_modes.append(_where())
            return
        if name == "__setitem__" or (kwargs.get("out") is not None):
            self.tape.in_place.append(f"{name} at {_where()}")
            return
        if not _has_tensor(result):
            if name in _VALUE_READS:
                self.tape.value_reads.append(f"{name} at {_where()}")
            return
        if name in _INERT:
            return
        if _random(name, values):
            self.tape.random.append(f"{name} at {_where()}")
        kind, target = "function", func
        path = resolve_name(func) or ""
        if path.startswith("torch.Tensor."):
            kind, target = "method", name
            if name in _RENAMED:
                kind, target, args = "function", _RENAMED[name], (args[1], args[0])
            elif name == "__getitem__":
                kind, target = "function", operator.getitem
            elif name == "__get__":
                kind, target, args = "function", getattr, (args[0], path.split(".")[-2])
            elif name.endswith("_") and not name.endswith("__"):
                target = name[:-1]
                if not hasattr(Tensor, target):
                    self.tape.in_place.append(f"{name} at {_where()}")
                    return
        self.add(kind, target, (args, kwargs), values, result)

    def add(self, kind: str, target: Any, given: Any, values: Any, result: Any) -> None:
        """One more event."""
        args, kwargs = given
        self.tape.events.append(Event(kind, target, args, kwargs, values[0], result, _where()))
        self._know(result, Out(len(self.tape.events) - 1))

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a leaf module's call: what happens inside is its own."""
        if not self.depth:
            self.depth += 1  # nothing of this is an event
            self.given, self.before = self._refer((tuple(args), dict(kwargs))), _versions((args, kwargs))
            self.depth -= 1
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        """After it."""
        self.depth -= 1
        if not self.depth:
            self.depth += 1  # what these call is no event
            written = _written(self.before)
            result = result if written else _fresh(result, args)
            if any(map(self._elsewhere, written)):
                self.tape.in_place.append(f"{type(module).__name__} at {_where()}")
            self.depth -= 1
            self.add("module", module, self.given, (tuple(args), dict(kwargs)), result)
        return result


def _random(name: str, values: Any) -> bool:
    """Whether a call draws random numbers."""
    args, kwargs = values
    if "dropout" in name:
        rest = dict(zip(("p", "training"), args[1:], strict=False)) | kwargs
        return bool(rest.get("training", True)) and rest.get("p", 0.5) != 0
    return "normalize" not in name and any(word in name for word in _RANDOM_WORDS)


def _versions(values: Any) -> list[tuple[Tensor, int]]:
    """The tensors among arguments, and how often each has been written to."""
    found = [leaf for leaf in leaves_in(values) if isinstance(leaf, Tensor) and not leaf.is_inference()]
    return [(tensor, tensor._version) for tensor in found]


def _written(before: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Those that a call wrote into."""
    return [tensor for tensor, version in before if tensor._version != version]


def _fresh(result: Any, args: Sequence[Any]) -> Any:
    """A result that is an argument (`x.flatten(1)` of a flat x, an `nn.Identity`) as a tensor of its own."""
    if isinstance(result, Tensor) and any(result is value for value in args):
        return result.view_as(result)
    return result


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)


def _where() -> str:
    """The line of the network's own code that made a call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] != "torch" and not module.startswith("tracetorch."):
            return f"line {frame.f_lineno} of {frame.f_code.co_name}"
        frame = frame.f_back
    return "an unknown place"


def leaves_of(net: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The leaf modules of a network, outermost first, each once."""
    found: dict[int, nn.Module] = {}

    def walk(module: nn.Module) -> None:
        if is_leaf(module):
            found[id(module)] = module
            return
        for child in module._modules.values():
            if child is not None:
                walk(child)

    walk(net)
    return list(found.values())


def record(net: nn.Module, args: Sequence[Any], leaves: Sequence[nn.Module]) -> Tape:
    """Run `net(*args)` and record it.

    Args:
        net: left as it was, apart from the hidden states that its call changes.
        args: the arguments of the call.
        leaves: modules whose call is one event.
    """
    recorder = _Recorder(net, leaves, args)
    handles = []
    for module in leaves:
        handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(recorder.leave, with_kwargs=True))
    try:
        with recorder:
            result = net(*args)
        recorder.tape.output = recorder._refer(result)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.tape


def same_call(a: Event, b: Event) -> bool:
    """Whether two events call the same thing."""
    if a.kind != b.kind:
        return False
    return a.target is b.target if a.kind == "module" else bool(a.target == b.target)
