"""Framework by framework: a neuron of A built in B (A -> B), and what comes back built in A again (A -> B -> A).

For each case that A can express with its own classes, A's layer is read by its adapter and built in B through B's; both
run on the case's input. `exact`: the same bits in outputs and states (in the membrane after its reset, where they store
it at other times), and the same numbers in gradients. `rounding`: every step of B is a correctly rounded step of the
neuron that A's layer is, by the oracle. `unsupported`: B's adapter refuses. Else `divergent`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tracetorch import oracle
from tracetorch.conformance.cases import Case
from tracetorch.conformance.catalogue import select
from tracetorch.conformance.deviations import DEVIATIONS
from tracetorch.conformance.protocol import Arrays, Built, Unsupported, check_build, check_run, record
from tracetorch.conformance.subjects import subject
from tracetorch.conformance.subjects.layers import LayerSubject
from tracetorch.conformance.verdicts import PASSES, VERDICTS, Stored, grade, worst
from tracetorch.core.spec import RAW_FORMS, NeuronSpec

# framework -> the subject whose layers are read, the subject through which its layers are built
FRAMEWORKS: Mapping[str, tuple[str, str]] = {
    "tracetorch": ("tracetorch", "tracetorch"),
    "sinabs": ("sinabs", "sinabs-adapted"),
    "snntorch": ("snntorch", "snntorch-adapted"),
    "spikingjelly": ("spikingjelly", "spikingjelly-adapted"),
    "norse": ("norse", "norse-adapted"),
    "brainpy": ("brainpy", "brainpy-adapted"),
}

# Raw forms of which one trains as the other does; within [0, 1], a clamp is the number itself.
_SAME_RAW = ({"value", "clamped"}, *({form} for form in RAW_FORMS))


@dataclass(frozen=True)
class Converted:
    """One case carried from one framework to another.

    Attributes:
        source, target: frameworks.
        case: its name.
        there: the verdict of A -> B.
        back: that of A -> B -> A, against A; "unsupported" where `there` is.
        gradient: of A -> B: "exact", "rounding", "divergent", "reparametrised" where B trains another raw parameter,
            "unsupported" where B's adapter says that its gradient is another; "" where the case asks for none.
        text: why it is what it is.
    """

    source: str
    target: str
    case: str
    there: str
    back: str
    text: str = ""
    gradient: str = ""

    @property
    def known(self) -> bool:
        """Whether one of the two frameworks is listed as divergent in this case."""
        return any(d.case == self.case and d.framework in (self.source, self.target) for d in DEVIATIONS)


def _layer(name: str) -> LayerSubject:
    made = subject(name)
    assert isinstance(made, LayerSubject)
    return made


def _made(made: LayerSubject, spec: NeuronSpec, case: Case, grad: bool) -> tuple[NeuronSpec, Built, Arrays]:
    """A layer built from a spec and run: what its adapter reads of it, and what it answers.

    Its decays are held against those of the source in its own raw forms, which are the source's to rounding or diverge.
    """
    built = check_build(made.build(record(spec)), spec)
    grad_output = case.grad_output if grad and not built.gradients else None
    answer = check_run(made.run(case.x.copy(), case.lengths, grad_output), spec, case.x, grad_output is not None)
    assert made.layer is not None
    own = made.adapter.spec(made.layer)
    decays = {name: own.parameters[name] for name in ("mem_decay", "syn_decay") if name in own.parameters}
    return own, replace(built, parameters={**decays, **built.parameters}), answer


def _membrane(spec: NeuronSpec, built: Built, case: Case, answer: Arrays) -> Any:
    """After the reset, whatever is stored; that of a difference of exponentials as it is."""
    if spec.synapse == "difference_of_exponentials":
        return answer["state.v_mem"]
    states = {name: answer[f"state.{name}"] for name in spec.states}
    stored = Stored(spec.states, built.stores_before_reset, dt=built.dt)
    return oracle.trajectory(spec, oracle.Recording(case.x, answer["outputs"], states, stored))[2]


def _same(a: tuple[NeuronSpec, Built, Arrays], b: tuple[NeuronSpec, Built, Arrays], case: Case) -> bool:
    """The same bits in outputs and states."""
    if a[2]["outputs"].tobytes() != b[2]["outputs"].tobytes() or a[0].states != b[0].states:
        return False
    names = [f"state.{name}" for name in a[0].states]
    if any(name not in one[2] for name in names for one in (a, b)):
        return False
    if a[1].stores_before_reset == b[1].stores_before_reset:
        return all(a[2][name].tobytes() == b[2][name].tobytes() for name in names)
    # Numbers, not bits: a reset to 0 by multiplication may leave -0.0.
    with np.errstate(all="ignore"):
        one, other = (_membrane(spec, built, case, answer) for spec, built, answer in (a, b))
    return bool(np.array_equal(one, other, equal_nan=True))


def _verdict(
    source: tuple[NeuronSpec, Built, Arrays], target: tuple[NeuronSpec, Built, Arrays], case: Case
) -> tuple[str, str]:
    if _same(source, target, case):
        return "exact", ""
    graded = grade(replace(case, spec=source[0], grad=False, runs=1), target[1], [target[2]])
    verdict = worst([aspect.verdict for aspect in graded.aspects.values()])
    said = "; ".join(f"{n}: {a.text}" for n, a in graded.aspects.items() if a.verdict == "divergent")
    return ("rounding" if verdict == "exact" else verdict), said


def _gradient(source: tuple[NeuronSpec, Built, Arrays], target: tuple[NeuronSpec, Built, Arrays], case: Case) -> str:
    """Of the target, against the source's bits and against the oracle along the target's own trajectory."""
    names = [name for name in source[2] if name.startswith("grad.")]
    if target[1].gradients:
        return "unsupported"
    if not names:
        return ""
    graded = grade(replace(case, spec=source[0], runs=1), target[1], [target[2]])
    verdict = worst([aspect.verdict for name, aspect in graded.aspects.items() if name.startswith("gradient")])
    trained = {n: p for n, p in target[1].parameters.items() if source[0].parameters[n].learnable}
    other = any({p.raw, source[0].parameters[n].raw} not in _SAME_RAW for n, p in trained.items())
    if verdict not in PASSES or other:
        return verdict if verdict not in PASSES else "reparametrised"
    # Numbers, not bits: where dL/doutput is 0, the gradient is a zero of either sign.
    same = all(np.array_equal(source[2][name], target[2][name], equal_nan=True) for name in names)
    return "exact" if same else "rounding"


def _carry(case: Case, names: tuple[str, str], subjects: tuple[LayerSubject, LayerSubject, LayerSubject]) -> Converted:
    reads, builds, again = subjects
    try:
        source = _made(reads, case.spec, case, case.grad)
    except Unsupported as refusal:
        return Converted(*names, case.name, "", "", f"the source cannot express it: {refusal}")
    if not reads.alone:
        return Converted(*names, case.name, "", "", "the source cannot express it by its layer alone")
    try:
        target = _made(builds, source[0], case, case.grad)
    except Unsupported as refusal:
        return Converted(*names, case.name, "unsupported", "unsupported", str(refusal))
    there, text = _verdict(source, target, case)
    gradient = _gradient(source, target, case) if case.grad else ""
    try:
        back, more = _verdict(source, _made(again, target[0], case, False), case)
    except Unsupported as refusal:
        back, more = "unsupported", str(refusal)
    return Converted(*names, case.name, there, back, "; ".join(filter(None, (text, more))), gradient)


@dataclass(frozen=True)
class Conversions:
    """The rows of `conversions`; `matrix()` shows them."""

    frameworks: Sequence[str]
    rows: Sequence[Converted]

    def cell(self, source: str, target: str) -> str:
        """Verdicts counted, there and back."""
        own = [r for r in self.rows if (r.source, r.target) == (source, target) and r.there]
        counts = [Counter(getattr(r, way) for r in own) for way in ("there", "back")]
        text = [", ".join(f"{count[v]} {v}" for v in VERDICTS if count[v]) or "nothing" for count in counts]
        slopes = Counter(r.gradient for r in own if r.gradient)
        text.append(", ".join(f"{slopes[v]} {v}" for v in (*VERDICTS, "reparametrised") if slopes[v]) or "nothing")
        known = sum(r.known and "divergent" in (r.there, r.back, r.gradient) for r in own)
        return f"{text[0]}; back: {text[1]}; gradients: {text[2]}" + (f" ({known} known)" if known else "")

    def matrix(self) -> str:
        """A line for each pair of frameworks."""
        pairs = [(a, b) for a in self.frameworks for b in self.frameworks if a != b]
        width = max((len(a) + len(b) for a, b in pairs), default=0) + 4
        return "\n".join(f"{f'{a} -> {b}':<{width}}  {self.cell(a, b)}" for a, b in pairs)

    @property
    def ok(self) -> bool:
        """Whether nothing diverges that an adapter builds, but for known deviations; what it refuses is no fault."""
        said = [verdict for r in self.rows for verdict in (r.there, r.back, r.gradient) if verdict and not r.known]
        return bool(said) and all(verdict in (*PASSES, "reparametrised", "unsupported") for verdict in said)


def conversions(
    frameworks: Iterable[str] = tuple(FRAMEWORKS),
    cases: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Conversions:
    """Carry every case from each framework to each other, and back.

    Raises:
        ValueError: a framework without an adapter that builds, or an unknown case.
        ImportError: a framework that is not installed.
    """
    names = tuple(frameworks)
    unknown = [name for name in names if name not in FRAMEWORKS]
    if unknown:
        raise ValueError(f"framework {unknown[0]!r} cannot be carried; those that can: {', '.join(FRAMEWORKS)}")
    rows = []
    for a in names:
        for b in names:
            if a == b:
                continue
            subjects = (_layer(FRAMEWORKS[a][0]), _layer(FRAMEWORKS[b][1]), _layer(FRAMEWORKS[a][1]))
            for case in select(cases):
                if progress is not None:
                    progress(f"{a} -> {b}: {case.name}")
                rows.append(_carry(case, (a, b), subjects))
    return Conversions(names, rows)
