"""Compiling C: one shared library per source, compiler, flags and processor, kept in the cache."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tracetorch.fused.cache import entry, private_entry

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
# What a compiler says, in whatever encoding.
_TEXT: Mapping[str, Any] = MappingProxyType({"text": True, "encoding": "utf-8", "errors": "replace"})


class CompilerError(RuntimeError):
    """No C compiler, or one that does not compile what it was given."""


@cache
def _answer(command: tuple[str, ...], path: str | None) -> str | None:
    """The version line of a compiler, or None if it does not answer. `path` is where it is looked for."""
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, timeout=10, check=False, **_TEXT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else None


def _given() -> tuple[str, ...]:
    """The command in `$CC`, or none."""
    try:
        return tuple(shlex.split(os.environ.get("CC", "")))
    except ValueError:  # an open quotation: no command
        return ()


def find() -> tuple[tuple[str, ...], str] | None:
    """The C compiler's command and version line: the first of `$CC`, cc, gcc and clang that answers, or None."""
    path = os.environ.get("PATH")
    for command in (_given(), ("cc",), ("gcc",), ("clang",)):
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
        [*command, *FLAGS, "-o", str(target), str(code), "-lm"], capture_output=True, check=False, **_TEXT
    )
    if done.returncode:
        raise CompilerError(f"{command[0]} failed on a generated kernel:\n{done.stderr[-2000:]}")
    if not target.is_file():
        raise CompilerError(f"{command[0]} made no library of a generated kernel; set CC to a C compiler")


def load(source: str) -> ctypes.CDLL:
    """The shared library of a C source, from the cache or compiled now.

    Raises:
        CompilerError: no compiler, it failed, or what it made cannot be loaded.
    """
    command, version = compiler()
    content = "\0".join((source, *command, version, *FLAGS, _processor()))

    def make(target: Path) -> None:
        _compile(source, target)

    try:
        try:
            # A full disk shows as either. A compiler that fails in an empty folder too has failed.
            return _opened(entry(content, ".so", make, (OSError, CompilerError)))
        except OSError:  # where nothing may be executed, or made on a system with other libraries
            return _opened(private_entry(content, ".so", make))
    except OSError as error:
        raise CompilerError(f"{command[0]}: what it made of a generated kernel cannot be loaded: {error}") from error


def _opened(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library.absolute()))  # a bare name would be looked for among the system's libraries
