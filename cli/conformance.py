"""`tracetorch conformance`: grade simulators against the oracle; `tracetorch conformance bisect A B`: where two part.

Exit status: 0 if every divergence is a listed one, 1 if not (for bisect: if they part), 2 if it could not run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tracetorch import conformance
from tracetorch.conformance import golden
from tracetorch.conformance.bisection import bisect
from tracetorch.fused.executor import BackendError

# Graded where nothing is asked for: those of them that run here.
_OURS = ("tracetorch", "tracetorch-cpu", "tracetorch-triton")
_DEFAULT = (*_OURS, "sinabs", "snntorch", "spikingjelly", "norse", "brainpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("action", nargs="*", metavar="bisect A B", help="find the smallest case in which A and B part")
    names = ", ".join(conformance.SUBJECTS)
    parser.add_argument("--subjects", nargs="+", metavar="NAME", help=f"of: {names}")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="cases, requirements or groups of requirements")
    parser.add_argument(
        "--subject-cmd",
        action="append",
        default=[],
        metavar="COMMAND",
        help='a subject that is a command, such as "python mine.py"; may be given more than once',
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds a command may take for a call"
    )
    parser.add_argument("--html", metavar="FILE", help="write the results as one page")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--conversions", action="store_true", help="carry every case from framework to framework and back instead"
    )
    parser.add_argument("--golden", metavar="DIR", help="write the golden vectors into a folder, and do nothing else")
    parser.add_argument("--list", action="store_true", help="list the cases, and do nothing else")


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line[:100]}")
        sys.stderr.flush()


def _subjects(args: argparse.Namespace, names: Sequence[str], stack: ExitStack) -> list[conformance.Subject]:
    found: list[conformance.Subject] = [conformance.subject(name) for name in names]
    for command in args.subject_cmd:
        found.append(stack.enter_context(conformance.ChildSubject(shlex.split(command), args.timeout)))
    return found


def _available(names: Iterable[str]) -> list[str]:
    """Those of the subjects that run here; says which do not, and why."""
    found = []
    for name in names:
        try:
            conformance.subject(name)
        except (ImportError, BackendError) as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
        else:
            found.append(name)
    return found


def _bisect(args: argparse.Namespace, stack: ExitStack) -> int:
    subjects = _subjects(args, args.action[1:], stack)
    if args.action[0] != "bisect" or len(subjects) != 2:
        raise ValueError("give `bisect A B`, two names, or names and --subject-cmd that are two together")
    parting = bisect(subjects[0], subjects[1], args.cases, _progress)
    _progress("")
    if parting is None:
        print("they emit the same in every case that both express")
        return 0
    print(parting)
    return 1


def _convert(args: argparse.Namespace) -> int:
    carried = conformance.conversions(args.subjects or _available(conformance.FRAMEWORKS), args.cases, _progress)
    _progress("")
    print(carried.matrix())
    for row in carried.rows:
        if "divergent" in (row.there, row.back, row.gradient) and not row.known:
            verdicts = f"{row.there}, back {row.back}, gradient {row.gradient or 'not asked for'}"
            print(f"FAULT {row.source} -> {row.target}: {row.case}: {verdicts}: {row.text}")
    return 0 if carried.ok else 1


def _grade(args: argparse.Namespace, stack: ExitStack) -> int:
    names: Sequence[str] = args.subjects or ([] if args.subject_cmd else _available(_DEFAULT))
    results = conformance.run(_subjects(args, names, stack), args.cases, _progress)
    _progress("")
    print(results.matrix())
    print()
    print(results.summary())
    for fault in results.faults:
        print(f"FAULT {fault}")
    if args.html:
        results.to_html(args.html)
    if args.json:
        results.to_json(args.json)
    return 0 if results.ok else 1


def run(args: argparse.Namespace) -> int:
    """Runs the command; see the module."""
    try:
        with ExitStack() as stack:
            if args.golden:
                golden.write(Path(args.golden))
                return 0
            if args.list:
                for case in conformance.select(args.cases):
                    print(f"{case.requirement:<36}{case.name:<36}{case.text}")
                return 0
            if args.conversions:
                return _convert(args)
            return _bisect(args, stack) if args.action else _grade(args, stack)
    except (ValueError, ImportError, BackendError, OSError, conformance.SubjectError) as error:
        print(f"tracetorch conformance: {error}", file=sys.stderr)
        return 2
