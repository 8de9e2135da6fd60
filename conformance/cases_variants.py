"""Cases of rare choices: states on levels, one winner, spikes of a change, a bound before the spikes."""

from __future__ import annotations

from typing import Any

from tracetorch.conformance.cases import Case, draw, neuron
from tracetorch.conformance.cases_choices import DELAYED, RESIDUAL, apart, grid, noise
from tracetorch.functional.surrogates import Surrogate

_QUARTERS = tuple(k / 4 for k in range(-4, 4))


def _levels() -> list[Case]:
    coarse = {**DELAYED, "mem_decay": 0.5, "threshold": 0.5, "state_levels": _QUARTERS}
    coarse["learn"] = ("mem_decay", "threshold")
    reversed_ = {**coarse, "state_levels": _QUARTERS[::-1]}
    synaptic = {**coarse, "synapse": "decay_then_add", "syn_decay": 0.75, "mem_decay": 0.875}
    residual = {**RESIDUAL, "mem_decay": 0.875, "state_levels": (-1.0, -0.3, 0.1, 0.4, 0.8, 1.3, 2.1)}
    smooth = {"state_levels": None}
    return [
        Case("levels", "state.levels", "multiples of 1/4, and a membrane halfway between two goes to the lower one",
             neuron(**coarse), grid(120, -8, 12), {"spike": 50, "tie": 10},
             apart(coarse, smooth=smooth, upwards={"state_levels": _QUARTERS[::-1]}), grad=True),
        Case("levels-reversed", "state.levels", "the same levels from above: halfway goes to the higher one",
             neuron(**reversed_), grid(121, -8, 12), {"spike": 50, "tie": 10},
             apart(reversed_, smooth=smooth, downwards={"state_levels": _QUARTERS}), grad=True),
        Case("levels-synapse", "state.levels", "the current is rounded too, after the membrane has taken it",
             neuron(**synaptic), noise(122), {"spike": 50, "synapse loaded": 300}, apart(synaptic, smooth=smooth),
             grad=True),
        Case("levels-residual", "state.levels", "uneven levels; what a reset in the same step leaves is not rounded",
             neuron(**residual), noise(123, -700, 2500), {"spike": 50, "residual": 20}, apart(residual, smooth=smooth),
             version=2),
    ]  # fmt: skip


def _inhibition() -> list[Case]:
    alone = {**DELAYED, "mem_decay": 0.875, "surrogate": Surrogate("fast_sigmoid"), "learn": ("mem_decay", "threshold")}
    winner = {**alone, "inhibition": "winner"}
    tied = {**DELAYED, "mem_decay": 0.5, "inhibition": "winner"}
    residual = {**RESIDUAL, "mem_decay": 0.875, "inhibition": "winner", "learn": ("mem_decay", "threshold")}
    return [
        Case("inhibition-none", "inhibition.none", "several neurons of a row fire in one step",
             neuron(**alone), noise(124), {"spike": 100}, apart(alone, winner={"inhibition": "winner"})),
        Case("inhibition-winner", "inhibition.winner", "the others that are above the threshold are silent, and reset",
             neuron(**winner), noise(125, -500, 1500), {"spike": 100, "silenced": 50},
             apart(winner, alone={"inhibition": "none"}, none={"reset": "none"}), grad=True),
        Case("inhibition-tie", "inhibition.winner", "of two with the same membrane the first fires",
             neuron(**tied), lambda: draw(126, (14, 4, 17), -2, 4, 1 / 2), {"spike": 100, "silenced": 50},
             apart(tied, alone={"inhibition": "none"})),
        Case("inhibition-residual", "inhibition.winner", "in its own step the winner is reset, in the next the others",
             neuron(**residual), noise(127, -500, 1500), {"spike": 80, "silenced": 50, "residual": 50},
             apart(residual, alone={"inhibition": "none"}), grad=True),
    ]  # fmt: skip


def _tests() -> list[Case]:
    change = {"mem_decay": 0.75, "comparison": ">", "reset": "none", "spike_test": "change", "threshold": 0.5}
    change |= {"surrogate": Surrogate("fast_sigmoid"), "learn": ("mem_decay", "threshold")}
    bound: dict[str, Any] = {"mem_decay": 0.75, "comparison": ">", "reset": "none", "min_v_mem": 0.0}
    bound |= {"clamp": "before_spikes", "threshold": -0.125, "learn": ("mem_decay",)}
    high = {**bound, "threshold": 0.5}
    staying = {"mem_decay": 0.75, "reset": "none"}
    return [
        Case("test-membrane", "spike_test.membrane", "a membrane that stays above the threshold fires in every step",
             neuron(**staying), lambda: draw(128, (20, 2, 7), 300, 400, 1e-3), {"consecutive": 150},
             apart(staying, change={"spike_test": "change"}), version=2),
        Case("test-change", "spike_test.change", "a spike where the membrane rises or falls by more than 1/2",
             neuron(**change), noise(129, -1500, 1500), {"fallen": 50, "spike": 100},
             apart(change, membrane={"spike_test": "membrane"}), grad=True),
        Case("clamp-before-spikes", "clamp.before_spikes", "bounded at 0 it is always above a threshold of -1/8",
             neuron(**bound), noise(130, -2500, 1500), {"clamped": 100}, apart(bound, after={"clamp": "after_reset"})),
        Case("clamp-before-gradient", "clamp.before_spikes", "at the bound no gradient comes through the spikes",
             neuron(**high), noise(131, -2500, 2500), {"clamped": 100, "spike": 50},
             apart(high, after={"clamp": "after_reset"}), grad=True),
    ]  # fmt: skip


def variants() -> list[Case]:
    """The cases of this file."""
    return [*_levels(), *_inhibition(), *_tests()]
