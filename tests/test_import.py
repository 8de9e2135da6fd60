"""What importing costs, what it loads, and which way imports point."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {"tracetorch": "tracetorch", "adapters": "tracetorch.adapters", "cli": "tracetorch.cli"}
MAPPED["conformance"] = "tracetorch.conformance"

# framework -> what its adapter file may import
PEERS = {
    "snntorch": {"snntorch"},
    "sinabs": {"sinabs"},
    "norse": {"norse"},
    "spikingjelly": {"spikingjelly"},
    "brainpy": {"brainpy", "brainpy_state", "brainstate", "braintools", "brainunit", "jax", "saiunit"},
    "jax": {"brainstate", "jax", "saiunit"},
    "nir": {"nir", "nirtorch"},
}
ALL_PEERS = set().union(*PEERS.values())
# samna is in no adapter's set: its import runs pip (see conftest.py).
NEVER_LOADED = ALL_PEERS | {"samna", "sklearn", "matplotlib", "rich"}
# The demo is a user's script that ships with the package: it trains a snnTorch network on scikit-learn's digits.
CLI_THIRD_PARTY = {
    "cli/demo.py": {"snntorch", "sinabs", "sklearn", "matplotlib", "rich"},
    "cli/convert.py": {"safetensors"},
}
# A picture is drawn with matplotlib, where the user asks for one.
PLOT = {"tracetorch/plot.py": {"matplotlib"}}
# Triton is the compiler of a backend, not a framework: these import it when that backend is asked for.
TRITON = {
    f"tracetorch/fused/{name}.py": {"triton"} for name in ("executor", "launch_triton", "interpreter_triton", "cubins")
}


def python(code: str, *options: str, cwd: Path = ROOT) -> str:
    """Runs code in a fresh interpreter with warnings as errors; its output."""
    command = [sys.executable, "-W", "error", *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---------------------------------------------------------------- what an import loads


def test_import_loads_no_framework(tmp_path: Path) -> None:
    code = "import json, sys, tracetorch; print(json.dumps([tracetorch.__file__, sorted(sys.modules)]))"
    file, loaded = json.loads(python(code, cwd=tmp_path))
    assert Path(file).parent == ROOT / "tracetorch"
    assert "torch" in loaded
    assert not {name.partition(".")[0] for name in loaded} & NEVER_LOADED


def test_import_works_without_any_framework(tmp_path: Path) -> None:
    block = f"import sys\nfor name in {sorted(NEVER_LOADED)!r}: sys.modules[name] = None\n"
    use = "import tracetorch as tt, torch; print(tuple(tt.snn.LIB(3)(torch.zeros(2, 3)).shape))"
    assert python(block + use, cwd=tmp_path).strip() == "(2, 3)"


def test_import_loads_nothing_beside_torch_and_the_house(tmp_path: Path) -> None:
    """What is slow to import: torch's compiler, sympy, Triton, plotting. `make bench` measures the time."""
    code = "import json, sys, torch, numpy; before = set(sys.modules); import tracetorch; "
    code += "print(json.dumps(sorted(set(sys.modules) - before)))"
    loaded = {name for name in json.loads(python(code, cwd=tmp_path)) if name.partition(".")[0] != "tracetorch"}
    assert {name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names} == set()


def modules_of_the_house() -> list[str]:
    """Dotted names of all modules in the mapped folders, as they are installed."""
    names = []
    for folder, package in MAPPED.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return names


LOAD_ALL = """
import importlib, json, sys, warnings
sys.modules["samna"] = None
warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")  # norse 1.1.0, as in pyproject.toml
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # a framework that is not installed
        if error.name is None or error.name.startswith("tracetorch"):
            raise
by_file = {{}}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and name != "__main__":
        by_file.setdefault(file, set()).add(name)
print(json.dumps({{file: sorted(names) for file, names in by_file.items()}}))
"""


def house_modules(by_file: dict[str, list[str]]) -> dict[str, list[str]]:
    """Of a file -> module names map, what lies in the mapped folders."""
    folders = [ROOT / folder for folder in MAPPED]
    return {file: names for file, names in by_file.items() if any(Path(file).is_relative_to(f) for f in folders)}


def misnamed(by_file: dict[str, list[str]]) -> dict[str, list[str]]:
    """Files that were loaded twice or under a name that is not the installed one."""
    found = house_modules(by_file)
    return {
        file: names for file, names in found.items() if len(names) > 1 or names[0].partition(".")[0] != "tracetorch"
    }


def test_every_module_is_loaded_once_from_the_root() -> None:
    names = modules_of_the_house()
    by_file = house_modules(json.loads(python(LOAD_ALL.format(names=names))))
    assert {"tracetorch", "tracetorch.core.spec", "tracetorch.cli.doctor"} <= set(names)
    assert not misnamed(by_file)
    assert {"tracetorch.cli", "tracetorch.cli.doctor"} <= {name for loaded in by_file.values() for name in loaded}


def test_pytest_itself_loaded_no_module_twice() -> None:
    by_file: dict[str, list[str]] = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None:
            by_file.setdefault(file, []).append(name)
    assert not misnamed(by_file)


def test_a_module_loaded_twice_is_noticed() -> None:
    doctor = str(ROOT / "cli" / "doctor.py")
    assert not misnamed({doctor: ["tracetorch.cli.doctor"], "/elsewhere/cli.py": ["cli", "other"]})
    assert misnamed({doctor: ["cli.doctor"]})
    assert misnamed({doctor: ["tracetorch.cli.doctor", "tracetorch.doctor"]})


# ---------------------------------------------------------------- which way imports point


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every module imported anywhere in a file, with whether that is only done lazily.

    Lazy is: inside a function, or under `if TYPE_CHECKING`. Relative imports appear as names with leading dots;
    `importlib.import_module("literal")` counts as an import.
    """

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:  # `from tracetorch import adapters` imports tracetorch.adapters
                yield f"{base}.{alias.name}", lazy
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), lazy
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body
            yield from walk(child, lazy or inside or guarded)

    return walk(tree, False)


def wrong_arrows(path: str, source: str) -> list[str]:
    """What a file, given by its path from the root, imports against the design."""
    folder = path.partition("/")[0]
    later = {
        "tracetorch": {"adapters", "conformance", "cli"},
        "adapters": {"conformance", "cli"},
        "conformance": {"cli"},
        "cli": set(),
    }[folder]
    allowed = {"torch", "numpy"}
    lazily = {**TRITON, **PLOT}.get(path, set())
    if path.startswith("tracetorch/oracle/"):
        allowed = {"numpy"}
    elif folder == "adapters":
        allowed = allowed | PEERS.get(Path(path).parts[1], set())  # adapters/<framework>/...
    elif folder == "cli":
        lazily = CLI_THIRD_PARTY.get(path, set())
    elif path in ("conformance/pytest_options.py", "conformance/test_suite.py"):
        allowed = allowed | {"pytest"}  # pytest --pyargs tracetorch.conformance
    faults = []
    for name, lazy in imports(ast.parse(source)):
        parts = name.split(".")
        if name.startswith(".") or parts[0] in set(MAPPED) - {"tracetorch"}:
            faults.append(f"{path}: {name} is not an absolute import of the installed name")
        elif parts[0] == "tracetorch":
            if len(parts) > 1 and parts[1] in later and not (path == "tracetorch/__init__.py" and lazy):
                faults.append(f"{path}: imports {name}, which is later in the chain")
        elif parts[0] not in sys.stdlib_module_names | allowed and not (lazy and parts[0] in lazily):
            faults.append(f"{path}: imports {name}, which it must not")
    return faults


def test_arrows_point_one_way() -> None:
    files = [path for folder in MAPPED for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 10
    faults = [
        fault
        for path in files
        for fault in wrong_arrows(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tracetorch/core/x.py", "from tracetorch import adapters"),
        ("tracetorch/core/x.py", "from tracetorch.adapters import convert"),
        ("tracetorch/core/x.py", "def f():\n    import tracetorch.cli"),
        ("tracetorch/__init__.py", "from tracetorch.adapters import convert"),
        ("tracetorch/core/x.py", "import scipy"),
        ("tracetorch/core/x.py", "if True:\n    def f():\n        import snntorch"),
        ("tracetorch/core/x.py", "import importlib\nimportlib.import_module('sinabs.layers')"),
        ("tracetorch/core/x.py", "from . import spec"),
        ("tracetorch/core/x.py", "from ..functional import spikes"),
        ("tracetorch/oracle/x.py", "import torch"),
        ("tracetorch/plot.py", "from matplotlib import pyplot"),
        ("tracetorch/snn/plot.py", "def f():\n    import matplotlib"),
        ("tracetorch/fused/launch_triton.py", "import triton"),
        ("tracetorch/fused/layers.py", "def f():\n    import triton"),
        ("adapters/sinabs/__init__.py", "import snntorch"),
        ("adapters/networks/network.py", "def f():\n    import sinabs.layers as sl"),
        ("adapters/sinabs/fuse.py", "import norse"),
        ("adapters/fusing/plain.py", "import norse"),
        ("adapters/sinabs/__init__.py", "import samna"),
        ("adapters/sinabs/__init__.py", "from tracetorch.conformance import run"),
        ("cli/doctor.py", "import rich"),
        ("cli/doctor.py", "from adapters import sinabs"),
        ("cli/demo.py", "import snntorch"),
        ("conformance/run.py", "from tracetorch import cli"),
    ],
)
def test_a_wrong_arrow_is_noticed(path: str, source: str) -> None:
    assert len(wrong_arrows(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tracetorch/__init__.py", "def __getattr__(name):\n    from tracetorch.adapters import convert"),
        ("tracetorch/__init__.py", "if TYPE_CHECKING:\n    from tracetorch.adapters import convert"),
        ("tracetorch/core/x.py", "import math\nimport numpy as np\nfrom torch import nn\nimport tracetorch.functional"),
        ("adapters/sinabs/__init__.py", "import sinabs.layers\nfrom tracetorch.core import NeuronSpec"),
        ("adapters/brainpy/__init__.py", "import jax.numpy as jnp"),
        ("cli/demo.py", "def run(args):\n    import snntorch\n    from tracetorch import adapters"),
        ("tracetorch/plot.py", "def f():\n    from matplotlib import pyplot"),
        ("tracetorch/fused/launch_triton.py", "def f():\n    import triton"),
    ],
)
def test_a_right_arrow_passes(path: str, source: str) -> None:
    assert wrong_arrows(path, source) == []
