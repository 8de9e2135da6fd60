"""What crossed the seams of a pipeline, as numbers and as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tracetorch.adapters.report import text_table
from tracetorch.plot import raster


@dataclass(frozen=True)
class Seam:
    """One seam.

    Attributes:
        name: "seam 1, stage 0 (LIF) -> stage 1 (Leaky)".
        shape: [T, B, ...].
        dtype: of the data.
        spikes: whether all numbers are whole: only then the next three say something.
        rate: mean number of spikes a step and neuron.
        silent: neurons that never fired, in any sample.
        saturated: neurons that fired in every step of every sample.
        neurons: of one sample.
        nan, infinite: how many numbers are.
        low, high: the least and the largest finite number.
        data: what crossed, [T, B, ...].
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spikes: bool
    rate: float
    silent: int
    saturated: int
    neurons: int
    nan: int
    infinite: int
    low: float
    high: float
    data: Tensor = field(repr=False, compare=False)

    @classmethod
    def of(cls, name: str, data: Tensor) -> Seam:
        """Measured. data: [T, B, ...], at least one step and sample."""
        flat = data.detach().flatten(2) if data.ndim > 2 else data.detach().unsqueeze(-1)
        finite = flat[flat.isfinite()]
        whole = bool(0 < flat.numel() == finite.numel() and (flat == flat.round()).all())
        active = flat != 0
        return cls(
            name=name,
            shape=tuple(data.shape),
            dtype=data.dtype,
            spikes=whole,
            rate=float(flat.double().mean()) if finite.numel() == flat.numel() and flat.numel() else float("nan"),
            silent=int((~active.flatten(0, 1).any(0)).sum()),
            saturated=int(active.flatten(0, 1).all(0).sum()),
            neurons=flat.shape[-1],
            nan=int(flat.isnan().sum()),
            infinite=int(flat.isinf().sum()),
            low=float(finite.min()) if finite.numel() else float("nan"),
            high=float(finite.max()) if finite.numel() else float("nan"),
            data=data.detach(),
        )

    def raster(self, sample: int = 0, ax: Any = None) -> Any:
        """A raster of one sample, one row a neuron: matplotlib axes. Raises `ImportError` without matplotlib."""
        data = self.data[:, sample].flatten(1) if self.data.ndim > 2 else self.data[:, sample]
        return raster(data.cpu(), ax, self.name)

    def row(self) -> tuple[str, ...]:
        """Cells for the table."""
        if not self.spikes:
            about = ("-", "-", "-")
        else:
            about = (f"{self.rate:.4g}", f"{self.silent} of {self.neurons}", f"{self.saturated} of {self.neurons}")
        bad = ", ".join(f"{n} {word}" for n, word in ((self.nan, "NaN"), (self.infinite, "infinite")) if n)
        dtype = str(self.dtype).removeprefix("torch.")
        between = f"{self.low + 0.0:.4g} .. {self.high + 0.0:.4g}"  # no -0
        return (self.name, str(list(self.shape)), dtype, *about, between, bad or "none")


@dataclass(frozen=True)
class Probe:
    """All seams in order, the input first and the output last. Prints as a table."""

    seams: tuple[Seam, ...]

    def __iter__(self) -> Iterator[Seam]:
        return iter(self.seams)

    def __len__(self) -> int:
        return len(self.seams)

    def __getitem__(self, k: int) -> Seam:
        return self.seams[k]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is likely a fault: NaN, infinity, a seam where nothing or everything fires."""
        found = []
        for seam in self.seams:
            if seam.nan or seam.infinite:
                found.append(f"{seam.name}: {seam.nan} NaN, {seam.infinite} infinite of {seam.data.numel()} numbers")
            elif seam.spikes and seam.silent == seam.neurons:
                found.append(f"{seam.name}: all {seam.neurons} neurons are silent")
            elif seam.spikes and seam.saturated == seam.neurons:
                found.append(f"{seam.name}: all {seam.neurons} neurons fire in every step")
        return tuple(found)

    def raster(self, sample: int = 0) -> Any:
        """One raster a seam, under each other, of one sample: a matplotlib figure. Needs the extra `report`."""
        figure = self.seams[0].raster(sample).figure
        figure.clear()
        figure.set_size_inches(7, 2.2 * len(self.seams))
        for seam, ax in zip(self.seams, figure.subplots(len(self.seams), 1, squeeze=False)[:, 0], strict=True):
            seam.raster(sample, ax)
        return figure

    def __str__(self) -> str:
        header = ("seam", "[T, B, ...]", "dtype", "rate", "silent", "saturated", "range", "not finite")
        return "\n".join([text_table(header, [seam.row() for seam in self.seams]), *self.warnings])
