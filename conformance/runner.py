"""Running subjects over cases, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracetorch.adapters.report import text_table
from tracetorch.conformance.cases import Case
from tracetorch.conformance.catalogue import select
from tracetorch.conformance.deviations import DEVIATIONS, Deviation
from tracetorch.conformance.protocol import (
    Arrays,
    Built,
    Subject,
    SubjectError,
    Unsupported,
    check_build,
    check_description,
    check_run,
    record,
)
from tracetorch.conformance.subjects import subject as make_subject
from tracetorch.conformance.verdicts import PASSES, VERDICTS, Aspect, grade, worst

# So many failures to answer in a row, and a subject is asked no more.
PATIENCE = 3


@dataclass(frozen=True)
class CaseResult:
    """One subject's answer to one case.

    Attributes:
        subject: the subject's name.
        case, version, requirement: of the case.
        verdict: the worst of the aspects.
        aspects: by name.
        text: why there are no aspects: what is unsupported, or the error.
        known: the reason, if this deviation is listed.
        arrays: what the subject answered; empty without an answer.
        distances: of its membranes to the oracle's, the largest in every step; None without states.
    """

    subject: str
    case: str
    version: int
    requirement: str
    verdict: str
    aspects: Mapping[str, Aspect] = field(default_factory=dict)
    text: str = ""
    known: str = ""
    arrays: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    distances: Any = field(default=None, repr=False, compare=False)

    @property
    def why(self) -> str:
        """The verdict in words."""
        said = [f"{name}: {a.text}" for name, a in self.aspects.items() if a.verdict == self.verdict and a.text]
        return self.text or "; ".join(said)


@dataclass(repr=False)
class Results:
    """What came of a run: `.ok`, `.matrix()`, `.to_json(path)`, `.to_html(path)`.

    Attributes:
        subjects: descriptions by name.
        cases: the cases asked.
        rows: one `CaseResult` for each subject and case.
        faults: why `ok` is false: divergences and errors that are not listed, listed ones that did not show, subjects
            that passed nothing.
    """

    subjects: Mapping[str, Mapping[str, str]]
    cases: Sequence[Case]
    rows: Sequence[CaseResult]
    stale: Sequence[str] = ()

    @property
    def faults(self) -> tuple[str, ...]:
        """See the class."""
        found = [
            f"{r.subject}: {r.case}: {r.verdict}: {r.why}"
            for r in self.rows
            if r.verdict in ("divergent", "error") and not r.known
        ]
        for name in self.subjects:
            if not any(r.subject == name and (r.verdict in PASSES or r.known) for r in self.rows):
                found.append(f"{name}: passed no case")
        if not self.rows:
            found.append("nothing was run")
        return (*found, *self.stale)

    @property
    def ok(self) -> bool:
        """Whether every divergence is known, and every known one showed; unsupported is neither."""
        return not self.faults

    def __repr__(self) -> str:
        return f"Results: {self.summary()}"

    def summary(self) -> str:
        """Verdicts counted, one line a subject."""
        lines = []
        for name, said in self.subjects.items():
            own = [r for r in self.rows if r.subject == name]
            counts = [f"{sum(r.verdict == v for r in own)} {v}" for v in VERDICTS if any(r.verdict == v for r in own)]
            known = sum(bool(r.known) for r in own)
            counts += [f"({known} known)"] if known else []
            lines.append(f"{name} ({said['framework']} {said['version']}): {', '.join(counts)}")
        return "\n".join(lines)

    def table(self) -> list[tuple[str, dict[str, str]]]:
        """Requirement -> subject -> its cell.

        A cell is the worst verdict of the requirement's cases. Where some of them are unsupported and the others are
        not, it is that of the others, with how many they are: "rounding 1/2". A known deviation is marked with *.
        """
        order = {case.requirement: None for case in self.cases}
        return [(requirement, {name: self._cell(requirement, name) for name in self.subjects}) for requirement in order]

    def _cell(self, requirement: str, name: str) -> str:
        own = [r for r in self.rows if r.requirement == requirement and r.subject == name]
        judged = [r for r in own if r.verdict != "unsupported"]
        if own and not judged:
            return "unsupported"
        verdict = worst([r.verdict for r in judged])
        part = "" if len(judged) == len(own) else f" {len(judged)}/{len(own)}"
        return verdict + part + ("*" if any(r.known and r.verdict == verdict for r in judged) else "")

    def matrix(self) -> str:
        """The table as text: requirements by subjects."""
        return text_table(["requirement", *self.subjects], [[r, *cells.values()] for r, cells in self.table()])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the same for the same verdicts."""
        rows = [
            {
                **{n: getattr(r, n) for n in ("subject", "case", "version", "requirement", "verdict", "text", "known")},
                "aspects": {name: {"verdict": a.verdict, "text": a.text} for name, a in r.aspects.items()},
            }
            for r in self.rows
        ]
        return {"ok": self.ok, "subjects": self.subjects, "faults": self.faults, "rows": rows}

    def to_json(self, path: str | Path) -> None:
        """Writes `to_dict()` to a file."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def to_html(self, path: str | Path) -> None:
        """Writes one page without outside references to a file."""
        from tracetorch.conformance.page import page

        Path(path).write_text(page(self), encoding="utf-8")


def ask(subject: Subject, case: Case) -> tuple[Built, list[Arrays]]:
    """Have a subject build and run a case; its answers, checked.

    Raises:
        Unsupported, SubjectError: of the subject, or for what it answered.
    """
    built = check_build(subject.build(record(case.spec)), case.spec)
    answers = []
    grad = case.grad_output is not None and not built.gradients
    for _ in range(case.runs):
        grad_output = case.grad_output.copy() if grad and case.grad_output is not None else None
        answer = subject.run(case.x.copy(), case.lengths, grad_output)
        answers.append(check_run(answer, case.spec, case.x, grad))
    return built, answers


def examine(name: str, subject: Subject, case: Case) -> CaseResult:
    """Ask and grade. What the subject raises is its result."""
    about = (name, case.name, case.version, case.requirement)
    try:
        built, answers = ask(subject, case)
        graded = grade(case, built, answers)
    except Unsupported as refusal:
        return CaseResult(*about, "unsupported", text=str(refusal))
    except SubjectError as error:
        return CaseResult(*about, "error", text=str(error))
    except Exception as error:  # a subject is a stranger's code: whatever it raises is reported, and the run goes on
        return CaseResult(*about, "error", text=f"{type(error).__name__}: {error}")
    verdict = worst([aspect.verdict for aspect in graded.aspects.values()])
    return CaseResult(*about, verdict, graded.aspects, arrays=answers[0], distances=graded.distances)


def _failed(name: str, cases: Sequence[Case], why: str) -> list[CaseResult]:
    return [CaseResult(name, c.name, c.version, c.requirement, "error", text=why) for c in cases]


def _all(name: str, subject: Subject, cases: Sequence[Case], progress: Callable[[str], None]) -> list[CaseResult]:
    rows: list[CaseResult] = []
    for k, case in enumerate(cases):
        progress(f"{name}: {k + 1} of {len(cases)}: {case.name}")
        last = rows[-PATIENCE:]
        if len(last) == PATIENCE and all(r.text.startswith(("hangs", "crashes")) for r in last):
            return rows + _failed(name, cases[k:], f"not run: {PATIENCE} failures to answer in a row")
        rows.append(examine(name, subject, case))
    return rows


def marked(
    rows: Sequence[CaseResult], framework: str, version: str, deviations: Sequence[Deviation]
) -> tuple[list[CaseResult], list[str]]:
    """Rows of one framework's subjects with known deviations marked, and the listed ones that did not show."""
    found, stale = list(rows), []
    for deviation in deviations:
        if (deviation.framework, deviation.version) != (framework, version):
            continue
        for k, row in enumerate(found):
            if row.case != deviation.case or row.subject not in deviation.subjects:
                continue
            shown = {name for name, aspect in row.aspects.items() if aspect.verdict == "divergent"}
            if row.verdict == "divergent" and shown == set(deviation.aspects):
                found[k] = CaseResult(**{**vars(row), "known": deviation.reason})
            elif row.verdict != "error":
                stale.append(
                    f"{row.subject}: {row.case}: listed as divergent in {', '.join(deviation.aspects)}, "
                    f"found {row.verdict} in {', '.join(sorted(shown)) or 'nothing'}: change or take out the entry"
                )
    return found, stale


def run(
    subjects: Iterable[str | Subject] | Mapping[str, Subject],
    cases: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
    deviations: Sequence[Deviation] = DEVIATIONS,
) -> Results:
    """Grade subjects.

    Args:
        subjects: names of this package's (`tracetorch.conformance.SUBJECTS`), or any objects with the three calls.
        cases: names of cases, requirements or groups of requirements; None: all.
        progress: called with a line of text before each case.
        deviations: the known ones.

    Raises:
        ValueError: an unknown subject or case, or two subjects of one name.
        ImportError: a framework that is not installed.
    """
    chosen = select(cases)
    for case in chosen:
        case.check()
    found: dict[str, Mapping[str, str]] = {}
    rows: list[CaseResult] = []
    stale: list[str] = []
    given = [make_subject(one) if isinstance(one, str) else one for one in _listed(subjects)]
    for number, subject in enumerate(given):
        try:
            said = check_description(subject.describe())
        except Exception as error:  # as in `examine`
            name = f"subject {number + 1}"
            found[name] = {"name": name, "framework": "?", "version": "?", "notes": ""}
            rows += _failed(name, chosen, f"describe: {type(error).__name__}: {error}")
            continue
        name = said["name"]
        if name in found:
            raise ValueError(f"two subjects are named {name!r}; give each a name of its own")
        found[name] = said
        own = _all(name, subject, chosen, progress or (lambda line: None))
        listed, gone = marked(own, said["framework"], said["version"], deviations)
        rows, stale = rows + listed, stale + gone
    return Results(found, chosen, rows, stale)


def _listed(subjects: Iterable[str | Subject] | Mapping[str, Subject]) -> list[str | Subject]:
    if isinstance(subjects, str):
        raise ValueError(f"subjects={subjects!r}: give a list of them")
    return list(subjects.values()) if isinstance(subjects, Mapping) else list(subjects)
