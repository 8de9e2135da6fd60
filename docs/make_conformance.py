"""Writes the tables of docs/conformance.md: `python docs/make_conformance.py`. A test fails if they are stale."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tracetorch import conformance
from tracetorch.conformance import verdicts

PAGE = Path(__file__).with_name("conformance.md")


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is, in a cell of a table."""
    return re.sub(r"([\\*_|<>\[\]])", r"\\\1", text)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def requirements() -> str:
    """Every requirement and its cases."""
    cases: dict[str, list[str]] = {}
    for case in conformance.catalogue().values():
        cases.setdefault(case.requirement, []).append(f"`{case.name}`")
    rows = [
        (f"`{id}`", _plain(requirement.text), ", ".join(cases.get(id, ["none yet"])))
        for id, requirement in conformance.REQUIREMENTS.items()
    ]
    return _table(("requirement", "what must hold", "cases"), rows)


def words() -> str:
    """The verdicts, as the module that gives them explains them."""
    text = (verdicts.__doc__ or "").split("\n\n")[1]
    meanings = dict(re.findall(r"^ {4}(\w+) +(.*(?:\n {17}.*)*)", text, re.MULTILINE))
    assert set(meanings) == set(conformance.VERDICTS)
    return _table(("verdict", "meaning"), [(f"`{v}`", " ".join(meanings[v].split())) for v in conformance.VERDICTS])


def subjects() -> str:
    """The subjects of the package."""
    return _table(("subject", "what it is"), [(f"`{name}`", text) for name, text in conformance.SUBJECTS.items()])


def deviations() -> str:
    """The known deviations."""
    rows = [
        (d.id, d.framework, d.version, f"`{d.case}`", ", ".join(d.aspects), _plain(d.reason))
        for d in conformance.DEVIATIONS
    ]
    return _table(("deviation", "framework", "version", "case", "divergent in", "why"), rows)


def page(text: str) -> str:
    """The page with its tables written anew."""
    tables = {"requirements": requirements, "verdicts": words, "subjects": subjects, "deviations": deviations}
    for name, table in tables.items():
        start, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        if not rest or end not in rest:
            raise ValueError(f"{PAGE.name}: no place for the table {name!r}: put in the lines {start!r} and {end!r}")
        text = before + start + "\n" + table() + "\n\n" + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
