"""Any layer's sequence through one kernel: its step is traced as it is, its attributes are looked up at every call.

`Sequencer` belongs to one layer and keeps the kernels built for it. It is no part of the layer's state: copied or
pickled it is empty.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.core import saved_hooks
from tracetorch.fused import compiler, executor, kernel_c, kernel_triton
from tracetorch.fused.build import compiled
from tracetorch.fused.callers import memory_is_all
from tracetorch.fused.executor import FuseWarning
from tracetorch.fused.graph import Graph, GraphError, Ref, narrowed, used
from tracetorch.fused.hoist import LayerStep, LayerTrace, Prelude, prepare
from tracetorch.fused.kernel import Kernel
from tracetorch.fused.precision import refuse_rounding
from tracetorch.fused.reads import Reads, read
from tracetorch.fused.scan import scan
from tracetorch.fused.signature import Signature
from tracetorch.fused.trace import Traced, trace
from tracetorch.fused.untraceable import of_the_step

_PLANS = 64  # configurations of one layer whose kernels are kept
_DTYPES = (torch.float32, torch.float64)


class Unfused(RuntimeError):
    """Why a sequence does not run through a kernel: the caller runs the layer's own code instead."""


@dataclass
class _Plan:
    """One state of a layer's configuration: what is computed before the kernel, and the kernels themselves."""

    prelude: Prelude | None = None
    used: tuple[str, ...] = ()  # the values that any kernel may take
    refused: str = ""
    kernels: dict[Any, tuple[Kernel, tuple[str, ...]] | str] = field(default_factory=dict)
    live: dict[Any, frozenset[str]] = field(default_factory=dict)  # results by what requires a gradient


@dataclass(frozen=True)
class Result:
    """Outputs, the states after the last step, and, where asked for, the states after every step, all by name."""

    outputs: Tensor
    last: Mapping[str, Tensor]
    recorded: Mapping[str, Tensor]


class Sequencer:
    """The kernels of one layer.

    Args:
        states: the states' names.
        body: calls the layer's own step: `body(layer, x, states by name) -> output, *new states`.
        skip: the layer's attributes that a call changes, states included.
    """

    def __init__(self, states: Sequence[str], body: LayerStep, skip: Sequence[str]) -> None:
        self.states, self.body, self.skip = tuple(states), body, tuple(skip)
        self.plans: dict[Any, _Plan] = {}
        self.latest: tuple[Any, Reads, _Plan] | None = None

    def run(
        self,
        layer: nn.Module,
        xs: Tensor,
        time_dim: int,
        first: Mapping[str, Tensor],
        record: Sequence[str] = (),
    ) -> Result:
        """All steps of a sequence.

        Args:
            layer: the layer; it is not changed, the caller keeps the new states.
            xs: [T, B, ...] or, with `time_dim=1`, [B, T, ...].
            first: states before the first step, [B, ...] or of no dimension.
            record: states wanted after every step, in the shape of `xs`, differentiable where gradients are on.

        Raises:
            Unfused: this layer or input runs through its own code; says why.
        """
        element = check_input(xs, time_dim)
        backend = _backend(xs)
        states = [_state(name, first[name], element, xs) for name in self.states]
        reads, plan = self._plan(layer, (xs.dtype, xs.device, backend))
        if plan.prelude is None and not plan.refused:
            self._prepare(plan, layer, xs)
        if plan.refused:
            raise Unfused(plan.refused)
        outputs, last, recorded = self._scan(plan, layer, reads.tensors, xs, time_dim, states, bool(record), backend)
        series = {name: recorded[self.states.index(name)] for name in record}
        return Result(outputs, dict(zip(self.states, last, strict=True)), series)

    def _plan(self, layer: nn.Module, kind: Any) -> tuple[Reads, _Plan]:
        """What the layer reads now, and the plan for it with an input of this kind."""
        if self.latest is not None and self.latest[0] == kind and self.latest[1].unchanged():
            return self.latest[1], self.latest[2]
        reads = read(layer, self.skip)
        plan = self.plans.setdefault((kind, reads.guard), _Plan())
        if len(self.plans) > _PLANS:  # a value that changes at every call, annealed for instance
            del self.plans[next(iter(self.plans))]
        self.latest = (kind, reads, plan)
        return reads, plan

    def _prepare(self, plan: _Plan, layer: nn.Module, xs: Tensor) -> None:
        try:
            with _apart():
                ready = prepare(layer, self.body, self.states, self.skip, xs.dtype, device=xs.device)
                plan.used = traced_step(ready, (), True)[1]
            plan.prelude = ready.prelude
        except Exception as error:  # whatever a framework's code raises: its own forward will say it better
            if not of_the_step(error):
                raise
            plan.refused = _said(layer, error)

    def _scan(
        self,
        plan: _Plan,
        layer: nn.Module,
        tensors: Mapping[str, Tensor],
        xs: Tensor,
        time_dim: int,
        states: list[Tensor],
        record: bool,
        backend: str,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One kernel call."""
        assert plan.prelude is not None
        known = dict(zip(plan.used, plan.prelude.values(tensors, plan.used), strict=True))
        grads = torch.is_grad_enabled()
        learned = tuple(name for name, value in known.items() if grads and value.requires_grad)
        backward = grads and (bool(learned) or xs.requires_grad or any(state.requires_grad for state in states))
        key = (learned, backward)
        if key not in plan.kernels:
            plan.kernels[key] = self._build(layer, xs, learned, backward, backend)
        found = plan.kernels[key]
        if isinstance(found, str):
            raise Unfused(found)
        kernel, names = found
        for name in names:
            if known[name].device != xs.device and _divides(kernel.traced.forward, name):
                raise Unfused("a tensor on the CPU divides one on the GPU, where torch multiplies by its reciprocal")
        values = [_value(known[name], states[0].shape, xs) for name in names]
        try:
            (outputs,), last, recorded = scan(kernel, [xs], time_dim, states, values, record)
        except compiler.CompilerError as error:  # of Triton, which compiles at the first call
            plan.kernels[key] = _said(layer, error)
            raise Unfused(str(error)) from error
        if kernel.traced.vjp is None:
            return outputs, tuple(last), tuple(recorded)
        if "d_output" not in used(kernel.traced.vjp):
            outputs = outputs.detach()  # spikes without a surrogate gradient, as the step itself returns them
        # What no tensor that requires a gradient reaches requires none, though the other results do.
        given = {"x": xs, **dict(zip(self.states, states, strict=True))}
        sources = frozenset((*learned, *(name for name, tensor in given.items() if tensor.requires_grad)))
        if sources not in plan.live:
            plan.live[sources] = reached(kernel.traced.forward, sources)
        live = plan.live[sources]
        outputs = outputs if "output" in live else outputs.detach()
        last, recorded = (
            tuple(s if name in live else s.detach() for name, s in zip(self.states, series, strict=bool(series)))
            for series in (last, recorded)
        )
        return outputs, last, recorded

    def _build(
        self, layer: nn.Module, xs: Tensor, learned: Sequence[str], backward: bool, backend: str
    ) -> tuple[Kernel, tuple[str, ...]] | str:
        try:
            with _apart():
                ready = prepare(layer, self.body, self.states, self.skip, xs.dtype, device=xs.device)
                traced, names = traced_step(ready, learned, backward)
            kept = tuple(name for name in names if name in learned)
            signature = Signature(self.states, names, kept)
            return compiled(traced, signature, xs.dtype, backend, xs.device.type), names
        except (GraphError, compiler.CompilerError) as error:
            return _said(layer, error)

    def source(self, layer: nn.Module, backend: str, dtype: torch.dtype, backward: bool) -> str:
        """The source of a layer's kernel, C for "cpu" and Triton for "triton".

        Raises:
            GraphError: its step is not pointwise.
        """
        tensors = read(layer, self.skip).tensors
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        ready = prepare(layer, self.body, self.states, self.skip, dtype, device=device)
        values = zip(ready.prelude.names, ready.prelude.values(tensors, ready.prelude.names), strict=True)
        learned = [name for name, value in values if value.requires_grad] if backward else []
        traced, names = traced_step(ready, learned, backward)
        signature = Signature(self.states, names, tuple(name for name in names if name in learned))
        return (kernel_triton if backend == "triton" else kernel_c).source(traced, signature, dtype)

    def __deepcopy__(self, memo: Any) -> Sequencer:
        return Sequencer(self.states, self.body, self.skip)

    def __reduce__(self) -> Any:
        return Sequencer, (self.states, self.body, self.skip)


@contextmanager
def _apart() -> Iterator[None]:
    """Around a trace, which is no part of what the caller does: inference, or hooks on what its graph saves.

    `torch.utils.checkpoint` would count a trace's tensors as the layer's.
    """
    with torch.inference_mode(False), saved_hooks.past():
        yield


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, FuseWarning, stacklevel=2)


def _said(layer: nn.Module, error: Exception) -> str:
    """A refusal's text, warned of once: a layer's own at each layer, a missing compiler once a process."""
    if isinstance(error, compiler.CompilerError):
        _warn_once(f"fused layers run their own code, not a kernel: {error}")
        return str(error)
    warnings.warn(f"{type(layer).__name__} runs its own code, not a kernel: {error}", FuseWarning, stacklevel=6)
    return str(error)


def check_input(xs: Tensor, time_dim: int) -> torch.Size:
    """The shape of one step. Raises `Unfused` for an input that no kernel here takes."""
    if executor.current() == "eager":
        raise Unfused("the backend 'eager' is chosen")
    if type(xs) not in (Tensor, nn.Parameter) or xs.layout is not torch.strided:
        raise Unfused(f"the input is a {type(xs).__name__} ({xs.layout}), not a dense tensor")
    if xs.dtype not in _DTYPES:
        raise Unfused(f"the input is {xs.dtype}, not float32 or float64")
    if xs.ndim < 1 + time_dim or xs.numel() == 0:
        raise Unfused(f"the input has shape {list(xs.shape)}: no time step, or no element")
    if torch.compiler.is_compiling() or not memory_is_all(xs):
        raise Unfused("torch.compile, torch.jit, torch.func, tangents and dispatch modes get the layer's own code")
    return torch.Size(size for k, size in enumerate(xs.shape) if k != time_dim)


def _backend(xs: Tensor) -> str:
    """The executor of a kernel for this input."""
    chosen = executor.current()
    if chosen == "auto":
        chosen = "cpu" if xs.is_cpu else executor.automatic(xs.device.type)  # without a compiler, the build says so
    device = "cuda" if chosen == "triton" and not executor.interpreted() else "cpu"
    if xs.device.type != device:
        raise Unfused(f"the input is on {xs.device}, for which there is no kernel of the backend {chosen!r} here")
    return chosen


def _state(name: str, state: Any, element: torch.Size, xs: Tensor) -> Tensor:
    if type(state) not in (Tensor, nn.Parameter) or state.device != xs.device or state.layout is not torch.strided:
        raise Unfused(f"the state {name} is no dense tensor on {xs.device}")
    if state.dtype is not xs.dtype:
        raise Unfused(f"the state {name} is {state.dtype}, the input {xs.dtype}")
    if state.shape == element:
        return state
    if state.ndim == 0:
        return state.expand(element)
    raise Unfused(f"the state {name} has shape {list(state.shape)}, a step {list(element)}")


def _divides(graph: Graph, name: str) -> bool:
    """Whether an input is the divisor of a division."""
    place = [known for known, _ in graph.inputs].index(name)
    return any(node.op == "div" and node.args[1] == Ref(place) for node in graph.nodes)


def _value(value: Tensor, element: torch.Size, xs: Tensor) -> Tensor:
    """A parameter's value for the kernel: where torch would compute in another dtype or shape, `Unfused`."""
    if value.device != xs.device:
        if value.ndim:
            raise Unfused(f"a parameter is on {value.device}, the input on {xs.device}")
        # Torch takes a tensor of no dimension from the CPU. A copy of it would wait for the GPU, a fill does not.
        gradient = value.requires_grad or value.is_cuda
        value = value.to(xs.device) if gradient else torch.full((), value.item(), dtype=value.dtype, device=xs.device)
    if value.dtype is not xs.dtype:
        if torch.result_type(value, xs) is not xs.dtype or not element:
            raise Unfused(f"a parameter of {value.dtype} makes the result another type than the input's {xs.dtype}")
        value = value.to(xs.dtype)
    pairs = zip(reversed(value.shape), reversed(element), strict=False)
    if value.ndim > len(element) or any(size not in (1, whole) for size, whole in pairs):
        raise Unfused(f"a parameter of shape {list(value.shape)} does not broadcast against a step {list(element)}")
    return value


# ---- from a layer's step to a traced step ----------------------------------------------------------------------------


def traced_step(
    layer: LayerTrace, learned: Sequence[str], backward: bool, shape: Any = (2, 4)
) -> tuple[Traced, tuple[str, ...]]:
    """The graphs of a prepared step, and the names of the prelude's values that they take, in order.

    Raises:
        GraphError: not pointwise; or in float64, arithmetic in float32 that a float64 kernel would round otherwise.
    """
    states, step = layer.states, layer.step
    every = layer.prelude.names
    inputs = ("x", *states, *every)
    example = {name: torch.full(shape, 0.5, dtype=layer.kind(name), device=layer.device) for name in inputs}
    wanted = ("x", *states) if backward else ()
    first = trace(step, example, states, wanted, constants=layer.reads.constants)
    taken = used(first.forward) | (used(first.vjp) if first.vjp is not None else set())
    names = tuple(name for name in every if name in taken)
    kept = tuple(name for name in names if name in learned)
    final = (
        trace(step, example, states, (*wanted, *kept), carried=kept, constants=layer.reads.constants) if kept else first
    )
    _check_dtypes(final.forward, layer)
    vjp_inputs = [f"d_{name}" for name in ("output", *(f"{n}'" for n in (*states, *kept)))]
    inputs = ("x", *states, *names)
    vjp = None if final.vjp is None else narrowed(final.vjp, (*inputs, *vjp_inputs))
    return Traced(narrowed(final.forward, inputs), vjp), names


# Where the kernel's bits may differ from torch's in the last places.
_ROUNDED = frozenset({"exp", "log", "sigmoid", "tanh", "sqrt"})


def rounded(traced: Traced) -> list[str]:
    """Operations of the step itself that the kernel computes within 2 ulp of torch instead of equally."""
    return sorted({node.op for node in traced.forward.nodes} & _ROUNDED)


def reached(graph: Graph, sources: frozenset[str]) -> frozenset[str]:
    """Outputs of a step's graph, states by their names, that any number of steps makes depend on one of the inputs."""
    live, before = set(sources), -1
    while len(live) != before:
        before = len(live)
        values = [name in live for name, _ in graph.inputs]
        for node in graph.nodes:
            values.append(any(values[a.index] for a in node.args if isinstance(a, Ref)))
        live |= {name.removesuffix("'") for name, ref in graph.outputs if values[ref.index]}
    return frozenset(live)


def _check_dtypes(graph: Graph, layer: LayerTrace) -> None:
    others = [node for node in graph.nodes if node.dtype not in (torch.float32, torch.float64, torch.bool)]
    if layer.dtype is torch.float32:
        others += [node for node in graph.nodes if node.dtype is torch.float64]
    if others:
        raise GraphError(f"{others[0].op} computes in {others[0].dtype}, the input is {layer.dtype}")
    if layer.dtype is torch.float64:
        refuse_rounding(graph, {name for name, real in layer.real.items() if real.dtype is torch.float32})
