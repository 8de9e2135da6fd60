"""Compiled Triton kernels are kept, used again by the next process, and made again where they are not what was kept."""

from __future__ import annotations

from typing import Any

import pytest

import tracetorch as tt
from tests.triton_without_gpu import ROW, call, forbidden, make_small, triton
from tracetorch.fused import cubins, launch_triton

pytestmark = pytest.mark.usefixtures("fresh_kernels")


def launched(driver) -> Any:
    """A launch of a forward kernel as in a new process; the compiled kernel."""
    launch_triton._loaded.cache_clear()
    before = len(driver.launched)
    kernel = make_small()
    call(driver, kernel, "forward", (5, 1, ROW))
    assert len(driver.launched) == before + 1
    (found,) = launch_triton.load(kernel.source).compiled.values()
    return found


def test_a_compiled_kernel_is_kept_and_used_again(driver, monkeypatch, tmp_path):
    first = launched(driver)
    (entry,) = (tmp_path / "ours").glob("*.kernel")
    assert (entry.stat().st_mode & 0o777) == 0o600
    monkeypatch.setattr(cubins, "_packed", forbidden)  # what follows each compilation
    second = launched(driver)
    assert second is not first
    assert second.asm["cubin"] == first.asm["cubin"]
    assert second.packed_metadata == first.packed_metadata
    assert second.name == first.name


@pytest.mark.parametrize("damage", ["cut", "changed", "planted for another source"])
def test_a_compiled_kernel_that_is_not_what_was_kept_is_made_again(damage, driver, monkeypatch, tmp_path):
    good = launched(driver).asm["cubin"]
    (entry,) = (tmp_path / "ours").glob("*.kernel")
    content = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(content[:-100])
    elif damage == "changed":
        entry.write_bytes(content.replace(good[:64], bytes(64)))
    else:
        entry.write_bytes(b"PK not ours")
        entry.chmod(0o666)
    assert launched(driver).asm["cubin"] == good
    assert entry.read_bytes() != b"PK not ours"
    assert (entry.stat().st_mode & 0o777) == 0o600


def test_a_garbage_kernel_in_tritons_own_cache_is_not_loaded(driver, monkeypatch, tmp_path):
    good = launched(driver).asm["cubin"]
    for path in (tmp_path / "triton").rglob("*.cubin"):
        path.write_bytes(b"garbage")
    for path in (tmp_path / "ours").iterdir():
        path.unlink()
    assert launched(driver).asm["cubin"] == good


def test_another_version_of_triton_has_another_entry(driver, monkeypatch, tmp_path):
    launched(driver)
    monkeypatch.setattr(triton, "__version__", "3.6.0.other")
    launched(driver)
    monkeypatch.setattr(cubins, "_packed", forbidden)
    monkeypatch.setattr(triton, "__version__", "3.6.0.third")
    with pytest.raises(tt.fused.CompilerError, match="compiled again"):
        launched(driver)
    assert len(list((tmp_path / "ours").glob("*.kernel"))) == 2
