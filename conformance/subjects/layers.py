"""Subjects that are torch layers made by an adapter's `build`: what they share."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import Building, ConversionError, parameters, readable
from tracetorch.adapters.registry import adapter
from tracetorch.conformance.protocol import Array, Arrays, Json, Unsupported
from tracetorch.core.spec import NeuronSpec


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().contiguous().numpy()


class LayerSubject:
    """Base of the subjects of this package: builds through the adapter of a framework, runs on torch tensors.

    Args:
        name: the subject's name.
        framework: the adapter's name.
        stock: only parts of the framework itself; else also the callables and subclasses of our adapter.
        device: of the tensors.
    """

    def __init__(self, name: str, framework: str, stock: bool = True, device: str = "cpu") -> None:
        self.name, self.framework, self.stock, self.device = name, framework, stock, device
        self.adapter = adapter(framework)
        self.layer: nn.Module | None = None
        self.states: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """Of the framework."""
        return metadata.version(self.framework)

    def describe(self) -> Json:
        """As `Subject.describe`."""
        kind = "its own classes alone" if self.stock else "through our adapter, with its callables and subclasses"
        return {"name": self.name, "framework": self.framework, "version": self.version, "notes": kind}

    def refuse(self, spec: NeuronSpec) -> None:
        """Raises `Unsupported` where the framework has no word for a choice and its adapter was never asked."""
        for field, plain in (("decay", "geometric"), ("refractory", "none"), ("initial_state", "zero")):
            value = getattr(spec, field)
            if value != plain:
                raise Unsupported(field, value, f"only {plain!r}")

    def make(self, spec: NeuronSpec, building: Building) -> nn.Module:
        """The layer."""
        return self.adapter.build(spec, building)

    def build(self, spec: Json) -> Json:
        """As `Subject.build`."""
        wanted = NeuronSpec.from_dict(spec)
        self.refuse(wanted)
        building = Building("(conformance)", self.framework, self.stock)
        try:
            layer = self.make(wanted, building)
        except ConversionError as error:
            raise Unsupported(error.field, error.value, str(error)) from error
        self.layer, self.states = layer.to(self.device), wanted.states
        own = self.adapter.spec(layer)
        differs = [f"{note.field}: {note.text}" for note in building.notes if note.gradient == "differs"]
        trained = {}
        for name, attribute in self.adapter.attributes(layer).items():
            if name in wanted.parameters and wanted.parameters[name].learnable:
                trained[name] = readable(layer, attribute, own.parameters[name].raw).to_dict()
        return {
            **({} if own.dt is None else {"dt": own.dt}),
            "stores_before_reset": own.stores_before_reset,
            "gradients": "; ".join(differs),
            "parameters": trained,
            "notes": "; ".join(f"{note.field}: {note.text}" for note in building.notes),
        }

    @property
    def alone(self) -> bool:
        """Whether the layer computes the spec by itself, on the input as it is given."""
        return True

    def call(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One call, going on from the present state, over [T, B, N]: outputs, and the states after every step."""
        raise NotImplementedError

    def final(self, layer: nn.Module) -> dict[str, Tensor]:
        """The present states, [B, N], by the names of the spec."""
        return {name: getattr(layer, name) for name in self.states}

    def run(self, x: Array, calls: Sequence[int], grad_output: Array | None) -> Arrays:
        """As `Subject.run`."""
        layer = self.layer
        if layer is None:
            raise RuntimeError("run before build: build a spec first")
        grad = grad_output is not None
        xs = torch.from_numpy(x.copy()).to(self.device).requires_grad_(grad)
        layer.to(xs.dtype)
        self.adapter.reset(layer)
        with torch.set_grad_enabled(grad):
            parts = [self.call(layer, piece) for piece in xs.split(list(calls))]
            outputs = torch.cat([ys for ys, _ in parts])
        found = {"outputs": _numpy(outputs)}
        found |= {f"state.{name}": _numpy(torch.cat([s[name] for _, s in parts])) for name in parts[0][1]}
        found |= {f"final.{name}": _numpy(state) for name, state in self.final(layer).items()}
        if grad_output is not None:
            found |= self._gradients(layer, xs, outputs, torch.from_numpy(grad_output.copy()).to(self.device))
        self.adapter.reset(layer)
        return found

    def _gradients(self, layer: nn.Module, xs: Tensor, outputs: Tensor, grad_output: Tensor) -> Arrays:
        named = {n: p for n, p in parameters(self.adapter, layer).items() if p.requires_grad}
        wanted = [xs, *named.values()]
        if not outputs.requires_grad:
            slopes: Sequence[Tensor | None] = [None] * len(wanted)
        else:
            slopes = torch.autograd.grad(outputs, wanted, grad_output.to(outputs.dtype), allow_unused=True)
        pairs = zip(["x", *named], wanted, slopes, strict=True)
        return {f"grad.{n}": _numpy(torch.zeros_like(t) if g is None else g) for n, t, g in pairs}
