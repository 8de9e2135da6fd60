"""Triton's compiled kernels in our cache, whose entries are verified: Triton's own believes what it finds."""

from __future__ import annotations

import inspect
import io
import os
import secrets
import zipfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tracetorch.fused import cache

# Where the user looks into Triton's compiler, it compiles.
_SWITCHES = ("TRITON_ALWAYS_COMPILE", "TRITON_KERNEL_OVERRIDE", "TRITON_KERNEL_DUMP")


def keep(run: Any, text: str) -> None:
    """From now on a function of `triton.jit` takes what it compiles to from the cache.

    Quirk: Triton (3.6) has no public way to bring one's own cubin to a launch. Its functions get a compiler for each
    device from `device_caches`; other versions, without it, go on with their own cache. Goes when Triton has a way.

    Args:
        run: the function; one of Triton's interpreter is left as it is.
        text: its whole source, its helpers included.
    """
    devices = getattr(run, "device_caches", None)
    if not isinstance(devices, defaultdict) or devices.default_factory is None:
        return
    prepare = devices.default_factory

    def prepared() -> Any:
        made = prepare()
        if "_env_vars" in inspect.signature(run.compile).parameters:
            run.compile = partial(_compiled, text, run.compile)
        return made

    devices.default_factory = prepared


def _compiled(text: str, compiler: Callable[..., Any], src: Any, target: Any, options: Any, **more: Any) -> Any:
    """What `compiler` makes of a source for a target: from the cache, else made now and kept."""
    from triton import __version__
    from triton.compiler import CompiledKernel
    from triton.compiler.compiler import get_cache_invalidating_env_vars

    if more or any(os.environ.get(name) for name in _SWITCHES):
        return compiler(src, target=target, options=options, **more)
    environment = get_cache_invalidating_env_vars()
    parts = [src.signature, src.constants, src.attrs, options, environment]
    said = [repr(sorted((str(key), str(value)) for key, value in part.items())) for part in parts]
    content = "\0".join((f"triton {__version__}", text, src.name, str(target), *said))
    made = []

    def make(path: Path) -> None:
        # Under a name that nobody knows beforehand, so that Triton finds nothing in its own cache.
        made.append(
            compiler(
                src, target=target, options=options, _env_vars={**environment, "TRACETORCH_KEY": secrets.token_hex(16)}
            )
        )
        path.write_bytes(_packed(made[-1].metadata_group))

    file = cache.entry(content, ".kernel", make)
    return made[-1] if made else CompiledKernel(src, _unpacked(file), file.stem)


def _packed(group: dict[str, str]) -> bytes:
    """The files of a compiled kernel as one."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, path in sorted(group.items()):
            archive.write(path, name)
    return file.getvalue()


def _unpacked(file: Path) -> dict[str, str]:
    """The same as files, which last as long as the process."""
    folder = cache.present_private_folder() / file.stem
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
        return {name: str(folder / name) for name in archive.namelist()}
