"""The chain rule from the numbers of the equations, as `oracle.lif.backward` names them, to a spec's raw parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from tracetorch.oracle.equations import Equations, keeps_gain
from tracetorch.oracle.raw import RAW, Array

# Each parameter's gradient as a sum of coefficients times the gradients of the equations' numbers.
Combination: TypeAlias = Mapping[str, tuple[tuple[str, Array | float], ...]]

# Parameters that no gradient reaches.
_WITHOUT = ("surrogate_scale", "initial_v", "refractory_time")


def _value(spec: Any, name: str) -> Array:
    if name not in spec.parameters:
        return np.zeros(())
    parameter = spec.parameters[name]
    return np.asarray(RAW[parameter.raw].value(parameter.value.astype(np.float64), spec.dt))


def combination(spec: Any, eq: Equations) -> Combination:
    """What the gradient of every parameter's value is made of."""
    gain, kept = spec.input_gain.startswith("one_minus_decay"), keeps_gain(spec)
    own_a_s = _value(spec, "syn_decay") if kept else np.zeros(())  # eq.a_s = (1-a)*a_s
    decay: list[tuple[str, Array | float]] = [("a", 1.0), ("c", -_value(spec, "leak"))]
    if kept:
        decay.append(("a_s", -own_a_s))
    elif gain:
        decay.append(("b", -eq.resistance))
    of_reset = () if spec.reset_amount == "value" else ((("pending" if eq.divided else "rho"), 1.0),)
    return {
        "mem_decay": tuple(decay),
        "syn_decay": (("a_s", 1 - eq.a if kept else 1.0),),
        "adapt_decay": (("adapt_decay", 1.0),),
        "adapt_scale": (("adapt_scale", 1.0),),
        "resistance": (("b", 1 - eq.a),),
        "input_gain": (("b", 1.0),),
        "leak": (("c", 1 - eq.a),),
        "threshold": (("theta", 1.0), *of_reset),
        "bias": (("theta", -1.0),),
        "reset_amount": (("rho", 1.0),),
        "reset_value": (("v_reset", 1.0),),
        "min_v_mem": (("v_min", 1.0),),
        "spike_scale": (("g", 1.0),),
        **dict.fromkeys(_WITHOUT, ()),
    }


def sum_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Summed over what a parameter of that shape was broadcast along."""
    extra = gradient.ndim - len(shape)
    gradient = gradient.sum(tuple(range(extra))) if extra else gradient
    kept = tuple(k for k, size in enumerate(shape) if size == 1 and gradient.shape[k] != 1)
    return gradient.sum(kept, keepdims=True) if kept else gradient


def to_parameters(spec: Any, eq: Equations, g: Mapping[str, Array], absolute: bool = False) -> dict[str, Array]:
    """Gradients of the raw parameters of `spec`, by name.

    Args:
        g: element-wise, of the equations' numbers.
        absolute: with the magnitudes of all coefficients: what magnitudes or errors in g amount to.
    """
    size = np.abs if absolute else np.asarray
    made, found = combination(spec, eq), {}
    for name, parameter in spec.parameters.items():
        total = np.zeros(g["a"].shape)
        for part, coefficient in made[name]:
            total = total + size(coefficient) * g[part]
        slope = RAW[parameter.raw].slope(parameter.value.astype(np.float64), spec.dt)
        found[name] = np.asarray(sum_to(total, parameter.value.shape) * size(slope))
    return found


__all__ = ["combination", "sum_to", "to_parameters"]
