"""SpikingJelly: `LIFNode`, `ParametricLIFNode` and `IFNode` as source and target (spikingjelly 2.0.0).

Equations, r = v_reset, or 0 for a v_reset of None; 1/tau is sigmoid(w) in a ParametricLIFNode:

    h = v + (x - (v - r)) / tau with decay_input, else v - (v - r) / tau + x;   IFNode: h = v + x
    s = [h >= v_threshold];   v = h - s*v_threshold (v_reset None), or s*v_reset + (1 - s)*h

Their numbers are Python floats, which have no precision of their own: they are read in torch's default dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from tracetorch.adapters.base import Building, no_networks, readable, value_of
from tracetorch.adapters.losses import Loss, common, formed, neutral, settle, starts_at
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.functional.spikes import heaviside
from tracetorch.functional.surrogates import Surrogate
from tracetorch.snn.spec_neuron import SpecNeuron

NAME = "spikingjelly"
STEPPED = True
_STOCK = (neuron.LIFNode, neuron.ParametricLIFNode, neuron.IFNode)

# spikingjelly.activation_based.surrogate class -> our name; its parameters have the same names.
_SURROGATES: Mapping[type, str] = {
    surrogate.Sigmoid: "scaled_sigmoid",
    surrogate.ATan: "atan",
    surrogate.PiecewiseQuadratic: "piecewise_quadratic",
    surrogate.PiecewiseExp: "piecewise_exponential",
    surrogate.SoftSign: "soft_sign",
    surrogate.SuperSpike: "super_spike",
    surrogate.Erf: "erf",
    surrogate.Rect: "rectangle",
    surrogate.PiecewiseLeakyReLU: "piecewise_leaky_relu",
    surrogate.LeakyKReLU: "leaky_k_relu",
    surrogate.DeterministicPass: "straight_through",
}


class Spike(nn.Module):
    """A `surrogate_function` that SpikingJelly has not: another comparison, or a surrogate of another framework.

    Args:
        surrogate: its gradient.
        strict: a spike where h > threshold; else where h >= threshold.
        threshold: the layer's `v_threshold`, with which the width of some surrogates scales.
    """

    def __init__(self, surrogate: Surrogate, strict: bool, threshold: float) -> None:
        super().__init__()
        self.surrogate, self.strict, self.threshold = surrogate, strict, threshold

    def forward(self, z: Tensor) -> Tensor:
        """z = h - threshold -> spikes, 0 or 1, in the dtype of z."""
        threshold = torch.full_like(z, self.threshold)
        return heaviside(z, threshold, self.surrogate, strict=self.strict, dtype=z.dtype)

    def extra_repr(self) -> str:
        return f"{self.surrogate}, {'>' if self.strict else '>='}"


class Node(neuron.BaseNode):
    """A node that computes any spec that has a native order of operations: the states are its memories, v the membrane.

    Called, reset and stepped as SpikingJelly's own nodes; `neuron` holds the parameters.
    """

    def __init__(self, spec: NeuronSpec) -> None:
        super().__init__(v_reset=None)
        self.neuron = SpecNeuron(spec)
        for name in self._synaptic:
            self.register_memory(name, 0.0)

    @property
    def _synaptic(self) -> tuple[str, ...]:
        return tuple(name for name in self.neuron.state_names if name != "v_mem")

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], step_mode: str
    ) -> tuple[object, ...]:
        """States before the first step, or before a step of another shape: the initial ones."""
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        names = ("v_mem", *self._synaptic)
        kept = [state if isinstance(state, Tensor) and state.shape == x.shape else None for state in states]
        return tuple(
            self.neuron.state(name, x) if state is None else state for name, state in zip(names, kept, strict=True)
        )

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        """One step, as that of SpikingJelly's nodes."""
        given = dict(zip(("v_mem", *self._synaptic), states, strict=True))
        output, *after = self.neuron.step(inputs[0], *(given[name] for name in self.neuron.state_names))
        found = dict(zip(self.neuron.state_names, after, strict=True))
        return (output,), tuple(found[name] for name in given)


def is_neuron(module: nn.Module) -> bool:
    """Any node of SpikingJelly."""
    return isinstance(module, (neuron.BaseNode, neuron.SimpleBaseNode, neuron.NonSpikingBaseNode))


def _kind(layer: nn.Module) -> type:
    """The class of a layer, or of the one that `tt.fuse` made it from."""
    return getattr(type(layer), "twin_of", type(layer))


def _surrogate(function: Any) -> tuple[Surrogate, bool]:
    """The surrogate of a layer and whether its comparison is strict."""
    if isinstance(function, Spike):
        return function.surrogate, function.strict
    if type(function) not in _SURROGATES:
        names = ", ".join(cls.__name__ for cls in _SURROGATES)
        raise SpecError(
            f"surrogate_function={function!r}: only spikingjelly.activation_based.surrogate's {names} can be read"
        )
    if not function.spiking:
        raise SpecError(f"surrogate_function={function!r}: spiking=False is no spike; only spiking=True can be read")
    return Surrogate(_SURROGATES[type(function)], tuple(function._sg_params.items())), False


def _number(layer: Any, name: str) -> Parameter:
    value = getattr(layer, name)
    if not isinstance(value, float):
        raise SpecError(f"{name}={value!r:.60}: only a float, as the constructor takes it, can be read")
    dtype = layer.w.dtype if isinstance(layer, neuron.ParametricLIFNode) else torch.get_default_dtype()
    return Parameter(torch.tensor(value, dtype=dtype).numpy())


def _decay(layer: Any) -> dict[str, Any]:
    """Fields of the decay and the input gain, and the decay."""
    if isinstance(layer, neuron.IFNode):
        return {"decay": "none"}
    gain = "one_minus_decay" if layer.decay_input else "one"
    if isinstance(layer, neuron.ParametricLIFNode):
        return {"input_gain": gain, "mem_decay": readable(layer, "w", "one_minus_sigmoid")}
    tau = _number(layer, "tau")
    return {"input_gain": gain, "mem_decay": Parameter(tau.value, raw="one_minus_inverse_tau")}


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """Read a `LIFNode`, `ParametricLIFNode` or `IFNode`.

    Raises:
        SpecError: another class, a surrogate of one's own or with `spiking=False`, or a number that is no float.
    """
    if isinstance(layer, Node):
        return layer.neuron.spec
    if _kind(layer) not in _STOCK:
        cls = type(layer)
        known = ", ".join(stock.__name__ for stock in _STOCK)
        raise SpecError(f"{cls.__module__}.{cls.__qualname__}: of SpikingJelly's neurons {known} can be read")
    source: Any = layer
    if source._neuron_precision is not None:
        raise SpecError(f"precision={source._neuron_precision!r}: only the default precision can be read")
    fields = _decay(source)
    values = {name: fields.pop(name) for name in ("mem_decay",) if name in fields}
    values["threshold"] = _number(source, "v_threshold")
    start = "zero"
    if source.v_reset is not None:
        values["reset_value"] = _number(source, "v_reset")
        if source.v_reset != 0:
            start = "reset_value"
            values |= {"leak": values["reset_value"]} if "mem_decay" in values else {}
    kind, strict = _surrogate(source.surrogate_function)
    return NeuronSpec(
        form="spikingjelly.LIF",
        comparison=">" if strict else ">=",
        reset="subtract" if source.v_reset is None else "value",
        reset_gradient="detached" if source.detach_reset else "attached",
        initial_state=start,
        surrogate=kind,
        parameters=values,
        **fields,
    )


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """w of a ParametricLIFNode; the other numbers are floats."""
    if isinstance(layer, Node):
        return {name: f"neuron.{name}" for name in layer.neuron.raw_forms}
    return {"mem_decay": "w"} if isinstance(layer, neuron.ParametricLIFNode) else {}


def states(layer: nn.Module) -> tuple[str, ...]:
    """What a call changes."""
    return ("_memories", "v_seq")


def reset(layer: nn.Module) -> None:
    """The node's own `reset`, on a dictionary of memories of its own."""
    node: Any = layer
    node._memories = dict(node._memories)
    node.reset()


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """From the initial state: with step_mode "m" as one sequence, with "s" step by step."""
    reset(layer)
    return carried(layer, xs)


def carried(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`trace` from the present state."""
    node: Any = layer
    if node.step_mode == "m" and not isinstance(node, Node):
        shown = node.store_v_seq
        node.store_v_seq = True
        outputs = node.multi_step_forward(xs)
        membranes = node.v_seq
        node.store_v_seq = shown
        return outputs, {"v_mem": membranes}
    names = {"v_mem": "v", **{name: name for name in (node._synaptic if isinstance(node, Node) else ())}}
    found, recorded = [], {name: list[Tensor]() for name in names}
    for x in xs:
        found.append(node.single_step_forward(x))
        for name, memory in names.items():
            recorded[name].append(node._memories[memory])
    return torch.stack(found), {name: torch.stack(steps) for name, steps in recorded.items()}


def _losses(spec: NeuronSpec, building: Building) -> Iterator[Loss]:
    if spec.output != "spikes":
        yield Loss("output", spec.output, "its nodes emit spikes")
    if spec.synapse != "none":
        yield Loss("synapse", spec.synapse, "its nodes have no synapse")
    yield from common(spec, "a node")
    if spec.reset == "none":
        yield Loss("reset", "none", "its nodes reset at every spike")
    if spec.input_gain not in ("one", "one_minus_decay"):
        yield Loss("input_gain", spec.input_gain, "its nodes have 1 or 1/tau")
    low = spec.parameters["reset_value"] if spec.reset in ("value", "add_value") else None
    yield from _losses_of_numbers(spec, low)
    if spec.reset_gradient == "membrane_stopped":
        why = "detach_reset cuts the spike, not the membrane"
        yield Loss("reset_gradient", spec.reset_gradient, why, gradient=True)
    if building.stock and spec.comparison == ">" and spec.reset == "subtract":
        yield Loss("comparison", ">", "a threshold one float higher would also be what is subtracted")
    if building.stock and spec.surrogate is not None and spec.surrogate.name not in _SURROGATES.values():
        yield Loss("surrogate", str(spec.surrogate), "not one of SpikingJelly's; Sigmoid in its place", gradient=True)


def _losses_of_numbers(spec: NeuronSpec, low: Parameter | None) -> Iterator[Loss]:
    """Those of the parameters; `low`: the value of a reset to one."""
    for name in ("threshold", "reset_value"):
        parameter = spec.parameters.get(name)
        if parameter is not None and (parameter.learnable or parameter.value.size > 1):
            yield Loss(name, str(parameter), "its nodes have one number for all neurons, and do not learn it")
    if spec.decay != "none":
        decay = value_of(spec, "mem_decay").detach()
        outside = bool(((decay <= 0) | (decay >= 1)).any())
        if outside and not (spec.input_gain == "one" and neutral(spec, "mem_decay", 1.0)):
            yield Loss("mem_decay", str(spec.parameters["mem_decay"]), "1 - 1/tau lies between 0 and 1")
        leak = spec.parameters.get("leak")
        meant, held = 0.0 if low is None else low.value, 0.0 if leak is None else leak.value
        if (leak is not None and leak.learnable) or np.any(held != meant):
            yield Loss("leak", str(leak), "its nodes decay to their v_reset, or to 0 where that is None")
    if np.any(starts_at(spec) != (0.0 if low is None else low.value)):
        yield Loss("initial_state", spec.initial_state, "its nodes start at their v_reset, or at 0 where that is None")


def _surrogate_function(spec: NeuronSpec, building: Building) -> nn.Module:
    assert spec.surrogate is not None
    stock = {name: cls for cls, name in _SURROGATES.items()}.get(spec.surrogate.name)
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
    low = float(spec.parameters["reset_value"].value.mean()) if spec.reset in ("value", "add_value") else None
    arguments: dict[str, Any] = {
        "v_threshold": float(threshold.mean()),
        "v_reset": low,
        "surrogate_function": _surrogate_function(spec, building),
        "detach_reset": spec.reset_gradient == "detached" or spec.reset == "add_value",
    }
    if spec.decay == "none" or neutral(spec, "mem_decay", 1.0):
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
    if building.stock and (spec.output != "spikes" or spec.synapse != "none" or spec.surrogate is None):
        field, value = ("output", spec.output) if spec.output != "spikes" else ("synapse", spec.synapse)
        raise building.impossible(field, value, "SpikingJelly's nodes have no such", "stock=False")
    return settle(_losses(spec, building), building, lambda: _node(spec, building), ours)


def wrap(module: nn.Module) -> nn.Module:
    """Nodes in step_mode "s" take one step per call, as the module does."""
    return module


def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """Networks of SpikingJelly are not written in this version.

    Raises:
        ConversionError: always.
    """
    raise no_networks("SpikingJelly", NAME)
