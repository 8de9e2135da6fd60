"""sinabs: `sinabs.layers.LIF` as source and target (sinabs 3.1.3).

Equations, alpha = exp(-1/tau_mem) or the trained alpha_mem, input [B, T, ...]:

    i = alpha_syn*(i + x) with tau_syn, else x;   u = (1-alpha)*i with norm_input, else i
    v = alpha*v + u;   s = spike_fn(v, threshold);   v = reset_fn(s, v, threshold);   v = relu(v - min) + min
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sinabs import activation
from sinabs import layers as sl
from torch import Tensor, nn

from tracetorch.adapters import modules as known
from tracetorch.adapters.base import Building, readable, value_of
from tracetorch.adapters.modules import nested
from tracetorch.core.raw import from_raw
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.functional.spikes import heaviside, spike_count
from tracetorch.functional.surrogates import Surrogate

NAME = "sinabs"
STEPPED = False

# sinabs.activation class -> (our name, its fields in the order of ours)
_SURROGATES: Mapping[type, tuple[str, tuple[str, ...]]] = {
    activation.SingleExponential: ("single_exponential", ("grad_width", "grad_scale")),
    activation.Heaviside: ("heaviside_window", ("window",)),
    activation.Gaussian: ("gaussian", ("mu", "sigma", "grad_scale")),
    activation.MultiGaussian: ("multi_gaussian", ("mu", "sigma", "h", "s", "grad_scale")),
    activation.PeriodicExponential: ("periodic_exponential", ("grad_width", "grad_scale")),
}


class SurrogateGradient:
    """A `surrogate_grad_fn` that sinabs has not."""

    def __init__(self, surrogate: Surrogate) -> None:
        self.surrogate = surrogate

    def __call__(self, v_mem: Tensor, spike_threshold: Tensor) -> Tensor:
        """ds/dv at a membrane, any shape."""
        return self.surrogate.vjp(torch.ones_like(v_mem), v_mem - spike_threshold, spike_threshold, v_mem)

    def __repr__(self) -> str:
        return f"SurrogateGradient({self.surrogate})"


class Spike:
    """A `spike_fn` that sinabs has not: a strict comparison, or a gradient that also reaches the threshold.

    Args:
        count: "single", "multiple" or "limited", as in `NeuronSpec.spike_count`.
        strict: with "single", a spike where v > threshold; else where v >= threshold.
        limit: with "limited", the most spikes a step.
        threshold_gradient: whether the surrogate's gradient reaches the threshold too (in sinabs it does not).
    """

    required_states = ("v_mem",)

    def __init__(self, count: str, strict: bool, limit: int | None, threshold_gradient: bool) -> None:
        self.count, self.strict, self.limit, self.threshold_gradient = count, strict, limit, threshold_gradient

    def apply(self, v_mem: Tensor, spike_threshold: Tensor, surrogate_grad_fn: SurrogateGradient | Any) -> Tensor:
        """As the `apply` of sinabs's spike functions."""
        surrogate = _surrogate(surrogate_grad_fn)
        z = v_mem - (spike_threshold if self.threshold_gradient else spike_threshold.detach())
        if self.count == "single":
            return heaviside(z, spike_threshold.detach(), surrogate, strict=self.strict, v=v_mem)
        return spike_count(v_mem, spike_threshold.detach(), z, surrogate, limit=self.limit)

    def __repr__(self) -> str:
        sign = ">" if self.strict else ">="
        return f"Spike({self.count}, {sign}, limit={self.limit}, threshold_gradient={self.threshold_gradient})"


class Reset:
    """A `reset_fn` that sinabs has not. Holds the layer it serves: an amount of threshold / alpha follows its training.

    Args:
        kind: "none", "subtract" or "value" (to 0), as in `NeuronSpec.reset`.
        over_decay: subtract threshold / alpha, which the next decay turns into the threshold.
        detached: whether the spikes are constants in the backward pass.
    """

    def __init__(self, kind: str, over_decay: bool, detached: bool) -> None:
        self.kind, self.over_decay, self.detached = kind, over_decay, detached
        self.layer: sl.LIF | None = None

    def __call__(self, spikes: Tensor, state: dict[str, Tensor], threshold: Tensor) -> dict[str, Tensor]:
        """As sinabs's reset functions: the state after the reset."""
        if self.kind == "none":
            return state.copy()
        v = state["v_mem"]
        # Spikes are float32 whatever the membrane is; times a threshold of no dimension they would round to float32.
        s = (spikes.detach() if self.detached else spikes).to(v.dtype)
        if self.kind == "value":
            once = s if self.single else s + (s.clamp(max=1) - s).detach()
            return {**state, "v_mem": v - once * v}
        if self.over_decay:
            assert self.layer is not None
            threshold = threshold / self.layer.alpha_mem_calculated
        return {**state, "v_mem": v - s * threshold}

    def serving(self, layer: sl.LIF) -> Reset:
        """The same reset for another layer."""
        twin = copy.copy(self)
        twin.layer = layer
        return twin

    @property
    def single(self) -> bool:
        """Whether the layer emits at most one spike a step."""
        assert self.layer is not None
        return _spike_choices(self.layer)["spike_count"] == "single"

    def __repr__(self) -> str:
        amount = ", threshold / alpha" if self.over_decay else ""
        return f"Reset({self.kind}{amount}{', detached' if self.detached else ''})"


class LIF(sl.LIF):
    """A `sinabs.layers.LIF` that copies faithfully.

    sinabs 3.1.3 copies a layer by constructing it anew from its arguments: the copy shares `reset_fn` with the
    original, forgets what was frozen (`requires_grad`) and the training mode. This subclass changes that.

    Args:
        clamp_alpha: keep a trained alpha_mem in [0, 1] in the forward pass, as snnTorch does with its beta.
    """

    def __init__(self, *, clamp_alpha: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clamp_alpha = clamp_alpha
        reset_fn: Any = kwargs.get("reset_fn")
        if isinstance(reset_fn, Reset):
            self.reset_fn = reset_fn.serving(self)

    @property
    def alpha_mem_calculated(self) -> Tensor:
        """The decay of the membrane in one step."""
        alpha: Tensor = super().alpha_mem_calculated
        return alpha.clamp(0, 1) if self.clamp_alpha else alpha

    @property
    def _param_dict(self) -> dict[str, Any]:
        return {**super()._param_dict, "clamp_alpha": self.clamp_alpha}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> LIF:
        twin: LIF = super().__deepcopy__(memo)
        for name, parameter in self.named_parameters():
            getattr(twin, name).requires_grad_(parameter.requires_grad)
        return twin.train(self.training)


class PerStep(nn.Module):
    """Calls a stateless module once per time step of [B, T, ...]: for modules whose result depends on the batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, ...] -> [B, T, ...]."""
        return torch.stack([self.module(step) for step in x.unbind(1)], 1)


def is_neuron(module: nn.Module) -> bool:
    """Any stateful layer of sinabs."""
    return isinstance(module, sl.StatefulLayer)


def _surrogate(function: Any) -> Surrogate:
    if isinstance(function, SurrogateGradient):
        return function.surrogate
    if type(function) in _SURROGATES:
        name, fields = _SURROGATES[type(function)]
        return Surrogate(name, tuple((field, float(getattr(function, field))) for field in fields))
    names = ", ".join(cls.__name__ for cls in _SURROGATES)
    raise SpecError(f"surrogate_grad_fn={function!r}: only sinabs.activation's {names} can be read, as they are")


def _spike_choices(layer: Any) -> dict[str, Any]:
    function = layer.spike_fn
    if isinstance(function, Spike):
        choices: dict[str, Any] = {"spike_count": function.count, "comparison": ">" if function.strict else ">="}
        return {**choices, "max_spikes": function.limit, "threshold_gradient": function.threshold_gradient}
    choices = {"comparison": ">=", "threshold_gradient": False}
    if function is activation.SingleSpike:
        return {**choices, "spike_count": "single"}
    if function is activation.MultiSpike:
        return {**choices, "spike_count": "multiple"}
    if type(function) is activation.MaxSpike:
        limit = function.max_num_spikes_per_bin
        return (
            {**choices, "spike_count": "multiple"}
            if limit is None
            else {**choices, "spike_count": "limited", "max_spikes": limit}
        )
    raise SpecError(f"spike_fn={function!r}: only SingleSpike, MultiSpike and MaxSpike can be read")


def _as_parameter(value: Any, layer: Any) -> Parameter:
    dtype = layer.spike_threshold.dtype
    tensor = torch.as_tensor(value, dtype=dtype if dtype.is_floating_point else torch.get_default_dtype())
    return Parameter(tensor.detach().cpu().numpy(), tensor.requires_grad)


def _reset_choices(layer: Any) -> tuple[dict[str, Any], dict[str, Parameter]]:
    function = layer.reset_fn
    if isinstance(function, Reset):
        zero = {"reset_value": _as_parameter(0.0, layer)} if function.kind == "value" else {}
        choices = {"reset": function.kind, "reset_gradient": "detached" if function.detached else "attached"}
        choices["reset_amount"] = "threshold_over_decay" if function.over_decay else "threshold"
        return choices, zero
    if type(function) is activation.MembraneSubtract:
        if function.subtract_value is None:
            return {"reset": "subtract"}, {}
        amount = {"reset_amount": _as_parameter(function.subtract_value, layer)}
        return {"reset": "subtract", "reset_amount": "value"}, amount
    if type(function) is activation.MembraneReset:
        value = {"reset_value": _as_parameter(function.reset_value, layer)}
        return {"reset": "add_value", "reset_gradient": "detached"}, value
    raise SpecError(f"reset_fn={function!r}: only MembraneSubtract and MembraneReset can be read, as they are")


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """Read a `sinabs.layers.LIF`.

    Raises:
        SpecError: another class, or a `spike_fn`, `reset_fn` or `surrogate_grad_fn` of one's own.
    """
    if type(layer) not in (sl.LIF, LIF):
        cls = type(layer)
        raise SpecError(
            f"{cls.__module__}.{cls.__qualname__}: of sinabs's neurons only LIF can be read in this version"
        )
    source: Any = layer
    own = attributes(layer)
    raws = dict.fromkeys(("mem_decay", "syn_decay"), "value" if source.train_alphas else "exp_tau")
    if getattr(source, "clamp_alpha", False):
        raws["mem_decay"] = "clamped"
    values = {name: readable(layer, attribute, raws.get(name, "value")) for name, attribute in own.items()}
    choices: dict[str, Any] = {
        "output": "membrane",
        "spike_count": "none",
        "reset": "none",
        "threshold_gradient": False,
    }
    if source.spike_fn is not None:
        reset, extra = _reset_choices(source)
        values |= extra
        choices = {**_spike_choices(source), **reset, "surrogate": _surrogate(source.surrogate_grad_fn)}
    else:
        values.pop("threshold", None)
    return NeuronSpec(
        form="sinabs.LIF",
        synapse="add_then_decay" if "syn_decay" in own else "none",
        input_gain="one_minus_decay" if source.norm_input else "one",
        clamp="after_reset" if "min_v_mem" in own else "none",
        parameters=values,
        **choices,
    )


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """tau or alpha, the threshold and the clamp."""
    source: Any = layer
    kind = "alpha" if source.train_alphas else "tau"
    names = {"mem_decay": f"{kind}_mem", "syn_decay": f"{kind}_syn"}
    names |= {"threshold": "spike_threshold", "min_v_mem": "min_v_mem"}
    return {name: own for name, own in names.items() if getattr(source, own) is not None}


def states(layer: nn.Module) -> tuple[str, ...]:
    """What a call changes."""
    return ("v_mem", "i_syn", "recordings", "firing_rate", "record_states")


def reset(layer: nn.Module) -> None:
    """Empty buffers: the next call makes them zero in the input's shape."""
    for name, buffer in list(layer.named_buffers()):
        layer.register_buffer(name, torch.zeros(0, dtype=buffer.dtype, device=buffer.device))


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole sequence at once from the zero state, as sinabs runs it."""
    reset(layer)
    source: Any = layer
    recording, source.record_states = source.record_states, True
    try:
        outputs = source(xs.transpose(0, 1)).transpose(0, 1)
        recorded = {name: source.recordings[name].transpose(0, 1) for name in dict(source.named_buffers())}
    finally:
        source.record_states = recording
    return outputs, recorded


def _decay_arguments(spec: NeuronSpec, building: Building) -> tuple[bool, dict[str, Tensor]]:
    """`train_alphas`, and the raw tensors by sinabs's names."""
    decays = {name: spec.parameters[name] for name in ("mem_decay", "syn_decay") if name in spec.parameters}
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
            if not _clamps(spec, building):
                tensor = from_raw(decay.raw, tensor).detach()
        tensors[f"{'alpha' if train_alphas else 'tau'}_{name.removesuffix('_decay')}"] = tensor
    return train_alphas, tensors


def _clamps(spec: NeuronSpec, building: Building) -> bool:
    """Whether the layer must keep a trained alpha in [0, 1] itself."""
    decay = spec.parameters["mem_decay"]
    return decay.raw == "clamped" and decay.learnable and not building.stock


def _spike_arguments(spec: NeuronSpec, building: Building) -> tuple[Any, Any]:
    """`spike_fn` and `surrogate_grad_fn`."""
    assert spec.surrogate is not None
    if spec.parameters["threshold"].raw != "value" and spec.parameters["threshold"].learnable:
        building.note("threshold", "learned itself, in the source through a softplus", gradient="reparametrised")
    stock = {ours: (cls, fields) for cls, (ours, fields) in _SURROGATES.items()}.get(spec.surrogate.name)
    through = spec.threshold_gradient and spec.parameters["threshold"].learnable
    surrogate: Any
    if stock is not None:
        surrogate = stock[0](**dict(spec.surrogate.parameters))
    elif building.stock:
        building.note(
            "surrogate", f"{spec.surrogate} is not in sinabs; SingleExponential in its place", gradient="differs"
        )
        surrogate = activation.SingleExponential()
    else:
        building.note("surrogate", f"custom callable: {spec.surrogate}")
        surrogate = SurrogateGradient(spec.surrogate)
    function: Any = {
        "single": activation.SingleSpike,
        "multiple": activation.MultiSpike,
        "limited": activation.MaxSpike(spec.max_spikes),
    }[spec.spike_count]
    if building.stock:
        if through:
            building.note("threshold", "sinabs passes no gradient from the spikes to the threshold", gradient="differs")
        if spec.comparison == ">":
            if spec.parameters["threshold"].learnable:
                building.cannot(
                    "comparison", ">", "a learnable threshold cannot be kept one float higher", "stock=False"
                )
            building.note("comparison", "u > threshold as u >= the next larger float")
        return function, surrogate
    if spec.comparison == ">" or through or stock is None:
        building.note("comparison", f"custom spike_fn: {spec.spike_count}, spike where u {spec.comparison} threshold")
        return Spike(spec.spike_count, spec.comparison == ">", spec.max_spikes, through), surrogate
    return function, surrogate


def _reset_argument(spec: NeuronSpec, building: Building) -> Any:
    """`reset_fn`; sinabs resets in the spike's own step, attached to the graph, except for `MembraneReset`."""
    detached = spec.reset_gradient == "detached"
    if spec.reset == "none":
        return activation.MembraneSubtract(0.0) if building.stock else Reset("none", False, False)
    if spec.reset_timing == "same_step_residual" and spec.reset == "subtract":
        building.cannot(
            "reset_timing",
            spec.reset_timing,
            "snnTorch's reset_delay=False subtracts again from a membrane still above the threshold before the next "
            "spike test; sinabs sees only the present membrane",
            "reset_delay=True in the source, or to='tracetorch'",
        )
    if spec.reset == "add_value":
        return activation.MembraneReset(_plain(spec.parameters["reset_value"], "reset_value", building))
    if spec.reset == "value":
        if spec.parameters["reset_value"].value.any():
            raise building.impossible("reset_value", spec.parameters["reset_value"].value, "only 0", "to='tracetorch'")
        if detached:
            return activation.MembraneReset(0.0)
        if building.stock:
            building.note("reset_gradient", "MembraneReset detaches the reset, the source keeps it", gradient="differs")
            return activation.MembraneReset(0.0)
        building.note("reset", "custom reset_fn: to 0, attached")
        return Reset("value", False, False)
    if spec.reset_amount == "value":
        if detached:
            raise building.impossible("reset_gradient", "detached", "with an amount of its own", "to='tracetorch'")
        return activation.MembraneSubtract(_plain(spec.parameters["reset_amount"], "reset_amount", building))
    over_decay = spec.reset_amount == "threshold_over_decay" or spec.reset_timing == "next_step_after_decay"
    if over_decay and not value_of(spec, "mem_decay").all():
        why = "subtracted after the decay, which sinabs could only do as threshold / alpha"
        raise building.impossible("mem_decay", 0.0, why, "a decay above 0, or to='tracetorch'")
    if not building.stock:
        if not over_decay and not detached:
            return activation.MembraneSubtract()
        text = "threshold / alpha, live" if over_decay else "threshold"
        building.note("reset", f"custom reset_fn: subtracts {text}{', detached' if detached else ''}")
        return Reset("subtract", over_decay, detached)
    if detached:
        building.note("reset_gradient", "the reset stays in the graph; the source detaches it", gradient="differs")
    p = spec.parameters
    if not over_decay and spec.comparison == ">=":
        return activation.MembraneSubtract()
    if (over_decay and p["mem_decay"].learnable) or p["threshold"].learnable:
        building.cannot(
            "reset_amount", "threshold / alpha", "a stock MembraneSubtract does not follow training", "stock=False"
        )
    threshold = value_of(spec, "threshold")
    return activation.MembraneSubtract(threshold / value_of(spec, "mem_decay") if over_decay else threshold)


def _plain(parameter: Parameter, name: str, building: Building) -> Any:
    """A constant argument: a float where it is one, so that it prints and compares as users write it."""
    if parameter.learnable:
        building.cannot(name, "learnable", "sinabs keeps it as a constant", "to='tracetorch'")
    return parameter.value.item() if parameter.value.ndim == 0 else torch.from_numpy(parameter.value.copy())


def build(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `sinabs.layers.LIF`; where something must follow training or stay frozen in copies, our subclass of it."""
    if spec.synapse not in ("none", "add_then_decay"):
        raise building.impossible("synapse", spec.synapse, "sinabs adds the input before the decay", "to='tracetorch'")
    if spec.decay != "geometric":
        why = "sinabs.layers.LIF decays by its alpha or tau"
        raise building.impossible("decay", spec.decay, why, "a spec with a mem_decay")
    for name, neutral in (("spike_scale", 1.0), ("bias", 0.0), ("leak", 0.0)):
        parameter = spec.parameters.get(name)
        if parameter is not None and ((parameter.value != neutral).any() or parameter.learnable):
            remedy = f"{name}={neutral:g}, not learnable, in the source, or to='tracetorch'"
            raise building.impossible(name, str(parameter), f"sinabs.layers.LIF has only {neutral:g}", remedy)
    if spec.reset_gradient == "membrane_stopped":
        why = "its reset functions keep or cut the spike, not the membrane"
        raise building.impossible("reset_gradient", spec.reset_gradient, why, "another reset in the source")
    if spec.input_gain == "value":
        raise building.impossible("input_gain", "value", "sinabs has 1 or 1 - alpha", "to='tracetorch'")
    train_alphas, decays = _decay_arguments(spec, building)
    arguments: dict[str, Any] = {"spike_fn": None}
    if spec.spike_count != "none":
        function, surrogate = _spike_arguments(spec, building)
        arguments = {"spike_fn": function, "surrogate_grad_fn": surrogate, "reset_fn": _reset_argument(spec, building)}
        threshold = value_of(spec, "threshold")
        if building.stock and spec.comparison == ">":
            threshold = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
        arguments["spike_threshold"] = threshold
    frozen = not all(spec.parameters[n].learnable for n in ("mem_decay", "syn_decay") if n in spec.parameters)
    custom = isinstance(arguments.get("reset_fn"), Reset) or frozen or _clamps(spec, building)
    cls: Callable[..., Any] = sl.LIF
    if custom and building.stock:
        building.note("learnable", "a copy.deepcopy by sinabs itself makes frozen parameters trainable")
    elif custom:
        cls = functools.partial(LIF, clamp_alpha=_clamps(spec, building))
    low = spec.parameters.get("min_v_mem")
    layer = cls(
        tau_mem=1.0,
        tau_syn=1.0 if spec.synapse != "none" else None,
        min_v_mem=None if low is None else torch.from_numpy(low.value.copy()),
        train_alphas=train_alphas,
        norm_input=spec.input_gain == "one_minus_decay",
        **arguments,
    )
    for name, tensor in decays.items():
        setattr(layer, name, nn.Parameter(tensor))
    for name, attribute in attributes(layer).items():
        if name in spec.parameters:
            getattr(layer, attribute).requires_grad_(spec.parameters[name].learnable)
    return layer


def wrap(module: nn.Module) -> nn.Module:
    """Linear and elementwise modules as they are, others in `Repeat`, those that depend on the batch once per step."""
    if type(module) in (nn.Linear, *known.ELEMENTWISE):
        return module
    return PerStep(module) if isinstance(module, known.MODAL) else sl.Repeat(module)


def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """An `nn.Sequential` over [B, T, ...]."""
    return nested(modules, nn.Sequential)
