"""Verdicts: what the oracle says of one subject's answer to one case, aspect by aspect.

    exact        every number is the oracle's, rounded once to the subject's precision
    rounding     every number is within the oracle's rounding bound; a spike differs only where the distance to the
                 threshold is within it
    unsupported  the subject says that it cannot express it: never a pass
    divergent    anything else
    error        no answer: it failed, hung, or answered what it must not

The oracle restarts at every step from the subject's own state, so one early tie is judged once. Gradients are judged
along the subject's own trajectory, in its own raw parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracetorch import oracle
from tracetorch.adapters.verify import GRADIENT_TOLERANCE
from tracetorch.conformance.blind import follow
from tracetorch.conformance.cases import FORM, Case
from tracetorch.conformance.protocol import Arrays, Built, SubjectError
from tracetorch.core.spec import Parameter

Array = NDArray[Any]

# From best to worst.
VERDICTS = ("exact", "rounding", "unsupported", "divergent", "error")
PASSES = ("exact", "rounding")


def worst(verdicts: Sequence[str]) -> str:
    """The worst of some verdicts; "error" of none."""
    return max(verdicts, key=VERDICTS.index) if verdicts else "error"


# Of a subject that hides its states, at least so much must be judged.
_ENOUGH = 0.5


@dataclass(frozen=True)
class Aspect:
    """The verdict of one aspect (outputs, states, final states, a gradient) and, in a few words, what was measured."""

    verdict: str
    text: str = ""


@dataclass(frozen=True)
class Graded:
    """Aspects by name; the largest distance of a membrane to the oracle's in every step, [T], empty without states."""

    aspects: dict[str, Aspect]
    distances: Array


@dataclass(frozen=True)
class Stored:
    """What the oracle asks of a subject's own spec: how it stores its membrane, what it trains instead of what."""

    states: tuple[str, ...]
    stores_before_reset: bool
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    dt: float | None = None
    form: str = FORM


def _same(a: Array, b: Array) -> bool:
    return bool(np.array_equal(a, b, equal_nan=True))


def _near(value: Array, truth: Array, bound: Array) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        near = (np.abs(value - truth) <= bound) & np.isfinite(bound)
        return np.asarray(near | (value == truth) | (np.isnan(value) & np.isnan(truth)))


def _rounded(truth: Array, like: Array) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return truth.astype(like.dtype)


def _place(wrong: NDArray[np.bool_]) -> str:
    t, *index = (int(k) for k in np.argwhere(wrong)[0])
    return f"step {t}, neuron {index}"


def _decisions(eq: oracle.Equations, outputs: Array, w: Array, bound: Array) -> Aspect:
    """Spikes against the oracle's decisions at the membranes w, known to within the bound."""
    if isinstance(eq, oracle.TwoSigns) and eq.choices.spike_count == "smooth":
        room = (np.abs(eq.g) + np.abs(eq.neg_g)) * (eq.steepest * bound + 8 * oracle.roundoff(outputs.dtype)[0])
        return _numbers("outputs", outputs, eq.shown(w), room)
    shown = outputs.astype(np.float64)
    spikes = eq.fired(shown) if isinstance(eq, oracle.TwoSigns) else shown / eq.g
    with np.errstate(invalid="ignore"):
        mismatch = ~(spikes == eq.emitted(w))
        wrong = mismatch & ~oracle.explained(eq, spikes, w, bound, outputs.dtype)
    if wrong.any():
        return Aspect("divergent", f"{int(wrong.sum())} of {wrong.size} spikes wrong, first at {_place(wrong)}")
    if eq.choices.spike_count == "smooth":
        return Aspect("exact" if _same(outputs, _rounded(eq.g * eq.emitted(w), outputs)) else "rounding")
    if mismatch.any():
        return Aspect("rounding", f"{int(mismatch.sum())} of {mismatch.size} spikes differ within the bound")
    return Aspect("exact")


def _numbers(name: str, given: Array, truth: Array, bound: Array) -> Aspect:
    """Numbers against the oracle's, within a bound."""
    wrong = ~_near(given.astype(np.float64), truth, bound)
    with np.errstate(invalid="ignore"):
        difference = np.abs(given.astype(np.float64) - truth)
    largest = float(np.max(difference[np.isfinite(difference)], initial=0.0))
    if wrong.any():
        return Aspect("divergent", f"{int(wrong.sum())} of {wrong.size} {name} wrong, first at {_place(wrong)}")
    return Aspect("exact" if _same(given, _rounded(truth, given)) else "rounding", f"off by up to {largest:.1e}")


def _shown(case: Case, built: Built, answer: Arrays) -> tuple[Graded, oracle.Recording]:
    """A subject that shows its states over time."""
    states = {name: answer[f"state.{name}"] for name in case.spec.states}
    dtype = states["v_mem"].dtype
    stored = Stored(case.spec.states, built.stores_before_reset, built.parameters, built.dt)
    try:
        recording = oracle.Recording(case.x.astype(dtype), answer["outputs"], states, stored)
        judged = oracle.judge(case.spec, recording)
        truth = oracle.expected(case.spec, recording)
    except oracle.OracleError as error:
        raise SubjectError(f"run: {error}") from error
    membrane = truth.states["v_mem"]
    if case.spec.output == "membrane":
        outputs = _numbers("outputs", answer["outputs"], truth.w, truth.w_bound)
    else:
        outputs = _decisions(truth.eq, answer["outputs"], truth.w, truth.w_bound)
    wrong = outputs.verdict == "divergent"
    if case.spec.signed:  # of spikes that look alike, the judge reads which it was off the membrane
        assert wrong or not judged.unexplained
    assert wrong == (judged.unexplained > 0) or case.spec.output == "membrane" or case.spec.signed
    text = f"off by up to {judged.max_state_error:.1e}"
    exact = all(_same(state, _rounded(truth.states[name], state)) for name, state in states.items())
    aspects = {"outputs": outputs, "states": Aspect("exact" if exact else "rounding", text)}
    if judged.state_violations:
        where = "" if judged.first is None else f", first departure at step {judged.first[0]}, neuron {judged.first[1]}"
        count = f"{judged.state_violations} of {judged.slots}"
        aspects["states"] = Aspect("divergent", f"{count} states wrong, {text}{where}")
    with np.errstate(invalid="ignore"):
        distances = np.abs(states["v_mem"].astype(np.float64) - membrane).reshape(len(case.x), -1)
    return Graded(aspects, np.max(np.nan_to_num(distances, nan=0.0, posinf=0.0), axis=1)), recording


def _blind(case: Case, built: Built, answer: Arrays) -> tuple[Graded, oracle.Recording]:
    """A subject that shows no states over time: followed, see `blind`."""
    followed = follow(case.spec, case.x, answer["outputs"])
    eq, step = followed.eq, followed.trace.step
    unknown = np.where(followed.judged, followed.w_error, np.inf)
    if followed.judged.mean() < _ENOUGH:
        said = f"without its states, {followed.judged.mean():.0%} of its steps can be judged"
        return Graded({"outputs": Aspect("unsupported", said)}, np.zeros(0)), followed.recording
    if case.spec.output == "membrane":
        aspects = {"outputs": _numbers("outputs", answer["outputs"], step.w, unknown)}
    else:
        test = eq.tested(step.w, followed.trace.v_before)
        if eq.choices.spike_test == "change":  # the membrane before is off too, and their difference rounds
            earlier = np.concatenate([np.zeros_like(followed.v_error[:1]), followed.v_error[:-1]])
            unknown = unknown + earlier + oracle.roundoff(answer["outputs"].dtype)[0] * np.abs(test)
        aspects = {"outputs": _decisions(eq, answer["outputs"], test, unknown)}
    if "final.v_mem" in answer:
        before = built.stores_before_reset
        truth, error = (step.w, followed.w_error) if before else (step.v, followed.v_error)
        last = np.where(followed.judged[-1], error[-1], np.inf)
        aspects["final states"] = _numbers("final states", answer["final.v_mem"], truth[-1], last)
        for name, error in followed.errors.items():
            last = np.where(followed.judged[-1], error[-1], np.inf)
            other = _numbers(f"final {name}", answer[f"final.{name}"], followed.recording.states[name][-1], last)
            aspects["final states"] = max(aspects["final states"], other, key=lambda a: VERDICTS.index(a.verdict))
    return Graded(aspects, np.zeros(0)), followed.recording


def _final(case: Case, answer: Arrays) -> Aspect:
    """The final states of a subject that shows all of them are the last of these."""
    for name in case.spec.states:
        last, final = answer[f"state.{name}"][-1], answer[f"final.{name}"]
        if last.dtype != final.dtype or not _same(last, final):
            return Aspect("divergent", f"{name} is not what it was after the last step")
    return Aspect("exact")


def _gradients(case: Case, built: Built, answer: Arrays, recording: oracle.Recording) -> dict[str, Aspect]:
    assert case.grad_output is not None
    changes: dict[str, Any] = {"parameters": {**case.spec.parameters, **built.parameters}}
    if case.spec.dt is None and built.dt is not None:
        changes |= {"dt": built.dt, "time_unit": "step"}
    truth = oracle.gradients(case.spec.replace(**changes), recording, case.grad_output)
    aspects = {}
    for name, given in answer.items():
        if not name.startswith("grad."):
            continue
        short = name.removeprefix("grad.")
        exact = _same(given, _rounded(truth[short], given))
        error = oracle.gradient_error(given, truth[short])
        tolerance = GRADIENT_TOLERANCE[torch.float64 if given.dtype == np.float64 else torch.float32]
        verdict = "exact" if exact else "rounding" if error <= tolerance else "divergent"
        aspects[f"gradient of {short}"] = Aspect(verdict, f"error {error:.1e}")
    return aspects


def grade(case: Case, built: Built, answers: Sequence[Arrays]) -> Graded:
    """Grades a subject's checked answers to a case, one answer for each of its runs.

    Raises:
        SubjectError: arrays that cannot belong together.
    """
    answer = answers[0]
    shown = "state.v_mem" in answer
    graded, recording = (_shown if shown else _blind)(case, built, answer)
    aspects = graded.aspects
    if shown and "final.v_mem" in answer:
        aspects["final states"] = _final(case, answer)
    if case.x.dtype == np.float64:
        coarse = sorted(name for name, array in answer.items() if "." in name and array.dtype != np.float64)
        aspects["precision"] = Aspect("divergent", f"float32: {', '.join(coarse)}") if coarse else Aspect("exact")
    if case.grad_output is not None:
        if built.gradients:
            aspects["gradients"] = Aspect("unsupported", built.gradients)
        else:
            aspects.update(_gradients(case, built, answer, recording))
    if len(answers) > 1:
        same = all(
            set(other) == set(answer) and all(answer[n].tobytes() == other[n].tobytes() for n in answer)
            for other in answers[1:]
        )
        aspects["second run"] = Aspect("exact") if same else Aspect("divergent", "other numbers than the first run")
    return graded
