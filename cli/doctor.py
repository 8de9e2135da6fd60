"""`tracetorch doctor`: what is installed, in which version, tested with which, what works here, and known hazards.

No framework is imported: versions come from the installed metadata, and the samna stub is recognised by reading its
text. The report is made as plain data (`--json`) and then printed from that data.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import textwrap
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tracetorch as tt
from tracetorch.fused import compiler

Report = dict[str, Any]

# distribution -> (version it was tested with, what it is for). The versions are those of constraints.txt; a test
# compares.
TESTED = {
    "torch": ("2.13.0", "core"),
    "numpy": ("2.4.6", "core"),
    "sinabs": ("3.1.3", "sinabs"),
    "samna": ("0.48.6", "sinabs"),
    "snntorch": ("1.0.0", "snntorch"),
    "spikingjelly": ("2.0.0", "spikingjelly"),
    "torchvision": ("0.28.0", "spikingjelly"),
    "torchaudio": ("2.11.0", "spikingjelly"),
    "norse": ("1.1.0", "norse"),
    "brainpy": ("2.8.2", "brainpy"),
    "brainpy_state": ("0.1.0", "brainpy"),
    "brainstate": ("0.5.4", "brainpy"),
    "braintools": ("0.3.0", "brainpy"),
    "jax": ("0.10.2", "brainpy"),
    "saiunit": ("0.5.2", "brainpy"),
    "nir": ("1.0.4", "nir"),
    "nirtorch": ("2.0.2", "nir"),
    "triton": ("3.6.0", "GPU kernels"),
    "scikit-learn": ("1.9.1", "demo"),
    "matplotlib": ("3.11.2", "demo, report"),
    "rich": ("15.0.0", "demo, report"),
    "safetensors": ("0.8.0", "convert"),
}
OLDEST_TORCH = (2, 6)
NIR_OF_SINABS = (1, 0, 4)  # sinabs 3.1.3 asks for nir up to this one
CPU = "one compiled C kernel a sequence, in unroll and in fused layers: for tensors on the CPU, unless told otherwise"
TRITON = "one compiled Triton kernel a sequence, in the same places: for tensors on a GPU, unless told otherwise"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tracetorch doctor`."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 if something that the core needs is broken, else 0."""
    report = diagnose()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0 if report["ok"] else 1


def diagnose() -> Report:
    """The whole report: `tracetorch`, `python`, `platform`, `packages`, `executors`, `hazards`, `broken`, `ok`."""
    broken = core_faults()
    return {
        "tracetorch": tt.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": packages(),
        "executors": executors(),
        "hazards": hazards(),
        "broken": broken,
        "ok": not broken,
    }


def installed_version(distribution: str) -> str | None:
    """The version in the installed metadata, None if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def public(version: str) -> str:
    """A version without its local part: "2.13.0+cpu" is "2.13.0"."""
    return version.partition("+")[0]


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison: "1.0.4rc1" is (1, 0, 4)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def packages() -> list[Report]:
    """One row a distribution: name, purpose, installed and tested version, and `status`.

    The status is "tested", "untested version" or "not installed".
    """
    rows = []
    for name, (tested, purpose) in TESTED.items():
        installed = installed_version(name)
        if installed is None:
            status = "not installed"
        else:
            status = "tested" if public(installed) == tested else "untested version"
        rows.append({"name": name, "purpose": purpose, "installed": installed, "tested": tested, "status": status})
    return rows


def core_faults() -> list[str]:
    """What stops the core from working, each with its remedy."""
    faults = []
    if release(torch.__version__) < OLDEST_TORCH:
        faults.append(f"torch {torch.__version__} is older than 2.6: install torch>=2.6")
    try:
        bridged = torch.from_numpy(np.arange(3.0)).numpy()
        torch_and_numpy = bridged.tolist() == [0.0, 1.0, 2.0]
    except RuntimeError:  # torch built for another major version of numpy
        torch_and_numpy = False
    if not torch_and_numpy:
        faults.append(
            f"torch {torch.__version__} cannot exchange arrays with numpy {np.__version__}: "
            "install a torch built for this numpy"
        )
    return faults


def executors() -> list[Report]:
    """One row an executor, under the names of `tt.backend`: name, whether it works here, why, and what it would use."""
    device = f"{torch.get_num_threads()} CPU threads"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    fault, fault_of_triton = _cpu_fault(), _triton_fault()
    return [
        {"name": "eager", "works": True, "reason": f"eager torch, {device}" + (f", {gpu}" if gpu else "")},
        {"name": "cpu", "works": fault is None, "reason": fault or CPU, "compiler": c_compiler()},
        {
            "name": "triton",
            "works": fault_of_triton is None,
            "reason": fault_of_triton or TRITON,
            "triton": locate("triton") is not None,
            "gpu": gpu,
        },
    ]


def _cpu_fault() -> str | None:
    """Why a kernel cannot be compiled and run here, or None: one is."""
    try:
        return _kernel_fault("cpu", "cpu")
    except (tt.fused.BackendError, tt.fused.CompilerError, OSError) as error:
        return str(error)


def _triton_fault() -> str | None:
    """Likewise of a Triton kernel."""
    try:
        return _kernel_fault("triton", "cuda" if torch.cuda.is_available() else "cpu")
    except tt.fused.BackendError as error:
        return str(error)
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        return f"{type(error).__name__}: {error}"


def _kernel_fault(backend: str, device: str) -> str | None:
    layer = tt.snn.LI(1, beta=0.5).to(device)
    with tt.backend(backend), torch.no_grad():
        answer = layer.unroll(torch.ones(2, 1, 1, device=device)).flatten().tolist()
    return None if answer == [1.0, 1.5] else f"a kernel computed {answer} instead of [1.0, 1.5]"


def c_compiler() -> Report | None:
    """The C compiler that the engine would use: its command and version line."""
    found = compiler.find()
    return None if found is None else {"command": shlex.join(found[0]), "version": found[1]}


def hazards() -> list[Report]:
    """The known hazards: name, whether it is present here, what happens, and what to do."""
    nir = installed_version("nir")
    sinabs, snntorch, spikingjelly = (installed_version(name) for name in ("sinabs", "snntorch", "spikingjelly"))
    foreign = installed_version("tracetorch")
    nir_too_new = sinabs is not None and nir is not None and release(nir) > NIR_OF_SINABS
    return [
        {
            "name": "samna stub",
            "present": is_samna_stub(samna_source()),
            "what": "the package index's samna is a stub: importing it runs `pip install --force-reinstall samna` from "
            "another index. Importing sinabs does not import it; its chip back ends (sinabs.backend.dynapcnn) do",
            "remedy": "install the real samna from its vendor's index before using a chip; else never import samna",
        },
        {
            "name": "another tracetorch",
            "present": foreign is not None,
            "what": "the distribution called `tracetorch` on the package index is another project, and writes into the "
            "same package folder as this one (tracetorch-interop)",
            "remedy": "pip uninstall tracetorch, then install tracetorch-interop again",
        },
        {
            "name": "nir versions",
            "present": nir_too_new or (sinabs is not None and spikingjelly is not None),
            "what": "sinabs 3.1.3 asks for nir<=1.0.4; the NIR exporters of SpikingJelly 2.0 ask for nir>=1.0.7 and "
            "those of snnTorch 1.0 need nir>=1.0.6. One environment cannot have both, and NIR's meaning of a reset "
            "changed between them",
            "remedy": "use SpikingJelly's or snnTorch's own NIR exporter in an environment without sinabs",
        },
        {
            "name": "snntorch.utils.reset",
            "present": snntorch is not None,
            "what": "snntorch.utils.reset(net) zeroes the hidden states of every instance in the process of each "
            "neuron class found in net, other networks' too",
            "remedy": "call reset_mem() of each neuron of net instead",
        },
    ]


def locate(name: str) -> str | None:
    """The file that importing the top-level module `name` would run, found without importing; None if there is none."""
    try:
        spec = find_spec(name)
    except ValueError:  # already in sys.modules, as a None that blocks it or without a spec
        return None
    return spec.origin if spec is not None else None


def samna_source() -> Path | None:
    """The file that `import samna` would run, found without running it."""
    origin = locate("samna")
    if origin is None:
        try:
            files = metadata.files("samna") or []
        except metadata.PackageNotFoundError:
            return None
        origin = next((str(file.locate()) for file in files if file.as_posix() == "samna/__init__.py"), None)
    return Path(origin) if origin is not None else None


def is_samna_stub(source: Path | None) -> bool:
    """Whether a samna's `__init__.py` is the one that installs another samna when it is run."""
    if source is None or source.suffix != ".py" or not source.is_file():
        return False
    text = source.read_text(encoding="utf-8", errors="replace")
    return "PYPI_SAMNA" in text or ("--force-reinstall" in text and "subprocess" in text)


def render(report: Report) -> str:
    """The report as plain text."""
    lines = [f"tracetorch {report['tracetorch']}, Python {report['python']}, {report['platform']}", "", "Installed"]
    for row in report["packages"]:
        tested = f"tested with {row['tested']}" if row["tested"] else "not used yet"
        mark = "  (another version than tested)" if row["status"] == "untested version" else ""
        lines.append(f"  {row['name']:<14} {row['installed'] or '-':<16} {tested:<22} {row['purpose']}{mark}")
    lines += ["", "Executors"]
    for row in report["executors"]:
        lines.append(f"  {row['name']:<14} {'works' if row['works'] else 'no':<16} {row['reason']}")
        if row["name"] == "cpu":
            chosen = row["compiler"]
            found = f"{chosen['command']}: {chosen['version']}" if chosen else "none found ($CC, cc, gcc, clang)"
            lines.append(f"  {'':<31} C compiler: {found}")
        if row["name"] == "triton":
            triton = "installed" if row["triton"] else "not installed"
            lines.append(f"  {'':<31} triton: {triton}; GPU: {row['gpu'] or 'none'}")
    lines += ["", "Hazards here"]
    for row in report["hazards"]:
        if row["present"]:
            text = f"{row['name']}: {row['what']}. Remedy: {row['remedy']}."
            lines += textwrap.wrap(text, width=100, initial_indent="  ", subsequent_indent="    ")
    if not any(row["present"] for row in report["hazards"]):
        lines.append("  none of those known")
    lines += ["", "Core"]
    lines += [f"  BROKEN: {fault}" for fault in report["broken"]] or ["  works"]
    return "\n".join(lines)
