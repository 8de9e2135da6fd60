"""Shared by all tests."""

import sys

# Quirk: the package index's samna (0.48.6) runs `pip install --force-reinstall` when imported. Nothing that is tested
# here needs it, so an import fails instead. Goes when the index's samna is no longer such a stub.
sys.modules["samna"] = None  # type: ignore[assignment]
