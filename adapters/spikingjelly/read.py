"""SpikingJelly: reading its nodes into specs, and running them (spikingjelly 2.0.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from tracetorch.adapters.base import original, readable
from tracetorch.adapters.spikingjelly.layers import Node, Spike
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.functional.surrogates import Surrogate

_STOCK = (neuron.LIFNode, neuron.ParametricLIFNode, neuron.IFNode)
# spikingjelly.activation_based.surrogate class -> our name; its parameters have the same names.
SURROGATES: Mapping[type, str] = {
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


def is_neuron(module: nn.Module) -> bool:
    """Any node of SpikingJelly."""
    return isinstance(module, (neuron.BaseNode, neuron.SimpleBaseNode, neuron.NonSpikingBaseNode))


def _surrogate(function: Any) -> tuple[Surrogate, bool]:
    """The surrogate of a layer and whether its comparison is strict."""
    if isinstance(function, Spike):
        return function.surrogate, function.strict
    if type(function) not in SURROGATES:
        names = ", ".join(cls.__name__ for cls in SURROGATES)
        raise SpecError(
            f"surrogate_function={function!r}: only spikingjelly.activation_based.surrogate's {names} can be read"
        )
    if not function.spiking:
        raise SpecError(f"surrogate_function={function!r}: spiking=False is no spike; only spiking=True can be read")
    return Surrogate(SURROGATES[type(function)], tuple(function._sg_params.items())), False


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
    cls = original(layer)
    if cls not in _STOCK:
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
    """`trace` from the present state. xs: [T, B, ...]."""
    node: Any = layer
    if node.step_mode == "m" and not isinstance(node, Node):
        shown, node.store_v_seq = node.store_v_seq, True
        try:
            outputs = node.multi_step_forward(xs)
            return outputs, {"v_mem": node.v_seq}
        finally:
            node.store_v_seq = shown
    names = {"v_mem": "v", **{name: name for name in (node._synaptic if isinstance(node, Node) else ())}}
    found, recorded = [], {name: list[Tensor]() for name in names}
    for x in xs:
        found.append(node.single_step_forward(x))
        for name, memory in names.items():
            recorded[name].append(node._memories[memory])
    return torch.stack(found), {name: torch.stack(steps) for name, steps in recorded.items()}
