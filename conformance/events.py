"""Events: what must happen in a case for it to show anything, counted along the oracle's own trajectory.

An event is a function of `Happened` that gives the number of neuron-steps at which it takes place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tracetorch.oracle import Equations, Trace, TwoSigns

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Happened:
    """A case's input and the oracle's run over it: x float32 [T, B, N], the equations, the trajectory in float64."""

    x: Array
    eq: Equations
    trace: Trace

    @property
    def spikes(self) -> Array:
        """Spikes of every step, [T, B, N]."""
        return self.trace.step.s

    @property
    def tested(self) -> Array:
        """The membrane of the spike test, [T, B, N]."""
        return self.trace.step.w

    @property
    def membrane(self) -> Array:
        """The membrane after its reset, [T, B, N]."""
        return self.trace.step.v


def _count(where: Any) -> int:
    return int(np.asarray(where).sum())


def _consecutive(h: Happened) -> int:
    return _count((h.spikes[:-1] > 0) & (h.spikes[1:] > 0))


def _overshoot(h: Happened) -> int:
    """A membrane still above the threshold after the reset of one spike."""
    return _count((h.spikes > 0) & (h.tested - h.eq.rho > h.eq.theta))


def _clamped(h: Happened) -> int:
    low = h.eq.u_min if h.eq.v_min is None else h.eq.v_min
    return 0 if low is None else _count(h.membrane == low)


def _negative_tie(h: Happened) -> int:
    return _count(h.tested == h.eq.neg_theta) if isinstance(h.eq, TwoSigns) else 0


def _silenced(h: Happened) -> int:
    test = h.eq.tested(h.tested, h.trace.v_before)
    return _count(h.eq.count(test) > h.eq.emitted(test))


def _clamped_by_reset(h: Happened) -> int:
    """Above the bound before the reset of its spikes, below it after."""
    if h.eq.v_min is None:
        return 0
    return _count((h.spikes > 0) & (h.tested > h.eq.v_min) & (h.tested - h.spikes * h.eq.rho < h.eq.v_min))


def _over_limit(h: Happened) -> int:
    limit = h.eq.choices.max_spikes
    return 0 if limit is None else _count(np.trunc(h.tested / h.eq.theta) > limit)


def _silence(h: Happened) -> int:
    """Steps without input, at least 100 after the last one with, in which there is a membrane left to decay."""
    last = np.maximum.accumulate(np.where(h.x != 0, np.arange(len(h.x)).reshape(-1, 1, 1), -1), axis=0)
    quiet = np.arange(len(h.x)).reshape(-1, 1, 1) - last
    return _count((quiet >= 100) & (last >= 0) & (h.trace.v_before != 0))


def _denormal(h: Happened) -> int:
    size = np.abs(h.membrane)
    info = np.finfo(np.float32)
    return _count((size > 0) & (size < float(info.smallest_normal)) & (size >= float(info.smallest_subnormal)))


EVENTS: Mapping[str, tuple[str, Callable[[Happened], int]]] = MappingProxyType(
    {
        "spike": ("a neuron fires", lambda h: _count(h.spikes > 0)),
        "tie": ("the membrane is exactly at the threshold", lambda h: _count(h.tested == h.eq.theta)),
        "multiple tie": (
            "the membrane is exactly at a multiple of the threshold from the second on",
            lambda h: _count((h.tested / h.eq.theta >= 2) & (np.mod(h.tested, h.eq.theta) == 0)),
        ),
        "consecutive": ("a neuron fires in two steps running", _consecutive),
        "several": ("a neuron fires more than once in a step", lambda h: _count(h.spikes > 1)),
        "over the limit": ("the membrane holds more thresholds than a step may fire", _over_limit),
        "overshoot": ("the membrane is still above the threshold after the reset", _overshoot),
        "residual": (
            "a step starts with a membrane still above the threshold",
            lambda h: _count(h.trace.step.r > 0),
        ),
        "driven after a spike": (
            "a step with input follows a spike",
            lambda h: _count((h.spikes[:-1] > 0) & (h.x[1:] != 0)),
        ),
        "negative spike": ("a neuron fires a negative spike", lambda h: _count(h.spikes < 0)),
        "negative tie": ("the membrane is exactly at the negative threshold", _negative_tie),
        "silenced": ("a neuron that would fire is not the winner", _silenced),
        "fallen": (
            "a neuron fires with a membrane lower than before",
            lambda h: _count((h.spikes > 0) & (h.tested < h.trace.v_before)),
        ),
        "held": ("the membrane is held after a spike", lambda h: _count(h.trace.held)),
        "negative": ("the membrane is below -1", lambda h: _count(h.membrane < -1)),
        "clamped": ("the membrane lies at its lower bound", _clamped),
        "clamped by a reset": ("the reset, and nothing else, takes the membrane below its bound", _clamped_by_reset),
        "silence": ("a membrane decays, 100 steps and more after the last input", _silence),
        "denormal": ("the membrane is a denormal float32", _denormal),
        "NaN": ("the membrane is NaN", lambda h: _count(np.isnan(h.membrane))),
        "infinite": ("the membrane of the spike test is infinite", lambda h: _count(np.isinf(h.tested))),
        "number beside a NaN": (
            "a neuron of the same row and step as a NaN has a number",
            lambda h: _count(np.isnan(h.membrane).any(-1, keepdims=True) & ~np.isnan(h.membrane)),
        ),
        "loaded": ("a step starts with a membrane that is not 0", lambda h: _count(h.trace.v_before != 0)),
        "synapse loaded": ("a step starts with a current that is not 0", lambda h: _count(h.trace.i_before != 0)),
        "raised": (
            "a step starts with a threshold that spikes have raised",
            lambda h: 0 if h.eq.adaptation is None else _count(h.eq.adaptation.before > 0),
        ),
        "below": ("the membrane is below the threshold", lambda h: _count(h.tested < h.eq.theta)),
        "near": ("the membrane is within 1/4 of the threshold", lambda h: _count(np.abs(h.tested - h.eq.theta) < 0.25)),
        "step": ("a neuron takes a step", lambda h: h.spikes.size),
    }
)
