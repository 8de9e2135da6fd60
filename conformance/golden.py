"""Golden vectors: every case as files that any language can read, `<case>.json` and `<case>.npz`.

The JSON document (schema 1): `case`, `version`, `requirement`, `text`; `spec`, the `NeuronSpec`; `calls`, the lengths
of the calls; `arrays`, the names, shapes and meanings of the arrays in the npz, all of them float32 (float64 where the
input is), C order, stored uncompressed. They are the oracle's own run in float64, from the initial state, rounded once:
a simulator that starts from the same state may differ by its own rounding, and after a spike decided within it by more.
The verdicts of this package, which restart from the simulator's own states, are the judge; the files are for a first
look without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tracetorch.conformance.cases import Array, Case
from tracetorch.conformance.catalogue import catalogue
from tracetorch.conformance.protocol import write_npz

SCHEMA = 1
FOLDER = Path(__file__).with_name("golden")
_MEANINGS = {
    "x": "the input, [T, B, N]",
    "outputs": "spikes times spike_scale, or the membrane, [T, B, N]",
    "state.v_mem": "the membrane after every step, stored before or after its reset as the spec says, [T, B, N]",
    "state.i_syn": "the synaptic current after every step, [T, B, N]",
    "state.i_exc": "the exciting current e after every step, [T, B, N]",
    "state.i_inh": "the inhibiting current i after every step, [T, B, N]",
    "state.adaptation": "the adaptation n of the threshold after every step, [T, B, N]",
    "grad_output": "dL/doutputs, [T, B, N]",
    "grad.x": "dL/dx, [T, B, N]",
}


def arrays(case: Case) -> dict[str, Array]:
    """The arrays of a case's npz file, float64 where they are the oracle's."""
    recording = case.truth[0]
    found = {"x": case.x, "outputs": recording.outputs}
    found |= {f"state.{name}": recording.states[name] for name in case.spec.states}
    if case.grad_output is not None:
        found["grad_output"] = case.grad_output
        found |= {f"grad.{name}": gradient for name, gradient in case.gradients().items()}
    return found


def _single(array: Array) -> Array:
    with np.errstate(under="ignore", over="ignore"):
        return np.asarray(array, dtype=np.float32)


def files(case: Case) -> dict[str, bytes]:
    """File name -> content, the same bytes every time."""
    found = arrays(case)
    described = {
        name: {"shape": list(array.shape), "meaning": _MEANINGS.get(name, "dL/d of the raw parameter, in its shape")}
        for name, array in found.items()
    }
    document = {
        "schema": SCHEMA,
        "case": case.name,
        "version": case.version,
        "requirement": case.requirement,
        "text": case.text,
        "spec": case.spec.to_dict(),
        "calls": list(case.lengths),
        "arrays": described,
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    double = case.x.dtype == np.float64
    content = write_npz({name: np.asarray(a, np.float64) if double else _single(a) for name, a in found.items()})
    return {f"{case.name}.json": text.encode("ascii"), f"{case.name}.npz": content}


def _all(cases: Iterable[Case] | None) -> dict[str, bytes]:
    chosen = catalogue().values() if cases is None else cases
    return {name: content for case in chosen for name, content in files(case).items()}


def write(folder: Path = FOLDER, cases: Iterable[Case] | None = None) -> None:
    """Writes the files; takes out those of cases that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = _all(cases)
    for name, content in wanted.items():
        (folder / name).write_bytes(content)
    for path in folder.iterdir():
        if path.suffix in (".json", ".npz") and path.name not in wanted:
            path.unlink()


def stale(folder: Path = FOLDER, cases: Iterable[Case] | None = None) -> list[str]:
    """Names of files that are missing, superfluous or not what `write` would write."""
    wanted = _all(cases)
    found = {p.name: p for p in folder.iterdir()} if folder.is_dir() else {}
    wrong = [name for name, content in wanted.items() if name not in found or found[name].read_bytes() != content]
    return sorted([*wrong, *(name for name in found if name not in wanted)])
