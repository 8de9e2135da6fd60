"""Writes docs/images/demo.png, the picture of `tracetorch demo`, with fewer colours: `python docs/make_figures.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from tracetorch.cli import main

IMAGES = Path(__file__).with_name("images")
COLOURS = 64


def write() -> None:
    """Runs the whole demo (about a minute) and keeps its picture."""
    with tempfile.TemporaryDirectory() as folder:
        if main(["demo", "--out", folder]):
            raise SystemExit("the demo failed, so its picture is not kept")
        with Image.open(Path(folder) / "demo.png") as picture:
            small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    IMAGES.mkdir(exist_ok=True)
    small.save(IMAGES / "demo.png", optimize=True)


if __name__ == "__main__":
    write()
