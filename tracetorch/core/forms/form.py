"""What a form is: a named order of operations for the step of a `NeuronSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from tracetorch.core.spec import NeuronSpec

Values: TypeAlias = Mapping[str, Tensor]
Step: TypeAlias = Callable[..., tuple[Tensor, ...]]
Taken: TypeAlias = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Form:
    """A named order of operations.

    Attributes:
        step: `step(spec, p, x, *states) -> output, *new_states`, in ordinary torch operations.
        choices: for each field the choices that it computes; a field left out: any.
        parameters: that it reads.
        source: the class or function whose order it is.
        takes: a parameter whose value it does not compute with: for each raw form that it reads, what it takes instead
            of the value, as a function of (raw, dt).
        rounds: whether it rounds its states to the spec's `state_levels`, where it has some.
        memory: states that it keeps beside those of the spec, after them, and what each starts from.
        check: raises `SpecError` for combinations of choices that it has no order of operations for.
    """

    step: Step
    choices: Mapping[str, tuple[object, ...]]
    parameters: tuple[str, ...]
    source: str
    takes: Mapping[str, Mapping[str, Taken]] = field(default_factory=dict)
    check: Callable[[NeuronSpec], None] | None = None
    rounds: bool = False
    memory: Mapping[str, float] = field(default_factory=dict)


def beside(spec: NeuronSpec, spikes: Tensor, value: Tensor, *names: str) -> Tensor:
    """A value, computed from these parameters, as torch takes it beside spikes, which are float32: one of no dimension
    is rounded to that.

    Said here, since a kernel gets the number as a tensor of a dimension, which would make the result float64.
    """
    return value.to(spikes.dtype) if all(spec.parameters[name].value.ndim == 0 for name in names) else value
