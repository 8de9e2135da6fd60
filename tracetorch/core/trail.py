"""Seeing that a backward pass has gone through a layer, so that a second one through its states can say what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

_NODES = 512  # how far a graph is searched for a part that is freed; a step has some dozens of nodes


class Trail:
    """Of one layer: whether backward has passed its outputs since the last `renew`.

    A hook on each output sees the pass. It costs about a microsecond a call, and nothing without gradients. Where
    saved-tensor hooks (checkpointing) were at work, what is saved cannot be looked at, and nothing is said.
    """

    __slots__ = ("blind", "hook", "passed")

    def __init__(self) -> None:
        self.passed = self.blind = False
        self.hook: Callable[[Tensor], None] = _Mark(self)

    def follow(self, output: Tensor) -> None:
        """Note when backward passes an output."""
        if output.requires_grad:
            self.blind = self.blind or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            output.register_hook(self.hook)

    def renew(self) -> bool:
        """Begin again; hooks on earlier outputs mean nothing from now on. Returns whether states can be looked at."""
        sees = not self.blind
        self.passed = self.blind = False
        self.hook.trail = None  # type: ignore[attr-defined]
        self.hook = _Mark(self)
        return sees

    def __reduce__(self) -> tuple[Any, ...]:
        return Trail, ()


class _Mark:
    __slots__ = ("trail",)

    def __init__(self, trail: Trail) -> None:
        self.trail: Trail | None = trail

    def __call__(self, grad: Tensor) -> None:
        if self.trail is not None:
            self.trail.passed = True


def freed(node: Any) -> bool:
    """Whether backward has freed a part of the graph behind this node: torch then refuses to show what it saved."""
    waiting, seen = [node], {node}
    while waiting and len(seen) < _NODES:
        node = waiting.pop(0)
        names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        try:
            for name in names:
                getattr(node, name)
        except RuntimeError:
            return True
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return False


def refuse_spent(layer: str, name: str, state: Tensor) -> None:
    """If the graph of a state is freed, a backward pass that reaches it raises `RuntimeError`, naming the remedy."""
    if state.grad_fn is not None and freed(state.grad_fn):
        state.register_hook(partial(_raise, layer, name))


def _raise(layer: str, name: str, grad: Tensor) -> None:
    raise RuntimeError(
        f"{layer}: backward has reached the state {name!r} of an earlier call, whose graph an earlier backward has "
        "freed; call detach_states() after each backward (truncated backpropagation through time), reset_states() "
        "before a new sequence, or give the earlier backward retain_graph=True"
    )
