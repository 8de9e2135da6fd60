"""Which executor runs a sequence: the step loop in torch ("eager"), or one compiled kernel, C ("cpu") or Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tracetorch.fused import compiler

BACKENDS = ("auto", "eager", "cpu", "triton")
COMPILED = ("cpu", "triton")
_CURRENT: ContextVar[str] = ContextVar("tracetorch_backend", default="auto")


class BackendError(RuntimeError):
    """An executor that is not available here, asked for by name."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the executor of every `unroll` inside the `with` block, in this thread.

    Args:
        name: "auto" (in this version the same as "eager"), "eager", or "cpu": one compiled kernel for all time steps,
            for float32 and float64 tensors on the CPU, or "triton": the same on a CUDA GPU (with TRITON_INTERPRET=1
            set before the start of Python, slowly on the CPU). Where these cannot run a layer, they raise; they never
            fall back.

    Raises:
        ValueError: an unknown name.
        BackendError: "triton" without Triton or a CUDA GPU, or "cpu" without a C compiler.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not known; known: {', '.join(BACKENDS)}")
    if name == "triton":
        from tracetorch.fused import launch_triton

        reason = launch_triton.unavailable()
        if reason is not None:
            raise BackendError(reason)
    if name == "cpu":
        try:
            compiler.compiler()
        except compiler.CompilerError as error:
            raise BackendError(str(error)) from error
    token = _CURRENT.set(name)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> str:
    """The name of the executor chosen here."""
    return _CURRENT.get()
