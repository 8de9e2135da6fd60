"""The command and the page docs/conformance.md: what they say is so."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tracetorch import conformance
from tracetorch.cli import main
from tracetorch.conformance import ChildSubject, golden

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "conformance.md"
PLANTED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.planted import Planted
from tracetorch.conformance import serve
serve(Planted("the other comparison"))
"""


@pytest.fixture
def planted(tmp_path):
    """A command whose subject takes > for >= and >= for >."""
    script = tmp_path / "a subject.py"
    script.write_text(PLANTED, encoding="utf-8")
    return f"{sys.executable} '{script}'"


def test_it_grades_and_writes(tmp_path, capsys):
    page, document = tmp_path / "r.html", tmp_path / "r.json"
    arguments = ["--subjects", "tracetorch", "sinabs", "--cases", "comparison", "number.infinite"]
    assert main(["conformance", *arguments, "--html", str(page), "--json", str(document)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"comparison.strict +exact +exact", printed)
    assert re.search(r"number.infinite +divergent\* +divergent\*", printed)
    assert json.loads(document.read_text(encoding="utf-8"))["ok"] is True
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_by_default_all_that_run_here_are_graded_and_the_others_named(capsys, monkeypatch):
    original = conformance.subject

    def without_sinabs(name):
        if name in ("sinabs", "brainpy"):
            raise ImportError(f"{name} is not installed")
        return original(name)

    monkeypatch.setattr(conformance, "subject", without_sinabs)
    assert main(["conformance", "--cases", "comparison"]) == 0
    printed = capsys.readouterr()
    assert "left out: sinabs: sinabs is not installed" in printed.err
    assert "left out: brainpy: brainpy is not installed" in printed.err
    assert {"tracetorch", "tracetorch-cpu", "snntorch"} <= set(printed.out.splitlines()[0].split())
    assert "sinabs" not in printed.out.splitlines()[0]


def test_a_divergence_that_is_not_listed_is_exit_status_1(planted, capsys):
    assert main(["conformance", "--subject-cmd", planted, "--cases", "comparison"]) == 1
    printed = capsys.readouterr().out
    assert "FAULT planted: comparison-strict: divergent: outputs: " in printed
    assert "tracetorch " not in printed.splitlines()[0], "only what was asked for"


def test_what_cannot_run_is_exit_status_2(capsys):
    for wrong in (
        ["--subjects", "nothing"],
        ["--cases", "nothing"],
        ["bisect", "tracetorch"],
        ["dissect", "tracetorch", "sinabs"],
    ):
        assert main(["conformance", *wrong]) == 2
        assert "tracetorch conformance: " in capsys.readouterr().err


def test_bisect(planted, capsys):
    assert main(["conformance", "bisect", "tracetorch", "--subject-cmd", planted, "--cases", "comparison"]) == 1
    printed = capsys.readouterr().out
    assert "in the case comparison" in printed
    assert "after 1 steps of one neuron" in printed
    assert main(["conformance", "bisect", "tracetorch", "tracetorch-cpu", "--cases", "comparison"]) == 0
    assert "the same" in capsys.readouterr().out


def test_golden_and_list(tmp_path, capsys):
    assert main(["conformance", "--golden", str(tmp_path / "new")]) == 0
    assert golden.stale(tmp_path / "new") == []
    assert main(["conformance", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(conformance.catalogue())


def test_importing_the_suite_loads_no_framework():
    code = (
        "import sys, tracetorch.conformance as c; c.catalogue(); print(sorted({n.split('.')[0] for n in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert not {"snntorch", "sinabs", "norse", "spikingjelly", "brainpy", "jax", "triton", "pytest", "samna"} & set(
        eval(done.stdout)
    )


# ---------------------------------------------------------------- the page


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def tables():
    location = importlib.util.spec_from_file_location("make_conformance", ROOT / "docs" / "make_conformance.py")
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_fresh():
    text = PAGE.read_text(encoding="utf-8")
    module = tables()
    assert module.page(text) == text, "run: python docs/make_conformance.py"
    assert module.page(text.replace("`comparison-strict`", "`gone`")) == text
    with pytest.raises(ValueError, match="no place"):
        module.page(text.replace("<!-- generated: verdicts -->", ""))


def test_the_code_of_the_page_runs(capsys):
    names = {"__name__": "page"}
    for block in blocks():
        exec(compile(block, PAGE.name, "exec"), names)
    mine = names["Mine"]()
    results = conformance.run([mine])
    assert results.ok, results.faults
    counted = [r.verdict for r in results.rows]
    assert counted.count("exact") + counted.count("rounding") >= 20
    assert "divergent" not in counted


def test_the_subject_of_the_page_runs_as_a_command(tmp_path):
    [block] = [block for block in blocks() if "class Mine" in block]
    assert len(block.splitlines()) < 100
    script = tmp_path / "mine.py"
    script.write_text(block, encoding="utf-8")
    with ChildSubject([sys.executable, "-W", "error", str(script)]) as subject:
        results = conformance.run([subject], ["comparison", "number", "reset"])
    assert results.ok, results.faults


def test_every_known_deviation_has_its_reproducer():
    text = PAGE.read_text(encoding="utf-8")
    known = {deviation.id for deviation in conformance.DEVIATIONS}
    assert known == set(re.findall(r"^### ([\w-]+)$", text, re.MULTILINE))
    for id in known:
        assert "```python" in text.split(f"### {id}\n")[1].split("###")[0]
