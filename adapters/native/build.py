"""traceTorch: one of the 32 layers from a spec, where their parts can express it; or the copy of one of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from tracetorch.adapters.base import Building, refuse_additions, value_of
from tracetorch.adapters.losses import neutral
from tracetorch.adapters.native.read import NAMES
from tracetorch.core.forms.native import BY_THRESHOLD, refusal_of_surrogate
from tracetorch.core.raw import to_raw
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional.quantizers import round_ste
from tracetorch.functional.spikes import surrogate_spike
from tracetorch.functional.surrogates import Surrogate
from tracetorch.snn.composed import Composed
from tracetorch.snn.leaky import LAYERS

_REMEDY = "stock=False, which gives a SpecNeuron"
# What a layer has that a spec leaves out: a bias and scales that have no part.
_NEUTRAL = {"bias": 0.0, "spike_scale": 1.0, "neg_scale": 1.0}


def _refuse(spec: NeuronSpec, building: Building) -> None:
    """Choices that none of the 32 layers has."""
    impossible = building.impossible
    refuse_additions(spec, building, "the family LIB", _REMEDY)
    if spec.spike_count == "smooth" and spec.surrogate != Surrogate("logistic"):
        raise impossible("surrogate", str(spec.surrogate), "a smooth spike is sigmoid4x", _REMEDY)
    if spec.synapse not in ("none", "moving_average"):
        why = "the synapse of the S layers averages, alpha*syn + (1-alpha)*x" + _folded(spec)
        raise impossible("synapse", spec.synapse, why, _REMEDY)
    if spec.decay != "geometric":
        raise impossible("decay", spec.decay, "beta = sigmoid(raw_beta) is below 1", _REMEDY)
    averaged = spec.output == "membrane"
    if spec.input_gain not in (("one", "one_minus_decay") if averaged else ("one",)):
        raise impossible("input_gain", spec.input_gain, "a membrane takes its input as it is; EMA: 1-beta", _REMEDY)
    if spec.clamp != "none":
        raise impossible("clamp", spec.clamp, "no native layer has a lower bound", _REMEDY)
    if not neutral(spec, "leak", 0.0):
        raise impossible("leak", str(spec.parameters["leak"]), "the native layers decay to 0", _REMEDY)
    if not spec.signed and not neutral(spec, "spike_scale", 1.0):
        why = "of the native layers only LITS scales its spikes, those of both signs"
        raise impossible("spike_scale", str(spec.parameters["spike_scale"]), why, _REMEDY)
    if not averaged:
        _refuse_spikes(spec, building)


def _folded(spec: NeuronSpec) -> str:
    """What would make another synapse one that averages."""
    factor = {"decay_then_add": "1 / (1-alpha)", "add_then_decay": "alpha / (1-alpha)"}.get(spec.synapse)
    return "" if factor is None else f": its current is {factor} times theirs, a factor for the weights before it"


def _refuse_spikes(spec: NeuronSpec, building: Building) -> None:
    wanted = ("subtract", "threshold", "same_step")
    own = (spec.reset, spec.reset_amount, spec.reset_timing)
    for name, need, have in zip(("reset", "reset_amount", "reset_timing"), wanted, own, strict=True):
        if need != have:
            raise building.impossible(name, have, f"the family LIB has {need!r}", _REMEDY)
    if spec.spike_count not in ("single", "smooth"):
        raise building.impossible("spike_count", spec.spike_count, "the family LIB emits one spike a step", _REMEDY)
    why = refusal_of_surrogate(spec)
    if why:
        raise building.impossible("surrogate", str(spec.surrogate), why, _REMEDY)
    if spec.reset_gradient != "attached":
        text = f"the reset stays in the graph; in the source it is {spec.reset_gradient}"
        building.note("reset_gradient", text, gradient="differs")
    thresholds = [spec.parameters[name] for name in ("threshold", "neg_threshold") if name in spec.parameters]
    if not spec.threshold_gradient and any(threshold.learnable for threshold in thresholds):
        building.note("threshold", "its gradient also comes through the spikes", gradient="differs")


def _set(layer: Composed, spec: NeuronSpec, building: Building) -> None:
    """The raw tensors of the layer: the source's own where it has the same raw form, else the nearest."""
    for name, own in NAMES[layer.parts.family].items():
        if own not in layer.raw_forms:
            continue
        attribute, raw_form = f"raw_{own}", layer.raw_forms[own]
        parameter = spec.parameters.get(name)
        if parameter is None:
            like = torch.from_numpy(np.zeros((), spec.parameters["threshold"].value.dtype))
            setattr(layer, attribute, nn.Parameter(torch.full_like(like, _NEUTRAL[name]), requires_grad=False))
            continue
        raw = torch.from_numpy(parameter.value.copy())
        if parameter.raw != raw_form:
            value = value_of(spec, name)
            raw = to_raw(raw_form, value.detach())
            if not torch.isfinite(raw).all():
                held = "a decay inside (0, 1)" if "decay" in name else "a threshold above 0"
                raise building.impossible(name, str(parameter), f"{attribute} can only hold {held}", _REMEDY)
            gradient = "reparametrised" if parameter.learnable else ""
            building.note(name, f"held as {attribute}, to a rounding; in the source as {parameter.raw}", gradient)
        setattr(layer, attribute, nn.Parameter(_per_neuron(raw, layer.num_neurons), requires_grad=parameter.learnable))


def _per_neuron(raw: torch.Tensor, neurons: int | None) -> torch.Tensor:
    """One value for each neuron, or one for all, without the dimensions that make it broadcast."""
    return raw.reshape(() if raw.numel() == 1 and neurons != 1 else (-1,))


def _dim(spec: NeuronSpec, building: Building) -> tuple[int | None, int]:
    """`num_neurons` and `dim`: where the parameters of several values have them; (None, -1) if there are none."""
    shapes = {parameter.value.shape for parameter in spec.parameters.values() if parameter.value.size > 1}
    places = {(shape[0], -len(shape)) for shape in shapes}
    if len(places) > 1 or any(size != 1 for shape in shapes for size in shape[1:]):
        shown = ", ".join(str(list(shape)) for shape in sorted(shapes))
        field = next(name for name, parameter in spec.parameters.items() if parameter.value.size > 1)
        why = "a layer has one value for each neuron of one dimension"
        raise building.impossible(field, f"parameters of shape {shown}", why, _REMEDY)
    return places.pop() if places else (None, -1)


def _kind(spec: NeuronSpec) -> Any:
    """Which of the 32 layers."""
    family = "LI" if spec.output == "membrane" else "LIB"
    if spec.signed:
        scaled = not (neutral(spec, "spike_scale", 1.0) and neutral(spec, "neg_scale", 1.0))
        family = "LITS" if scaled else "LIT"
    ema = family == "LI" and spec.input_gain == "one_minus_decay"
    name = "S" * (spec.synapse != "none") + family + "EMA" * ema
    return {kind.__name__: kind for kind in LAYERS}[name]


def build_named(spec: NeuronSpec, building: Building) -> nn.Module:
    """One of the 32 layers without the letters D and R: from `LI` to `SLITS`.

    Raises:
        ConversionError: a choice that none of them has; names field, value and remedy.
    """
    _refuse(spec, building)
    neurons, dim = _dim(spec, building)
    functions = _functions(spec) if spec.output == "spikes" else {}
    layer: Composed = _kind(spec)(neurons or 1, dim=dim, **functions)
    layer.num_neurons = neurons  # None: parameters without a dimension serve any number of neurons
    _set(layer, spec, building)
    return layer


def _functions(spec: NeuronSpec) -> dict[str, Any]:
    """`spike_fn` and `quant_fn`."""
    assert spec.surrogate is not None
    if spec.spike_count == "smooth":
        return {}
    strict = spec.comparison == ">"
    if spec.surrogate == Surrogate("logistic") and strict:
        return {"quant_fn": round_ste()}
    told = float(value_of(spec, "threshold")) if spec.surrogate.name in BY_THRESHOLD else 1.0
    made = surrogate_spike(spec.surrogate.name, told, strict=strict, **dict(spec.surrogate.parameters))
    return {"spike_fn": made}
