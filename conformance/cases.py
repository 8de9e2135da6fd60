"""A case: one neuron, one input and the requirement that they show; deterministic, down to the bits.

Inputs come from an integer hash (SplitMix64), not from a random generator of some library: `draw` in any language gives
the same numbers. A case says which events it must contain and which other neurons it must tell apart; `check` raises
`CaseError` where it does not, so no case passes because nothing happened in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tracetorch import oracle
from tracetorch.conformance.events import EVENTS, Happened
from tracetorch.conformance.requirements import REQUIREMENTS
from tracetorch.core.spec import CHOICES, PARAMETERS, NeuronSpec, Parameter
from tracetorch.functional.surrogates import Surrogate

Array: TypeAlias = NDArray[Any]

# The tables of a case's spec name no order of operations: a subject computes it in whichever it has.
FORM = "any"
# An alternative whose gradient is within this of the case's is not told apart. Agreement is of order 1e-6.
_APART = 1e-2


class CaseError(ValueError):
    """A case that does not contain its event, or cannot tell apart what it must."""


def draw(seed: int, shape: tuple[int, ...], low: int, high: int, scale: float) -> Array:
    """Integers low..high times scale, as float32: element k from SplitMix64 of seed * 2^32 + k, its upper 31 bits."""
    with np.errstate(over="ignore"):
        z = (np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    numbers = (z >> np.uint64(33)).astype(np.int64) % (high - low + 1) + low
    return (numbers * np.float64(scale)).astype(np.float32).reshape(shape)


def neuron(**options: Any) -> NeuronSpec:
    """A spec from field names and parameters: numbers, arrays or, for a raw form, (raw form, number).

    Without more: a = 1/2, theta = 1, one spike where u >= theta, the reset to 0 in the same step, detached. `learn`
    names the parameters that are learnable. None takes a default away.
    """
    chosen: dict[str, Any] = {"mem_decay": 0.5, "threshold": 1.0, "reset": "value", "reset_value": 0.0}
    chosen |= {"reset_gradient": "detached", "surrogate": Surrogate("atan")} | options
    learn = chosen.pop("learn", ())
    parameters = {}
    for name in PARAMETERS:
        value = chosen.pop(name, None)
        if isinstance(value, str):  # reset_amount and input_gain are fields too
            chosen[name] = value
        elif value is not None:
            if name in CHOICES:
                chosen[name] = "value"
            raw, value = value if isinstance(value, tuple) else ("value", value)
            parameters[name] = Parameter(np.asarray(value, dtype=np.float32), name in learn, raw)
    if chosen["reset"] not in ("value", "add_value"):
        parameters.pop("reset_value", None)
    return NeuronSpec(form=FORM, parameters=parameters, **{n: v for n, v in chosen.items() if v is not None})


def observed(spec: NeuronSpec, x: Array) -> tuple[oracle.Recording, oracle.Equations, oracle.Trace]:
    """The oracle as a subject, in float64: what it emits and, as the spec says, stores, for x [T, B, N]."""
    return oracle.simulate(spec, x.astype(np.float64))


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: its name; with `version`, which goes up whenever the case's numbers change.
        requirement: id of what it shows.
        text: how it shows it.
        spec: the neuron.
        inputs: gives x, float32 or float64 [T, B, N].
        events: event -> the number of neuron-steps at which it must at least take place.
        apart: other neurons, by what is different, whose trajectory, or gradient if `grad`, must be judged another.
        calls: lengths of the calls in which the sequence is given; they sum to T. Empty: one call.
        grad: whether gradients are asked for and judged.
        runs: how often it is run; every run must give the same bits.
    """

    name: str
    requirement: str
    text: str
    spec: NeuronSpec
    inputs: Callable[[], Array]
    events: Mapping[str, int]
    apart: Mapping[str, NeuronSpec] = field(default_factory=dict)
    calls: tuple[int, ...] = ()
    grad: bool = False
    runs: int = 1
    version: int = 1

    @cached_property
    def x(self) -> Array:
        """The input, float32 or float64 [T, B, N], read-only."""
        x = self.inputs()
        x.setflags(write=False)
        return x

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the calls, summing to T."""
        return self.calls or (len(self.x),)

    @cached_property
    def grad_output(self) -> Array | None:
        """dL/doutput, float32 [T, B, N] of multiples of 1/8 within [-1, 1]; None without gradients."""
        return draw(977, self.x.shape, -8, 8, 1 / 8) if self.grad else None

    @cached_property
    def truth(self) -> tuple[oracle.Recording, oracle.Equations, oracle.Trace]:
        """The oracle's own run."""
        return observed(self.spec, self.x)

    def gradients(self) -> dict[str, Array]:
        """The oracle's own gradients: of `x` and, by name, the raw learnable parameters. Empty without `grad`."""
        if self.grad_output is None:
            return {}
        found = oracle.gradients(self.spec, self.truth[0], self.grad_output)
        return {n: g for n, g in found.items() if n == "x" or self.spec.parameters[n].learnable}

    def count(self, event: str) -> int:
        """Neuron-steps at which an event takes place."""
        _, eq, trace = self.truth
        with np.errstate(all="ignore"):
            return EVENTS[event][1](Happened(self.x, eq, trace))

    def check(self) -> None:
        """Raises `CaseError` unless the events are there, and the others told apart."""
        where = f"case {self.name}"
        if self.requirement not in REQUIREMENTS:
            raise CaseError(f"{where}: requirement {self.requirement!r} is not known")
        if not self.events:
            raise CaseError(f"{where}: names no event, so it shows nothing")
        known = self.x.dtype in (np.float32, np.float64)
        if not known or self.x.ndim != 3 or self.x.size == 0 or sum(self.lengths) != len(self.x):
            raise CaseError(f"{where}: x is {self.x.dtype} {list(self.x.shape)} in calls of {list(self.lengths)}")
        for event, needed in self.events.items():
            if self.count(event) < needed:
                raise CaseError(
                    f"{where}: {EVENTS[event][0]} at {self.count(event)} neuron-steps, it needs {needed}; "
                    "change its input"
                )
        for other, spec in self.apart.items():
            if not self._tells_apart(spec):
                raise CaseError(f"{where}: {other} is not told apart; change its input")

    def _tells_apart(self, other: NeuronSpec) -> bool:
        recording = observed(other, self.x)[0]
        if not np.array_equal(recording.outputs, self.truth[0].outputs, equal_nan=True):
            return True
        if other.states == self.spec.states and not oracle.judge(self.spec, recording).ok:
            return True
        if self.grad_output is None:
            return False
        theirs = oracle.gradients(other, recording, self.grad_output)
        return any(
            oracle.gradient_error(theirs[n] if n in theirs else np.zeros_like(g), g) > _APART
            for n, g in self.gradients().items()
        )
