"""Hidden states that other frameworks' neurons keep in themselves: where they are, by what is visible without imports.

snntorch 1.0.0 keeps them in non-persistent buffers, sinabs 3.1.3 in all buffers of a layer, both empty before the first
step; spikingjelly 2.0.0 in `_memories`, a number or None before it. Norse's and torch's recurrent modules keep none:
their states go in and out of the call, and a stage keeps those.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Of snntorch 1.0.0.
_WHOLE = ("StateLeaky", "LinearLeaky", "AssociativeLeaky", "LeakyParallel")


class Place(NamedTuple):
    """Of one state: path of the module that has it, its own name, and which framework's way it is kept in."""

    path: str
    own: str
    framework: str

    @property
    def name(self) -> str:
        """In a stage: "1.mem"."""
        return f"{self.path}.{self.own}" if self.path else self.own


def packages(module: nn.Module) -> set[str]:
    """Top-level packages of a module's classes."""
    return {cls.__module__.split(".")[0] for cls in type(module).__mro__}


def starts_anew(module: nn.Module) -> bool:
    """Whether it is of snntorch 1.0.0's neurons that take a whole sequence [T, B, ...] and keep no state after it."""
    return any(cls.__module__.startswith("snntorch.") and cls.__name__ in _WHOLE for cls in type(module).__mro__)


def places(module: nn.Module) -> Iterator[Place]:
    """Where the states of foreign neurons inside a module are."""
    for path, child in module.named_modules():
        found = packages(child)
        if "snntorch" in found:
            if starts_anew(child):
                continue
            own = [name for name in child._buffers if name in child._non_persistent_buffers_set]
            yield from (Place(path, name, "snntorch") for name in own)
        elif "sinabs" in found and hasattr(child, "init_state_with_shape"):
            yield from (Place(path, name, "sinabs") for name in child._buffers)
        elif "spikingjelly" in found and hasattr(child, "_memories"):
            memories: Any = child._memories
            yield from (Place(path, name, "spikingjelly") for name in memories)


def keeps(module: nn.Module) -> bool:
    """Whether a module keeps states itself."""
    found = packages(module)
    return bool(
        hasattr(module, "state_names")
        or ("snntorch" in found and module._non_persistent_buffers_set)
        or ("sinabs" in found and hasattr(module, "init_state_with_shape"))
        or ("spikingjelly" in found and hasattr(module, "_memories"))
    )


def read(module: nn.Module, place: Place) -> Tensor | None:
    """The state itself, or None before the first step."""
    owner: Any = module.get_submodule(place.path)
    store = owner._memories if place.framework == "spikingjelly" else owner._buffers
    value = store.get(place.own)
    if not isinstance(value, Tensor) or (place.framework != "spikingjelly" and value.shape == (0,)):
        return None
    return value


def write(module: nn.Module, place: Place, value: Tensor | None) -> None:
    """Put a state in place; None: as before the first step."""
    owner: Any = module.get_submodule(place.path)
    if place.framework == "spikingjelly":
        owner._memories[place.own] = copy.deepcopy(owner._memories_rv[place.own]) if value is None else value
        return
    if value is None:
        old = owner._buffers.get(place.own)
        value = torch.zeros(0) if old is None else torch.zeros(0, dtype=old.dtype, device=old.device)
    owner._buffers[place.own] = value


def tensors(state: Any) -> list[Tensor]:
    """The tensors of an explicit state: a tensor, or tuples, lists and dicts of them, in order."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for item in state.values() for tensor in tensors(item)]
    return [tensor for item in state for tensor in tensors(item)] if isinstance(state, (list, tuple)) else []


def mapped(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """An explicit state of the same structure, its tensors replaced, in order."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: mapped(item, function) for key, item in state.items()}
    if isinstance(state, (list, tuple)):
        items = [mapped(item, function) for item in state]
        return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
    return state


def template(module: nn.Module) -> Any:
    """The structure of the state that goes in and out of a module's call, its tensors empty; None where unknown."""
    anything: Any = module
    if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        return (torch.empty(0), torch.empty(0)) if isinstance(module, nn.LSTM) else torch.empty(0)
    if "norse" not in packages(module):
        return None
    if hasattr(module, "state_fallback"):
        # Quirk of norse 1.1.0: IAF's initial state is its own v_reset, of which it requires a gradient from then on.
        before = [(tensor, tensor.requires_grad) for tensor in anything.p if isinstance(tensor, Tensor)]
        state = anything.state_fallback(torch.zeros(1, 1))
        for tensor, required in before:
            if tensor.is_leaf:
                tensor.requires_grad_(required)
        return mapped(state, lambda _: torch.empty(0))
    if isinstance(module, nn.Sequential):
        return [template(child) for child in module]
    return template(anything.lifted_module) if hasattr(module, "lifted_module") else None
