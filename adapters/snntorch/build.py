"""snnTorch: building its neurons from specs (snntorch 1.0.0)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import snntorch
import torch
from snntorch import surrogate as stock_surrogates
from torch import Tensor, nn

from tracetorch.adapters.base import Building, note_quirks, refuse_rare, value_of
from tracetorch.adapters.losses import formed
from tracetorch.adapters.simplify import rare, refuse, simplified
from tracetorch.adapters.snntorch.arguments import set_rc, state_quant
from tracetorch.adapters.snntorch.computed import computed
from tracetorch.adapters.snntorch.layers import Leaky, SpikeGrad, Synaptic
from tracetorch.adapters.snntorch.surrogates import SURROGATES
from tracetorch.core.forms import check_form
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.functional.surrogates import OpaqueSurrogate

# synapse -> the class that has it
_CLASSES: Mapping[str, Any] = {
    "none": snntorch.Leaky,
    "decay_then_add": snntorch.Synaptic,
    "difference_of_exponentials": snntorch.Alpha,
}
# What a subclass of ours computes in the place of the stock class.
_OURS: Mapping[str, Any] = {
    "none": Leaky,
    "decay_then_add": Synaptic,
    "add_then_decay": Synaptic,
    "moving_average": Synaptic,
}
_FORMS = ("sinabs.LIF", "tracetorch.LIB", "tracetorch.LI", "snntorch.LeakyParallel")
_NEUTRAL = ("bias", "spike_scale", "leak")


def _to_zero(spec: NeuronSpec) -> bool:
    return spec.reset in ("value", "add_value") and spec.parameters["reset_value"].fixed_at(0.0)


def _not_below_zero(spec: NeuronSpec) -> bool:
    return bool((value_of(spec, "threshold") >= 0).all())


def _mechanism(spec: NeuronSpec) -> tuple[str, bool] | None:
    """`reset_mechanism`, `reset_delay` of the stock class with the same reset, or None if it has none."""
    if spec.reset == "none":
        return "none", True
    timing, gradient = spec.reset_timing, spec.reset_gradient
    if _to_zero(spec):
        return _zero_mechanism(spec, timing, gradient)
    # Read as what happens to the membrane: the same step with rho = theta / beta is the next step after the decay.
    key = (spec.reset, spec.reset_amount, timing, gradient)
    return {
        ("subtract", "threshold", "next_step_after_decay", "detached"): ("subtract", True),
        ("subtract", "threshold_over_decay", "same_step", "detached"): ("subtract", True),
        ("subtract", "threshold", "same_step_residual", "attached"): ("subtract", False),
    }.get(key)


def _zero_mechanism(spec: NeuronSpec, timing: str, gradient: str) -> tuple[str, bool] | None:
    """Of `Leaky`, whose delayed reset only comes before the decay; `Synaptic`'s and `Alpha`'s discards the step."""
    first_order = spec.synapse == "none" and spec.form != "snntorch.Lapicque"
    later = ("same_step", "next_step_before_decay") if first_order else ("next_step_discards_input",)
    if timing in later and gradient == "detached":
        return "zero", True
    if spec.synapse == "difference_of_exponentials" or not timing.startswith("same_step") or gradient != "attached":
        return None
    return ("zero", False) if timing != "same_step" or _not_below_zero(spec) else None


def _spike_grad(spec: NeuronSpec, building: Building) -> Callable[[Tensor], Tensor] | None:
    """snnTorch's own surrogate where it has it, else one of ours, or with `stock` the default, named."""
    assert spec.surrogate is not None
    stock = {ours: (name, names) for name, (ours, names) in SURROGATES.items()}.get(spec.surrogate.name)
    if spec.comparison == ">" and stock is not None:
        values = dict(spec.surrogate.parameters)
        made: Callable[[Tensor], Tensor] = getattr(stock_surrogates, stock[0])(
            **{theirs: values[ours] for theirs, ours in stock[1].items()}
        )
        return made
    own = spec.surrogate if isinstance(spec.surrogate, OpaqueSurrogate) else None
    if own is not None:
        building.note("surrogate", f"{own}: your own callable, carried as it is", gradient="opaque")
        if own.kind == "gradient" and spec.comparison == ">":
            wrapped: Callable[[Tensor], Tensor] = stock_surrogates.custom_surrogate(own.function)
            return wrapped
    if not building.stock:
        building.note("spike_grad", f"custom callable: {spec.surrogate}, spike where u {spec.comparison} threshold")
        return SpikeGrad(spec.surrogate, strict=spec.comparison == ">")
    building.note("surrogate", f"{spec.surrogate} is not in snntorch.surrogate; atan in its place", gradient="differs")
    return None


def _refuse(spec: NeuronSpec, building: Building) -> None:
    """What no snnTorch neuron and no subclass of ours computes."""
    if spec.synapse not in {*_CLASSES, *_OURS}:
        why = "snntorch.Synaptic drives its membrane with the current after its decay"
        raise building.impossible("synapse", spec.synapse, why, "to='tracetorch'")
    refuse_rare(spec, building, "snntorch")
    residual = spec.reset == "value" and spec.reset_timing == "same_step_residual"
    if spec.inhibition != "none" and residual and spec.form == "snntorch.RLeaky":
        why = "an RLeaky's neuron that lost takes nothing in at its next step, a Leaky's does"
        raise building.impossible("inhibition", spec.inhibition, why, "reset_delay=True, or to='tracetorch'")
    if spec.inhibition != "none" and spec.reset != "none" and spec.reset_timing == "same_step":
        why = "with inhibition=True snnTorch's resets take more neurons than the one that spikes"
        raise building.impossible("reset_timing", spec.reset_timing, why, "to='tracetorch'")
    for name, neutral in (("bias", 0.0), ("leak", 0.0)):
        parameter = spec.parameters.get(name)
        if parameter is not None and not parameter.fixed_at(neutral):
            why = "snntorch.Leaky has none" if name == "bias" else "snntorch.Leaky decays to 0"
            raise building.impossible(name, str(parameter), why, f"{name}=0, not learnable")
    for name in ("mem_decay", "syn_decay"):
        decay = spec.parameters.get(name)
        if decay is None:
            continue
        if decay.raw == "value" and spec.clamp == "none" and not ((decay.value >= 0) & (decay.value <= 1)).all():
            own = "alpha" if name == "syn_decay" else "beta"
            building.cannot(name, float(decay.value.max()), f"snnTorch clamps {own} to [0, 1]", "a decay in [0, 1]")
        if decay.raw not in ("value", "clamped") and decay.learnable:
            own = "alpha" if name == "syn_decay" else "beta"
            building.note(name, f"learned as {own}, in the source as {decay.raw}", gradient="reparametrised")
    threshold = spec.parameters.get("threshold")
    if threshold is not None and threshold.raw != "value" and threshold.learnable:
        building.note(
            "threshold", f"learned itself, in the source through a {threshold.raw}", gradient="reparametrised"
        )


def _plain(spec: NeuronSpec) -> bool:
    """Whether a stock class has everything but, perhaps, the reset."""
    if spec.output != "spikes" or spec.spike_count != "single" or spec.clamp != "none":
        return False
    gain = "value" if spec.form == "snntorch.Lapicque" else "one"
    return spec.input_gain == gain and spec.synapse in _CLASSES


def _ours(spec: NeuronSpec, building: Building) -> nn.Module:
    """A subclass of ours that computes the spec, in the first of `_FORMS` that has all its choices."""
    own = {name: p for name, p in spec.parameters.items() if name not in _NEUTRAL}
    scale = spec.parameters.get("spike_scale")
    if scale is not None and spec.clamp == "before_spikes":
        own["spike_scale"] = scale
    elif scale is not None and not scale.fixed_at(1.0):
        why = "snnTorch has it only with its own resets"
        raise building.impossible("spike_scale", str(scale), why, "spike_scale=1, not learnable, or to='tracetorch'")
    reasons = []
    for name in _FORMS:
        form = spec.replace(form=name, dt=None, time_unit=None, parameters=_values(spec, own))
        try:
            check_form(form)
        except SpecError as error:
            reasons.append(str(error))
            continue
        made = _OURS.get(spec.synapse)
        if made is None:
            break
        text = "the reset acts once, in the spike's step" if spec.output == "spikes" else "the output is the membrane"
        text = "the membrane has a lower bound" if spec.clamp != "none" else text
        building.note(
            "reset" if spec.clamp == "none" else "clamp",
            f"custom class tracetorch.adapters.snntorch.{made.__name__}: {text}",
        )
        if isinstance(spec.surrogate, OpaqueSurrogate):
            building.note("surrogate", f"{spec.surrogate}: your own callable, carried as it is", gradient="opaque")
        layer: nn.Module = made(form)
        return layer
    why = reasons[0] if reasons else "no neuron of snnTorch has it"
    raise building.impossible("reset", spec.reset, f"{spec.reset_timing}: {why}", "to='tracetorch'")


def _values(spec: NeuronSpec, own: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Parameters by their values; a clamped one keeps its raw form, which the layer computes."""
    found = {}
    for name, p in own.items():
        keep = p.raw == "clamped"
        found[name] = p if keep else Parameter(value_of(spec, name).detach().numpy(), p.learnable)
    return found


def _stock_only(spec: NeuronSpec, building: Building) -> tuple[str, bool]:
    """The nearest stock reset, for `stock=True`; refuses what differs."""
    remedy = "stock=False"
    if spec.output != "spikes" or spec.synapse not in _CLASSES:
        field = "output" if spec.output != "spikes" else "synapse"
        raise building.impossible(field, getattr(spec, field), "no stock neuron of snnTorch has it", remedy)
    if spec.spike_count != "single":
        building.cannot("spike_count", spec.spike_count, "snntorch.Leaky emits one spike a step", remedy)
    if spec.input_gain != "one" and not (spec.form == "snntorch.Lapicque" and spec.input_gain == "value"):
        building.cannot("input_gain", spec.input_gain, "snntorch.Leaky adds its input as it is", remedy)
    if spec.clamp != "none":
        building.cannot("clamp", spec.clamp, "snntorch.Leaky has no lower bound", remedy)
    mechanism = _mechanism(spec)
    if mechanism is None:
        building.cannot(
            "reset", spec.reset, "snntorch.Leaky has no such reset that acts in the spike's own step", remedy
        )
        mechanism = ("zero" if "value" in spec.reset else "subtract", True)
    return mechanism


def _threshold(spec: NeuronSpec, building: Building) -> Tensor:
    threshold = value_of(spec, "threshold")
    if spec.parameters["threshold"].learnable and not spec.threshold_gradient:
        building.note("threshold", "its gradient also comes through the spikes", gradient="differs")
    if building.stock and spec.comparison == ">=":
        building.note("comparison", "u >= threshold as u > the next smaller float")
        threshold = torch.nextafter(threshold, torch.full_like(threshold, -torch.inf))
        if spec.parameters["threshold"].learnable:
            building.cannot("comparison", ">=", "a learnable threshold cannot be kept one float lower", "stock=False")
    return threshold


def _decay(spec: NeuronSpec, name: str) -> Tensor:
    """As snnTorch holds it: clamped in its forward pass. A membrane that does not decay has a beta of 1."""
    parameter = spec.parameters.get(name)
    if parameter is None:
        like = spec.parameters["threshold"].value
        return torch.ones((), dtype=torch.from_numpy(like.copy()).dtype)
    return torch.from_numpy(parameter.value.copy()) if parameter.raw == "clamped" else value_of(spec, name)


def _learnable(spec: NeuronSpec, name: str) -> bool:
    return name in spec.parameters and spec.parameters[name].learnable


def _set_factor(layer: Any, spec: NeuronSpec) -> None:
    """Synaptic, Lapicque and Alpha have a graded_spikes_factor that their constructors do not take."""
    if "spike_scale" not in spec.parameters:
        return
    factor = value_of(spec, "spike_scale")
    del layer.graded_spikes_factor
    layer._graded_spikes_buffer(factor, spec.parameters["spike_scale"].learnable)


def _delta_leaky(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `DeltaLeaky`, whose call always returns a tuple; without `stock` a class of ours, which does not."""
    spec = formed(spec.replace(form="snntorch.DeltaLeaky"), building)
    if not building.stock:
        return computed(spec, building)
    decay, threshold = spec.parameters["mem_decay"], spec.parameters["threshold"]
    for name, parameter in (("mem_decay", decay), ("threshold", threshold)):
        if parameter.raw != "value":
            raise building.impossible(name, parameter.raw, "DeltaLeaky computes with the number itself", "stock=False")
    delta = value_of(spec, "threshold")
    made: nn.Module = snntorch.DeltaLeaky(
        nn.Parameter(delta) if threshold.learnable else delta,
        beta=value_of(spec, "mem_decay"),
        spike_grad=_spike_grad(spec, building),
        learn_beta=decay.learnable,
        init_hidden=True,
    )
    building.note("form", "a call of DeltaLeaky returns a tuple, whatever `output` says")
    return made


def _stock_layer(spec: NeuronSpec, building: Building, mechanism: tuple[str, bool]) -> nn.Module:
    """One of snnTorch's own classes, with `init_hidden=True`."""
    lapicque = spec.form == "snntorch.Lapicque" and spec.input_gain == "value"
    cls = snntorch.Lapicque if lapicque else _CLASSES[spec.synapse]
    grad = _spike_grad(spec, building)
    arguments: dict[str, Any] = {
        "beta": torch.tensor(0.5) if lapicque else _decay(spec, "mem_decay"),
        "threshold": _threshold(spec, building),
        "spike_grad": grad,
        "init_hidden": True,
        "learn_beta": not lapicque and _learnable(spec, "mem_decay"),
        "learn_threshold": _learnable(spec, "threshold"),
        "reset_mechanism": mechanism[0],
    }
    if cls in (snntorch.Leaky, snntorch.Synaptic):
        arguments["reset_delay"] = mechanism[1]
    if cls in (snntorch.Synaptic, snntorch.Alpha):
        arguments["alpha"] = _decay(spec, "syn_decay")
        if cls is snntorch.Synaptic:
            arguments["learn_alpha"] = _learnable(spec, "syn_decay")
        elif _learnable(spec, "syn_decay"):
            building.cannot("syn_decay", "learnable", "Alpha's learn_alpha raises (1.0.0)", "a constant alpha")
    arguments |= {"inhibition": spec.inhibition == "winner", "state_quant": state_quant(spec, building)}
    if cls is snntorch.Leaky:
        scale = spec.parameters.get("spike_scale")
        one = torch.ones((), dtype=arguments["threshold"].dtype)
        arguments["graded_spikes_factor"] = one if scale is None else value_of(spec, "spike_scale")
        arguments["learn_graded_spikes_factor"] = scale is not None and scale.learnable
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Inhibition is an unstable feature")  # of the source, which has it
        layer: Any = cls(**arguments)
    if cls is not snntorch.Leaky:
        _set_factor(layer, spec)
    if lapicque:
        set_rc(layer, spec, building)
    if isinstance(grad, SpikeGrad):
        grad.layer = layer
    made: nn.Module = layer
    return made


def build(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `Leaky`, `Synaptic`, `Lapicque` or `Alpha`; where the stock class has no such step, our subclass of it."""
    spec = simplified(spec)
    if rare(spec) and building.stock:
        raise refuse(spec, building, "snnTorch")
    if rare(spec) or (spec.form == "brainpy.LIF" and not building.stock):
        return computed(spec, building)
    if spec.spike_test == "change":
        return _delta_leaky(spec, building)
    _refuse(spec, building)
    note_quirks(spec, building)
    if not building.stock and not (_plain(spec) and _mechanism(spec) is not None):
        return _ours(spec, building)
    return _stock_layer(spec, building, _stock_only(spec, building))
