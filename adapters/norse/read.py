"""Norse: reading its neurons into specs, and running them (norse 1.1.0)."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from norse.torch.functional import reset as resets
from norse.torch.functional.iaf import IAFFeedForwardState
from norse.torch.functional.leaky_integrator import LIState
from norse.torch.functional.leaky_integrator_box import LIBoxState
from norse.torch.functional.lif import LIFFeedForwardState
from norse.torch.functional.lif_box import LIFBoxFeedForwardState
from norse.torch.module.iaf import IAFCell
from norse.torch.module.leaky_integrator import LI, LICell
from norse.torch.module.leaky_integrator_box import LIBoxCell
from norse.torch.module.lif import LIF, LIFCell
from norse.torch.module.lif_box import LIFBoxCell
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell
from torch import Tensor, nn

from tracetorch.adapters.base import original, readable
from tracetorch.adapters.norse.layers import Cell
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.functional.surrogates import Surrogate

# method -> our surrogate, whether `alpha` is its parameter
SURROGATES: Mapping[str, tuple[str, bool]] = {
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


def is_neuron(module: nn.Module) -> bool:
    """Any neuron of Norse."""
    return isinstance(module, (SNN, SNNCell, SNNRecurrent, SNNRecurrentCell))


def _kind(layer: nn.Module) -> _Kind:
    cls = original(layer)
    if cls not in _KINDS:
        known = ", ".join(stock.__name__ for stock in _KINDS)
        raise SpecError(f"{cls.__module__}.{cls.__qualname__}: of Norse's neurons {known} can be read")
    return _KINDS[cls]


def _surrogate(p: Any) -> Surrogate:
    if p.method not in SURROGATES:
        raise SpecError(f"method={p.method!r}: only {', '.join(SURROGATES)} can be read")
    name, scaled = SURROGATES[p.method]
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
    if original(layer) is IAFCell:
        # Quirk of 1.1.0: IAFCell's initial state is its own v_reset, of which it requires a gradient from then on.
        if isinstance(layer.p.v_reset, nn.Parameter):
            raise SpecError(
                "p.v_reset=nn.Parameter: IAFCell learns it through its initial state too, which is that very tensor, "
                "as no other neuron does; use a plain tensor"
            )
        found["reset_value"] = Parameter(found["reset_value"].value)
    return found


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """Read a `LIFCell`, `LIF`, `LIFBoxCell`, `LICell`, `LI`, `LIBoxCell` or `IAFCell`. Time is in the unit of its dt.

    Raises:
        SpecError: another class, a `method` without a named surrogate, a `reset_method` of one's own, or an `IAFCell`
            that learns its v_reset.
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
    if start not in values or values[start].fixed_at(0.0):
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
    """`trace` from a state, None for the initial one; returns the last state too. xs: [T, B, ...]."""
    called: Any = layer
    if isinstance(layer, SNN):
        shown, called.record_states = called.record_states, True
        try:
            outputs, after = called(xs, state)
        finally:
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
