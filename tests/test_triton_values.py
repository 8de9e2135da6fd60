"""Triton's kernels give the values of eager torch and of the C kernel: in its interpreter, a process of its own."""

from __future__ import annotations

import json
import re

import pytest

from tests.triton_without_gpu import python

pytestmark = pytest.mark.usefixtures("fresh_kernels")


def test_kernels_in_the_interpreter():
    done = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_interpreted.py"), TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d{3,} passed", done.stdout, re.MULTILINE), done.stdout[-500:]


@pytest.mark.sweep
def test_what_waits_for_a_gpu_runs_in_the_interpreter(tmp_path):
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu.py", TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    out = tmp_path / "bench.json"
    done = python("-m", "benchmarks.gpu", "--out", str(out), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found) == ["sizes", "builds", "graphs", "calls", "memory", "peers"]
    assert not [part for part, result in found.items() if "error" in result], done.stdout
    assert not [row for row in found["sizes"]["found"].values() if "error" in row], done.stdout
