"""Hidden states of any `nn.Module`: reset, detach, save and load those of the native layers inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from tracetorch.core.layer import Layer

States = dict[str, dict[str, Tensor | None]]


def _layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    return ((name, child) for name, child in module.named_modules() if isinstance(child, Layer))


def reset_states(module: nn.Module) -> None:
    """Forget the states of every native layer in `module`; the next step starts from the initial ones."""
    for _, layer in _layers(module):
        layer.reset_states()


def detach_states(module: nn.Module) -> None:
    """Cut the states of every native layer from the graph that computed them (truncated backpropagation)."""
    for _, layer in _layers(module):
        layer.detach_states()


def save_states(module: nn.Module) -> States:
    """The states of every native layer, `{layer path: {state: tensor or None}}`: the tensors themselves, not copies."""
    return {name: layer.save_states() for name, layer in _layers(module)}


def load_states(module: nn.Module, states: Mapping[str, Mapping[str, Tensor | None]], strict: bool = True) -> None:
    """Put back what `save_states` gave.

    Raises:
        ValueError: with `strict`, a layer or state missing on either side. Nothing is changed then.
    """
    layers = dict(_layers(module))
    if strict and set(layers) != set(states):
        odd = sorted(set(layers) ^ set(states))
        raise ValueError(f"load_states: layers {odd} are on one side only; pass strict=False to load the common ones")
    if strict:
        for name, layer in layers.items():
            layer.check_states(states[name])
    for name, layer in layers.items():
        if name in states:
            layer.load_states(states[name], strict=strict)
