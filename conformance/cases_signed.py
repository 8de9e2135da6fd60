"""Cases of spikes of two signs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tracetorch.conformance.cases import Array, Case, draw, neuron
from tracetorch.conformance.cases_choices import apart, noise
from tracetorch.functional.surrogates import Surrogate

# As traceTorch's LIT has it, with plain numbers.
SIGNED: Mapping[str, Any] = {
    "comparison": ">",
    "reset": "subtract",
    "reset_gradient": "attached",
    "neg_threshold": 0.75,
    "mem_decay": 0.875,
}
_BOTH = {"spike": 50, "negative spike": 50}


def quarters(seed: int) -> Callable[[], Array]:
    """Multiples of 1/4 in 14 steps: with a = 1/2 nothing rounds in float32, and ties are exact."""
    return lambda: draw(seed, (14, 4, 17), -5, 5, 1 / 4)


def _thresholds() -> list[Case]:
    learned = {**SIGNED, "learn": ("mem_decay", "threshold", "neg_threshold")}
    tied = {**SIGNED, "mem_decay": 0.5}
    inclusive = {**tied, "comparison": ">="}
    whole = {**SIGNED, "synapse": "moving_average", "syn_decay": 0.5, "bias": draw(140, (7,), -2, 2, 1 / 8)}
    whole |= {"threshold": draw(141, (7,), 4, 10, 1 / 8), "neg_threshold": draw(142, (7,), 3, 9, 1 / 8)}
    whole["learn"] = ("mem_decay", "syn_decay", "bias", "threshold", "neg_threshold")
    smooth = {**SIGNED, "spike_count": "smooth", "surrogate": Surrogate("logistic")}
    smooth["learn"] = ("mem_decay", "threshold", "neg_threshold")
    others: dict[str, Any] = {"one sign": {"neg_threshold": None}, "alike": {"neg_threshold": 1.0}}
    requirement = "parameter.neg_threshold"
    return [
        Case("signed", requirement, "thresholds of 1 and 3/4, each of which is what its spike takes",
             neuron(**learned), noise(143, -1100, 1200), {**_BOTH, "near": 30}, apart(learned, **others), grad=True),
        Case("signed-tie", requirement, "exactly at either threshold no spike",
             neuron(**tied), quarters(144), {**_BOTH, "tie": 10, "negative tie": 10},
             apart(tied, **others, inclusive={"comparison": ">="})),
        Case("signed-tie-inclusive", requirement, "exactly at either threshold a spike",
             neuron(**inclusive), quarters(145), {**_BOTH, "tie": 10, "negative tie": 10},
             apart(inclusive, **others, strict={"comparison": ">"})),
        Case("signed-bias", requirement, "the bias moves both thresholds one way; all parameters by neuron, a synapse",
             neuron(**whole), noise(146, -2500, 2500), {**_BOTH, "synapse loaded": 500},
             apart(whole, **others, no_bias={"bias": None}), grad=True),
        Case("signed-smooth", requirement, "parts of spikes of both signs, and as much of both resets",
             neuron(**smooth), noise(147, -1100, 1200), {"near": 30, "below": 100},
             apart(smooth, **others, hard={"spike_count": "single"}), grad=True),
    ]  # fmt: skip


def _scales() -> list[Case]:
    scaled = {**SIGNED, "spike_scale": draw(148, (7,), 9, 16, 1 / 8), "neg_scale": draw(149, (7,), 2, 7, 1 / 8)}
    scaled["learn"] = ("mem_decay", "threshold", "neg_threshold", "spike_scale", "neg_scale")
    turned = {**scaled, "spike_scale": 0.5, "neg_scale": -1.5}
    others: dict[str, Any] = {"one scale": {"neg_scale": scaled["spike_scale"]}, "no scale": {"neg_scale": None}}
    requirement = "parameter.neg_scale"
    return [
        Case("signed-scale", requirement, "fourteen scales, two a neuron",
             neuron(**scaled), noise(150, -1100, 1200), _BOTH, apart(scaled, **others), grad=True),
        Case("signed-scale-turned", requirement, "a scale below 0: all that is emitted is above it",
             neuron(**turned), noise(151, -1100, 1200), _BOTH, apart(turned, **others), grad=True),
    ]  # fmt: skip


def signs() -> list[Case]:
    """The cases of this file."""
    return [*_thresholds(), *_scales()]
