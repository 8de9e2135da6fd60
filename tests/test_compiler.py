"""Compiling and the cache of kernels, and what can go wrong there: the right answer or a clear error, always."""

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

import tracetorch as tt
from tracetorch.fused import cache as cache_module
from tracetorch.fused import compiler

SOURCE = "#include <stdint.h>\nvoid forward(void **p, const int64_t *n) { *(int64_t *)p[0] = n[0] + 1; }\n"
LAYER = (
    "import sys, torch, tracetorch as tt; torch.manual_seed(0)\n"
    "layer = tt.snn.LI(4)\n"
    "with tt.backend('cpu'): print(float(layer.unroll(torch.ones(3, 2, 4)).sum().detach()))"
)


def run(library):
    out = ctypes.c_int64(0)
    library.forward((ctypes.c_void_p * 1)(ctypes.addressof(out)), (ctypes.c_int64 * 1)(41))
    return out.value


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRACETORCH_CACHE", str(folder))
    return folder


def test_the_cache_is_used(cache, monkeypatch):
    assert run(compiler.load(SOURCE)) == 42

    def forbidden(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiler, "_compile", forbidden)
    assert run(compiler.load(SOURCE)) == 42
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".sha256", ".so"]


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "no digest", "no text", "planted", "writable", "group", "link"]
)
def test_a_damaged_or_planted_entry_is_built_again(cache, damage, tmp_path):
    compiler.load(SOURCE)
    (library,) = cache.glob("*.so")
    (digest,) = cache.glob("*.sha256")
    code = library.read_bytes()
    # Replaced, not overwritten: this process has the old file mapped.
    library.unlink()
    if damage == "link":
        elsewhere = tmp_path / "elsewhere.so"
        elsewhere.write_bytes(code)
        library.symlink_to(elsewhere)
    else:
        spoilt = {
            "truncated": code[:-100],
            "flipped": code[:200] + bytes([code[200] ^ 1]) + code[201:],
            "planted": b"x",
        }
        library.write_bytes(spoilt.get(damage, code))
        library.chmod({"writable": 0o602, "group": 0o620}.get(damage, 0o600))
    if damage == "no digest":
        digest.unlink()
    if damage == "no text":
        digest.write_bytes(b"\xff" * 64)
    if damage == "planted":
        digest.write_text("0" * 64)
    before = library.lstat().st_ino
    assert run(compiler.load(SOURCE)) == 42
    assert library.lstat().st_ino != before
    assert library.read_bytes() == code or hashlib.sha256(library.read_bytes()).hexdigest() == digest.read_text()


def test_a_cache_that_cannot_be_written_falls_back(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("TRACETORCH_CACHE", str(blocked / "cache"))
    cache_module.private_folder.cache_clear()
    assert run(compiler.load(SOURCE)) == 42


def child(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finished(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def fake_compiler(tmp_path, script):
    """A command that does as a shell script says, with the real compiler as $REAL."""
    real = " ".join(compiler.compiler()[0])
    command = tmp_path / "fake-cc"
    command.write_text(f'#!/bin/sh\nREAL="{real}"\nif [ "$1" = --version ]; then echo fake 1; exit 0; fi\n{script}\n')
    command.chmod(0o755)
    return str(command)


def test_sixteen_processes_build_the_same_kernel_at_once_and_once(cache, tmp_path):
    log = tmp_path / "log"
    counting = fake_compiler(tmp_path, f'echo built >> {log}\nsleep 0.5\nexec $REAL "$@"')
    code = f"""
import ctypes, os, sys
from tracetorch.fused import cache as cache_module
from tracetorch.fused import compiler
children = []
for _ in range(15):
    children.append(os.fork())
    if children[-1] == 0:
        break
out = ctypes.c_int64(0)
compiler.load({SOURCE!r}).forward((ctypes.c_void_p * 1)(ctypes.addressof(out)), (ctypes.c_int64 * 1)(41))
if children[-1] == 0:
    os._exit(0 if out.value == 42 else 1)
assert out.value == 42
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 15
"""
    finished(child(code, CC=counting))
    assert log.read_text() == "built\n"


def test_a_process_killed_during_a_build_leaves_nothing_that_is_used(cache, tmp_path):
    started = tmp_path / "started"
    stuck = fake_compiler(tmp_path, f'$REAL "$@"\ntouch {started}\nsleep 60')
    process = child(LAYER, CC=stuck)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(cache.glob("*.so"))
    # The same command, so the same entry: the lock of the dead process is gone, and the build starts anew.
    fake_compiler(tmp_path, 'exec $REAL "$@"')
    assert float(finished(child(LAYER, CC=stuck))) > 0
    assert len(list(cache.glob("*.so"))) == 1
    assert not [path for path in cache.iterdir() if path.is_dir()]  # what the dead process left is cleared away


def test_a_cache_made_on_another_processor_is_not_used(cache, monkeypatch):
    compiler.load(SOURCE)
    monkeypatch.setattr(compiler, "_processor", lambda: "another processor")
    assert run(compiler.load(SOURCE)) == 42
    assert len(list(cache.glob("*.so"))) == 2


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners here")
def test_a_folder_that_others_can_write_or_own_is_not_used(cache, monkeypatch):
    cache.mkdir()
    cache.chmod(0o777)
    cache_module.private_folder.cache_clear()
    with pytest.warns(cache_module.CacheWarning, match=r"cache is not used.*written by others \(mode 0777\).*chmod"):
        assert run(compiler.load(SOURCE)) == 42
    assert not list(cache.iterdir())
    cache.chmod(0o700)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.warns(cache_module.CacheWarning, match="belongs to the user .*a folder of your own"):
        assert not cache_module._usable(cache)


def test_a_read_only_home(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o500)
    environment = {"HOME": str(home), "TRACETORCH_CACHE": "", "XDG_CACHE_HOME": "", "TMPDIR": str(tmp_path)}
    assert float(finished(child(LAYER, **environment))) > 0
    if os.getuid():  # root writes anywhere
        assert not list(home.iterdir())
        assert not list(tmp_path.glob("tracetorch-*")), "the private folder stays behind"


def test_a_full_disk(cache, monkeypatch):
    def full(source, target):
        if cache in target.parents:
            raise OSError(28, "No space left on device")
        return whole(source, target)

    whole = compiler._compile
    cache_module.private_folder.cache_clear()
    monkeypatch.setattr(compiler, "_compile", full)
    assert run(compiler.load(SOURCE)) == 42
    assert not list(cache.glob("*.so"))


def test_a_compiler_that_fails_is_named_with_what_it_said(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", fake_compiler(tmp_path, "echo internal compiler error >&2; exit 3"))
    with pytest.raises(compiler.CompilerError, match=r"fake-cc failed.*\n.*internal compiler error"):
        compiler.load(SOURCE)


def test_no_compiler_is_said_clearly(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(tt.fused.BackendError, match="no C compiler"), tt.backend("cpu"):
        pass


def test_out_of_memory_is_torch_s_own_error():
    code = """
import resource, torch
from tracetorch.fused import memory
a = memory.empty((1 << 20,), torch.float32)
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    memory.empty((1 << 40,), torch.float32)
except RuntimeError as error:
    print(type(error).__name__, error)
a.fill_(1)
"""
    assert "4398046511104 bytes" in finished(child(code))
