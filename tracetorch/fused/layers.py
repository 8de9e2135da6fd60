"""A native layer's `unroll` as one kernel call, or why it is none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracetorch.fused import executor
from tracetorch.fused.callers import hooks_on_all_modules, memory_is_all, plain
from tracetorch.fused.compiler import CompilerError
from tracetorch.fused.executor import FuseWarning
from tracetorch.fused.graph import GraphError, used
from tracetorch.fused.kernel import Kernel
from tracetorch.fused.layer_kernels import kernel_of, others_of, reads_of, tensors_of
from tracetorch.fused.reads import Reads
from tracetorch.fused.scan import drawn, prepared, scan

if TYPE_CHECKING:
    from tracetorch.core.layer import Layer

_DTYPES = (torch.float32, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)


class FuseError(RuntimeError):
    """A layer or an input that the chosen executor cannot run; names both."""


def _aligned(tensor: Tensor, layer: Layer, ndim: int) -> Tensor:
    """A parameter, shaped to broadcast against [B, ...] with the neurons at `layer.dim`."""
    after = -1 - layer.dim if layer.dim < 0 else ndim - 1 - layer.dim
    if layer.num_neurons is None or tensor.ndim == 0 or after == 0:
        return tensor
    if tensor.ndim == 1:
        return tensor.reshape(-1, *([1] * after))
    # In the step the neurons are last.
    return tensor.reshape(*[1] * (ndim - tensor.ndim), *tensor.shape).movedim(-1, layer.dim)


def _check(name: str, xs: Tensor, time_dim: int, tensors: Mapping[str, Tensor], backend: str) -> torch.dtype:
    """The dtype of the results. Raises `FuseError` unless the backend runs this input with these tensors."""
    device = "cpu" if backend == "cpu" or executor.interpreted() else "cuda"
    if xs.device.type != device or xs.dtype not in (*_DTYPES, *_HALVES):
        raise FuseError(
            f"{name}: the {backend} backend runs float32, float64, bfloat16 and float16 tensors on {device.upper()} "
            f"here, not {xs.dtype} on {xs.device}"
        )
    if time_dim not in (0, 1) or xs.ndim < 2 + time_dim:
        raise FuseError(
            f"{name}: time_dim={time_dim} with an input of shape {list(xs.shape)}; [T, B, ...] or [B, T, ...]"
        )
    result = xs.dtype
    for path, tensor in tensors.items():
        if tensor.is_floating_point():
            # As in the step: a tensor without dimensions does not change the type of the others.
            result = result if tensor.ndim == 0 else torch.promote_types(result, tensor.dtype)
            alike = tensor.dtype is xs.dtype or (xs.dtype in _HALVES and tensor.dtype is not torch.float64)
            if not alike:
                raise FuseError(f"{name}: {path} is {tensor.dtype}, the input {xs.dtype}; convert one of them")
        if tensor.device != xs.device:
            raise FuseError(f"{name}: {path} is on {tensor.device}, the input on {xs.device}; move one of them")
    return result


def _step_input(xs: Tensor, time_dim: int) -> Tensor:
    """One step of a sequence, or zeros where it has none."""
    if xs.shape[time_dim]:
        return xs.select(time_dim, 0)
    return xs.new_zeros([size for k, size in enumerate(xs.shape) if k != time_dim])


@dataclass(frozen=True)
class _Plan:
    """What was found out of a call and holds for the next one of the same kind, as long as `reads` is unchanged."""

    call: tuple[Any, ...]
    reads: Reads
    element: torch.Size
    result: torch.dtype
    others: tuple[Tensor, ...]  # nought in the place of those of `unfit`
    unfit: frozenset[str]
    kernels: dict[Any, Kernel]


def _check_alike(layer: Layer, inputs: Sequence[Tensor]) -> None:
    """Raises `FuseError` unless the inputs are as many as the step takes, and alike."""
    names = layer.input_names
    if len(inputs) != len(names):
        raise FuseError(
            f"{type(layer).__name__}: {len(inputs)} input sequences, but its step takes {len(names)}: "
            f"{', '.join(names)}; give them as a tuple"
        )
    first = inputs[0]
    for name, xs in zip(names, inputs, strict=True):
        if (xs.shape, xs.dtype, xs.device) != (first.shape, first.dtype, first.device):
            raise FuseError(
                f"{type(layer).__name__}: the input {name} is {xs.dtype} {list(xs.shape)} on {xs.device}, but "
                f"{names[0]} is {first.dtype} {list(first.shape)} on {first.device}; make them alike"
            )


def _plan(layer: Layer, xs: Tensor, time_dim: int, backend: str) -> _Plan:
    call = (xs.shape, xs.dtype, xs.device, time_dim, backend, bool(layer.baked))
    plan: _Plan | None = layer.kernels.get("plan")
    if plan is not None and plan.call == call and plan.reads.unchanged():
        return plan
    with torch.no_grad():  # nothing here is part of a graph
        result = _check(type(layer).__name__, xs, time_dim, tensors_of(layer), backend)
    example = _step_input(xs, time_dim)
    layer.check_input(example)
    found = others_of(layer)
    unfit = frozenset(name for name, tensor in found.items() if not _fits(tensor, layer, example.shape))
    others = tuple(xs.new_zeros(()) if name in unfit else tensor for name, tensor in found.items())
    plan = layer.kernels["plan"] = _Plan(call, reads_of(layer), example.shape, result, others, unfit, {})
    return plan


def _fits(tensor: Tensor, layer: Layer, element: torch.Size) -> bool:
    """Whether a tensor broadcasts against one step; one that does not is none that the step computes with."""
    shape = _aligned(tensor, layer, len(element)).shape
    pairs = zip(reversed(shape), reversed(element), strict=False)
    return len(shape) <= len(element) and all(size in (1, whole) for size, whole in pairs)


def _refuse_unfit(layer: Layer, kernel: Kernel, unfit: frozenset[str], element: torch.Size) -> None:
    graphs = [graph for graph in (kernel.traced.forward, kernel.traced.vjp) if graph is not None]
    wrong = sorted(unfit & {name for graph in graphs for name in used(graph)})
    if wrong:
        shape = list(others_of(layer)[wrong[0]].shape)
        raise FuseError(
            f"{type(layer).__name__}: {wrong[0]} does not broadcast against one step, {list(element)}: its shape is "
            f"{shape}; give it one element or a shape that does, or use tt.backend('eager')"
        )


def _states(layer: Layer, xs: Tensor, element: torch.Size, result: torch.dtype) -> list[Tensor | None]:
    """The states before the sequence, at the start `first_state` or None, which is zero."""
    found: list[Tensor | None] = []
    for name in layer.state_names:
        state = layer._buffers[name]
        if state is None:
            first = layer.first_state(name)
            state = None if first is None else (xs.new_zeros(element) + first).to(xs.dtype)
        elif not (state.dtype in (xs.dtype, result) and state.device == xs.device and plain(state)):
            raise FuseError(
                f"{type(layer).__name__}: the state {name} is {state.dtype} on {state.device} from the last call, the "
                f"input {xs.dtype} on {xs.device}; convert one of them, or call reset_states()"
            )
        elif state.shape != element:
            state = layer.state(name, xs.new_empty(element))  # raises, but for layers that keep less than they need
        found.append(state)
    return found


def unroll(
    layer: Layer, inputs: Sequence[Tensor], time_dim: int, record: bool = False, backend: str | None = None
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """`layer.unroll` through one kernel; states carry on. Returns outputs and, with `record`, states after every step.

    bfloat16 and float16 are computed and carried as float32 within the sequence.

    Args:
        inputs: each [T, B, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`), of float32, float64, bfloat16 or float16,
            as many as the step takes, alike in shape, dtype and device. Outputs and recorded states have their shape.
        backend: "cpu" or "triton"; None is the one chosen by `tt.backend`.

    Raises:
        FuseError: not on the backend's device, another dtype, parameters of another dtype or device, no such time
            dimension, or inputs that are not alike.
        GraphError: a step that is not pointwise; names the operation.
    """
    backend = executor.current() if backend is None else backend
    if len(inputs) > 1 or len(layer.input_names) > 1:
        _check_alike(layer, inputs)
    xs = inputs[0]
    plan = _plan(layer, xs, time_dim, backend)
    states = _states(layer, xs, plan.element, plan.result)
    values = [*[layer.value(name) for name in layer.raw_forms], *plan.others]
    if xs.dtype in _HALVES:
        inputs = [each.float() for each in inputs]
        states = [None if state is None else state.float() for state in states]
        values = [value.float() if value.is_floating_point() else value for value in values]
    grads = torch.is_grad_enabled()
    learned = tuple([value.requires_grad for value in values]) if grads else ()
    backward = grads and (any(learned) or any(t is not None and t.requires_grad for t in (*inputs, *states)))
    kernel = plan.kernels.get((backward, learned))
    if kernel is None:
        names = (*layer.raw_forms, *others_of(layer))
        tensors = dict(zip(names, values, strict=True))
        kernel = kernel_of(layer, tensors, inputs[0].dtype, backward, backend, xs.device.type)
        _refuse_unfit(layer, kernel, plan.unfit, plan.element)
        plan.kernels[backward, learned] = kernel
    if kernel.signature.draws:
        if plan.result in _HALVES:
            raise FuseError(f"{type(layer).__name__}: it draws random numbers of {plan.result}, which no kernel does")
        dim = layer.dim if layer.num_neurons is not None and len(plan.element) > 1 else -1
        inputs = [*inputs, *drawn(kernel, inputs[0], time_dim, dim)]
    aligned = [_aligned(value, layer, len(plan.element)) for value in values]
    outputs, last, recorded = scan(kernel, inputs, time_dim, states, aligned, record)
    if plan.result is not inputs[0].dtype:
        outputs, last, recorded = ([each.to(plan.result) for each in group] for group in (outputs, last, recorded))
    layer._buffers.update(zip(layer.state_names, last, strict=True))
    return outputs, dict(zip(layer.state_names, recorded, strict=False))


def _named(layer: Layer, error: GraphError) -> GraphError:
    """The error, with the layer as a printed network shows it, where its step is written, and the remedy."""
    kind = type(layer)
    code = getattr(kind.step, "__code__", None)
    place = "" if code is None else f" ({code.co_filename}, line {code.co_firstlineno})"
    said = str(error).removeprefix(f"{kind.__name__}: ")
    return GraphError(
        f"{kind.__name__}({layer.extra_repr()}): no kernel runs {kind.step.__qualname__}{place}: {said}; or use "
        "tt.backend('auto'), which runs such a layer step by step"
    )


def _per_step(layer: Layer) -> str:
    """Why every step of a layer has to be a call of its own; "": it has not."""
    for module in layer.modules() if layer._modules else (layer,):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "a hook wants every step's call"
    if hooks_on_all_modules():
        return "a hook on all modules wants every step's call"
    if "forward" in layer.__dict__ or not getattr(type(layer).forward, "elementwise_step", False):
        return "its forward is its own, and may be more than its step"
    return ""


def attempt(layer: Layer, inputs: Sequence[Tensor], time_dim: int) -> Sequence[Tensor] | None:
    """`unroll` through the chosen executor; None: the layer's step loop is to run.

    A backend chosen by name raises where it cannot run; "auto" says once why a layer runs step by step.
    """
    reason = _per_step(layer)
    if torch.compiler.is_compiling():
        return None if reason else _attempt_compiled(layer, inputs, time_dim)
    chosen = executor.current()
    if chosen in executor.COMPILED:
        if reason:
            raise FuseError(f"{type(layer).__name__}: {reason}; use tt.backend('eager') or 'auto'")
        if not all(memory_is_all(xs) for xs in inputs):
            raise FuseError(
                f"{type(layer).__name__}: a kernel reads memory, past tensor subclasses, torch.func, forward-mode "
                "differentiation, tracing and dispatch modes; use tt.backend('eager') or 'auto'"
            )
        try:
            return unroll(layer, inputs, time_dim)[0]
        except GraphError as error:
            raise _named(layer, error) from error
    if chosen == "eager" or reason or not all(_ordinary(xs) for xs in inputs):
        return None
    xs = inputs[0]
    backend = executor.automatic(xs.device.type)
    if backend == "eager" or time_dim not in (0, 1) or xs.ndim < 2 + time_dim or not xs.numel():
        return None
    try:
        return unroll(layer, inputs, time_dim, backend=backend)[0]
    except (FuseError, GraphError, CompilerError) as error:
        text = str(error)
        if text not in layer.kernels:
            layer.kernels[text] = None
            warnings.warn(f"{type(layer).__name__} runs step by step: {text}", FuseWarning, stacklevel=3)
        return None


def handle(layer: Layer, dtype: torch.dtype, backward: bool, device: str) -> str:
    """The name in `library` of a layer's kernel, built now; "": the step loop is to run."""
    from tracetorch.fused import library  # declares its operations, which takes a second

    chosen = executor.current()
    backend = executor.automatic(device) if chosen == "auto" else chosen
    if backend == "eager":
        return ""
    try:
        with library.outside_tracing():
            tensors = {
                name: torch.empty([0] * tensor.ndim, requires_grad=backward and tensor.is_floating_point())
                for name, tensor in tensors_of(layer).items()
            }
            kernel = kernel_of(layer, tensors, dtype, backward, backend, device)
            # A compiled program's random numbers are its compiler's business.
            return "" if kernel.signature.draws else library.register(kernel)
    except (GraphError, CompilerError) as error:
        if chosen == "auto":
            return ""
        if isinstance(error, GraphError):
            raise _named(layer, error) from error
        raise


def _attempt_compiled(layer: Layer, inputs: Sequence[Tensor], time_dim: int) -> Sequence[Tensor] | None:
    """`attempt` as `torch.compile` and `torch.export` see it: one operation of the library."""
    xs = inputs[0]
    if xs.dtype not in _DTYPES or time_dim not in (0, 1) or xs.ndim < 2 + time_dim:
        return None
    if len(inputs) != len(layer.input_names) or any(each.shape != xs.shape for each in inputs):
        return None
    name = layer.kernel_name(str(xs.dtype)[6:], torch.is_grad_enabled(), xs.device.type)
    tensors = tensors_of(layer)
    if not name or any(tensor.dtype is not xs.dtype for tensor in (*tensors.values(), *inputs)):
        return None
    example = _step_input(xs, time_dim)
    layer.check_input(example)
    if not all(_fits(tensor, layer, example.shape) for tensor in tensors.values()):
        return None
    states = [layer.state(state, example) for state in layer.state_names]
    aligned = [_aligned(tensor, layer, example.ndim) for tensor in tensors.values()]
    results = torch.ops.tracetorch.scan(name, time_dim, prepared(inputs, states, aligned, time_dim, example.shape))
    count = len(layer.output_names)
    for state, value in zip(layer.state_names, results[count:], strict=False):
        setattr(layer, state, value)
    return list(results[:count])


def _ordinary(xs: Tensor) -> bool:
    """Whether a kernel may take the tensor: of a dtype that it knows, and its memory all that there is to it."""
    return xs.dtype in (*_DTYPES, *_HALVES) and memory_is_all(xs)


def source(layer: nn.Module, backend: str, backward: bool = False, dtype: torch.dtype = torch.float32) -> str:
    """The generated kernel of a native layer, or of a layer that `tt.fuse` made, as text; deterministic.

    Args:
        layer: a native layer, or a fused one.
        backend: "cpu" for C, or "triton" for Triton on CUDA, which needs neither Triton nor a GPU.
        backward: the backward kernel too.
        dtype: of its tensors.

    Raises:
        ValueError: another backend, or a layer that has no kernel.
        GraphError: a step that is not pointwise; names the operation.
    """
    from tracetorch.core.layer import Layer

    if backend not in executor.COMPILED:
        raise ValueError(f"source: backend {backend!r} has no source; use one of {', '.join(executor.COMPILED)}")
    if not isinstance(layer, Layer):
        kernel_source = getattr(layer, "kernel_source", None)
        if kernel_source is None:
            raise ValueError(f"source: {type(layer).__name__} is no native layer and not fused; see tt.fuse")
        return str(kernel_source(backend, dtype, backward))
    device = "cuda" if backend == "triton" else "cpu"
    try:
        return kernel_of(layer, tensors_of(layer), dtype, backward, backend, device).source
    except GraphError as error:
        raise _named(layer, error) from error
