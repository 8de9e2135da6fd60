"""The frameworks graded: every deviation is listed, and results are whole as a page, as JSON and as a matrix."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.planted import Named, Planted, answer
from tracetorch import conformance, oracle
from tracetorch.conformance import Deviation, catalogue, golden
from tracetorch.conformance.bisection import bisect
from tracetorch.conformance.cases import observed
from tracetorch.conformance.protocol import check_run
from tracetorch.conformance.verdicts import VERDICTS

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMEWORKS = [
    "tracetorch",
    "tracetorch-cpu",
    "sinabs",
    "snntorch",
    "spikingjelly",
    "norse",
    "sinabs-adapted",
    "snntorch-adapted",
    "spikingjelly-adapted",
    "norse-adapted",
]
LEAST = {"snntorch": 45, "sinabs": 50, "spikingjelly": 45, "norse": 18}


@pytest.fixture(scope="module")
def graded():
    """Every subject that is installed here, over every case."""
    return conformance.run(FRAMEWORKS)


# ---- the frameworks --------------------------------------------------------------------------------------------------


def test_the_frameworks_are_graded_and_every_deviation_is_listed(graded):
    assert graded.ok, "\n".join(graded.faults)
    assert len(graded.rows) == len(FRAMEWORKS) * len(catalogue())
    assert not [r for r in graded.rows if r.verdict == "error"]
    for name in FRAMEWORKS:
        passed = sum(r.subject == name and r.verdict in ("exact", "rounding") for r in graded.rows)
        assert passed >= LEAST.get(name, 90), name


# One of every kind, as every case is a compilation of its own.
BRAINPY = ["reset-subtract", "reset-value", "decay-geometric", "leak", "comparison-strict", "per-neuron"]
BRAINPY += [
    "gradient-attached",
    "gradient-membrane-stopped",
    "initial-v",
    "state-chunks",
    "double",
    "infinite",
    "denormal",
]


def brainpy_graded(names, cases, least):
    pytest.importorskip("brainpy")
    results = conformance.run(names, cases)
    assert results.ok, "\n".join(results.faults)
    for name in names:
        assert sum(r.subject == name and r.verdict in ("exact", "rounding") for r in results.rows) >= least, name
    assert {r.case for r in results.rows if r.known} == {"infinite", "denormal"}


def test_brainpy_is_graded_and_every_deviation_is_listed():
    brainpy_graded(["brainpy-adapted"], BRAINPY, 10)


@pytest.mark.sweep
def test_brainpy_is_graded_in_every_case():
    brainpy_graded(["brainpy", "brainpy-adapted"], None, 28)


def test_what_a_subject_cannot_express_is_said_with_a_field(graded):
    said = [row.text for row in graded.rows if row.verdict == "unsupported" and not row.aspects]
    assert len(said) > 50
    assert not [text for text in said if "=" not in text]


def test_the_fused_kernel_and_the_step_loop_get_the_same_verdicts(graded):
    coupled = {name for name, case in catalogue().items() if case.spec.inhibition != "none"}
    assert {r.verdict for r in graded.rows if r.case in coupled and r.subject == "tracetorch-cpu"} == {"unsupported"}
    by_subject = {
        name: {
            r.case: (r.verdict, {n: a.verdict for n, a in r.aspects.items()})
            for r in graded.rows
            if r.subject == name and r.case not in coupled
        }
        for name in ("tracetorch", "tracetorch-cpu")
    }
    forward = {
        name: {
            case: (v, {n: a for n, a in aspects.items() if "gradient" not in n}) for case, (v, aspects) in own.items()
        }
        for name, own in by_subject.items()
    }
    assert {c: a[1] for c, a in forward["tracetorch"].items()} == {
        c: a[1] for c, a in forward["tracetorch-cpu"].items()
    }


def test_an_unlisted_deviation_a_stale_entry_and_another_aspect_fail():
    def run(fault, *deviations):
        return conformance.run([Planted(fault)], ["comparison"], deviations=deviations)

    fault = "the other comparison"
    assert not run(fault).ok
    found = run(fault)
    shown = {r.case: {n for n, a in r.aspects.items() if a.verdict == "divergent"} for r in found.rows}
    exact = [Deviation("x", "planted", "1", ("planted",), c, tuple(a), "because") for c, a in shown.items()]
    assert run(fault, *exact).ok
    assert all(r.known for r in run(fault, *exact).rows)
    assert not run(fault, exact[0]).ok, "the other one is not listed"
    assert any("listed as divergent" in text for text in run("", *exact).faults), "stale"
    wrong = Deviation("x", "planted", "1", ("planted",), exact[0].case, ("final states",), "because")
    assert not run(fault, wrong, exact[1]).ok
    other = [Deviation("x", "planted", "2", ("planted",), d.case, d.aspects, "because") for d in exact]
    assert not run(fault, *other).ok, "another version"


# ---- results ---------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.seen = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        for name, value in attrs:
            if name in ("src", "href") or name.startswith("on"):
                self.wrong.append((tag, name, value))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("option", "td", "tr", "th") and self.open[-1] != tag:
            self.wrong.append(tag)
        assert self.open.pop() == tag


def test_the_page_is_whole_and_every_name_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&\'"'

    class Evil(Named):
        def build(self, spec):
            super().build(spec)
            if self.spec.comparison == ">":
                raise conformance.Unsupported(evil, evil, evil)
            return {"notes": evil, "gradients": evil}

    results = conformance.run([Evil(evil[:60]), Named("b", "the other comparison")], ["comparison", "reset_gradient"])
    results.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "alert(&quot;x&quot;)" in text
    tags = Tags()
    tags.feed(text)
    assert (tags.wrong, tags.open) == ([], [])
    assert {"svg", "table", "details", "script", "path", "polyline"} <= tags.seen
    assert text.count("<script>") == 1
    assert "http" not in text.replace("http-equiv", "")


def test_json_holds_what_the_results_hold(graded, tmp_path):
    graded.to_json(tmp_path / "results.json")
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert document["ok"] is True
    assert len(document["rows"]) == len(graded.rows)
    assert {row["verdict"] for row in document["rows"]} <= set(VERDICTS)


def test_the_matrix_has_a_row_for_each_requirement(graded):
    lines = graded.matrix().splitlines()
    assert lines[0].split() == ["requirement", *FRAMEWORKS]
    assert [line.split()[0] for line in lines[2:]] == list(dict.fromkeys(c.requirement for c in catalogue().values()))
    cells = dict(graded.table())
    assert cells["number.infinite"]["sinabs"] == "divergent*"
    assert cells["synapse.add_then_decay"]["snntorch"] == "unsupported"


def test_run_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="not known"):
        conformance.run(["nothing"])
    with pytest.raises(ValueError, match="a list"):
        conformance.run("tracetorch")
    with pytest.raises(ValueError, match="two subjects are named"):
        conformance.run([Planted(), Planted()], ["comparison"])
    assert not conformance.run([]).ok


# ---- bisect ----------------------------------------------------------------------------------------------------------


def test_bisect_finds_the_smallest_parting():
    parting = bisect(Named("a"), Named("b", "the other comparison"))
    assert parting is not None
    assert len(parting.x) == 1, str(parting)
    assert parting.x.tolist() == [1.0] or parting.spec.comparison == ">="
    assert parting.outputs[0] != parting.outputs[1]
    later = bisect(Named("a"), Named("b", "input decays too"), ["reset.subtract"])
    assert later is not None
    assert later.names == ("a", "b")
    assert "in the case" in str(later)
    assert bisect(Named("a"), Named("b"), ["comparison", "reset"]) is None


def test_the_recording_of_the_oracle_is_right_by_its_own_judge():
    """And one of another neuron is not: `observed` is what cases tell apart by."""
    case = catalogue()["reset-subtract"]
    other = observed(catalogue()["reset-value"].spec, case.x)[0]
    assert not oracle.judge(case.spec, other).ok
    assert check_run(answer(case), case.spec, case.x, False)["outputs"].any()
    assert Path(golden.__file__).with_name("golden").is_dir()
