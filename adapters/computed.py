"""The part common to layers of ours, in several frameworks, whose step is that of a spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.core.forms import check_form
from tracetorch.core.raw import from_raw
from tracetorch.core.spec import NeuronSpec, Parameter


class SpecStep:
    """Mixin of an `nn.Module`: the parameters of a spec under their own names, in the source's raw forms; its step."""

    def take(self, spec: NeuronSpec) -> None:
        """Register the parameters, all as `nn.Parameter`s: sinabs takes every buffer of a layer for a state."""
        self._form, self._choices = check_form(spec), spec
        module: Any = self
        for name, parameter in spec.parameters.items():
            tensor = torch.from_numpy(parameter.value.copy())
            module.register_parameter(name, nn.Parameter(tensor, parameter.learnable))

    @property
    def spec(self) -> NeuronSpec:
        """The spec with the present parameters."""
        found = {}
        for name, parameter in self._choices.parameters.items():
            tensor: Tensor = getattr(self, name)
            found[name] = Parameter(tensor.detach().cpu().numpy(), tensor.requires_grad, parameter.raw)
        return self._choices.replace(parameters=found)

    def values(self) -> dict[str, Tensor]:
        """What the step takes of each parameter."""
        dt, found = self._choices.dt, {}
        for name, parameter in self._choices.parameters.items():
            raw: Tensor = getattr(self, name)
            takes = self._form.takes.get(name)
            found[name] = from_raw(parameter.raw, raw, dt) if takes is None else takes[parameter.raw](raw, dt or 1.0)
        return found

    def first(self, x: Tensor) -> Tensor:
        """The membrane before a first step with the input x."""
        choices = self._choices
        start = {"leak": "leak", "reset_value": "reset_value"}.get(choices.initial_state)
        start = "initial_v" if "initial_v" in choices.parameters else start
        if start is None or start not in choices.parameters:
            return torch.zeros_like(x)
        value: Tensor = getattr(self, start)
        return value.detach().to(x).expand_as(x).clone()

    def begin(self, x: Tensor) -> tuple[Tensor, ...]:
        """The states before a first step with the input x, in the order of the spec's; a current is 0."""
        return tuple(self.first(x) if name == "v_mem" else torch.zeros_like(x) for name in self._choices.states)

    def advance(self, x: Tensor, states: Sequence[Tensor], values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """One step: output, states."""
        return self._form.step(self._choices, values, x, *states)

    def __getstate__(self) -> dict[str, Any]:
        attributes = self.__dict__.copy()
        attributes.pop("_form", None)
        return attributes

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        module: Any = super()
        module.__setstate__(attributes)
        self._form = check_form(self._choices)
