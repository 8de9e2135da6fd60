"""Activation checkpointing of modules that keep states."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as _checkpoint

from tracetorch.core import recomputation
from tracetorch.core.states import load_states, save_states


def checkpoint(module: nn.Module, *inputs: Any) -> Any:
    """`module(*inputs)`, keeping none of its intermediate tensors: they are computed again in the backward pass.

    The states of the native layers inside are those of one run: before the recomputation their entry states are put
    back, and after it the states that were there. Gradients flow through the states, in and out, as without
    checkpointing. `torch.utils.checkpoint` itself does none of this: with `use_reentrant=False` a native layer refuses
    to run in it, with `use_reentrant=True` that cannot be seen and the gradients are wrong.

    Args:
        module: any module; states that other frameworks' layers keep in themselves are not known here.
        inputs: of its forward.

    Returns:
        What the module returns.
    """
    entry = save_states(module)
    places = [(path, name) for path, states in entry.items() for name, state in states.items() if state is not None]
    tensors = [entry[path][name] for path, name in places]

    def run(*arguments: Any) -> Any:
        first: dict[str, dict[str, Tensor | None]] = {path: dict(states) for path, states in entry.items()}
        for (path, name), tensor in zip(places, arguments, strict=False):
            first[path][name] = tensor
        found = save_states(module)
        try:
            load_states(module, first)
            with recomputation.restored():
                result = module(*arguments[len(places) :])
            return result, save_states(module)
        finally:  # also where torch stops the recomputation early
            load_states(module, found)

    result, last = _checkpoint(run, *tensors, *inputs, use_reentrant=False)
    load_states(module, last)
    return result
