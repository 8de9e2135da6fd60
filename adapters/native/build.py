"""traceTorch: one of the 32 layers from a spec, where their parts can express it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from tracetorch.adapters.base import Building, refuse_rare, value_of
from tracetorch.core.forms_native import OF_DISTANCE
from tracetorch.core.raw import to_raw
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional.quantizers import round_ste
from tracetorch.functional.spikes import surrogate_spike
from tracetorch.functional.surrogates import Surrogate
from tracetorch.snn.leaky import LI, LIB, LIEMA, SLI, SLIB, SLIEMA

_REMEDY = "stock=False, which gives a SpecNeuron"
_RAW = {"mem_decay": "sigmoid", "syn_decay": "sigmoid", "threshold": "softplus", "bias": "value"}
_NAMES = {"mem_decay": "raw_beta", "syn_decay": "raw_alpha", "threshold": "raw_threshold", "bias": "raw_bias"}


def _refuse(spec: NeuronSpec, building: Building) -> None:
    """Choices that none of the 32 layers has."""
    impossible = building.impossible
    if spec.spike_count != "smooth":
        refuse_rare(spec, building, "the family LIB")
    elif spec.surrogate != Surrogate("logistic"):
        raise impossible("surrogate", str(spec.surrogate), "a smooth spike is sigmoid4x", _REMEDY)
    if spec.synapse not in ("none", "moving_average"):
        why = "the synapse of the S layers averages: alpha*syn + (1-alpha)*x"
        raise impossible("synapse", spec.synapse, why, _REMEDY)
    if spec.decay != "geometric":
        raise impossible("decay", spec.decay, "beta = sigmoid(raw_beta) is below 1", _REMEDY)
    averaged = spec.output == "membrane"
    if spec.input_gain not in (("one", "one_minus_decay") if averaged else ("one",)):
        raise impossible("input_gain", spec.input_gain, "a membrane takes its input as it is; EMA: 1-beta", _REMEDY)
    if spec.clamp != "none":
        raise impossible("clamp", spec.clamp, "no native layer has a lower bound", _REMEDY)
    for name, neutral in (("spike_scale", 1.0), ("leak", 0.0)):
        parameter = spec.parameters.get(name)
        if parameter is not None and ((parameter.value != neutral).any() or parameter.learnable):
            raise impossible(name, str(parameter), f"the family LIB has only {neutral:g}", _REMEDY)
    if not averaged:
        _refuse_spikes(spec, building)


def _refuse_spikes(spec: NeuronSpec, building: Building) -> None:
    wanted = ("subtract", "threshold", "same_step", "attached")
    own = (spec.reset, spec.reset_amount, spec.reset_timing, spec.reset_gradient)
    for name, need, have in zip(("reset", "reset_amount", "reset_timing", "reset_gradient"), wanted, own, strict=True):
        if need != have:
            raise building.impossible(name, have, f"the family LIB has {need!r}", _REMEDY)
    if spec.spike_count not in ("single", "smooth"):
        raise building.impossible("spike_count", spec.spike_count, "the family LIB emits one spike a step", _REMEDY)
    if spec.comparison != ">":
        raise building.impossible("comparison", spec.comparison, "the family LIB spikes where u > threshold", _REMEDY)
    if spec.surrogate is None or spec.surrogate.name not in OF_DISTANCE:
        known = ", ".join(OF_DISTANCE)
        why = f"a spike_fn sees the distance to the threshold alone; it can have {known}"
        raise building.impossible("surrogate", str(spec.surrogate), why, _REMEDY)
    if not spec.threshold_gradient and spec.parameters["threshold"].learnable:
        building.note("threshold", "its gradient also comes through the spikes", gradient="differs")


def _set(layer: nn.Module, spec: NeuronSpec, building: Building) -> None:
    """The raw tensors of the layer: the source's own where it has the same raw form, else the nearest."""
    for name, attribute in _NAMES.items():
        if not hasattr(layer, attribute):
            continue
        parameter = spec.parameters.get(name)
        if parameter is None:  # a bias that the source has not
            like = torch.from_numpy(np.zeros_like(spec.parameters["threshold"].value))
            setattr(layer, attribute, nn.Parameter(torch.zeros_like(like), requires_grad=False))
            continue
        raw = torch.from_numpy(parameter.value.copy())
        if parameter.raw != _RAW[name]:
            value = value_of(spec, name)
            raw = to_raw(_RAW[name], value.detach())
            if not torch.isfinite(raw).all():
                held = "a decay inside (0, 1)" if "decay" in name else "a threshold above 0"
                raise building.impossible(name, str(parameter), f"{attribute} can only hold {held}", _REMEDY)
            gradient = "reparametrised" if parameter.learnable else ""
            building.note(name, f"held as {attribute}, to a rounding; in the source as {parameter.raw}", gradient)
        setattr(layer, attribute, nn.Parameter(raw, requires_grad=parameter.learnable))


def build_named(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `LI`, `LIEMA`, `SLI`, `SLIEMA`, `LIB` or `SLIB`.

    Raises:
        ConversionError: a choice that none of them has; names field, value and remedy.
    """
    _refuse(spec, building)
    neurons = max((p.value.shape[-1] for p in spec.parameters.values() if p.value.ndim), default=None)
    if any(p.value.ndim > 1 for p in spec.parameters.values()):
        raise building.impossible("mem_decay", "more than one dimension", "a layer has one value per neuron", _REMEDY)
    synapse = spec.synapse != "none"
    if spec.output == "membrane":
        averaged = spec.input_gain == "one_minus_decay"
        kind: Any = {(0, 0): LI, (0, 1): LIEMA, (1, 0): SLI, (1, 1): SLIEMA}[synapse, averaged]
        layer = kind(neurons or 1)
    else:
        kind = SLIB if synapse else LIB
        layer = kind(neurons or 1, **_functions(spec))
    layer.num_neurons = neurons  # None: parameters without a dimension serve any number of neurons
    _set(layer, spec, building)
    made: nn.Module = layer
    return made


def _functions(spec: NeuronSpec) -> dict[str, Any]:
    """`spike_fn` and `quant_fn`."""
    assert spec.surrogate is not None
    if spec.spike_count == "smooth":
        return {}
    if spec.surrogate == Surrogate("logistic"):
        return {"quant_fn": round_ste()}
    return {"spike_fn": surrogate_spike(spec.surrogate.name, **dict(spec.surrogate.parameters))}
