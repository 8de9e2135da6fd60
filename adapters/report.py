"""What a conversion says of itself: one row a layer, with its two verdicts, as text or as a dict."""

from __future__ import annotations

import html
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
        first_difference: for spikes, the first time step at which the two, each running freely, differ; or None.
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
    first_difference: int | None = None


_HEADER = ("layer", "source", "target", "forward", "gradient", "carried", "reason")
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif}}td,th{{border:1px solid #999;padding:.3em;text-align:left;vertical-align:top}}
table{{border-collapse:collapse}}</style></head>
<body><h1>{title}</h1>{notes}
<table><tr>{header}</tr>
{body}
</table></body></html>
"""


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns under a header, as text."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


@dataclass(frozen=True)
class Report:
    """A row for each layer, in order, and what is to be known beyond them. Prints as a table."""

    source: str
    target: str
    rows: tuple[LayerRow, ...]
    remarks: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LayerRow:
        return self.rows[index]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [asdict(row) for row in self.rows]
        return {"source": self.source, "target": self.target, "layers": rows, "remarks": list(self.remarks)}

    def to_html(self) -> str:
        """One HTML page, with nothing in it from elsewhere; every text of the network is escaped."""
        header = "".join(f"<th>{name}</th>" for name in _HEADER)
        body = "\n".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in self._cells()
        )
        title = html.escape(f"{self.source} -> {self.target}")
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in (*self._summary(), *self.remarks))
        return _PAGE.format(title=title, header=header, body=body, notes=notes)

    def _cells(self) -> list[tuple[str, ...]]:
        return [(r.name, r.source, r.target, r.forward, r.gradient, ", ".join(r.carried), r.reason) for r in self.rows]

    def _summary(self) -> tuple[str, ...]:
        return ()

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.target}", text_table(_HEADER, self._cells())]
        return "\n".join([*lines, *self._summary(), *self.remarks])


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
        names = ["steps", "ok", "parting", "spike_slots", "spike_mismatches", "unexplained_mismatches"]
        names += ["max_state_difference", "gradient_error", "changed_parameters"]
        return {**super().to_dict(), **{name: getattr(self, name) for name in names}}

    def _summary(self) -> tuple[str, ...]:
        until = " up to a neuron's first of these" if self.spike_mismatches else ""
        lines = [
            f"{'agree' if self.ok else 'DO NOT AGREE'}: {self.spike_mismatches} of {self.spike_slots} spikes differ "
            f"over {self.steps} steps, {self.unexplained_mismatches} unexplained; largest state difference "
            f"{self.max_state_difference:.2g}{until}; gradient error {self.gradient_error:.2g}"
        ]
        if self.parting is not None:
            lines.append(f"they part in {self.parting[0]!r} at step {self.parting[1]}")
        if self.changed_parameters:
            lines.append(
                f"parameters changed since the conversion: {', '.join(self.changed_parameters)}; "
                "verify(x, carry_back=True) asks whether the conversion still holds with them"
            )
        return tuple(lines)

    @property
    def parting(self) -> tuple[str, int] | None:
        """The first time step, and there the first layer, whose outputs differ between the two running freely."""
        found = [
            (row.first_difference, k, row.name) for k, row in enumerate(self.rows) if row.first_difference is not None
        ]
        return (min(found)[2], min(found)[0]) if found else None
