"""Pictures of spikes and membranes. matplotlib is imported by the first call (the extra `report` brings it)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def raster(spikes: Tensor, ax: Any = None, title: str = "") -> Any:
    """A raster: time to the right, one row a neuron, a mark for each event; negative events in another colour.

    Args:
        spikes: [T] or [T, N]; choose one sample of a batch.
        ax: matplotlib axes to draw on; a new figure without.
        title: above the axes.

    Returns:
        The axes.

    Raises:
        ValueError: another number of dimensions.
        ImportError: matplotlib is not installed.
    """
    events = _columns(spikes, "raster: spikes")
    ax = _axes(ax)
    for mask, colour in ((events > 0, "C0"), (events < 0, "C3")):
        steps, neurons = (index.tolist() for index in torch.nonzero(mask, as_tuple=True))
        ax.scatter(steps, neurons, marker="|", s=60, color=colour)
    ax.set(xlabel="step", ylabel="neuron", title=title, xlim=(-0.5, len(events) - 0.5))
    ax.set_ylim(-0.5, events.shape[1] - 0.5)
    return ax


def membrane(
    trace: Tensor,
    threshold: float | Tensor | None = None,
    spikes: Tensor | None = None,
    ax: Any = None,
    title: str = "",
) -> Any:
    """Membrane potentials over time, with the threshold as a dashed line and the spikes as marks on top.

    Args:
        trace: [T] or [T, N], a line a neuron.
        threshold: one number or one per neuron.
        spikes: of the shape of `trace`; marked where they are not 0.
        ax: matplotlib axes to draw on; a new figure without.
        title: above the axes.

    Returns:
        The axes.

    Raises:
        ValueError: another number of dimensions, or shapes that differ.
        ImportError: matplotlib is not installed.
    """
    lines = _columns(trace, "membrane: trace")
    events = None if spikes is None else _columns(spikes, "membrane: spikes")
    if events is not None and events.shape != lines.shape:
        raise ValueError(f"membrane: spikes {list(events.shape)} and trace {list(lines.shape)} must be of one shape")
    ax = _axes(ax)
    for n, line in enumerate(lines.unbind(1)):
        ax.plot(line.tolist(), color=f"C{n % 10}", linewidth=1.2)
    if threshold is not None:
        for value in torch.as_tensor(threshold).detach().reshape(-1).unique().tolist():
            ax.axhline(value, color="0.4", linestyle="--", linewidth=1)
    if events is not None:
        top = 1.05 * max(
            [float(lines.max()), *([] if threshold is None else [float(torch.as_tensor(threshold).max())])]
        )
        for n, column in enumerate(events.unbind(1)):
            steps = torch.nonzero(column).flatten().tolist()
            ax.scatter(steps, [top] * len(steps), marker="|", s=60, color=f"C{n % 10}")
    ax.set(xlabel="step", ylabel="membrane", title=title)
    return ax


def overlay(traces: Mapping[str, Tensor], ax: Any = None, title: str = "") -> Any:
    """One neuron's membrane in several frameworks, one over the other, the later ones dashed, with a legend.

    Args:
        traces: label -> [T].
        ax: matplotlib axes to draw on; a new figure without.
        title: above the axes.

    Returns:
        The axes.

    Raises:
        ValueError: nothing to draw, or a trace that is not [T].
        ImportError: matplotlib is not installed.
    """
    if not traces:
        raise ValueError("overlay: traces is empty; give label -> trace")
    for label, trace in traces.items():
        if trace.ndim != 1:
            raise ValueError(f"overlay: {label!r} has shape {list(trace.shape)}; give [T], one neuron")
    ax = _axes(ax)
    for k, (label, trace) in enumerate(traces.items()):
        style = "-" if k == 0 else (0, (2, 1 + k))
        ax.plot(trace.detach().tolist(), label=label, linestyle=style, linewidth=2.5 if k == 0 else 1.5)
    ax.set(xlabel="step", ylabel="membrane", title=title)
    ax.legend()
    return ax


def _columns(values: Tensor, what: str) -> Tensor:
    if values.ndim not in (1, 2) or not values.numel():
        raise ValueError(f"{what} has shape {list(values.shape)}; give [T] or [T, N]")
    values = values.detach().cpu()
    return values[:, None] if values.ndim == 1 else values


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "tt.plot needs matplotlib, which the extra `report` of tracetorch-interop installs"
        ) from error
    return pyplot.subplots(figsize=(7, 2.8), layout="constrained")[1]
