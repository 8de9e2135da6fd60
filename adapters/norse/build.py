"""Norse: building its neurons from specs (norse 1.1.0)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from norse.torch.functional import reset as resets
from norse.torch.functional.iaf import IAFParameters
from norse.torch.functional.leaky_integrator import LIParameters
from norse.torch.functional.leaky_integrator_box import LIBoxParameters
from norse.torch.functional.lif import LIFParameters
from norse.torch.functional.lif_box import LIFBoxParameters
from norse.torch.module.iaf import IAFCell
from norse.torch.module.leaky_integrator import LICell
from norse.torch.module.leaky_integrator_box import LIBoxCell
from norse.torch.module.lif import LIFCell
from norse.torch.module.lif_box import LIFBoxCell
from torch import Tensor, nn

from tracetorch.adapters.base import Building, value_of
from tracetorch.adapters.losses import Loss, common, formed, integrates, numbers, settle, starts_at
from tracetorch.adapters.norse.layers import Cell
from tracetorch.adapters.norse.read import SURROGATES
from tracetorch.core.spec import NeuronSpec


def _losses(spec: NeuronSpec, building: Building) -> Iterator[Loss]:
    if spec.synapse not in ("none", "read_then_decay"):
        yield Loss("synapse", spec.synapse, "LIFCell drives the membrane with i + x and keeps its decayed sum")
    yield from common(spec, "Norse's neuron")
    if spec.output == "spikes":
        yield from _losses_of_spikes(spec)
    whole = spec.decay == "none" or integrates(spec)  # an IAFCell
    if spec.input_gain != ("one" if whole else "one_minus_decay"):
        why = "a drive counts as dt*tau_mem_inv of it"
        remedy = "stock=False; or another scale of the weights before it"
        yield Loss("input_gain", spec.input_gain, why, remedy=remedy)
    first = "reset_value" if whole else "leak"
    held = spec.parameters.get(first)
    if whole and held is not None and held.learnable:
        yield Loss(first, str(held), "IAFCell learns it through its initial state too", gradient=True)
    if whole and (spec.output != "spikes" or spec.reset not in ("value", "add_value") or spec.synapse != "none"):
        yield Loss("decay", spec.decay, "IAFCell, which has none, has spikes, a reset to a value and no synapse")
    if np.any(starts_at(spec) != (0.0 if held is None else numbers(spec, first))):
        yield Loss("initial_state", spec.initial_state, "its membrane starts at v_leak, that of IAFCell at v_reset")
    known = [name for name, _ in SURROGATES.values()]
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
    names = {ours: (method, scaled) for method, (ours, scaled) in SURROGATES.items()}
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
    if spec.decay == "none" or integrates(spec):
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
