"""The documentation says what is so: its code runs, its links and names exist. Its tables: test_docs_tables.py."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tracetorch as tt
from tracetorch.cli import COMMANDS
from tracetorch.core.forms import FORMS

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# The code of docs/conformance.md runs in tests/test_conformance_cli.py, that of semantics.md is made.
EXECUTED = [
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs" / name for name in ("architecture.md", "engine.md", "choosing-a-layer.md", "single-neuron.md")),
    *(ROOT / "docs" / name for name in ("online-learning.md", "porting.md", "pipelines.md", "fusing.md", "brainpy.md")),
    *(ROOT / "docs" / name for name in ("snntorch.md", "sinabs.md", "spikingjelly-norse.md", "file-format.md")),
]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read(page), re.DOTALL)


def test_the_example_runs_and_reports_what_the_readme_shows(tmp_path: Path) -> None:
    code, *_ = blocks(README)
    assert len([line for line in code.splitlines() if line]) <= 15
    hazard = 'import sys; sys.modules["samna"] = None\n'
    prepared = hazard + code
    alone = 'sys.modules.update({name: None for name in ("snntorch", "sinabs")})\n'
    load = f"{hazard}{alone}{blocks(README)[1]}\nassert len(net) == 4"
    for text in (prepared, load):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", text],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # small tensors: threads would only wait for each other
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        if text is prepared:
            printed = done.stdout
    shown = blocks(README, "text")[0].splitlines()
    cut = [[cell for cell in re.split(r"\s{2,}", line.strip()) if cell != "..."] for line in shown]
    rows = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    for line in cut:
        assert any(row[: len(line)] == line for row in rows), f"{line}\n{printed}"


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("brainpy", "spikingjelly", "norse"):
        if re.search(f"^(import|from) {name}", read(page), re.MULTILINE):
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    assert blocks(page)
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target
    for name in re.findall(r"`([\w./-]+/[\w.-]*)`", read(page)):
        written = name.startswith(("build/", ".venv"))
        assert written or (ROOT / name).exists() or "<" in name, name
    for name in re.findall(r"`([\w-]+\.(?:py|toml|md|txt))`", read(page)):
        rooms = ("tracetorch", "adapters", "cli", "docs", "tests")
        assert (ROOT / name).exists() or any(file for room in rooms for file in (ROOT / room).rglob(name)), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_exist(page: Path) -> None:
    for name in re.findall(r"`(?:tt|tracetorch)((?:\.\w+)+)", read(page)):
        if f"tracetorch{name}" in FORMS:  # a form's name is no path
            continue
        thing: Any = tt
        path = "tracetorch"
        for part in name[1:].split("."):
            path += f".{part}"
            if not hasattr(thing, part):
                assert importlib.util.find_spec(path) is not None, name
                importlib.import_module(path)
            thing = getattr(thing, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE)
    for text in [*re.findall("`([^`\n]+)`", read(page)), *blocks(page, "sh")]:
        for called in re.findall(r"\bmake ([a-z-]+)", text):
            assert called in targets, called
        for called in re.findall(r"(?:^|\s)tracetorch ([a-z]+)", text):
            assert called in COMMANDS, called


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nobody_is_told_to_install_what_is_not_ours(page: Path) -> None:
    text = re.sub(r"\s+", " ", read(page))
    assert not re.search(r"install[^.`]*\btracetorch(?!-interop|\.|/)\b", text.replace("`tracetorch`", ""))
    assert "pip install tracetorch" not in text
    assert "pip install `tracetorch" not in text
    if page == README:
        assert "The `tracetorch` on the package index is another project" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_speaks_of_the_project_alone(page: Path) -> None:
    assert not re.search(r"/(?:home|root|work|tmp|Users)/|(?i:\bissue) #?\d|(?<!\w)#\d", read(page))


def test_the_picture_is_there_and_small() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", read(README))
    assert pictures
    for picture in pictures:
        data = (ROOT / picture).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert 10_000 < len(data) < 300_000


def test_the_page_of_semantics_is_fresh() -> None:
    location = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    assert read(ROOT / "docs" / "semantics.md") == module.page(), "run: python docs/make_tables.py"


def test_the_house_is_described_as_it_stands() -> None:
    """Every installed package has its row in docs/architecture.md."""
    text = read(ROOT / "pyproject.toml")
    packages = re.findall(r'"(tracetorch[\w.]*)"', text.split("packages = [")[1].split("]")[0])
    assert packages
    rows = [line for line in read(ROOT / "docs" / "architecture.md").splitlines() if line.startswith("| ")]
    for package in packages:
        assert any(f"`{package}`" in row for row in rows), package


@pytest.mark.parametrize(
    ("folder", "page"),
    [("tracetorch/fused", "engine.md"), ("adapters/fusing", "architecture.md")],
    ids=["fused", "fusing"],
)
def test_every_file_of_a_room_is_named(folder: str, page: str) -> None:
    """And no other: what a page says of a file's content is said of a file that is there."""
    files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    rows = [line for line in read(ROOT / "docs" / page).splitlines() if line.startswith("| ")]
    rows = [row for row in rows if page == "engine.md" or f"`{folder}/`" in row]
    named = {name for row in rows for name in re.findall(r"`(\w+\.py)`", row)}
    assert files
    assert named == files
