"""Memory for the engine's large CPU tensors, kept when they die and used again.

A fresh large tensor costs more than the kernel that fills it: the operating system hands out its pages one fault at a
time. So tensors of at least `SMALLEST` bytes stand in blocks of anonymous memory, on huge pages where the system gives
them, and a block whose tensor and all its views are gone waits for the next tensor of its size. Nothing process-wide is
touched: only tensors made by `empty` live here.

The blocks that wait are bounded: by `limit(...)`, else by `$TRACETORCH_POOL` (MiB, 0 for none), else by an eighth of
the machine's memory. `release()` gives them all back to the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 20
_HUGE = 1 << 21  # a huge page of x86-64, and of 64-bit ARM with 4 KiB pages


class _Block:
    """Anonymous memory of `size` bytes, aligned to a huge page."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Private, which is not Python's default: a forked child writes to copies.
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self.memory = mmap.mmap(-1, size + _HUGE, **flags)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.address = start + -start % _HUGE
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without huge pages: slower, and right
                self.memory.madvise(mmap.MADV_HUGEPAGE)

    def array(self) -> ctypes.Array[ctypes.c_char]:
        """A new object over the whole block; when it dies, nothing uses the block any more."""
        return (ctypes.c_char * self.size).from_address(self.address)


class _Pool:
    """Blocks that wait, oldest first, by size."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.returned: deque[_Block] = deque()  # appended to by finalizers, which may run anywhere, without the lock
        self.waiting: OrderedDict[int, _Block] = OrderedDict()  # by id, oldest first
        self.most = _default_limit()

    @property
    def bytes(self) -> int:
        """Counted anew: a number beside the blocks would differ from them after an interruption between the two."""
        return sum([block.size for block in list(self.waiting.values())])

    def take(self, size: int) -> _Block:
        with self.lock:
            self._collect(self.most)
            found = next((key for key, block in reversed(self.waiting.items()) if block.size == size), None)
            if found is not None:
                return self.waiting.pop(found)
        return _Block(size)

    def give(self, block: _Block) -> None:
        """For finalizers. Where the lock is held, maybe by the code that one interrupts, the next one collects.

        `with` alone takes the lock: after `acquire`, an interruption before `try` would leave it held for ever.
        """
        self.returned.append(block)
        if not self.lock.locked():
            with self.lock:
                self._collect(self.most)

    def _collect(self, most: int) -> None:
        while self.returned:
            block = self.returned.popleft()
            self.waiting[id(block)] = block
        over = self.bytes - most
        while over > 0:
            _, block = self.waiting.popitem(last=False)
            over -= block.size

    def trim(self, most: int) -> None:
        with self.lock:
            self._collect(most)

    def after_fork(self) -> None:
        # Another thread of the parent may have held the lock; the blocks themselves are the child's own copies.
        self.lock = threading.Lock()


def _default_limit() -> int:
    given = os.environ.get("TRACETORCH_POOL")
    if given is not None:
        if not given.isdecimal():
            raise ValueError(f"TRACETORCH_POOL={given!r}: give a number of MiB, 0 for none")
        return int(given) << 20
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    except (AttributeError, ValueError, OSError):
        return 1 << 30


_POOL = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.after_fork)


def limit(most: int | None = None) -> int:
    """The most bytes that wait for use; set to `most` if given. 0: nothing waits, every large tensor is the system's.

    Raises:
        ValueError: a negative number, or none of bytes.
    """
    if most is not None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 0:
            raise ValueError(f"limit: {most!r} bytes; give a whole number, 0 or more")
        _POOL.most = most
        _POOL.trim(most)
    return _POOL.most


def release() -> None:
    """Give all waiting memory back to the system. Tensors in use are not touched."""
    _POOL.trim(0)


def waiting() -> int:
    """Bytes that wait for use."""
    _POOL.trim(_POOL.most)
    return _POOL.bytes


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty` on the CPU: uninitialised, contiguous, an ordinary tensor. Large ones come from the pool.

    A tensor of the pool cannot be made larger in place: torch raises, as for every tensor over given memory.

    With `torch.use_deterministic_algorithms(True)`, uninitialised memory is filled with NaN (integers: their
    largest number), as torch does.
    """
    count = math.prod(shape)
    wanted = count * dtype.itemsize
    if wanted < SMALLEST or _POOL.most == 0:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    try:
        block = _POOL.take(-(-wanted // _HUGE) * _HUGE)
    except OSError:  # out of memory: what waits may be what is missing; torch says how much it could not get
        release()
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    array = block.array()
    weakref.finalize(array, _POOL.give, block).atexit = False
    tensor = torch.frombuffer(array, dtype=dtype, count=count).view(tuple(shape))
    poisoned: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if poisoned and torch.are_deterministic_algorithms_enabled():
        tensor.fill_(_poison(dtype))
    return tensor


def _poison(dtype: torch.dtype) -> float:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 1 if dtype is torch.bool else torch.iinfo(dtype).max


def empty_like(tensor: Tensor) -> Tensor:
    """Of a contiguous tensor: one of the same shape, dtype and device; on the CPU by `empty`."""
    if tensor.nbytes < SMALLEST or not tensor.is_cpu:
        return torch.empty_like(tensor)
    return empty(tensor.shape, tensor.dtype)


def new_empty(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A contiguous tensor of a tensor's dtype and device; on the CPU by `empty`."""
    count = math.prod(shape)
    if count * tensor.itemsize < SMALLEST or not tensor.is_cpu:
        return tensor.new_empty(shape)
    return empty(shape, tensor.dtype)
