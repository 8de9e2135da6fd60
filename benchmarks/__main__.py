"""`python -m benchmarks [NAME ...] [--out FILE]`: the names are the keys of `NAMED`; without any, all."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import torch

from benchmarks import gpu, kernels, layers, online, overhead, peers, ported, seam, unroll

NAMED = {
    "kernels": kernels.main,
    "layers": layers.main,
    "peers": peers.main,
    "unroll": unroll.main,
    "ported": ported.main,
    "overhead": overhead.main,
    "seam": seam.main,
    "online": online.main,
    "gpu": gpu.main,
}


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="Equality first, then medians beside their limits.")
    parser.add_argument("names", nargs="*", choices=[*NAMED, []], help="without any: all")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, {platform.machine()}")
    results = {name: NAMED[name]() for name in given.names or NAMED}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\nwritten: {given.out}")


main()
