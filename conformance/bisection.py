"""The smallest case in which two subjects part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from tracetorch.conformance.cases import Array, Case
from tracetorch.conformance.catalogue import select
from tracetorch.conformance.protocol import (
    Arrays,
    Subject,
    SubjectError,
    Unsupported,
    check_build,
    check_description,
    check_run,
    record,
)
from tracetorch.core.spec import NeuronSpec, Parameter


@dataclass(frozen=True)
class Parting:
    """Where two subjects part.

    Attributes:
        names: of the subjects.
        case: the case it was found in.
        spec: the neuron, its parameters those of one neuron alone.
        x: the inputs of that neuron, float32 [T], as few as it takes.
        outputs: of both subjects, [T] each.
    """

    names: tuple[str, str]
    case: str
    spec: NeuronSpec
    x: Array
    outputs: tuple[Array, Array]

    def __str__(self) -> str:
        rows = [("x", self.x), *zip(self.names, self.outputs, strict=True)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {' '.join(f'{float(v):.9g}' for v in values)}" for name, values in rows]
        return "\n".join([f"in the case {self.case}, after {len(self.x)} steps of one neuron:", *lines, str(self.spec)])


def _outputs(subject: Subject, spec: NeuronSpec, x: Array, calls: tuple[int, ...]) -> Array | str:
    """Outputs of a subject, or why it has none."""
    try:
        check_build(subject.build(record(spec)), spec)
        answer: Arrays = check_run(subject.run(x.copy(), calls, None), spec, x, False)
    except (Unsupported, SubjectError) as error:
        return str(error)
    except Exception as error:  # a stranger's code: a subject that fails on a case has nothing to compare in it
        return f"{type(error).__name__}: {error}"
    return answer["outputs"].astype(np.float64)


def _parts(spec: NeuronSpec, a: Array, b: Array) -> Array:
    """Where the outputs part: spikes that differ, or membranes further apart than rounding explains."""
    with np.errstate(invalid="ignore"):
        if spec.output == "spikes":
            apart = a != b
        else:
            scale = np.maximum.accumulate(np.maximum(np.abs(a), np.abs(b)), axis=0)
            apart = np.abs(a - b) > 1e-5 * scale
        return np.asarray((apart | (np.isnan(a) != np.isnan(b))) & ~(np.isnan(a) & np.isnan(b)))


def _alone(spec: NeuronSpec, neuron: int, neurons: int) -> NeuronSpec:
    """The spec of one neuron of a layer."""
    values = {}
    for name, parameter in spec.parameters.items():
        value = np.broadcast_to(parameter.value, (neurons,))[neuron] if parameter.value.ndim else parameter.value
        values[name] = Parameter(np.array(value), parameter.learnable, parameter.raw)
    return spec.replace(parameters=values)


def _smallest(case: Case, subjects: tuple[Subject, Subject]) -> tuple[NeuronSpec, Array, Array, Array] | str | None:
    """The shortest stretch of one neuron of a case in which the subjects part, run anew by itself; None if they do
    not part, and why not if they cannot be compared.
    """
    one, other = (_outputs(subject, case.spec, case.x, case.lengths) for subject in subjects)
    if isinstance(one, str):
        return f"the first: {one}"
    if isinstance(other, str):
        return f"the second: {other}"
    apart = _parts(case.spec, one, other)
    if not apart.any():
        return None
    t, row, neuron = (int(k) for k in np.argwhere(apart)[0])
    spec = _alone(case.spec, neuron, case.x.shape[-1])
    for first in range(t, -1, -1):  # the fewest last inputs that still part them, from the initial state
        x = case.x[first : t + 1, row : row + 1, neuron : neuron + 1].copy()
        one, other = (_outputs(subject, spec, x, (len(x),)) for subject in subjects)
        if not isinstance(one, str) and not isinstance(other, str) and _parts(spec, one, other).any():
            return spec, x[:, 0, 0], one[:, 0, 0], other[:, 0, 0]
    return None


def bisect(
    a: Subject, b: Subject, cases: Iterable[str] | None = None, progress: Callable[[str], None] | None = None
) -> Parting | None:
    """The smallest case in which two subjects emit other spikes, or membranes apart by more than rounding; or None.

    Only cases that both express are compared, and only their outputs.

    Args:
        cases: names, requirements or groups of them; None: all.
        progress: called with the name of each case before it is run.

    Raises:
        ValueError: an unknown case, or none at all.
        SubjectError: a subject that does not describe itself; two that share no case, so that nothing was compared.
    """
    chosen = select(cases)
    if not chosen:
        raise ValueError("cases=[]: no case to compare; name some, or give None for all")
    names = (check_description(a.describe())["name"], check_description(b.describe())["name"])
    best: Parting | None = None
    alone = []
    for case in chosen:
        if progress is not None:
            progress(case.name)
        found = _smallest(case, (a, b))
        if isinstance(found, str):
            alone.append(f"{case.name}: {found}")
        elif found is not None and (best is None or len(found[1]) < len(best.x)):
            spec, x, one, other = found
            best = Parting(names, case.name, spec, x, (one, other))
    if len(alone) == len(chosen):
        asked = f"{len(chosen)} case{'' if len(chosen) == 1 else 's'} asked"
        raise SubjectError(
            f"nothing to compare: {names[0]} and {names[1]} share none of the {asked}; {alone[0]}; ask cases that both "
            "express"
        )
    return best
