"""What a call of a module takes: one step or a sequence, with time where, its state hidden or passed in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tracetorch.adapters.networks.modules import is_known
from tracetorch.adapters.pipelines.states import keeps, packages, starts_anew
from tracetorch.core import folding
from tracetorch.core.layer import Layer
from tracetorch.core.model import Model
from tracetorch.core.program import hooked

KINDS = ("step", "sequence", "squeezed", "stateless", "chain")
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
_NORSE_CONTAINERS = ("SequentialState", "RecurrentSequential")
# Of sinabs 3.1.3: they take [B, C, H, W], and no time.
_SINABS_STEPS = ("SumPool2d", "Cropping2dLayer")


@dataclass(frozen=True)
class Convention:
    """How a module is called.

    Attributes:
        kind: "step": one time step [B, ...]; "sequence": all steps at once; "squeezed": all steps, batch and time in
            one dimension, [B*T, ...]; "stateless": each step by itself, so that time may be folded into the batch;
            "chain": a Sequential whose modules are called one after the other, each in its own way.
        time_dim: with "sequence", 0 for [T, B, ...] or 1 for [B, T, ...].
        explicit: whether the state goes in and comes out: `module(x, state) -> (y, state)`.
        state_batch_dim: where the batch is in such a state.
        why: from what that is known.
        parts: of a "chain": path and convention of each module.
        paired: whether such a state goes in as a pair with the input: `module((x, state))`.
        stated: whether the user stated it; else it is found out anew at every call, as a module may have changed.
    """

    kind: str
    time_dim: int = 0
    explicit: bool = False
    state_batch_dim: int = 0
    why: str = ""
    parts: tuple[tuple[str, Convention], ...] = ()
    paired: bool = False
    stated: bool = False

    def __str__(self) -> str:
        state = ", its state passed in and out" if self.explicit else ""
        if self.kind == "chain":
            return "; ".join(f"{path}: {part}" for path, part in self.parts)
        text = {
            "step": "one step [B, ...] a call",
            "sequence": f"{'[T, B, ...]' if self.time_dim == 0 else '[B, T, ...]'} a call",
            "squeezed": "[B*T, ...] a call",
            "stateless": "each step by itself",
        }[self.kind]
        return f"{text}{state} ({self.why})"


class UnknownConvention(TypeError):
    """A module of which it cannot be known what a call takes."""


def _foreign(module: nn.Module, found: set[str], what: str) -> Convention | None:
    """Of another framework's own classes; None: not one of them."""
    anything: Any = module
    name = type(module).__name__
    if "snntorch" in found:
        return _snntorch(module, what)
    if "sinabs" in found:
        if hasattr(module, "squeeze_forward"):
            return Convention("squeezed", why=f"a Squeeze layer of sinabs, {name}")
        if name in _SINABS_STEPS:
            return Convention("stateless", why=f"a stateless layer of sinabs, {name}")
        return Convention("sequence", 1, why="a sinabs layer")
    if "spikingjelly" in found and hasattr(module, "step_mode"):
        if anything.step_mode == "m":
            return Convention("sequence", 0, why="SpikingJelly, step_mode 'm'")
        return Convention("step", why="SpikingJelly, step_mode 's'")
    return _norse(module, what) if "norse" in found else None


def _snntorch(module: nn.Module, what: str) -> Convention:
    """Of snntorch 1.0.0."""
    where = f"{what or 'stage'} ({type(module).__name__})"
    if starts_anew(module):
        raise UnknownConvention(
            f"{where}: it takes a whole sequence and starts anew at every call, so that no state can carry on. "
            "Remedy: of whole sequences only, adapters.stage(module, kind='sequence', time_dim=0)"
        )
    if any(cls.__name__ == "DeltaLeaky" for cls in type(module).__mro__):
        raise UnknownConvention(
            f"{where}: it keeps its states in plain attributes, which nothing could reset or save. Remedy: a module of "
            "your own around it, adapters.stage(module, kind='step', explicit_state=True)"
        )
    return Convention("step", why="a snnTorch neuron")


def _norse(module: nn.Module, what: str) -> Convention:
    """Of norse 1.1.0."""
    anything: Any = module
    name = type(module).__name__
    if name == "Lift":
        # Quirk of norse 1.1.0: a Lift takes its state as a pair with the input, and returns none of a stateless module.
        stateful = bool(anything.is_stateful)
        return Convention("sequence", 0, stateful, paired=stateful, why="Norse, a Lift")
    kinds = _norse_kinds(module)
    if len(kinds) > 1:
        raise UnknownConvention(
            f"{what or 'stage'} ({name}): it holds modules of Norse that take one step and others that take a "
            "sequence. Remedy: cells alone, or layers over time alone"
        )
    why = f"Norse, a {name}" if name in _NORSE_CONTAINERS else "a Norse cell"
    if kinds == {"sequence"}:
        return Convention("sequence", 0, True, why=why if name in _NORSE_CONTAINERS else "a Norse layer over time")
    return Convention("step", explicit=True, why=why)


def _norse_kinds(module: nn.Module) -> set[str]:
    """What calls take of the Norse modules in it: "step", "sequence"."""
    if type(module).__name__ in _NORSE_CONTAINERS:
        return {kind for child in module.children() for kind in _norse_kinds(child)}
    if "norse" not in packages(module):
        return {"sequence"} if isinstance(module, RECURRENT) else set()
    cell = any(cls.__name__.endswith("Cell") for cls in type(module).__mro__)
    return {"step" if cell else "sequence"}


def convention(module: nn.Module, what: str = "") -> Convention:
    """The convention of a module.

    Raises:
        UnknownConvention: it cannot be known; names the module and the remedy.
    """
    found = packages(module)
    if getattr(module, "over_sequences", False):  # a pipeline, a JaxStage
        time_dim: Any = module.time_dim
        return Convention("sequence", time_dim, why=f"{type(module).__name__}, time_dim={time_dim}")
    if isinstance(module, Layer):
        return Convention("step", why="a native layer")
    known = _foreign(module, found, what)
    if known is not None:
        return known
    if isinstance(module, RECURRENT):
        if module.bidirectional:
            raise UnknownConvention(
                f"{what or 'stage'} ({type(module).__name__}): bidirectional=True: it reads a sequence from its end "
                "too, so that no state can carry on. Remedy: bidirectional=False, or, of whole sequences only, "
                f"adapters.stage(module, kind='sequence', time_dim={int(module.batch_first)})"
            )
        return Convention("sequence", int(module.batch_first), True, 1, f"nn.{type(module).__name__}")
    if is_known(module) or folding.listed(module):
        return Convention("stateless", why="a stateless torch module")
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return _sequential(module, what)
    if isinstance(module, Model):
        return Convention("step", why="a native model")
    raise UnknownConvention(
        f"{what or 'stage'} ({type(module).__name__}): what its call takes cannot be known. Remedy: "
        "adapters.stage(module, kind='step') if it takes one time step [B, ...], or kind='sequence', time_dim=0 or 1"
    )


def _sequential(module: nn.Sequential, what: str) -> Convention:
    # Not `named_children`, which leaves out a module that comes a second time.
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    parts = [(name, convention(child, f"{what}.{name}")) for name, child in children]
    sequences = [(name, part) for name, part in parts if part.kind in ("sequence", "squeezed")]
    if not sequences:
        return _chain(module, parts, what)
    steps = [name for name, part in parts if not _free(part) and part.kind in ("step", "chain")]
    dims = {(part.kind, part.time_dim) for _, part in sequences}
    explicit = [name for name, part in sequences if part.explicit]
    if steps or len(dims) > 1 or explicit:
        raise UnknownConvention(
            f"{what or 'stage'} (Sequential): its modules are called in different ways: "
            f"{'; '.join(f'{name}: {part}' for name, part in parts)}. Remedy: give them to the pipeline one by one"
        )
    first = replace(sequences[0][1], why=f"a Sequential around {sequences[0][1].why}")
    return first


def _free(part: Convention) -> bool:
    """Whether a call of it has no state, and may take more dimensions."""
    return part.kind == "stateless" or (part.kind == "chain" and all(_free(inner) for _, inner in part.parts))


def _chain(module: nn.Sequential, parts: Sequence[tuple[str, Convention]], what: str) -> Convention:
    """Of a Sequential of steps: its modules one after the other, unless that would be another thing than its call."""
    flat = _flat(module, parts)
    neurons = [id(part) for path, _ in flat for part in module.get_submodule(path).modules() if keeps(part)]
    why = "with hooks" if hooked(module) else "a neuron in two places" if len(set(neurons)) < len(neurons) else ""
    if not why:
        return Convention("chain", parts=tuple(flat), why="a Sequential of steps")
    explicit = [path for path, part in flat if part.explicit]
    if explicit:
        raise UnknownConvention(
            f"{what or 'stage'} (Sequential): {why}, and the state of {explicit[0]} goes in and out, so that neither "
            "its call nor its modules' calls would do. Remedy: give its modules to the pipeline one by one"
        )
    return Convention("stateless" if all(map(_free, dict(flat).values())) else "step", why=f"a Sequential, {why}")


def _flat(module: nn.Sequential, parts: Sequence[tuple[str, Convention]]) -> list[tuple[str, Convention]]:
    """Chains within chains taken apart."""
    found: list[tuple[str, Convention]] = []
    for name, part in parts:
        if part.kind == "chain":
            found += [(f"{name}.{path}", inner) for path, inner in part.parts]
        else:
            found.append((name, part))
    return found


def check_stated(module: nn.Module, stated: Convention, what: str) -> None:
    """Raises `ValueError` where a stated convention contradicts the one that the module's class has."""
    try:
        own = convention(module, what)
    except UnknownConvention:
        return
    if _free(own):
        return
    whole = [how.kind in ("sequence", "squeezed") for how in (own, stated)]
    shape = any(whole) and (own.kind, own.time_dim) != (stated.kind, stated.time_dim)
    if shape or own.explicit != stated.explicit:
        raise ValueError(
            f"{what}: stated is {stated}, but it takes {own}. Remedy: the module itself, without adapters.stage"
        )


def given(kind: str, time_dim: int | None, explicit_state: bool) -> Convention:
    """A convention that the user states.

    Raises:
        ValueError: another kind or time dimension, or one missing.
    """
    if kind not in KINDS[:4]:
        raise ValueError(f"stage: kind={kind!r} is not known; use one of {', '.join(map(repr, KINDS[:4]))}")
    if kind == "sequence" and time_dim not in (0, 1):
        raise ValueError(f"stage: kind='sequence' needs time_dim=0 ([T, B, ...]) or 1 ([B, T, ...]), not {time_dim!r}")
    if kind != "sequence" and time_dim is not None:
        raise ValueError(f"stage: time_dim={time_dim!r} has a meaning only with kind='sequence', not {kind!r}")
    if explicit_state and kind == "stateless":
        raise ValueError("stage: explicit_state=True contradicts kind='stateless'")
    return Convention(kind, time_dim or 0, explicit_state, why="as given", stated=True)
