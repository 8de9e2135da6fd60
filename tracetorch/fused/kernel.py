"""A compiled step, and how the sequences lie on which it runs."""

from __future__ import annotations

import ctypes
import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tracetorch.fused import kernel_c, reaching
from tracetorch.fused.emit_c import BLOCK
from tracetorch.fused.signature import Signature
from tracetorch.fused.trace import Traced

_PROCESS = os.getpid()
_SMALL = 2**14  # elements of a sequence up to which one thread runs it: waking others takes as long
_STREAMED = 2**19  # elements of a sequence from which outputs are written past the caches


def _threads() -> int:
    # After a parallel region, a forked child hangs in the next one: it runs serially.
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


class Geometry(NamedTuple):
    """How contiguous sequences are addressed: T steps of B times N elements; elements from one t, one b to the next."""

    T: int
    B: int
    N: int
    by_t: int
    by_b: int

    def strides(self, sizes: Sequence[int]) -> list[int]:
        """Of parameters of so many elements, for each: from one b to the next, and from one n."""
        found = []
        for size in sizes:
            whole = self.B > 1 and 1 < size == self.B * self.N
            found += [self.N if whole else 0, 0 if size == 1 else 1]
        return found


def geometry(shape: torch.Size, time_dim: int) -> Geometry:
    """Of a contiguous sequence, [T, B, ...] or [B, T, ...]."""
    steps = shape[time_dim]
    # Of the other dimensions: without a step there are states still, which pass through.
    n = math.prod(shape[time_dim + 1 :])
    return Geometry(steps, 1, n, n, 0) if time_dim == 0 else Geometry(steps, shape[0], n, n, steps * n)


@lru_cache(4096)
def layout(shape: torch.Size, time_dim: int) -> tuple[Geometry, torch.Size]:
    """The geometry of a sequence, and the shape of one step of it."""
    return geometry(shape, time_dim), torch.Size((*shape[:time_dim], *shape[time_dim + 1 :]))


@dataclass(frozen=True)
class Kernel(ABC):
    """A step compiled for one dtype. `chunk` is the number of steps between two saved states."""

    traced: Traced
    signature: Signature
    dtype: torch.dtype
    output_dtypes: tuple[torch.dtype, ...]
    source: str
    chunk: int

    @cached_property
    def converts(self) -> bool:
        """Whether an output of the step has another dtype than the kernel's, such as a spike of bool."""
        return any(kind is not self.dtype for kind in self.output_dtypes)

    # Whether it reads the state before the first chunk where it was given, takes a gradient that is the same at every
    # step as one row, and a parameter of fewer values than there are elements, which begins anew with its first.
    frugal: ClassVar[bool] = False

    @cached_property
    def gradients(self) -> Callable[[tuple[bool, ...], int], tuple[bool, ...]]:
        """`reaching.gradients` of this step, by `given` and `steps`; () where there is every one."""

        @lru_cache(256)
        def found(given: tuple[bool, ...], steps: int) -> tuple[bool, ...]:
            assert self.traced.vjp is not None
            there = reaching.gradients(self.traced.vjp, self.signature, given, steps)
            return () if all(there) else there

        return found

    def saved(self, steps: int) -> int:
        """How many states a sequence of so many steps saves: one before each chunk, or each but the first."""
        return max(0, steps - 1 if self.frugal else steps + self.chunk - 1) // self.chunk

    @abstractmethod
    def call(
        self,
        function: str,
        pointers: Sequence[Tensor | None],
        shape: Geometry,
        sizes: tuple[int, ...],
        still: tuple[bool, ...] = (),
    ) -> None:
        """Run "forward" or "backward".

        Args:
            pointers: in the order of the signature's `forward_pointers` or `backward_pointers`. They must stay
                referenced by the caller until this returns.
            sizes: elements of each parameter.
            still: of "backward", for each output: whether its gradient is one row, the same at every step; () is none.
        """


@dataclass(frozen=True)
class CKernel(Kernel):
    """Of the C renderer."""

    library: ctypes.CDLL
    frugal: ClassVar[bool] = True

    def call(
        self,
        function: str,
        pointers: Sequence[Tensor | None],
        shape: Geometry,
        sizes: tuple[int, ...],
        still: tuple[bool, ...] = (),
    ) -> None:
        """As `Kernel.call`."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in pointers]
        integers = _integers(shape, sizes, _threads(), still or (False,) * len(self.output_dtypes))
        # Bytes, of which ctypes hands over the address: half the time of an array of its own.
        getattr(self.library, function)(_packed(len(addresses))(*addresses), integers)


@cache
def _packed(count: int) -> Callable[..., bytes]:
    return struct.Struct(f"{count}N").pack


@lru_cache(4096)
def _integers(shape: Geometry, sizes: tuple[int, ...], threads: int, still: tuple[bool, ...]) -> bytes:
    """The integers that a C kernel takes; it does not write to them."""
    work = shape.T * shape.B * shape.N
    if work < _SMALL:
        threads = 1
    # Where there are fewer blocks than threads, narrower ones: whole strips, so that vectors stay full.
    share = -(-shape.B * shape.N // threads) // max(1, shape.B)
    width = min(BLOCK, max(kernel_c.STRIP, -(-share // kernel_c.STRIP) * kernel_c.STRIP))
    numbers = [shape.T, shape.B, shape.N, shape.by_t, shape.by_b, threads, int(work >= _STREAMED), width]
    numbers += [*sizes, *still]
    return struct.pack(f"{len(numbers)}q", *numbers)
