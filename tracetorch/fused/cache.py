"""Files that take long to make and are executed: kept for the user, and believed only where they are the user's own.

An entry is `<key><suffix>` beside `<key>.sha256`, the digest of its bytes. It is used only if it and its folder belong
to the user, nobody else can write them, and its bytes have that digest; anything else is made again and put in its
place. One process makes an entry while others that want it wait; a lock dies with its process, and the next maker of
the entry clears away what was left of it. Where the folder cannot be used (read-only, full, somebody else's), entries
are made in a folder of the process's own; of a folder that is there and is not the user's alone, a `CacheWarning` says
so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path


class CacheWarning(UserWarning):
    """The cache's folder is not the user's alone, and so not used; says why and what to do. Once a folder."""


def folder() -> Path:
    """`$TRACETORCH_CACHE`, or `tracetorch` in the user's cache folder."""
    given = os.environ.get("TRACETORCH_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tracetorch"


def _fault(path: Path) -> str:
    """Why a file or folder is not the user's own, or is a link, or writable by somebody else, and the remedy; or ""."""
    status = path.lstat()
    user = os.getuid() if hasattr(os, "getuid") else status.st_uid
    if stat.S_ISLNK(status.st_mode):
        return f"is a symbolic link; name the folder that it leads to, {os.path.realpath(path)}"
    if status.st_uid != user:
        return f"belongs to the user {status.st_uid}, not to you, the user {user}; name a folder of your own"
    if status.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o}); take that away by chmod go-w"
    return ""


def _trusted(file: Path, digest: Path) -> bool:
    """Whether an entry is the user's own, writable by nobody else, and whole."""
    try:
        if not all(path.is_file() and not _fault(path) for path in (file, digest)):
            return False
        return hashlib.sha256(file.read_bytes()).hexdigest() == digest.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return False


def _made(within: Path, name: str, digest: Path, make: Callable[[Path], None]) -> Path:
    """Make an entry in a private folder of the cache, then move the two files into place, the digest last."""
    with tempfile.TemporaryDirectory(dir=within, prefix=f"{digest.stem}-") as private:
        made = Path(private) / name
        make(made)
        made.chmod(0o600)
        said = Path(private) / digest.name
        said.write_text(hashlib.sha256(made.read_bytes()).hexdigest(), encoding="ascii")
        said.chmod(0o600)
        os.replace(made, within / name)
        os.replace(said, digest)
    return within / name


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """One process at a time; where the file system has no locks (False), all at once, which is only slower."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with open(path, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            # Closing is not enough: a child that another thread forked meanwhile has the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


def _make_private(folder: Path) -> None:
    """A folder of the user alone, its parents too: those of `Path.mkdir` would be as open as the umask leaves them."""
    if folder.parent != folder and not folder.parent.is_dir():
        _make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def _usable(folder: Path) -> bool:
    try:
        _make_private(folder)
        fault = _fault(folder)  # where it cannot be written, its entries still serve
    except OSError:
        return False
    if fault:
        _warn_once(folder, fault)
    return not fault


@cache
def _warn_once(folder: Path, fault: str) -> None:
    text = f"the cache {folder} is not used, and every process builds its kernels anew: it {fault} (TRACETORCH_CACHE)"
    warnings.warn(text, CacheWarning, stacklevel=2)


def _entry(within: Path, key: str, suffix: str, make: Callable[[Path], None]) -> Path:
    file, digest = within / f"{key}{suffix}", within / f"{key}.sha256"
    if _trusted(file, digest):
        return file
    with _locked(within / f"{key}.lock") as alone:
        if _trusted(file, digest):
            return file
        for left in within.glob(f"{key}-*") if alone else ():  # by a process that was killed while it made this entry
            shutil.rmtree(left, ignore_errors=True)
        return _made(within, file.name, digest, make)


@cache
def private_folder() -> Path:
    """For this process alone, where the cache cannot be written; removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="tracetorch-"))
    # By the process that made it and no child; those of multiprocessing, which end without `atexit`, remove theirs too.
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-100)
    return folder


def present_private_folder() -> Path:
    """`private_folder`, made anew where a cleaner of temporary files, or the parent's end, removed it."""
    if not private_folder().is_dir():
        private_folder.cache_clear()
    return private_folder()


def entry(
    content: str, suffix: str, make: Callable[[Path], None], again: tuple[type[Exception], ...] = (OSError,)
) -> Path:
    """The file of an entry that can be trusted, made now if there is none.

    Args:
        content: all that decides what is in the file; its digest is the key.
        suffix: of the file's name, with the dot.
        make: writes the file.
        again: what `make` may raise where the folder is to blame: it is then called again, in a folder of the process's
            own, and what it raises there is raised here.
    """
    key = _key(content)
    within: Path | None
    try:
        within = folder()
    except RuntimeError:  # a user without a home
        within = None
    if within is None or not _usable(within):
        within = present_private_folder()
    try:
        return _entry(within, key, suffix, make)
    except again:
        return _entry(present_private_folder(), key, suffix, make)


def private_entry(content: str, suffix: str, make: Callable[[Path], None]) -> Path:
    """As `entry`, in the folder of this process alone."""
    return _entry(present_private_folder(), _key(content), suffix, make)


def _key(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:32]
