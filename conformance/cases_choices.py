"""Cases of the choices in the forward pass: decay, input gain, spikes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tracetorch.conformance.cases import Array, Case, draw, neuron
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional.surrogates import Surrogate

# snnTorch's default reset, sinabs's default reset, and one that stays above a lower bound.
DELAYED: Mapping[str, Any] = {
    "comparison": ">",
    "reset": "subtract",
    "reset_timing": "next_step_after_decay",
}
ATTACHED: Mapping[str, Any] = {
    "reset": "subtract",
    "reset_gradient": "attached",
    "surrogate": Surrogate("single_exponential"),
}
RESIDUAL: Mapping[str, Any] = {
    "comparison": ">",
    "reset": "subtract",
    "reset_timing": "same_step_residual",
    "reset_gradient": "attached",
}
MEMBRANE: Mapping[str, Any] = {
    "output": "membrane",
    "spike_count": "none",
    "reset": "none",
    "threshold": None,
    "surrogate": None,
    "threshold_gradient": False,
}


def grid(seed: int, low: int = -4, high: int = 8) -> Callable[[], Array]:
    """Multiples of 1/8 in 14 steps: with a = 1/2 nothing rounds in float32, and ties are exact."""
    return lambda: draw(seed, (14, 4, 17), low, high, 1 / 8)


def noise(
    seed: int, low: int = -700, high: int = 1100, shape: tuple[int, int, int] = (48, 2, 7)
) -> Callable[[], Array]:
    """Thousandths, which float32 rounds."""
    return lambda: draw(seed, shape, low, high, 1e-3)


def apart(base: Mapping[str, Any], **others: Mapping[str, Any]) -> dict[str, NeuronSpec]:
    """Other neurons by name: those of `base` with changes."""
    return {name: neuron(**{**base, **change}) for name, change in others.items()}


def _decays() -> list[Case]:
    varied = draw(31, (7,), 300, 980, 1e-3)
    base = {"mem_decay": varied, **DELAYED}
    near_one = 1 - np.float32(2.0) ** -np.arange(10, 24, 2, dtype=np.float32)
    near_zero = np.array([0.0, 1e-30, 1e-20, 1e-10, 1e-6, 1e-3, 1e-2], dtype=np.float32)
    return [
        Case(
            "decay-geometric",
            "decay.geometric",
            "seven decays between 0.3 and 0.98",
            neuron(**base),
            noise(1),
            {"spike": 50, "loaded": 400},
            apart(base, squared={"mem_decay": varied**2}, none={"mem_decay": 1.0}),
        ),
        Case(
            "decay-none",
            "decay.none",
            "a neuron that forgets nothing, on the binary grid",
            neuron(decay="none", mem_decay=None),
            grid(2, -6, 6),
            {"spike": 20, "loaded": 400},
            {"a decay of 1 - 2^-10": neuron(mem_decay=1 - 2**-10)},
        ),
        Case(
            "decay-near-one",
            "number.decay_near_one",
            "decays of 1 - 2^-10 to 1 - 2^-22, the input a few thousandths",
            neuron(mem_decay=near_one),
            noise(3, -2, 9, (600, 1, 7)),
            {"spike": 7, "loaded": 4000},
            {"a decay of 1": neuron(mem_decay=1.0)},
        ),
        Case(
            "decay-near-zero",
            "number.decay_near_zero",
            "decays from 0 to 1/100",
            neuron(mem_decay=near_zero),
            noise(4, -500, 1500),
            {"spike": 100, "loaded": 300},
            {"a decay of 1/1000": neuron(mem_decay=1e-3)},
        ),
    ]


def _inputs() -> list[Case]:
    gained = {"input_gain": "one_minus_decay", "mem_decay": 0.75}
    leaking = {"mem_decay": 0.875, "leak": 0.5}
    return [
        Case(
            "gain-one",
            "input_gain.one",
            "the input counts whole",
            neuron(mem_decay=0.75),
            noise(7),
            {"spike": 50},
            {"a gain of 1 - a": neuron(**gained)},
        ),
        Case(
            "gain-one-minus-decay",
            "input_gain.one_minus_decay",
            "the input counts as 1 - a of it",
            neuron(**gained),
            noise(8, -2000, 5000),
            {"spike": 50},
            {"a gain of 1": neuron(mem_decay=0.75)},
        ),
        Case(
            "gain-value",
            "input_gain.value",
            "gains of its own, one a neuron",
            neuron(input_gain=draw(9, (7,), 4, 12, 1 / 8)),
            noise(10),
            {"spike": 50},
            {"a gain of 1": neuron()},
        ),
        Case(
            "leak",
            "parameter.leak",
            "without input the membrane goes to 1/2",
            neuron(**leaking),
            noise(11, -300, 400),
            {"spike": 20, "loaded": 500},
            apart(leaking, nowhere={"leak": 0.0}),
        ),
    ]


def _outputs() -> list[Case]:
    scaled = {"spike_scale": draw(12, (7,), 2, 12, 1 / 8), "mem_decay": 0.9, **DELAYED}
    return [
        Case(
            "output-spikes",
            "output.spikes",
            "an output of 0 or 1",
            neuron(mem_decay=0.9),
            noise(14),
            {"spike": 50, "below": 300},
        ),
        Case(
            "output-membrane",
            "output.membrane",
            "the membrane itself, positive and negative",
            neuron(mem_decay=0.9, **MEMBRANE),
            noise(15),
            {"loaded": 500},
        ),
        Case(
            "count-none",
            "spike_count.none",
            "far above 1, and nothing fires or resets",
            neuron(mem_decay=0.9, **MEMBRANE),
            noise(16, 0, 3000),
            {"loaded": 500},
        ),
        Case(
            "spike-scale",
            "parameter.spike_scale",
            "spikes of 1/4 to 3/2, resets by 1",
            neuron(**scaled),
            noise(17),
            {"spike": 50},
            apart(scaled, unscaled={"spike_scale": 1.0}),
        ),
    ]


def _comparisons() -> list[Case]:
    biased = {**ATTACHED, "mem_decay": 0.9, "bias": draw(13, (7,), -3, 3, 1 / 8), "comparison": ">"}
    biased["surrogate"] = Surrogate("logistic")
    return [
        Case(
            "comparison-strict",
            "comparison.strict",
            "at the threshold, exactly: no spike",
            neuron(comparison=">"),
            grid(18),
            {"tie": 10, "spike": 50},
            {"inclusive": neuron()},
        ),
        Case(
            "comparison-inclusive",
            "comparison.inclusive",
            "at the threshold, exactly: a spike",
            neuron(),
            grid(19),
            {"tie": 10, "spike": 50},
            {"strict": neuron(comparison=">")},
        ),
        Case(
            "bias",
            "parameter.bias",
            "the test is moved by -3/8 to 3/8, the reset is not",
            neuron(**biased),
            noise(24),
            {"spike": 50},
            apart(biased, unbiased={"bias": 0.0}),
        ),
    ]


def _counts() -> list[Case]:
    counting = {**ATTACHED, "mem_decay": 0.9, "spike_count": "multiple"}
    limited = {**counting, "spike_count": "limited", "max_spikes": 2}
    binary = {**counting, "mem_decay": 0.5}
    return [
        Case(
            "count-single",
            "spike_count.single",
            "several thresholds high, one spike",
            neuron(**{**ATTACHED, "mem_decay": 0.9}),
            noise(20, -500, 3000),
            {"overshoot": 50},
            apart(counting, multiple={}),
        ),
        Case(
            "count-multiple",
            "spike_count.multiple",
            "as many spikes as thresholds, and as many resets",
            neuron(**counting),
            noise(21, -500, 3000),
            {"several": 50},
            apart(counting, single={"spike_count": "single"}, limited={"spike_count": "limited", "max_spikes": 2}),
        ),
        Case(
            "count-multiple-tie",
            "spike_count.multiple",
            "at a multiple of the threshold, exactly: the spike counts",
            neuron(**binary),
            lambda: draw(22, (14, 4, 17), 0, 16, 1 / 4),
            {"multiple tie": 10},
            apart(binary, single={"spike_count": "single"}),
        ),
        Case(
            "count-limited",
            "spike_count.limited",
            "at most two spikes a step, and two resets",
            neuron(**limited),
            noise(23, -500, 3000),
            {"over the limit": 20, "several": 50},
            apart(counting, multiple={}, single={"spike_count": "single"}),
        ),
    ]


def _parameters() -> list[Case]:
    varied = {"mem_decay": draw(36, (7,), 300, 980, 1e-3), "threshold": draw(37, (7,), 500, 1500, 1e-3)}
    return [
        Case(
            "per-neuron",
            "parameter.per_neuron",
            "seven decays and seven thresholds",
            neuron(**varied),
            noise(39),
            {"spike": 50},
            apart(varied, mixed={"mem_decay": varied["mem_decay"][::-1]}, one={"threshold": 1.0}),
        ),
    ]


def choices() -> list[Case]:
    """The cases of this file."""
    return [*_decays(), *_inputs(), *_outputs(), *_comparisons(), *_counts(), *_parameters()]
