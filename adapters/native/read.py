"""traceTorch's own layers: reading them into specs, and those that no spec describes into their parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tracetorch.adapters.base import readable
from tracetorch.core.composition import Composition
from tracetorch.core.forms.native import BY_THRESHOLD
from tracetorch.core.layer import Layer
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.functional.quantizers import round_ste
from tracetorch.functional.spikes import sigmoid4x, surrogate_spike
from tracetorch.functional.surrogates import Surrogate
from tracetorch.snn.composed import Composed
from tracetorch.snn.spec_neuron import SpecNeuron

# Parameter of a spec -> the layer's name of it, by family.
_DECAYS = {"mem_decay": "beta", "syn_decay": "alpha"}
_SIGNED = {**_DECAYS, "threshold": "pos_threshold", "neg_threshold": "neg_threshold", "bias": "bias"}
NAMES: Mapping[str, Mapping[str, str]] = {
    "LI": _DECAYS,
    "LIB": {**_DECAYS, "threshold": "threshold", "bias": "bias"},
    "LIT": _SIGNED,
    "LITS": {**_SIGNED, "spike_scale": "pos_scale", "neg_scale": "neg_scale"},
}

# Parts of a layer -> the equations for which a spec has no field.
EQUATIONS: Mapping[str, str] = {
    "D": "every trace is a pair, pos = a*pos + max(x, 0) and neg = b*neg + min(x, 0), with decays of their own",
    "R": "rec = gamma*rec + (1-gamma)*s(t-1), a trace of the layer's own output, is added to its input",
    "EMA": "mem = beta*mem + (1-beta)*x is an average, and spikes are subtracted from it",
}
# What the class statement of a combination of parts leaves in a class.
_OF_A_STATEMENT = {"__module__", "__qualname__", "__doc__", "__annotations__"}
_OF_A_STATEMENT |= {"__firstlineno__", "__static_attributes__"}  # from Python 3.13 on


def _spike_choices(layer: Composed) -> dict[str, Any]:
    """The fields that `spike_fn` and `quant_fn` decide."""
    if not layer.parts.output.fires:
        return {"spike_count": "none", "surrogate": None}
    function, quantizer = layer.spike_fn, layer.quant_fn
    hard = type(quantizer) is round_ste and quantizer.step_size == 1
    if type(function) is surrogate_spike and (hard or type(quantizer) is nn.Identity):
        if function.surrogate.name in BY_THRESHOLD and not _told_its_threshold(layer, function.threshold):
            raise SpecError(
                f"spike_fn={function!r}: a surrogate that scales with the threshold sees the number threshold="
                f"{function.threshold:g} there, which must be the layer's: one for all neurons, and not learnable"
            )
        compared = ">" if function.strict else ">="
        return {"spike_count": "single", "surrogate": function.surrogate, "comparison": compared}
    if function is not sigmoid4x:
        raise SpecError(f"spike_fn={function!r}: only tt.functional.sigmoid4x and surrogate_spike can be read")
    if type(quantizer) is nn.Identity:
        return {"spike_count": "smooth", "surrogate": Surrogate("logistic")}
    if not hard:
        raise SpecError(f"quant_fn={quantizer!r}: {_of_quantizer(quantizer)}; tt.functional.round_ste() can be read")
    return {"spike_count": "single", "surrogate": Surrogate("logistic")}


def _told_its_threshold(layer: Composed, number: float) -> bool:
    """Whether a number is the only and constant threshold of a layer, to the roundings of its raw form."""
    raw = getattr(layer, "raw_threshold", None)
    if raw is None or raw.requires_grad or raw.numel() != 1:
        return False
    value = float(layer.value("threshold").detach())
    return abs(value - number) <= 8 * torch.finfo(raw.dtype).eps * abs(number)


def _of_quantizer(quantizer: Any) -> str:
    """Why spikes of a quantizer cannot be read."""
    if type(quantizer) is round_ste:
        return f"it emits multiples of {quantizer.step_size:g}, and a spike is 0 or 1, times a scale"
    if type(quantizer).__name__ in ("stochastic_round_ste", "probabilistic_ste"):
        return "it draws random numbers, and what depends on chance cannot be compared"
    return "what it makes of a spike is known to no other framework"


def _of_parts(kind: type) -> bool:
    """Whether a class is its parts and nothing else: one of the 32, or a class statement with `family=` and no body."""
    for each in kind.__mro__[: kind.__mro__.index(Composed)]:
        own = set(vars(each)) - _OF_A_STATEMENT
        if own - {"parts", "__init__"} or ("__init__" in own and "parts" not in own):
            return False
    return True


def _checked(layer: nn.Module) -> Composed:
    """Raises `SpecError` unless it is a layer made of parts alone, with parameters that a spec can hold."""
    if not isinstance(layer, Composed) or not _of_parts(type(layer)):
        raise SpecError(
            f"{type(layer).__name__}: of the native layers SpecNeuron and those made of parts alone can be read, as "
            "the 32 of tt.snn are; what a class of its own computes is known to no other framework"
        )
    if layer.dim >= 0:
        raise SpecError(
            f"dim={layer.dim}: counted from the front, it says nothing of how many dimensions follow, which a spec's "
            "parameters need to broadcast; count from the end, as in dim=-3 for the channels of [B, C, H, W]"
        )
    _check_baked(layer)
    return layer


def _check_baked(layer: Layer) -> None:
    """Raises `SpecError` where what `TTcompile` baked is no longer what the raw tensors give."""
    baked, layer.baked = layer.baked, {}
    try:
        stale = [n for n, value in baked.items() if not torch.equal(value, layer.value(n).detach())]
    finally:
        layer.baked = baked
    if stale:
        raise SpecError(
            f"{type(layer).__name__}: {layer.raw_attribute(stale[0])} was changed after TTcompile(), and the layer "
            "still computes with what it was; call TTcompile() again, or TTdecompile()"
        )


def _parameter(layer: Composed, attribute: str, raw: str) -> Parameter:
    """A raw tensor of the layer; one value for each neuron, shaped to broadcast at the layer's `dim`."""
    found = readable(layer, attribute, raw)
    if found.value.ndim == 0 or layer.dim == -1:
        return found
    return Parameter(found.value.reshape(-1, *[1] * (-layer.dim - 1)), found.learnable, raw)


def beyond(layer: Composed) -> tuple[str, ...]:
    """The parts for which a spec has no field, keys of `EQUATIONS`."""
    parts = layer.parts
    found = {"D": parts.dual, "R": parts.recurrent, "EMA": parts.ema and parts.output.fires}
    return tuple(name for name, has in found.items() if has)


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """The spec of a `SpecNeuron`, or of a layer of tt.snn without the letters D and R, with the present parameters.

    Raises:
        SpecError: another layer, another `spike_fn` or `quant_fn`, or a feature dimension counted from the front.
    """
    if type(layer) is SpecNeuron:
        _check_baked(layer)
        return layer.spec
    found = _checked(layer)
    name, parts = type(found).__name__, found.parts
    for part in beyond(found):
        raise SpecError(
            f"{name}: parts {part}: {EQUATIONS[part]}, for which a spec has no field; "
            "tt.convert(..., to='tracetorch') carries it as it is"
        )
    choices = _spike_choices(found)
    own = NAMES[parts.family]
    values = {ours: _parameter(found, f"raw_{own[ours]}", found.raw_forms[own[ours]]) for ours in attributes(found)}
    choices |= {"synapse": "moving_average" if parts.synapse else "none", "parameters": values}
    if parts.output.fires:
        form = "tracetorch.LIB" if parts.family == "LIB" else "tracetorch.LIT"
        return NeuronSpec(form=form, **{"comparison": ">", **choices})
    return NeuronSpec(
        form="tracetorch.LI",
        output="membrane",
        input_gain="one_minus_decay" if parts.ema else "one",
        reset="none",
        threshold_gradient=False,
        **choices,
    )


def described(layer: nn.Module) -> NeuronSpec | Composition:
    """As `spec`; of a layer with parts that a spec has no field for, these parts.

    Raises:
        SpecError: as `spec`, for everything else.
    """
    if not isinstance(layer, Composed) or not beyond(layer):
        return spec(layer)
    found, parts = _checked(layer), layer.parts
    choices = _spike_choices(found)
    return Composition(
        name=type(found).__name__,
        family=parts.family,
        dual=parts.dual,
        synapse=parts.synapse,
        recurrent=parts.recurrent,
        ema=parts.ema,
        spike_count=choices["spike_count"],
        surrogate=choices["surrogate"],
        comparison=choices.get("comparison", ">"),
        layer_states=parts.states,
        parameters={name: _parameter(found, f"raw_{name}", raw) for name, raw in found.raw_forms.items()},
    )


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """The names are the same in a `SpecNeuron`; the others keep `raw_beta`, ..."""
    if isinstance(layer, SpecNeuron):
        return {name: name for name in layer.spec.parameters}
    if not isinstance(layer, Composed):
        return {}
    if beyond(layer):
        return {name: f"raw_{name}" for name in layer.raw_forms}
    return {name: f"raw_{own}" for name, own in NAMES[layer.parts.family].items() if own in layer.raw_forms}


def states(layer: nn.Module) -> tuple[str, ...]:
    """The declared states."""
    assert isinstance(layer, Layer)
    return layer.state_names
