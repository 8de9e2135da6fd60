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
_JAX = ("brainpy", "brainpy-adapted")
_NODES = ("spikingjelly", "spikingjelly-multi-step", "spikingjelly-adapted")
_DEV = "0.1.0.dev0"


def _sigmoid(framework: str, version: str, subjects: tuple[str, ...], ours: str) -> Deviation:
    return Deviation(
        "sigmoid-nan", framework, version, subjects, "surrogate-sigmoid-far", ("gradient of x",), _SIGMOID + ours
    )


def _infinite(framework: str, version: str, subjects: tuple[str, ...], aspects: tuple[str, ...], why: str) -> Deviation:
    return Deviation("infinite-nan", framework, version, subjects, "infinite", aspects, _INFINITE + why)


def _count(framework: str, version: str, subjects: tuple[str, ...], ours: str) -> Deviation:
    return Deviation("nan-spikes", framework, version, subjects, "nan-multiple", ("outputs",), _COUNT + ours)


_BLEND = "s * v_reset + (1 - s) * h, in "
_MASK = "sinabs/activation/reset_mechanism.py, MembraneReset: v_mem * (spikes == 0) + reset_value"
_BASE_ZERO = "snntorch/_neurons/leaky.py, _base_zero: (1 - reset) * mem, in the step after the spike"

_DIFFERENCE = "V - (V - V_reset) * s, infinity minus infinity, in brainpy_state/_brainpy/lif.py"
_FLUSHED = (
    "XLA (jax 0.10.2) flushes denormal results to 0 on the CPU: the membrane drops to 0 or, where it is the loss of a "
    "step of brainstate.nn.exp_euler_step that is flushed, stays between 2^-126 and 2^-125 for good"
)

DEVIATIONS: tuple[Deviation, ...] = (
    _sigmoid("snntorch", "1.0.0", ("snntorch", "snntorch-adapted"), ""),
    _sigmoid("sinabs", "3.1.3", ("sinabs-adapted",), _OURS),
    _sigmoid("spikingjelly", "2.0.0", ("spikingjelly-adapted",), _OURS),
    _sigmoid("norse", "1.1.0", ("norse-adapted",), _OURS),
    _sigmoid("tracetorch", _DEV, _NATIVE, _OURS),
    _infinite("snntorch", "1.0.0", ("snntorch", "snntorch-adapted"), ("outputs", "states"), _BASE_ZERO),
    _infinite("sinabs", "3.1.3", ("sinabs", "sinabs-adapted"), ("states",), _MASK),
    _infinite("tracetorch", _DEV, _NATIVE, ("states",), _MASK + _OURS),
    _infinite("spikingjelly", "2.0.0", _NODES, ("states",), f"{_BLEND}spikingjelly/_ops/reset.py, voltage"),
    _infinite("norse", "1.1.0", ("norse-adapted",), ("states",), f"{_BLEND}norse/torch/functional/reset.py"),
    Deviation("infinite-nan", "brainpy", "2.8.2", _JAX, "infinite", ("outputs", "states"), _DIFFERENCE),
    Deviation("flushed-denormals", "brainpy", "2.8.2", _JAX, "denormal", ("states",), _FLUSHED),
    _count("sinabs", "3.1.3", ("sinabs", "sinabs-adapted"), ""),
    _count("snntorch", "1.0.0", ("snntorch-adapted",), _OURS),
    _count("spikingjelly", "2.0.0", ("spikingjelly-adapted",), _OURS),
    _count("norse", "1.1.0", ("norse-adapted",), _OURS),
    _count("tracetorch", _DEV, _NATIVE, _OURS),
)
