"""The suite catches planted faults: a subject that breaks a requirement is found by the cases of that requirement."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.planted import Planted
from tracetorch.conformance import REQUIREMENTS, catalogue, select
from tracetorch.conformance.cases import Case
from tracetorch.conformance.runner import examine
from tracetorch.core.spec import Parameter
from tracetorch.functional.surrogates import SURROGATES

pytestmark = pytest.mark.usefixtures("one_thread")

FAULTS: dict[str, tuple[str, ...]] = {
    "output.spikes": ("membrane for spikes",),
    "output.membrane": ("rectified",),
    "synapse.none": ("a synapse",),
    "synapse.decay_then_add": ("synapse: add_then_decay",),
    "synapse.add_then_decay": ("synapse: decay_then_add",),
    "synapse.read_then_decay": ("synapse: decay_then_add", "synapse: add_then_decay"),
    "synapse.moving_average": ("synapse: decay_then_add",),
    "synapse.difference_of_exponentials": ("no k", "k a constant", "currents not reset", "old current not added"),
    "decay.none": ("leaks",),
    "decay.geometric": ("input decays too",),
    "input_gain.one": ("gain of 1 - a",),
    "input_gain.one_minus_decay": ("gain of 1",),
    "input_gain.one_minus_decay_kept": ("gain not kept",),
    "input_gain.value": ("gain of 1",),
    "comparison.strict": ("the other comparison",),
    "comparison.inclusive": ("the other comparison",),
    "spike_count.none": ("cut at 1",),
    "spike_count.single": ("several spikes",),
    "spike_count.multiple": ("one spike", "round for trunc"),
    "spike_count.limited": ("limit ignored", "one spike"),
    "spike_count.smooth": ("hard for smooth",),
    "reset.none": ("reset: subtract",),
    "reset.subtract": ("reset: value", "reset: none", "double reset"),
    "reset.value": ("reset: subtract", "reset to 0", "reset: none"),
    "reset.add_value": ("reset: value",),
    "reset_amount.threshold": ("the other amount",),
    "reset_amount.threshold_over_decay": ("the other amount",),
    "reset_amount.value": ("amount of the threshold",),
    "reset_timing.same_step": ("timing: next_step_after_decay", "timing: same_step_residual"),
    "reset_timing.same_step_residual": ("timing: same_step",),
    "reset_timing.next_step_before_decay": ("timing: next_step_after_decay",),
    "reset_timing.next_step_after_decay": ("timing: next_step_before_decay", "timing: same_step"),
    "reset_timing.next_step_discards_input": ("timing: next_step_before_decay",),
    "reset_gradient.attached": ("detached",),
    "reset_gradient.detached": ("attached",),
    "reset_gradient.membrane_stopped": ("attached", "detached"),
    "clamp.none": ("clamp at 0",),
    "clamp.after_reset": ("clamp before reset", "no clamp"),
    "clamp.before_spikes": ("no clamp", "clamp after the spikes"),
    "spike_test.membrane": ("the other test",),
    "spike_test.change": ("the other test", "rises alone"),
    "inhibition.none": ("the other inhibition",),
    "inhibition.winner": ("the other inhibition", "the last wins", "losers not reset"),
    "refractory.none": ("refractory",),
    "refractory.hold": ("not held", "held one step"),
    "initial_state.zero": ("starts at 1/4",),
    "initial_state.leak": ("starts at 0",),
    "initial_state.reset_value": ("starts at 0", "starts at 1/4"),
    "raw.value": ("sigmoid of a value",),
    "raw.clamped": ("not clamped", "gradient through the clamp"),
    "raw.exp_tau": ("first order",),
    "raw.exp_dt_tau": ("dt ignored",),
    "raw.one_minus_inverse_tau": ("exp for Euler",),
    "raw.one_minus_dt_rate": ("dt ignored",),
    "raw.one_minus_sigmoid": ("sigmoid for its complement",),
    "raw.sigmoid": ("another sigmoid",),
    "raw.softplus": ("exp for softplus",),
    **{f"surrogate.{name}": ("another surrogate",) for name in SURROGATES},
    "parameter.per_neuron": ("one parameter for all",),
    "parameter.leak": ("no leak",),
    "parameter.bias": ("no bias", "bias in the membrane"),
    "parameter.spike_scale": ("no scale",),
    "parameter.neg_threshold": (
        *("one sign", "one threshold", "reset by the other threshold", "no negative reset", "bias on both sides"),
        *("negative spikes detached", "the other comparison"),
    ),
    "parameter.neg_scale": ("one scale", "scales swapped", "no neg_scale", "the reset scaled"),
    "parameter.resistance": ("no resistance",),
    "parameter.refractory_time": ("not held", "whole steps"),
    "parameter.initial_v": ("initial_v ignored",),
    "parameter.adaptation": (
        *("threshold not raised", "reset not raised", "adaptation detached", "a whole spike", "adapts at once"),
    ),
    "parameter.surrogate_scale": ("no surrogate scale",),
    "gradient.input": ("gradient cut in time", "gradient of the input halved"),
    "gradient.mem_decay": ("decay not learned", "mean over the batch"),
    "gradient.threshold": ("no gradient to the threshold",),
    "gradient.no_threshold": ("gradient to the threshold",),
    "state.carried": ("state not carried",),
    "state.chunks": ("state not carried", "pending reset lost", "first step of a call skipped"),
    "state.fresh": ("goes on from the last run",),
    "state.gradient": ("cut between calls",),
    "state.levels": (
        *("not rounded", "the last of two", "no gradient through levels", "rounded after the reset"),
        "current not rounded",
    ),
    "shape.one_sample": ("rows mixed",),
    "shape.one_neuron": ("one neuron lost",),
    "shape.one_step": ("last step skipped", "final state of the step before"),
    "shape.every_element": ("last element skipped", "last gradient skipped"),
    "shape.long": ("1,024 steps",),
    "number.decay_near_one": ("half precision decay",),
    "number.decay_near_zero": ("smallest decay 1/100",),
    "number.silence": ("decays with input alone",),
    "number.denormal": ("flush to zero",),
    "number.infinite": ("infinity by product",),
    "number.double": ("float32", "rounded to float32"),
    "number.nan": ("NaN as 0",),
}
PLANTED = [(requirement, fault) for requirement, faults in FAULTS.items() for fault in faults]
# What a subject that shows its spikes and final state alone hides.
HIDDEN = ("state.",)


def verdicts(fault: str, cases: Sequence[Case], hide: tuple[str, ...] = ()) -> dict[str, str]:
    return {case.name: examine("planted", Planted(fault, hide), case).verdict for case in cases}


def test_every_requirement_with_a_case_has_a_fault():
    assert set(FAULTS) == {case.requirement for case in catalogue().values()}
    assert set(FAULTS) <= set(REQUIREMENTS)


@pytest.mark.parametrize("hide", [(), HIDDEN, ("state.", "final.")], ids=["states", "final states", "spikes alone"])
@pytest.mark.parametrize("name", catalogue())
def test_without_a_fault_every_case_passes(name, hide):
    result = examine("planted", Planted("", hide), catalogue()[name])
    assert result.verdict in ("exact", "rounding"), result.why


@pytest.mark.parametrize(("requirement", "fault"), PLANTED)
def test_a_fault_is_found_by_the_cases_of_its_requirement(requirement, fault):
    found = verdicts(fault, select([requirement]))
    assert "divergent" in found.values(), found
    assert "error" not in found.values(), found


@pytest.mark.parametrize(("requirement", "fault"), PLANTED)
def test_a_fault_is_found_by_the_spikes_and_final_states_alone(requirement, fault):
    found = verdicts(fault, select([requirement]), HIDDEN)
    assert "divergent" in found.values(), found


def test_the_planted_parameters_are_those_of_the_spec():
    """So that the subject without a fault shows something of parameters."""
    spec = catalogue()["raw-clamped"].spec
    assert isinstance(spec.parameters["mem_decay"], Parameter)
    assert (spec.parameters["mem_decay"].value > 1).any()


# Faults that nothing but their own requirement, and what is named beside it, can see.
ISOLATED = {
    "1,024 steps": {"shape.long"},
    "NaN as 0": {"number.nan"},
    "attached": {
        "reset_gradient.detached",
        "reset_gradient.membrane_stopped",
        "parameter.surrogate_scale",
        "inhibition.winner",
        "state.levels",
        "gradient",
        "raw",
        "surrogate",
        "synapse",
        "state.gradient",
        "shape.every_element",
    },
    "clamp before reset": {"clamp.after_reset"},
    "held one step": {"refractory.hold"},
    "adaptation detached": {"parameter.adaptation"},
    "one threshold": {"parameter.neg_threshold", "parameter.neg_scale"},
    "scales swapped": {"parameter.neg_scale"},
    "currents not reset": {"synapse.difference_of_exponentials"},
    "k a constant": {"synapse.difference_of_exponentials"},
    "reset not raised": {"parameter.adaptation"},
    "gain not kept": {"input_gain.one_minus_decay_kept", "parameter.adaptation"},
    "hard for smooth": {"spike_count.smooth"},
    "starts at 0": {"initial_state"},
    "synapse: decay_then_add": {
        *("synapse", "input_gain.one_minus_decay_kept", "parameter.adaptation", "parameter.neg_threshold"),
    },
    "flush to zero": {"number.denormal"},
    "goes on from the last run": {"state.fresh"},
    "gradient through the clamp": {"raw.clamped"},
    "gradient to the threshold": {"gradient.no_threshold", "parameter.adaptation"},
    "last gradient skipped": {
        "gradient",
        "raw",
        "surrogate",
        "synapse",
        "refractory.hold",
        "parameter.adaptation",
        "parameter.surrogate_scale",
        "parameter.neg_threshold",
        "parameter.neg_scale",
        "inhibition.winner",
        "spike_test.change",
        "state.levels",
        "spike_count.smooth",
        "reset_gradient",
        "state.gradient",
        "shape.every_element",
    },
    "leaks": {"decay.none"},
    "limit ignored": {"spike_count.limited"},
    "one neuron lost": {"shape.one_neuron"},
    "pending reset lost": {"state.chunks"},
    "rows mixed": {"shape", "number"},
    "smallest decay 1/100": {"number.decay_near_zero", "raw.clamped"},
}


@pytest.mark.sweep
@pytest.mark.parametrize("fault", ISOLATED)
def test_an_isolated_fault_is_found_where_it_is_and_nowhere_else(fault):
    cases = catalogue()
    found = {cases[name].requirement for name, v in verdicts(fault, list(cases.values())).items() if v == "divergent"}
    allowed = ISOLATED[fault]
    assert found
    assert {r for r in found if r not in allowed and r.partition(".")[0] not in allowed} == set()
