"""Seeing that a backward pass has gone through a layer, so that a second one through its states can say what to do."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor

from tracetorch.core import saved_hooks

_NODES = 512  # how far a graph is searched for a part that is freed; a step has some dozens of nodes


class Trail:
    """Of one layer: whether backward has passed its calls since the states were last cut from what was before.

    Hooks on the results of the first call see it, since the states lead every later backward there. Where saved-tensor
    hooks (checkpointing) were at work, what is saved cannot be looked at, and nothing is said.

    Attributes:
        passed: backward has passed.
        fused: a kernel made the states: one node of the graph, at which can be looked without a hook.
    """

    __slots__ = ("armed", "blind", "fused", "mark", "passed")

    def __init__(self) -> None:
        self.passed = self.blind = self.armed = self.fused = False
        self.mark = _Mark(self)

    def follow(self, results: Iterable[Tensor | None]) -> None:
        """After a call: note when backward passes its results. Costs nothing but after `renew`."""
        if self.armed:
            return
        for tensor in {id(t): t for t in results if t is not None and t.requires_grad}.values():
            self.armed = True
            self.blind = self.blind or saved_hooks.at_work()
            tensor.register_hook(self.mark)

    def renew(self) -> None:
        """Begin again; hooks on earlier results mean nothing from now on."""
        if self.armed:
            self.mark.trail = None
            self.mark = _Mark(self)
        self.passed = self.blind = self.armed = self.fused = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Trail, ()


class _Mark:
    __slots__ = ("trail",)

    def __init__(self, trail: Trail) -> None:
        self.trail: Trail | None = trail

    def __call__(self, grad: Tensor) -> None:
        if self.trail is not None:
            self.trail.passed = True


def freed(node: Any, whole: bool) -> bool:
    """Whether backward has freed this node, or with `whole` a part of the graph behind it.

    Torch then refuses to show what was saved. Only `whole` may run saved-tensor hooks.
    """
    if not whole:
        try:
            _ = getattr(node, "_raw_saved_tensors", None)
        except RuntimeError:
            return True
        return False
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


def refuse_spent(layer: str, name: str, state: Tensor, whole: bool) -> None:
    """If the graph of a state is freed, a backward pass that reaches it raises `RuntimeError`, naming the remedy."""
    if state.grad_fn is not None and freed(state.grad_fn, whole):
        state.register_hook(partial(_raise, layer, name))


def _raise(layer: str, name: str, grad: Tensor) -> None:
    raise RuntimeError(
        f"{layer}: backward has reached the state {name!r} of an earlier call, whose graph an earlier backward has "
        "freed; call detach_states() after each backward (truncated backpropagation through time), reset_states() "
        "before a new sequence, or give the earlier backward retain_graph=True"
    )
