"""The oracle's gradients against finite differences of smooth neurons: spikes replaced by what the surrogate derives.

Where a reset is attached, the smooth spikes drive it; where it is detached, the spikes of the unperturbed run do, as
constants. Either way the loss is differentiable, and the oracle's backward pass must be its gradient.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.naive import parameter
from tracetorch import oracle
from tracetorch.conformance.cases import draw
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional.surrogates import Surrogate

T, B, N = 9, 2, 3


def primitive(name):
    """What a surrogate with its default parameters is the derivative of."""
    normal = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
    return {
        "atan": lambda z, theta: np.arctan(math.pi * z) / math.pi + 0.5,
        "logistic": lambda z, theta: 1 / (1 + np.exp(-4 * z)),
        "fast_sigmoid": lambda z, theta: z / (1 + 25 * np.abs(z)),
        "gaussian": lambda z, theta: normal(z / 0.5),
        "single_exponential": lambda z, theta: np.sign(z) * (1 - np.exp(-np.abs(z) / (0.5 * theta))),
        "straight_through": lambda z, theta: z + 0.0,
    }[name]


RAW = {
    "value": lambda raw: raw,
    "clamped": lambda raw: np.clip(raw, 0, 1),
    "exp_tau": lambda raw: np.exp(-1 / raw),
    "sigmoid": lambda raw: 1 / (1 + np.exp(-raw)),
    "softplus": lambda raw: np.log1p(np.exp(raw)),
}


def smooth(spec, x, p, constant=None):
    """The smooth neuron in float64: (outputs, smooth spikes, currents, membranes after the reset), each [T, B, N].

    constant: spikes for a detached reset.
    """
    value = {name: RAW[spec.parameters[name].raw](raw) for name, raw in p.items()}
    a, theta = value["mem_decay"], value.get("threshold", 1.0)
    gain = {"one": 1.0, "one_minus_decay": 1 - a, "value": value.get("input_gain", 1.0)}[spec.input_gain]
    rho = {"threshold": theta, "threshold_over_decay": theta / a, "value": value.get("reset_amount")}[spec.reset_amount]
    v = i = np.zeros(x.shape[1:])
    kept = []
    for t, x_t in enumerate(x):
        i = x_t if spec.synapse == "none" else value["syn_decay"] * (i + x_t)
        u = a * v + gain * i + (1 - a) * value.get("leak", 0.0)
        if spec.output == "membrane":
            s, output, v = u * 0, u, u
        else:
            s = primitive(spec.surrogate.name)(u - theta + value.get("bias", 0.0), theta)
            output = value.get("spike_scale", 1.0) * s
            r = s if constant is None else constant[t]
            if spec.reset == "subtract":
                v = u - r * rho
            elif spec.reset == "value":
                v = np.where(r > 0, value["reset_value"], u)
            elif spec.reset == "add_value":
                v = u * (r == 0) + value["reset_value"]
            else:
                v = u
        if spec.clamp == "after_reset":
            v = np.maximum(v, value["min_v_mem"])
        kept.append((output, s, i, v))
    return tuple(np.stack(column) for column in zip(*kept, strict=True))


def made(**options):
    values = {"mem_decay": (0.8, "value"), "threshold": (1.0, "value")} | options.pop("values", {})
    parameters = {
        name: parameter(number, raw=raw, learnable=True) for name, (number, raw) in values.items() if number is not None
    }
    chosen = {"form": "any", "surrogate": Surrogate("atan"), "parameters": parameters}
    return NeuronSpec(**(chosen | options))


PER_NEURON = np.array([0.5, 0.7, 0.9])
ATTACHED = {
    "subtract": made(),
    "over decay": made(reset_amount="threshold_over_decay", values={"mem_decay": (PER_NEURON, "value")}),
    "an amount": made(reset_amount="value", values={"reset_amount": (0.6, "value")}),
    "a synapse": made(synapse="add_then_decay", values={"syn_decay": (0.6, "value")}),
    "raw forms": made(
        synapse="add_then_decay",
        values={"mem_decay": (5.0, "exp_tau"), "syn_decay": (0.4, "sigmoid"), "threshold": (0.5, "softplus")},
    ),
    "clamped": made(values={"mem_decay": (np.array([0.3, 0.9, 1.25]), "clamped")}),
    "normalised input": made(input_gain="one_minus_decay", values={"mem_decay": (PER_NEURON, "value")}),
    "a gain": made(input_gain="value", values={"input_gain": (1.5, "value")}),
    "leak, bias, scale": made(values={"leak": (0.3, "value"), "bias": (0.2, "value"), "spike_scale": (0.7, "value")}),
    "a lower bound": made(clamp="after_reset", values={"min_v_mem": (-0.4, "value")}),
    "no reset": made(reset="none"),
    "a fast sigmoid": made(surrogate=Surrogate("fast_sigmoid")),
    "logistic": made(surrogate=Surrogate("logistic"), comparison=">"),
    "straight through": made(surrogate=Surrogate("straight_through")),
    "a gaussian": made(surrogate=Surrogate("gaussian"), threshold_gradient=False),
    "an exponential": made(surrogate=Surrogate("single_exponential"), threshold_gradient=False),
    "no spikes": made(
        output="membrane",
        spike_count="none",
        reset="none",
        surrogate=None,
        threshold_gradient=False,
        clamp="after_reset",
        values={"threshold": (None, ""), "min_v_mem": (0.2, "value"), "leak": (0.3, "value")},
    ),
}
DETACHED = {
    "subtract": made(reset_gradient="detached"),
    "over decay": made(reset_gradient="detached", reset_amount="threshold_over_decay"),
    "value": made(reset="value", reset_gradient="detached", values={"reset_value": (-0.2, "value")}),
    "add value": made(reset="add_value", reset_gradient="detached", values={"reset_value": (0.1, "value")}),
    "value, bound": made(
        reset="value",
        reset_gradient="detached",
        clamp="after_reset",
        values={"reset_value": (0.0, "value"), "min_v_mem": (-0.4, "value")},
    ),
}


def agreed(spec, constant_spikes):
    """The largest relative error of the oracle's gradients against central differences, over all inputs."""
    x = draw(5, (T, B, N), -900, 1900, 1e-3).astype(np.float64)
    grad_output = draw(6, (T, B, N), -8, 8, 1 / 8).astype(np.float64)
    p = {name: parameter.value.astype(np.float64) for name, parameter in spec.parameters.items()}
    spikes = None
    if constant_spikes:
        hard = np.zeros(x.shape)
        for _ in range(T):  # spike by spike: those of a neuron that resets by its hard spikes
            _, s, _, _ = smooth(spec, x, p, hard)
            hard = (s >= 0.5) * 1.0
        spikes = hard
        assert 3 <= spikes.sum() <= x.size - 3
    output, s, i, v = smooth(spec, x, p, spikes)
    states = {"v_mem": v} | ({"i_syn": i} if "i_syn" in spec.states else {})
    # the oracle takes the spikes of the reset from the outputs; a detached reset has constants there
    emitted = output if spikes is None else spikes * (RAW["value"](p.get("spike_scale", np.ones(()))))
    truth = oracle.gradients(spec, oracle.Recording(x, emitted, states, spec), grad_output)

    def loss(changed_x, changed_p):
        return float((grad_output * smooth(spec, changed_x, changed_p, spikes)[0]).sum())

    worst, step = 0.0, 1e-6
    for name in ("x", *p):
        if name == "threshold" and not spec.threshold_gradient:
            continue
        array = x if name == "x" else p[name]
        numeric = np.zeros(array.shape)
        for place in np.ndindex(*array.shape):
            ends = []
            for sign in (1, -1):
                moved = array.copy()
                moved[place] += sign * step
                ends.append(loss(moved, p) if name == "x" else loss(x, {**p, name: moved}))
            numeric[place] = (ends[0] - ends[1]) / (2 * step)
        assert np.abs(numeric).max() > 1e-3, f"{name}: no gradient, nothing shown"
        worst = max(worst, float(np.abs(truth[name] - numeric).max() / np.abs(numeric).max()))
    return worst


@pytest.mark.parametrize("name", ATTACHED)
def test_attached_gradients_are_those_of_the_smooth_neuron(name):
    assert agreed(ATTACHED[name], constant_spikes=False) < 1e-6


@pytest.mark.parametrize("name", DETACHED)
def test_detached_gradients_are_those_with_constant_spikes(name):
    assert agreed(DETACHED[name], constant_spikes=True) < 1e-6


@pytest.mark.parametrize("name", ["subtract", "a synapse", "leak, bias, scale"])
def test_the_wrong_gradient_is_not(name):
    """That of the detached neuron is not the attached one's."""
    spec = ATTACHED[name]
    wrong = spec.replace(reset_gradient="detached")
    x = draw(5, (T, B, N), -900, 1900, 1e-3).astype(np.float64)
    p = {n: q.value.astype(np.float64) for n, q in spec.parameters.items()}
    output, _, i, v = smooth(spec, x, p)
    states = {"v_mem": v} | ({"i_syn": i} if "i_syn" in spec.states else {})
    recording = oracle.Recording(x, output, states, spec)
    right, other = (oracle.gradients(s, recording, np.ones(x.shape)) for s in (spec, wrong))
    assert oracle.gradient_error(other["x"], right["x"]) > 1e-2
