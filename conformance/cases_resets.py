"""Cases of the reset: what it does, how much, when, and the bound below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracetorch.conformance.cases import Case, draw, neuron
from tracetorch.conformance.cases_choices import ATTACHED, RESIDUAL, apart, grid, noise

SOFT: Mapping[str, Any] = {**ATTACHED, "mem_decay": 0.75}
SEEN = {"spike": 100, "driven after a spike": 80}


def _kinds() -> list[Case]:
    hard = {"mem_decay": 0.75, "reset_value": -0.25, "reset_gradient": "attached"}
    added = {"mem_decay": 0.75, "reset": "add_value", "reset_value": 0.125}
    strong = noise(27, -500, 2500)
    return [
        Case(
            "reset-none",
            "reset.none",
            "it goes on firing while it is above the threshold",
            neuron(mem_decay=0.75, reset="none"),
            strong,
            {"consecutive": 50},
            apart(SOFT, subtract={}),
        ),
        Case(
            "reset-subtract",
            "reset.subtract",
            "what is above the threshold is kept",
            neuron(**SOFT),
            strong,
            SEEN,
            apart(SOFT, none={"reset": "none"}) | {"to 0": neuron(mem_decay=0.75)},
        ),
        Case(
            "reset-value",
            "reset.value",
            "nothing is kept",
            neuron(mem_decay=0.75),
            strong,
            SEEN,
            apart(SOFT, subtract={}),
        ),
        Case(
            "reset-value-below-zero",
            "reset.value",
            "nothing is kept; the membrane starts anew at -1/4",
            neuron(**hard),
            strong,
            SEEN,
            apart(hard, zero={"reset_value": 0.0}, added={"reset": "add_value", "reset_gradient": "detached"}),
        ),
        Case(
            "reset-add-value",
            "reset.add_value",
            "1/8 is added to every neuron in every step, fired or not",
            neuron(**added),
            strong,
            SEEN,
            apart(added, value={"reset": "value"}),
        ),
    ]


def _amounts() -> list[Case]:
    over = {**SOFT, "reset_amount": "threshold_over_decay", "reset_gradient": "detached"}
    amount = {**SOFT, "reset_amount": draw(26, (7,), 4, 12, 1 / 8)}
    return [
        Case(
            "amount-threshold",
            "reset_amount.threshold",
            "one threshold a spike",
            neuron(**SOFT),
            noise(28, -500, 2500),
            SEEN,
            apart(over, over_decay={}) | apart(amount, value={}),
        ),
        Case(
            "amount-threshold-over-decay",
            "reset_amount.threshold_over_decay",
            "a threshold and a third at a decay of 3/4: one threshold after the decay",
            neuron(**over),
            noise(29, -500, 2500),
            SEEN,
            apart(SOFT, threshold={}),
        ),
        Case(
            "amount-value",
            "reset_amount.value",
            "amounts of its own, one a neuron",
            neuron(**amount),
            noise(30, -500, 2500),
            SEEN,
            apart(SOFT, threshold={}),
        ),
    ]


def _timing() -> list[Case]:
    soft = {"reset": "subtract", "mem_decay": 0.75, "comparison": ">"}
    strong = noise(32, -500, 2500)
    residual = {**soft, **RESIDUAL}
    return [
        Case(
            "timing-same-step",
            "reset_timing.same_step",
            "what is stored after a spike is the membrane after its reset",
            neuron(**soft),
            strong,
            {"spike": 100, "overshoot": 50},
            apart(soft, later={"reset_timing": "next_step_after_decay"}, residual=residual),
        ),
        Case(
            "timing-residual-subtract",
            "reset_timing.same_step_residual",
            "a membrane still above the threshold is subtracted from before the spike test, and is silent",
            neuron(**residual),
            strong,
            {"residual": 20, "spike": 50},
            apart(soft, same_step={}),
        ),
        Case(
            "timing-before-decay",
            "reset_timing.next_step_before_decay",
            "to 0 at the start of the next step; what is stored after a spike is the membrane before the reset",
            neuron(mem_decay=0.75, comparison=">", reset_timing="next_step_before_decay"),
            strong,
            {"spike": 100, "driven after a spike": 80},
            apart(soft, subtracted={"reset_timing": "next_step_before_decay"}),
        ),
        Case(
            "timing-subtract-before-decay",
            "reset_timing.next_step_before_decay",
            "the threshold is subtracted, then the rest decays",
            neuron(**{**soft, "reset_timing": "next_step_before_decay"}),
            strong,
            {"spike": 100, "overshoot": 50},
            apart(soft, after={"reset_timing": "next_step_after_decay"}),
        ),
        Case(
            "timing-after-decay",
            "reset_timing.next_step_after_decay",
            "the membrane decays, then a whole threshold is subtracted",
            neuron(**{**soft, "reset_timing": "next_step_after_decay"}),
            strong,
            {"spike": 100, "overshoot": 50},
            apart(soft, before={"reset_timing": "next_step_before_decay"}, same_step={}),
        ),
        Case(
            "timing-after-decay-tie",
            "reset_timing.next_step_after_decay",
            "the same on the binary grid, where every state is exact",
            neuron(**{**soft, "mem_decay": 0.5, "reset_timing": "next_step_after_decay"}),
            grid(33, -4, 12),
            {"tie": 10, "spike": 100},
            apart({**soft, "mem_decay": 0.5}, same_step={}),
        ),
    ]


def _bounds() -> list[Case]:
    bound = {**ATTACHED, "mem_decay": 0.75, "min_v_mem": -0.5, "clamp": "after_reset"}
    heavy = {**bound, "reset_amount": 2.5}
    falling = noise(34, -2500, 1500)
    return [
        Case(
            "clamp-none",
            "clamp.none",
            "driven far below 0, it stays there",
            neuron(mem_decay=0.9),
            falling,
            {"negative": 200},
            {"a bound": neuron(**bound)},
        ),
        Case(
            "clamp-negative-drive",
            "clamp.after_reset",
            "negative input drives the membrane to its bound, and no further",
            neuron(**bound),
            falling,
            {"clamped": 100, "spike": 20},
            apart(bound, unbounded={"clamp": "none", "min_v_mem": None}, lower={"min_v_mem": -0.75}),
        ),
        Case(
            "clamp-after-reset",
            "clamp.after_reset",
            "a reset by two and a half thresholds ends at the bound",
            neuron(**heavy),
            noise(35, -500, 2500),
            {"clamped by a reset": 50},
            apart(heavy, unbounded={"clamp": "none", "min_v_mem": None}),
        ),
    ]


def resets() -> list[Case]:
    """The cases of this file."""
    return [*_kinds(), *_amounts(), *_timing(), *_bounds()]
