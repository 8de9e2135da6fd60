"""What surrounds a call of a layer: who else wants to see its operations, and what a trace may leave behind."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _torch_modules

from tracetorch.fused.graph import GraphError

# Quirk: torch (2.6 to 2.13) has no public way to ask for hooks on all modules. It writes into these. Goes when it has.
_GLOBAL_HOOKS = tuple(
    getattr(_torch_modules, f"_global_{kind}")
    for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
)
_PLAIN = frozenset({Tensor, nn.Parameter})
_OF_MODULES = frozenset(vars(nn.Module()))


def hooks_on_all_modules() -> bool:
    """Whether torch calls hooks at every call of any module."""
    return any(_GLOBAL_HOOKS)


def plain(tensor: Tensor) -> bool:
    """No subclass, and dense."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def memory_is_all(tensor: Tensor) -> bool:
    """Whether a kernel that reads a tensor's memory reads all that there is to it.

    Not so for a subclass, under a transform of torch.func, under forward-mode differentiation, while torch traces, and
    under a dispatch mode, which wants to see every operation (and may put others in their place).

    Quirk: torch (2.6 to 2.13) has no public way to ask for these. Goes when it has.
    """
    if not plain(tensor):
        return False
    transformed = torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
    return not (transformed or torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0)


@contextmanager
def untouched(layer: nn.Module, skip: Container[str]) -> Iterator[None]:
    """Put a layer's attributes back as they were; `GraphError` if the step changed one, as a kernel would not.

    Args:
        layer: whose step runs inside.
        skip: names of attributes that are not the step's.
    """
    own = [value for name, value in vars(layer).items() if name not in _OF_MODULES and name not in skip]
    scopes = [vars(layer), layer._buffers, layer._parameters, *(value for value in own if type(value) is dict)]
    before = [dict(scope) for scope in scopes]
    lists = [(value, list(value)) for value in own if type(value) is list]
    changed: set[str] = set()
    try:
        yield
    finally:
        for scope, kept in zip(scopes, before, strict=True):
            changed |= _restored(scope, kept)
        for value, items in lists:
            if len(value) != len(items):
                changed.add("a list")
                value[:] = items
    if changed:
        raise GraphError(f"the step changes {', '.join(sorted(changed))} of its layer, which is no state; define_state")


def _restored(scope: Any, kept: dict[Any, Any]) -> set[str]:
    """The names whose values had changed, and now have not."""
    missing = object()
    changed = [name for name in {**scope, **kept} if scope.get(name, missing) is not kept.get(name, missing)]
    if changed:
        scope.clear()
        scope.update(kept)
    return {str(name) for name in changed}
