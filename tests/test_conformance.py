"""The suite's own parts: cases, golden vectors, verdicts that reject, results, pages; the frameworks graded."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.test_conformance_planted import Planted
from tracetorch import conformance, oracle
from tracetorch.conformance import CaseError, Deviation, SubjectError, catalogue, golden, select
from tracetorch.conformance.bisection import bisect
from tracetorch.conformance.cases import Case, draw, neuron, observed
from tracetorch.conformance.events import EVENTS
from tracetorch.conformance.protocol import check_build, check_description, check_run, read_npz, write_npz
from tracetorch.conformance.requirements import BEHAVIOURS, REQUIREMENTS
from tracetorch.conformance.runner import examine
from tracetorch.conformance.verdicts import VERDICTS, worst
from tracetorch.core.spec import CHOICES, RAW_FORMS
from tracetorch.functional.surrogates import SURROGATES

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMEWORKS = [
    "tracetorch",
    "tracetorch-cpu",
    "sinabs",
    "snntorch",
    "spikingjelly",
    "norse",
    "sinabs-adapted",
    "snntorch-adapted",
    "spikingjelly-adapted",
    "norse-adapted",
]
LEAST = {"snntorch": 45, "sinabs": 50, "spikingjelly": 45, "norse": 18}


@pytest.fixture(scope="module")
def graded():
    """Every subject that is installed here, over every case."""
    return conformance.run(FRAMEWORKS)


# ---------------------------------------------------------------- requirements and cases


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


# ---------------------------------------------------------------- golden vectors


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


# ---------------------------------------------------------------- verdicts


def answer(case: Case, fault: str = ""):
    subject = Planted(fault)
    subject.build(case.spec.to_dict())
    return subject.run(case.x, case.lengths, case.grad_output)


class Replies(Planted):
    """Answers with given arrays."""

    def __init__(self, arrays, built=None):
        super().__init__()
        self.arrays, self.built = arrays, built or {}

    def build(self, spec):
        return self.built

    def run(self, x, calls, grad_output):
        return self.arrays


CASES = ["gradient-attached", "comparison-strict", "synapse-add-then-decay", "output-membrane", "timing-after-decay"]


@pytest.mark.parametrize("name", CASES)
def test_every_single_wrong_number_is_found(name):
    """One element of one array at a time, a little or not a number; the last element above all."""
    case = catalogue()[name]
    right = answer(case)
    assert examine("x", Replies(right), case).verdict in ("exact", "rounding")
    generator = np.random.default_rng(0)
    for array_name, array in right.items():
        places = [tuple(size - 1 for size in array.shape)]
        places += [tuple(int(generator.integers(size)) for size in array.shape) for _ in range(4)]
        for place in places:
            number = array[place]
            spike = array_name == "outputs" and case.spec.output == "spikes"
            scale = float(np.abs(array).max()) if array_name.startswith("grad.") else max(abs(float(number)), 1.0)
            for wrong in (1 - number if spike else number + np.float32(1e-3 * scale), np.nan, np.inf):
                arrays = copy.deepcopy(right)
                arrays[array_name] = np.asarray(arrays[array_name])
                arrays[array_name][place] = wrong
                assert examine("x", Replies(arrays), case).verdict == "divergent", (array_name, place, wrong)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_shape_dtype_or_name_is_an_error(name):
    case = catalogue()[name]
    right = answer(case)
    for array_name, array in right.items():
        for wrong in (array[None], array.astype(np.float16), array.astype(np.int64), array.tolist(), None):
            result = examine("x", Replies({**right, array_name: wrong}), case)
            assert result.verdict == "error", (array_name, wrong)
            assert array_name in result.text
        if array.ndim > 1:
            assert examine("x", Replies({**right, array_name: array[:-1]}), case).verdict == "error"
            assert examine("x", Replies({**right, array_name: array.swapaxes(-1, -2)}), case).verdict == "error"
    assert examine("x", Replies({**right, "more": right["outputs"]}), case).verdict == "error"
    assert examine("x", Replies({}), case).verdict == "error"
    assert examine("x", Replies(None), case).verdict == "error"
    if case.grad:
        assert "missing" in examine("x", Replies({n: a for n, a in right.items() if n != "grad.x"}), case).text


def test_a_state_alone_without_the_others_is_an_error():
    case = catalogue()["synapse-add-then-decay"]
    right = answer(case)
    result = examine("x", Replies({n: a for n, a in right.items() if n != "state.i_syn"}), case)
    assert result.verdict == "error"
    assert "state.v_mem without the other states" in result.text


def test_how_a_state_is_stored_is_the_subjects_own_choice_but_must_be_true():
    """The same neuron, stored before its reset: right if said so, else wrong."""
    case = catalogue()["reset-subtract"]
    right = answer(case)
    before = {**right, "state.v_mem": right["state.v_mem"] + right["outputs"]}
    before["final.v_mem"] = before["state.v_mem"][-1]
    assert examine("x", Replies(before, {"stores_before_reset": True}), case).verdict == "rounding"
    assert examine("x", Replies(before), case).verdict == "divergent"
    assert examine("x", Replies(right, {"stores_before_reset": True}), case).verdict == "divergent"


def test_a_final_state_that_is_not_the_last_is_divergent():
    case = catalogue()["reset-subtract"]
    result = examine("x", Planted("final state of the step before"), case)
    assert {n for n, a in result.aspects.items() if a.verdict == "divergent"} == {"final states"}


@pytest.mark.parametrize(
    ("built", "message"),
    [
        ([], "must be a mapping"),
        ({"surprise": 1}, "not known"),
        ({"stores_before_reset": 1}, "true or false"),
        ({"gradients": None}, "gradients"),
        ({"notes": "x" * 5000}, "notes"),
        ({"parameters": {"nothing": {}}}, "none of the spec's"),
        ({"parameters": {"mem_decay": {"value": 1}}}, "mem_decay"),
        ({"parameters": {"mem_decay": {"value": 0.8, "dtype": "float32", "learnable": True, "raw": "value"}}}, "0.8"),
        (
            {"parameters": {"mem_decay": {"value": [0.9], "dtype": "float32", "learnable": True, "raw": "value"}}},
            "shape",
        ),
        (
            {
                "parameters": {
                    "mem_decay": {"value": 1.0, "dtype": "float32", "learnable": True, "raw": "one_minus_sigmoid"}
                }
            },
            "mem_decay is 1,",
        ),
        ({"dt": 0}, "dt=0"),
        ({"dt": True}, "dt=True"),
        ({"dt": float("nan")}, "dt=nan"),
    ],
)
def test_what_build_answers_is_checked(built, message):
    spec = catalogue()["gradient-mem-decay"].spec
    with pytest.raises(SubjectError, match=message):
        check_build(built, spec)


def test_another_raw_parameter_is_judged_by_the_chain_rule():
    """tau for alpha: the right gradient of tau passes, that of alpha given as tau's does not."""
    case = catalogue()["gradient-mem-decay"]
    tau = float(-1 / np.log(case.spec.parameters["mem_decay"].value.astype(np.float64)))
    parameter = {"value": float(np.float32(tau)), "dtype": "float32", "learnable": True, "raw": "exp_tau"}
    right = answer(case)
    slope = np.exp(-1 / tau) / tau**2
    through = {**right, "grad.mem_decay": np.asarray(right["grad.mem_decay"] * slope, dtype=np.float32)}
    built = {"parameters": {"mem_decay": parameter}}
    assert examine("x", Replies(through, built), case).verdict == "rounding"
    assert examine("x", Replies(right, built), case).verdict == "divergent"


def test_descriptions_are_checked():
    good = {"name": "a", "framework": "b", "version": "1"}
    assert check_description(good)["notes"] == ""
    for wrong in ([], {}, {**good, "name": 1}, {**good, "name": ""}, {**good, "version": "1" * 100}):
        with pytest.raises(SubjectError):
            check_description(wrong)


def test_unsupported_is_never_a_pass():
    assert worst(["exact", "unsupported"]) == "unsupported"
    assert worst(["rounding", "exact"]) == "rounding"
    assert worst([]) == "error"
    assert list(VERDICTS).index("unsupported") > list(VERDICTS).index("rounding")

    class Nothing(Planted):
        def build(self, spec):
            raise conformance.Unsupported("everything", 1, "it can nothing")

    results = conformance.run([Nothing()], ["comparison"])
    assert not results.ok
    assert "passed no case" in results.faults[0]


def test_a_gradient_that_is_declared_unsupported_is_not_asked_for():
    case = catalogue()["gradient-attached"]

    class Forward(Planted):
        def build(self, spec):
            super().build(spec)
            return {"gradients": "a chip has none"}

        def run(self, x, calls, grad_output):
            assert grad_output is None
            return super().run(x, calls, grad_output)

    result = examine("x", Forward(), case)
    assert (result.verdict, result.aspects["gradients"].text) == ("unsupported", "a chip has none")


def test_a_subject_that_raises_does_not_stop_the_run():
    class Breaks(Planted):
        def run(self, x, calls, grad_output):
            if self.spec.comparison == ">":
                raise ZeroDivisionError("by zero")
            x[...] = 0  # nor may it change a case
            return super().run(x, calls, grad_output)

    results = conformance.run([Breaks(), Named("after")], ["comparison"])
    by_case = {(r.subject, r.case): r for r in results.rows}
    assert by_case["planted", "comparison-strict"].text == "ZeroDivisionError: by zero"
    assert by_case["planted", "comparison-inclusive"].verdict == "divergent"
    assert {by_case["after", name].verdict for name in ("comparison-strict", "comparison-inclusive")} == {"exact"}
    assert catalogue()["comparison-inclusive"].x.any()


class Named(Planted):
    """A planted subject with another name."""

    def __init__(self, name, fault=""):
        super().__init__(fault)
        self.name = name

    def describe(self):
        return {**super().describe(), "name": self.name}


class Double(Named):
    """A simulator in float64, as many in C are: a reset to 0, no gradients."""

    def build(self, spec):
        super().build(spec)
        if self.spec.reset != "value" or self.spec.reset_timing != "same_step" or "syn_decay" in self.spec.parameters:
            raise conformance.Unsupported("reset", self.spec.reset, "only to a value")
        return {"gradients": "none"}

    def run(self, x, calls, grad_output):
        a, theta, low = (self.spec.parameters[n].value.astype(float) for n in ("mem_decay", "threshold", "reset_value"))
        v, outputs, membranes = np.zeros(x.shape[1:]), [], []
        for x_t in x.astype(float):
            v = (a + (1e-9 if self.fault else 0)) * v + x_t
            s = v > theta if self.spec.comparison == ">" else v >= theta
            v = np.where(s, low, v)
            outputs.append(s.astype(float))
            membranes.append(v)
        return {"outputs": np.stack(outputs), "state.v_mem": np.stack(membranes), "final.v_mem": v}


def test_a_simulator_in_float64_is_held_to_float64():
    cases = ["comparison", "reset.value", "number.denormal", "number.silence", "parameter.per_neuron"]
    assert conformance.run([Double("double")], cases).ok
    wrong = conformance.run([Double("double", "a billionth more")], cases)
    assert {r.case for r in wrong.rows if r.verdict == "divergent"} >= {"silence", "per-neuron", "reset-value"}


# ---------------------------------------------------------------- npz


def test_npz_round_trips_and_is_the_same_bytes():
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(1, 2, 3), "grad.mem_decay": np.array(0.5, np.float64)}
    content = write_npz(arrays)
    assert content == write_npz(arrays)
    back = read_npz(content)
    assert {n: (a.shape, a.dtype, a.tolist()) for n, a in back.items()} == {
        n: (a.shape, a.dtype, a.tolist()) for n, a in arrays.items()
    }


def test_hostile_npz_files_are_refused(tmp_path):
    import io
    import zipfile

    def zipped(name, content, method=zipfile.ZIP_STORED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr(name, content)
        return buffer.getvalue()

    def npy(array, **options):
        buffer = io.BytesIO()
        np.save(buffer, array, **options)
        return buffer.getvalue()

    good = npy(np.zeros(3, np.float32))
    huge = good.replace(b"(3,)", b"(9" + b"9" * 12 + b",)", 1)
    pickled = npy(np.array([{}], dtype=object), allow_pickle=True)
    bomb = zipped("x.npy", bytes(80 * 2**20), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20
    files = [
        b"",
        b"rubbish",
        b"PK\x03\x04",
        zipped("x.npy", pickled),
        zipped("x.npy", good[:-1]),
        zipped("x.npy", huge),
    ]
    files += [zipped("../x.npy", good), zipped("x.npy", b"rubbish"), zipped("x.npy", npy(np.zeros(3, np.int64))), bomb]
    files += [zipped("x.npy", npy(np.zeros(3, ">f4"))), write_npz({"x": np.zeros(3, np.float32)})[:-30]]
    for content in files:
        with pytest.raises(SubjectError):
            read_npz(content)


# ---------------------------------------------------------------- the frameworks


def test_the_frameworks_are_graded_and_every_deviation_is_listed(graded):
    assert graded.ok, "\n".join(graded.faults)
    assert len(graded.rows) == len(FRAMEWORKS) * len(catalogue())
    assert not [r for r in graded.rows if r.verdict == "error"]
    for name in FRAMEWORKS:
        passed = sum(r.subject == name and r.verdict in ("exact", "rounding") for r in graded.rows)
        assert passed >= LEAST.get(name, 90), name


# One of every kind, as every case is a compilation of its own.
BRAINPY = ["reset-subtract", "reset-value", "decay-geometric", "leak", "comparison-strict", "per-neuron"]
BRAINPY += [
    "gradient-attached",
    "gradient-membrane-stopped",
    "initial-v",
    "state-chunks",
    "double",
    "infinite",
    "denormal",
]


def brainpy_graded(names, cases, least):
    pytest.importorskip("brainpy")
    results = conformance.run(names, cases)
    assert results.ok, "\n".join(results.faults)
    for name in names:
        assert sum(r.subject == name and r.verdict in ("exact", "rounding") for r in results.rows) >= least, name
    assert {r.case for r in results.rows if r.known} == {"infinite", "denormal"}


def test_brainpy_is_graded_and_every_deviation_is_listed():
    brainpy_graded(["brainpy-adapted"], BRAINPY, 10)


@pytest.mark.sweep
def test_brainpy_is_graded_in_every_case():
    brainpy_graded(["brainpy", "brainpy-adapted"], None, 28)


def test_what_a_subject_cannot_express_is_said_with_a_field(graded):
    for row in graded.rows:
        if row.verdict == "unsupported" and not row.aspects:
            assert "=" in row.text, row


def test_the_fused_kernel_and_the_step_loop_get_the_same_verdicts(graded):
    coupled = {name for name, case in catalogue().items() if case.spec.inhibition != "none"}
    assert {r.verdict for r in graded.rows if r.case in coupled and r.subject == "tracetorch-cpu"} == {"unsupported"}
    by_subject = {
        name: {
            r.case: (r.verdict, {n: a.verdict for n, a in r.aspects.items()})
            for r in graded.rows
            if r.subject == name and r.case not in coupled
        }
        for name in ("tracetorch", "tracetorch-cpu")
    }
    forward = {
        name: {
            case: (v, {n: a for n, a in aspects.items() if "gradient" not in n}) for case, (v, aspects) in own.items()
        }
        for name, own in by_subject.items()
    }
    assert {c: a[1] for c, a in forward["tracetorch"].items()} == {
        c: a[1] for c, a in forward["tracetorch-cpu"].items()
    }


def test_an_unlisted_deviation_a_stale_entry_and_another_aspect_fail():
    def run(fault, *deviations):
        return conformance.run([Planted(fault)], ["comparison"], deviations=deviations)

    fault = "the other comparison"
    assert not run(fault).ok
    found = run(fault)
    shown = {r.case: {n for n, a in r.aspects.items() if a.verdict == "divergent"} for r in found.rows}
    exact = [Deviation("x", "planted", "1", ("planted",), c, tuple(a), "because") for c, a in shown.items()]
    assert run(fault, *exact).ok
    assert all(r.known for r in run(fault, *exact).rows)
    assert not run(fault, exact[0]).ok, "the other one is not listed"
    assert any("listed as divergent" in text for text in run("", *exact).faults), "stale"
    wrong = Deviation("x", "planted", "1", ("planted",), exact[0].case, ("final states",), "because")
    assert not run(fault, wrong, exact[1]).ok
    other = [Deviation("x", "planted", "2", ("planted",), d.case, d.aspects, "because") for d in exact]
    assert not run(fault, *other).ok, "another version"


# ---------------------------------------------------------------- results


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.seen = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        for name, value in attrs:
            if name in ("src", "href") or name.startswith("on"):
                self.wrong.append((tag, name, value))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("option", "td", "tr", "th") and self.open[-1] != tag:
            self.wrong.append(tag)
        assert self.open.pop() == tag


def test_the_page_is_whole_and_every_name_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&\'"'

    class Evil(Named):
        def build(self, spec):
            super().build(spec)
            if self.spec.comparison == ">":
                raise conformance.Unsupported(evil, evil, evil)
            return {"notes": evil, "gradients": evil}

    results = conformance.run([Evil(evil[:60]), Named("b", "the other comparison")], ["comparison", "reset_gradient"])
    results.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "alert(&quot;x&quot;)" in text
    tags = Tags()
    tags.feed(text)
    assert (tags.wrong, tags.open) == ([], [])
    assert {"svg", "table", "details", "script", "path", "polyline"} <= tags.seen
    assert text.count("<script>") == 1
    assert "http" not in text.replace("http-equiv", "")


def test_json_holds_what_the_results_hold(graded, tmp_path):
    graded.to_json(tmp_path / "results.json")
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert document["ok"] is True
    assert len(document["rows"]) == len(graded.rows)
    assert {row["verdict"] for row in document["rows"]} <= set(VERDICTS)


def test_the_matrix_has_a_row_for_each_requirement(graded):
    lines = graded.matrix().splitlines()
    assert lines[0].split() == ["requirement", *FRAMEWORKS]
    assert [line.split()[0] for line in lines[2:]] == list(dict.fromkeys(c.requirement for c in catalogue().values()))
    cells = dict(graded.table())
    assert cells["number.infinite"]["sinabs"] == "divergent*"
    assert cells["synapse.add_then_decay"]["snntorch"] == "unsupported"


def test_run_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="not known"):
        conformance.run(["nothing"])
    with pytest.raises(ValueError, match="a list"):
        conformance.run("tracetorch")
    with pytest.raises(ValueError, match="two subjects are named"):
        conformance.run([Planted(), Planted()], ["comparison"])
    assert not conformance.run([]).ok


# ---------------------------------------------------------------- bisect


def test_bisect_finds_the_smallest_parting():
    parting = bisect(Named("a"), Named("b", "the other comparison"))
    assert parting is not None
    assert len(parting.x) == 1, str(parting)
    assert parting.x.tolist() == [1.0] or parting.spec.comparison == ">="
    assert parting.outputs[0] != parting.outputs[1]
    later = bisect(Named("a"), Named("b", "input decays too"), ["reset.subtract"])
    assert later is not None
    assert later.names == ("a", "b")
    assert "in the case" in str(later)
    assert bisect(Named("a"), Named("b"), ["comparison", "reset"]) is None


def test_the_recording_of_the_oracle_is_right_by_its_own_judge():
    """And one of another neuron is not: `observed` is what cases tell apart by."""
    case = catalogue()["reset-subtract"]
    other = observed(catalogue()["reset-value"].spec, case.x)[0]
    assert not oracle.judge(case.spec, other).ok
    assert check_run(answer(case), case.spec, case.x, False)["outputs"].any()
    assert Path(golden.__file__).with_name("golden").is_dir()
