"""`pytest --pyargs tracetorch.conformance`: every case as a test, for JUnit and for those who live in pytest.

Without more, of the native layers; with `-p tracetorch.conformance.pytest_options` there are `--subject`,
`--subject-cmd` and `--case`.

A known deviation is an expected failure, as is its absence a failure; what is unsupported is skipped, with its reason.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from tracetorch import conformance
from tracetorch.conformance.child import ChildSubject
from tracetorch.conformance.runner import examine, marked


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each subject and case."""
    commands = metafunc.config.getoption("--subject-cmd", [])
    names = metafunc.config.getoption("--subject", []) or ([] if commands else ["tracetorch"])
    asked = [("name", name) for name in names] + [("command", command) for command in commands]
    metafunc.parametrize("asked", asked, ids=[text for _, text in asked], scope="module")
    cases = conformance.select(metafunc.config.getoption("--case", []) or None)
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(scope="module")
def subject(asked: tuple[str, str]) -> Iterator[Any]:
    """The subject asked for, with its description."""
    kind, text = asked
    made = conformance.subject(text) if kind == "name" else ChildSubject(shlex.split(text))
    yield made, conformance.check_description(made.describe())
    if isinstance(made, ChildSubject):
        made.close()


def test_case(subject: Any, case: Any) -> None:
    """The verdict of one subject on one case."""
    made, said = subject
    case.check()
    result = examine(said["name"], made, case)
    [row], stale = marked([result], said["framework"], said["version"], conformance.DEVIATIONS)
    assert not stale, stale[0]
    if row.known:
        pytest.xfail(row.known)
    if row.verdict == "unsupported":
        pytest.skip(f"unsupported: {row.why}")
    assert row.verdict in ("exact", "rounding"), f"{row.verdict}: {row.why}"
