"""snnTorch: `snntorch.Leaky` as source and target (snntorch 1.0.0).

Equations of `Leaky`, b = clamp(beta, 0, 1), r = [mem > theta] of the membrane left by the previous step, detached:

    subtract: mem = b*mem + x - r*theta      zero: mem = b*((1-r)*mem) + x      none: mem = b*mem + x
    spk = [mem > theta] * graded_spikes_factor
    reset_delay=False: d = [mem > theta] - r;  subtract: mem = mem - d*theta    zero: mem = mem - d*mem
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import snntorch
import torch
from snntorch import surrogate as stock_surrogates
from torch import Tensor, nn

from tracetorch.adapters.base import Building, readable, value_of
from tracetorch.adapters.modules import nested
from tracetorch.core.forms import check_form
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.functional.spikes import heaviside
from tracetorch.functional.surrogates import Surrogate

NAME = "snntorch"
STEPPED = True

# snntorch.surrogate function -> (our name, {its argument: our parameter})
_SURROGATES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "atan": ("atan", {"alpha": "alpha"}),
    "fast_sigmoid": ("fast_sigmoid", {"slope": "slope"}),
    "sigmoid": ("sigmoid", {"slope": "slope"}),
    "straight_through_estimator": ("straight_through", {}),
    "triangular": ("triangular", {"threshold": "scale"}),
    "heaviside": ("heaviside", {}),
    "spike_rate_escape": ("spike_rate_escape", {"beta": "beta", "slope": "slope"}),
    "SFS": ("sparse_fast_sigmoid", {"slope": "slope", "B": "cutoff"}),
}
# (reset_mechanism, reset_delay) -> (reset, reset_timing, reset_gradient)
_RESETS = {
    ("subtract", True): ("subtract", "next_step_after_decay", "detached"),
    ("subtract", False): ("subtract", "same_step_residual", "attached"),
    ("zero", True): ("value", "next_step_before_decay", "detached"),
    ("zero", False): ("value", "same_step_residual", "attached"),
    ("none", True): ("none", "next_step_after_decay", "detached"),
    ("none", False): ("none", "next_step_after_decay", "detached"),
}
_STATE_FUNCTIONS = {"subtract": "_base_sub", "zero": "_base_zero", "none": "_base_int"}


class SpikeGrad:
    """A `spike_grad` that snnTorch has not: another comparison, or a surrogate of another framework.

    Holds the layer it serves, because some surrogates scale with its threshold; copies and pickles with it.
    """

    def __init__(self, surrogate: Surrogate, strict: bool) -> None:
        self.surrogate = surrogate
        self.strict = strict
        self.layer: snntorch.Leaky | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """z = mem - threshold -> spikes, 0 or 1."""
        assert self.layer is not None
        return heaviside(z, self.layer.threshold.detach(), self.surrogate, strict=self.strict)

    def __repr__(self) -> str:
        return f"SpikeGrad({self.surrogate}, {'>' if self.strict else '>='})"


class Leaky(snntorch.Leaky):
    """A `snntorch.Leaky` whose reset acts once, in the step of the spike.

    snnTorch 1.0.0 has no such reset: with `reset_delay=True` the threshold is subtracted after the next decay, with
    `reset_delay=False` a membrane still above the threshold is subtracted from again before the next spike test. This
    subclass keeps the calling convention (`init_hidden`, `output`, the buffer `mem`) and computes the step of a spec of
    the form "sinabs.LIF".
    """

    def __init__(self, spec: NeuronSpec) -> None:
        p = {name: value_of(spec, name).detach() for name in spec.parameters}
        decay = spec.parameters["mem_decay"]
        assert spec.surrogate is not None
        # snnTorch's own default is a closure, which does not pickle; the step computes its spikes from the spec.
        spike_grad = SpikeGrad(spec.surrogate, strict=spec.comparison == ">")
        super().__init__(
            beta=p["mem_decay"],
            threshold=p["threshold"],
            spike_grad=spike_grad,
            init_hidden=True,
            learn_beta=decay.learnable,
            learn_threshold=spec.parameters["threshold"].learnable,
            reset_mechanism={"subtract": "subtract", "none": "none"}.get(spec.reset, "zero"),
            reset_delay=False,
        )
        spike_grad.layer = self
        kept = ("mem_decay", "threshold")
        self.extra = tuple(name for name in spec.parameters if name not in kept)
        for name in self.extra:
            if spec.parameters[name].learnable:
                self.register_parameter(name, nn.Parameter(p[name]))
            else:
                self.register_buffer(name, p[name])
        values = {name: Parameter(p[name].numpy(), parameter.learnable) for name, parameter in spec.parameters.items()}
        self.choices = spec.replace(parameters=values)

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One step, as `snntorch.Leaky.forward`: spikes, or spikes and membrane."""
        if mem is not None:
            if self.init_hidden:
                raise TypeError("`mem` should not be passed as an argument while `init_hidden=True`")
            self.mem = mem
        if self.mem.shape != input_.shape:
            self.mem = torch.zeros_like(input_)
        values = {"mem_decay": self.beta, "threshold": self.threshold, **{n: getattr(self, n) for n in self.extra}}
        spikes, self.mem = check_form(self.choices).step(self.choices, values, input_, self.mem)
        return (spikes, self.mem) if self.output or not self.init_hidden else spikes


def is_neuron(module: nn.Module) -> bool:
    """Any snnTorch neuron."""
    return isinstance(module, snntorch.SpikingNeuron)


def _surrogate(layer: Any) -> tuple[Surrogate, bool]:
    """The surrogate of a layer and whether its comparison is strict."""
    function = layer.spike_grad
    if isinstance(function, SpikeGrad):
        return function.surrogate, function.strict
    if getattr(function, "__name__", "") == "_surrogate_bypass":  # surrogate_disable, at construction
        return Surrogate("zero"), True
    if getattr(function, "__module__", None) == stock_surrogates.__name__:
        name = function.__qualname__.split(".")[0]
        if name in _SURROGATES and function.__closure__ is None and not _SURROGATES[name][1]:
            return Surrogate(_SURROGATES[name][0]), True
        if name in _SURROGATES and function.__closure__ is not None:
            cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
            ours, names = _SURROGATES[name]
            return Surrogate(ours, tuple((names[k], float(cells[k].cell_contents)) for k in names)), True
    raise SpecError(
        f"spike_grad={function!r}: only snntorch.surrogate's {', '.join(_SURROGATES)} can be read; a function of your "
        "own has no name that another framework knows"
    )


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """Read a `snntorch.Leaky`.

    Raises:
        SpecError: another class, `inhibition`, `state_quant`, a surrogate of one's own, or a `reset_mechanism` changed
            after construction (snnTorch 1.0.0 then keeps computing the old one).
    """
    if type(layer) is Leaky:
        present = {name: readable(layer, attribute) for name, attribute in attributes(layer).items()}
        return layer.choices.replace(parameters=present)
    if type(layer) is not snntorch.Leaky:
        cls = type(layer)
        raise SpecError(
            f"{cls.__module__}.{cls.__qualname__}: of snnTorch's neurons only Leaky can be read in this version"
        )
    source: Any = layer
    if source.inhibition:
        raise SpecError("inhibition=True: it couples the neurons of a layer; only inhibition=False can be read")
    if source.state_quant:
        raise SpecError(f"state_quant={source.state_quant!r}: only state_quant=False can be read in this version")
    mechanism = source.reset_mechanism
    if source.state_function.__name__ != _STATE_FUNCTIONS[mechanism]:
        raise SpecError(
            f"reset_mechanism={mechanism!r} was assigned after construction: snnTorch computes "
            f"{source.state_function.__name__} still; construct the layer anew"
        )
    surrogate, strict = _surrogate(source)
    reset, timing, gradient = _RESETS[mechanism, bool(source.reset_delay)]
    raws = {"mem_decay": "clamped"}
    values = {name: readable(layer, own, raws.get(name, "value")) for name, own in attributes(layer).items()}
    if reset == "value":
        values["reset_value"] = Parameter(values["threshold"].value * 0)
    return NeuronSpec(
        form="snntorch.Leaky",
        comparison=">" if strict else ">=",
        reset=reset,
        reset_timing=timing,
        reset_gradient=gradient,
        surrogate=surrogate,
        parameters=values,
    )


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """beta, threshold and graded_spikes_factor."""
    names = {"mem_decay": "beta", "threshold": "threshold"}
    if isinstance(layer, Leaky):
        return names | {name: name for name in layer.extra}
    return names | {"spike_scale": "graded_spikes_factor"}


def states(layer: nn.Module) -> tuple[str, ...]:
    """What a call changes."""
    return ("mem", "reset")


def reset(layer: nn.Module) -> None:
    """An empty membrane: the next call makes it zero in the input's shape."""
    mem = cast(Tensor, layer.mem)
    layer.mem = torch.zeros(0, device=mem.device)


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Step by step from the zero state."""
    reset(layer)
    outputs, membranes = [], []
    for x in xs:
        result = layer(x)
        outputs.append(result[0] if isinstance(result, tuple) else result)
        membranes.append(layer.mem)
    return torch.stack(outputs), {"v_mem": torch.stack(membranes)}  # type: ignore[arg-type]


def _mechanism(spec: NeuronSpec) -> tuple[str, bool] | None:
    """`reset_mechanism`, `reset_delay` of the stock Leaky with the same reset, or None if it has none."""
    if spec.reset == "none":
        return "none", True
    # Read as what happens to the membrane: the same step with rho = theta / beta is the next step after the decay.
    key = (spec.reset, spec.reset_amount, spec.reset_timing, spec.reset_gradient)
    to_zero = spec.reset in ("value", "add_value") and not spec.parameters["reset_value"].value.any()
    if to_zero and spec.reset_timing in ("same_step", "next_step_before_decay") and spec.reset_gradient == "detached":
        return "zero", True
    if to_zero and spec.reset_timing.startswith("same_step") and spec.reset_gradient == "attached":
        above_zero = bool((spec.parameters["threshold"].value >= 0).all())
        return ("zero", False) if spec.reset_timing != "same_step" or above_zero else None
    return {
        ("subtract", "threshold", "next_step_after_decay", "detached"): ("subtract", True),
        ("subtract", "threshold_over_decay", "same_step", "detached"): ("subtract", True),
        ("subtract", "threshold", "same_step_residual", "attached"): ("subtract", False),
    }.get(key)


def _spike_grad(spec: NeuronSpec, building: Building) -> Callable[[Tensor], Tensor] | None:
    """snnTorch's own surrogate where it has it, else one of ours, or with `stock` the default, named."""
    assert spec.surrogate is not None
    stock = {ours: (name, names) for name, (ours, names) in _SURROGATES.items()}.get(spec.surrogate.name)
    if spec.comparison == ">" and stock is not None:
        values = dict(spec.surrogate.parameters)
        made: Callable[[Tensor], Tensor] = getattr(stock_surrogates, stock[0])(
            **{theirs: values[ours] for theirs, ours in stock[1].items()}
        )
        return made
    if not building.stock:
        building.note("spike_grad", f"custom callable: {spec.surrogate}, spike where u {spec.comparison} threshold")
        return SpikeGrad(spec.surrogate, strict=spec.comparison == ">")
    building.note("surrogate", f"{spec.surrogate} is not in snntorch.surrogate; atan in its place", gradient="differs")
    return None


def _refuse(spec: NeuronSpec, building: Building) -> None:
    if spec.synapse != "none":
        raise building.impossible("synapse", spec.synapse, "snntorch.Leaky has no synapse", "to='tracetorch'")
    if spec.output != "spikes":
        raise building.impossible("output", spec.output, "snntorch.Leaky returns spikes", "to='tracetorch'")
    if spec.decay != "geometric":
        why = "snntorch.Leaky decays by its beta"
        raise building.impossible("decay", spec.decay, why, "a spec with a mem_decay (of 1, for none)")
    decay = spec.parameters["mem_decay"]
    if decay.raw == "value" and not ((decay.value >= 0) & (decay.value <= 1)).all():
        building.cannot("mem_decay", float(decay.value.max()), "snnTorch clamps beta to [0, 1]", "a decay in [0, 1]")
    if decay.raw not in ("value", "clamped") and decay.learnable:
        building.note("mem_decay", f"learned as beta, in the source as {decay.raw}", gradient="reparametrised")
    threshold = spec.parameters["threshold"]
    if threshold.raw != "value" and threshold.learnable:
        building.note("threshold", "learned itself, in the source through a softplus", gradient="reparametrised")
    bias = spec.parameters.get("bias")
    if bias is not None and (bias.value.any() or bias.learnable):
        raise building.impossible("bias", str(bias), "snntorch.Leaky has none", "bias=0, not learnable")
    leak = spec.parameters.get("leak")
    if leak is not None and (leak.value.any() or leak.learnable):
        raise building.impossible("leak", str(leak), "snntorch.Leaky decays to 0", "leak=0, not learnable")


def _stock_mechanism(spec: NeuronSpec, building: Building) -> tuple[str, bool]:
    """The nearest stock reset, for `stock=True`; refuses what differs."""
    remedy = "stock=False"
    if spec.spike_count != "single":
        building.cannot("spike_count", spec.spike_count, "snntorch.Leaky emits one spike a step", remedy)
    if spec.input_gain != "one":
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


def build(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `snntorch.Leaky`, with `init_hidden=True`; where the stock class has no such reset, our subclass of it."""
    _refuse(spec, building)
    mechanism = _mechanism(spec)
    plain = spec.spike_count == "single" and spec.input_gain == "one" and spec.clamp == "none"
    if not building.stock and not (plain and mechanism is not None):
        neutral = {"bias", "spike_scale"}
        kept = {name: parameter for name, parameter in spec.parameters.items() if name not in neutral}
        form = spec.replace(form="sinabs.LIF", parameters=kept)
        try:
            check_form(form)
        except SpecError as error:
            raise building.impossible("reset", spec.reset, str(error), "to='tracetorch'") from error
        building.note(
            "reset", "custom class tracetorch.adapters.snntorch.Leaky: the reset acts once, in the spike's step"
        )
        return Leaky(form)
    mechanism = _stock_mechanism(spec, building)
    if spec.parameters["threshold"].learnable and not spec.threshold_gradient:
        building.note("threshold", "its gradient also comes through the spikes", gradient="differs")
    threshold = value_of(spec, "threshold")
    if building.stock and spec.comparison == ">=":
        building.note("comparison", "u >= threshold as u > the next smaller float")
        threshold = torch.nextafter(threshold, torch.full_like(threshold, -torch.inf))
        if spec.parameters["threshold"].learnable:
            building.cannot("comparison", ">=", "a learnable threshold cannot be kept one float lower", "stock=False")
    decay = spec.parameters["mem_decay"]
    grad = _spike_grad(spec, building)
    scale = spec.parameters.get("spike_scale")
    layer = snntorch.Leaky(
        beta=torch.from_numpy(decay.value.copy()) if decay.raw == "clamped" else value_of(spec, "mem_decay"),
        threshold=threshold,
        spike_grad=grad,
        surrogate_disable=False,
        init_hidden=True,
        learn_beta=decay.learnable,
        learn_threshold=spec.parameters["threshold"].learnable,
        reset_mechanism=mechanism[0],
        reset_delay=mechanism[1],
        graded_spikes_factor=torch.ones((), dtype=threshold.dtype) if scale is None else value_of(spec, "spike_scale"),
        learn_graded_spikes_factor=scale is not None and scale.learnable,
    )
    if isinstance(grad, SpikeGrad):
        grad.layer = layer
    return layer


def wrap(module: nn.Module) -> nn.Module:
    """snnTorch networks take one step per call, as the module does."""
    return module


def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """An `nn.Sequential`, one step per call, states hidden; the last neuron returns its membrane too if asked."""
    last = list(modules.values())[-1]
    if emit_state and is_neuron(last):
        cast(Any, last).output = True
    return nested(modules, nn.Sequential)
