"""snnTorch: reading its neurons into specs, and running them (snntorch 1.0.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import snntorch
import torch
from snntorch import surrogate as stock_surrogates
from torch import Tensor, nn

from tracetorch.adapters.base import original, readable
from tracetorch.adapters.snntorch.computed import Computed
from tracetorch.adapters.snntorch.layers import Leaky, SpikeGrad, Synaptic
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.functional.surrogates import OpaqueSurrogate, Surrogate

# snntorch.surrogate function -> (our name, {its argument: our parameter})
SURROGATES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "atan": ("atan", {"alpha": "alpha"}),
    "fast_sigmoid": ("fast_sigmoid", {"slope": "slope"}),
    "sigmoid": ("sigmoid", {"slope": "slope"}),
    "straight_through_estimator": ("straight_through", {}),
    "triangular": ("triangular", {"threshold": "scale"}),
    "heaviside": ("heaviside", {}),
    "spike_rate_escape": ("spike_rate_escape", {"beta": "beta", "slope": "slope"}),
    "SFS": ("sparse_fast_sigmoid", {"slope": "slope", "B": "cutoff"}),
}
_OURS = (Leaky, Synaptic)
# class -> its states: name in the spec -> attribute
_STATES: Mapping[type, Mapping[str, str]] = {
    snntorch.Leaky: {"v_mem": "mem"},
    snntorch.Lapicque: {"v_mem": "mem"},
    snntorch.Synaptic: {"i_syn": "syn", "v_mem": "mem"},
    snntorch.Alpha: {"i_exc": "syn_exc", "i_inh": "syn_inh", "v_mem": "mem"},
    snntorch.StateLeaky: {},
}
_STATE_FUNCTIONS = {"subtract": "_base_sub", "zero": "_base_zero", "none": "_base_int"}
_NONE = ("none", "next_step_after_decay", "detached")
_SUBTRACT_LATER = ("subtract", "next_step_after_decay", "detached")
_DISCARD = ("value", "next_step_discards_input", "detached")
_RESIDUAL = {
    ("subtract", False): ("subtract", "same_step_residual", "attached"),
    ("zero", False): ("value", "same_step_residual", "attached"),
    ("none", False): _NONE,
}
# class -> (reset_mechanism, reset_delay) -> (reset, reset_timing, reset_gradient)
_RESETS: Mapping[type, Mapping[tuple[str, bool], tuple[str, str, str]]] = {
    snntorch.Leaky: {
        **_RESIDUAL,
        ("subtract", True): _SUBTRACT_LATER,
        ("zero", True): ("value", "next_step_before_decay", "detached"),
        ("none", True): _NONE,
    },
    snntorch.Synaptic: {
        **_RESIDUAL,
        ("subtract", True): _SUBTRACT_LATER,
        ("zero", True): _DISCARD,
        ("none", True): _NONE,
    },
    snntorch.Lapicque: {("subtract", True): _SUBTRACT_LATER, ("zero", True): _DISCARD, ("none", True): _NONE},
    snntorch.Alpha: {("subtract", True): _SUBTRACT_LATER, ("zero", True): _DISCARD, ("none", True): _NONE},
}
# Why a class cannot be read, and what can be done.
_REFUSED: Mapping[str, str] = {
    "LeakyParallel": "it is an nn.RNN with spikes on top: its step multiplies by two matrices and clamps the membrane "
    "at 0 before the spike test, and 1.0.0 ignores a beta per neuron; tt.fuse leaves it as it is",
    "LinearLeaky": "it holds an nn.Linear; `tracetorch.adapters.snntorch.parts` gives it and the spec of the rest",
    "DeltaLeaky": "it emits where the membrane changes, which no other framework's neuron does; use it in place, with "
    "tt.fuse for the rest of the network",
    "RLeaky": "its spikes return through a matrix; tt.convert ports it as part of a network",
    "RSynaptic": "its spikes return through a matrix; tt.convert ports it as part of a network",
}


def is_neuron(module: nn.Module) -> bool:
    """Any snnTorch neuron."""
    return isinstance(module, (snntorch.SpikingNeuron, snntorch.LeakyParallel))


def _surrogate(layer: Any) -> tuple[Surrogate, bool]:
    """The surrogate of a layer and whether its comparison is strict."""
    function = layer.spike_grad
    if isinstance(function, SpikeGrad):
        return function.surrogate, function.strict
    if getattr(function, "__name__", "") == "_surrogate_bypass":  # surrogate_disable, at construction
        return Surrogate("zero"), True
    if getattr(function, "__module__", None) == stock_surrogates.__name__:
        name = function.__qualname__.split(".")[0]
        closure = function.__closure__
        cells = {} if closure is None else dict(zip(function.__code__.co_freevars, closure, strict=True))
        if name == "custom_surrogate" and set(cells) == {"func"} and callable(cells["func"].cell_contents):
            return OpaqueSurrogate(function=cells["func"].cell_contents, kind="gradient"), True
        if name in SURROGATES and set(cells) == set(SURROGATES[name][1]):
            ours, names = SURROGATES[name]
            return Surrogate(ours, tuple((names[k], float(cells[k].cell_contents)) for k in names)), True
    raise SpecError(
        f"spike_grad={function!r}: only snntorch.surrogate's {', '.join(SURROGATES)} and custom_surrogate can be read; "
        "a function of your own decides the spikes too, which no other framework knows: tt.fuse traces it as it is"
    )


def _refuse(layer: Any, cls: type) -> None:
    if cls not in _STATES:
        known = ", ".join(known.__name__ for known in _STATES)
        why = _REFUSED.get(cls.__name__)
        raise SpecError(
            f"{cls.__module__}.{cls.__qualname__}: of snnTorch's neurons only {known} can be read"
            + (f"; {why}" if why else "")
        )
    if layer.inhibition:
        raise SpecError("inhibition=True: it couples the neurons of a layer; only inhibition=False can be read")
    if layer.state_quant:
        raise SpecError(
            f"state_quant={layer.state_quant!r}: no neuron of another framework rounds its states; only "
            "state_quant=False can be read, and tt.fuse runs the layer as it is"
        )


def _reset_choices(layer: Any, cls: type) -> tuple[str, str, str]:
    mechanism = layer.reset_mechanism
    if layer.state_function.__name__ != _STATE_FUNCTIONS[mechanism]:
        raise SpecError(
            f"reset_mechanism={mechanism!r} was assigned after construction: snnTorch computes "
            f"{layer.state_function.__name__} still; construct the layer anew"
        )
    return _RESETS[cls][mechanism, bool(getattr(layer, "reset_delay", True))]


def _lapicque_numbers(layer: Any) -> dict[str, Parameter]:
    """The decay 1 - dt/(R C) and the gain R (1/(R C)) dt, with the operations of the class."""
    if layer.beta.requires_grad:
        raise SpecError(
            "learn_beta=True: Lapicque computes C from beta once, at construction, so an optimiser changes a beta that "
            "no step reads, and a second backward pass raises (1.0.0); use learn_beta=False, or snntorch.Leaky"
        )
    rc = layer.R * layer.C
    numbers = {"mem_decay": 1 - layer.time_step / rc, "input_gain": layer.R * (1 / rc) * layer.time_step}
    return {name: Parameter(tensor.detach().cpu().numpy()) for name, tensor in numbers.items()}


def _state_leaky(layer: Any, values: dict[str, Parameter]) -> NeuronSpec:
    """A convolution with exp(-t/tau) is the step v = exp(-1/tau)*v + x; nothing resets it."""
    if layer.kernel_truncation_steps is not None:
        raise SpecError(
            f"kernel_truncation_steps={layer.kernel_truncation_steps!r}: a kernel that ends is no decay of a state; "
            "only kernel_truncation_steps=None can be read"
        )
    factor = layer.graded_spikes_factor
    if not layer.output:
        return NeuronSpec(
            form="snntorch.StateLeaky",
            output="membrane",
            spike_count="none",
            reset="none",
            threshold_gradient=False,
            parameters={"mem_decay": values["mem_decay"]},
        )
    if factor.requires_grad:
        raise SpecError(
            "learn_graded_spikes_factor=True: StateLeaky multiplies its spikes by it twice (1.0.0), and no parameter "
            "of another neuron trains like that; use learn_graded_spikes_factor=False"
        )
    surrogate, strict = _surrogate(layer)
    scale = (factor * factor).detach().to(torch.get_default_dtype() if not factor.is_floating_point() else factor.dtype)
    return NeuronSpec(
        form="snntorch.StateLeaky",
        comparison=">" if strict else ">=",
        reset="none",
        reset_timing="next_step_after_decay",
        reset_gradient="detached",
        surrogate=surrogate,
        parameters={**values, "spike_scale": Parameter(scale.cpu().numpy())},
    )


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """Read a `Leaky`, `Synaptic`, `Lapicque`, `Alpha` or `StateLeaky`.

    Raises:
        SpecError: another class, `inhibition`, `state_quant`, a spike function of one's own, a `reset_mechanism`
            changed after construction (snnTorch 1.0.0 then keeps computing the old one), or an option of the class that
            no step describes; names it.
    """
    if isinstance(layer, Computed):
        return layer.spec
    if isinstance(layer, _OURS):
        raws = {name: parameter.raw for name, parameter in layer.choices.parameters.items()}
        present = {name: readable(layer, own, raws[name]) for name, own in attributes(layer).items()}
        return layer.choices.replace(parameters=present)
    cls, source = original(layer), layer
    _refuse(source, cls)
    raws = {"mem_decay": "exp_tau" if cls is snntorch.StateLeaky else "clamped", "syn_decay": "clamped"}
    values = {name: readable(layer, own, raws.get(name, "value")) for name, own in attributes(layer).items()}
    if cls is snntorch.StateLeaky:
        return _state_leaky(source, values)
    if cls is snntorch.Lapicque:
        values |= _lapicque_numbers(source)
    surrogate, strict = _surrogate(source)
    reset, timing, gradient = _reset_choices(source, cls)
    if reset == "value":
        values["reset_value"] = Parameter(np.zeros_like(values["threshold"].value))
    synapses = {snntorch.Synaptic: "decay_then_add", snntorch.Alpha: "difference_of_exponentials"}
    return NeuronSpec(
        form=f"snntorch.{cls.__name__}",
        synapse=synapses.get(cls, "none"),
        input_gain="value" if cls is snntorch.Lapicque else "one",
        comparison=">" if strict else ">=",
        reset=reset,
        reset_timing=timing,
        reset_gradient=gradient,
        surrogate=surrogate,
        parameters=values,
    )


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """alpha, beta or tau, threshold and graded_spikes_factor."""
    if isinstance(layer, Computed):
        return {name: name for name in layer.spec.parameters}
    if isinstance(layer, _OURS):
        return layer.own
    cls = original(layer)
    if cls is snntorch.StateLeaky:
        return {"mem_decay": "tau", "threshold": "threshold"} if layer.output else {"mem_decay": "tau"}
    names = {"threshold": "threshold", "spike_scale": "graded_spikes_factor"}
    if cls is not snntorch.Lapicque:  # whose decay is computed of R, C and time_step
        names = {"mem_decay": "beta", **names}
    return {"syn_decay": "alpha", **names} if cls in (snntorch.Synaptic, snntorch.Alpha) else names


def _stored(layer: nn.Module) -> Mapping[str, str]:
    return layer.stored if isinstance(layer, _OURS) else _STATES.get(original(layer), {"v_mem": "mem"})


def states(layer: nn.Module) -> tuple[str, ...]:
    """What a call changes."""
    own = tuple(_stored(layer).values())
    return (*own, "reset") if own else ("spk",)


def reset(layer: nn.Module) -> None:
    """Empty states: the next call makes them zero in the input's shape."""
    for attribute in _stored(layer).values():
        state: Any = getattr(layer, attribute)
        setattr(layer, attribute, torch.zeros(0, device=state.device))


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Step by step from the zero state; a `StateLeaky` takes the whole sequence at once."""
    if original(layer) is snntorch.StateLeaky:
        result = layer(xs)
        outputs, membrane = result if isinstance(result, tuple) else (result, result)
        return outputs, {"v_mem": membrane}
    reset(layer)
    stored = _stored(layer)
    outputs, recorded = [], {name: [] for name in stored}  # type: ignore[var-annotated]
    for x in xs:
        result = layer(x)
        outputs.append(result[0] if isinstance(result, tuple) else result)
        for name, attribute in stored.items():
            recorded[name].append(getattr(layer, attribute))
    return torch.stack(outputs), {name: torch.stack(series) for name, series in recorded.items()}


def parts(layer: nn.Module) -> tuple[nn.Linear, NeuronSpec]:
    """A `snntorch.LinearLeaky` as its matrix, the layer's own, and the spec of the neurons behind it.

    Raises:
        SpecError: another class, or what `spec` refuses in a `StateLeaky`.
    """
    cls, source = original(layer), layer
    if cls is not snntorch.LinearLeaky:
        raise SpecError(f"{cls.__module__}.{cls.__qualname__}: only LinearLeaky has parts")
    names = (("mem_decay", "tau", "exp_tau"), ("threshold", "threshold", "value"))
    values = {name: readable(layer, own, raw) for name, own, raw in names}
    return cast(nn.Linear, source.linear), _state_leaky(source, values)
