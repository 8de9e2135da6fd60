"""All cases by name. A new one is an entry in a `cases_*` file; changed numbers raise its version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType

from tracetorch.conformance.cases import Case, CaseError
from tracetorch.conformance.cases_behaviour import behaviours
from tracetorch.conformance.cases_choices import choices
from tracetorch.conformance.cases_resets import resets
from tracetorch.conformance.cases_signed import signs
from tracetorch.conformance.cases_states import states
from tracetorch.conformance.cases_variants import variants
from tracetorch.conformance.requirements import REQUIREMENTS


@cache
def catalogue() -> Mapping[str, Case]:
    """Every case by its name, in the order of the requirements.

    Raises:
        CaseError: two cases of one name, or a case of a requirement that is not known.
    """
    order = list(REQUIREMENTS)
    found = [*choices(), *states(), *resets(), *variants(), *signs(), *behaviours()]
    unknown = [case.name for case in found if case.requirement not in REQUIREMENTS]
    names = [case.name for case in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if unknown or twice:
        raise CaseError(f"cases of unknown requirements: {unknown}; names used twice: {twice}")
    return MappingProxyType({c.name: c for c in sorted(found, key=lambda c: order.index(c.requirement))})


def select(patterns: Iterable[str] | None = None) -> tuple[Case, ...]:
    """Cases whose name, requirement or group of requirements is among `patterns`; all of them for None.

    Raises:
        ValueError: a pattern that selects no case.
    """
    cases = catalogue().values()
    if patterns is None:
        return tuple(cases)
    wanted = tuple(patterns)
    labels = {case.name: {case.name, case.requirement, case.requirement.partition(".")[0]} for case in cases}
    for pattern in wanted:
        if not any(pattern in own for own in labels.values()):
            raise ValueError(f"no case, requirement or group {pattern!r}; known groups: {', '.join(_groups())}")
    return tuple(case for case in cases if labels[case.name] & set(wanted))


def _groups() -> list[str]:
    return sorted({case.requirement.partition(".")[0] for case in catalogue().values()})
