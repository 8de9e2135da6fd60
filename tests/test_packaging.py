"""The wheel: built without a network, installed into an environment of its own, used from outside the root."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {"tracetorch": "tracetorch", "adapters": "tracetorch/adapters", "cli": "tracetorch/cli"}
MAPPED["conformance"] = "tracetorch/conformance"
SHIPPED = ["pyproject.toml", "LICENSE", *MAPPED]


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no module deleted since an earlier build is packed (setuptools keeps build/lib)."""
    copy = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(ROOT / name, copy / name)
    if (ROOT / "README.md").exists():
        shutil.copy(ROOT / "README.md", copy)
    out = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy, cwd=copy, PIP_NO_INDEX="1")
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone that sees this one's packages, but not its editable install.

    A folder named in a .pth file is searched; .pth files inside it, such as the editable install's, are not read.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    call(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=home)
    [site] = (home / "lib").glob("python*/site-packages")
    (site / "peers.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return home


def test_the_wheel_has_every_file_of_the_mapped_folders(wheel: Path) -> None:
    wanted = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in MAPPED.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted |= {f"tracetorch/conformance/golden/{path.name}" for path in (ROOT / "conformance" / "golden").iterdir()}
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == wanted | {"tracetorch/py.typed"}  # nothing forgotten, no tests and no stray files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    assert wheel.name == "tracetorch_interop-0.1.0.dev0-py3-none-any.whl"
    [info] = metadata.distributions(path=[str(wheel)])
    assert info.metadata["Name"] == "tracetorch-interop"
    assert info.metadata["License-Expression"] == "MIT"
    assert info.metadata["Requires-Python"] == ">=3.10"
    requirements = info.requires or []
    assert {line for line in requirements if "extra" not in line} == {"torch>=2.6", "numpy"}
    extras = {
        "sinabs",
        "snntorch",
        "spikingjelly",
        "norse",
        "brainpy",
        "nir",
        "triton",
        "demo",
        "report",
        "convert",
        "all",
        "dev",
    }
    assert set(info.metadata.get_all("Provides-Extra") or []) == extras
    for framework in ("spikingjelly", "brainpy"):
        lines = [line for line in requirements if f'extra == "{framework}"' in line]
        assert lines
        assert all('python_version >= "3.11"' in line for line in lines)
    [script] = info.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("tracetorch", "tracetorch.cli:main")


USE = """
import importlib, json, pkgutil, sys, warnings
sys.modules["samna"] = None
warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")  # norse 1.1.0, as in pyproject.toml
import tracetorch
for module in pkgutil.walk_packages(tracetorch.__path__, "tracetorch."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # a framework that is not installed
        if error.name is None or error.name.startswith("tracetorch"):
            raise
by_file = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and "tracetorch" in file and name != "__main__":
        by_file.setdefault(file, []).append(name)
print(json.dumps(by_file))
"""


def test_the_installed_wheel_is_used_and_no_module_is_loaded_twice(environment: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    by_file: dict[str, list[str]] = json.loads(call(python, "-W", "error", "-c", USE, cwd=tmp_path))
    assert {file: names for file, names in by_file.items() if len(names) != 1} == {}
    outside = [file for file in by_file if not Path(file).is_relative_to(environment)]
    assert outside == []
    loaded = {name for names in by_file.values() for name in names}
    packages = {
        "/".join([package, *path.parent.relative_to(ROOT / folder).parts]).replace("/", ".")
        for folder, package in MAPPED.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert {"tracetorch.core", "tracetorch.snn", "tracetorch.oracle", "tracetorch.cli"} <= packages
    assert packages <= loaded


def test_the_installed_wheel_computes_and_its_command_runs(environment: Path, tmp_path: Path) -> None:
    code = "import torch, tracetorch as tt; print(tuple(tt.snn.LIB(3)(torch.zeros(2, 3)).shape))"
    assert call(environment / "bin" / "python", "-W", "error", "-c", code, cwd=tmp_path).strip() == "(2, 3)"
    report = json.loads(call(environment / "bin" / "tracetorch", "doctor", "--json", cwd=tmp_path))
    assert report["ok"] is True


TWICE = """
import sys
def pytest_sessionfinish(session):
    by_file = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and "/tracetorch/" in file:
            by_file.setdefault(file, []).append(name)
    twice = {file: names for file, names in by_file.items() if len(names) > 1 or not names[0].startswith("tracetorch")}
    print("LOADED", len(by_file), "TWICE", twice)
"""


def test_the_conformance_suite_runs_by_pytest_on_the_installed_package(environment: Path, tmp_path: Path) -> None:
    """And no module is loaded twice by it."""
    (tmp_path / "twice.py").write_text(TWICE, encoding="utf-8")
    cases = ("--case", "comparison", "--case", "number.infinite", "--case", "refractory.hold")
    out = call(
        *(environment / "bin" / "python", "-W", "error", "-m", "pytest", "-s", "-p", "twice", "-p", "no:cacheprovider"),
        *(
            "-p",
            "tracetorch.conformance.pytest_options",
            "--pyargs",
            "tracetorch.conformance",
            "--subject",
            "tracetorch",
            *cases,
            "--junitxml",
            "junit.xml",
        ),
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path),
    )
    assert "2 passed, 2 skipped, 1 xfailed" in out, out
    assert re.search(r"LOADED [1-9]\d+ TWICE {}", out), out
    assert 'tests="5"' in (tmp_path / "junit.xml").read_text(encoding="utf-8")


def test_an_editable_install_gives_the_same_packages(tmp_path: Path) -> None:
    """This environment's own install, from outside the root."""
    code = "import tracetorch, tracetorch.cli; print(tracetorch.__file__); print(tracetorch.cli.__file__)"
    files = call(sys.executable, "-c", code, cwd=tmp_path).split("\n")
    assert files[:2] == [str(ROOT / "tracetorch" / "__init__.py"), str(ROOT / "cli" / "__init__.py")]
