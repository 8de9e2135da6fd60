"""snnTorch: reading its neurons into specs, and running them (snntorch 1.0.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import snntorch
import torch
from snntorch.functional import quant as stock_quantizers
from torch import Tensor, nn

from tracetorch.adapters.base import original, readable
from tracetorch.adapters.snntorch.computed import Computed
from tracetorch.adapters.snntorch.layers import Leaky, StateLevels, Synaptic
from tracetorch.adapters.snntorch.parallel import ParallelNeuron
from tracetorch.adapters.snntorch.surrogates import surrogate_of, without_reset
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError

_OURS = (Leaky, Synaptic)
DeltaLeaky = snntorch.DeltaLeaky
# class -> its states: name in the spec -> attribute
_STATES: Mapping[type, Mapping[str, str]] = {
    snntorch.Leaky: {"v_mem": "mem"},
    snntorch.Lapicque: {"v_mem": "mem"},
    DeltaLeaky: {"v_mem": "mem"},
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
    "LeakyParallel": "it holds an nn.RNN; `tracetorch.adapters.snntorch.parts` gives a matrix and the spec of the rest",
    "LinearLeaky": "it holds an nn.Linear; `tracetorch.adapters.snntorch.parts` gives it and the spec of the rest",
    "RLeaky": "its spikes return through a matrix; tt.convert ports it as part of a network",
    "RSynaptic": "its spikes return through a matrix; tt.convert ports it as part of a network",
}


def is_neuron(module: nn.Module) -> bool:
    """Any snnTorch neuron."""
    return isinstance(module, (snntorch.SpikingNeuron, snntorch.LeakyParallel))


def _refuse(layer: Any, cls: type) -> None:
    if cls not in _STATES:
        known = ", ".join(known.__name__ for known in _STATES)
        why = _REFUSED.get(cls.__name__)
        raise SpecError(
            f"{cls.__module__}.{cls.__qualname__}: of snnTorch's neurons only {known} can be read"
            + (f"; {why}" if why else "")
        )
    if layer.state_quant and cls is snntorch.StateLeaky:
        raise SpecError(
            f"state_quant={layer.state_quant!r}: StateLeaky rounds what its convolution gives, and goes on from what "
            "is not rounded: no state of a step; use state_quant=False, or snntorch.Leaky with reset_mechanism='none'"
        )


def _state_levels(layer: Any, dtype: np.dtype[Any]) -> tuple[float, ...] | None:
    """The levels of `state_quant`: those that its closure holds, or a `StateLevels`. `dtype`: of the parameters.

    Raises:
        SpecError: another callable; or levels of another dtype, whose states would then be of theirs.
    """
    function, levels = layer.state_quant, None
    if not function:
        return None
    if isinstance(function, StateLevels):
        levels = function.levels
    elif getattr(function, "__module__", None) == stock_quantizers.__name__:
        closure = getattr(function, "__closure__", None) or ()
        cells = dict(zip(function.__code__.co_freevars, closure, strict=True))
        if set(cells) == {"levels"} and function.__qualname__ == "state_quant.<locals>.inner":
            levels = cells["levels"].cell_contents
    if not isinstance(levels, Tensor):
        raise SpecError(
            f"state_quant={function!r}: only what snntorch.functional.quant.state_quant gives can be read; a function "
            "of your own rounds as no spec says: tt.fuse traces it as it is"
        )
    found = levels.detach().cpu().numpy()
    if found.dtype != dtype:
        raise SpecError(
            f"state_quant={found.dtype} levels: the layer is {dtype}, so that its states change their dtype; "
            "make the levels under the layer's dtype (torch.set_default_dtype)"
        )
    return tuple(float(level) for level in found)


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
            "no step reads, and a second backward pass raises (1.0.0): it cannot be trained in snnTorch itself; use "
            "learn_beta=False, or snntorch.Leaky"
        )
    rc = layer.R * layer.C
    numbers = {"mem_decay": 1 - layer.time_step / rc, "input_gain": layer.R * (1 / rc) * layer.time_step}
    return {name: Parameter(tensor.detach().cpu().numpy()) for name, tensor in numbers.items()}


def state_leaky(layer: Any, values: dict[str, Parameter]) -> NeuronSpec:
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
    scale = (factor * factor).detach().to(torch.get_default_dtype() if not factor.is_floating_point() else factor.dtype)
    return NeuronSpec(
        form="snntorch.StateLeaky",
        **without_reset(layer),
        parameters={**values, "spike_scale": Parameter(scale.cpu().numpy())},
    )


def _delta_leaky(layer: Any, values: dict[str, Parameter]) -> NeuronSpec:
    """Of its options it computes beta, unclamped, delta_threshold and spike_grad; the others have no part in it."""
    if "threshold" not in values:
        delta = np.asarray(layer.delta_threshold, dtype=values["mem_decay"].value.dtype)
        values = {**values, "threshold": Parameter(delta)}
    return NeuronSpec(
        form="snntorch.DeltaLeaky",
        spike_test="change",
        **without_reset(layer),
        parameters=values,
    )


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """Read a `Leaky`, `Synaptic`, `Lapicque`, `Alpha`, `DeltaLeaky` or `StateLeaky`.

    Raises:
        SpecError: another class, a `state_quant` or spike function of one's own, a `reset_mechanism` changed after
            construction (snnTorch 1.0.0 then keeps computing the old one), or an option of the class that no step
            describes; names it.
    """
    if isinstance(layer, (Computed, ParallelNeuron)):
        return layer.spec
    if isinstance(layer, _OURS):
        raws = {name: parameter.raw for name, parameter in layer.choices.parameters.items()}
        present = {name: readable(layer, own, raws[name]) for name, own in attributes(layer).items()}
        return layer.choices.replace(parameters=present)
    cls, source = original(layer), layer
    _refuse(source, cls)
    raws = {"mem_decay": {snntorch.StateLeaky: "exp_tau", DeltaLeaky: "value"}.get(cls, "clamped")}
    raws["syn_decay"] = "clamped"
    values = {name: readable(layer, own, raws.get(name, "value")) for name, own in attributes(layer).items()}
    if cls is snntorch.StateLeaky:
        return state_leaky(source, values)
    if cls is DeltaLeaky:
        return _delta_leaky(source, values)
    if cls is snntorch.Lapicque:
        values |= _lapicque_numbers(source)
    surrogate, strict = surrogate_of(source)
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
        inhibition="winner" if source.inhibition else "none",
        state_levels=_state_levels(source, values["threshold"].value.dtype),
        surrogate=surrogate,
        parameters=values,
    )


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """alpha, beta or tau, threshold and graded_spikes_factor."""
    if isinstance(layer, Computed):
        return {name: name for name in layer.spec.parameters}
    if isinstance(layer, _OURS):
        return layer.own
    if isinstance(layer, ParallelNeuron):
        return {"threshold": "threshold", "spike_scale": "graded_spikes_factor"}
    cls = original(layer)
    if cls is DeltaLeaky:
        held = isinstance(cast(Any, layer).delta_threshold, Tensor)
        return {"mem_decay": "beta", **({"threshold": "delta_threshold"} if held else {})}
    if cls is snntorch.StateLeaky:
        return {"mem_decay": "tau", "threshold": "threshold"} if layer.output else {"mem_decay": "tau"}
    names = {"threshold": "threshold", "spike_scale": "graded_spikes_factor"}
    if cls is not snntorch.Lapicque:  # whose decay is computed of R, C and time_step
        names = {"mem_decay": "beta", **names}
    return {"syn_decay": "alpha", **names} if cls in (snntorch.Synaptic, snntorch.Alpha) else names


def _stored(layer: nn.Module) -> Mapping[str, str]:
    return layer.stored if isinstance(layer, (*_OURS, Computed)) else _STATES.get(original(layer), {"v_mem": "mem"})


def states(layer: nn.Module) -> tuple[str, ...]:
    """What a call changes."""
    if isinstance(layer, ParallelNeuron):
        return ()
    if original(layer) is DeltaLeaky:
        return ("mem", "mem_prev")
    own = tuple(_stored(layer).values())
    return (*own, "reset") if own else ("spk",)


def reset(layer: nn.Module) -> None:
    """Empty states: the next call makes them zero in the input's shape."""
    if original(layer) is DeltaLeaky:
        cast(Any, layer).reset_mem()
    if original(layer) is DeltaLeaky or isinstance(layer, ParallelNeuron):
        return
    for attribute in _stored(layer).values():
        state: Any = getattr(layer, attribute)
        setattr(layer, attribute, torch.zeros(0, device=state.device))


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Step by step from the zero state; a `StateLeaky` and a `ParallelNeuron` take the whole sequence at once."""
    if original(layer) is snntorch.StateLeaky or isinstance(layer, ParallelNeuron):
        result = layer(xs)
        outputs, membrane = result if isinstance(result, tuple) else (result, result)
        return outputs, {"v_mem": membrane}
    reset(layer)
    stored = _stored(layer)
    outputs, recorded = [], {name: [] for name in stored}  # type: ignore[var-annotated]
    given: tuple[Any, ...] = ()
    for x in xs:
        if original(layer) is DeltaLeaky and not cast(Any, layer).init_hidden:
            given = ((layer.mem, layer.mem_prev),)
        result = layer(x, *given)
        outputs.append(result[0] if isinstance(result, tuple) else result)
        for name, attribute in stored.items():
            recorded[name].append(getattr(layer, attribute))
    return torch.stack(outputs), {name: torch.stack(series) for name, series in recorded.items()}
