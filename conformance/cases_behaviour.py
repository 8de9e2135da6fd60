"""Cases of the backward pass, and of what a simulator owes whatever it computes: states, sizes, numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tracetorch.conformance.cases import Array, Case, draw, neuron
from tracetorch.conformance.cases_choices import ATTACHED, DELAYED, RESIDUAL, apart, noise
from tracetorch.conformance.cases_states import NORMALISED
from tracetorch.functional.surrogates import SURROGATES, Surrogate


def _raw() -> list[Case]:
    decays = {
        "value": (("value", draw(60, (7,), 500, 980, 1e-3)), 0.9, "seven decays as they are"),
        "clamped": (
            ("clamped", np.array([0.5, 0.9, 1.25, -0.25, 0.75, 1.0, 0.3], np.float32)),
            0.9,
            "raw decays of 1.25 and -0.25 count as 1 and 0, and pass no gradient",
        ),
        "exp_tau": (("exp_tau", draw(61, (7,), 8, 160, 1 / 8)), 0.9, "time constants of 1 to 20 steps"),
        "sigmoid": (("sigmoid", draw(62, (7,), -8, 32, 1 / 8)), 0.9, "raw decays of -1 to 4"),
        "exp_dt_tau": (("exp_dt_tau", draw(94, (7,), 4, 80, 1 / 8)), 0.9, "time constants of 1 to 20 steps of 1/2 ms"),
        "one_minus_inverse_tau": (
            ("one_minus_inverse_tau", draw(95, (7,), 12, 160, 1 / 8)),
            0.9,
            "time constants of 1.5 to 20 steps, Euler's way",
        ),
        "one_minus_dt_rate": (("one_minus_dt_rate", draw(96, (7,), 50, 600, 1.0)), 0.9, "rates of 50 to 600 a second"),
        "one_minus_sigmoid": (("one_minus_sigmoid", draw(97, (7,), -32, 4, 1 / 8)), 0.9, "raw numbers of -4 to 1/2"),
    }
    others: dict[str, dict[str, Any]] = {
        "exp_tau": {"surrogate": Surrogate("single_exponential")},
        "exp_dt_tau": {"dt": 0.5, "time_unit": "ms"},
        "one_minus_dt_rate": {**NORMALISED, "dt": 0.001, "time_unit": "s"},
    }
    found = [
        Case(
            f"raw-{form.replace('_', '-')}",
            f"raw.{form}",
            text,
            neuron(**{"comparison": ">", **others.get(form, {}), "mem_decay": decay, "learn": ("mem_decay",)}),
            noise(63) if form != "one_minus_dt_rate" else noise(98, -2000, 5000),
            {"spike": 50, "loaded": 400},
            {"another decay": neuron(mem_decay=other, learn=("mem_decay",))},
            grad=True,
        )
        for form, (decay, other, text) in decays.items()
    ]
    soft = {**ATTACHED, "mem_decay": 0.9, "comparison": ">", "surrogate": Surrogate("logistic")}
    found.append(
        Case(
            "raw-softplus",
            "raw.softplus",
            "thresholds through a softplus",
            neuron(**soft, threshold=("softplus", draw(64, (7,), -4, 12, 1 / 8)), learn=("threshold",)),
            noise(65),
            {"spike": 50},
            {"a threshold of 1": neuron(**soft, learn=("threshold",))},
            grad=True,
        )
    )
    return found


def _surrogates() -> list[Case]:
    given = {"triangular": {"scale": 0.5}, "sigmoid": {"slope": 5.0}, "sparse_fast_sigmoid": {"cutoff": 0.25}}
    found = []
    for name in SURROGATES:
        other = "zero" if name != "zero" else "straight_through"
        own = Surrogate(name, tuple(given.get(name, {}).items()))
        found.append(
            Case(
                f"surrogate-{name.replace('_', '-')}",
                f"surrogate.{name}",
                "gradients on both sides of the threshold, near and far",
                neuron(mem_decay=0.75, comparison=">", surrogate=own, learn=("mem_decay",)),
                noise(66, -700, 1500),
                {"near": 30, "spike": 50, "below": 200},
                {other: neuron(mem_decay=0.75, comparison=">", surrogate=Surrogate(other), learn=("mem_decay",))},
                grad=True,
            )
        )
    found.append(
        Case(
            "surrogate-sigmoid-far",
            "surrogate.sigmoid",
            "8 below the threshold at a slope of 25: the gradient is next to 0, and a number",
            neuron(mem_decay=0.75, comparison=">", surrogate=Surrogate("sigmoid")),
            noise(67, -4000, 2500),
            {"negative": 100, "spike": 30},
            {"none": neuron(mem_decay=0.75, comparison=">", surrogate=Surrogate("zero"))},
            grad=True,
        )
    )
    return found


def _gradients() -> list[Case]:
    attached = {**ATTACHED, "mem_decay": 0.9}
    delayed = {**DELAYED, "mem_decay": 0.9}
    residual = {**RESIDUAL, "mem_decay": 0.9}
    learned = {**attached, "learn": ("threshold",), "comparison": ">", "surrogate": Surrogate("atan")}
    stopped = {"mem_decay": 0.9, "comparison": ">", "reset_gradient": "membrane_stopped"}
    outside = {**attached, "learn": ("threshold",), "threshold_gradient": False}
    attached_apart = apart(attached, detached={"reset_gradient": "detached"})
    return [
        Case("gradient-attached", "reset_gradient.attached", "the gradient flows through the spikes of the reset",
             neuron(**attached), noise(40), {"spike": 50, "near": 30}, attached_apart, grad=True),
        Case("gradient-attached-residual", "reset_gradient.attached", "so it does in snnTorch's reset_delay=False",
             neuron(**residual), noise(41, -500, 2000), {"spike": 50, "residual": 5},
             apart(residual, detached={"reset_gradient": "detached"}), grad=True),
        Case("gradient-detached", "reset_gradient.detached", "the spikes of the reset are constants",
             neuron(**delayed), noise(42), {"spike": 50, "near": 30},
             apart(delayed, attached={"reset_gradient": "attached"}), grad=True),
        Case("gradient-detached-value", "reset_gradient.detached", "so they are in a reset to 0",
             neuron(mem_decay=0.9, comparison=">"), noise(43), {"spike": 50, "near": 30},
             {"attached": neuron(mem_decay=0.9, reset_gradient="attached")}, grad=True),
        Case("gradient-membrane-stopped", "reset_gradient.membrane_stopped",
             "the membrane of the reset is a constant, its spike is not",
             neuron(**stopped), noise(99), {"spike": 50, "near": 30},
             apart(stopped, attached={"reset_gradient": "attached"}, detached={"reset_gradient": "detached"}),
             grad=True),
        Case("gradient-input", "gradient.input", "through atan, a reset to 0, detached",
             neuron(mem_decay=0.9, comparison=">"), noise(44), {"spike": 50, "loaded": 400},
             {"no decay": neuron(mem_decay=1.0)}, grad=True),
        Case("gradient-input-exponential", "gradient.input", "through an exponential, a subtraction, attached",
             neuron(**attached), noise(45), {"spike": 50, "loaded": 400}, attached_apart, grad=True),
        Case("gradient-mem-decay", "gradient.mem_decay", "one decay for all neurons",
             neuron(mem_decay=0.9, comparison=">", learn=("mem_decay",)), noise(46), {"spike": 50, "loaded": 400},
             {"nothing learned of resets": neuron(mem_decay=0.9, learn=("mem_decay",), reset_gradient="attached")},
             grad=True),
        Case("gradient-mem-decay-per-neuron", "gradient.mem_decay", "seven decays, the reset decayed with them",
             neuron(**{**delayed, "mem_decay": draw(47, (7,), 500, 980, 1e-3)}, learn=("mem_decay",)), noise(48),
             {"spike": 50, "loaded": 400},
             apart({**delayed, "learn": ("mem_decay",)}, other={"mem_decay": 0.7}), grad=True),
        Case("gradient-threshold", "gradient.threshold", "through the reset and through the spikes",
             neuron(**learned), noise(49), {"spike": 50, "near": 30},
             apart(learned, through_the_reset_alone={"threshold_gradient": False}), grad=True),
        Case("gradient-no-threshold", "gradient.no_threshold", "through the reset alone",
             neuron(**outside), noise(50), {"spike": 50, "near": 30},
             apart(outside, through_the_spikes_too={"threshold_gradient": True}), grad=True),
    ]  # fmt: skip


def _states() -> list[Case]:
    calls = (5, 1, 29, 2, 11)
    slow = neuron(mem_decay=0.95)
    return [
        Case("state-carried", "state.carried", "48 calls of one step each",
             slow, noise(51), {"spike": 30, "loaded": 400}, calls=(1,) * 48),
        Case("state-chunks", "state.chunks", "pieces of 5, 1, 29, 2 and 11 steps",
             slow, noise(52), {"spike": 30, "loaded": 400}, calls=calls),
        Case("state-chunks-delayed", "state.chunks", "the same where a reset waits for the next call",
             neuron(mem_decay=0.9, **DELAYED), noise(53), {"spike": 50, "loaded": 400}, calls=calls),
        Case("state-fresh", "state.fresh", "run twice: the second run starts where the first did",
             slow, noise(54, 0, 900), {"spike": 30, "loaded": 400}, runs=2),
        Case("state-gradient", "state.gradient", "the gradient of pieces of 5, 1, 29, 2 and 11 steps",
             neuron(mem_decay=0.95, comparison=">", learn=("mem_decay",)), noise(55), {"spike": 30, "loaded": 400},
             calls=calls, grad=True),
    ]  # fmt: skip


def _shapes() -> list[Case]:
    every = "[3, 3, 37]: every neuron fires in every step"
    full = lambda: draw(73, (3, 3, 37), 1001, 1900, 1e-3)  # noqa: E731
    learn = {"mem_decay": 0.9, "comparison": ">", "learn": ("mem_decay",)}
    return [
        Case("batch-of-one", "shape.one_sample", "[40, 1, 13]",
             neuron(mem_decay=0.9), noise(70, shape=(40, 1, 13)), {"spike": 50}),
        Case("one-neuron", "shape.one_neuron", "[40, 5, 1]",
             neuron(mem_decay=0.9), noise(71, shape=(40, 5, 1)), {"spike": 20}),
        Case("one-step", "shape.one_step", "[1, 3, 13]",
             neuron(mem_decay=0.9), noise(72, -500, 2500, (1, 3, 13)), {"spike": 10, "below": 10}),
        Case("every-element", "shape.every_element", every,
             neuron(mem_decay=0.9), full, {"spike": 333}),
        Case("every-element-gradient", "shape.every_element", f"{every}; its gradients through atan",
             neuron(**learn), full, {"spike": 333}, grad=True),
        Case("every-element-gradient-exponential", "shape.every_element", f"{every}; through an exponential, attached",
             neuron(**{**ATTACHED, **learn}), full, {"spike": 333}, grad=True),
        Case("long", "shape.long", "[2000, 1, 3]",
             neuron(mem_decay=draw(74, (3,), 900, 990, 1e-3)), noise(75, -150, 300, (2000, 1, 3)), {"spike": 100}),
    ]  # fmt: skip


def _pulse(steps: int, neurons: int, again: bool) -> Array:
    """A first input of 1/2 to 15/16, silence, and at the end perhaps enough to fire only with what is left."""
    x = np.zeros((steps, 1, neurons), np.float32)
    x[0] = draw(76, (1, neurons), 8, 15, 1 / 16)
    if again:
        x[-5:] = draw(77, (5, 1, neurons), 100, 1500, 1e-3)
    return x


def _one(number: float) -> Array:
    x = draw(78, (30, 3, 7), -700, 1500, 1e-3)
    x[10, 1, 3] = number
    return x


def _numbers() -> list[Case]:
    slow = 1 - np.float32(2.0) ** -np.array([5, 6, 7, 8, 9], np.float32)
    return [
        Case("silence", "number.silence", "400 steps without input, then one that shows what is left",
             neuron(mem_decay=slow), lambda: _pulse(405, 5, True), {"silence": 1000, "spike": 5}),
        Case("denormal", "number.denormal", "a pulse halved 139 times",
             neuron(), lambda: _pulse(140, 5, False), {"denormal": 60}),
        Case("nan", "number.nan", "one NaN in 630 inputs",
             neuron(mem_decay=0.9, reset="none"), lambda: _one(np.nan),
             {"NaN": 20, "number beside a NaN": 100, "spike": 50}),
        Case("nan-subtract", "number.nan", "the same where spikes are subtracted",
             neuron(mem_decay=0.9, **DELAYED),
             lambda: _one(np.nan), {"NaN": 20, "number beside a NaN": 100, "spike": 50}),
        Case("nan-multiple", "number.nan", "the same where spikes are counted",
             neuron(**{**ATTACHED, "mem_decay": 0.9, "spike_count": "multiple"}),
             lambda: _one(np.nan), {"NaN": 20, "number beside a NaN": 100, "spike": 50}),
        Case("infinite", "number.infinite", "one infinite input in 630, with a reset to 0",
             neuron(mem_decay=0.9), lambda: _one(np.inf), {"infinite": 1, "spike": 50}),
    ]  # fmt: skip


def behaviours() -> list[Case]:
    """The cases of this file."""
    return [*_raw(), *_surrogates(), *_gradients(), *_states(), *_shapes(), *_numbers()]
