"""What a conversion says of itself: one row a layer, with its two verdicts, as text or as a dict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerRow:
    """One layer, measured on a sample.

    Attributes:
        name: path in the source network.
        source, target: classes.
        neuron: whether it is a neuron layer; else a stateless module.
        forward, gradient: the verdicts; `gradient` is "" where none was asked for.
        reason: the fields that needed care and how each was met, and what was seen.
        carried: "beta -> alpha_mem, learnable", one for each parameter.
        slots, spikes: neuron-steps compared, and spikes among them.
        spike_mismatches: spikes that differ between the two networks, each running freely on the same input.
        unexplained_mismatches: spikes of the target that the source's equations do not give from the target's own state
            and input, outside the rounding bound.
        state_violations: states of the target outside the rounding bound.
        first_violation: (time step, index) of the first of these, or None.
        max_state_difference: between the layers on the source's own input, up to a neuron's first mismatch.
        gradient_error: largest max|difference| / max|gradient| over the layer's tensors, against the oracle.
        unexpected: whether the gradient was measured to differ though nothing in the conversion says that it should.
        max_output_difference: for a stateless module, against the source's on the target's own input.
    """

    name: str
    source: str
    target: str
    neuron: bool
    forward: str
    gradient: str
    reason: str
    carried: tuple[str, ...] = ()
    slots: int = 0
    spikes: float = 0.0
    spike_mismatches: int = 0
    unexplained_mismatches: int = 0
    state_violations: int = 0
    first_violation: tuple[int, tuple[int, ...]] | None = None
    max_state_difference: float = 0.0
    gradient_error: float = 0.0
    max_output_difference: float = 0.0
    unexpected: bool = False


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


@dataclass(frozen=True)
class Report:
    """A row for each layer, in order. Prints as a table; `to_dict` is JSON-ready."""

    source: str
    target: str
    rows: tuple[LayerRow, ...]

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LayerRow:
        return self.rows[index]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"source": self.source, "target": self.target, "layers": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        header = ("layer", "source", "target", "forward", "gradient", "carried", "reason")
        cells = [(r.name, r.source, r.target, r.forward, r.gradient, ", ".join(r.carried), r.reason) for r in self.rows]
        return f"{self.source} -> {self.target}\n{_table(header, cells)}"


@dataclass(frozen=True)
class Agreement(Report):
    """The measured agreement of source and target on an input.

    Attributes:
        steps: time steps compared.
        changed_parameters: parameters of the target that are not the source's any more, if any.
    """

    steps: int = 0
    changed_parameters: tuple[str, ...] = ()

    @property
    def spike_slots(self) -> int:
        """Neuron-steps compared."""
        return sum(row.slots for row in self.rows)

    @property
    def spike_mismatches(self) -> int:
        """Spikes that differ between the two networks running freely; one early tie may cascade."""
        return sum(row.spike_mismatches for row in self.rows)

    @property
    def unexplained_mismatches(self) -> int:
        """Spikes of the target that no rounding explains."""
        return sum(row.unexplained_mismatches for row in self.rows)

    @property
    def max_state_difference(self) -> float:
        """Over all neuron layers."""
        return max((row.max_state_difference for row in self.rows if row.neuron), default=0.0)

    @property
    def gradient_error(self) -> float:
        """Over all layers."""
        return max((row.gradient_error for row in self.rows), default=0.0)

    @property
    def ok(self) -> bool:
        """No layer is approximate, no gradient differs that should not, no parameter changed since the conversion."""
        agree = all(row.forward != "approximate" and not row.unexpected for row in self.rows)
        return agree and not self.changed_parameters

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ["steps", "ok", "spike_slots", "spike_mismatches", "unexplained_mismatches"]
        names += ["max_state_difference", "gradient_error", "changed_parameters"]
        return {**super().to_dict(), **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        changed = ""
        if self.changed_parameters:
            changed = (
                f"\nparameters changed since the conversion: {', '.join(self.changed_parameters)}; "
                "verify(x, carry_back=True) asks whether the conversion still holds with them"
            )
        return (
            f"{super().__str__()}\n{'agree' if self.ok else 'DO NOT AGREE'}: {self.spike_mismatches} of "
            f"{self.spike_slots} spikes differ over {self.steps} steps, {self.unexplained_mismatches} unexplained; "
            f"largest state difference {self.max_state_difference:.2g}; gradient error {self.gradient_error:.2g}"
            f"{changed}"
        )
