"""The page of results, read by a parser and its filter run in node: what is shown, hidden and found behind a case."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tests.planted import Named
from tracetorch import conformance

# A document as small as the filter needs: the two inputs and the rows, by their attributes.
HARNESS = """
const rows = JSON.parse(process.argv[1]).map(dataset => ({dataset, hidden: false}));
const listeners = {};
const inputs = Object.fromEntries(["text", "verdict"].map(id => [id, {
  value: "", addEventListener: (name, call) => { listeners[id + "." + name] = call; },
}]));
globalThis.document = {
  getElementById: id => inputs[id],
  querySelectorAll: selector => { if (selector !== "[data-filter]") throw selector; return rows; },
};
eval(process.argv[2]);
const shown = [];
for (const [text, verdict] of JSON.parse(process.argv[3])) {
  inputs.text.value = text; listeners["text.input"]();
  inputs.verdict.value = verdict; listeners["verdict.change"]();
  shown.push(rows.flatMap((row, k) => row.hidden ? [] : [k]));
}
console.log(JSON.stringify(shown));
"""


class Page(HTMLParser):
    """Elements in order, each with its attributes, its text and the elements around it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.around: list[dict] = []
        self.elements: list[dict] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attributes": dict(attrs), "text": "", "around": [e["tag"] for e in self.around]}
        element["inside"] = [id(e) for e in self.around]
        self.elements.append(element)
        if tag not in ("meta", "input"):
            self.around.append(element)

    def handle_endtag(self, tag):
        assert self.around.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.around:
            element["text"] += data

    def of(self, tag, within=None):
        return [e for e in self.elements if e["tag"] == tag and (within is None or id(within) in e["inside"])]

    @property
    def rows(self):
        return [e for e in self.elements if "data-filter" in e["attributes"]]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    subjects = [Named("right"), Named("wrong", "the other comparison"), conformance.subject("tracetorch")]
    results = conformance.run(subjects, ["comparison", "reset.add_value", "refractory.hold", "output.membrane"])
    path = tmp_path_factory.mktemp("page") / "page.html"
    results.to_html(path)
    return Page(path.read_text(encoding="utf-8")), results


def test_there_is_a_row_for_each_requirement_and_one_to_open_for_each_case(page):
    parsed, results = page
    assert [row["tag"] for row in parsed.rows] == ["tr"] * len(results.table()) + ["details"] * len(results.cases)
    for row, (requirement, cells) in zip(parsed.rows, results.table(), strict=False):
        texts = [cell["text"] for cell in parsed.of("td", row)]
        assert texts[0] == requirement
        assert texts[2:] == list(cells.values())
    assert [option["text"] for option in parsed.of("option")] == ["", *conformance.VERDICTS]


def test_behind_a_case_are_its_verdicts_rasters_differences_and_a_reproducer(page):
    parsed, results = page
    for details, case in zip(parsed.of("details"), results.cases, strict=True):
        own = [row for row in results.rows if row.case == case.name]
        assert parsed.of("summary", details)[0]["text"].startswith(case.name)
        table = parsed.of("table", details)[0]
        assert [cell["text"] for cell in parsed.of("td", table)][::3] == [row.subject for row in own]
        assert all(row.verdict in details["text"] for row in own)
        spikes = case.spec.output == "spikes"
        assert len(parsed.of("svg", details)) == 1 + spikes
        drawn = [path["text"] for path in parsed.of("path", details)]
        assert drawn == ([row.subject for row in own if row.arrays] if spikes else [])
        lines = [line["text"] for line in parsed.of("polyline", details)]
        assert lines == [row.subject for row in own if row.arrays and len(row.distances)]
        assert any(case.spec.form in pre["text"] for pre in parsed.of("pre", details))


def test_the_raster_marks_the_spikes(page):
    parsed, results = page
    details = next(d for d, c in zip(parsed.of("details"), results.cases, strict=True) if c.name == "comparison-strict")
    own = [row for row in results.rows if row.case == "comparison-strict"]
    for path, row in zip(parsed.of("path", details), own, strict=True):
        neurons = row.arrays["outputs"][:120, 0, :7]
        assert path["attributes"]["d"].count("M") == int((neurons > 0).sum())
    strict, inclusive = (path["attributes"]["d"] for path in parsed.of("path", details)[:2])
    assert strict != inclusive


def test_a_reproducer_runs(page, capsys):
    parsed, results = page
    details = next(d for d, c in zip(parsed.of("details"), results.cases, strict=True) if c.name == "reset-add-value")
    code = parsed.of("pre", details)[-1]["text"]
    assert len(code.splitlines()) <= 10
    code = re.sub(r"conformance\.subject\('[a-z]+'\)", "conformance.subject('tracetorch')", code)
    exec(compile(code, "reproducer", "exec"), {})
    said = capsys.readouterr().out
    assert "reset.add_value" in said
    assert "rounding" in said


def filtered(parsed, asked):
    """Which rows the page's own script leaves, for each (text, verdict)."""
    rows = [{k.removeprefix("data-"): v for k, v in row["attributes"].items()} for row in parsed.rows]
    [script] = parsed.of("script")
    command = ["node", "-e", HARNESS, json.dumps(rows), script["text"], json.dumps(asked)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return [[parsed.rows[k] for k in shown] for shown in json.loads(ran.stdout)]


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's script, is not installed")
def test_the_filter_leaves_what_is_asked_for(page):
    parsed, _ = page
    asked = [["", ""], ["STRICT", ""], ["", "unsupported"], ["comparison", "divergent"], ["nowhere", ""], ["", ""]]
    everything, strict, unsupported, divergent, nothing, again = filtered(parsed, asked)
    assert everything == again == parsed.rows
    assert nothing == []
    assert strict
    assert all("strict" in row["attributes"]["data-filter"] for row in strict)
    assert {row["tag"] for row in strict} == {"tr", "details"}
    assert unsupported == [r for r in parsed.rows if "unsupported" in r["attributes"]["data-verdicts"].split()]
    assert 0 < len(unsupported) < len(parsed.rows)
    assert divergent
    assert all("comparison" in row["attributes"]["data-filter"] for row in divergent)
