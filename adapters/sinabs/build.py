"""sinabs: building its neurons from specs (sinabs 3.1.3)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from sinabs import activation
from sinabs import layers as sl
from torch import Tensor, nn

from tracetorch.adapters.base import Building, note_quirks, refuse_rare, value_of
from tracetorch.adapters.simplify import rare, refuse, simplified
from tracetorch.adapters.sinabs.computed import computed
from tracetorch.adapters.sinabs.layers import ALIF, IAF, LIF, SURROGATES, ExpLeak, Reset, Spike, SurrogateGradient
from tracetorch.adapters.sinabs.read import attributes
from tracetorch.core.spec import NeuronSpec, Parameter
from tracetorch.functional.surrogates import OpaqueSurrogate

_BEFORE = ("decay_then_add", "moving_average")


def _clamps(spec: NeuronSpec, building: Building) -> bool:
    """Whether the layer must keep trained alphas in [0, 1] itself."""
    decays = [spec.parameters[name] for name in ("mem_decay", "syn_decay") if name in spec.parameters]
    return not building.stock and any(decay.raw == "clamped" and decay.learnable for decay in decays)


def _decay_arguments(spec: NeuronSpec, building: Building) -> tuple[bool, dict[str, Tensor]]:
    """`train_alphas`, and the raw tensors by sinabs's names."""
    names = ("mem_decay", "syn_decay", "adapt_decay")
    decays = {name: spec.parameters[name] for name in names if name in spec.parameters}
    train_alphas = not all(decay.raw == "exp_tau" for decay in decays.values())
    tensors = {}
    for name, decay in decays.items():
        tensor = torch.from_numpy(decay.value.copy())
        if train_alphas:
            if decay.raw == "clamped" and decay.learnable and building.stock:
                building.note(
                    name, "sinabs does not clamp alpha to [0, 1], as the source does: equal while it stays inside"
                )
            if decay.raw not in ("value", "clamped") and decay.learnable:
                building.note(name, f"learned as alpha, in the source as {decay.raw}", gradient="reparametrised")
            if decay.raw != "clamped" or not _clamps(spec, building):
                tensor = value_of(spec, name).detach()
        tensors[f"{'alpha' if train_alphas else 'tau'}_{name.removesuffix('_decay')}"] = tensor
    return train_alphas, tensors


def _surrogate_argument(spec: NeuronSpec, building: Building) -> Any:
    """`surrogate_grad_fn`."""
    assert spec.surrogate is not None
    stock = {ours: cls for cls, (ours, _) in SURROGATES.items()}.get(spec.surrogate.name)
    if stock is not None:
        return stock(**dict(spec.surrogate.parameters))
    if isinstance(spec.surrogate, OpaqueSurrogate):
        building.note("surrogate", f"{spec.surrogate}: your own callable, carried as it is", gradient="opaque")
        return spec.surrogate.function if spec.surrogate.kind == "membrane" else SurrogateGradient(spec.surrogate)
    if building.stock:
        building.note(
            "surrogate", f"{spec.surrogate} is not in sinabs; SingleExponential in its place", gradient="differs"
        )
        return activation.SingleExponential()
    building.note("surrogate", f"custom callable: {spec.surrogate}")
    return SurrogateGradient(spec.surrogate)


def _spike_arguments(spec: NeuronSpec, building: Building) -> tuple[Any, Any]:
    """`spike_fn` and `surrogate_grad_fn`."""
    threshold = spec.parameters["threshold"]
    if threshold.raw != "value" and threshold.learnable:
        building.note(
            "threshold", f"learned itself, in the source through a {threshold.raw}", gradient="reparametrised"
        )
    through = spec.threshold_gradient and (threshold.learnable or spec.adaptive)
    surrogate = _surrogate_argument(spec, building)
    function: Any = {
        "single": activation.SingleSpike,
        "multiple": activation.MultiSpike,
        "limited": activation.MaxSpike(spec.max_spikes),
    }[spec.spike_count]
    if building.stock:
        if through:
            building.note("threshold", "sinabs passes no gradient from the spikes to the threshold", gradient="differs")
        if spec.comparison == ">":
            if threshold.learnable or spec.adaptive:
                building.cannot(
                    "comparison", ">", "a threshold that changes cannot be kept one float higher", "stock=False"
                )
            building.note("comparison", "u > threshold as u >= the next larger float")
        return function, surrogate
    floor = spec.clamp == "before_spikes"
    if floor or spec.comparison == ">" or through or isinstance(surrogate, SurrogateGradient):
        building.note("comparison", f"custom spike_fn: {spec.spike_count}, spike where u {spec.comparison} threshold")
        return Spike(spec.spike_count, spec.comparison == ">", spec.max_spikes, through, floor), surrogate
    return function, surrogate


def _reset_to_value(spec: NeuronSpec, building: Building) -> Any:
    """`MembraneReset` sets to 0, detached; everything else is a reset of ours."""
    value = spec.parameters["reset_value"]
    if spec.reset == "add_value":
        return activation.MembraneReset(_plain(spec, "reset_value", building))
    if value.fixed_at(0.0):
        if spec.reset_gradient == "detached":
            return activation.MembraneReset(0.0)
        if building.stock:
            building.note("reset_gradient", "MembraneReset detaches the reset, the source keeps it", gradient="differs")
            return activation.MembraneReset(0.0)
    if building.stock:
        raise building.impossible("reset_value", str(value), "sinabs resets to 0", "stock=False")
    _plain(spec, "reset_value", building)
    building.note("reset", f"custom reset_fn: to {value}, {spec.reset_gradient}")
    amount = None if value.fixed_at(0.0) else value_of(spec, "reset_value")
    return Reset("value", gradient=spec.reset_gradient, amount=amount)


def _reset_argument(spec: NeuronSpec, building: Building) -> Any:
    """`reset_fn`; sinabs resets in the spike's own step, attached to the graph, except for `MembraneReset`."""
    if spec.reset == "none":
        return activation.MembraneSubtract(0.0) if building.stock else Reset("none")
    if spec.reset_timing == "same_step_residual" and spec.reset == "subtract":
        building.cannot(
            "reset_timing",
            spec.reset_timing,
            "snnTorch's reset_delay=False subtracts again from a membrane still above the threshold before the next "
            "spike test; sinabs sees only the present membrane",
            "reset_delay=True in the source, or to='tracetorch'",
        )
    if spec.reset_timing == "next_step_discards_input":
        raise building.impossible(
            "reset_timing",
            spec.reset_timing,
            "sinabs resets in the spike's own step, and the next one takes its input",
            "reset_delay=False in the source, or to='tracetorch'",
        )
    if spec.reset in ("add_value", "value"):
        alike = spec.spike_count == "single" and spec.parameters["reset_value"].fixed_at(0.0)
        if spec.reset_timing == "same_step_residual" and not alike:
            why = "sinabs resets once, to the value itself, however many spikes there are"
            raise building.impossible("reset_timing", spec.reset_timing, why, "reset_timing='same_step'")
        return _reset_to_value(spec, building)
    return _subtraction(spec, building)


def _subtraction(spec: NeuronSpec, building: Building) -> Any:
    detached, p = spec.reset_gradient == "detached", spec.parameters
    later = spec.reset_timing == "next_step_after_decay" and spec.decay != "none"
    if spec.reset_amount == "value":
        if later:
            why = "subtracted after the decay, which sinabs could only do as reset_amount / alpha"
            raise building.impossible("reset_timing", spec.reset_timing, why, "to='tracetorch'")
        amount = _plain(spec, "reset_amount", building)
        if not detached:
            return activation.MembraneSubtract(amount)
        if building.stock:
            building.note("reset_gradient", "the reset stays in the graph; the source detaches it", gradient="differs")
            return activation.MembraneSubtract(amount)
        building.note("reset", "custom reset_fn: subtracts a constant, detached")
        return Reset("subtract", gradient="detached", amount=value_of(spec, "reset_amount"))
    over_decay = spec.reset_amount == "threshold_over_decay" or later
    if over_decay and not value_of(spec, "mem_decay").all():
        why = "subtracted after the decay, which sinabs could only do as threshold / alpha"
        raise building.impossible("mem_decay", 0.0, why, "a decay above 0, or to='tracetorch'")
    if not building.stock:
        if not over_decay and not detached:
            return activation.MembraneSubtract()
        text = "threshold / alpha, live" if over_decay else "threshold"
        building.note("reset", f"custom reset_fn: subtracts {text}{', detached' if detached else ''}")
        return Reset("subtract", over_decay, "detached" if detached else "attached")
    if detached:
        building.note("reset_gradient", "the reset stays in the graph; the source detaches it", gradient="differs")
    if not over_decay and spec.comparison == ">=":
        return activation.MembraneSubtract()
    if (over_decay and p["mem_decay"].learnable) or p["threshold"].learnable:
        building.cannot(
            "reset_amount", "threshold / alpha", "a stock MembraneSubtract does not follow training", "stock=False"
        )
    threshold = value_of(spec, "threshold")
    return activation.MembraneSubtract(threshold / value_of(spec, "mem_decay") if over_decay else threshold)


def _plain(spec: NeuronSpec, name: str, building: Building) -> Any:
    """A constant argument: a float where it is one, so that it prints and compares as users write it."""
    if spec.parameters[name].learnable:
        building.cannot(name, "learnable", "sinabs keeps it as a constant", "to='tracetorch'")
    value = value_of(spec, name)
    return value.item() if value.ndim == 0 else value


def _refuse(spec: NeuronSpec, building: Building) -> None:
    """What no sinabs neuron and no subclass of ours computes."""
    if spec.synapse not in ("none", "add_then_decay", *_BEFORE):
        raise building.impossible("synapse", spec.synapse, "sinabs adds the input before the decay", "to='tracetorch'")
    if spec.decay != "geometric" and spec.adaptive:
        why = "sinabs.layers.ALIF decays by its alpha or tau"
        raise building.impossible("decay", spec.decay, why, "a spec with a mem_decay (of 1, for none)")
    kept = spec.parameters if not spec.adaptive else {n: p for n, p in spec.parameters.items() if n[:6] != "adapt_"}
    refuse_rare(spec.replace(parameters=kept), building, "sinabs")
    for name, neutral in (("spike_scale", 1.0), ("bias", 0.0), ("leak", 0.0)):
        parameter = spec.parameters.get(name)
        if parameter is not None and not parameter.fixed_at(neutral):
            remedy = f"{name}={neutral:g}, not learnable, in the source, or to='tracetorch'"
            raise building.impossible(name, str(parameter), f"sinabs.layers.LIF has only {neutral:g}", remedy)
    if spec.reset_gradient == "membrane_stopped" and (spec.reset != "value" or building.stock):
        why = "its reset functions keep or cut the spike, not the membrane"
        raise building.impossible("reset_gradient", spec.reset_gradient, why, "another reset in the source")
    low = spec.parameters.get("min_v_mem")
    raised = low is not None and not low.fixed_at(0.0)
    if spec.clamp == "before_spikes" and (building.stock or spec.adaptive or raised):
        why = "sinabs bounds the membrane after the spike test"
        raise building.impossible("clamp", spec.clamp, why, "stock=False, min_v_mem=0 and a threshold that is fixed")
    if spec.clamp == "before_spikes" and spec.output == "membrane":
        why = "sinabs emits the membrane before its lower bound"
        raise building.impossible("clamp", spec.clamp, why, "clamp='after_reset', or to='tracetorch'")
    _refuse_input(spec, building)


def _refuse_input(spec: NeuronSpec, building: Building) -> None:
    if spec.synapse in _BEFORE and building.stock:
        why = "sinabs's synapse decays its input too: with stock parts, fold 1 / alpha_syn into the weights before it"
        raise building.impossible("synapse", spec.synapse, why, "stock=False, which has a synapse of its own")
    if spec.input_gain == "one_minus_decay_kept" and not spec.adaptive:
        why = "of sinabs's neurons only ALIF keeps (1 - alpha)*i in the place of i"
        raise building.impossible("input_gain", spec.input_gain, why, "to='tracetorch'")
    if spec.input_gain == "value":
        if building.stock or spec.synapse != "none" or spec.adaptive or spec.parameters["input_gain"].learnable:
            why = "sinabs has a gain of 1 or 1 - alpha"
            raise building.impossible("input_gain", "value", why, "stock=False, a constant gain, and no synapse")
        building.note("input_gain", "custom class tracetorch.adapters.sinabs.LIF: the input times a constant")


def build(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `LIF`, `IAF`, `ExpLeak` or `ALIF`; where something must follow training or copies, our subclass of it."""
    spec = simplified(spec)
    if rare(spec):
        if building.stock:
            raise refuse(spec, building, "sinabs")
        return computed(spec, building)
    _refuse(spec, building)
    note_quirks(spec, building)
    spikes: dict[str, Any] = {}
    if spec.spike_count != "none":
        function, surrogate = _spike_arguments(spec, building)
        spikes = {"spike_fn": function, "surrogate_grad_fn": surrogate, "reset_fn": _reset_argument(spec, building)}
        threshold = value_of(spec, "threshold")
        if building.stock and spec.comparison == ">":
            threshold = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
        spikes["spike_threshold"] = threshold
    train_alphas, decays = _decay_arguments(spec, building)
    if spec.adaptive:
        layer = _alif(spec, building, spikes, train_alphas)
    elif spec.decay == "none":
        layer = _iaf(spec, building, spikes, train_alphas, decays)
    else:
        layer = _lif(spec, building, spikes, train_alphas)
    for name, tensor in decays.items():
        setattr(layer, name, nn.Parameter(tensor))
    for name, attribute in attributes(layer).items():
        own = getattr(layer, attribute)
        if name in spec.parameters and isinstance(own, nn.Parameter):
            own.requires_grad_(spec.parameters[name].learnable)
    return layer


def _chosen(ours: Any, stock: Any, custom: bool, building: Building) -> Callable[..., nn.Module]:
    """The class: ours where a copy would not be faithful."""
    if custom and building.stock:
        building.note("learnable", "a copy.deepcopy by sinabs itself makes frozen parameters trainable")
    made: Callable[..., nn.Module] = ours if custom and not building.stock else stock
    return made


def _frozen(spec: NeuronSpec) -> bool:
    names = ("mem_decay", "syn_decay", "adapt_decay")
    return not all(spec.parameters[name].learnable for name in names if name in spec.parameters)


def _low(spec: NeuronSpec) -> Tensor | None:
    return value_of(spec, "min_v_mem").detach() if "min_v_mem" in spec.parameters else None


def _lif(spec: NeuronSpec, building: Building, spikes: dict[str, Any], train_alphas: bool) -> nn.Module:
    norm, low = spec.input_gain == "one_minus_decay", _low(spec)
    before, gain = spec.synapse in _BEFORE, spec.input_gain == "value"
    custom = isinstance(spikes.get("reset_fn"), Reset) or _frozen(spec) or _clamps(spec, building) or before or gain
    if spec.spike_count == "none" and spec.synapse == "none" and not (_clamps(spec, building) or gain):
        leak: Any = _chosen(ExpLeak, sl.ExpLeak, custom, building)
        return leak(tau_mem=1.0, train_alphas=train_alphas, min_v_mem=low, norm_input=norm)
    if spec.spike_count == "none":
        spikes = {"spike_fn": None}
    if before:
        building.note("synapse", f"custom class tracetorch.adapters.sinabs.LIF: a synapse before it, {spec.synapse}")
    ours = functools.partial(
        LIF,
        clamp_alpha=_clamps(spec, building),
        synapse=spec.synapse if before else "add_then_decay",
        input_gain=value_of(spec, "input_gain") if gain else None,
    )
    return _chosen(ours, sl.LIF, custom, building)(
        tau_mem=1.0,
        tau_syn=1.0 if spec.synapse != "none" else None,
        min_v_mem=low,
        train_alphas=train_alphas,
        norm_input=norm,
        **spikes,
    )


def _iaf(
    spec: NeuronSpec, building: Building, spikes: dict[str, Any], train_alphas: bool, decays: dict[str, Tensor]
) -> nn.Module:
    """`IAF`; where its tau_syn does not do, or there is no spike, a `LIF` with alpha_mem held at 1."""
    own_synapse = spec.synapse in ("none", "add_then_decay") and not (spec.synapse != "none" and train_alphas)
    if spec.input_gain == "one" and own_synapse and spec.spike_count != "none":
        custom = isinstance(spikes["reset_fn"], Reset) or _frozen(spec)
        tau_syn = 1.0 if spec.synapse != "none" else None
        return _chosen(IAF, sl.IAF, custom, building)(tau_syn=tau_syn, min_v_mem=_low(spec), **spikes)
    if spec.input_gain == "one_minus_decay":
        raise building.impossible(
            "input_gain", spec.input_gain, "1 - alpha is 0 where nothing decays", "to='tracetorch'"
        )
    building.note("decay", "sinabs.layers.LIF with alpha_mem held at 1")
    dtype = torch.float32 if not decays else next(iter(decays.values())).dtype
    held = {**spec.parameters, "mem_decay": Parameter(torch.ones((), dtype=dtype).numpy())}
    train, tensors = _decay_arguments(spec.replace(decay="geometric", parameters=held), building)
    decays.clear()
    decays.update(tensors)
    return _lif(spec.replace(decay="geometric", parameters=held), building, spikes, train)


def _alif(spec: NeuronSpec, building: Building, spikes: dict[str, Any], train_alphas: bool) -> nn.Module:
    scale, threshold = spec.parameters["adapt_scale"], spec.parameters["threshold"]
    if scale.learnable or threshold.learnable:
        building.cannot(
            "adapt_scale", "learnable", "sinabs.layers.ALIF holds it and its threshold as constants", "to='tracetorch'"
        )
    custom = isinstance(spikes["reset_fn"], Reset) or _frozen(spec) or spec.input_gain == "one"
    custom = custom or (train_alphas and spec.synapse == "none")
    if _clamps(spec, building):
        raise building.impossible("mem_decay", "clamped", "sinabs.layers.ALIF does not clamp alpha", "to='tracetorch'")
    low = spec.parameters.get("min_v_mem")
    return _chosen(ALIF, sl.ALIF, custom, building)(
        tau_mem=1.0,
        tau_adapt=1.0,
        tau_syn=1.0 if spec.synapse != "none" else None,
        adapt_scale=_plain(spec, "adapt_scale", building),
        min_v_mem=None if low is None else _plain(spec, "min_v_mem", building),
        train_alphas=train_alphas,
        norm_input=spec.input_gain != "one",
        **spikes,
    )
