"""Compiling C: one shared library per source, compiler, flags and processor, kept in the cache."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

from tracetorch.fused.cache import entry

FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)


class CompilerError(RuntimeError):
    """No C compiler, or one that does not compile what it was given."""


@cache
def _answer(command: tuple[str, ...], path: str | None) -> str | None:
    """The version line of a compiler, or None if it does not answer. `path` is where it is looked for."""
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else None


def find() -> tuple[tuple[str, ...], str] | None:
    """The C compiler's command and version line: the first of `$CC`, cc, gcc and clang that answers, or None."""
    path = os.environ.get("PATH")
    for command in (tuple(shlex.split(os.environ.get("CC", ""))), ("cc",), ("gcc",), ("clang",)):
        if command and shutil.which(command[0]) is not None:
            version = _answer(command, path)
            if version is not None:
                return command, version
    return None


def compiler() -> tuple[tuple[str, ...], str]:
    """As `find`.

    Raises:
        CompilerError: there is none.
    """
    found = find()
    if found is None:
        raise CompilerError("no C compiler found ($CC, cc, gcc, clang); install gcc or clang, or set CC")
    return found


@cache
def _processor() -> str:
    """What the processor can do: code for one must not be loaded on another that shares the home folder."""
    flags = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()} {flags}"


def _compile(source: str, target: Path) -> None:
    command, _ = compiler()
    code = target.with_suffix(".c")
    code.write_text(source, encoding="utf-8")
    done = subprocess.run(
        [*command, *FLAGS, "-o", str(target), str(code), "-lm"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CompilerError(f"{command[0]} failed on a generated kernel:\n{done.stderr[-2000:]}")


def load(source: str) -> ctypes.CDLL:
    """The shared library of a C source, from the cache or compiled now.

    Raises:
        CompilerError: no compiler, or it failed.
    """
    command, version = compiler()
    content = "\0".join((source, *command, version, *FLAGS, _processor()))
    # A full disk shows as either. A compiler that fails in an empty folder too has failed.
    library = entry(content, ".so", lambda target: _compile(source, target), (OSError, CompilerError))
    return ctypes.CDLL(str(library))
