"""Writes tables and pictures of docs/online-learning.md: `python docs/make_online.py [name]`, without a name all.

Names: `tables` (a minute), `rate`, `learning` (some minutes: it trains three networks). Tests compare the tables with
what is measured.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import torch
from matplotlib import pyplot
from torch import Tensor, nn

import tracetorch as tt

PAGE = Path(__file__).with_name("online-learning.md")
ROOT = PAGE.parents[1]
DEPTHS, LENGTHS, SEEDS = (1, 2, 3), (10, 100, 1000), 5
DECAYS, THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99), (0.3, 1.0, 4.0)


def _file(path: Path) -> ModuleType:
    location = importlib.util.spec_from_file_location(path.stem, path)
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


# ---- the cosines -----------------------------------------------------------------------------------------------------


def gradient(rule: str, depth: int, steps: int, seed: int) -> list[Tensor]:
    """The gradient of every layer's weight: `depth` layers of 32 neurons and a read-out of five classes.

    The input is eight streams of 20 random spike trains, the loss the likelihood of a random class in the mean output.
    """
    torch.manual_seed(seed)
    sizes = [20] + [32] * depth
    hidden = [tt.nn.LIF(a, b, bias=True, rule=rule) for a, b in itertools.pairwise(sizes)]
    net = tt.nn.Sequential(*hidden, tt.nn.LIS(32, 5, rule=rule))
    draw = torch.Generator().manual_seed(seed + 50)
    rates = 0.6 * torch.rand(8, 1, 20, generator=draw)
    inputs = torch.rand(8, steps, 20, generator=draw) < rates
    outputs, _ = net(inputs)
    nn.functional.nll_loss(outputs.mean(1).clamp(min=1e-6).log(), torch.arange(8) % 5).backward()
    return [layer.weight.grad.flatten() for layer in net]


def cosine(rule: str, depth: int, steps: int) -> tuple[float, float]:
    """Between a rule's gradient and the exact one, the mean over seeds: of all weights, and of the first layer's."""
    found = []
    for seed in range(SEEDS):
        ours, exact = gradient(rule, depth, steps, seed), gradient("bptt", depth, steps, seed)
        pairs = [(torch.cat(ours), torch.cat(exact)), (ours[0], exact[0])]
        found.append([float(nn.functional.cosine_similarity(a, b, dim=0)) for a, b in pairs])
    whole, first = torch.tensor(found).mean(0).tolist()
    return whole, first


def cosines() -> str:
    """Every depth and length."""
    rows = []
    for depth in DEPTHS:
        for steps in LENGTHS:
            average, ottt = cosine("average", depth, steps), cosine("ottt", depth, steps)
            rows.append([str(depth), str(steps), *(f"{value:.2f}" for value in (*average, *ottt))])
    head = ("depth", "T", "average, all weights", "average, first layer", "ottt, all weights", "ottt, first layer")
    return _table(head, rows)


# ---- the rate --------------------------------------------------------------------------------------------------------


def between(decay: float, threshold: float, n: int = 401) -> Tensor:
    """Currents from where a neuron begins to fire to where it fires in every step."""
    z = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    return threshold * (1 - decay + z * decay)


def simulated(current: Tensor, decay: float, threshold: float, steps: int = 5000, warm: int = 1000) -> Tensor:
    """Spikes per step after a start, counted."""
    m, count = torch.zeros_like(current), torch.zeros_like(current)
    for k in range(steps):
        m = m * decay + current
        spike = (m > threshold).to(m.dtype)
        m = m - spike * threshold
        count += spike if k >= warm else 0
    return count / (steps - warm)


def formula(current: Tensor, decay: float, threshold: float) -> Tensor:
    """The layer's rate."""
    values = (torch.tensor(value, dtype=current.dtype) for value in (decay, threshold))
    return tt.nn.stationary_rate(current, *values)


def straight(current: Tensor, decay: float, threshold: float) -> Tensor:
    """The line from rate 0 to rate 1."""
    return (current - threshold * (1 - decay)) / (threshold * decay)


def logistic(current: Tensor, decay: float, threshold: float) -> Tensor:
    """A sigmoid between the two corners."""
    return torch.sigmoid(3 * (current - threshold * (1 - decay / 2)) / (threshold * decay / 2))


FORMULAS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "`stationary_rate`": formula,
    "straight line": straight,
    "sigmoid": logistic,
}


def errors() -> str:
    """Mean distances from the simulation over the currents between the corners."""
    rows, columns = [], [list[float]() for _ in FORMULAS]
    for decay in DECAYS:
        counted = {theta: simulated(between(decay, theta), decay, theta) for theta in THRESHOLDS}
        for column, rate in zip(columns, FORMULAS.values(), strict=True):
            distances = [(rate(between(decay, t), decay, t) - counted[t]).abs().mean() for t in THRESHOLDS]
            column.append(float(torch.stack(distances).mean()))
        rows.append([f"{decay:g}", *(f"{column[-1]:.4f}" for column in columns)])
    rows.append(["mean", *(f"{sum(column) / len(column):.4f}" for column in columns)])
    return _table(("d_m", *FORMULAS), rows)


def draw_rate(path: Path) -> None:
    """Formula and simulation for some decays."""
    figure, panels = pyplot.subplots(1, 3, figsize=(9, 3.2), sharey=True, layout="constrained")
    for ax, decay in zip(panels, (0.5, 0.8, 0.95), strict=True):
        z = torch.linspace(-0.3, 1.3, 1601, dtype=torch.float64)
        current = 1 - decay + z * decay
        ax.plot(current, simulated(current, decay, 1.0), color="0.6", linewidth=2.5, label="simulated")
        ax.plot(current, logistic(current, decay, 1.0), color="tab:orange", linewidth=1, label="sigmoid")
        ax.plot(current, formula(current, decay, 1.0), color="tab:blue", linewidth=1.2, label="stationary_rate")
        ax.set(title=f"d_m = {decay:g}, threshold = 1", xlabel="current")
    panels[0].set(ylabel="spikes per step")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=100)


def draw_learning(path: Path) -> None:
    """The accuracy of examples/online_digits.py as images go by, by each rule."""
    example = _file(ROOT / "examples" / "online_digits.py")
    figure, ax = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    for rule, colour in (("average", "tab:blue"), ("ottt", "tab:green"), ("bptt", "0.5")):
        points = list(example.learn(rule, passes=2, every=100))
        ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, label=rule)
        sys.stderr.write(f"{rule}: {100 * points[-1][1]:.1f} % after {points[-1][0]} images\n")
    ax.axhline(0.85, color="0.8", linewidth=0.8, zorder=0)
    ax.set(xlabel="images seen, one at a time", ylabel="accuracy on unseen digits", ylim=(0, 1))
    ax.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=100)


# ---- the page --------------------------------------------------------------------------------------------------------


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {"cosines": cosines, "rate errors": errors}
PICTURES: dict[str, Callable[[Path], None]] = {"online_rate": draw_rate, "online_learning": draw_learning}


def page(text: str) -> str:
    """The page with its tables written anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        if not rest or end not in rest:
            raise ValueError(f"{PAGE.name}: no place for the table {name!r}: put in the lines {start!r} and {end!r}")
        text = before + start + "\n" + table() + "\n\n" + end + rest.partition(end)[2]
    return text


def write(*names: str) -> None:
    """Writes what these names say, or all."""
    for name in names or ("tables", "rate", "learning"):
        if name == "tables":
            PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"online_{name}.png"
            PICTURES[f"online_{name}"](path)
            _file(PAGE.with_name("make_figures.py")).keep(path, f"online_{name}")


if __name__ == "__main__":
    write(*sys.argv[1:])
