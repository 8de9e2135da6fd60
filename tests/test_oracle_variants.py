"""snnTorch's Alpha and sinabs's adaptive threshold in the oracle, against one neuron at a time in Python numbers.

The loops below are written from the equations. With `Dual` numbers they carry a derivative forward along the
trajectory, which the oracle's backward pass, derived by hand, must agree with; a step of 1e-6 in a parameter that moves
no spike agrees with both where no surrogate has a part.
"""

import numpy as np
import pytest
import torch

from tests.naive import Dual, atan_slope, emit, exponential_slope, log, parameter, slope, value
from tracetorch import oracle
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional.surrogates import OpaqueSurrogate, Surrogate
from tracetorch.oracle.equations import OracleError

T = 60


def alpha_neuron(xs, alpha, beta, theta, reset, surrogate=atan_slope):
    """snnTorch Alpha: outputs, and e, i and mem after every step."""
    e = i = mem = 0.0 * xs[0]
    outputs, states = [], []
    for x in xs:
        r = 1.0 if value(mem) > value(theta) else 0.0
        k = log(alpha) / (log(beta) - log(alpha)) + 1
        e1, i1 = alpha * e + x, beta * i - x
        m1 = k * (e1 + i1)
        if reset == "zero":
            e, i, mem = e1 - e1 * r, i1 - i1 * r, m1 - m1 * r
        elif reset == "subtract":
            e, i, mem = e1 - theta * r, i1 - (beta * i - x) * r, m1 - (0.0 - i) * r
        else:
            e, i, mem = e1, i1, m1
        outputs.append(emit(1.0 if value(mem) > value(theta) else 0.0, mem, theta, surrogate))
        states.append((e, i, mem))
    return outputs, states


def alif_neuron(xs, a, a_s, a_n, scale, theta, norm, reset, surrogate=exponential_slope):
    """sinabs ALIF with one spike a step: outputs, and i, v and n after every step."""
    i = v = n = 0.0 * xs[0]
    outputs, states = [], []
    for x in xs:
        i = x if a_s is None else a_s * (i + x)
        i = (1 - a) * i if norm else i
        v = a * v + i
        now = theta + scale * n
        fired = 1.0 if value(v) - value(now) >= 0 else 0.0
        s = emit(fired, v, now, lambda z, _, now=now: surrogate(z, value(now)), threshold_gradient=False)
        v = v - s * now if reset == "subtract" else v - s * 0.75 if reset == "constant" else v * (1 - fired) + 0.125
        n = a_n * n + (1 - a_n) * s
        outputs.append(s)
        states.append((i, v, n))
    return outputs, states


def alpha_spec(numbers, reset):
    choices = {
        "subtract": {"reset": "subtract", "reset_timing": "next_step_after_decay"},
        "zero": {"reset": "value", "reset_timing": "next_step_discards_input"},
        "none": {"reset": "none"},
    }[reset]
    names = {"alpha": "syn_decay", "beta": "mem_decay", "theta": "threshold"}
    values = {names[name]: parameter(number) for name, number in numbers.items()}
    if reset == "zero":
        values["reset_value"] = parameter(0.0)
    return NeuronSpec(
        form="snntorch.Alpha",
        synapse="difference_of_exponentials",
        comparison=">",
        reset_gradient="detached",
        surrogate=Surrogate("atan"),
        parameters=values,
        **choices,
    )


def alif_spec(numbers, norm, reset):
    choices = {
        "subtract": {"reset": "subtract"},
        "constant": {"reset": "subtract", "reset_amount": "value"},
        "add_value": {"reset": "add_value", "reset_gradient": "detached"},
    }[reset]
    names = {"a": "mem_decay", "a_s": "syn_decay", "a_n": "adapt_decay", "scale": "adapt_scale", "theta": "threshold"}
    values = {names[name]: parameter(number) for name, number in numbers.items() if number is not None}
    values |= {"reset_amount": parameter(0.75)} if reset == "constant" else {}
    values |= {"reset_value": parameter(0.125)} if reset == "add_value" else {}
    synapse = numbers["a_s"] is not None
    gain = "one_minus_decay_kept" if synapse else "one_minus_decay"
    return NeuronSpec(
        form="sinabs.ALIF",
        synapse="add_then_decay" if synapse else "none",
        input_gain=gain if norm else "one",
        surrogate=Surrogate("single_exponential"),
        threshold_gradient=False,
        parameters=values,
        **choices,
    )


def stimulus(seed, mean=0.4):
    return (np.random.default_rng(seed).normal(mean, 0.6, T)).tolist()


def recorded(spec, names, xs, outputs, states):
    columns = {name: np.array([[value(s[k])] for s in states]) for k, name in enumerate(names) if name is not None}
    return oracle.Recording(np.array(xs)[:, None], np.array([[value(s)] for s in outputs]), columns, spec)


ALPHA = {"alpha": 0.85, "beta": 0.6, "theta": 0.8}
ALIF = {"a": 0.8, "a_s": None, "a_n": 0.9, "scale": 0.8, "theta": 0.6}
CASES = {
    **{f"Alpha, {reset}": ("alpha", dict(ALPHA), (reset,)) for reset in ("none", "zero", "subtract")},
    **{
        f"ALIF, {reset}{', synapse' * (a_s is not None)}{', norm' * norm}": (
            "alif",
            {**ALIF, "a_s": a_s},
            (norm, reset),
        )
        for reset in ("subtract", "constant", "add_value")
        for a_s in (None, 0.7)
        for norm in (False, True)
    },
}


def case(name):
    """A function of (xs, numbers), its spec of numbers, the names of its states, and its input."""
    kind, numbers, choices = CASES[name]
    if kind == "alpha":
        spec = alpha_spec(numbers, *choices)
        return alpha_neuron, numbers, choices, spec, ("i_exc", "i_inh", "v_mem"), stimulus(1, 0.2)
    spec = alif_spec(numbers, *choices)
    states = ("i_syn" if numbers["a_s"] is not None else None, "v_mem", "adaptation")
    return alif_neuron, numbers, choices, spec, states, stimulus(2, 2.5 if choices[0] else 0.35)


def ran(name):
    neuron, numbers, choices, spec, names, xs = case(name)
    outputs, states = neuron(xs, *numbers.values(), *choices)
    return recorded(spec, names, xs, outputs, states), spec, xs


@pytest.mark.parametrize("name", CASES)
def test_the_forward_pass(name):
    recording, spec, _ = ran(name)
    judged = oracle.judge(spec, recording)
    assert judged.ok
    assert judged.mismatches == 0
    assert judged.max_state_error < 1e-13
    assert 3 < judged.spikes < T - 3


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_state_or_spike_is_noticed(name):
    recording, spec, _ = ran(name)
    for state in spec.states:
        wrong = {n: s.copy() for n, s in recording.states.items()}
        wrong[state][20] += 1e-3
        assert not oracle.judge(spec, oracle.Recording(recording.x, recording.outputs, wrong, spec)).ok, state
    outputs = recording.outputs.copy()
    outputs[20] = 1 - outputs[20]
    assert oracle.judge(spec, oracle.Recording(recording.x, outputs, recording.states, spec)).unexplained > 0


@pytest.mark.parametrize("name", CASES)
def test_the_backward_pass_is_the_adjoint_of_the_linearised_forward_pass(name):
    neuron, numbers, choices, spec, _, xs = case(name)
    recording, _, _ = ran(name)
    weights = np.random.default_rng(5).normal(size=T)
    found = oracle.gradients(spec, recording, weights[:, None])

    def derivative(inputs, values):
        outputs, _ = neuron(inputs, *values, *choices)
        return sum(w * slope(s) for w, s in zip(weights, outputs, strict=True))

    theirs = {"alpha": "syn_decay", "beta": "mem_decay", "theta": "threshold", "a": "mem_decay", "a_s": "syn_decay"}
    theirs |= {"a_n": "adapt_decay", "scale": "adapt_scale"}
    for moved, number in numbers.items():
        if number is None:
            continue
        values = [Dual(n, 1.0) if key == moved else n for key, n in numbers.items()]
        expected = derivative([Dual(x) for x in xs], values)
        assert found[theirs[moved]].item() == pytest.approx(expected, rel=1e-9, abs=1e-9), moved
    for t in (0, 1, 17, T - 1):
        inputs = [Dual(x, 1.0 if k == t else 0.0) for k, x in enumerate(xs)]
        expected = derivative(inputs, numbers.values())
        assert found["x"][t, 0] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if "none" not in name])
def test_finite_differences_where_no_spike_moves(name):
    """The states of `neuron` are smooth in its numbers between the spikes; a step of 1e-6 moves none."""
    neuron, numbers, choices, _, _, xs = case(name)
    flat = {"surrogate": lambda z, theta: 0.0}

    def last(values):
        outputs, states = neuron(xs, *values, *choices, **flat)
        return [value(s) for s in outputs], [value(v) for v in states[-1]]

    spikes, _ = last(numbers.values())
    for moved, number in numbers.items():
        if number is None:
            continue
        up, down = (last([n + h if key == moved else n for key, n in numbers.items()]) for h in (1e-6, -1e-6))
        assert up[0] == down[0] == spikes
        values = [Dual(n, 1.0) if key == moved else n for key, n in numbers.items()]
        _, states = neuron([Dual(x) for x in xs], *values, *choices, **flat)
        for k, state in enumerate(states[-1]):
            assert slope(state) == pytest.approx((up[1][k] - down[1][k]) / 2e-6, rel=1e-4, abs=1e-6)


def test_an_opaque_surrogate_is_evaluated_in_float64():
    own = OpaqueSurrogate(function=lambda v, theta: 1 / (1 + torch.abs(v - theta)))
    spec = alif_spec(ALIF, False, "subtract").replace(surrogate=own)
    recording, _, _ = ran("ALIF, subtract")
    weights = np.random.default_rng(5).normal(size=(T, 1))
    found = oracle.gradients(spec, recording, weights)
    neuron, numbers, choices, _, _, xs = case("ALIF, subtract")
    inputs = [Dual(x, 1.0 if k == 3 else 0.0) for k, x in enumerate(xs)]
    outputs, _ = neuron(inputs, *numbers.values(), *choices, surrogate=lambda z, theta: 1 / (1 + abs(z)))
    expected = sum(w * slope(s) for w, s in zip(weights[:, 0], outputs, strict=True))
    assert found["x"][3, 0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reset_timing": "same_step_residual"}, "reset_timing='same_step_residual'"),
        ({"reset_timing": "next_step_after_decay", "reset_gradient": "detached"}, "reset_timing="),
        ({"reset_amount": "threshold_over_decay"}, "reset_amount='threshold_over_decay'"),
    ],
)
def test_an_adaptive_threshold_with_another_reset_is_refused_by_name(changes, named):
    recording, spec, _ = ran("ALIF, subtract")
    with pytest.raises(OracleError, match=named):
        oracle.judge(spec.replace(**changes), recording)


def test_an_adaptive_threshold_has_no_equations_of_its_own():
    with pytest.raises(OracleError, match="adapt_decay"):
        oracle.equations(alif_spec(ALIF, False, "subtract"))


def test_another_reset_of_a_difference_of_exponentials_is_refused_by_name():
    recording, spec, _ = ran("Alpha, subtract")
    with pytest.raises(OracleError, match="reset_timing='same_step'"):
        oracle.judge(spec.replace(reset_timing="same_step"), recording)
