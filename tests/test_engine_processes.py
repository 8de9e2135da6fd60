"""The engine among processes, interruptions and small stacks: nothing hangs, is left behind or crashes."""

import ast
import fcntl
import multiprocessing
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import threading

import pytest
import torch

import tracetorch as tt
from tests.test_compiler import SOURCE, child, finished, run
from tracetorch.fused import cache as cache_module
from tracetorch.fused import compiler, kernel_c, memory

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRACETORCH_CACHE", str(folder))
    return folder


@pytest.fixture
def no_private_folder():
    """None was made in this process, and none that the test makes is used after it."""
    cache_module.private_folder.cache_clear()
    yield
    cache_module.private_folder.cache_clear()


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o002, 0o022])
def test_the_cache_and_the_folders_made_for_it_are_the_user_s_alone(umask, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACETORCH_CACHE", str(tmp_path / "a" / "b" / "c"))
    before = os.umask(umask)
    try:
        assert run(compiler.load(SOURCE)) == 42
    finally:
        os.umask(before)
    for folder in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700, folder
    entry = [path for path in (tmp_path / "a/b/c").iterdir() if path.suffix in (".so", ".sha256")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in entry] == [0o600, 0o600]


def test_a_cache_in_a_working_folder_that_is_gone_falls_back(tmp_path, monkeypatch, no_private_folder):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for given in (".", "kernels"):
        monkeypatch.setenv("TRACETORCH_CACHE", given)
        assert run(compiler.load(SOURCE)) == 42


def test_a_folder_whose_parents_are_none_is_an_error_and_no_endless_search(monkeypatch):
    # A drive that is not there, on a system that has drives.
    monkeypatch.setattr(pathlib.Path, "is_dir", lambda path: False)
    with pytest.raises(OSError, match="exists"):
        cache_module._make_private(pathlib.Path("/"))


def test_a_cache_that_is_a_link_is_not_used(tmp_path, monkeypatch, no_private_folder):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("TRACETORCH_CACHE", str(tmp_path / "link"))
    with pytest.warns(cache_module.CacheWarning, match=r"link is not used.*leads to, .*elsewhere"):
        assert run(compiler.load(SOURCE)) == 42
    assert run(compiler.load(SOURCE)) == 42  # said once
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_lock_is_free_once_its_entry_is_made_though_a_forked_child_lives(tmp_path):
    """A data loader's worker, forked by another thread during a build, has the lock's file open as long as it lives."""
    path = tmp_path / "entry.lock"
    read, write = os.pipe()
    with cache_module._locked(path) as alone:
        assert alone
        worker = os.fork()
        if worker == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        with open(path, "w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        with open(path, "w") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(write)
        os.waitpid(worker, 0)
        os.close(read)


def test_a_file_system_without_locks_still_makes_entries(cache, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    others = cache / f"{cache_module._key('x')}-others"
    others.mkdir(parents=True)
    cache.chmod(0o700)
    assert cache_module.entry("x", ".t", lambda path: path.write_text("made")).read_text() == "made"
    assert others.is_dir()  # perhaps at work: there is no lock that says


def test_what_a_killed_builder_left_of_an_entry_is_cleared_away_and_nothing_else(cache):
    cache_module.entry("another", ".t", lambda path: path.write_text("kept"))
    left = [cache / f"{cache_module._key(content)}-left" for content in ("x", "another")]
    for folder in left:
        folder.mkdir()
        (folder / "half.so").write_text("half")
    assert cache_module.entry("x", ".t", lambda path: path.write_text("made")).read_text() == "made"
    assert [folder.exists() for folder in left] == [False, True]
    assert cache_module.entry("another", ".t", lambda path: path.write_text("again")).read_text() == "kept"


def test_a_private_folder_that_was_removed_is_made_anew(no_private_folder):
    first = cache_module.present_private_folder()
    assert first.is_dir()
    assert cache_module.present_private_folder() == first
    shutil.rmtree(first)
    file = cache_module.private_entry("x", ".t", lambda path: path.write_text("made"))
    assert file.read_text() == "made"
    assert file.parent != first


def test_a_cache_that_vanishes_during_a_build_falls_back(cache, no_private_folder):
    def make(path):
        if path.is_relative_to(cache):
            shutil.rmtree(cache)
        path.write_text("made")

    file = cache_module.entry("x", ".t", make)
    assert file.read_text() == "made"
    assert not file.is_relative_to(cache)


def _private(pipe):
    pipe.send(str(cache_module.private_folder()))


def test_a_child_of_multiprocessing_removes_its_private_folder_and_not_its_parent_s(no_private_folder):
    ours, theirs = cache_module.private_folder(), multiprocessing.Pipe(duplex=False)
    cache_module.private_folder.cache_clear()
    worker = multiprocessing.get_context("fork").Process(target=_private, args=(theirs[1],))
    worker.start()
    folder = theirs[0].recv()
    worker.join()
    assert worker.exitcode == 0
    assert not os.path.exists(folder)
    assert ours.is_dir()


# ---- interruptions ---------------------------------------------------------------------------------------------------

# A signal's handler raises at any call of the pool's code, finalizers among them; some hundred times.
INTERRUPTED = """
import faulthandler, random, signal, sys, torch
from tracetorch.fused import memory

faulthandler.dump_traceback_later(60, exit=True)  # a lock that nobody will release
random.seed(0)
pool, mib, armed, raised = memory._POOL, 1 << 20, False, 0
sys.unraisablehook = lambda _: None  # what a finalizer raises

def handler(*_):
    global armed, raised
    if armed:
        armed, raised = False, raised + 1
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, handler)
memory.limit(256 * mib)
for n in range(600):
    a = b = None
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, 4e-4))
        for _ in range(8):
            a, b = memory.empty((mib,), torch.float32), memory.empty((mib,), torch.float32)
            a = b = None
        memory.release()
    except KeyboardInterrupt:
        pass
    armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    a = b = None
    assert not pool.lock.locked(), n
    assert pool.most == 256 * mib, n
    assert memory.waiting() == sum(block.size for block in pool.waiting.values()), n
    if n % 50 == 0:
        memory.release()
        assert memory.waiting() == 0, n
print(raised)
"""


def test_an_interruption_anywhere_leaves_the_pool_whole():
    assert int(finished(child(INTERRUPTED))) > 100


def test_a_finalizer_under_the_pool_s_own_lock_does_not_wait_for_it():
    """A garbage collection may run while this thread holds the lock."""
    memory.release()
    tensor = memory.empty((1 << 20,), torch.float32)
    with memory._POOL.lock:
        thread = threading.Thread(target=lambda held: held.clear(), args=([tensor],))
        del tensor
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    assert memory.waiting() > 0


def test_a_release_does_not_switch_the_pool_off_for_other_threads(monkeypatch):
    seen = []
    collect = memory._Pool._collect
    monkeypatch.setattr(memory._Pool, "_collect", lambda pool, most: (seen.append(pool.most), collect(pool, most)))
    before = memory.limit(1 << 28)
    try:
        seen.clear()
        memory.release()
        assert seen == [1 << 28]
    finally:
        memory.limit(before)


# ---- stacks ----------------------------------------------------------------------------------------------------------

MANY = """
import sys, threading, torch, tracetorch as tt

class Compartments(tt.snn.Layer):
    def __init__(self, count):
        super().__init__(512)
        for k in range(count):
            self.define_state(f"mem_{k}")

    def step(self, x, *mem):
        new = [0.5 * mem[0] + x]
        for before in mem[1:]:
            new.append(0.5 * before + new[-1])
        return (new[-1], *new)

def results(backend):
    layer = Compartments(6).double()
    xs = torch.rand(40, 2, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with tt.backend(backend):
        ys = layer.unroll(xs)
    ys.square().sum().backward()
    found.append((ys.detach(), xs.grad, layer.mem_5))

found = []
threading.stack_size(512 << 10)
for backend in ("cpu", "eager"):
    thread = threading.Thread(target=results, args=(backend,))
    thread.start()
    thread.join()
assert all(torch.equal(a, b) for a, b in zip(*found))
assert found[0][0].abs().sum() > 0
print("same")
"""


def test_a_kernel_of_many_states_fits_on_a_small_stack():
    assert finished(child(MANY)) == "same\n"


def _chain(count, dtype):
    """The kernel's source of `count` states, each driven by the one before it."""
    space: dict = {}
    tree = ast.parse(MANY)
    exec(compile(ast.Module(tree.body[:2], []), "<layer>", "exec"), space)
    return tt.fused.source(space["Compartments"](count).to(dtype), "cpu", backward=True, dtype=dtype)


@pytest.mark.parametrize(
    ("count", "dtype", "block"),
    [
        (1, torch.float32, 512),
        (3, torch.float32, 512),
        (4, torch.float32, 256),
        (1, torch.float64, 512),
        (2, torch.float64, 256),
        (6, torch.float64, 128),
    ],
)
def test_the_arrays_of_a_kernel_are_bounded(count, dtype, block):
    assert f"#define BLOCK {block}\n" in _chain(count, dtype)
    # Those of the backward kernel, the larger one: each state in every step of a chunk, and two rows beside.
    assert (count * (kernel_c.CHUNK + 1) + 1) * block * dtype.itemsize <= kernel_c.STACK


@pytest.mark.parametrize(("states", "block"), [(31, 32), (62, 16), (124, 8)])
def test_of_very_many_states_blocks_are_narrow(states, block):
    declared = [f"    double h_{k}[32][BLOCK], l_{k}[BLOCK];" for k in range(states)]
    assert kernel_c._block(declared, torch.float64) == block
    assert kernel_c._block(declared, torch.float32) == 2 * block


def test_more_states_than_fit_are_refused():
    declared = [f"    double h_{k}[32][BLOCK], l_{k}[BLOCK];" for k in range(125)]
    with pytest.raises(tt.fused.GraphError, match=r"take 33000 bytes of a kernel's stack.*split the layer"):
        kernel_c._block(declared, torch.float64)


# ---- the end of the process ------------------------------------------------------------------------------------------

AT_THE_END = """
import atexit, gc, sys, torch, tracetorch as tt
from tracetorch.fused import cache, memory

if not cache.private_folder().is_dir():
    raise RuntimeError("no private folder")

class Late:
    def __del__(self):
        memory.empty((1 << 20,), torch.float32).fill_(2)

kept = memory.empty((1 << 20,), torch.float32).fill_(1)
torch.kept_by_a_module, sys.late = kept.view(2, -1), Late()
layer, xs = tt.snn.LIB(512), torch.rand(40, 32, 512, requires_grad=True)
with tt.backend("cpu"):
    ys = layer.unroll(xs)
ys.register_hook(lambda grad: grad + kept[0])
cycle = [kept, ys]
cycle.append(cycle)
atexit.register(lambda: memory.empty((1 << 20,), torch.float32).fill_(2))
gc.freeze()
"""


def test_tensors_alive_at_the_end_of_the_process_end_it_in_order(tmp_path):
    """In Python's development mode, without assertions in the library; the private folder is removed."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-O", "-c", AT_THE_END],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert not list(tmp_path.glob("tracetorch-*"))
