"""Compiling and launching a generated Triton kernel. Triton is imported here, at the first use, and nowhere else."""

from __future__ import annotations

import hashlib
import linecache
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracetorch.fused import cubins, kernel_triton, scan
from tracetorch.fused.emit_triton import OPTIONS
from tracetorch.fused.scan import Kernel
from tracetorch.fused.signature import Signature
from tracetorch.fused.trace import Traced

_FEW = 2**18  # elements, about one for each thread that a large GPU can hold
_MANY = 2**20  # elements from which a thread takes several, and a program fewer loads ahead


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def unavailable() -> str | None:
    """Why no Triton kernel can run here, with the remedy; None: one can. Imports Triton."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"the triton backend needs Triton, which cannot be imported ({error}); pip install triton"
    if interpreted():
        return None
    if torch.version.hip is not None:
        return "the triton backend was not checked on AMD GPUs, whose arithmetic differs; use 'eager'"
    if not torch.cuda.is_available():
        return (
            "the triton backend needs a CUDA GPU, and torch sees none; use 'cpu' or 'eager' (TRITON_INTERPRET=1 set "
            "before the start of Python runs its kernels slowly on the CPU)"
        )
    return None


@cache
def load(text: str) -> dict[str, Any]:
    """The functions of a generated source, decorated but not compiled.

    No file is written: Triton reads a function's source through `linecache`.
    """
    name = f"<tracetorch-triton-{hashlib.sha256(text.encode()).hexdigest()[:32]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(text, name, "exec"), namespace)
    for function in ("forward", "backward"):
        cubins.keep(namespace.get(function), text)
    return namespace


@dataclass(frozen=True)
class Geometry:
    """How a kernel is spread: elements and warps of a program, and the kernel's constants."""

    block: int
    warps: int
    constants: tuple[tuple[str, int], ...]


def geometry(function: str, states: int, dtype: torch.dtype, elements: int, neurons: int) -> Geometry:
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
    warps = 4 if neurons > 64 else 2 if neurons > 32 else 1
    if function == "backward":
        unroll = kernel_triton.unroll(states, dtype)
        return Geometry(32 * warps, warps, (("UNROLL", unroll), ("CHUNK", chunk)))
    # A step's rows of few elements do not fill the memory's pipes: more of them are asked for at once.
    ahead = 4 if vector > 1 else 16 if elements < _FEW and states * wide <= 4 else 8
    return Geometry(32 * warps * vector, warps, (("AHEAD", ahead), ("CHUNK", chunk)))


def _interpreted_geometry(plan: Geometry, neurons: int) -> Geometry:
    # The interpreter's cost is per program: one for all neurons.
    return Geometry(1 << max(0, neurons - 1).bit_length(), 1, plan.constants)


@dataclass(frozen=True)
class TritonKernel(Kernel):
    """Of the Triton renderer."""

    def call(
        self,
        function: str,
        pointers: Sequence[Tensor | None],
        shape: scan.Geometry,
        sizes: tuple[int, ...],
        still: tuple[bool, ...] = (),
    ) -> None:
        """As `Kernel.call`: a launch on torch's current stream of the tensors' device; nothing waits for it.

        The first call compiles, as does the first with rows or memory of another alignment, or with many more elements:
        before a CUDA graph is captured, call once with tensors like those of the capture.
        """
        neurons, elements = shape.N, shape.B * shape.N
        if not elements:
            return
        given = self._filled(function, pointers, elements)
        plan = geometry(function, len(self.signature.states), self.dtype, elements, neurons)
        if interpreted():
            plan = _interpreted_geometry(plan, neurons)
        programs = shape.B * -(-neurons // plan.block)
        run = load(self.source)[function]
        rows = (shape.N, shape.by_t, shape.by_b)
        unit = 1 if any(row % 16 for row in rows) else 16
        integers = (shape.T, shape.B, *(row // unit for row in rows), *shape.strides(sizes))
        constants = {"BLOCK": plan.block, "UNIT": unit, **dict(plan.constants)}
        arguments = (*given, *integers)
        with _surroundings(arguments[0]):
            run[(programs,)](*arguments, **constants, num_warps=plan.warps, **OPTIONS)

    def _filled(self, function: str, pointers: Sequence[Tensor | None], elements: int) -> list[Tensor | None]:
        """With memory for every state and its gradients: without one, Triton would compile another kernel."""
        signature, xs = self.signature, pointers[0]
        names = signature.forward_pointers if function == "forward" else signature.backward_pointers
        assert xs is not None
        return [
            xs.new_zeros(elements) if given is None and name.startswith(("first_", "d_last_", "d_first_")) else given
            for name, given in zip(names, pointers, strict=True)
        ]


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


def _surroundings(tensor: Any) -> AbstractContextManager[Any]:
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    # NumPy warns where torch silently gives infinities and NaN.
    return np.errstate(all="ignore") if interpreted() else nullcontext()
