"""Writes the pictures of docs/images, with few colours: `python docs/make_figures.py [name]`, without a name all."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import pyplot
from PIL import Image

import tracetorch as tt
from tracetorch.cli import main

IMAGES = Path(__file__).with_name("images")
COLOURS = 64


def keep(path: Path, name: str) -> None:
    """A picture in the fewest colours that it needs."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    IMAGES.mkdir(exist_ok=True)
    small.save(IMAGES / f"{name}.png", optimize=True)


def demo(folder: Path) -> None:
    """Runs the whole demo (about a minute) and keeps its picture."""
    if main(["demo", "--out", str(folder)]):
        raise SystemExit("the demo failed, so its picture is not kept")


def single_neuron(folder: Path) -> None:
    """The potentials of docs/single-neuron.md."""
    inputs = torch.tensor([0.09, 0.12, 0.2, 0.35])
    spikes, states = tt.nn.LIFNeuron().trace(inputs.expand(60, 4))
    figure, panels = pyplot.subplots(4, 1, figsize=(7, 5), sharex=True, sharey=True, layout="constrained")
    for n, (ax, current) in enumerate(zip(panels, inputs.tolist(), strict=True)):
        tt.plot.membrane(states["potential"][:, n], 1.0, spikes[:, n], ax, title=f"I = {current:g}")
        ax.set(ylabel="potential", xlabel="step" if n == 3 else "")
    figure.savefig(folder / "single_neuron.png", dpi=100)


PICTURES: dict[str, Callable[[Path], None]] = {"demo": demo, "single_neuron": single_neuron}


def write(*names: str) -> None:
    """Draws the pictures of these names, or all."""
    for name in names or PICTURES:
        with tempfile.TemporaryDirectory() as folder:
            PICTURES[name](Path(folder))
            keep(Path(folder) / f"{name}.png", name)


if __name__ == "__main__":
    write(*sys.argv[1:])
