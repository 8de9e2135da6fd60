"""What every adapter file speaks: the error, the notes of a build, and the functions each of them must have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tracetorch.core.raw import from_raw
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError

FORWARD = ("exact", "rounding", "approximate")
GRADIENT = ("exact", "rounding", "reparametrised", "opaque", "differs", "none")


class ConversionError(ValueError):
    """A conversion that would change the network, refused.

    Attributes:
        layer: path of the layer in the source network, or its class; `''` is the network itself, `(one layer)` that of
            a `build` by itself.
        field: the semantic field, option or argument that cannot be carried.
        value: its value.
        remedy: what would make the conversion possible.
    """

    def __init__(self, layer: str, field: str, value: object, why: str, remedy: str) -> None:
        self.layer, self.field, self.value, self.remedy = layer, field, value, remedy
        where = {"''": "the network", "(one layer)": "the layer"}.get(layer, f"layer {layer}")
        super().__init__(f"{where}: {field}={value!r}: {why}. Remedy: {remedy}")


def no_networks(framework: str, name: str) -> Callable[[Mapping[str, nn.Module], bool], nn.Module]:
    """`assemble` of a framework of which only single layers are built: raises `ConversionError`."""

    def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
        raise ConversionError(
            "''", "network", name, f"whole networks of {framework} are not written in this version",
            f"convert its layers one by one: adapters.build(adapters.spec(layer), {name!r})",
        )  # fmt: skip

    return assemble


def parameters(adapter: Adapter, layer: nn.Module) -> dict[str, Tensor]:
    """The layer's own raw tensors by the parameter names of its spec."""
    return {name: attrgetter(attribute)(layer) for name, attribute in adapter.attributes(layer).items()}


def described(adapter: Adapter, layer: nn.Module) -> Any:
    """The spec of a layer; of a native layer that no spec describes its `Composition`. Raises `SpecError`."""
    return getattr(adapter, "described", adapter.spec)(layer)


def shaped(tensor: Tensor, like: Tensor) -> Tensor:
    """One value for each neuron in the shape in which another layer keeps the same: [N], or [N, 1, 1] for channels."""
    same = tensor.numel() == like.numel() and [n for n in tensor.shape if n != 1] == [n for n in like.shape if n != 1]
    return tensor.reshape(like.shape) if same else tensor


def readable(layer: nn.Module, attribute: str, raw: str = "value") -> Parameter:
    """A tensor of a layer, by its path in it, as a parameter of a spec. An integer (threshold=1) is read as a float."""
    tensor: Tensor = attrgetter(attribute)(layer)
    learnable = tensor.requires_grad
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    try:
        return Parameter(tensor.detach().cpu().numpy(), learnable, raw)
    except (SpecError, TypeError) as error:
        raise SpecError(f"{attribute}={tensor.dtype}: {error}") from error


def original(layer: nn.Module) -> type[Any]:
    """The framework's class of a layer: its own, or what a fused twin was made of (`tt.fuse`)."""
    return getattr(type(layer), "twin_of", type(layer))


def value_of(spec: NeuronSpec, name: str) -> Tensor:
    """A fresh tensor with the value of a parameter in the equations."""
    parameter = spec.parameters[name]
    return from_raw(parameter.raw, torch.from_numpy(parameter.value.copy()), spec.dt)


@dataclass(frozen=True)
class Note:
    """A field that needed care, and how it was met.

    Args:
        field: field of the spec, or a parameter.
        text: how it was met, or what is lost.
        approximate: the choice differs: the forward verdict can be no better than `approximate`.
        gradient: "reparametrised", "differs" or "opaque" (a surrogate of the user's own, carried as it is) if the
            gradient verdict can be no better, else "".
    """

    field: str
    text: str
    approximate: bool = False
    gradient: str = ""


@dataclass
class Building:
    """Collects the notes of one build, and refuses what cannot be expressed."""

    layer: str
    framework: str
    stock: bool = False
    allow_approximate: bool = False
    notes: list[Note] = field(default_factory=list)

    def note(self, field: str, text: str, gradient: str = "") -> None:
        """Record how a field was met."""
        self.notes.append(Note(field, text, gradient=gradient))

    def cannot(self, field: str, value: object, why: str, remedy: str) -> None:
        """Refuse, or with `allow_approximate` record what is lost and go on."""
        if not self.allow_approximate:
            allow = "" if "allow_approximate" in remedy else "; or allow_approximate=True to have the nearest one"
            raise ConversionError(self.layer, field, value, why, remedy + allow)
        self.notes.append(Note(field, f"{value!r} is lost: {why}", approximate=True, gradient="differs"))

    def impossible(self, field: str, value: object, why: str, remedy: str) -> ConversionError:
        """An error to raise where not even a nearest layer exists."""
        return ConversionError(self.layer, field, value, why, remedy)


# (field, choice) of a spec -> what the report says of a source that has it.
_QUIRKS: Mapping[tuple[str, str], str] = {
    ("form", "snntorch.Lapicque"): "snnTorch's Lapicque decays by 1 - dt/(R C), which is 1 + ln(beta) where beta was "
    "given, and scales its input by dt/C: carried as it is",
    ("form", "snntorch.StateLeaky"): "snnTorch's StateLeaky decays by exp(-(1 - beta)), not by beta, and scales its "
    "spikes by graded_spikes_factor twice: carried as it is",
    ("form", "snntorch.LeakyParallel"): "snnTorch's LeakyParallel decays by the diagonal of its hidden matrix, which a "
    "beta per neuron does not set (1.0.0), keeps its membrane above 0 and never resets it: carried as it is",
    ("inhibition", "winner"): "a neuron above the threshold that is not the winner emits nothing, and is reset all the "
    "same in the next step (snnTorch, inhibition=True): carried as it is",
    ("reset_timing", "next_step_discards_input"): "the step after a spike yields the reset value whatever its input is "
    "(snnTorch, reset_mechanism='zero' with reset_delay=True): carried as it is",
    ("input_gain", "one_minus_decay_kept"): "sinabs's ALIF keeps the scaled current in its synapse: carried as it is",
}


def note_quirks(spec: NeuronSpec, building: Building) -> None:
    """Name what a source does otherwise than its documentation says, and is carried all the same."""
    for (name, choice), text in _QUIRKS.items():
        if getattr(spec, name) == choice and not (name == "reset_timing" and spec.reset == "none"):
            building.note(name, text)
    if spec.adaptive and spec.synapse != "none" and building.framework != "sinabs":
        text = "sinabs's ALIF forgets its synaptic current between two calls; here it goes on: the same within one call"
        building.note("synapse", text)


def note_origin(spec: NeuronSpec, building: Building) -> None:
    """Name what the source has and a target's layer has no place for: its name, its units."""
    if building.framework in ("tracetorch", "brainpy"):
        return
    if spec.name is not None:
        building.note("name", f"{spec.name!r} in the source")
    if spec.value_unit not in (None, "1"):
        building.note("value_unit", f"the membrane's numbers are in {spec.value_unit}, time in {spec.time_unit}")


def refuse_rare(spec: NeuronSpec, building: Building, framework: str, remedy: str = "to='tracetorch'") -> None:
    """Refuse choices that none of a framework's neurons has: smooth spikes, refractory times, adaptation, a start."""
    if spec.spike_count == "smooth":
        raise building.impossible("spike_count", "smooth", f"{framework} emits whole spikes", remedy)
    refuse_additions(spec, building, framework, remedy)


def refuse_additions(spec: NeuronSpec, building: Building, framework: str, remedy: str) -> None:
    """Refuse refractory times, adaptation, a start that is not 0, and scales; the spikes may be smooth."""
    if spec.refractory != "none":
        raise building.impossible("refractory", spec.refractory, f"{framework} has no refractory time", remedy)
    if spec.adaptive:
        scale = str(spec.parameters["adapt_scale"])
        raise building.impossible("adapt_scale", scale, f"{framework} has no threshold that adapts", remedy)
    if framework != "snntorch":
        refuse_coupled(spec, building, framework)
    start = {"leak": "leak", "reset_value": "reset_value"}.get(spec.initial_state)
    if start is not None and start in spec.parameters and not spec.parameters[start].fixed_at(0.0):
        raise building.impossible("initial_state", spec.initial_state, f"{framework} starts at 0", remedy)
    for name, neutral in (("resistance", 1.0), ("surrogate_scale", 1.0), ("initial_v", 0.0)):
        parameter = spec.parameters.get(name)
        if parameter is not None and not parameter.fixed_at(neutral):
            raise building.impossible(name, str(parameter), f"{framework} has none", remedy)


def refuse_coupled(spec: NeuronSpec, building: Building, framework: str) -> None:
    """Refuse what only snnTorch's neurons do: rounded states, a winner among a layer's neurons, spikes of a change."""
    remedy = "to='tracetorch' or to='snntorch'"
    if spec.state_levels is not None:
        levels = f"{len(spec.state_levels)} levels from {min(spec.state_levels):g} to {max(spec.state_levels):g}"
        raise building.impossible("state_levels", levels, f"{framework} rounds no states", remedy)
    if spec.inhibition != "none":
        why = f"in {framework} a layer's neurons spike each by itself"
        raise building.impossible("inhibition", spec.inhibition, why, remedy)
    if spec.spike_test != "membrane":
        why = f"in {framework} a neuron spikes by its membrane, not by what it changed"
        raise building.impossible("spike_test", spec.spike_test, why, remedy)


class Adapter(Protocol):
    """The functions of an adapter file, the same names in each."""

    NAME: str
    STEPPED: bool  # a model's call is one time step; else it is a whole sequence [B, T, ...]

    def is_neuron(self, module: nn.Module) -> bool:
        """Whether it is a neuron layer of this framework, readable or not."""

    def spec(self, layer: nn.Module, dt: float | None = None) -> NeuronSpec:
        """The semantics of a layer. Raises `SpecError` naming what cannot be read."""

    def attributes(self, layer: nn.Module) -> Mapping[str, str]:
        """The layer's attribute for each parameter of its spec that is a tensor of the layer."""

    def states(self, layer: nn.Module) -> tuple[str, ...]:
        """Attributes that a call changes."""

    def reset(self, layer: nn.Module) -> None:
        """Back to the initial state, for any batch size."""

    def trace(self, layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Run from the initial state over [T, B, ...]: outputs and the states after every step, by spec names."""

    def build(self, spec: NeuronSpec, building: Building) -> nn.Module:
        """A layer of this framework that computes the spec, or `building.cannot(...)`."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """A stateless per-step module as this framework's networks hold it."""

    def assemble(self, modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
        """A network of the framework from its modules in order, `emit_state`: the last neuron returns its state too."""


def describe(module: Any) -> str:
    """Class name with its framework, for reports: `snntorch.Leaky`; a subclass of ours: `sinabs.LIF (ours)`."""
    cls = type(module)
    path = cls.__module__.split(".")
    if path[:2] == ["tracetorch", "adapters"] and path[2] != "networks":  # of a framework's folder
        return f"{path[2]}.{cls.__name__} (ours)"
    return f"{path[0]}.{cls.__name__}"
