"""Odd compilers and odd cache folders: the right answer, or a `CompilerError` that names what is wrong."""

import ctypes
from pathlib import Path

import pytest

from tests.test_compiler import SOURCE, run
from tracetorch.fused import cache as cache_module
from tracetorch.fused import compiler
from tracetorch.fused.compiler import CompilerError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRACETORCH_CACHE", str(folder))
    return folder


def script(tmp_path, body, version="a compiler 1.0"):
    path = tmp_path / "compiler"
    path.write_bytes(
        b'#!/bin/sh\nif [ "$1" = --version ]; then printf \'' + version.encode("latin-1") + b"\\n'; exit; fi\n"
    )
    with path.open("ab") as file:
        file.write(body.encode("latin-1"))
    path.chmod(0o755)
    return str(path)


TO_TARGET = 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo %s > "$2"; fi; shift; done\n'
COMPILERS = {
    "one that makes nothing": ("exit 0\n", "made no library"),
    "one that makes no library": (TO_TARGET % "garbage", "cannot be loaded"),
    "one that says what is no text": ("printf '\\377 error' >&2; exit 1\n", "failed on a generated kernel"),
    "one that is killed": ("kill -9 $$\n", "failed on a generated kernel"),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_a_compiler_that_is_none_is_named(name, tmp_path, monkeypatch):
    body, word = COMPILERS[name]
    command = script(tmp_path, body)
    monkeypatch.setenv("CC", command)
    with pytest.raises(CompilerError, match=word) as raised:
        compiler.load(SOURCE)
    assert command in str(raised.value)


def test_a_version_that_is_no_text_is_a_version(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, 'exec cc "$@"\n', version="\xff\xfe 1.0"))
    assert run(compiler.load(SOURCE)) == 42


@pytest.mark.parametrize("given", ['gcc "', "gcc 'x", "   "])
def test_a_command_that_is_none_is_passed_over(given, monkeypatch):
    monkeypatch.setenv("CC", given)
    assert run(compiler.load(SOURCE)) == 42


@pytest.mark.parametrize("given", [".", "a b/\u00fc"])
def test_a_cache_by_a_relative_path(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACETORCH_CACHE", given)
    assert run(compiler.load(SOURCE)) == 42
    assert list((tmp_path / given).glob("*.so"))


def test_a_cache_in_the_user_s_home_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACETORCH_CACHE", "~/kernels")
    assert run(compiler.load(SOURCE)) == 42
    assert list((tmp_path / "kernels").glob("*.so"))


def test_a_user_without_a_home(monkeypatch):
    # A user that the system does not know, as containers have them.
    def unknown(cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TRACETORCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(unknown))
    assert run(compiler.load(SOURCE)) == 42


def test_where_nothing_may_be_executed_the_kernel_is_made_elsewhere(cache, monkeypatch):
    opened = ctypes.CDLL

    def no_execution(name, *rest):
        if str(cache) in name:
            raise OSError(f"{name}: failed to map segment from shared object")
        return opened(name, *rest)

    monkeypatch.setattr(ctypes, "CDLL", no_execution)
    assert run(compiler.load(SOURCE)) == 42


def test_no_folder_at_all_is_said(monkeypatch, cache):
    def nowhere(*_, **__):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(cache_module, "_usable", lambda folder: False)
    monkeypatch.setattr(cache_module, "private_folder", nowhere)
    with pytest.raises(CompilerError, match="No usable temporary directory"):
        compiler.load(SOURCE)
