"""SpikingJelly: building its nodes from specs (spikingjelly 2.0.0)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from tracetorch.adapters.base import Building, value_of
from tracetorch.adapters.losses import Loss, common, formed, integrates, numbers, settle, starts_at
from tracetorch.adapters.spikingjelly.layers import Node, Spike
from tracetorch.adapters.spikingjelly.read import SURROGATES
from tracetorch.core.spec import NeuronSpec, Parameter


def _losses(spec: NeuronSpec, building: Building) -> Iterator[Loss]:
    if spec.output != "spikes":
        yield Loss("output", spec.output, "its nodes emit spikes")
    if spec.synapse != "none":
        yield Loss("synapse", spec.synapse, "its nodes have no synapse")
    yield from common(spec, "a node")
    if spec.reset == "none":
        yield Loss("reset", "none", "its nodes reset at every spike")
    if spec.input_gain not in (("one",) if spec.decay == "none" else ("one", "one_minus_decay")):
        yield Loss("input_gain", spec.input_gain, "its nodes have 1 or 1/tau")
    low = numbers(spec, "reset_value") if spec.reset in ("value", "add_value") else np.zeros(())
    yield from _losses_of_numbers(spec, low)
    if spec.reset_gradient == "membrane_stopped":
        why = "detach_reset cuts the spike, not the membrane"
        yield Loss("reset_gradient", spec.reset_gradient, why, gradient=True)
    if building.stock and spec.comparison == ">" and spec.reset == "subtract":
        yield Loss("comparison", ">", "a threshold one float higher would also be what is subtracted")
    if building.stock and spec.surrogate is not None and spec.surrogate.name not in SURROGATES.values():
        yield Loss("surrogate", str(spec.surrogate), "not one of SpikingJelly's; Sigmoid in its place", gradient=True)


def _losses_of_numbers(spec: NeuronSpec, low: np.ndarray) -> Iterator[Loss]:
    """Those of the parameters; `low`: the value of a reset to one, else 0."""
    for name in ("threshold", "reset_value"):
        parameter = spec.parameters.get(name)
        if parameter is not None and (parameter.learnable or parameter.value.size > 1):
            yield Loss(name, str(parameter), "its nodes have one number for all neurons, and do not learn it")
    if spec.decay != "none":
        decay = value_of(spec, "mem_decay").detach()
        outside = bool(((decay <= 0) | (decay >= 1)).any())
        if outside and not integrates(spec):
            yield Loss("mem_decay", str(spec.parameters["mem_decay"]), "1 - 1/tau lies between 0 and 1")
        leak = spec.parameters.get("leak")
        held = np.zeros(()) if leak is None else numbers(spec, "leak")
        if (leak is not None and leak.learnable) or np.any(held != low):
            yield Loss("leak", str(leak), "its nodes decay to their v_reset, or to 0 where that is None")
    if np.any(starts_at(spec) != low):
        yield Loss("initial_state", spec.initial_state, "its nodes start at their v_reset, or at 0 where that is None")


def _surrogate_function(spec: NeuronSpec, building: Building) -> nn.Module:
    assert spec.surrogate is not None
    stock = {name: cls for cls, name in SURROGATES.items()}.get(spec.surrogate.name)
    if (spec.comparison == ">=" or building.stock) and stock is not None:
        made: nn.Module = stock(**dict(spec.surrogate.parameters))
        return made
    if building.stock:
        default: nn.Module = surrogate.Sigmoid()
        return default
    building.note("surrogate_function", f"custom module: {spec.surrogate}, spike where u {spec.comparison} threshold")
    return Spike(spec.surrogate, spec.comparison == ">", value_of(spec, "threshold").item())


def _node(spec: NeuronSpec, building: Building) -> nn.Module:
    """One of SpikingJelly's own classes, or with `allow_approximate` the nearest one."""
    threshold = value_of(spec, "threshold").detach()
    if building.stock and spec.comparison == ">":
        building.note("comparison", "u > threshold as u >= the next larger float")
        threshold = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
    low = float(numbers(spec, "reset_value").mean()) if spec.reset in ("value", "add_value") else None
    arguments: dict[str, Any] = {
        "v_threshold": float(threshold.mean()),
        "v_reset": low,
        "surrogate_function": _surrogate_function(spec, building),
        "detach_reset": spec.reset_gradient == "detached" or spec.reset == "add_value",
    }
    if spec.decay == "none" or integrates(spec):
        return neuron.IFNode(**arguments)
    arguments["decay_input"] = spec.input_gain == "one_minus_decay"
    decay = spec.parameters["mem_decay"]
    if decay.learnable or decay.value.size > 1 or decay.raw == "one_minus_sigmoid":
        return _parametric(decay, value_of(spec, "mem_decay").detach(), arguments, building)
    inverse = 1 / (1 - value_of(spec, "mem_decay").double().item())
    tau = float(decay.value.item()) if decay.raw == "one_minus_inverse_tau" else inverse
    return neuron.LIFNode(tau=tau, **arguments)


def _parametric(decay: Parameter, value: Tensor, arguments: dict[str, Any], building: Building) -> nn.Module:
    layer = neuron.ParametricLIFNode(**arguments)
    raw = torch.from_numpy(decay.value.copy()) if decay.raw == "one_minus_sigmoid" else -torch.logit(value)
    layer.w = nn.Parameter(raw, requires_grad=decay.learnable)
    if decay.raw != "one_minus_sigmoid" and decay.learnable:
        building.note("mem_decay", f"learned as w, in the source as {decay.raw}", gradient="reparametrised")
    return layer


def build(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `LIFNode`, `ParametricLIFNode` or `IFNode`, in step_mode "s"; where these have not the choice, a `Node`."""
    ours: Callable[[], nn.Module] = lambda: Node(formed(spec, building))  # noqa: E731
    if building.stock and spec.output != "spikes":
        raise building.impossible("output", spec.output, "SpikingJelly's nodes emit spikes", "stock=False")
    if building.stock and spec.synapse != "none":
        raise building.impossible("synapse", spec.synapse, "SpikingJelly's nodes have no synapse", "stock=False")
    return settle(_losses(spec, building), building, lambda: _node(spec, building), ours)
