"""The pool of large CPU tensors: reused when dead and never before, bounded, given back, right after fork."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import tracetorch as tt
from tracetorch.fused import memory

BIG = (3, 1 << 18)  # 3 MiB of float32


@pytest.fixture(autouse=True)
def _fresh():
    before = memory.limit(1 << 28)
    memory.release()
    yield
    memory.release()
    memory.limit(before)


def test_a_dead_tensor_s_memory_is_used_again_and_not_before():
    a = memory.empty(BIG, torch.float32)
    at, row = a.data_ptr(), a[1, 5:7]
    row.fill_(7)
    assert at % 64 == 0
    del a
    b = memory.empty(BIG, torch.float32)
    assert b.data_ptr() != at  # a view lives
    b.fill_(1)
    assert row.tolist() == [7, 7]
    del row
    c = memory.empty(BIG, torch.float32)
    assert c.data_ptr() == at
    held = c.numpy()[2]
    del c
    assert memory.empty(BIG, torch.float32).data_ptr() != at  # NumPy holds it
    assert held.shape == (1 << 18,)


def test_small_tensors_and_other_devices_are_torch_s_own():
    small = memory.empty((5, 7), torch.float64)
    assert (small.shape, small.dtype, small.is_contiguous()) == ((5, 7), torch.float64, True)
    assert memory.empty((0, 1 << 30), torch.float32).shape == (0, 1 << 30)
    assert memory.new_empty(torch.empty(3, 2, device="meta"), (4, 3, 2)).is_meta
    assert memory.waiting() == 0


def test_what_waits_is_bounded_given_back_and_can_be_switched_off():
    memory.limit(5 << 20)
    a, b = memory.empty(BIG, torch.float32), memory.empty(BIG, torch.float32)
    del a, b
    assert memory.waiting() == 4 << 20  # one of two: the blocks are whole huge pages
    memory.release()
    assert memory.waiting() == 0
    memory.limit(0)
    del_me = memory.empty(BIG, torch.float32)
    del del_me
    assert memory.waiting() == 0
    with pytest.raises(ValueError, match="-1 bytes"):
        memory.limit(-1)


def test_a_block_serves_its_own_size_and_the_latest_one_first():
    larger, first, last = (memory.empty((n << 19,), torch.float32) for n in (2, 1, 1))
    expected = last.data_ptr()
    del larger
    del first
    del last
    again = memory.empty((1 << 19,), torch.float32)
    assert again.data_ptr() == expected  # its lines may still be in the caches
    other = memory.empty((1 << 19,), torch.float32)
    assert memory.waiting() == 4 << 20  # the larger one
    del again, other


def test_the_block_that_waited_longest_goes_first():
    first, last = (memory.empty((1 << 19,), torch.float32) for _ in range(2))
    expected = last.data_ptr()
    del first
    del last
    memory.limit(2 << 20)
    assert memory.waiting() == 2 << 20
    assert memory.empty((1 << 19,), torch.float32).data_ptr() == expected


def test_out_of_memory_what_waits_is_given_back_first(monkeypatch):
    def none(pool, size):
        raise OSError(12, "Cannot allocate memory")

    waits = memory.empty(BIG, torch.float32)
    del waits
    monkeypatch.setattr(memory._Pool, "take", none)
    assert memory.empty(BIG, torch.float32).shape == BIG
    assert memory.waiting() == 0


def test_tensors_of_the_pool_are_ordinary():
    a = memory.empty(BIG, torch.float32).fill_(3).requires_grad_()
    (a * a).sum().backward()
    assert a.grad.unique().tolist() == [6]
    for other in (copy.deepcopy(a), pickle.loads(pickle.dumps(a)), torch.load(io.BytesIO(_saved(a)))):
        assert torch.equal(other, a)
        assert other.data_ptr() != a.data_ptr()
    b = memory.empty(BIG, torch.float32).fill_(1)
    b.add_(1).mul_(2)
    assert b.share_memory_().is_shared()
    assert b.unique().tolist() == [4]
    assert torch.from_dlpack(b).unique().tolist() == [4]
    c = memory.empty(BIG, torch.float32)
    c.set_(torch.ones(2))  # drops the storage
    assert c.tolist() == [1, 1]


def _saved(tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def test_uninitialised_memory_is_poisoned_where_torch_poisons_it(poisoned):
    a = memory.empty(BIG, torch.float32)
    assert a.isnan().all()
    a.fill_(1)
    del a
    assert memory.empty(BIG, torch.float32).isnan().all()


def test_several_threads_never_share_a_block():
    wrong = []

    def work(number):
        for k in range(60):
            a = memory.empty((1, (1 << 18) * (1 + (k + number) % 3)), torch.float32)
            a.fill_(number)
            b = memory.empty(BIG, torch.float32).fill_(number + 0.5)
            if bool((a != number).any()) or bool((b != number + 0.5).any()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert memory.waiting() > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_its_own_memory():
    code = """
import os, sys, torch
from tracetorch.fused import memory
torch.set_num_threads(1)
a = memory.empty((1 << 20,), torch.float32).fill_(1)
b = memory.empty((1 << 20,), torch.float32).fill_(2)
del b
memory._POOL.lock.acquire()  # as another thread of the parent might at the time of the fork
child = os.fork()
if child == 0:
    c = memory.empty((1 << 20,), torch.float32).fill_(3)
    a.fill_(4)
    memory.release()
    os._exit(0 if c[-1] == 3 and a[0] == 4 else 1)
memory._POOL.lock.release()
_, status = os.waitpid(child, 0)
assert status == 0, status
assert a.unique().tolist() == [1]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("given", "limit"), [("0", 0), ("64", 64 << 20)])
def test_the_environment_sets_the_bound(given, limit):
    code = "from tracetorch.fused import memory; print(memory.limit())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TRACETORCH_POOL": given}
    )
    assert done.stdout.strip() == str(limit)


def test_a_wrong_environment_is_refused():
    code = "from tracetorch.fused import memory"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TRACETORCH_POOL": "many"}
    )
    assert "TRACETORCH_POOL='many'" in done.stderr


def test_unrolled_outputs_reuse_memory_and_keep_their_values():
    layer = tt.snn.LIB(512, quant_fn=tt.functional.round_ste())
    xs = torch.randn(40, 16, 512)
    kept = []
    with tt.backend("cpu"):
        for _ in range(4):
            layer.reset_states()
            kept.append(layer.unroll(xs.clone().requires_grad_()))
            kept[-1].sum().backward()
    assert all(torch.equal(kept[0], other) for other in kept)
    assert len({y.data_ptr() for y in kept}) == 4
    del kept
    assert memory.waiting() >= 4 * 40 * 16 * 512 * 4


def test_a_default_device_is_not_the_memory_s():
    kept = memory.limit()
    try:
        with torch.device("meta"):
            assert memory.empty((3,), torch.float32).is_cpu
            memory.limit(0)
            assert memory.empty((1 << 20,), torch.float32).is_cpu
    finally:
        memory.limit(kept)


@pytest.mark.parametrize("bad", [-1, 1.5, True, "many"])
def test_a_limit_that_is_no_number_of_bytes_is_refused(bad):
    kept = memory.limit()
    with pytest.raises(ValueError, match=repr(bad)):
        memory.limit(bad)
    assert memory.limit() == kept


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float64])
def test_poison_is_torch_s_own_for_every_dtype(dtype, poisoned):
    shape = (memory.SMALLEST,)
    ours, torchs = memory.empty(shape, dtype), torch.empty(shape, dtype=dtype)
    assert torch.equal(ours.nan_to_num(nan=-7.0), torchs.nan_to_num(nan=-7.0))
