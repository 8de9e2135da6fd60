"""Which executor runs a sequence: the step loop in torch ("eager"), or one compiled C kernel ("cpu")."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tracetorch.fused import compiler

BACKENDS = ("auto", "eager", "cpu", "triton")
_CURRENT: ContextVar[str] = ContextVar("tracetorch_backend", default="auto")


class BackendError(RuntimeError):
    """An executor that is not available here, asked for by name."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the executor of every `unroll` inside the `with` block, in this thread.

    Args:
        name: "auto" (in this version the same as "eager"), "eager", or "cpu": one compiled kernel for all time steps,
            for float32 and float64 tensors on the CPU. Where "cpu" cannot run a layer, it raises; it never falls back.

    Raises:
        ValueError: an unknown name.
        BackendError: "triton", which this version has not, or "cpu" without a C compiler.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not known; known: {', '.join(BACKENDS)}")
    if name == "triton":
        raise BackendError("the triton backend is not in this version; use 'cpu' or 'eager'")
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
