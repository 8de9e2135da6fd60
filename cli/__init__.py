"""The `tracetorch` command. A subcommand is a module of this folder with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import cast

import tracetorch

# name -> (module, one line of help); a module is imported only when its command is called
COMMANDS = {
    "doctor": ("tracetorch.cli.doctor", "what is installed, what works here, and known hazards"),
    "conformance": ("tracetorch.cli.conformance", "grade simulators of spiking neurons against the float64 reference"),
    "convert": ("tracetorch.cli.convert", "port a network of yours to another framework, with a report"),
    "demo": ("tracetorch.cli.demo", "train an snnTorch network, port it, and show what stayed the same"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` (default: the process's own) and returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="tracetorch", description="Ports spiking networks between frameworks, with proof of what stayed the same."
    )
    parser.add_argument("--version", action="version", version=f"tracetorch {tracetorch.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module_name, description) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=description, description=description)
        if name == called:
            module = import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    run = cast(Callable[[argparse.Namespace], int], args.run)
    return run(args)
