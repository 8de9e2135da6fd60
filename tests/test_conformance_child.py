"""Subjects in child processes: the same verdicts as in process, and every way to fail reported as what it is."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.planted import Planted
from tracetorch import conformance
from tracetorch.conformance import ChildSubject, SubjectError, catalogue
from tracetorch.conformance.runner import examine

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
PREAMBLE = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
def say(document, more=b""):
    sys.stdout.buffer.write(json.dumps(document).encode() + b"\\n" + more); sys.stdout.buffer.flush()
def described():
    sys.stdin.buffer.readline(); say({{"ok": {{"name": "it", "framework": "none", "version": "1"}}}})
"""
SERVED = """
from tests.planted import Planted
from tracetorch.conformance import serve
class It(Planted):
    def run(self, x, calls, grad_output):
        {fault}
        return super().run(x, calls, grad_output)
serve(It({planted!r}))
"""
FEW = ["comparison", "gradient.mem_decay", "synapse", "reset_timing.next_step_after_decay", "state.chunks"]


def child(tmp_path, code, timeout=60.0, start=60.0):
    script = tmp_path / "subject.py"
    script.write_text(PREAMBLE + code, encoding="utf-8")
    return ChildSubject([sys.executable, str(script)], timeout, start)


def words(results):
    rows = [(r.case, r.verdict, {n: (a.verdict, a.text) for n, a in r.aspects.items()}) for r in results.rows]
    return rows, [r.text for r in results.rows]


@pytest.mark.parametrize("planted", ["", "decay not learned"])
def test_in_process_and_as_a_child_the_verdicts_are_identical(tmp_path, planted):
    with child(tmp_path, SERVED.format(fault="pass", planted=planted)) as subject:
        there = conformance.run([subject], FEW)
    here = conformance.run([Planted(planted)], FEW)
    assert words(there) == words(here)
    assert there.ok == here.ok == (planted == "")


def test_a_dtype_that_a_child_refuses_in_its_run_is_unsupported(tmp_path):
    refuses = "from tracetorch.conformance import Unsupported; raise Unsupported('dtype', str(x.dtype), 'none')"
    with child(tmp_path, SERVED.format(fault=refuses, planted="")) as subject:
        [row] = conformance.run([subject], ["double"]).rows
    assert (row.verdict, row.text) == ("unsupported", "dtype='float64': none")


def test_a_subject_of_the_package_as_a_child():
    command = [sys.executable, "-W", "error", "-m", "tracetorch.conformance", "tracetorch"]
    with ChildSubject(command) as subject:
        there = conformance.run([subject], ["comparison", "refractory.hold", "decay.none", "gradient-mem-decay"])
    here = conformance.run(["tracetorch"], ["comparison", "refractory.hold", "decay.none", "gradient-mem-decay"])
    assert words(there) == words(here)
    assert {r.verdict for r in there.rows} == {"exact", "rounding", "unsupported"}


def test_the_triton_kernel_in_its_interpreter():
    """Where the interpreter runs, so does the subject; what a GPU computes is seen only on one."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tracetorch.conformance", "tracetorch-triton"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    with ChildSubject(command, environment=environment) as subject:
        results = conformance.run([subject], ["comparison", "reset", "state.chunks", "number.denormal"])
    assert results.ok, results.faults
    assert sum(r.verdict in ("exact", "rounding") for r in results.rows) >= 8


# A subject of NumPy and the standard library alone, as someone without this package would write it: a = 1/2, theta = 1.
ALONE = """
import io
import numpy as np
def run(x, strict):
    v, outputs = np.zeros_like(x[0]), []
    for x_t in x:
        v = np.float32(0.5) * v + x_t
        s = (v > 1 if strict else v >= 1).astype(np.float32)
        v = v * (s == 0)
        outputs.append(s)
    return {{"outputs": np.stack(outputs)}}
while line := sys.stdin.buffer.readline():
    request = json.loads(line)
    if request["call"] == "describe":
        say({{"ok": {{"name": "alone", "framework": "numpy", "version": np.__version__}}}})
    elif request["call"] == "build":
        strict = request["spec"]["comparison"] == ">"
        say({{"ok": {{}}}})
    else:
        x = np.load(io.BytesIO(sys.stdin.buffer.read(request["npz_bytes"])))["x"]
        arrays = run(x, strict)
        if strict:
            {fault}
        content = io.BytesIO()
        np.savez(content, **arrays)
        say({{"ok": {{}}, "npz_bytes": len(content.getvalue())}}, content.getvalue())
"""
FAILURES = {
    # how it fails where the comparison is strict -> (what it does, what is said of it)
    "not at all": ("pass", ""),
    "says so": ("say({'error': 'no such thing'}); continue", "no such thing"),
    "raises": ("raise ValueError('no such thing')", "ValueError: no such thing"),
    "crashes": ("os._exit(3)", "crashes: ends before it has answered run, exit status 3"),
    "hangs": ("time.sleep(60)", "hangs: no answer to run within 1 s"),
    "a wrong shape": ("arrays['outputs'] = arrays['outputs'][:1]", "outputs has shape [1, 4, 17]"),
    "no outputs": ("arrays = {'final.v_mem': x[0]}", "must be a mapping with 'outputs'"),
    "integers": ("arrays['outputs'] = arrays['outputs'].astype('int64')", "dtype <i8"),
    "objects": ("arrays['outputs'] = np.array([None])", "dtype |O"),
    "prints to its output": ("print('hello', flush=True)", "not JSON"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_every_way_to_fail_is_said_and_the_run_goes_on(tmp_path, kind):
    """It fails where the comparison is strict, and nowhere else."""
    fault, said = FAILURES[kind]
    with child(tmp_path, ALONE.format(fault=fault), timeout=1.0) as subject:
        results = conformance.run([subject], ["comparison"])
    verdicts = {r.case: (r.verdict, r.text) for r in results.rows}
    assert verdicts["comparison-inclusive"][0] == "exact"
    assert verdicts["comparison-strict"][0] == ("error" if said else "exact")
    assert said in verdicts["comparison-strict"][1]
    assert results.ok == (said == "")


def test_what_a_served_subject_prints_is_no_answer(tmp_path):
    code = SERVED.format(fault="print('hello'); os.write(1, b'hello')", planted="")
    with child(tmp_path, code) as subject:
        assert conformance.run([subject], ["comparison"]).ok


def test_what_a_served_subject_raises_is_its_answer(tmp_path):
    code = SERVED.format(fault="raise ValueError('no such thing')", planted="")
    with child(tmp_path, code) as subject:
        rows = conformance.run([subject], ["comparison"]).rows
    assert [r.text for r in rows] == ["ValueError: no such thing"] * 2


BUILD = "described(); sys.stdin.buffer.readline()\n"
RUN = BUILD + (
    "say({'ok': {}}); head = json.loads(sys.stdin.buffer.readline()); sys.stdin.buffer.read(head['npz_bytes'])\n"
)
RUBBISH = {
    "not JSON": BUILD + "sys.stdout.write('rubbish\\n'); sys.stdout.flush(); time.sleep(9)",
    "more than 1048576 bytes without": BUILD + "sys.stdout.write('x' * 3000000); sys.stdout.flush(); time.sleep(9)",
    "not a JSON object": BUILD + "say([1]); time.sleep(9)",
    "neither ok, unsupported nor error": BUILD + "say({'what': 1}); time.sleep(9)",
    "npz_bytes=-1": BUILD + "say({'ok': {}, 'npz_bytes': -1}); time.sleep(9)",
    "npz_bytes=1000000000000": BUILD + "say({'ok': {}, 'npz_bytes': 10**12}); time.sleep(9)",
    "crashes: ends before it has answered build": BUILD + "print('oh', file=sys.stderr)",
    "it last said: oh": BUILD + "print('oh', file=sys.stderr)",
    "not an npz file": RUN + "say({'ok': {}}); time.sleep(9)",
    "not an npz file: BadZipFile": RUN + "say({'ok': {}, 'npz_bytes': 7}, b'rubbish'); time.sleep(9)",
    "hangs: no answer to run": RUN + "say({'ok': {}, 'npz_bytes': 70}, b'rubbish'); time.sleep(9)",
    "hangs: no answer to build": BUILD + "time.sleep(9)",
}


@pytest.mark.parametrize("said", RUBBISH)
def test_rubbish_is_called_rubbish(tmp_path, said):
    with child(tmp_path, RUBBISH[said], timeout=1.0) as subject:
        subject.describe()
        result = examine("it", subject, catalogue()["comparison-strict"])
    assert result.verdict == "error"
    assert said in result.text


def test_a_subject_that_never_answers_is_given_up(tmp_path):
    code = """
if json.loads(sys.stdin.buffer.readline())["call"] == "describe":
    say({"ok": {"name": "it", "framework": "none", "version": "1"}})
time.sleep(60)"""
    start = time.monotonic()
    with child(tmp_path, code, timeout=0.7, start=0.7) as subject:
        results = conformance.run([subject], ["comparison", "synapse", "reset"])
    assert time.monotonic() - start < 30
    assert [r.text.partition(":")[0] for r in results.rows[:4]] == ["hangs", "hangs", "hangs", "not run"]
    assert len(results.rows) > 5
    assert all(r.verdict == "error" for r in results.rows)


def test_what_does_not_start_or_describe_itself_does_not_stop_the_run():
    with ChildSubject(["/no/such/program"]) as missing, ChildSubject([sys.executable, "-c", "pass"]) as silent:
        results = conformance.run([missing, silent, Planted()], ["comparison"])
    texts = [r.text for r in results.rows]
    assert "does not start" in texts[0]
    assert "crashes" in texts[2]
    assert [r.verdict for r in results.rows if r.subject == "planted"] == ["exact", "exact"]
    assert not results.ok


def test_a_command_is_a_list_and_no_shell_reads_it(tmp_path):
    with pytest.raises(ValueError, match="list"):
        ChildSubject("python mine.py")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="list"):
        ChildSubject([])
    mark = tmp_path / "mark"
    with ChildSubject(["echo", f"; touch {mark}"]) as subject, pytest.raises(SubjectError):
        subject.describe()
    assert not mark.exists()
