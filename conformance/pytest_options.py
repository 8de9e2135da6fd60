"""Options for `pytest -p tracetorch.conformance.pytest_options --pyargs tracetorch.conformance`.

A plugin, because pytest reads no conftest.py of a package that it is given by its name before it reads its options.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which subjects and which cases; each may be given more than once."""
    group = parser.getgroup("tracetorch conformance")
    group.addoption("--subject", action="append", default=[], metavar="NAME", help="a subject of the package")
    group.addoption("--subject-cmd", action="append", default=[], metavar="COMMAND", help="a subject that is a command")
    group.addoption("--case", action="append", default=[], metavar="NAME", help="a case, requirement or group of them")
