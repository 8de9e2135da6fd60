"""`tracetorch convert package.module:factory --to sinabs --sample x.npy --out folder`: port a network from the shell.

Exit status: 0 if the conversion agrees, 1 if it was refused or does not agree, 2 if something given cannot be used.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tracetorch as tt
from tracetorch import adapters
from tracetorch.adapters.networks import rebuild
from tracetorch.core.topology import FileError

_HELP = (
    "package.module:factory, a function (or class) of yours that is called without arguments and returns the network. "
    "It is imported and called: run only code that you trust"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("network", metavar="PACKAGE.MODULE:FACTORY", help=_HELP)
    parser.add_argument(
        "--to",
        required=True,
        choices=adapters.FRAMEWORKS,
        help="the target framework; of spikingjelly and norse no networks are written",
    )
    parser.add_argument("--sample", required=True, metavar="FILE.npy", help="what the network's forward takes")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="written anew; must not exist, or be empty")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a state dict for the network: .safetensors, or .pt, read with weights_only=True; nothing is unpickled",
    )
    parser.add_argument(
        "--time-dim",
        type=int,
        metavar="D",
        help="of the sample, for a network called step by step; without it the sample is one step",
    )
    parser.add_argument("--stock", action="store_true", help="only the target framework's own layers")
    parser.add_argument("--allow-approximate", action="store_true", help="write it even where a choice is lost")


class _Unusable(Exception):
    """Something that was given; says what, and what to do."""


def _factory(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not attribute or not module_name:
        raise _Unusable(f"{name!r} is no network; write package.module:factory")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise _Unusable(f"{name!r} cannot be imported from here: {error}") from error
    finally:
        sys.path.pop(0)
    try:
        network = factory()
    except Exception as error:  # the user's own code: whatever it raises
        raise _Unusable(f"{name!r} was called without arguments, and raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise _Unusable(f"{name!r} gave {type(network).__name__}; it must return a torch.nn.Module")
    return network.eval()


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise _Unusable("safetensors is not installed; from the checkout: pip install -e '.[convert]'") from error


def _weights(path: str) -> dict[str, torch.Tensor]:
    try:
        if path.endswith(".safetensors"):
            found: dict[str, torch.Tensor] = _safetensors().load_file(path)
            return found
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except _Unusable:
        raise
    except Exception as error:  # whatever the readers raise on a file that is none of theirs
        raise _Unusable(f"{path!r} cannot be read as weights: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise _Unusable(f"{path!r} holds no state dict, {{name: tensor}}")
    return loaded


def _sample(path: str) -> torch.Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _Unusable(f"{path!r} cannot be read as an array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise _Unusable(f"{path!r} holds no array of numbers")
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _folder(path: str) -> Path:
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise _Unusable(f"{path!r} exists and is not an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _converted(
    network: nn.Module, to: str, sample: torch.Tensor, time_dim: int | None, options: dict[str, Any]
) -> adapters.Conversion:
    try:
        return adapters.convert(network, to=to, sample=sample, time_dim=time_dim, **options)
    except RuntimeError as error:  # torch's, of a module that the sample does not fit
        taken = "as it is; --time-dim D, if it is called step by step" if time_dim is None else "step by step"
        raise _Unusable(f"{error}; the network was given the sample, {list(sample.shape)}, {taken}") from error


def _refuse_code(result: adapters.Conversion, to: str) -> None:
    """Raises `ConversionError` for a target that runs the source's own forward: no file holds that."""
    if result.stepped:
        why = f"a file would have to hold the network's own code ({'; '.join(result.report.remarks)})"
        remedy = f"convert it in Python: tt.convert(net, '{to}', sample)"
        raise adapters.ConversionError("''", "forward", type(result.model).__name__, why, remedy)


def _write(folder: Path, result: adapters.Conversion, to: str) -> list[str]:
    """The files of a result; returns their names."""
    written = ["weights.safetensors", "network.py", "report.txt", "report.json", "report.html"]
    source = _NATIVE if to == "tracetorch" else rebuild.source(result.model)
    if to == "tracetorch":  # first, for it may be refused
        tt.save(folder / "network.tt", result.model)
        written.append("network.tt")
    # Each tensor by itself: safetensors refuses two names of one memory.
    state = {name: tensor.detach().clone().contiguous() for name, tensor in result.model.state_dict().items()}
    _safetensors().save_file(state, str(folder / "weights.safetensors"))
    (folder / "network.py").write_text(source + (_LOADING if to != "tracetorch" else ""), encoding="utf-8")
    (folder / "report.txt").write_text(f"{result.agreement}\n", encoding="utf-8")
    (folder / "report.html").write_text(result.agreement.to_html(), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(result.agreement.to_dict(), indent=1), encoding="utf-8")
    return written


_NATIVE = '''"""A converted network: `load()` gives it with its weights."""

from pathlib import Path

import tracetorch as tt


def load():
    return tt.load(Path(__file__).with_name("network.tt"))
'''
_LOADING = '''

def load():
    """The network with its weights, in evaluation mode."""
    from pathlib import Path

    from safetensors.torch import load_file

    network = build()
    network.load_state_dict(load_file(str(Path(__file__).with_name("weights.safetensors"))))
    return network.eval()
'''


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    try:
        network = _factory(args.network)
        if args.weights is not None:
            network.load_state_dict(_weights(args.weights))
        sample = _sample(args.sample)
        _safetensors()
        options: dict[str, Any] = {"stock": args.stock, "allow_approximate": args.allow_approximate}
        result = _converted(network, args.to, sample, args.time_dim, options)
        _refuse_code(result, args.to)
        folder = _folder(args.out)
        written = _write(folder, result, args.to)
    except (adapters.ConversionError, FileError) as error:
        print(f"tracetorch convert: refused: {error}", file=sys.stderr)
        return 1
    except (_Unusable, ImportError, RuntimeError) as error:
        print(f"tracetorch convert: {error}", file=sys.stderr)
        return 2
    print(result.agreement)
    print(f"written to {folder}: {', '.join(written)}")
    return 0 if result.agreement.ok else 1
