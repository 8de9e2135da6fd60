"""Compiling C and keeping the result: one shared library per source, compiler, flags and processor, in a cache.

An entry is `<key>.so` beside `<key>.sha256`, the digest of its bytes. It is loaded only if it and its folder belong to
the user, nobody else can write them, and its bytes have that digest; anything else is built again and put in its place.
One process builds an entry while others that want it wait; a lock dies with its process. Where the folder cannot be
used (read-only, full, somebody else's), entries are built in a folder of the process's own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

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


def cache_folder() -> Path:
    """`$TRACETORCH_CACHE`, or `tracetorch` in the user's cache folder."""
    given = os.environ.get("TRACETORCH_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tracetorch"


def _own(path: Path) -> bool:
    """Whether a file or folder is the user's own, no link, and writable by nobody else."""
    status = path.lstat()
    user = os.getuid() if hasattr(os, "getuid") else status.st_uid
    return not stat.S_ISLNK(status.st_mode) and status.st_uid == user and not status.st_mode & 0o022


def _trusted(library: Path, digest: Path) -> bool:
    """Whether an entry is the user's own, writable by nobody else, and whole."""
    try:
        if not all(path.is_file() and _own(path) for path in (library, digest)):
            return False
        return hashlib.sha256(library.read_bytes()).hexdigest() == digest.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return False


def _compile(source: str, target: Path) -> None:
    command, _ = compiler()
    code = target.with_suffix(".c")
    code.write_text(source, encoding="utf-8")
    done = subprocess.run(
        [*command, *FLAGS, "-o", str(target), str(code), "-lm"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CompilerError(f"{command[0]} failed on a generated kernel:\n{done.stderr[-2000:]}")


def _build(source: str, folder: Path, key: str) -> Path:
    """Compile in a private folder of the cache, then move the two files into place, the digest last."""
    with tempfile.TemporaryDirectory(dir=folder) as private:
        made = Path(private) / "kernel.so"
        _compile(source, made)
        made.chmod(0o600)
        digest = Path(private) / "kernel.sha256"
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest(), encoding="ascii")
        digest.chmod(0o600)
        library = folder / f"{key}.so"
        os.replace(made, library)
        os.replace(digest, folder / f"{key}.sha256")
    return library


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; where the file system has no locks, all at once, which is only slower."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w", encoding="ascii") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _usable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _own(folder) and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _entry(source: str, folder: Path, key: str) -> Path:
    """A trusted entry of a folder, built now if there is none.

    Raises:
        CompilerError: the compiler failed.
        OSError: the folder cannot be written.
    """
    library, digest = folder / f"{key}.so", folder / f"{key}.sha256"
    if _trusted(library, digest):
        return library
    with _locked(folder / f"{key}.lock"):
        return library if _trusted(library, digest) else _build(source, folder, key)


@cache
def _private_folder() -> Path:
    """For this process alone, where the cache cannot be written; removed when it ends."""
    folder, process = Path(tempfile.mkdtemp(prefix="tracetorch-")), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # not by a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def load(source: str) -> ctypes.CDLL:
    """The shared library of a C source, from the cache or compiled now.

    Raises:
        CompilerError: no compiler, or it failed.
    """
    command, version = compiler()
    text = "\0".join((source, *command, version, *FLAGS, _processor()))
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    folder = cache_folder()
    if not _usable(folder):
        folder = _private_folder()
    try:
        library = _entry(source, folder, key)
    except (OSError, CompilerError):
        # A full disk shows as either. A compiler that fails in an empty folder too has failed.
        library = _entry(source, _private_folder(), key)
    return ctypes.CDLL(str(library))
