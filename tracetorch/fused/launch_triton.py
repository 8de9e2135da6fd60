"""Compiling and launching a generated Triton kernel. Triton is imported here, at the first use, and nowhere else."""

from __future__ import annotations

import hashlib
import linecache
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracetorch.fused import cubins, kernel_triton
from tracetorch.fused.compiler import CompilerError
from tracetorch.fused.emit_triton import OPTIONS
from tracetorch.fused.executor import BackendError, interpreted
from tracetorch.fused.kernel import Geometry, Kernel
from tracetorch.fused.signature import Signature
from tracetorch.fused.trace import Traced

_FEW = 2**16  # elements below which steps wait for memory: later rows are asked for long before
_MANY = 2**20  # elements from which a thread takes several, and a program fewer loads ahead


@dataclass(frozen=True)
class Program:
    """The functions of a generated source, and what they were compiled to in this process.

    Attributes:
        functions: by name; "forward vectors" is "forward" for sequences and states that begin at multiples of 16 bytes.
            No other takes notice of that: whether a tensor is a slice of another does not decide what is compiled.
        compiled: kernels ready to be launched, by all that they were compiled for.
        lock: of the first launch of each. Quirk: Triton (3.6 to 3.9) shows a kernel to other threads before it is
            loaded (triton-lang/triton#11518). Goes when it does not.
    """

    functions: Mapping[str, Any]
    compiled: dict[Any, Any] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)


_LOADING = threading.Lock()


def load(text: str) -> Program:
    """The functions of a generated source, decorated but not compiled: the same ones for the same source."""
    with _LOADING:
        return _loaded(text)


@cache
def _loaded(text: str) -> Program:
    """No file is written: Triton reads a function's source through `linecache`."""
    import triton

    name = f"<tracetorch-triton-{hashlib.sha256(text.encode()).hexdigest()[:32]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(text, name, "exec"), namespace)
    found = {key: value for key, value in namespace.items() if hasattr(value, "arg_names")}
    if "forward" in found and not interpreted():
        forward = found["forward"]
        parameters = [argument for argument in forward.arg_names if argument.startswith("given_")]
        found["forward vectors"] = triton.jit(
            forward.fn, do_not_specialize=forward.do_not_specialize, do_not_specialize_on_alignment=parameters
        )
    for function in found.values():
        cubins.keep(function, text)
    return Program(found)


@dataclass(frozen=True)
class Spread:
    """How a kernel is spread: elements and warps of a program, and the kernel's constants."""

    block: int
    warps: int
    constants: tuple[tuple[str, int], ...]

    @property
    def vectors(self) -> bool:
        """Whether a thread has several elements, side by side."""
        return self.block > 32 * self.warps


@lru_cache(4096)
def spread(function: str, states: int, dtype: torch.dtype, elements: int, neurons: int) -> Spread:
    """Chosen from sizes alone, never by timing; no result depends on it.

    Args:
        function: "forward" or "backward".
        states: live ones, in number.
        elements: B times N.
        neurons: N.
    """
    wide = 2 if dtype is torch.float64 else 1
    chunk = kernel_triton.chunk(states)
    # One element a thread; many elements of few states are read in vectors of 16 bytes.
    vector = 4 // wide if function == "forward" and states * wide <= 2 and elements >= _MANY else 1
    far = 64 if elements < _FEW else 0
    warps = 4 if neurons > 64 else 2 if neurons > 32 else 1
    if function == "backward":
        unroll = kernel_triton.unroll(states, dtype)
        return Spread(32 * warps, warps, (("UNROLL", unroll), ("CHUNK", chunk), ("FAR", far)))
    ahead = 4 if vector > 1 or states * wide > 4 else 16 if elements < _FEW else 8
    return Spread(32 * warps * vector, warps, (("AHEAD", ahead), ("CHUNK", chunk), ("FAR", far)))


def _interpreted_spread(plan: Spread, neurons: int) -> Spread:
    # The interpreter's cost is per program: one for all neurons.
    return Spread(1 << max(0, neurons - 1).bit_length(), 1, plan.constants)


@dataclass(frozen=True)
class TritonKernel(Kernel):
    """Of the Triton renderer."""

    def call(
        self,
        function: str,
        pointers: Sequence[Tensor | None],
        shape: Geometry,
        sizes: tuple[int, ...],
        still: tuple[bool, ...] = (),
    ) -> None:
        """As `Kernel.call`: a launch on torch's current stream of the tensors' device; nothing waits for it.

        The first call on a device compiles, as does the first with many more or many fewer elements, or with states
        recorded or saved: before a CUDA graph is captured, call once with tensors like those of the capture.

        Raises:
            CompilerError: Triton does not compile or load the kernel; says why.
            BackendError: the kernel was not compiled before the capture of a CUDA graph.
        """
        neurons, elements = shape.N, shape.B * shape.N
        if not elements:
            return
        pointers = _filled(self.signature, function, pointers, elements)
        plan = spread(function, len(self.signature.states), self.dtype, elements, neurons)
        program = load(self.source)
        if interpreted():
            _interpret(program, function, _interpreted_spread(plan, neurons), pointers, shape, sizes)
            return
        unit = 1
        if plan.vectors and not (shape.N % 4 or shape.by_t % 4 or shape.by_b % 4):
            rows = pointers[: len(pointers) - len(self.signature.parameters)]
            if not any(tensor.data_ptr() % 16 for tensor in rows if tensor is not None):
                unit, function = 4, "forward vectors"
        programs = shape.B * -(-neurons // plan.block)
        if programs >= 2**31:
            raise ValueError(f"{programs} programs of {plan.block} elements: a GPU runs 2**31 - 1 at once; use less B")
        constants = {"BLOCK": plan.block, "UNIT": unit, **dict(plan.constants)}
        arguments = (*pointers, *_integers(shape, sizes, unit))
        device = _device(pointers[0])
        nulls = tuple([tensor is None for tensor in pointers])
        with _on(device):
            key = (function, device, self.dtype, nulls, plan)
            ready = program.compiled.get(key)
            if ready is None:
                ready = self._compiled(program, key, arguments, constants)
            ready[programs, 1, 1](*arguments, *constants.values())

    def _compiled(
        self, program: Program, key: tuple[Any, ...], arguments: Sequence[Any], constants: Mapping[str, int]
    ) -> Any:
        """A kernel compiled and loaded for arguments like these, once."""
        function, device, _, _, plan = key
        with program.lock:
            if key not in program.compiled:
                if device is not None and torch.cuda.is_current_stream_capturing():
                    raise BackendError(
                        f"the {function} kernel of the states {list(self.signature.states)} has to be compiled, which "
                        "no CUDA graph can capture: before the capture, run the same call once, its backward pass too, "
                        "on tensors of the same sizes, dtype and device"
                    )
                try:
                    ready = program.functions[function].warmup(
                        *arguments, **constants, num_warps=plan.warps, grid=(1,), **OPTIONS
                    )
                    ready[1, 1, 1]  # builds its launcher and loads it
                except Exception as error:  # of Triton, LLVM, ptxas, the C compiler, the driver
                    raise CompilerError(
                        f"Triton does not compile or load the {function} kernel: {type(error).__name__}: {error}; it "
                        "needs a C compiler ($CC), Python's headers and a folder of its own to write to "
                        "($TRITON_CACHE_DIR)"
                    ) from error
                program.compiled[key] = ready
        return program.compiled[key]


@lru_cache(4096)
def _holes(signature: Signature, function: str) -> tuple[str, ...]:
    """For each pointer, what stands for a null: "" itself; "null" even if there is a tensor."""
    if function == "forward":
        kinds, names = {"first": "zeros"}, signature.forward_pointers
    else:
        # The states before the first chunk are saved like those before any other; over no step there are none.
        kinds = {"d_last": "zeros", "d_first": "empty", "saved": "empty", "first": "null"}
        names = signature.backward_pointers
    known = {f"{kind}_{signature.plain[state]}": hole for kind, hole in kinds.items() for state in signature.states}
    return tuple(known.get(name, "") for name in names)


def _filled(
    signature: Signature, function: str, pointers: Sequence[Tensor | None], elements: int
) -> list[Tensor | None]:
    """With memory for every state and its gradients: without one, Triton would compile another kernel."""
    found = list(pointers)
    xs = found[0]
    assert xs is not None
    for k, hole in enumerate(_holes(signature, function)):
        if hole == "null":
            found[k] = None
        elif hole and found[k] is None:
            found[k] = xs.new_zeros(elements) if hole == "zeros" else xs.new_empty(elements)
    return found


# Quirk: Triton's interpreter replaces functions of triton.language while it runs. Goes when it is safe in threads.
_INTERPRETER = threading.Lock()


def _interpret(
    program: Program,
    function: str,
    plan: Spread,
    pointers: Sequence[Tensor | None],
    shape: Geometry,
    sizes: tuple[int, ...],
) -> None:
    programs = shape.B * -(-shape.N // plan.block)
    constants = {"BLOCK": plan.block, "UNIT": 1, **dict(plan.constants)}
    run = program.functions[function]
    # NumPy warns where torch silently gives infinities and NaN.
    with _INTERPRETER, np.errstate(all="ignore"):
        run[(programs,)](*pointers, *_integers(shape, sizes, 1), **constants, num_warps=plan.warps, **OPTIONS)


def _integers(shape: Geometry, sizes: tuple[int, ...], unit: int) -> tuple[int, ...]:
    rows = (shape.N // unit, shape.by_t // unit, shape.by_b // unit)
    return (shape.T, shape.B, *rows, *shape.strides(sizes))


def _device(tensor: Tensor | None) -> int | None:
    """The index of a tensor's GPU."""
    return tensor.device.index if tensor is not None and tensor.is_cuda else None


def _on(device: int | None) -> AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream."""
    return nullcontext() if device is None or device == torch.cuda.current_device() else torch.cuda.device(device)


def kernel(
    traced: Traced, signature: Signature, dtype: torch.dtype, output_dtypes: tuple[torch.dtype, ...], device: str
) -> TritonKernel:
    """The kernel of a traced step, not yet compiled; needs neither Triton nor a GPU.

    Raises:
        GraphError: an operation that cannot be rendered; names it.
    """
    text = kernel_triton.source(traced, signature, dtype, device)
    chunk = kernel_triton.chunk(len(signature.states))
    return TritonKernel(traced, signature, dtype, output_dtypes, text, chunk)
