"""Hidden states of any `nn.Module`: what is done to those of all native layers inside it.

Inside are its submodules, and modules in lists, tuples and dicts that are attributes, in any nesting. A module that
holds the holder (a reference back to a parent) is outside, and so is one that a plain attribute refers to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from tracetorch.core.layer import Layer

States = dict[str, dict[str, Tensor | None]]
# Attributes of every module, and no containers of a user's.
_INTERNAL = frozenset(vars(nn.Module()))
# Of every native layer: tensors, and the engine's kernels, into which `torch.compile` cannot look.
_OF_LAYERS = _INTERNAL | {"kernels", "overrides", "baked", "raw_forms", "state_names", "output_names"}


def _contained(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a container, by path."""
    if isinstance(value, nn.Module):
        yield path, value
    elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _contained(f"{path}.{key}", item, seen)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Submodules, then modules in containers; the flag says which."""
    for name, child in module._modules.items():
        if child is not None:
            yield name, child, False
    seen: set[int] = set()
    internal = _OF_LAYERS if isinstance(module, Layer) else _INTERNAL
    for name, value in vars(module).items():
        if name not in internal and isinstance(value, (list, tuple, dict)):
            for path, child in _contained(name, value, seen):
                yield path, child, True


def _reaches(module: nn.Module, targets: set[int]) -> bool:
    waiting, seen = [module], {id(module)}
    while waiting:
        module = waiting.pop()
        if id(module) in targets:
            return True
        for _, child, _ in _children(module):
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return False


def named_layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Every native layer inside, once, with its path, and whatever else has states and the same methods for them.

    The latter says so by an attribute `holds_states`: a stage of another framework in a pipeline.
    """
    seen: set[int] = set()

    def walk(path: str, module: nn.Module, above: set[int]) -> Iterator[tuple[str, Layer]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        above = {*above, id(module)}
        if isinstance(module, Layer) or getattr(module, "holds_states", False):
            yield path, cast(Layer, module)
        for name, child, contained in _children(module):
            if not (contained and _reaches(child, above)):
                yield from walk(f"{path}.{name}" if path else name, child, above)

    return walk("", module, set())


def reset_states(module: nn.Module) -> None:
    """Forget the states of every native layer in `module`; the next step starts from the initial ones."""
    for _, layer in named_layers(module):
        layer.reset_states()


def zero_states(module: nn.Module) -> None:
    """Set the states of every native layer in `module` to zero, keeping their shapes."""
    for _, layer in named_layers(module):
        layer.zero_states()


def detach_states(module: nn.Module) -> None:
    """Cut the states of every native layer from the graph that computed them (truncated backpropagation)."""
    for _, layer in named_layers(module):
        layer.detach_states()


def save_states(module: nn.Module) -> States:
    """The states of every native layer, `{layer path: {state: tensor or None}}`: the tensors themselves, not copies."""
    return {name: layer.save_states() for name, layer in named_layers(module)}


def load_states(module: nn.Module, states: Mapping[str, Mapping[str, Tensor | None]], strict: bool = True) -> None:
    """Put back what `save_states` gave.

    Raises:
        ValueError: with `strict`, a layer or state missing on either side. Nothing is changed then.
    """
    layers = dict(named_layers(module))
    if strict and set(layers) != set(states):
        odd = sorted(set(layers) ^ set(states))
        raise ValueError(f"load_states: layers {odd} are on one side only; pass strict=False to load the common ones")
    if strict:
        for name, layer in layers.items():
            layer.check_states(states[name])
    for name, layer in layers.items():
        if name in states:
            layer.load_states(states[name], strict=strict)


def TTcompile(module: nn.Module) -> None:
    """Bake the constrained parameters of every native layer in `module`, for inference; see `Layer.TTcompile`."""
    for _, layer in named_layers(module):
        if isinstance(layer, Layer):
            layer.TTcompile()


def TTdecompile(module: nn.Module) -> None:
    """Undo `TTcompile`: the parameters are computed from their raw tensors again, and trained."""
    for _, layer in named_layers(module):
        if isinstance(layer, Layer):
            layer.TTdecompile()
