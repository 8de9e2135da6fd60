"""Shared by all tests."""

import sys
from pathlib import Path

import pytest
import torch

# Quirk: the package index's samna (0.48.6) runs `pip install --force-reinstall` when imported. Nothing that is tested
# here needs it, so an import fails instead. Goes when the index's samna is no longer such a stub.
sys.modules["samna"] = None  # type: ignore[assignment]

# Known failures are data: a test's full name, and the reason. An unexpected pass fails (`xfail_strict`), and so does a
# line that names no test: it goes when its test passes.
KNOWN = Path(__file__).with_name("known_failures.txt")


@pytest.fixture
def poisoned():
    """Memory that a kernel forgets to write holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def fresh_kernels(tmp_path, monkeypatch):
    """What was compiled for another test or another day is not used."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TRACETORCH_CACHE", str(tmp_path / "ours"))


@pytest.fixture
def driver(monkeypatch, fresh_kernels):
    """Triton's driver, which keeps what would have been launched on a GPU."""
    from tests.triton_without_gpu import Driver, triton
    from tracetorch.fused import launch_triton

    found = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    launch_triton._loaded.cache_clear()
    yield found
    launch_triton._loaded.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def own_snntorch_layers():
    """A file's snnTorch layers go with it.

    Quirk of snntorch 1.0.0: every layer ever made stays in a list of the class, over all of which `utils.reset` goes;
    it stumbles over a `DeltaLeaky`, whose membrane is None. Goes when snnTorch forgets its layers.
    """
    before = list(sys.modules["snntorch"].SpikingNeuron.instances) if "snntorch" in sys.modules else []
    yield
    if "snntorch" in sys.modules:
        sys.modules["snntorch"].SpikingNeuron.instances[:] = before


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors, many calls: torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def known_failures() -> dict[str, str]:
    """Reasons by "file.py::test_name[parameters]"."""
    lines = [line for line in KNOWN.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {name: reason for name, _, reason in (line.partition("  # ") for line in lines)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of `known_failures.txt` are expected to fail."""
    known = known_failures()
    by_name = {f"{item.path.name}::{item.name}": item for item in items}
    for name, reason in known.items():
        if name in by_name:
            by_name[name].add_marker(pytest.mark.xfail(reason=reason or "no reason given", strict=True))
    whole = not any("::" in argument for argument in config.args)
    collected = {item.path.name for item in items}
    stale = [name for name in known if name not in by_name and name.partition("::")[0] in collected]
    if whole and stale:
        raise pytest.UsageError(f"{KNOWN.name}: no such test: {', '.join(stale)}; take the line out")
    files = {path.name for path in KNOWN.parent.glob("test_*.py")}
    gone = [name for name in known if name.partition("::")[0] not in files]
    if gone:
        raise pytest.UsageError(f"{KNOWN.name}: no such file: {', '.join(gone)}; take the line out")
