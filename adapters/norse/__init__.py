"""Norse: its feed-forward LIF, LIFBox, LI, LIBox and IAF as source and target (norse 1.1.0).

Equations, k = dt*tau_mem_inv, k_s = dt*tau_syn_inv, z = [v > v_th]:

    LIFCell, LIF:   j = i + x; v = v + k*((v_leak - v) + j); i = j - k_s*j; z; v = (1-z)*v + z*v_reset
    LIFBoxCell:     v = v + k*(x + v_leak - v); z; v = reset_method(z, v, v_reset, v_th)
    LICell, LI:     as LIF without z;   LIBoxCell: v = v + k*((v_leak - v) + x);   IAFCell: v = v + x; z; v as in LIF

Cells take a state and return one, `(x, state) -> (z, state)`; without one they start anew. v starts at v_leak, that of
IAFCell at v_reset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from norse.torch.functional import reset as resets
from norse.torch.functional.iaf import IAFFeedForwardState, IAFParameters
from norse.torch.functional.leaky_integrator import LIParameters, LIState
from norse.torch.functional.leaky_integrator_box import LIBoxParameters, LIBoxState
from norse.torch.functional.lif import LIFFeedForwardState, LIFParameters
from norse.torch.functional.lif_box import LIFBoxFeedForwardState, LIFBoxParameters
from norse.torch.module.iaf import IAFCell
from norse.torch.module.leaky_integrator import LI, LICell
from norse.torch.module.leaky_integrator_box import LIBoxCell
from norse.torch.module.lif import LIF, LIFCell
from norse.torch.module.lif_box import LIFBoxCell
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell
from torch import Tensor, nn

from tracetorch.adapters.base import Building, no_networks, readable, value_of
from tracetorch.adapters.losses import Loss, common, formed, neutral, settle, starts_at
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.functional.surrogates import Surrogate
from tracetorch.snn.spec_neuron import SpecNeuron

NAME = "norse"
STEPPED = True

# method -> our surrogate, whether `alpha` is its parameter
_SURROGATES: Mapping[str, tuple[str, bool]] = {
    "super": ("fast_sigmoid", False),
    "triangle": ("triangle", True),
    "tanh": ("tanh", True),
    "circ": ("circle", True),
    "heavi_erfc": ("erfc", True),
    "heaviside": ("zero", False),
}


class _Kind(NamedTuple):
    """What a class computes: has it spikes, a synapse, a leak; its state."""

    spikes: bool
    synapse: bool
    leak: bool
    state: type


_KINDS: Mapping[type, _Kind] = {
    LIFCell: _Kind(True, True, True, LIFFeedForwardState),
    LIF: _Kind(True, True, True, LIFFeedForwardState),
    LIFBoxCell: _Kind(True, False, True, LIFBoxFeedForwardState),
    LICell: _Kind(False, True, True, LIState),
    LI: _Kind(False, True, True, LIState),
    LIBoxCell: _Kind(False, False, True, LIBoxState),
    IAFCell: _Kind(True, False, False, IAFFeedForwardState),
}
_ATTRIBUTES = {
    "mem_decay": "p.tau_mem_inv",
    "syn_decay": "p.tau_syn_inv",
    "leak": "p.v_leak",
    "threshold": "p.v_th",
    "reset_value": "p.v_reset",
}


class Cell(SNNCell):
    """A cell that computes any spec that has a native order of operations and Norse's states: v, perhaps i.

    Called as Norse's own cells; `neuron` holds the parameters.
    """

    def __init__(self, spec: NeuronSpec) -> None:
        dt = 1.0 if spec.dt is None else spec.dt
        super().__init__(activation=self.advance, state_fallback=self.initial_state, p=None, dt=dt)
        self.neuron = SpecNeuron(spec)
        self.state_type = LIFFeedForwardState if "i_syn" in spec.states else LIFBoxFeedForwardState

    def initial_state(self, input_tensor: Tensor) -> Any:
        """The state before the first step."""
        found = {name: self.neuron.state(name, input_tensor) for name in self.neuron.state_names}
        return self.state_type(**{name.partition("_")[0]: state for name, state in found.items()})

    def advance(self, x: Tensor, state: Any, p: Any, dt: float) -> tuple[Tensor, Any]:
        """One step, as Norse's activation functions take it."""
        states = [getattr(state, name.partition("_")[0]) for name in self.neuron.state_names]
        output, *after = self.neuron.step(x, *states)
        named = zip(self.neuron.state_names, after, strict=True)
        return output, self.state_type(**{name.partition("_")[0]: value for name, value in named})

    def extra_repr(self) -> str:
        return ""


def is_neuron(module: nn.Module) -> bool:
    """Any neuron of Norse."""
    return isinstance(module, (SNN, SNNCell, SNNRecurrent, SNNRecurrentCell))


def _class(layer: nn.Module) -> type:
    """The class of a layer, or of the one that `tt.fuse` made it from."""
    return getattr(type(layer), "twin_of", type(layer))


def _kind(layer: nn.Module) -> _Kind:
    cls = _class(layer)
    if cls not in _KINDS:
        known = ", ".join(stock.__name__ for stock in _KINDS)
        raise SpecError(f"{cls.__module__}.{cls.__qualname__}: of Norse's neurons {known} can be read")
    return _KINDS[cls]


def _surrogate(p: Any) -> Surrogate:
    if p.method not in _SURROGATES:
        raise SpecError(f"method={p.method!r}: only {', '.join(_SURROGATES)} can be read")
    name, scaled = _SURROGATES[p.method]
    if not scaled:
        return Surrogate(name, (("slope", 1.0),) if name == "fast_sigmoid" else ())
    alpha = torch.as_tensor(p.alpha)
    if alpha.numel() != 1 or alpha.requires_grad:
        raise SpecError(f"alpha={p.alpha!r:.60}: only one number, not learned, can be read")
    return Surrogate(name, (("alpha", float(alpha)),))


def _parameters(layer: Any) -> dict[str, Parameter]:
    rates = ("mem_decay", "syn_decay")
    found = {}
    for name, path in attributes(layer).items():
        raw = "one_minus_dt_rate" if name in rates else "value"
        if not isinstance(attrgetter(path)(layer), Tensor):
            raise SpecError(f"{path}={attrgetter(path)(layer)!r:.60}: only a tensor can be read")
        found[name] = readable(layer, path, raw)
    if _class(layer) is IAFCell and not isinstance(layer.p.v_reset, nn.Parameter):
        # Quirk of 1.1.0: IAFCell's initial state is its own v_reset, of which it requires a gradient from then on.
        found["reset_value"] = Parameter(found["reset_value"].value)
    return found


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """Read a `LIFCell`, `LIF`, `LIFBoxCell`, `LICell`, `LI`, `LIBoxCell` or `IAFCell`. Time is in the unit of its dt.

    Raises:
        SpecError: another class, a `method` without a named surrogate, or a `reset_method` of one's own.
    """
    if isinstance(layer, Cell):
        return layer.neuron.spec
    kind, source = _kind(layer), layer
    values = _parameters(source)
    p: Any = source.p
    fields: dict[str, Any] = {"output": "membrane", "spike_count": "none", "reset": "none", "threshold_gradient": False}
    if kind.spikes:
        method = getattr(p, "reset_method", resets.reset_value)
        if method not in (resets.reset_value, resets.reset_subtract):
            raise SpecError(f"reset_method={method!r}: only reset_value and reset_subtract can be read")
        fields = {"comparison": ">", "reset": "value", "surrogate": _surrogate(p)}
        if method is resets.reset_subtract:
            fields["reset"] = "subtract"
            del values["reset_value"]
    start = "leak" if kind.leak else "reset_value"
    if start not in values or neutral_value(values[start]):
        start = "zero"
    if kind.leak:
        fields |= {"input_gain": "one_minus_decay", "dt": float(source.dt), "time_unit": "s"}  # type: ignore[arg-type]
    return NeuronSpec(
        form="norse.LIF" if kind.synapse or not kind.spikes else "norse.LIFBox",
        decay="geometric" if kind.leak else "none",
        synapse="read_then_decay" if kind.synapse else "none",
        initial_state=start,
        parameters=values,
        **fields,
    )


def neutral_value(parameter: Parameter) -> bool:
    """Whether it is 0 and not learned."""
    return not parameter.learnable and not parameter.value.any()


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """The tensors of `p`; Norse does not register them, also where they are `nn.Parameter`s."""
    if isinstance(layer, Cell):
        return {name: f"neuron.{name}" for name in layer.neuron.raw_forms}
    return {name: path for name, path in _ATTRIBUTES.items() if hasattr(layer.p, path[2:])}


def states(layer: nn.Module) -> tuple[str, ...]:
    """None: a call returns the state."""
    return ()


def reset(layer: nn.Module) -> None:
    """Nothing is kept."""


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """From the initial state, the state handed on: a cell step by step, a layer as one sequence."""
    outputs, recorded, _ = carried(layer, xs, None)
    return outputs, recorded


def carried(layer: nn.Module, xs: Tensor, state: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    """`trace` from a state, None for the initial one; returns the last state too."""
    called: Any = layer
    if isinstance(layer, SNN):
        shown, called.record_states = called.record_states, True
        outputs, after = called(xs, state)
        called.record_states = shown
        last = type(after)(*(value[-1] for value in after))
        return outputs, {_named(name): value for name, value in after._asdict().items()}, last
    found, kept = [], []
    for x in xs:
        output, state = called(x, state)
        found.append(output)
        kept.append(state)
    recorded = {_named(name): torch.stack([getattr(s, name) for s in kept]) for name in kept[0]._fields}
    return torch.stack(found), recorded, state


def _named(field: str) -> str:
    return {"v": "v_mem", "i": "i_syn"}[field]


def _losses(spec: NeuronSpec, building: Building) -> Iterator[Loss]:
    if spec.synapse not in ("none", "read_then_decay"):
        yield Loss("synapse", spec.synapse, "LIFCell drives the membrane with i + x and keeps its decayed sum")
    yield from common(spec, "Norse's neuron")
    if spec.output == "spikes":
        yield from _losses_of_spikes(spec)
    wanted = "one" if spec.decay == "none" else "one_minus_decay"
    if spec.input_gain != wanted and not (spec.decay != "none" and neutral(spec, "mem_decay", 1.0)):
        why = "a drive counts as dt*tau_mem_inv of it"
        remedy = "stock=False; or another scale of the weights before it"
        yield Loss("input_gain", spec.input_gain, why, remedy=remedy)
    if spec.decay == "none" and (spec.output != "spikes" or spec.reset != "value" or spec.synapse != "none"):
        yield Loss("decay", "none", "IAFCell has spikes, a reset to a value and no synapse")
    first = spec.parameters.get("reset_value" if spec.decay == "none" else "leak")
    if np.any(starts_at(spec) != (0.0 if first is None else first.value)):
        yield Loss("initial_state", spec.initial_state, "its membrane starts at v_leak, that of IAFCell at v_reset")
    known = [name for name, _ in _SURROGATES.values()]
    chosen = spec.surrogate
    slope = chosen is not None and chosen.name == "fast_sigmoid" and dict(chosen.parameters)["slope"] != 1
    if chosen is not None and (chosen.name not in known or slope):
        yield Loss("surrogate", str(chosen), "not one of Norse's; 'super' in its place", gradient=True)


def _losses_of_spikes(spec: NeuronSpec) -> Iterator[Loss]:
    if spec.comparison == ">=" and spec.parameters["threshold"].learnable:
        yield Loss("comparison", ">=", "a learnable threshold cannot be kept one float lower")
    elif spec.comparison == ">=" and spec.reset == "subtract":
        yield Loss("comparison", ">=", "a threshold one float lower would also be what is subtracted")
    if spec.reset == "none" or (spec.synapse != "none" and spec.reset == "subtract"):
        yield Loss("reset", spec.reset, "LIFCell resets to a value, LIFBoxCell also by subtraction")
    if spec.reset_gradient != "attached":
        yield Loss("reset_gradient", spec.reset_gradient, "the reset stays in the graph", gradient=True)
    if spec.parameters["threshold"].learnable and not spec.threshold_gradient:
        yield Loss("threshold_gradient", False, "its gradient also comes through the spikes", gradient=True)


def _tensor(spec: NeuronSpec, name: str, dt: float, building: Building) -> Tensor:
    """A field of `p`; an `nn.Parameter` where it is learned."""
    parameter = spec.parameters.get(name)
    if parameter is None:
        return torch.zeros(())
    value = value_of(spec, name).detach()
    if name in ("mem_decay", "syn_decay"):
        kept = parameter.raw == "one_minus_dt_rate" and spec.dt == dt
        value = torch.from_numpy(parameter.value.copy()) if kept else (1 - value) / dt
        if not kept and parameter.learnable:
            building.note(name, f"learned as 1/tau, in the source as {parameter.raw}", gradient="reparametrised")
    elif name == "threshold" and spec.comparison == ">=":
        building.note("comparison", "u >= threshold as u > the next smaller float")
        value = torch.nextafter(value, torch.full_like(value, -torch.inf))
    return nn.Parameter(value) if parameter.learnable else value


def _method(spec: NeuronSpec) -> dict[str, Any]:
    chosen = spec.surrogate
    names = {ours: (method, scaled) for method, (ours, scaled) in _SURROGATES.items()}
    if chosen is None or chosen.name not in names:
        return {"method": "super"}
    method, scaled = names[chosen.name]
    return {"method": method, **({"alpha": torch.tensor(dict(chosen.parameters)["alpha"])} if scaled else {})}


def _stock(spec: NeuronSpec, building: Building) -> nn.Module:
    """One of Norse's cells, or with `allow_approximate` the nearest one. Without a dt in the spec, its dt is 1."""
    dt = 1.0 if spec.dt is None else spec.dt

    def of(name: str) -> Tensor:
        return _tensor(spec, name, dt, building)

    synapse = spec.synapse != "none"
    if spec.output == "membrane":
        rates = {"tau_mem_inv": of("mem_decay"), "v_leak": of("leak")}
        if synapse:
            return LICell(LIParameters(tau_syn_inv=of("syn_decay"), **rates), dt=dt)
        return LIBoxCell(LIBoxParameters(**rates), dt=dt)
    spikes = {"v_th": of("threshold"), "v_reset": of("reset_value"), **_method(spec)}
    if spec.decay == "none" or (neutral(spec, "mem_decay", 1.0) and spec.input_gain == "one"):
        return IAFCell(IAFParameters(**spikes), dt=dt)
    spikes |= {"tau_mem_inv": of("mem_decay"), "v_leak": of("leak")}
    if synapse:
        return LIFCell(LIFParameters(tau_syn_inv=of("syn_decay"), **spikes), dt=dt)
    method = resets.reset_subtract if spec.reset == "subtract" else resets.reset_value
    return LIFBoxCell(LIFBoxParameters(reset_method=method, **spikes), dt=dt)


def _ours(spec: NeuronSpec, building: Building) -> nn.Module:
    if not set(spec.states) <= {"i_syn", "v_mem"}:
        raise building.impossible("states", spec.states, "Norse's states are v and i", "to='tracetorch'")
    return Cell(formed(spec, building))


def build(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `LIFBoxCell`, `LIFCell`, `LICell`, `LIBoxCell` or `IAFCell`; where these have not the choice, a `Cell`."""
    return settle(_losses(spec, building), building, lambda: _stock(spec, building), lambda: _ours(spec, building))


def wrap(module: nn.Module) -> nn.Module:
    """Cells take one step per call, as the module does."""
    return module


def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """Networks of Norse are not written in this version.

    Raises:
        ConversionError: always.
    """
    raise no_networks("Norse", NAME)
