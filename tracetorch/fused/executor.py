"""Which executor runs a sequence: the step loop in torch ("eager"), or one compiled kernel, C ("cpu") or Triton."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from tracetorch.fused import compiler

BACKENDS = ("auto", "eager", "cpu", "triton")
COMPILED = ("cpu", "triton")
_CURRENT: ContextVar[str] = ContextVar("tracetorch_backend", default="auto")

# Older ones have no switch against flushing subnormal numbers in libdevice (3.3 to 3.5), or no tuples (3.2).
_OLDEST_TRITON = (3, 6)


class FuseWarning(UserWarning):
    """A layer runs its own code step by step, not a kernel, and so more slowly; says why. Once a layer and reason."""


class BackendError(RuntimeError):
    """An executor that is not available here, asked for by name."""


@cache
def _no_compiler(cc: str | None, path: str | None) -> str | None:
    """Why there is no C compiler under these environment variables; asked once, as it takes longer than a call."""
    try:
        compiler.compiler()
    except compiler.CompilerError as error:
        return str(error)
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def no_triton() -> str | None:
    """Why no Triton kernel can run here, with the remedy; None: one can. Imports Triton."""
    try:
        import triton
    except ImportError as error:
        return f"the triton backend needs Triton, which cannot be imported ({error}); install the extra [triton]"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST_TRITON:
        return (
            f"the triton backend needs Triton 3.6 or newer, and finds {triton.__version__}, whose arithmetic is not "
            "exact; torch 2.10 and newer bring one that serves, or use 'eager'"
        )
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


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the executor of every `unroll` inside the `with` block, in this thread.

    Args:
        name: "eager": the step loop in torch. "cpu": one compiled kernel for all time steps, for tensors on the CPU.
            "triton": the same on a CUDA GPU (with TRITON_INTERPRET=1 set before the start of Python, slowly on the
            CPU). Where these two cannot run a layer, they raise; they never fall back. "auto", the default: the one of
            them that fits the tensors' device, and the step loop where it cannot run, which is said once by a
            `FuseWarning`.

    Raises:
        ValueError: an unknown name.
        BackendError: "triton" without Triton or a CUDA GPU, or "cpu" without a C compiler.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not known; known: {', '.join(BACKENDS)}")
    reason = no_triton() if name == "triton" else None
    if name == "cpu":
        reason = _no_compiler(os.environ.get("CC"), os.environ.get("PATH"))
    if reason is not None:
        raise BackendError(reason)
    token = _CURRENT.set(name)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> str:
    """The name of the executor chosen here."""
    return _CURRENT.get()


@cache
def _cpu(cc: str | None, path: str | None) -> bool:
    """Whether there is a C compiler, under these environment variables."""
    if compiler.find() is None:
        text = "no C compiler found ($CC, cc, gcc, clang): layers run step by step in torch, with the same results"
        warnings.warn(text, FuseWarning, stacklevel=2)
        return False
    return True


@cache
def _cuda() -> bool:
    """Whether Triton's kernels run on CUDA tensors here; why not is said once."""
    reason = no_triton()
    if reason is not None:
        text = f"{reason}: layers on CUDA run step by step in torch, with the same results"
        warnings.warn(text, FuseWarning, stacklevel=2)
    return reason is None


def automatic(device: str) -> str:
    """What "auto" means for tensors of a device type: "cpu", "triton" or "eager"."""
    if device == "cpu":
        return "cpu" if _cpu(os.environ.get("CC"), os.environ.get("PATH")) else "eager"
    return "triton" if device == "cuda" and _cuda() else "eager"
