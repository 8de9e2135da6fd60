"""`tracetorch demo`: train an snnTorch network on handwritten digits, port it, and show what stayed the same.

The network, the data (scikit-learn's 8 x 8 digits, as random spikes over time) and the training are a user's. The
ported networks are judged by `adapters`: every layer, on every held-out digit. The exit status is 0 only if native
traceTorch was bit-identical and sinabs differed by nothing but explained rounding; else 1, and 2 if it could not run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tracetorch
from tracetorch import adapters

Array = np.ndarray[Any, Any]
EXTRAS = ("snntorch", "sinabs", "sklearn", "matplotlib", "rich")
REMEDY = "pip install -e '.[demo,snntorch,sinabs]'"
ALLOWED = 1e-5  # explained mismatches of sinabs, as a fraction of all spike slots
WATCHED = "hidden_lif"  # the layer in the picture
# framework -> title, colour, and what its neurons store, in the picture
STORED = {"snntorch": "mem", "tracetorch": "v_mem"}  # attributes; sinabs records
SHOWN = {
    "snntorch": ("snnTorch, the trained network", "#2b6cb0", "stored before the reset"),
    "tracetorch": ("traceTorch, ported", "#2f855a", "stored before the reset"),
    "sinabs": ("sinabs, ported", "#c05621", "stored after the reset"),
}
LEGEND = """Above: when each neuron fired.
A spike that differs from snnTorch
would be circled in red.

Here: the membrane of one neuron
(number {neuron}, yellow above) as each
framework stores it. Triangles:
its spikes. Grey: snnTorch's curve.

sinabs stores it after the reset.
Open circles: the reset added back."""


@dataclass(frozen=True)
class Settings:
    """How large the demo is: time steps per digit, passes over the training digits, digits; `batch` of them timed."""

    steps: int = 25
    epochs: int = 16
    seed: int = 0
    train: int = 1347
    held_out: int = 450
    batch: int = 64
    quick: bool = False


QUICK = Settings(steps=12, epochs=2, train=640, held_out=48, batch=24, quick=True)


@dataclass(frozen=True)
class Data:
    """Digits: `train` [N, 1, 8, 8] intensities in 0..1, `test` [T, M, 1, 8, 8] spikes, and their labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Outcome:
    """One target, measured on the held-out digits, beside the source on the same."""

    framework: str
    conversion: adapters.Conversion
    agreement: adapters.Agreement
    digits: int
    correct: int
    source_correct: int
    milliseconds: float
    source_milliseconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
        return int(text)

    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for demo.png and demo.json")
    parser.add_argument("--epochs", type=positive, help=f"passes over the training digits (default {Settings.epochs})")
    parser.add_argument("--steps", type=positive, help=f"time steps per digit (default {Settings.steps})")
    parser.add_argument("--seed", type=int, help="of weights, spikes and the digits' order (default 0)")
    parser.add_argument("--quick", action="store_true", help="a few seconds: too little training for a good accuracy")


def run(args: argparse.Namespace) -> int:
    """Runs the demo: 0 if all of it holds, 1 if not, 2 if it could not run."""
    remedy = REMEDY
    try:
        for name in EXTRAS:
            import_module(name)
        remedy = "another --out"
        args.out.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        print(f"tracetorch demo cannot run: {error}\nremedy: {remedy}", file=sys.stderr)
        return 2
    given = {name: getattr(args, name) for name in ("steps", "epochs", "seed") if getattr(args, name) is not None}
    settings = replace(QUICK if args.quick else Settings(), **given)
    with ExitStack() as stack:
        # One thread: the tensors are small, and on a busy machine several wait for each other, ten times as long.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(settings.seed)
        return _demo(settings, args.out)


def _demo(settings: Settings, out: Path) -> int:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 120
    data, network = load(settings), build_network()
    train(network, data, settings, console)
    outcomes, failures = [], []
    for framework in ("tracetorch", "sinabs"):
        with console.status(f"porting to {framework}, and judging every layer on {settings.held_out} digits"):
            try:
                outcome = compare(network, framework, data, settings)
            except adapters.ConversionError as error:
                failures.append(f"{framework}: not converted: {error}")
                continue
        outcomes.append(outcome)
        failures += failed(outcome)
        show(console, outcome, settings)
    facts = json.dumps(summary(outcomes, failures, settings), indent=2, allow_nan=False)
    (out / "demo.json").write_text(facts + "\n", encoding="utf-8")
    draw(network, outcomes, data, out / "demo.png")
    console.print(f"written: {out / 'demo.png'}, {out / 'demo.json'}", soft_wrap=True, highlight=False, markup=False)
    for failure in failures:
        console.print(f"FAILED  {failure}", style="bold red", markup=False, highlight=False)
    if not failures:
        console.print("Still the same network: native bit-identical, sinabs equal up to rounding.", style="bold green")
    return 1 if failures else 0


# ---------------------------------------------------------------- a user's network


def load(settings: Settings) -> Data:
    """scikit-learn's digits, a stratified part of them held out and coded as spikes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    sizes = {"train_size": settings.train, "test_size": settings.held_out}
    rest, held = train_test_split(range(len(labels)), stratify=labels, random_state=settings.seed, **sizes)
    return Data(images[rest], labels[rest], encode(images[held], settings.steps), labels[held])


def encode(images: Tensor, steps: int) -> Tensor:
    """Rate code: [N, ...] intensities to [steps, N, ...] spikes, each with the intensity as its probability."""
    return torch.bernoulli(images.expand(steps, *images.shape))


def build_network() -> nn.Sequential:
    """snnTorch neurons with the default reset; one layer learns a decay and a threshold for each neuron."""
    import snntorch

    beta, threshold = torch.empty(64).uniform_(0.75, 0.95), torch.ones(64)
    layers: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(1, 8, kernel_size=3, padding=1)),
        ("conv_lif", snntorch.Leaky(beta=0.8, init_hidden=True)),
        ("pool", nn.AvgPool2d(2)),
        ("flatten", nn.Flatten()),
        ("hidden", nn.Linear(8 * 4 * 4, 64)),
        (WATCHED, snntorch.Leaky(beta, threshold, init_hidden=True, learn_beta=True, learn_threshold=True)),
        ("output", nn.Linear(64, 10)),
        ("output_lif", snntorch.Leaky(beta=0.9, init_hidden=True, learn_threshold=True)),
    ]
    return nn.Sequential(OrderedDict(layers))


def run_source(network: nn.Sequential, xs: Tensor) -> Tensor:
    """An snnTorch network over [T, B, ...] from rest, as its users run it."""
    for name, layer in network.named_children():
        if name.endswith("_lif"):
            layer.reset_mem()  # type: ignore[operator]
    return torch.stack([network(x) for x in xs])


def train(network: nn.Sequential, data: Data, settings: Settings, console: Any) -> None:
    """Adam on the cross entropy of spike rates; the digits are coded afresh every time."""
    from rich.progress import track

    start = time.perf_counter()
    named = list(network.named_parameters())
    weights, neurons = ([p for name, p in named if ("_lif" in name) == neuron] for neuron in (False, True))
    optimizer = torch.optim.Adam([{"params": weights, "lr": 4e-3}, {"params": neurons, "lr": 1e-3}])
    batches = [part for _ in range(settings.epochs) for part in torch.randperm(len(data.train)).split(64)]
    for part in track(batches, f"training in snnTorch, {settings.epochs} epochs", console=console):
        rates = run_source(network, encode(data.train[part], settings.steps)).mean(0)
        loss = nn.functional.cross_entropy(8 * rates, data.train_labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    console.print(f"trained in {time.perf_counter() - start:.0f} s\n")


# ---------------------------------------------------------------- port it and compare


def compare(network: nn.Sequential, framework: str, data: Data, settings: Settings) -> Outcome:
    """Port the network; judge every layer and count the right answers on the held-out digits."""
    sample = encode(data.train[:16], settings.steps)
    conversion = adapters.convert(network, to=framework, sample=sample, time_dim=0)
    agreement = conversion.verify(data.test, grad=True)
    with torch.no_grad():
        answers = [each.sum(0).argmax(-1) for each in (conversion.run(data.test), run_source(network, data.test))]
        batch = data.test[:, : settings.batch]
        times = _medians([lambda: conversion.run(batch), lambda: run_source(network, batch)])
    correct = [int((answer == data.test_labels).sum()) for answer in answers]
    return Outcome(framework, conversion, agreement, len(data.test_labels), *correct, *times)


def _medians(calls: Sequence[Callable[[], Any]], repeats: int = 9) -> list[float]:
    """Milliseconds of each call: the median of several, the calls taking turns, after one that does not count."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + repeats):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times[1:]) for times in taken]


def failed(o: Outcome) -> list[str]:
    """What should hold of a target and does not."""
    a = o.agreement
    faults = [f"{row.name}: approximate: {row.reason}" for row in a if row.forward == "approximate"]
    faults += [f"{row.name}: it never fired, which shows nothing" for row in a if row.neuron and not row.spikes]
    faults += [f"{name}: not the source's value any more" for name in a.changed_parameters]
    if a.unexplained_mismatches:
        faults.append(f"{a.unexplained_mismatches:,} spike mismatches that no rounding explains")
    if not math.isfinite(a.gradient_error) or not math.isfinite(a.max_state_difference):
        faults.append(f"state difference {a.max_state_difference}, gradient error {a.gradient_error}: not finite")
    native = o.framework == "tracetorch"
    if native:
        faults += [f"{row.name}: {row.forward}, should be exact" for row in a if row.forward == "rounding"]
    if a.spike_mismatches > (0 if native else ALLOWED * a.spike_slots):
        limit = "should be 0" if native else f"more than 1 in {1 / ALLOWED:,.0f}"
        faults.append(f"{a.spike_mismatches:,} of {a.spike_slots:,} spikes differ: {limit}")
    if abs(o.correct - o.source_correct) > (0 if native else 1):
        faults.append(f"{o.correct} of {o.digits} digits right, {o.source_correct} in the source")
    return [f"{o.framework}: {fault}" for fault in faults]


# ---------------------------------------------------------------- what is shown


def show(console: Any, o: Outcome, settings: Settings) -> None:
    """A table of the layers, and under it the figures of the whole network."""
    from rich.table import Table

    a, colours = o.agreement, {"exact": "green", "rounding": "cyan", "reparametrised": "cyan"}
    layers = Table(title=f"snntorch -> {o.framework}", title_style="bold", title_justify="left")
    for column in ("layer", "forward", "gradient", "spikes that differ", "how it was met"):
        layers.add_column(column, justify="right" if column.startswith("spikes") else "left")
    for row in a:
        verdicts = [f"[{colours.get(verdict, 'red')}]{verdict}[/]" for verdict in (row.forward, row.gradient)]
        spikes = f"{row.spike_mismatches:,} of {row.slots:,}" if row.neuron else ""
        layers.add_row(row.name, *verdicts, spikes, row.reason.replace("[", r"\["))
    right = f"({o.correct} and {o.source_correct} of {o.digits} held-out digits)"
    times = f"{o.milliseconds:.1f} ms, in snnTorch {o.source_milliseconds:.1f} ms; median of several, one thread"
    figures = Table.grid(padding=(0, 2))
    for line in (
        ("test accuracy", f"{o.correct / o.digits:.2%}, in snnTorch {o.source_correct / o.digits:.2%} {right}"),
        ("spike mismatches", f"{a.spike_mismatches:,} of {a.spike_slots:,}, {a.unexplained_mismatches:,} unexplained"),
        ("largest state difference", f"{a.max_state_difference:.2g}"),
        ("gradient agreement", f"relative error at most {a.gradient_error:.2g}, against the float64 oracle"),
        (f"time per {settings.batch} digits", times),
    ):
        figures.add_row(*line)
    console.print(layers, figures, "")


def summary(outcomes: Sequence[Outcome], failures: Sequence[str], settings: Settings) -> dict[str, Any]:
    """What demo.json holds; a measured number that is not finite is null there."""
    measured = ("spike_mismatches", "unexplained_mismatches", "spike_slots", "max_state_difference", "gradient_error")
    targets = {}
    for o in outcomes:
        numbers = {name: getattr(o.agreement, name) for name in measured}
        targets[o.framework] = {
            "accuracy": o.correct / o.digits,
            "source_accuracy": o.source_correct / o.digits,
            **{name: number if math.isfinite(number) else None for name, number in numbers.items()},
            "milliseconds": o.milliseconds,
            "source_milliseconds": o.source_milliseconds,
            "layers": [{k: getattr(r, k) for k in ("name", "forward", "gradient", "reason")} for r in o.agreement],
        }
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "snntorch", "sinabs", "scikit-learn")}
    facts = {"ok": not failures, "failures": list(failures), "source": "snntorch", **asdict(settings)}
    return {**facts, "versions": {"tracetorch": tracetorch.__version__, **versions}, "targets": targets}


# ---------------------------------------------------------------- the picture


def watch(framework: str, model: nn.Module, call: Callable[[Tensor], Any], xs: Tensor) -> list[Array]:
    """Run one digit [T, 1, ...]: the spikes of the watched layer and its membranes as stored, both [T, neurons]."""
    layer: Any = model.get_submodule(WATCHED)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_module: nn.Module, _inputs: Any, spikes: Tensor) -> None:
        stored = layer.recordings if framework == "sinabs" else {"v_mem": getattr(layer, STORED[framework])}
        seen.append((spikes.flatten(0, -2), stored["v_mem"].flatten(0, -2)))

    hook = layer.register_forward_hook(look)
    if framework == "sinabs":
        layer.record_states = True
    with torch.no_grad():
        call(xs)
    hook.remove()
    if framework == "sinabs":
        layer.record_states = False
    return [torch.cat(parts).numpy() for parts in zip(*seen, strict=True)]


def draw(network: nn.Sequential, outcomes: Sequence[Outcome], data: Data, path: Path) -> None:
    """One held-out digit in every framework, a column each: all spikes of a layer, the membrane of one neuron."""
    from matplotlib.figure import Figure

    xs = data.test[:, :1]
    source = watch("snntorch", network, lambda x: run_source(network, x), xs)
    ported = {o.framework: watch(o.framework, o.conversion.model, o.conversion.run, xs) for o in outcomes}
    seen = {"snntorch": source, **ported}
    neuron = int(np.abs(source[0].sum(0) - len(xs) / 4).argmin())
    figure = Figure(figsize=(16, 9), layout="constrained")
    totals = [f"{o.framework} {o.agreement.spike_mismatches:,} of {o.agreement.spike_slots:,}" for o in outcomes]
    proof = f"spikes that differ over all {len(data.test_labels)} held-out digits: {', '.join(totals)}"
    figure.suptitle(f"One network, one handwritten digit, three frameworks\n{proof}", fontsize=18)
    axes = figure.subplots(2, 1 + len(seen), width_ratios=[0.75] + [1] * len(seen), sharex="col", sharey=False)
    axes[0, 0].imshow(xs.mean(0)[0, 0].numpy(), cmap="gray_r", extent=(0, 1, 0, 1))
    axes[0, 0].set(title=f"a {data.test_labels[0]}, shown to all three as\n{len(xs)} frames of random spikes")
    axes[0, 0].axis("off")
    axes[1, 0].axis("off")
    axes[1, 0].text(0, 1, LEGEND.format(neuron=neuron), va="top", fontsize=13, linespacing=1.35)
    layer: Any = network.get_submodule(WATCHED)
    threshold, decay = layer.threshold[neuron].item(), layer.beta[neuron].clamp(0, 1).item()
    for column, (framework, each) in enumerate(seen.items(), 1):
        _raster(axes[0, column], framework, each[0], source[0], neuron)
        reset = threshold / decay if framework == "sinabs" else 0.0
        _traces(axes[1, column], framework, [a[:, neuron] for a in (*each, source[1])], threshold, reset)
        axes[1, column].sharey(axes[1, 1])
    figure.savefig(path, dpi=100)


def _raster(axis: Any, framework: str, spikes: Array, source: Array, neuron: int) -> None:
    title, colour, _ = SHOWN[framework]
    differ = np.argwhere(spikes != source)
    note = f"{spikes.sum():,.0f} spikes" if spikes is source else f"{len(differ)} of {spikes.size:,} spikes differ"
    axis.set_title(f"{title}\n{note}", color=colour, fontsize=15, fontweight="bold")
    axis.axhspan(neuron - 0.5, neuron + 0.5, color="gold", alpha=0.6)
    axis.scatter(*spikes.nonzero(), s=14, marker="s", color=colour)
    axis.scatter(*differ.T, s=60, facecolors="none", edgecolors="red")
    axis.set(ylabel=f"neuron of {WATCHED}", ylim=(-1, spikes.shape[1]))


def _traces(axis: Any, framework: str, curves: Sequence[Array], threshold: float, reset: float) -> None:
    (_, colour, stored), (spikes, membrane, source) = SHOWN[framework], curves
    fired = spikes.nonzero()[0]
    axis.plot(source, color="0.8", linewidth=6)
    axis.plot(membrane, "o-", color=colour, markersize=4)
    if reset:
        axis.plot(fired, membrane[fired] + reset, "o", markersize=9, markerfacecolor="none", color=colour)
    axis.axhline(threshold, color="black", linestyle="--", linewidth=1)
    axis.plot(fired, np.full(len(fired), source.max() + 0.2 * np.ptp(source)), "v", color=colour, markersize=9)
    axis.set_title(stored, color=colour, fontsize=13)
    axis.set(xlabel="time step", ylabel="membrane (dashed: threshold)")
