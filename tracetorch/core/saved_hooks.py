"""Saved-tensor hooks around a call: whether there are any, and whether activation checkpointing put them there.

Quirk: torch has no public way to ask. From 2.8 on a private function gives the innermost pair; 2.6 and 2.7 have none,
and there the call stack says whether checkpointing is at work. Goes when torch says it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

_CHECKPOINTING = "torch.utils.checkpoint"
# `read(True)` gives the innermost hooks, (pack, unpack), or None.
_read: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def at_work() -> bool:
    """Whether hooks may see what the operations of a call save; True where torch cannot say (2.6 and 2.7)."""
    return _read is None or _read(True) is not None


@contextmanager
def past() -> Iterator[None]:
    """Around operations whose saved tensors are none of the caller's, and of no hooks' business.

    Where hooks are disabled (`torch.autograd.graph.disable_saved_tensors_hooks`) there are none, and none may be put.
    """
    enabled: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    if enabled and at_work():
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            yield
    else:
        yield


def _same(value: Any) -> Any:
    return value


def of_checkpointing() -> bool:
    """Whether `torch.utils.checkpoint` with `use_reentrant=False` runs the call, in its first or its second run."""
    if _read is None:
        return _checkpointing(sys._getframe(1))
    hooks = _read(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == _CHECKPOINTING


def _checkpointing(frame: FrameType | None) -> bool:
    """Whether checkpointing without re-entry leads to a frame: `checkpoint` itself, or what backward calls of it."""
    while frame is not None:
        if frame.f_globals.get("__name__") == _CHECKPOINTING:
            name = frame.f_code.co_name
            if name in ("recompute_fn", "unpack_hook"):
                return True
            if name == "checkpoint":
                return not frame.f_locals["use_reentrant"]
        frame = frame.f_back
    return False
