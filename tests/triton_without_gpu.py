"""Triton without a GPU: kernels, what they are compiled to, and a driver that only takes notes of launches."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import tracetorch as tt
from tracetorch.fused.build import build
from tracetorch.fused.graph import Ref
from tracetorch.fused.kernel import geometry

# `make env` brings Triton on Linux, the only system it is built for.
triton = importlib.import_module("triton") if sys.platform == "linux" else pytest.importorskip("triton")

F32, F64, BOOL = torch.float32, torch.float64, torch.bool
POINTERS = {F32: "*fp32", F64: "*fp64"}
X, V, C = Ref(0), Ref(1), Ref(2)
ROOT = Path(__file__).parents[1]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=600, check=False)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def make_layer(n=16):
    return tt.snn.LIB(n, quant_fn=tt.functional.round_ste())


def hard_lif(given):
    """x, v -> spike, v: leaky integration, hard threshold with an arctangent's gradient, reset by subtraction."""
    charged = given["alpha"] * given["v"] + given["x"]
    distance = charged - given["theta"]
    surrogate = distance / (1 + distance.abs())
    spike = (distance >= 0).to(charged.dtype) - surrogate.detach() + surrogate
    return [spike, charged - spike * given["theta"]]


def seven(given):
    """Seven states in a chain of leaks, two sigmoids, ten parameters."""
    drive, new = given["x"], []
    for k in range(7):
        drive = given[f"p{k}"] * given[f"s{k}"] + (1 - given[f"p{k}"]) * drive
        new.append(drive)
    soft = torch.sigmoid(given["p7"] * (new[-1] - given["p8"]))
    spike = soft + (torch.round(soft) - soft).detach()
    new[0] = new[0] - spike * given["p8"] * given["p9"]
    new[-1] = new[-1] * (1 - torch.sigmoid(new[1] * 4))
    return [spike, *new]


STEPS = {
    "lif": (hard_lif, ["v"], ["alpha", "theta"]),
    "seven": (seven, [f"s{k}" for k in range(7)], [f"p{k}" for k in range(10)]),
}


def make_kernel(name: str, dtype: torch.dtype = F32):
    step, states, parameters = STEPS[name]
    return build(step, states, parameters, parameters, dtype, backend="triton", device="cuda")


def make_small():
    """Quickly compiled."""
    return build(lambda given: [given["x"] + given["v"], given["x"]], ["v"], [], [], F32, False, "triton", "cuda")


# ---- instructions ----------------------------------------------------------------------------------------------------


def instructions(ptx: str) -> Counter[str]:
    """The floating point instructions of a kernel, without loads, stores, moves and comparisons."""
    found = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.]*)\s", ptx[ptx.index(".entry") :], re.MULTILINE)
    skipped = ("ld.", "st.", "mov.", "setp.", "selp.")
    return Counter(name for name in found if re.search(r"f32|f64|approx|ftz", name) and not name.startswith(skipped))


def owned(found: Counter[str]) -> dict[str, int]:
    """Fused multiply-adds, divisions, and what is approximate or flushes subnormal numbers."""
    special = {name: n for name, n in found.items() if re.search(r"approx|ftz|full|div|rcp|sqrt|ex2|lg2", name)}
    fma = sum(n for name, n in found.items() if name.startswith("fma"))
    return {**special, **({"fma": fma} if fma else {})}


# ---- launches --------------------------------------------------------------------------------------------------------


class Driver:
    """Triton's view of a GPU: compiles for it, and keeps what would have been launched."""

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 2**17, "multiprocessor_count": 132, "max_num_regs": 2**16, "warpSize": 32}

    def __init__(self):
        self.loaded, self.launched, self.arguments = 0, [], []
        self.utils.load_binary = self.load_binary

    def load_binary(self, *_):
        self.loaded += 1
        return "module", 1, 32, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(*given):
            self.launched.append(given[:4])
            self.arguments.append(given[9:])  # after the function, the metadata and the hooks

        return launch

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


def call(driver, kernel, direction: str, shape: tuple[int, ...], time_dim: int = 0, sizes: int = 1, shift: int = 0):
    """Launch on small tensors that stand for large ones; the grid and the stream. `shift`: floats into their memory."""
    signature = kernel.signature
    names = signature.forward_pointers if direction == "forward" else signature.backward_pointers
    pointers = [None if "record" in name else torch.zeros(64, dtype=kernel.dtype)[shift:] for name in names]
    kernel.call(direction, pointers, geometry(torch.Size(shape), time_dim), (sizes,) * len(signature.parameters))
    return driver.launched[-1]


ROW = 2**17  # elements; compiled sooner than for few


def forbidden(*_, **__):
    raise AssertionError("compiled again")
