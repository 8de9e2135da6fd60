"""What a step takes and gives, by name; and what a kernel of it takes, in order.

A kernel's arguments carry their kind before the name, so that no parameter's name meets another's, a word of the
language or a variable of the kernel:

    in_x, out_output                              sequences, contiguous [T, B, ...] or [B, T, ...]
    first_v, last_v, record_v                     a state before and after the sequence, and after every step
    saved_v                                       a state before every CHUNK-th step (in C but the first)
    given_p                                       a parameter
    d_in_x, d_out_output, d_first_v, ..., d_given_p    their gradients
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


def identifiers(names: Sequence[str]) -> dict[str, str]:
    """A name of ASCII letters, digits and underscores for each; different ones for different ones."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
        found[name] = plain if plain not in found.values() else f"{plain}_{len(found)}"
    return found


@dataclass(frozen=True)
class Signature:
    """Names in order; all different.

    Attributes:
        states: of the step, in the order in which it takes and returns them.
        parameters: every other tensor that it reads.
        learned: the parameters that get a gradient.
        inputs: the sequences that it takes.
        outputs: what it returns before the states.
        draws: the last of `inputs`, which stand for random numbers in [0, 1) that it draws; without gradients.
    """

    states: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("x",)
    outputs: tuple[str, ...] = ("output",)
    draws: tuple[str, ...] = ()

    @cached_property
    def plain(self) -> dict[str, str]:
        """An identifier for every name."""
        return identifiers((*self.inputs, *self.outputs, *self.states, *self.parameters))

    def named(self, kind: str, names: Sequence[str]) -> list[str]:
        """The arguments of one kind."""
        return [f"{kind}_{self.plain[name]}" for name in names]

    @property
    def differentiable_inputs(self) -> tuple[str, ...]:
        """Those that the backward kernel gives a gradient of."""
        return self.inputs[: len(self.inputs) - len(self.draws)]

    @cached_property
    def forward_pointers(self) -> tuple[str, ...]:
        """Of the forward kernel; `first_*` (zero), `saved_*` and `record_*` (not wanted) may be null."""
        pointers = [*self.named("in", self.inputs), *self.named("out", self.outputs)]
        for state in self.states:
            pointers += [f"{kind}_{self.plain[state]}" for kind in ("first", "last", "saved", "record")]
        return (*pointers, *self.named("given", self.parameters))

    @cached_property
    def backward_pointers(self) -> tuple[str, ...]:
        """Of the backward kernel; `first_*`, `d_last_*`, `d_record_*` (zero) and `d_*` (not wanted) may be null."""
        pointers = [*self.named("in", self.inputs), *self.named("d_out", self.outputs)]
        pointers += self.named("d_in", self.differentiable_inputs)
        for state in self.states:
            pointers += [f"{kind}_{self.plain[state]}" for kind in ("first", "saved", "d_last", "d_record", "d_first")]
        return (*pointers, *self.named("given", self.parameters), *self.named("d_given", self.learned))

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """Of the parameters, in elements."""
        return tuple(self.named("size", self.parameters))

    @cached_property
    def strides(self) -> tuple[str, ...]:
        """Of the parameters: from one b to the next, and from one n; either may be 0."""
        return tuple(f"{kind}_{self.plain[name]}" for name in self.parameters for kind in ("by_b", "by_n"))
