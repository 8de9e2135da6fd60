"""snnTorch: what its own classes do not compute, in their calling convention (snntorch 1.0.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import snntorch
import torch
from snntorch.functional.quant import StateQuant
from torch import Tensor, nn

from tracetorch.adapters.base import value_of
from tracetorch.core.forms import check_form
from tracetorch.core.spec import NeuronSpec, Parameter
from tracetorch.functional.spikes import heaviside
from tracetorch.functional.surrogates import Surrogate


class SpikeGrad:
    """A `spike_grad` that snnTorch has not: another comparison, or a surrogate of another framework.

    Holds the layer it serves, because some surrogates scale with its threshold; copies and pickles with it.
    """

    def __init__(self, surrogate: Surrogate, strict: bool) -> None:
        self.surrogate = surrogate
        self.strict = strict
        self.layer: Any = None

    def __call__(self, z: Tensor) -> Tensor:
        """z = mem - threshold -> spikes, 0 or 1."""
        assert self.layer is not None
        return heaviside(z, self.layer.threshold.detach(), self.surrogate, strict=self.strict)

    def __repr__(self) -> str:
        return f"SpikeGrad({self.surrogate}, {'>' if self.strict else '>='})"


class StateLevels:
    """A `state_quant` of given levels: that of `snntorch.functional.quant.state_quant`, as a callable that pickles.

    Args:
        levels: the values that states are rounded to.
        dtype: of the result; that of the layer.
    """

    def __init__(self, levels: tuple[float, ...], dtype: torch.dtype) -> None:
        self.levels = torch.tensor(levels, dtype=dtype)

    def __call__(self, state: Tensor) -> Tensor:
        """state, any shape -> the nearest level of each, gradient 1."""
        rounded: Tensor = StateQuant.apply(state, self.levels)
        return rounded

    def __repr__(self) -> str:
        return f"StateLevels({len(self.levels)} from {self.levels.min():.4g} to {self.levels.max():.4g})"


def _reset_name(spec: NeuronSpec) -> str:
    return {"subtract": "subtract", "none": "none"}.get(spec.reset, "zero")


def _plain_values(spec: NeuronSpec) -> dict[str, Tensor]:
    """The values of the parameters, or the raw numbers where the layer clamps them itself."""
    found = {}
    for name, parameter in spec.parameters.items():
        clamped = parameter.raw == "clamped"
        found[name] = torch.from_numpy(parameter.value.copy()) if clamped else value_of(spec, name).detach()
    return found


class _Computed:
    """Mixin of a snnTorch neuron whose step is that of a spec of another form.

    The attribute of a decay is clamped in the forward pass where the spec says so.
    """

    choices: NeuronSpec
    own: Mapping[str, str]  # parameter of the spec -> attribute of this layer
    stored: Mapping[str, str]  # state of the spec -> attribute of this layer

    def _take(self, spec: NeuronSpec, names: Mapping[str, str], states: Mapping[str, str]) -> None:
        """Register what the framework's constructor has not, and keep the choices."""
        layer: Any = self
        values = _plain_values(spec)
        self.own = {name: names.get(name, name) for name in spec.parameters}
        for name, parameter in spec.parameters.items():
            if name in names:
                continue
            if parameter.learnable:
                layer.register_parameter(name, nn.Parameter(values[name]))
            else:
                layer.register_buffer(name, values[name])
        raws = {name: "clamped" if p.raw == "clamped" else "value" for name, p in spec.parameters.items()}
        kept = {n: Parameter(values[n].numpy(), p.learnable, raws[n]) for n, p in spec.parameters.items()}
        self.choices = spec.replace(parameters=kept)
        self.stored = states

    def _step(self, input_: Tensor) -> Tensor:
        """One step: the states of the layer change, the output comes back."""
        layer: Any = self
        for attribute in self.stored.values():
            if getattr(layer, attribute).shape != input_.shape:
                setattr(layer, attribute, torch.zeros_like(input_))
        values = {}
        for name, attribute in self.own.items():
            tensor = getattr(layer, attribute)
            values[name] = tensor.clamp(0, 1) if self.choices.parameters[name].raw == "clamped" else tensor
        before = [getattr(layer, self.stored[name]) for name in self.choices.states]
        output, *after = check_form(self.choices).step(self.choices, values, input_, *before)
        for name, state in zip(self.choices.states, after, strict=True):
            setattr(layer, self.stored[name], state)
        return output

    def _returned(self, output: Tensor) -> Any:
        layer: Any = self
        if layer.output or not layer.init_hidden:
            return (output, *(getattr(layer, attribute) for attribute in self.stored.values()))
        return output

    def _given(self, **states: Tensor | None) -> None:
        layer: Any = self
        for name, state in states.items():
            if state is None:
                continue
            if layer.init_hidden:
                raise TypeError(f"`{name}` should not be passed as an argument while `init_hidden=True`")
            setattr(layer, name, state)


def _arguments(spec: NeuronSpec) -> tuple[dict[str, Any], dict[str, str]]:
    """Of the framework's constructor, and which parameters of the spec it registers under which names."""
    values = _plain_values(spec)
    names: dict[str, str] = {}
    arguments: dict[str, Any] = {
        "init_hidden": True,
        "reset_mechanism": _reset_name(spec),
        "reset_delay": False,
        "beta": 1.0,
    }
    if "mem_decay" in spec.parameters:
        names["mem_decay"] = "beta"
        arguments |= {"beta": values["mem_decay"], "learn_beta": spec.parameters["mem_decay"].learnable}
    if "threshold" in spec.parameters:
        names["threshold"] = "threshold"
        arguments |= {"threshold": values["threshold"], "learn_threshold": spec.parameters["threshold"].learnable}
    # snnTorch's own default is a closure, which does not pickle; the step computes its spikes from the spec.
    arguments["spike_grad"] = SpikeGrad(spec.surrogate or Surrogate("zero"), strict=spec.comparison == ">")
    return arguments, names


class Leaky(_Computed, snntorch.Leaky):
    """A `snntorch.Leaky` whose step is that of a spec: whose reset acts once, in the step of the spike.

    snnTorch 1.0.0 has no such reset: with `reset_delay=True` the threshold is subtracted after the next decay, with
    `reset_delay=False` a membrane still above the threshold is subtracted from again before the next spike test. This
    subclass keeps the calling convention (`init_hidden`, `output`, the buffer `mem`). A spec whose output is the
    membrane gives it in the place of spikes.
    """

    def __init__(self, spec: NeuronSpec) -> None:
        arguments, names = _arguments(spec)
        super().__init__(**arguments)
        arguments["spike_grad"].layer = self
        self._take(spec, names, {"v_mem": "mem"})

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One step, as `snntorch.Leaky.forward`: spikes, or spikes and membrane."""
        self._given(mem=mem)
        return self._returned(self._step(input_))


class Synaptic(_Computed, snntorch.Synaptic):
    """A `snntorch.Synaptic` whose step is that of a spec: another order of the synapse, or a reset that acts once."""

    def __init__(self, spec: NeuronSpec) -> None:
        arguments, names = _arguments(spec)
        values = _plain_values(spec)
        super().__init__(alpha=values["syn_decay"], learn_alpha=spec.parameters["syn_decay"].learnable, **arguments)
        arguments["spike_grad"].layer = self
        self._take(spec, {**names, "syn_decay": "alpha"}, {"i_syn": "syn", "v_mem": "mem"})

    def forward(self, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None) -> Any:
        """One step, as `snntorch.Synaptic.forward`: spikes, or spikes, current and membrane."""
        self._given(syn=syn, mem=mem)
        return self._returned(self._step(input_))
