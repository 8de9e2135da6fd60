"""A layer's step made into a function of tensors: `x`, the states, and the values that stay the same for all steps.

What a step computes from parameters alone (a decay from its time constant, a clamped beta) is recorded once and then
computed by torch itself, once per sequence, at the parameters' own shapes: the same bits as in the step, and gradients
through torch. What meets `x` or a state is a value of the kernel.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from tracetorch.fused.graph import GraphError
from tracetorch.fused.reads import Reads, duplicate, read

_CPU = torch.device("cpu")
# Calls by which Python learns a tensor's value.
_VALUES = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__", "__index__"}
)
# step(layer, x, states by name) -> output, *new states
LayerStep = Callable[[Any, Tensor, Mapping[str, Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class _Slot:
    """The place of a value in the arguments of a recorded call."""

    name: str


@dataclass(frozen=True)
class _Call:
    name: str
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    needs: tuple[str, ...]
    flat: bool  # no argument is a container

    def __call__(self, known: Mapping[str, Tensor]) -> Any:
        if self.flat:
            return self.function(*[known[a.name] if type(a) is _Slot else a for a in self.args])
        args, kwargs = tree_map_only(_Slot, lambda slot: known[slot.name], (self.args, self.kwargs))
        return self.function(*args, **kwargs)


@dataclass
class Prelude:
    """What the step computes from parameters alone: calls of torch, in order, each giving one value by name."""

    paths: Mapping[str, str]
    calls: list[_Call] = field(default_factory=list)

    def values(self, tensors: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """The wanted values, computed from the present tensors (by path), differentiable."""
        known = {name: tensors[path] for name, path in self.paths.items()}
        needed = set(wanted)
        for call in reversed(self.calls):
            if call.name in needed:
                needed.update(call.needs)
        for call in self.calls:
            if call.name in needed:
                known[call.name] = call(known)
        return [known[name] for name in wanted]

    @property
    def names(self) -> list[str]:
        """Of all values: the parameters themselves, then the results of the calls."""
        return [*self.paths, *(call.name for call in self.calls)]


class _Hoist(TorchFunctionMode):
    """Sees every call of torch in a step, above autograd; takes those on parameters alone out of it.

    With `record`, new calls are added to the prelude; without, they must be those recorded before, in the same order.
    """

    def __init__(
        self, prelude: Prelude, real: dict[str, Tensor], given: Mapping[str, Tensor], example: Tensor, record: bool
    ) -> None:
        super().__init__()
        self.prelude, self.real, self.given, self.example, self.record = prelude, real, given, example, record
        self.names = {id(given[name]): name for name in prelude.paths}
        self.constant: dict[int, Tensor] = {}
        self.alive: list[Tensor] = []
        self.position = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        fixed = [tensor for tensor in tensors if id(tensor) in self.names]
        # Inside an autograd Function there is no graph: what it computes stays part of the step.
        if fixed and torch.is_grad_enabled() and all(self._known(tensor) for tensor in tensors):
            return self._fixed(func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and all(id(tensor) in self.constant for tensor in tensors):
            self.constant[id(result)] = result
        return result

    def _known(self, tensor: Tensor) -> bool:
        return id(tensor) in self.names or id(tensor) in self.constant

    def _fixed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call on parameters alone."""
        name = getattr(func, "__name__", str(func))
        if (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__") or "out" in kwargs:
            raise GraphError(f"{name}: the step writes into a parameter")
        real_args, real_kwargs = self._map((args, kwargs), lambda tensor: self.real[self.names[id(tensor)]])
        result = func(*real_args, **real_kwargs)
        if not isinstance(result, Tensor):
            if name in _VALUES or (isinstance(result, (tuple, list)) and _tensors(result)):
                raise GraphError(f"{name}: the step reads the value of a parameter; use torch.where")
            return result
        for tensor in _tensors((args, kwargs)):
            if id(tensor) in self.names and self.real[self.names[id(tensor)]] is result:
                return tensor
        if not result.is_floating_point():
            return func(*args, **kwargs)
        return self._value(func, args, kwargs, result)

    def _value(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> Tensor:
        if self.record:
            needs = tuple(self.names[id(tensor)] for tensor in _tensors((args, kwargs)) if id(tensor) in self.names)
            given, named = self._map((args, kwargs), lambda tensor: _Slot(self.names[id(tensor)]))
            name = f"h{len(self.prelude.calls)}"
            flat = not named and not any(isinstance(a, (list, tuple, dict)) for a in given)
            self.prelude.calls.append(_Call(name, func, given, named, needs, flat))
            self.real[name] = result
            kind = _kind(result, self.example.dtype)
            value = torch.full_like(self.example, 0.5, dtype=kind, requires_grad=True)
        else:
            if self.position >= len(self.prelude.calls) or self.prelude.calls[self.position].function != func:
                raise GraphError(f"{getattr(func, '__name__', func)}: the step computes something else at each call")
            name = self.prelude.calls[self.position].name
            value = self.given[name]
        self.position += 1
        self.names[id(value)] = name
        self.alive.append(value)
        return value

    def _map(self, arguments: Any, change: Callable[[Tensor], Any]) -> Any:
        return tree_map_only(Tensor, lambda t: change(t) if id(t) in self.names else t, arguments)


def _kind(value: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a value stands in the step: one of no dimension never makes a float32 result a float64 one."""
    if value is None:
        return dtype
    return dtype if value.dtype is dtype and value.ndim > 0 else torch.float32


def _tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    return [t for a in arguments for t in _tensors(a)] if isinstance(arguments, (list, tuple)) else []


def _chance(device: torch.device) -> tuple[Any, ...]:
    """The state of the random generators a step could draw from."""
    numpy_state: Any = np.random.get_state()
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    drawn = tuple(state.numpy().tobytes() for state in states)
    return (*drawn, random.getstate(), numpy_state[1].tobytes(), numpy_state[2])


@dataclass(frozen=True)
class LayerTrace:
    """A layer ready to be traced: `step` takes `x`, the states and the values of `prelude` by name."""

    layer: nn.Module
    body: LayerStep
    states: tuple[str, ...]
    skip: tuple[str, ...]
    reads: Reads
    prelude: Prelude
    real: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device

    def kind(self, name: str) -> torch.dtype:
        """The dtype in which an input of the step stands in its graph."""
        return _kind(self.real.get(name), self.dtype)

    def step(self, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Run the layer's own step on given tensors, on a copy of the layer."""
        return _run(self, given, dict(self.real), record=False)


def _run(trace: LayerTrace, given: Mapping[str, Tensor], real: dict[str, Tensor], record: bool) -> Sequence[Tensor]:
    names = {path: name for name, path in trace.prelude.paths.items()}
    by_id = {id(tensor): names[path] for path, tensor in trace.reads.tensors.items()}
    twin = duplicate(trace.layer, trace.skip, lambda tensor: given[by_id[id(tensor)]], trace.reads)
    before = read(twin, trace.skip).guard if record else ()
    with torch.enable_grad(), _Hoist(trace.prelude, real, given, given["x"], record):
        results = trace.body(twin, given["x"], {name: given[name] for name in trace.states})
    if record and read(twin, trace.skip).guard != before:
        raise GraphError("the step changes an attribute of its layer that is no state")
    return results


def prepare(
    layer: nn.Module,
    body: LayerStep,
    states: Sequence[str],
    skip: Sequence[str],
    dtype: torch.dtype,
    shape: Any = (2, 4),
    device: torch.device = _CPU,
) -> LayerTrace:
    """Run a layer's step once on a small example, and record what it computes from parameters alone.

    Args:
        layer: whose step it is; unchanged by this.
        body: calls the step on a copy of the layer.
        states: the names by which `body` takes the states and returns the new ones.
        skip: attributes that a call changes.
        dtype, shape, device: of the example; the device is that of the layer's tensors.

    Raises:
        GraphError: the step draws random numbers, changes its layer, or reads the value of a parameter.
    """
    reads = read(layer, skip)
    if reads.odd:
        raise GraphError(f"{reads.odd}; only ordinary dense tensors can be traced")
    prelude = Prelude({f"p{k}": path for k, path in enumerate(reads.tensors)})
    real = {name: reads.tensors[path] for name, path in prelude.paths.items()}
    trace = LayerTrace(layer, body, tuple(states), tuple(skip), reads, prelude, real, dtype, device)
    names = ("x", *states, *prelude.paths)
    given = {name: torch.full(shape, 0.5, dtype=dtype, device=device, requires_grad=True) for name in names}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        before = _chance(device)
        _run(trace, given, real, record=True)
        drew = _chance(device) != before
    if drew:
        raise GraphError("the step draws random numbers")
    return trace
