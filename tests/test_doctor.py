"""`tracetorch doctor`, and the command that it hangs on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tracetorch import cli
from tracetorch.cli import doctor

ROOT = Path(__file__).resolve().parents[1]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "a line is no exact pin"
    return dict(pin.split("==") for pin in pins)


def rows(report: doctor.Report, part: str) -> dict[str, doctor.Report]:
    return {row["name"]: row for row in report[part]}


# ---------------------------------------------------------------- versions


def test_tested_versions_are_those_of_the_constraints() -> None:
    pins = constraints()
    assert {name: version for name, (version, _) in doctor.TESTED.items()} == {
        name: pins.get(name) for name in doctor.TESTED
    }


def requirements(distribution: str, extra: str) -> list[Requirement]:
    """What an installed distribution requires here, without an extra ("") or with one."""
    every = [Requirement(line) for line in metadata.requires(distribution) or []]
    return [one for one in every if not one.marker or one.marker.evaluate({"extra": extra})]


def test_whatever_the_package_asks_for_is_in_the_table() -> None:
    extras = set(metadata.metadata("tracetorch-interop").get_all("Provides-Extra") or []) - {"all", "dev"}
    wanted = {requirement.name for extra in extras for requirement in requirements("tracetorch-interop", extra)}
    assert {"torch", "sinabs", "spikingjelly", "jax", "rich"} <= wanted <= set(doctor.TESTED)


def test_whatever_make_env_installs_is_pinned() -> None:
    pins = {canonicalize_name(name): version for name, version in constraints().items()}
    open_ends = [("tracetorch-interop", extra) for extra in ("sinabs", "snntorch", "demo", "dev")]
    found: dict[str, str] = {}
    done = set()
    while open_ends:
        name, extra = open_ends.pop()
        done.add((name, extra))
        for requirement in requirements(name, extra):
            if requirement.name.startswith(("nvidia", "cuda", "triton")):
                continue  # a torch built for a GPU pins these itself
            found[canonicalize_name(requirement.name)] = doctor.public(metadata.version(requirement.name))
            following = {(requirement.name, extra) for extra in requirement.extras or [""]} | {(requirement.name, "")}
            open_ends += following - done
    assert {"torch", "sinabs", "samna", "snntorch", "pytest", "jinja2", "scipy"} <= set(found)
    assert {name: (version, pins.get(name)) for name, version in found.items() if pins.get(name) != version} == {}


def test_packages_report_what_the_metadata_says(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "sinabs": "3.0.0"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    found = {row["name"]: row for row in doctor.packages()}
    assert set(found) == set(doctor.TESTED)
    assert found["torch"] == {
        "name": "torch",
        "purpose": "core",
        "installed": "2.13.0+cpu",
        "tested": "2.13.0",
        "status": "tested",
    }
    assert found["sinabs"]["status"] == "untested version"
    assert found["norse"]["status"] == "not installed"


@pytest.mark.parametrize(
    ("version", "expected"),
    [("1.0.4", (1, 0, 4)), ("2.13.0+cpu", (2, 13, 0)), ("1.0.4rc1", (1, 0, 4)), ("2.7.0a0+git", (2, 7, 0)), ("x", ())],
)
def test_release(version: str, expected: tuple[int, ...]) -> None:
    assert doctor.release(version) == expected


# ---------------------------------------------------------------- executors


def fake_compiler(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_an_executor_is_claimed_only_if_it_ran() -> None:
    executors = {row["name"]: row for row in doctor.executors()}
    works = {name: row["works"] for name, row in executors.items()}
    assert works == {"eager": True, "cpu": doctor.c_compiler() is not None, "triton": torch.cuda.is_available()}
    assert executors["cpu"]["reason"] == doctor.CPU or doctor.c_compiler() is None
    assert executors["triton"]["reason"] == doctor.TRITON or "triton backend needs" in executors["triton"]["reason"]
    assert (executors["triton"]["gpu"] is not None) == torch.cuda.is_available()


def test_without_a_compiler_the_cpu_executor_is_not_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    row = doctor.executors()[1]
    assert not row["works"]
    assert "no C compiler found" in row["reason"]


def test_compilers_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert doctor.c_compiler() is None
    fake_compiler(tmp_path / "clang", "echo clang 21; echo more")
    assert doctor.c_compiler() == {"command": "clang", "version": "clang 21"}
    fake_compiler(tmp_path / "gcc", "exit 1")  # there, but broken
    assert doctor.c_compiler() == {"command": "clang", "version": "clang 21"}
    fake_compiler(tmp_path / "cc", "echo cc 1")
    assert doctor.c_compiler() == {"command": "cc", "version": "cc 1"}
    mine = fake_compiler(tmp_path / "mine", 'echo "mine with $1"')
    monkeypatch.setenv("CC", f"{mine} -pipe")
    assert doctor.c_compiler() == {"command": f"{mine} -pipe", "version": "mine with -pipe"}
    monkeypatch.setenv("CC", "no-such-compiler")
    assert doctor.c_compiler() == {"command": "cc", "version": "cc 1"}


# ---------------------------------------------------------------- hazards


STUB = """
import subprocess
import sys
PYPI_SAMNA = True
subprocess.check_call([sys.executable, "-m", "pip", "install", "--force-reinstall", "samna"])
"""


def test_the_samna_stub_is_recognised_by_its_text(tmp_path: Path) -> None:
    file = tmp_path / "__init__.py"
    file.write_text(STUB, encoding="utf-8")
    assert doctor.is_samna_stub(file)
    file.write_text(STUB.replace("PYPI_SAMNA = True", ""), encoding="utf-8")
    assert doctor.is_samna_stub(file)
    file.write_text("from samna._core import *\n", encoding="utf-8")
    assert not doctor.is_samna_stub(file)
    assert not doctor.is_samna_stub(tmp_path / "absent.py")
    assert not doctor.is_samna_stub(None)


@pytest.mark.parametrize("blocked", [False, True])
def test_the_installed_samna_is_found_without_importing_it(
    blocked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A samna that raises when imported, installed before all others; blocked as in conftest.py, and not."""
    package = tmp_path / "samna"
    package.mkdir()
    (package / "__init__.py").write_text(STUB + "raise SystemExit('samna was imported')\n", encoding="utf-8")
    info = tmp_path / "samna-0.48.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: samna\nVersion: 0.48.6\n", encoding="utf-8")
    (info / "RECORD").write_text("samna/__init__.py,,\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    if not blocked:
        monkeypatch.delitem(sys.modules, "samna")
    assert doctor.samna_source() == package / "__init__.py"
    assert rows({"hazards": doctor.hazards()}, "hazards")["samna stub"]["present"]
    assert sys.modules.get("samna") is None


@pytest.mark.parametrize(
    ("installed", "present"),
    [
        ({}, set()),
        ({"tracetorch-interop": "0.1.0"}, set()),
        ({"tracetorch": "0.5.0"}, {"another tracetorch"}),
        ({"sinabs": "3.1.3", "nir": "1.0.4"}, set()),
        ({"sinabs": "3.1.3", "nir": "1.0.8"}, {"nir versions"}),
        ({"spikingjelly": "2.0.0", "nir": "1.0.8"}, set()),
        ({"sinabs": "3.1.3", "spikingjelly": "2.0.0"}, {"nir versions"}),
        ({"snntorch": "1.0.0"}, {"snntorch.utils.reset"}),
    ],
)
def test_hazards_appear_where_they_are(
    installed: dict[str, str], present: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "installed_version", installed.get)
    monkeypatch.setattr(doctor, "samna_source", lambda: None)
    found = doctor.hazards()
    assert {row["name"] for row in found if row["present"]} == present
    assert len(found) == 4
    assert all(row["what"] and row["remedy"] for row in found)


def test_the_hazard_of_snntorch_reset_is_real() -> None:
    snntorch, utils = (pytest.importorskip(name) for name in ("snntorch", "snntorch.utils"))
    mine, other = (snntorch.Leaky(beta=0.9, init_hidden=True, threshold=100.0) for _ in range(2))
    mine(torch.ones(1, 1))
    other(torch.ones(1, 1))
    assert other.mem.item() == 1.0
    utils.reset(torch.nn.Sequential(mine))
    assert (mine.mem.item(), other.mem.item()) == (0.0, 0.0)
    mine(torch.ones(1, 1))
    other(torch.ones(1, 1))
    mine.reset_mem()  # the remedy that the doctor names
    assert mine.mem.sum().item() == 0.0
    assert other.mem.item() == 1.0


# ---------------------------------------------------------------- the report


def test_broken_core_is_reported_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.core_faults() == []
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["broken"] == ["torch 2.5.1 is older than 2.6: install torch>=2.6"]
    assert cli.main(["doctor"]) == 1
    assert "BROKEN: torch 2.5.1" in capsys.readouterr().out


def test_torch_without_numpy_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_numpy(array: object) -> object:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch, "from_numpy", from_numpy)
    [fault] = doctor.core_faults()
    assert "cannot exchange arrays with numpy" in fault


def test_text_has_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    report = doctor.diagnose()
    for row in report["packages"] + report["executors"] + [row for row in report["hazards"] if row["present"]]:
        assert re.search(rf"^  {re.escape(row['name'])}", text, re.MULTILINE), row["name"]
    assert report["executors"][1]["reason"] in text


def test_json_and_no_framework_is_imported(tmp_path: Path) -> None:
    """In a process of its own, as users call it; samna is not blocked there, so that importing it would show."""
    code = (
        "import json, sys\nfrom tracetorch.cli import main\nstatus = main(['doctor', '--json'])\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)\nsys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {
        "tracetorch",
        "python",
        "platform",
        "packages",
        "executors",
        "hazards",
        "broken",
        "ok",
    }
    modules = {"sklearn" if name == "scikit-learn" else name for name in doctor.TESTED} | {"safetensors"}
    # torch itself may load triton and numpy; what it loads was loaded before the doctor ran.
    loaded = set(json.loads(done.stderr.splitlines()[-1])) & modules
    assert loaded - {"torch", "numpy", "triton"} == set()


# ---------------------------------------------------------------- the command


def test_a_command_is_imported_only_when_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ModuleType("tracetorch.cli.demo")
    demo.add_arguments = lambda parser: parser.add_argument("--out")  # type: ignore[attr-defined]
    demo.run = lambda args: 7 if args.out == "somewhere" else 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tracetorch.cli.demo", demo)
    assert cli.main(["demo", "--out", "somewhere"]) == 7
    monkeypatch.setitem(sys.modules, "tracetorch.cli.demo", None)  # importing it raises
    assert cli.main(["doctor", "--json"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("argv", [[], ["unknown"], ["doctor", "--unknown"]])
def test_a_wrong_call_says_so(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: tracetorch" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tracetorch {metadata.version('tracetorch-interop')}\n"
