"""The results as one HTML page: no outside reference, every text escaped, nothing run but a filter of its own."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from tracetorch.conformance.cases import Case
from tracetorch.conformance.requirements import REQUIREMENTS
from tracetorch.conformance.verdicts import VERDICTS

if TYPE_CHECKING:
    from tracetorch.conformance.runner import CaseResult, Results

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#718096", "#d69e2e", "#319795")
_STEPS = 120  # of a raster
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1a202c }
table { border-collapse: collapse } td, th { border: 1px solid #cbd5e0; padding: .15rem .5rem; text-align: left }
.exact { background: #c6f6d5 } .rounding { background: #e6fffa } .unsupported { background: #edf2f7; color: #718096 }
.divergent, .error { background: #fed7d7 } .known { background: #fefcbf } pre { background: #f7fafc; padding: .5rem }
details { margin: .3rem 0 } summary { cursor: pointer } label { margin-right: 1rem } svg { background: #fff }
"""
_SCRIPT = """
const text = document.getElementById("text"), verdict = document.getElementById("verdict");
function show() {
  for (const row of document.querySelectorAll("[data-filter]")) {
    const found = row.dataset.filter.includes(text.value.toLowerCase());
    row.hidden = !(found && (!verdict.value || row.dataset.verdicts.split(" ").includes(verdict.value)));
  }
}
text.addEventListener("input", show); verdict.addEventListener("change", show);
"""


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)


def _cell(verdict: str) -> str:
    word = verdict.split()[0]
    kind = "known" if word.endswith("*") else word
    return f'<td class="{_e(kind.rstrip("*"))}">{_e(verdict)}</td>'


def _attributes(words: Iterable[str], verdicts: Iterable[str]) -> str:
    said = sorted({verdict.split()[0].rstrip("*") for verdict in verdicts})
    return f'data-filter="{_e(" ".join(words).lower())}" data-verdicts="{_e(" ".join(said))}"'


def _matrix(results: Results) -> str:
    head = "".join(f"<th>{_e(name)}</th>" for name in results.subjects)
    rows = []
    for requirement, cells in results.table():
        text = REQUIREMENTS[requirement].text
        attributes = _attributes([requirement, text], cells.values())
        first = f"<td><code>{_e(requirement)}</code></td><td>{_e(text)}</td>"
        rows.append(f"<tr {attributes}>{first}{''.join(map(_cell, cells.values()))}</tr>")
    return f"<table><tr><th>requirement</th><th></th>{head}</tr>{''.join(rows)}</table>"


def _raster(case: Case, rows: list[CaseResult]) -> str:
    """Spikes of the first sample, the subjects of one neuron under each other."""
    steps, neurons = min(len(case.x), _STEPS), min(case.x.shape[-1], 7)
    band = 5 * len(rows) + 6
    paths = []
    for k, row in enumerate(rows):
        spikes = np.nan_to_num(row.arrays["outputs"][:steps, 0, :neurons])
        marks = "".join(
            f"M{6 * int(t) + 3} {band * int(n) + 5 * k + 3}v4" for t, n in np.argwhere(spikes > 0)[: _STEPS * 7]
        )
        colour = _COLOURS[k % len(_COLOURS)]
        paths.append(f'<path d="{marks}" stroke="{colour}" stroke-width="2"><title>{_e(row.subject)}</title></path>')
    return f'<svg width="{6 * steps + 6}" height="{band * neurons}" role="img">{"".join(paths)}</svg>'


def _differences(case: Case, rows: list[CaseResult]) -> str:
    """The largest distance of a membrane to the oracle's in every step, from 1e-10 to 10 on a log scale."""
    steps, lines = min(len(case.x), _STEPS), []
    for k, row in enumerate(rows):
        if row.distances is None or not len(row.distances):
            continue
        height = 110 - 10 * (np.log10(np.clip(row.distances[:steps], 1e-10, 10)) + 10)
        points = " ".join(f"{6 * t + 3},{float(h):.1f}" for t, h in enumerate(height))
        colour = _COLOURS[k % len(_COLOURS)]
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}"><title>{_e(row.subject)}</title></polyline>'
        )
    scale = "".join(
        f'<text x="2" y="{110 - 10 * (power + 10)}" font-size="8" fill="#718096">1e{power}</text>'
        for power in (-8, -4, 0)
    )
    return f'<svg width="{6 * steps + 6}" height="112" role="img">{scale}{"".join(lines)}</svg>'


def _reproducer(case: Case, subject: str) -> str:
    lines = [
        "from tracetorch import conformance",
        f"case = conformance.catalogue()[{case.name!r}]",
        f"subject = conformance.subject({subject!r})  # or your own",
        "print(case.spec)",
        "print(subject.build(conformance.record(case.spec)))",
        "answer = subject.run(case.x, case.lengths, case.grad_output)",
        "truth = case.truth[0]",
        'print(answer["outputs"] - truth.outputs)',
        f"print(conformance.run([subject], [{case.name!r}]).matrix())",
    ]
    return "\n".join(lines)


def _details(case: Case, rows: list[CaseResult]) -> str:
    said = []
    for row in rows:
        aspects = "; ".join(f"{name}: {a.verdict} {a.text}".strip() for name, a in row.aspects.items())
        known = f" Known: {_e(row.known)}" if row.known else ""
        verdict = row.verdict + ("*" if row.known else "")
        said.append(f"<tr><td>{_e(row.subject)}</td>{_cell(verdict)}<td>{_e(row.text or aspects)}{known}</td></tr>")
    shown = [row for row in rows if row.arrays]
    attributes = _attributes([case.name, case.requirement, case.text], [row.verdict for row in rows])
    parts = [f"<table>{''.join(said)}</table>", f"<pre>{_e(case.spec)}</pre>"]
    if shown and case.spec.output == "spikes":
        parts.append(
            f"<p>Spikes of the first sample, each neuron's subjects under each other:</p>{_raster(case, shown)}"
        )
    if shown:
        parts.append(f"<p>Distance of the membranes to the oracle's, by step:</p>{_differences(case, shown)}")
        key = "".join(
            f'<span style="color:{_COLOURS[k % len(_COLOURS)]}">&#9632; {_e(row.subject)}</span> '
            for k, row in enumerate(shown)
        )
        parts.append(f"<p>{key}</p>")
    first = max(rows, key=lambda row: VERDICTS.index(row.verdict))
    parts.append(f"<pre>{_e(_reproducer(case, first.subject))}</pre>")
    summary = f"<code>{_e(case.name)}</code> v{case.version}, <code>{_e(case.requirement)}</code>: {_e(case.text)}"
    return f"<details {attributes}><summary>{summary}</summary>{''.join(parts)}</details>"


def page(results: Results) -> str:
    """The whole page."""
    rows: dict[str, list[Any]] = {case.name: [] for case in results.cases}
    for row in results.rows:
        rows[row.case].append(row)
    choices = "".join(f"<option>{_e(verdict)}</option>" for verdict in VERDICTS)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    faults = "".join(f"<li>{_e(fault)}</li>" for fault in results.faults)
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>Conformance</title><style>{_STYLE}</style></head><body><h1>Conformance</h1>"
    )
    body = [
        f"<pre>{_e(results.summary())}</pre>",
        f"<p>{'Every divergence is a known one.' if results.ok else 'Faults:'}</p><ul>{faults}</ul>",
        f'<p><label>filter <input id="text"></label><label>verdict <select id="verdict"><option></option>{choices}'
        "</select></label>A star marks a known deviation.</p>",
        f"<h2>Requirements</h2>{_matrix(results)}",
        f"<h2>Cases</h2>{''.join(_details(case, rows[case.name]) for case in results.cases if rows[case.name])}",
    ]
    return f"{head}{''.join(body)}<script>{_SCRIPT}</script></body></html>\n"
