"""Known deviations, as data: where a framework of one version departs from the equations of its own options.

Each is expected: a run in which it does not show fails, as one does in which another shows. docs/conformance.md has a
reproducer of each in the framework's own API alone, under its `id`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Deviation:
    """One deviation.

    Attributes:
        id: names it in the documentation.
        framework, version: whose it is, exactly.
        subjects: names of the subjects that show it.
        case: in which case.
        aspects: the aspects that are divergent, all of them.
        reason: what happens and why, with the place in the framework's source.
    """

    id: str
    framework: str
    version: str
    subjects: tuple[str, ...]
    case: str
    aspects: tuple[str, ...]
    reason: str


_SIGMOID = (
    "snntorch/surrogate.py, Sigmoid.backward: k e^(-kz) / (e^(-kz) + 1)^2 is infinity over infinity, NaN, where "
    "e^(-kz) overflows: in float32 below z = -3.54 at the default slope of 25"
)
_INFINITE = "the reset to 0 is a product, and 0 times infinity is NaN: "
_COUNT = (
    "sinabs/activation/spike_generation.py, MultiSpike: (v_mem > 0) * trunc(v_mem / threshold) is False times NaN, a "
    "NaN spike"
)
_OURS = "; ours keeps those operations, to be bit-identical"
_NATIVE = ("tracetorch", "tracetorch-cpu", "tracetorch-triton")
_DEV = "0.1.0.dev0"


def _sigmoid(framework: str, version: str, subjects: tuple[str, ...], ours: str) -> Deviation:
    return Deviation(
        "sigmoid-nan", framework, version, subjects, "surrogate-sigmoid-far", ("gradient of x",), _SIGMOID + ours
    )


def _infinite(framework: str, version: str, subjects: tuple[str, ...], aspects: tuple[str, ...], why: str) -> Deviation:
    return Deviation("infinite-nan", framework, version, subjects, "infinite", aspects, _INFINITE + why)


def _count(framework: str, version: str, subjects: tuple[str, ...], ours: str) -> Deviation:
    return Deviation("nan-spikes", framework, version, subjects, "nan-multiple", ("outputs",), _COUNT + ours)


_MASK = "sinabs/activation/reset_mechanism.py, MembraneReset: v_mem * (spikes == 0) + reset_value"
_BASE_ZERO = "snntorch/_neurons/leaky.py, _base_zero: (1 - reset) * mem, in the step after the spike"

DEVIATIONS: tuple[Deviation, ...] = (
    _sigmoid("snntorch", "1.0.0", ("snntorch", "snntorch-adapted"), ""),
    _sigmoid("sinabs", "3.1.3", ("sinabs-adapted",), _OURS),
    _sigmoid("tracetorch", _DEV, _NATIVE, _OURS),
    _infinite("snntorch", "1.0.0", ("snntorch", "snntorch-adapted"), ("outputs", "states"), _BASE_ZERO),
    _infinite("sinabs", "3.1.3", ("sinabs", "sinabs-adapted"), ("states",), _MASK),
    _infinite("tracetorch", _DEV, _NATIVE, ("states",), _MASK + _OURS),
    _count("sinabs", "3.1.3", ("sinabs", "sinabs-adapted"), ""),
    _count("snntorch", "1.0.0", ("snntorch-adapted",), _OURS),
    _count("tracetorch", _DEV, _NATIVE, _OURS),
)
