"""Cases of what is kept from step to step: the synaptic current, where the membrane starts, when it is held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tracetorch.conformance.cases import Array, Case, draw, neuron
from tracetorch.conformance.cases_choices import ATTACHED, DELAYED, apart, noise
from tracetorch.functional.surrogates import Surrogate

# As Norse's LIF has it, and SpikingJelly's with decay_input.
NORMALISED: Mapping[str, Any] = {
    "comparison": ">",
    "input_gain": "one_minus_decay",
    "mem_decay": 0.75,
    "reset_gradient": "attached",
    "surrogate": Surrogate("fast_sigmoid", (("slope", 1.0),)),
}
LEARNED = ("mem_decay", "syn_decay")


def _synapses() -> list[Case]:
    added = {"synapse": "add_then_decay", "syn_decay": 0.75, "mem_decay": 0.9}
    then_added = {**DELAYED, "synapse": "decay_then_add", "syn_decay": 0.75, "mem_decay": 0.9, "learn": LEARNED}
    read = {**NORMALISED, "synapse": "read_then_decay", "syn_decay": 0.5, "learn": LEARNED}
    averaged = {"synapse": "moving_average", "syn_decay": 0.75, "mem_decay": 0.9, "comparison": ">", "learn": LEARNED}
    normalised = {**added, "mem_decay": 0.75, "input_gain": "one_minus_decay_kept"}
    loaded = {"spike": 50, "synapse loaded": 500}
    return [
        Case("synapse-none", "synapse.none", "the input reaches the membrane in its own step, and no later",
             neuron(mem_decay=0.9), noise(5), {"spike": 50}, {"a synapse": neuron(**added)}),
        Case("synapse-add-then-decay", "synapse.add_then_decay",
             "a current that decays with what has just been added to it",
             neuron(**added), noise(6, -300, 500), loaded,
             {"no synapse": neuron(mem_decay=0.9)} | apart(added, faster={"syn_decay": 0.5})),
        Case("synapse-decay-then-add", "synapse.decay_then_add", "a current that decays, then is added to",
             neuron(**then_added), noise(80, -300, 500), loaded,
             apart(then_added, with_its_input={"synapse": "add_then_decay"}, faster={"syn_decay": 0.5}), grad=True),
        Case("synapse-read-then-decay", "synapse.read_then_decay",
             "the input counts whole in its own step, and decayed after it",
             neuron(**read), noise(81, -1200, 2000), loaded,
             apart(read, decayed_first={"synapse": "add_then_decay"}, added_last={"synapse": "decay_then_add"}),
             grad=True),
        Case("synapse-moving-average", "synapse.moving_average", "a current that is an average of the input",
             neuron(**averaged), noise(82, -700, 1500), loaded,
             apart(averaged, a_sum={"synapse": "decay_then_add"}), grad=True),
        Case("gain-one-minus-decay-kept", "input_gain.one_minus_decay_kept",
             "1 - a of the current counts, and no more than that is kept of it",
             neuron(**normalised), noise(100, -2000, 7000), {"spike": 50, "synapse loaded": 500},
             apart(normalised, not_kept={"input_gain": "one_minus_decay"})),
    ]  # fmt: skip


def _starts() -> list[Case]:
    at_leak = {**NORMALISED, "leak": 0.5, "initial_state": "leak"}
    at_reset = {"mem_decay": 0.75, "reset_value": -0.25, "leak": -0.25, "reset_gradient": "attached"}
    at_reset["initial_state"] = "reset_value"
    zero = {"initial_state": "zero"}
    return [
        Case("initial-zero", "initial_state.zero", "a first input just below the threshold does not fire",
             neuron(mem_decay=0.9, comparison=">"), lambda: draw(38, (3, 4, 17), 900, 999, 1e-3),
             {"near": 60, "below": 60}),
        Case("initial-leak", "initial_state.leak", "the membrane starts at 1/2, where it decays to",
             neuron(**at_leak), noise(83, -900, 3000, (12, 4, 17)), {"spike": 50, "loaded": 68},
             apart(at_leak, zero=zero)),
        Case("initial-reset-value", "initial_state.reset_value", "the membrane starts at -1/4, where it is reset to",
             neuron(**at_reset), noise(84, 0, 1500, (12, 4, 17)), {"spike": 50, "loaded": 68},
             apart(at_reset, zero=zero)),
    ]  # fmt: skip


def _parameters() -> list[Case]:
    resisting = {**NORMALISED, "resistance": 2.5}
    preset = {"mem_decay": 0.875, "comparison": ">", "initial_v": draw(101, (17,), -4, 7, 1 / 8)}
    scaled = {"mem_decay": 0.9, "comparison": ">", "surrogate_scale": 0.5, "learn": ("mem_decay",)}
    return [
        Case("resistance", "parameter.resistance", "an input gain of 2.5 (1 - a)",
             neuron(**resisting), noise(102, -900, 2000), {"spike": 50},
             apart(resisting, without={"resistance": None})),
        Case("initial-v", "parameter.initial_v", "seventeen neurons start at -1/2 to 7/8",
             neuron(**preset), noise(103, -300, 900, (12, 4, 17)), {"spike": 50, "loaded": 60},
             apart(preset, without={"initial_v": None})),
        Case("surrogate-scale", "parameter.surrogate_scale", "a surrogate of half the width and twice the height",
             neuron(**scaled), noise(104), {"spike": 50, "near": 30}, apart(scaled, without={"surrogate_scale": None}),
             grad=True),
    ]  # fmt: skip


def _exponentials() -> list[Case]:
    alpha = {**DELAYED, "synapse": "difference_of_exponentials", "syn_decay": 0.9, "mem_decay": 0.75}
    alpha |= {"learn": ("mem_decay",)}
    to_zero = {**alpha, "reset": "value", "reset_timing": "next_step_discards_input"}
    learned = {**alpha, "learn": ("mem_decay", "syn_decay", "threshold")}
    others: dict[str, Any] = {"another decay": {"mem_decay": 0.7}, "another rise": {"syn_decay": 0.85}}
    loaded = {"spike": 50, "synapse loaded": 500}
    requirement = "synapse.difference_of_exponentials"
    return [
        Case("synapse-difference", requirement, "a reset by the threshold, which the exciting current loses",
             neuron(**alpha), noise(105, -500, 900), loaded,
             apart(alpha, **others, never={"reset": "none"}), grad=True),
        Case("synapse-difference-value", requirement, "a reset to 0 of the membrane and of both currents",
             neuron(**to_zero), noise(106, -500, 1200), loaded, apart(to_zero, **others), grad=True),
        Case("synapse-difference-gradient", requirement, "the decays also by way of k, the threshold through the reset",
             neuron(**learned), noise(107, -500, 900), {**loaded, "near": 30}, apart(learned, **others), grad=True),
    ]  # fmt: skip


def _adaptive() -> list[Case]:
    rising = {**ATTACHED, "mem_decay": 0.9, "adapt_decay": 0.875, "adapt_scale": 1.5, "threshold_gradient": False}
    trained = {**rising, "learn": ("mem_decay", "adapt_decay")}
    synaptic = {**rising, "synapse": "add_then_decay", "syn_decay": 0.5, "input_gain": "one_minus_decay_kept"}
    fixed = {**rising, "reset_amount": 0.75, "comparison": ">", "threshold_gradient": True}
    fixed |= {"surrogate": Surrogate("atan"), "learn": ("mem_decay", "threshold", "adapt_decay", "adapt_scale")}
    whole = {**fixed, "reset_amount": None}
    several = {**rising, "spike_count": "multiple"}
    others: dict[str, Any] = {
        "constant": {"adapt_decay": None, "adapt_scale": None},
        "slower": {"adapt_decay": 0.9375},
        "weaker": {"adapt_scale": 1.25},
    }
    requirement = "parameter.adaptation"
    return [
        Case("adaptation", requirement, "every spike raises the threshold, by 3/16 at first",
             neuron(**trained), noise(108, -500, 1500), {"spike": 50, "raised": 400},
             apart(trained, **others, a_constant_reset={"reset_amount": 1.0}), grad=True),
        Case("adaptation-synapse", requirement, "the same after a synapse that keeps what it gives",
             neuron(**synaptic), noise(109, -5000, 30000), {"spike": 50, "raised": 400}, apart(synaptic, **others)),
        Case("adaptation-multiple", requirement, "spikes are counted in the raised threshold, each of them raises it",
             neuron(**several), noise(110, -500, 3000), {"several": 20, "raised": 400}, apart(several, **others)),
        Case("adaptation-gradient", requirement, "the gradient through the raised threshold, the reset by 3/4",
             neuron(**fixed), noise(111, -500, 1500), {"spike": 50, "raised": 400, "near": 30},
             apart(fixed, **others), grad=True),
        Case("adaptation-gradient-reset", requirement, "the same, the reset by the raised threshold",
             neuron(**whole), noise(112, -500, 1500), {"spike": 50, "raised": 400, "near": 30},
             apart(whole, not_through_the_spikes={"threshold_gradient": False}), grad=True),
    ]  # fmt: skip


def _held() -> list[Case]:
    held = {"mem_decay": 0.9, "comparison": ">", "refractory": "hold", "refractory_steps": 3, "reset_value": -0.25}
    learned = {**held, "reset_gradient": "attached", "learn": ("mem_decay",)}
    others: dict[str, Any] = {
        "none": {"refractory": "none", "refractory_steps": None},
        "shorter": {"refractory_steps": 2},
    }
    timed = {"input_gain": "one_minus_decay", "mem_decay": ("exp_dt_tau", 0.5), "dt": 0.1, "time_unit": "ms"}
    timed |= {"reset": "subtract", "reset_gradient": "attached", "reset_timing": "next_step_before_decay"}
    timed |= {"refractory": "hold", "refractory_time": 0.3, "learn": ("mem_decay",)}
    whole: dict[str, Any] = {"refractory_time": None}
    steps = {"two steps": {**whole, "refractory_steps": 2}, "three steps": {**whole, "refractory_steps": 3}}
    discards = {"mem_decay": 0.75, "comparison": ">", "reset_timing": "next_step_discards_input"}
    synaptic = {**discards, "synapse": "decay_then_add", "syn_decay": 0.75}
    before = {"reset_timing": "next_step_before_decay"}
    return [
        Case("refractory-none", "refractory.none", "driven above the threshold, it fires in every step",
             neuron(), lambda: draw(25, (20, 2, 7), 1000, 1500, 1e-3), {"consecutive": 200}),
        Case("refractory-hold", "refractory.hold", "three steps after a spike, at -1/4, whatever the input",
             neuron(**held), noise(85, 0, 2000), {"spike": 50, "held": 150}, apart(held, **others)),
        Case("refractory-hold-gradient", "refractory.hold", "no gradient of the input of the steps in which it is held",
             neuron(**learned), noise(86, 0, 2000), {"spike": 50, "held": 150}, apart(learned, **others), grad=True),
        Case("refractory-time", "parameter.refractory_time",
             "held for 0.3 in steps of 0.1, which is two steps or three, as the rounding of t has it",
             neuron(**timed), noise(113, -2000, 6000, (64, 2, 9)), {"spike": 50, "held": 100}, apart(timed, **steps),
             grad=True),
        Case("timing-discards-input", "reset_timing.next_step_discards_input",
             "the step after a spike ends at 0, whatever its input",
             neuron(**discards), noise(87, -500, 2500), {"spike": 50, "held": 50, "driven after a spike": 40},
             apart(discards, before=before)),
        Case("timing-discards-input-synapse", "reset_timing.next_step_discards_input",
             "the same with a synapse, which goes on",
             neuron(**synaptic), noise(88, -500, 1200), {"spike": 50, "held": 50, "synapse loaded": 500},
             apart(synaptic, before=before)),
    ]  # fmt: skip


def _smooth() -> list[Case]:
    smooth = {"spike_count": "smooth", "mem_decay": 0.9, "reset": "subtract", "reset_gradient": "attached"}
    smooth |= {"surrogate": Surrogate("logistic"), "learn": ("mem_decay", "threshold")}
    to_value = {**smooth, "reset": "value", "reset_value": -0.25, "surrogate": Surrogate("atan")}
    hard = {"spike_count": "single", "comparison": ">"}
    return [
        Case("count-smooth", "spike_count.smooth", "parts of a spike, and as much of a reset",
             neuron(**smooth), noise(89), {"near": 30, "below": 100}, apart(smooth, hard=hard), grad=True),
        Case("count-smooth-value", "spike_count.smooth", "the membrane goes part of the way to -1/4",
             neuron(**to_value), noise(90), {"near": 30, "below": 100},
             apart(to_value, hard=hard, subtracted={"reset": "subtract", "reset_value": None}), grad=True),
    ]  # fmt: skip


def _double(seed: int) -> Array:
    """Thousandths in float64, few of which are float32 numbers."""
    return np.asarray(draw(seed, (48, 2, 7), -700, 1100, 1.0).astype(np.float64) * 1e-3)


def _precision() -> list[Case]:
    soft = {"mem_decay": 0.875, "reset": "subtract", "reset_gradient": "attached", "comparison": ">"}
    return [
        Case("double", "number.double", "a reset to 0 on float64 inputs",
             neuron(mem_decay=0.875), lambda: _double(91), {"spike": 50, "loaded": 400}),
        Case("double-subtract", "number.double", "a reset by the threshold on float64 inputs",
             neuron(**soft), lambda: _double(92), {"spike": 50, "loaded": 400}),
        Case("double-normalised", "number.double", "an input gain of 1/4 on float64 inputs",
             neuron(**NORMALISED), lambda: 4 * _double(93), {"spike": 30, "loaded": 400}),
    ]  # fmt: skip


def states() -> list[Case]:
    """The cases of this file."""
    return [
        *(*_synapses(), *_exponentials(), *_starts(), *_parameters()),
        *(*_adaptive(), *_held(), *_smooth(), *_precision()),
    ]
