"""sinabs: reading its neurons into specs, and running them (sinabs 3.1.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sinabs import activation
from sinabs import layers as sl
from sinabs.layers.alif import ALIFSqueeze
from sinabs.layers.functional.alif import alif_forward_single
from sinabs.layers.reshape import SqueezeMixin
from torch import Tensor, nn

from tracetorch.adapters.base import original, readable
from tracetorch.adapters.sinabs.computed import Computed
from tracetorch.adapters.sinabs.layers import ALIF, IAF, LIF, ExpLeak, Reset, named_surrogate, spike_choices
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError

_LIF = (sl.LIF, sl.LIFSqueeze, LIF)
_IAF = (sl.IAF, sl.IAFSqueeze, IAF)
_EXP_LEAK = (sl.ExpLeak, sl.ExpLeakSqueeze, ExpLeak)
_ALIF = (sl.ALIF, ALIFSqueeze, ALIF)
# Why a class cannot be read, and what can be done.
_RECURRENT = "its spikes return through rec_connect; tt.convert ports it as part of a network"
_REFUSED: Mapping[str, str] = dict.fromkeys(("LIFRecurrent", "IAFRecurrent", "ALIFRecurrent"), _RECURRENT)


def is_neuron(module: nn.Module) -> bool:
    """Any stateful layer of sinabs."""
    return isinstance(module, sl.StatefulLayer)


def _constant(value: Any, like: Tensor) -> Parameter:
    """A number or tensor that the layer holds, in the dtype of its threshold."""
    tensor = torch.as_tensor(value, dtype=like.dtype if like.is_floating_point() else torch.get_default_dtype())
    return Parameter(tensor.detach().cpu().numpy(), tensor.requires_grad)


def _our_reset(function: Reset, like: Tensor) -> tuple[dict[str, Any], dict[str, Parameter]]:
    choices: dict[str, Any] = {"reset": function.kind, "reset_gradient": function.gradient}
    if function.kind == "value":
        return choices, {"reset_value": _constant(0.0 if function.amount is None else function.amount, like)}
    if function.amount is not None:
        return {**choices, "reset_amount": "value"}, {"reset_amount": _constant(function.amount, like)}
    choices["reset_amount"] = "threshold_over_decay" if function.over_decay else "threshold"
    return choices, {}


def _reset_choices(layer: Any, like: Tensor) -> tuple[dict[str, Any], dict[str, Parameter]]:
    """The fields and parameters that a layer's `reset_fn` decides."""
    function = layer.reset_fn
    if isinstance(function, Reset):
        return _our_reset(function, like)
    if type(function) is activation.MembraneSubtract:
        if function.subtract_value is None:
            return {"reset": "subtract"}, {}
        amount = {"reset_amount": _constant(function.subtract_value, like)}
        return {"reset": "subtract", "reset_amount": "value"}, amount
    if type(function) is activation.MembraneReset:
        value = {"reset_value": _constant(function.reset_value, like)}
        return {"reset": "add_value", "reset_gradient": "detached"}, value
    raise SpecError(
        f"reset_fn={function!r}: only MembraneSubtract and MembraneReset can be read, as they are; what another one "
        "does is known to no other framework: tt.fuse traces it as it is"
    )


def _raws(layer: Any) -> dict[str, str]:
    raws = dict.fromkeys(("mem_decay", "syn_decay", "adapt_decay"), "value" if layer.train_alphas else "exp_tau")
    if getattr(layer, "clamp_alpha", False):
        raws |= {"mem_decay": "clamped", "syn_decay": "clamped"}
    return raws


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """Read a `LIF`, `IAF`, `ExpLeak` or `ALIF`, squeezed or not.

    Raises:
        SpecError: another class, or a `spike_fn` or `reset_fn` of one's own.
    """
    if isinstance(layer, Computed):
        return layer.spec
    cls: Any = original(layer)
    if cls not in (*_LIF, *_IAF, *_EXP_LEAK, *_ALIF):
        why = _REFUSED.get(cls.__name__)
        raise SpecError(
            f"{cls.__module__}.{cls.__qualname__}: of sinabs's neurons only LIF, IAF, ExpLeak and ALIF can be read"
            + (f"; {why}" if why else "")
        )
    source: Any = layer
    raws = _raws(source)
    values = {name: readable(layer, own, raws.get(name, "value")) for name, own in attributes(layer).items()}
    return _read_alif(source, values) if cls in _ALIF else _read_lif(source, values)


def _read_lif(layer: Any, values: dict[str, Parameter]) -> NeuronSpec:
    choices: dict[str, Any] = {
        "output": "membrane",
        "spike_count": "none",
        "reset": "none",
        "threshold_gradient": False,
    }
    if layer.spike_fn is not None:
        reset, extra = _reset_choices(layer, layer.spike_threshold)
        values |= extra
        choices = {**spike_choices(layer), **reset, "surrogate": named_surrogate(layer.surrogate_grad_fn)}
    else:
        values.pop("threshold", None)
    gain = "one_minus_decay" if layer.norm_input else "one"
    bounded = "before_spikes" if getattr(layer.spike_fn, "floor", False) else "after_reset"
    return NeuronSpec(
        form="sinabs.LIF",
        decay="geometric" if "mem_decay" in values else "none",
        synapse=getattr(layer, "synapse", "add_then_decay") if "syn_decay" in values else "none",
        input_gain="value" if "input_gain" in values else gain,
        clamp=bounded if "min_v_mem" in values else "none",
        parameters=values,
        **choices,
    )


def _read_alif(layer: Any, values: dict[str, Parameter]) -> NeuronSpec:
    like = layer.alpha_mem_calculated
    for name, value in (("threshold", layer.b0), ("adapt_scale", layer.adapt_scale), ("min_v_mem", layer.min_v_mem)):
        if name not in values and value is not None:
            values[name] = _constant(value, like)
    reset, extra = _reset_choices(layer, like)
    gain = "one_minus_decay_kept" if "syn_decay" in values else "one_minus_decay"
    return NeuronSpec(
        form="sinabs.ALIF",
        synapse="add_then_decay" if "syn_decay" in values else "none",
        input_gain=gain if layer.norm_input else "one",
        clamp="after_reset" if "min_v_mem" in values else "none",
        parameters={**values, **extra},
        **{**spike_choices(layer), **reset, "surrogate": named_surrogate(layer.surrogate_grad_fn)},
    )


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """tau or alpha, the threshold, the clamp, and an ALIF's adaptation: those that are tensors of the layer."""
    if isinstance(layer, Computed):
        return {name: name for name in layer.spec.parameters}
    source: Any = layer
    kind = "alpha" if source.train_alphas else "tau"
    names = {"mem_decay": f"{kind}_mem", "syn_decay": f"{kind}_syn"}
    if isinstance(layer, sl.ALIF):
        names |= {"threshold": "b0", "min_v_mem": "min_v_mem"}
        names |= {"adapt_decay": f"{kind}_adapt", "adapt_scale": "adapt_scale"}
    else:
        names |= {"threshold": "spike_threshold", "min_v_mem": "min_v_mem", "input_gain": "input_gain"}
    return {name: own for name, own in names.items() if isinstance(getattr(source, own, None), Tensor)}


def states(layer: nn.Module) -> tuple[str, ...]:
    """What a call changes."""
    own = ("b", "spike_threshold") if isinstance(layer, sl.ALIF) else ()
    return ("v_mem", "i_syn", *own, "recordings", "firing_rate", "record_states")


def reset(layer: nn.Module) -> None:
    """Empty buffers: the next call makes them zero in the input's shape."""
    for name, buffer in list(layer.named_buffers()):
        layer.register_buffer(name, torch.zeros(0, dtype=buffer.dtype, device=buffer.device))


def _run(layer: Any, xs: Tensor) -> Tensor:
    """[B, T, ...] -> [B, T, ...], whether the layer's own call is squeezed or not."""
    if isinstance(layer, SqueezeMixin):
        return sl.ALIF.forward(layer, xs) if isinstance(layer, sl.ALIF) else sl.LIF.forward(layer, xs)
    output: Tensor = layer(xs)
    return output


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole sequence at once from the zero state, as sinabs runs it."""
    reset(layer)
    source: Any = layer
    if isinstance(layer, sl.ALIF):
        outputs = _run(source, xs.transpose(0, 1)).transpose(0, 1)
        return outputs, _alif_states(source, xs)
    recording, source.record_states = source.record_states, True
    try:
        outputs = _run(source, xs.transpose(0, 1)).transpose(0, 1)
        recorded = {name: source.recordings[name].transpose(0, 1) for name in dict(source.named_buffers())}
    finally:
        source.record_states = recording
    return outputs, recorded


def alif_step(layer: Any, x: Tensor, states: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of an `ALIF` as the layer itself takes it: spikes, and the states by sinabs's names."""
    spikes, after = alif_forward_single(
        input_data=x,
        alpha_mem=layer.alpha_mem_calculated,
        alpha_adapt=layer.alpha_adapt_calculated,
        alpha_syn=layer.alpha_syn_calculated,
        adapt_scale=layer.adapt_scale,
        state=dict(states),
        spike_fn=layer.spike_fn,
        reset_fn=layer.reset_fn,
        surrogate_grad_fn=layer.surrogate_grad_fn,
        min_v_mem=layer.min_v_mem,
        b0=layer.b0,
        norm_input=layer.norm_input,
    )
    return spikes, after


@torch.no_grad()
def _alif_states(layer: Any, xs: Tensor) -> dict[str, Tensor]:
    """What an ALIF's step leaves: its own recording at t is the value before the reset of step t + 1 (3.1.3)."""
    names = {"i_syn": "i_syn", "v_mem": "v_mem", "adaptation": "b"}
    names = {ours: own for ours, own in names.items() if ours != "i_syn" or layer.alpha_syn_calculated is not None}
    state = {own: torch.zeros(xs.shape[1:], device=xs.device) for own in ("v_mem", "i_syn", "b", "spike_threshold")}
    recorded: dict[str, list[Tensor]] = {name: [] for name in names}
    for x in xs.detach():
        _, state = alif_step(layer, x, state)
        for name, own in names.items():
            recorded[name].append(state[own])
    return {name: torch.stack(series) for name, series in recorded.items()}
