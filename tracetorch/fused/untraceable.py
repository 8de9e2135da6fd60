"""What a step may do that a tracer of torch's operations does not see: read memory, draw numbers elsewhere, fail."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tracetorch.fused.graph import GraphError

_T = TypeVar("_T")
# Calls by which a tensor's memory or value leaves torch without an operation that a dispatch mode sees.
_LEAVES = frozenset(
    {"tolist", "numpy", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__"}
    | {"__deepcopy__", "__repr__", "__format__"}
)


class ValueReads(TorchFunctionMode):
    """Refuses calls that take the value of a tensor that `follows` says is followed."""

    def __init__(self, follows: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.follows = follows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LEAVES and args and isinstance(args[0], Tensor) and self.follows(args[0]):
            raise GraphError(f"{name}: the step reads the value of a tensor outside torch; use torch's operations")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_other_chance() -> Iterator[None]:
    """Put Python's and NumPy's random generators back as they were; `GraphError` if they had been used."""
    ours, theirs = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        drew = random.getstate() != ours or _differ(np.random.get_state(), theirs)
        if drew:
            random.setstate(ours)
            np.random.set_state(theirs)
    if drew:
        raise GraphError("the step draws random numbers from Python's or NumPy's generator")


def _differ(a: Any, b: Any) -> bool:
    return bool(a[2:] != b[2:] or not np.array_equal(a[1], b[1]))


def called(step: Callable[[Mapping[str, Tensor]], _T], given: Mapping[str, Tensor]) -> _T:
    """`step(given)`; whatever it raises on the small example, such as for a shape that it needs, is a `GraphError`."""
    try:
        return step(given)
    except GraphError:
        raise
    except Exception as error:
        if not of_the_step(error):
            raise
        shape = list(next(iter(given.values())).shape)
        said = str(error).strip().split("\n")[0]
        raise GraphError(
            f"the step fails on a small example of shape {shape}: {type(error).__name__}: {said}"
        ) from error


def of_the_step(error: Exception) -> bool:
    """Whether an error is the step's own: not that memory ran out, and not what a signal's handler raised meanwhile."""
    if isinstance(error, MemoryError):
        return False
    handlers = [signal.getsignal(each) for each in signal.valid_signals()]
    codes = {getattr(each, "__code__", getattr(type(each).__call__, "__code__", None)) for each in handlers}
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code not in codes:
        trace = trace.tb_next
    return trace is None


def refuse_draw(func: Any) -> None:
    """`GraphError` for an operation of torch that draws random numbers."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        raise GraphError(f"{func}: draws random numbers in a way that has no place here; torch.rand_like has")
