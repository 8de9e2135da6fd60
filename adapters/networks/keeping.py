"""What a network's own modules keep from call to call, put back: a counter, a list, a last value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.core.graph import rewrite

# Whose modules keep nothing that a call of the network changes, but neurons, whose states are put back elsewhere.
_FOREIGN = ("torch.", "snntorch.", "sinabs.layers.", "tracetorch.")
_PLAIN = (int, float, str, bool, type(None), list, tuple, dict, Tensor)


@contextmanager
def kept(root: nn.Module) -> Iterator[None]:
    """Put back the plain attributes and the buffers of a network's own modules: a counter, a list, a last value."""
    owned = [m for m in root.modules() if not type(m).__module__.startswith(_FOREIGN)]
    saved = []
    for module in owned:
        stores: tuple[dict[str, Any], ...] = (vars(module), module._buffers)
        for store in stores:
            values = {name: value for name, value in store.items() if store is module._buffers or _is_own(name, value)}
            saved.append((store, values, {name: _copied(value) for name, value in values.items()}))
    try:
        yield
    finally:
        for store, values, copies in saved:
            for name in [n for n, value in store.items() if n not in values and _is_own(n, value)]:
                del store[name]
            store.update({name: _restored(value, copies[name]) for name, value in values.items()})


def _is_own(name: str, value: Any) -> bool:
    """Whether an attribute is a plain value of the user's own."""
    return not name.startswith("_") and name != "training" and isinstance(value, _PLAIN)


def _copied(value: Any) -> Any:
    """What `_restored` needs: the contents of a tensor, a list or a dict as they are now."""
    return value.detach().clone() if isinstance(value, Tensor) else rewrite(value, lambda leaf: leaf)


def _restored(value: Any, copied: Any) -> Any:
    """The very object, with the contents that it had."""
    if isinstance(value, list):
        value[:] = copied
    elif isinstance(value, dict):
        value.clear()
        value.update(copied)
    elif isinstance(value, Tensor) and not torch.equal(value, copied):
        value.data.copy_(copied)
    return value
