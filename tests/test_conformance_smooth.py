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
DT = 0.7


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
    "exp_dt_tau": lambda raw: np.exp(-DT / raw),
    "one_minus_inverse_tau": lambda raw: 1 - 1 / raw,
    "one_minus_dt_rate": lambda raw: 1 - DT * raw,
    "one_minus_sigmoid": lambda raw: 1 - 1 / (1 + np.exp(-raw)),
}
SYNAPSES = {  # (drive, current kept) of the input, the current before and the decay
    "none": lambda x, i, a_s: (x, x),
    "decay_then_add": lambda x, i, a_s: (a_s * i + x, a_s * i + x),
    "add_then_decay": lambda x, i, a_s: (a_s * (i + x), a_s * (i + x)),
    "read_then_decay": lambda x, i, a_s: (i + x, a_s * (i + x)),
    "moving_average": lambda x, i, a_s: (a_s * i + (1 - a_s) * x, a_s * i + (1 - a_s) * x),
}


def smooth(spec, x, p, constant=None, stopped=None):
    """The smooth neuron in float64: outputs, smooth spikes, states by name, membranes before the reset, [T, B, N].

    constant: spikes for a detached reset, and for what is held after them. stopped: membranes for a reset that is not
    differentiated through them.
    """
    value = {name: RAW[spec.parameters[name].raw](raw) for name, raw in p.items()}
    a, theta = value["mem_decay"], value.get("threshold", 1.0)
    gain = {"one": 1.0, "one_minus_decay": 1 - a, "value": value.get("input_gain", 1.0)}[spec.input_gain]
    rho = {"threshold": theta, "threshold_over_decay": theta / a, "value": value.get("reset_amount")}[spec.reset_amount]
    i, left, n = np.zeros(x.shape[1:]), np.zeros(x.shape[1:]), np.zeros(x.shape[1:])
    fixed, rising = theta, spec.reset_amount == "threshold"
    start = spec.parameters[spec.initial_state].value if spec.initial_state != "zero" else 0.0  # a constant
    v = np.zeros(x.shape[1:]) + start
    held = 1 if spec.reset_timing == "next_step_discards_input" else spec.refractory_steps or 0
    kept = []
    for t, x_t in enumerate(x):
        j, i = SYNAPSES[spec.synapse](x_t, i, value.get("syn_decay"))
        theta = fixed + value.get("adapt_scale", 0.0) * n
        rho = theta if rising else rho
        u = np.where(left > 0, v, a * v + gain * j + (1 - a) * value.get("leak", 0.0))
        if spec.output == "membrane":
            s, output, v = u * 0, u, u
        else:
            s = primitive(spec.surrogate.name)(u - theta + value.get("bias", 0.0), theta)
            output = value.get("spike_scale", 1.0) * s
            r = s if constant is None else constant[t]
            left = np.where(r > 0, held, left - 1)
            if spec.reset == "subtract":
                v = u - r * rho
            elif spec.reset == "value" and spec.spike_count == "smooth":
                v = u + r * (value["reset_value"] - (u if stopped is None else stopped[t]))
            elif spec.reset == "value":
                v = np.where(r > 0, value["reset_value"], u)
            elif spec.reset == "add_value":
                v = u * (r == 0) + value["reset_value"]
            else:
                v = u
        if spec.clamp == "after_reset":
            v = np.maximum(v, value["min_v_mem"])
        if spec.adaptive:
            n = value["adapt_decay"] * n + (1 - value["adapt_decay"]) * s
        kept.append((output, s, i, n, u if spec.stores_before_reset else v, u))
    output, s, i, n, v, u = (np.stack(column) for column in zip(*kept, strict=True))
    states = {"i_syn": i, "v_mem": v, "adaptation": n}
    return output, s, {name: states[name] for name in spec.states}, u


def smooth_difference(spec, x, p, constant=None, stopped=None):
    """The same of a difference of exponentials; its reset is by the spikes of the membrane it left, as constants."""
    value = {name: RAW[spec.parameters[name].raw](raw) for name, raw in p.items()}
    a, a_s, theta, g = value["mem_decay"], value["syn_decay"], value["threshold"], value.get("spike_scale", 1.0)
    k = 1 + np.log(a_s) / (np.log(a) - np.log(a_s))
    e, n, w, kept = np.zeros(x.shape[1:]), np.zeros(x.shape[1:]), np.zeros(x.shape[1:]), []
    for x_t in x:
        r = (w > spec.parameters["threshold"].value) * 1.0 if spec.reset != "none" else 0 * w
        rise, fall = a_s * e + x_t, a * n - x_t
        if spec.reset == "value":
            e, n, w = (1 - r) * rise, (1 - r) * fall, (1 - r) * k * (rise + fall)
        else:
            e, n, w = rise - r * theta, (1 - r) * fall, k * (rise + fall) + r * n
        s = primitive(spec.surrogate.name)(w - theta, theta)
        kept.append((g * s, s, e, n, w))
    output, s, e, n, w = (np.stack(column) for column in zip(*kept, strict=True))
    return output, s, {"i_exc": e, "i_inh": n, "v_mem": w}, w


def made(**options):
    values = {"mem_decay": (0.8, "value"), "threshold": (1.0, "value")} | options.pop("values", {})
    parameters = {
        name: parameter(number, raw=raw, learnable=True) for name, (number, raw) in values.items() if number is not None
    }
    chosen = {"form": "any", "surrogate": Surrogate("atan"), "parameters": parameters}
    return NeuronSpec(**(chosen | options))


UNUSED = ("reset_value",)  # of a difference of exponentials, which is reset to 0
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
    "a synapse that decays first": made(synapse="decay_then_add", values={"syn_decay": (0.6, "value")}),
    "a synapse that is read first": made(synapse="read_then_decay", values={"syn_decay": (0.6, "value")}),
    "an averaging synapse": made(synapse="moving_average", values={"syn_decay": (0.6, "value")}),
    "raw forms with a time step": made(
        synapse="read_then_decay",
        dt=DT,
        time_unit="ms",
        values={"mem_decay": (5.0, "exp_dt_tau"), "syn_decay": (0.4, "one_minus_dt_rate")},
    ),
    "raw forms of Euler's": made(
        synapse="decay_then_add",
        input_gain="one_minus_decay",
        values={
            "mem_decay": (np.array([2.0, 3.0, 5.0]), "one_minus_inverse_tau"),
            "syn_decay": (0.4, "one_minus_sigmoid"),
        },
    ),
    "an adaptive threshold": made(values={"adapt_decay": (0.8, "value"), "adapt_scale": (1.3, "value")}),
    "an adaptive threshold, a reset by a constant": made(
        reset_amount="value",
        synapse="add_then_decay",
        values={
            "adapt_decay": (1.0, "sigmoid"),
            "adapt_scale": (PER_NEURON, "value"),
            "reset_amount": (0.6, "value"),
            "syn_decay": (0.6, "value"),
            "spike_scale": (0.7, "value"),
        },
    ),
    "from the leak": made(initial_state="leak", values={"leak": (0.4, "value")}),
    "smooth": made(spike_count="smooth", values={"reset_amount": (0.6, "value")}, reset_amount="value"),
    "smooth, to a value": made(
        spike_count="smooth", reset="value", initial_state="reset_value", values={"reset_value": (-0.3, "value")}
    ),
    "smooth, the membrane stopped": made(
        spike_count="smooth",
        reset="value",
        reset_gradient="membrane_stopped",
        surrogate=Surrogate("logistic"),
        values={"reset_value": (-0.3, "value")},
    ),
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
    "held": made(
        reset="value",
        reset_gradient="detached",
        refractory="hold",
        refractory_steps=2,
        values={"reset_value": (-0.2, "value"), "mem_decay": (PER_NEURON, "value")},
    ),
    "discarded": made(
        reset="value",
        reset_gradient="detached",
        reset_timing="next_step_discards_input",
        values={"reset_value": (-0.2, "value")},
    ),
    "value, bound": made(
        reset="value",
        reset_gradient="detached",
        clamp="after_reset",
        values={"reset_value": (0.0, "value"), "min_v_mem": (-0.4, "value")},
    ),
}


RISING = {"syn_decay": (0.85, "value"), "mem_decay": (PER_NEURON * 0.8, "value"), "spike_scale": (0.7, "value")}
DIFFERENCE = {
    "none": made(synapse="difference_of_exponentials", reset="none", reset_gradient="detached", values=RISING),
    "subtract": made(
        synapse="difference_of_exponentials",
        comparison=">",
        reset_timing="next_step_after_decay",
        reset_gradient="detached",
        values={**RISING, "syn_decay": (2.0, "sigmoid")},
    ),
    "value": made(
        synapse="difference_of_exponentials",
        comparison=">",
        reset="value",
        reset_timing="next_step_discards_input",
        reset_gradient="detached",
        values={**RISING, "syn_decay": (9.0, "exp_tau"), "reset_value": (0.0, "value")},
    ),
}


def agreed(spec, constant_spikes, smooth=smooth):
    """The largest relative error of the oracle's gradients against central differences, over all inputs."""
    x = draw(5, (T, B, N), -900, 1900, 1e-3).astype(np.float64)
    grad_output = draw(6, (T, B, N), -8, 8, 1 / 8).astype(np.float64)
    p = {name: parameter.value.astype(np.float64) for name, parameter in spec.parameters.items()}
    spikes = None
    if constant_spikes:
        hard = np.zeros(x.shape)
        for _ in range(T):  # spike by spike: those of a neuron that resets by its hard spikes
            s = smooth(spec, x, p, hard)[1]
            hard = (s >= 0.5) * 1.0
        spikes = hard
        assert 3 <= spikes.sum() <= x.size - 3
    output, s, states, u = smooth(spec, x, p, spikes)
    stopped = u if spec.reset_gradient == "membrane_stopped" else None
    # the oracle takes the spikes of the reset from the outputs; a detached reset has constants there
    emitted = output if spikes is None else spikes * (RAW["value"](p.get("spike_scale", np.ones(()))))
    truth = oracle.gradients(spec, oracle.Recording(x, emitted, states, spec), grad_output)

    def loss(changed_x, changed_p):
        return float((grad_output * smooth(spec, changed_x, changed_p, spikes, stopped)[0]).sum())

    worst, step = 0.0, 1e-6
    for name in ("x", *p):
        if (name == "threshold" and not spec.threshold_gradient) or (smooth is smooth_difference and name in UNUSED):
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


@pytest.mark.parametrize("name", DIFFERENCE)
def test_gradients_of_a_difference_of_exponentials_are_those_with_constant_resets(name):
    spec = DIFFERENCE[name]
    x = draw(5, (T, B, N), -900, 1900, 1e-3).astype(np.float64)
    fired = smooth_difference(spec, x, {n: q.value.astype(np.float64) for n, q in spec.parameters.items()})[3] > 1
    assert 3 <= fired.sum() <= fired.size - 3
    assert agreed(spec, False, smooth_difference) < 1e-6


@pytest.mark.parametrize("name", ["subtract", "a synapse", "leak, bias, scale", "an adaptive threshold"])
def test_the_wrong_gradient_is_not(name):
    """That of the detached neuron is not the attached one's."""
    spec = ATTACHED[name]
    wrong = spec.replace(reset_gradient="detached")
    x = draw(5, (T, B, N), -900, 1900, 1e-3).astype(np.float64)
    p = {n: q.value.astype(np.float64) for n, q in spec.parameters.items()}
    output, _, states, _ = smooth(spec, x, p)
    recording = oracle.Recording(x, output, states, spec)
    right, other = (oracle.gradients(s, recording, np.ones(x.shape)) for s in (spec, wrong))
    assert oracle.gradient_error(other["x"], right["x"]) > 1e-2
