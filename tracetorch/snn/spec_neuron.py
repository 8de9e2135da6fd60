"""`SpecNeuron`: the native layer that computes exactly what a `NeuronSpec` says."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tracetorch.core.forms import check_form
from tracetorch.core.layer import Layer
from tracetorch.core.raw import from_raw
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError

# Forms that add a recurrent layer's feedback at a place of their own.
FED = ("snntorch.RLeaky", "snntorch.Synaptic")


class SpecNeuron(Layer):
    """A native layer from a spec: the same operations in the same order as the layer the spec was read from.

    Parameters keep the source's raw form and numbers: `layer.mem_decay` is what the source calls beta, tau or alpha
    (`spec.parameters["mem_decay"].raw` says which). Learnable ones are `nn.Parameter`s, the others buffers.

    Args:
        spec: any spec whose `form` is in `tracetorch.core.forms.FORMS`.

    Raises:
        SpecError: a form or a combination of choices that has no order of operations here.
    """

    def __init__(self, spec: NeuronSpec) -> None:
        super().__init__()
        self._form = check_form(spec)
        self._choices = spec
        self.raw_forms = {name: parameter.raw for name, parameter in spec.parameters.items()}
        for name, parameter in spec.parameters.items():
            tensor = torch.from_numpy(parameter.value.copy())
            if parameter.learnable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        for state in (*spec.states, *self._form.memory):
            self.define_state(state)

    @property
    def spec(self) -> NeuronSpec:
        """The spec with the present values of the parameters."""
        parameters = {}
        for name, parameter in self._choices.parameters.items():
            tensor = getattr(self, name)
            learnable = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            try:
                parameters[name] = Parameter(tensor.detach().cpu().numpy(), learnable, parameter.raw)
            except (SpecError, TypeError) as error:
                raise SpecError(f"{name}={tensor.dtype}: {error}") from error
        return self._choices.replace(parameters=parameters)

    def raw_attribute(self, name: str) -> str:
        """A raw tensor goes by the parameter's own name, as in the spec."""
        return name

    def value(self, name: str) -> Tensor:
        """What the step takes of a parameter: its value in the equations, or what the form computes with instead."""
        if name in self.overrides or name in self.baked:
            return super().value(name)
        raw_form, dt = self.raw_forms[name], self._choices.dt
        takes = self._form.takes.get(name)
        raw = cast(Tensor, getattr(self, name))
        return from_raw(raw_form, raw, dt) if takes is None else takes[raw_form](raw, 1.0 if dt is None else dt)

    @property
    def spec_states(self) -> tuple[str, ...]:
        """The states that the spec names; a form may keep more beside them."""
        return self._choices.states

    def first_state(self, name: str) -> Tensor | None:
        """The membrane starts at the leak or at the reset value, as a constant, where the spec says so."""
        if name in self._form.memory:
            return torch.tensor(self._form.memory[name])
        start = {"leak": "leak", "reset_value": "reset_value"}.get(self._choices.initial_state)
        start = "initial_v" if "initial_v" in self.raw_forms else start
        if name != "v_mem" or start is None or start not in self.raw_forms:
            return None
        return super().value(start).detach()

    def check_input(self, x: Tensor) -> None:
        """As of a layer; raises `TypeError` too where steps are counted in floats too short for it."""
        super().check_input(x)
        if self._form.memory and x.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{type(self).__name__}: the input is {x.dtype}, in which no refractory time can be counted; "
                "convert it to float32"
            )

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """x, states: any shape that the parameters broadcast against -> output, states after the step."""
        values = {name: self.value(name) for name in self.raw_forms}
        return self._form.step(self._choices, values, x, *states)

    def fed_step(self, x: Tensor, feedback: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """A step of a recurrent layer: `feedback` joins the input where the form says, else it is added before."""
        values = {name: self.value(name) for name in self.raw_forms}
        if self._choices.form in FED:
            return self._form.step(self._choices, {**values, "feedback": feedback}, x, *states)
        return self._form.step(self._choices, values, x + feedback, *states)

    def extra_repr(self) -> str:
        p = self._choices
        reset = p.reset if p.reset == "none" else f"{p.reset}, {p.reset_timing}"
        return f"{p.form}, {p.spike_count} {p.comparison}, reset: {reset}, surrogate: {p.surrogate}"

    def __getstate__(self) -> dict[str, Any]:
        attributes = super().__getstate__()
        attributes["_choices"] = self.spec
        del attributes["_form"]
        return attributes

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        spec = attributes["_choices"]
        super().__setstate__({**attributes, "_choices": spec, "_form": check_form(spec)})
