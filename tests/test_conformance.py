"""The suite's own parts: requirements, cases with their events, golden vectors."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tracetorch import oracle
from tracetorch.conformance import CaseError, catalogue, golden, select
from tracetorch.conformance.cases import Case, draw, neuron, observed
from tracetorch.conformance.events import EVENTS
from tracetorch.conformance.requirements import BEHAVIOURS, REQUIREMENTS
from tracetorch.core.spec import CHOICES, RAW_FORMS
from tracetorch.functional.surrogates import SURROGATES

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- requirements and cases ------------------------------------------------------------------------------------------


def test_every_choice_raw_form_and_surrogate_is_a_requirement():
    found = {(r.group, r.choice) for r in REQUIREMENTS.values() if r.choice is not None}
    wanted = {(field, choice) for field, choices in CHOICES.items() for choice in choices}
    wanted |= {("raw", form) for form in RAW_FORMS} | {("surrogate", name) for name in SURROGATES}
    assert found == wanted
    assert set(BEHAVIOURS) <= set(REQUIREMENTS)
    assert all(re.fullmatch(r"[a-z_]+\.[a-z_0-9]+", id) and r.id == id and r.text for id, r in REQUIREMENTS.items())


def test_every_requirement_has_a_case():
    assert {case.requirement for case in catalogue().values()} == set(REQUIREMENTS)


def test_what_the_oracle_has_no_equations_for_is_refused():
    difference = neuron(synapse="difference_of_exponentials", syn_decay=0.5, mem_decay=0.75)
    x = np.ones((2, 1, 1))
    with pytest.raises(oracle.OracleError, match="difference_of_exponentials"):
        oracle.equations(difference)
    with pytest.raises(oracle.OracleError, match="reset_timing='same_step'"):
        observed(difference, x)
    with pytest.raises(oracle.OracleError, match="reset_timing='next_step_before_decay'"):
        observed(neuron(adapt_decay=0.5, adapt_scale=1.0, reset_timing="next_step_before_decay"), x)


@pytest.mark.parametrize("name", catalogue())
def test_a_case_contains_its_events_and_tells_the_others_apart(name):
    case = catalogue()[name]
    case.check()
    assert re.fullmatch(r"[a-z0-9-]{3,40}", name)
    recording, _, _ = case.truth
    assert oracle.judge(case.spec, recording).ok


def test_inputs_are_the_same_on_every_machine():
    """SplitMix64, by hand, in Python's integers."""

    def element(seed, k):
        mask = 2**64 - 1
        z = ((seed << 32) + k) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return (z ^ (z >> 31)) >> 33

    drawn = draw(7, (3, 2, 5), -4, 8, 1 / 8)
    assert drawn.dtype == np.float32
    assert drawn.ravel().tolist() == [(element(7, k) % 13 - 4) / 8 for k in range(30)]
    assert len(set(drawn.ravel().tolist())) > 5


def changed(case: Case, **changes) -> Case:
    return Case(**{**{n: getattr(case, n) for n in Case.__dataclass_fields__}, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requirement": "nothing.known"}, "not known"),
        ({"events": {}}, "names no event"),
        ({"events": {"tie": 10**6}}, "exactly at the threshold at"),
        ({"inputs": lambda: np.zeros((14, 4, 17), np.float32)}, "neuron-steps"),
        ({"inputs": lambda: np.zeros((14, 4, 17), np.float16)}, "float16"),
        ({"inputs": lambda: np.zeros((0, 4, 17), np.float32)}, "x is"),
        ({"calls": (3, 3)}, "in calls of"),
        ({"apart": {"itself": catalogue()["comparison-strict"].spec}}, "not told apart"),
    ],
)
def test_a_case_that_shows_nothing_is_refused(changes, message):
    with pytest.raises(CaseError, match=message):
        changed(catalogue()["comparison-strict"], **changes).check()


def test_a_tie_with_rounding_in_it_is_no_tie():
    """The events are counted in the case's own trajectory: inputs off the grid have none."""
    case = changed(catalogue()["comparison-strict"], inputs=lambda: draw(18, (14, 4, 17), -400, 800, 1e-3))
    with pytest.raises(CaseError, match="exactly at the threshold"):
        case.check()


def test_every_event_is_used_and_counts_something():
    used = {event for case in catalogue().values() for event in case.events}
    assert used <= set(EVENTS)
    assert set(EVENTS) - used <= {"step"}


def test_cases_are_selected_by_name_requirement_and_group():
    assert [c.name for c in select(["comparison-strict"])] == ["comparison-strict"]
    assert {c.requirement for c in select(["reset.value", "comparison"])} == {
        "reset.value",
        "comparison.strict",
        "comparison.inclusive",
    }
    assert len(select()) == len(catalogue())
    with pytest.raises(ValueError, match="no case"):
        select(["comparison-strict", "nothing"])


# ---- golden vectors --------------------------------------------------------------------------------------------------


def test_the_golden_vectors_are_regenerated_byte_for_byte(tmp_path):
    assert golden.stale() == [], "run: tracetorch conformance --golden conformance/golden"
    golden.write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in golden.FOLDER.iterdir()}


def test_a_changed_missing_or_superfluous_golden_file_is_noticed(tmp_path):
    cases = select(["comparison"])
    golden.write(tmp_path, cases)
    assert golden.stale(tmp_path, cases) == []
    data = bytearray((tmp_path / "comparison-strict.npz").read_bytes())
    data[-100] ^= 1
    (tmp_path / "comparison-strict.npz").write_bytes(data)
    (tmp_path / "comparison-inclusive.json").unlink()
    (tmp_path / "gone.npz").write_bytes(b"")
    assert golden.stale(tmp_path, cases) == ["comparison-inclusive.json", "comparison-strict.npz", "gone.npz"]
    golden.write(tmp_path, cases)
    assert golden.stale(tmp_path, cases) == []
    assert golden.stale(tmp_path / "nowhere", cases)


@pytest.mark.parametrize("name", catalogue())
def test_golden_vectors_are_what_they_say(name):
    case = catalogue()[name]
    document = json.loads((golden.FOLDER / f"{name}.json").read_text(encoding="ascii"))
    with np.load(golden.FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        assert {n: list(arrays[n].shape) for n in arrays.files} == {
            n: described["shape"] for n, described in document["arrays"].items()
        }
        assert all(arrays[n].dtype == case.x.dtype for n in arrays.files)
        assert np.array_equal(arrays["x"], case.x, equal_nan=True)
        assert (document["case"], document["version"], document["calls"]) == (name, case.version, list(case.lengths))
        if case.spec.output == "spikes":
            assert np.array_equal(arrays["outputs"], case.truth[0].outputs.astype(case.x.dtype), equal_nan=True)


RATIONAL = ("", "atan", "fast_sigmoid", "triangular", "heaviside", "zero", "straight_through", "super_spike")
RATIONAL += ("piecewise_quadratic", "soft_sign", "piecewise_leaky_relu", "leaky_k_relu", "rectangle", "triangle")
EULER = ("one_minus_inverse_tau", "one_minus_dt_rate")


def test_golden_vectors_do_not_hang_on_the_last_bit_of_an_exponential():
    """NumPy's exp may differ by a bit of float64 between machines: no golden number lies that near to a rounding.

    Sums of two float32 numbers, as with a decay of exactly 1/2, may lie on one, and are the same everywhere.
    """
    for case in catalogue().values():
        raws = {p.raw for p in case.spec.parameters.values()}
        surrogate = case.spec.surrogate.name if case.grad and case.spec.surrogate else ""
        rational = surrogate in RATIONAL and case.spec.spike_count != "smooth"
        rational = rational and case.spec.synapse != "difference_of_exponentials"
        if (rational and raws <= {"value", "clamped", *EULER}) or case.x.dtype == np.float64:
            continue
        for name, array in golden.arrays(case).items():
            if array.dtype == np.float64:
                low, high = ((array * factor).astype(np.float32) for factor in (1 - 2.0**-48, 1 + 2.0**-48))
                middle = (low.astype(np.float64) + high) / 2 == array
                assert ((low == high) | middle).all(), (case.name, name)
