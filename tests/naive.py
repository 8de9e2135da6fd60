"""One neuron at a time in plain Python numbers, written from the equations, not from the package: the tests' truth.

The loops take floats, and `Dual` numbers as well: with those they carry a derivative forward along the trajectory, with
the surrogate in the place of the slope of a spike: the linearisation of which a backward pass must be the adjoint.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from tracetorch.core.spec import NeuronSpec, Parameter
from tracetorch.functional.surrogates import Surrogate


@dataclass
class Dual:
    """value + derivative * epsilon. Comparisons look at the value."""

    value: float
    slope: float = 0.0

    def __add__(self, other):
        return Dual(self.value + value(other), self.slope + slope(other))

    def __sub__(self, other):
        return Dual(self.value - value(other), self.slope - slope(other))

    def __mul__(self, other):
        return Dual(self.value * value(other), self.slope * value(other) + self.value * slope(other))

    def __truediv__(self, other):
        quotient = self.value / value(other)
        return Dual(quotient, (self.slope - quotient * slope(other)) / value(other))

    def __radd__(self, other):
        return Dual(other) + self

    def __rsub__(self, other):
        return Dual(other) - self

    def __rmul__(self, other):
        return Dual(other) * self

    def __rtruediv__(self, other):
        return Dual(other) / self


def value(number):
    """The number without its derivative."""
    if isinstance(number, torch.Tensor):
        return number.item()
    return number.value if isinstance(number, Dual) else number


def slope(number):
    """The derivative of a number."""
    return number.slope if isinstance(number, Dual) else 0.0


def exp(number):
    """e to the number."""
    if isinstance(number, torch.Tensor):
        return torch.exp(number)
    result = math.exp(value(number))
    return Dual(result, result * number.slope) if isinstance(number, Dual) else result


def log(number):
    """The natural logarithm."""
    if isinstance(number, torch.Tensor):
        return torch.log(number)
    result = math.log(value(number))
    return Dual(result, number.slope / number.value) if isinstance(number, Dual) else result


def exp_tau(tau):
    """sinabs: alpha = exp(-1 / tau)."""
    return exp(-1.0 / tau)


def sigmoid(number):
    """1 / (1 + e^-number)."""
    return 1.0 / (1.0 + exp(0.0 - number))


def softplus(number):
    """ln(1 + e^number)."""
    return log(1.0 + exp(number))


def clamped(number):
    """min(max(number, 0), 1)."""
    return number if 0 <= value(number) <= 1 else 0.0 * number + (1.0 if value(number) > 1 else 0.0)


def atan_slope(z, theta):
    """snnTorch's default surrogate, alpha = 2, at z = v - theta."""
    return 1 / (1 + (math.pi * z) ** 2)


def exponential_slope(z, theta):
    """sinabs's default surrogate, width 0.5 theta."""
    return math.exp(-abs(z) / (0.5 * theta)) / (0.5 * theta)


def emit(count, v, theta, surrogate, threshold_gradient=True):
    """`count` spikes whose slope is the surrogate's."""
    moved = v - (theta if threshold_gradient else value(theta))
    if isinstance(moved, float):
        return count
    height = surrogate(value(moved), value(theta))
    if isinstance(moved, torch.Tensor):
        return count + height * (moved - moved.detach())
    return Dual(count, height * moved.slope)


def snntorch_leaky(xs, beta, theta, g=1.0, reset="subtract", delay=True, surrogate=atan_slope):
    """snnTorch's Leaky: (outputs, mem after each call), `mem` as snnTorch stores it."""
    mem, outputs, mems = 0.0 * xs[0], [], []
    for x in xs:
        r = 1.0 if value(mem) - value(theta) > 0 else 0.0  # detached: a number without a derivative
        if reset == "subtract":
            mem = (beta * mem + x) - r * theta
        elif reset == "zero":
            mem = beta * ((1 - r) * mem) + x
        else:
            mem = beta * mem + x
        spikes = emit(1.0 if value(mem) - value(theta) > 0 else 0.0, mem, theta, surrogate)
        outputs.append(spikes * g)
        if not delay:
            d = spikes - r
            mem = mem - d * theta if reset == "subtract" else mem - d * mem if reset == "zero" else mem
        mems.append(mem)
    return outputs, mems


def sinabs_lif(
    xs,
    alpha,
    theta,
    spikes=("multiple", None),
    reset=("subtract", None),
    norm_input=True,
    alpha_syn=None,
    min_v_mem=None,
    surrogate=exponential_slope,
    threshold_gradient=False,
    detached=False,
):
    """sinabs's LIF: (spikes, v_mem after each step, i_syn after each step).

    spikes: ("single" | "strict" | "multiple" | "limited", n). reset: ("subtract", k or None for theta), ("over_alpha",
    None) for theta / alpha, ("reset", r) for sinabs's MembraneReset(r), ("value", r) for v = r where a spike is.
    """
    v, i, outputs, vs, currents = 0.0 * xs[0], 0.0 * xs[0], [], [], []
    for x in xs:
        i = x if alpha_syn is None else alpha_syn * (i + x)
        v = alpha * v + ((1 - alpha) * i if norm_input else i)
        if spikes[0] == "single":
            n = 1.0 if value(v) - value(theta) >= 0 else 0.0
        elif spikes[0] == "strict":
            n = 1.0 if value(v) - value(theta) > 0 else 0.0
        else:
            n = float(math.trunc(value(v) / value(theta))) if value(v) > 0 else 0.0
            n = min(n, float(spikes[1])) if spikes[0] == "limited" else n
        s = emit(n, v, theta, surrogate, threshold_gradient)
        outputs.append(s)
        s = value(s) if detached else s
        if reset[0] == "subtract":
            v = v - s * (theta if reset[1] is None else reset[1])
        elif reset[0] == "over_alpha":
            v = v - s * (theta / alpha)
        elif reset[0] == "value":
            v = v - (s + (min(n, 1.0) - n)) * (v - reset[1])
        elif reset[0] == "reset":
            v = v * (1.0 if value(s) == 0 else 0.0) + reset[1]
        if min_v_mem is not None and value(v) <= value(min_v_mem):
            v = 0.0 * v + min_v_mem
        vs.append(v)
        currents.append(i)
    return outputs, vs, currents


def tracetorch_lib(xs, beta, theta, bias=0.0, hard=True):
    """tt.snn.LIB: (outputs, mem). Hard: one spike where mem - theta + bias > 0, the slope of sigmoid(4 z)."""
    mem, outputs, mems = 0.0 * xs[0], [], []
    for x in xs:
        mem = beta * mem + x
        s = sigmoid(4.0 * ((mem - theta) + bias))
        if hard:
            n = 1.0 if value(mem) - value(theta) + value(bias) > 0 else 0.0
            s = Dual(n, s.slope) if isinstance(s, Dual) else n
        mem = mem - s * theta
        outputs.append(s)
        mems.append(mem)
    return outputs, mems


def leaky_integrator(xs, decay, gain=1.0, leak=0.0, syn=None, min_v_mem=None):
    """No spikes: v = a*v + b*i + (1-a)*leak, bounded below; (v after each step,)."""
    v, i, vs = 0.0 * xs[0], 0.0 * xs[0], []
    for x in xs:
        i = x if syn is None else syn * (i + x)
        v = decay * v + gain * i + (1 - decay) * leak
        if min_v_mem is not None and value(v) <= value(min_v_mem):
            v = 0.0 * v + min_v_mem
        vs.append(v)
    return (vs,)


def columns(loop, xs, parameters, direction=None):
    """`loop(xs, **parameters)` for every neuron of xs [T, ...], the parameters broadcast against the neurons.

    Args:
        direction: `{name: array}` with "x" among the names: run on `Dual` numbers with these derivatives.

    Returns:
        Arrays [T, ...] of what the loop returns, or of its derivatives along `direction`.
    """
    inputs = {"x": xs, **parameters}
    shapes = {name: xs.shape if name == "x" else xs.shape[1:] for name in inputs}
    inputs = {n: np.broadcast_to(np.asarray(p, dtype=np.float64), shapes[n]) for n, p in inputs.items()}
    slopes = {n: np.broadcast_to(np.asarray(p, dtype=np.float64), shapes[n]) for n, p in (direction or {}).items()}
    results = None
    for index in np.ndindex(*xs.shape[1:]):
        own = {}
        for name, array in inputs.items():
            place = (slice(None), *index) if name == "x" else index
            numbers = np.atleast_1d(array[place]).tolist()
            if direction is not None:
                given = np.atleast_1d(slopes[name][place]).tolist() if name in slopes else [0.0] * len(numbers)
                numbers = [Dual(n, s) for n, s in zip(numbers, given, strict=True)]
            own[name] = numbers if name == "x" else numbers[0]
        found = loop(own.pop("x"), **own)
        results = [np.full(xs.shape, np.nan) for _ in found] if results is None else results
        for array, column in zip(results, found, strict=True):
            array[(slice(None), *index)] = [slope(n) if direction is not None else n for n in column]
    return results


# ---- specs, by hand ------------------------------------------------------------------------------------------------


def parameter(number, dtype=np.float64, **options):
    """A `Parameter` of one precision."""
    return Parameter(np.asarray(number, dtype=dtype), **options)


LEAKY_RESETS = {
    ("subtract", True): ("subtract", "next_step_after_decay", "detached"),
    ("subtract", False): ("subtract", "same_step_residual", "attached"),
    ("zero", True): ("value", "next_step_before_decay", "detached"),
    ("zero", False): ("value", "same_step_residual", "attached"),
    ("none", True): ("none", "next_step_after_decay", "detached"),
    ("none", False): ("none", "next_step_after_decay", "detached"),
}


def leaky_spec(beta, theta, g=1.0, reset="subtract", delay=True, dtype=np.float64, raw="clamped", **changes):
    """What snnTorch's Leaky computes, as a spec."""
    kind, timing, gradient = LEAKY_RESETS[reset, delay]
    parameters = {
        "mem_decay": parameter(beta, dtype, raw=raw, learnable=True),
        "threshold": parameter(theta, dtype, learnable=True),
        "spike_scale": parameter(g, dtype, learnable=True),
    }
    if kind == "value":
        parameters["reset_value"] = parameter(0.0, dtype)
    choices = {
        "form": "snntorch.Leaky",
        "comparison": ">",
        "reset": kind,
        "reset_timing": timing,
        "reset_gradient": gradient,
        "surrogate": Surrogate("atan"),
        "parameters": parameters,
    }
    return NeuronSpec(**{**choices, **changes})


def lif_spec(
    decay,
    theta,
    spikes=("multiple", None),
    reset=("subtract", None),
    norm_input=True,
    syn=None,
    min_v_mem=None,
    dtype=np.float64,
    raw="value",
    detached=False,
    **changes,
):
    """What sinabs's LIF computes, as a spec; `spikes` and `reset` as `sinabs_lif` takes them."""
    parameters = {
        "mem_decay": parameter(decay, dtype, raw=raw, learnable=True),
        "threshold": parameter(theta, dtype, learnable=True),
    }
    if syn is not None:
        parameters["syn_decay"] = parameter(syn, dtype, raw=raw, learnable=True)
    if min_v_mem is not None:
        parameters["min_v_mem"] = parameter(min_v_mem, dtype, learnable=True)
    kind, amount = {
        "subtract": ("subtract", "threshold" if reset[1] is None else "value"),
        "over_alpha": ("subtract", "threshold_over_decay"),
        "value": ("value", "threshold"),
        "reset": ("add_value", "threshold"),
        "none": ("none", "threshold"),
    }[reset[0]]
    if amount == "value":
        parameters["reset_amount"] = parameter(reset[1], dtype, learnable=True)
    if kind in ("value", "add_value"):
        parameters["reset_value"] = parameter(reset[1], dtype, learnable=True)
    choices = {
        "form": "sinabs.LIF",
        "synapse": "none" if syn is None else "add_then_decay",
        "input_gain": "one_minus_decay" if norm_input else "one",
        "comparison": ">" if spikes[0] == "strict" else ">=",
        "spike_count": "single" if spikes[0] == "strict" else spikes[0],
        "max_spikes": spikes[1] if spikes[0] == "limited" else None,
        "reset": kind,
        "reset_amount": amount,
        "reset_gradient": "detached" if detached or kind == "add_value" else "attached",
        "clamp": "none" if min_v_mem is None else "after_reset",
        "surrogate": Surrogate("single_exponential"),
        "threshold_gradient": False,
        "parameters": parameters,
    }
    return NeuronSpec(**{**choices, **changes})
