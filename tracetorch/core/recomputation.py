"""Recognising activation checkpointing, which runs a forward again and would advance a layer's state a second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from tracetorch.core import saved_hooks

_RESTORED: ContextVar[bool] = ContextVar("tracetorch_states_restored", default=False)


@contextmanager
def restored() -> Iterator[None]:
    """Inside, whoever runs layers puts their entry states back before it runs them again."""
    token = _RESTORED.set(True)
    try:
        yield
    finally:
        _RESTORED.reset(token)


def refuse(layer: str) -> None:
    """Raise `RuntimeError` inside `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` without `restored`.

    Reentrant checkpointing runs the forward without gradients and cannot be told from any other such run.
    """
    if torch.compiler.is_compiling() or _RESTORED.get():
        return
    if saved_hooks.of_checkpointing():
        raise RuntimeError(
            f"{layer}: torch.utils.checkpoint runs the forward a second time, from the state that the first run left, "
            "and so gives wrong gradients without a word; use tracetorch.checkpoint(module, *inputs), which puts the "
            "entry state back"
        )
