"""brainstate networks as torch sees them: a neuron as a `JaxStage`, a `Sequential` as an `nn.Sequential` of these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import brainstate
import jax
import numpy as np
import torch
from torch import Tensor, nn

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.jax.module import is_neuron, is_quantity, unit_of
from tracetorch.adapters.jax.stage import JaxStage
from tracetorch.adapters.networks import modules as known


def viewed(net: Any, dt: float | None, sample: Any) -> nn.Module:
    """A brainpy neuron, or a `brainstate.nn.Sequential` of `Linear`s and neurons, over [B, T, ...].

    A `Linear` becomes torch's with the same numbers; that both give the same on the sample, to rounding, is checked.

    Raises:
        ConversionError: another module; names it.
    """
    if is_neuron(net):
        return JaxStage(net, dt=dt, time_dim=1)
    if type(net) is not brainstate.nn.Sequential:
        raise _refused("''", net)
    stages = list(_stages(net, dt))
    for name, (source, made) in enumerate(stages):
        if isinstance(made, nn.Linear) and isinstance(sample, Tensor) and sample.ndim > 2:
            _compare(name, source, made, sample)
            sample = None  # the others get what neurons give: their numbers are compared with the first's kind of input
    return nn.Sequential(*(made for _, made in stages))


def to_brainstate(net: nn.Module) -> Any:
    """The brainstate module of a converted network, with its present numbers: the inverse of `viewed`.

    Args:
        net: a `JaxStage`, or an `nn.Sequential` of `nn.Linear`s and `JaxStage`s. A Sequential of one is that one.

    Raises:
        ConversionError: another module; names it.
    """
    if isinstance(net, JaxStage):
        return net.to_jax()
    if isinstance(net, nn.Linear):
        layer = brainstate.nn.Linear(net.in_features, net.out_features)
        value = {"weight": net.weight.detach().cpu().numpy().T.copy()}
        if net.bias is not None:
            value["bias"] = net.bias.detach().cpu().numpy().copy()
        layer.weight.value = {name: jax.numpy.asarray(array) for name, array in value.items()}
        return layer
    if not isinstance(net, nn.Sequential):
        what = f"{type(net).__module__}.{type(net).__qualname__}"
        why = "a JaxStage, or a Sequential of Linear layers and JaxStages, can be given to brainstate"
        raise ConversionError("''", "module", what, why, "adapters.convert(net, to='brainpy', ...).model")
    parts = [to_brainstate(child) for child in net]
    return parts[0] if len(parts) == 1 else brainstate.nn.Sequential(*parts)


def _refused(name: str, module: Any) -> ConversionError:
    return ConversionError(
        name,
        "module",
        f"{type(module).__module__}.{type(module).__qualname__}",
        "of brainstate's networks a Sequential of Linear layers and brainpy.state neurons can be read",
        "adapters.JaxStage(module), which runs any module in a pipeline; or convert the neurons one by one",
    )


def _stages(net: Any, dt: float | None) -> Iterator[tuple[Any, nn.Module]]:
    for k, layer in enumerate(net.layers):
        if is_neuron(layer):
            yield layer, JaxStage(layer, dt=dt, time_dim=1)
        elif type(layer) is brainstate.nn.Linear and layer.w_mask is None:
            yield layer, _linear(k, layer)
        else:
            raise _refused(f"'{k}'", layer)


def _linear(name: int, layer: Any) -> nn.Linear:
    value = layer.weight.value
    if any(is_quantity(leaf) and unit_of(leaf) is not None for leaf in value.values()):
        why = "torch's numbers have no units"
        raise ConversionError(f"'{name}'", "weight", str(value), why, "weights without units, neurons without too")
    weight = torch.from_numpy(np.array(value["weight"])).T.contiguous()
    made = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in value, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if "bias" in value:
            made.bias.copy_(torch.from_numpy(np.array(value["bias"])))
    return made


def _compare(name: int, source: Any, made: nn.Linear, sample: Tensor) -> None:
    with torch.no_grad():
        theirs = JaxStage(source, time_dim=1, dtype=made.weight.dtype)(sample).flatten(0, 1)
        ours = made(sample).flatten(0, 1)
        bound = known.rounding_bound(made, sample.flatten(0, 1), ours)
    if bound is None or not bool(((theirs - ours).abs().double() <= bound).all()):
        off = float((theirs - ours).abs().max())
        raise ConversionError(f"'{name}'", "weight", off, "torch's Linear gives something else", "please report this")
