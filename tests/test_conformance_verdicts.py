"""The suite's verdicts reject: a wrong number, shape, dtype or name, a state that is not what was said, no answer."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from tests.planted import Named, Planted, answer
from tracetorch import conformance
from tracetorch.conformance import SubjectError, catalogue
from tracetorch.conformance.protocol import check_build, check_description
from tracetorch.conformance.runner import examine
from tracetorch.conformance.verdicts import VERDICTS, worst

pytestmark = pytest.mark.usefixtures("one_thread")


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
