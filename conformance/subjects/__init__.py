"""The subjects of this package by name; a framework is imported when its subject is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from tracetorch.adapters.registry import imported
from tracetorch.conformance.protocol import Subject

# name -> (module, class, its arguments, one line)
_TABLE: Mapping[str, tuple[str, str, tuple[object, ...], str]] = MappingProxyType(
    {
        "tracetorch": ("native", "Native", ("tracetorch", "eager"), "native layers, step by step in torch"),
        "tracetorch-cpu": ("native", "Native", ("tracetorch-cpu", "cpu"), "native layers, the C kernel"),
        "tracetorch-triton": ("native", "Native", ("tracetorch-triton", "triton"), "native layers, the Triton kernel"),
        "sinabs": ("sinabs", "Sinabs", ("sinabs", "sinabs"), "sinabs, its own classes alone"),
        "snntorch": ("snntorch", "SnnTorch", ("snntorch", "snntorch"), "snnTorch, its own classes alone"),
        "spikingjelly": (
            "spikingjelly",
            "SpikingJelly",
            ("spikingjelly", "spikingjelly"),
            "SpikingJelly, its own nodes alone",
        ),
        "spikingjelly-multi-step": (
            "spikingjelly",
            "SpikingJelly",
            ("spikingjelly-multi-step", "spikingjelly", True, "m"),
            "the same in step_mode 'm'",
        ),
        "norse": ("norse", "Norse", ("norse", "norse"), "Norse, its own cells alone"),
        "sinabs-adapted": ("sinabs", "Sinabs", ("sinabs-adapted", "sinabs", False), "sinabs through our adapter"),
        "snntorch-adapted": (
            "snntorch",
            "SnnTorch",
            ("snntorch-adapted", "snntorch", False),
            "snnTorch through our adapter",
        ),
        "spikingjelly-adapted": (
            "spikingjelly",
            "SpikingJelly",
            ("spikingjelly-adapted", "spikingjelly", False),
            "SpikingJelly through our adapter",
        ),
        "norse-adapted": ("norse", "Norse", ("norse-adapted", "norse", False), "Norse through our adapter"),
        "brainpy": ("brainpy", "Brainpy", ("brainpy", "brainpy"), "brainpy.state, its own classes alone"),
        "brainpy-adapted": (
            "brainpy",
            "Brainpy",
            ("brainpy-adapted", "brainpy", False),
            "brainpy.state through our adapter",
        ),
    }
)

SUBJECTS: Mapping[str, str] = MappingProxyType({name: row[3] for name, row in _TABLE.items()})


def subject(name: str) -> Subject:
    """A subject of this package.

    Raises:
        ValueError: an unknown name.
        ImportError: its framework is not installed.
        tracetorch.fused.executor.BackendError: its backend is not available here.
    """
    if name not in _TABLE:
        raise ValueError(f"subject {name!r} is not known; known: {', '.join(_TABLE)}")
    module, cls, arguments, _ = _TABLE[name]
    make: Callable[..., Subject] = getattr(imported(f"{__name__}.{module}", module), cls)
    return make(*arguments)
