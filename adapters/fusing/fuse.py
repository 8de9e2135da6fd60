"""`tt.fuse`: a module tree whose elementwise neurons run whole sequences through one kernel."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

import torch
from torch import nn

from tracetorch.adapters.base import describe
from tracetorch.adapters.fusing import plain
from tracetorch.adapters.fusing.tree import Tree
from tracetorch.adapters.fusing.twin import Twin
from tracetorch.core.layer import Layer
from tracetorch.fused import kernel_c
from tracetorch.fused.hoist import prepare
from tracetorch.fused.sequence import rounded, traced_step
from tracetorch.fused.signature import Signature

# package -> the file that says how its neurons are fused: `choose` and `adopt`
_RECIPES = {
    "sinabs": "tracetorch.adapters.sinabs.fuse",
    "snntorch": "tracetorch.adapters.snntorch.fuse",
    "spikingjelly": "tracetorch.adapters.spikingjelly.fuse",
    "norse": "tracetorch.adapters.norse.fuse",
}
# A step whose graph depends on the shape of its input is no function of one element.
_SHAPES = ((2, 4), (3, 5))


@dataclass(frozen=True)
class FuseRow:
    """One neuron layer: its path in the module, its class, whether it was fused.

    `reason` says why it was not; of a fused one, which of its calls stay its own code, and which of its operations may
    round in another way than torch's.
    """

    path: str
    layer: str
    fused: bool
    reason: str = ""

    def __str__(self) -> str:
        outcome = "fused" if self.fused else "left as it is"
        return f"{self.path or '(the module)'}  {self.layer}  {outcome}{': ' if self.reason else ''}{self.reason}"


@dataclass(frozen=True)
class FuseReport:
    """What became of each neuron layer, in the order of the module's layers."""

    rows: tuple[FuseRow, ...]

    @property
    def fused(self) -> tuple[FuseRow, ...]:
        """Those that were fused."""
        return tuple(row for row in self.rows if row.fused)

    @property
    def left(self) -> tuple[FuseRow, ...]:
        """Those that were left as they are."""
        return tuple(row for row in self.rows if not row.fused)

    def __str__(self) -> str:
        head = f"{len(self.fused)} of {len(self.rows)} neuron layers fused"
        return "\n".join([head, *(f"  {row}" for row in self.rows)])


def fuse(module: nn.Module) -> nn.Module:
    """A new module tree in which every elementwise neuron is replaced by its fused twin.

    Parameters and buffers are shared with `module` (the same tensors): training one trains the other. Hidden states
    are each tree's own. A twin is an instance of the original's class; its calls, hidden states and `state_dict` are
    unchanged. Layers that take one step per call gain `unroll(xs, time_dim)`. What cannot be fused stays as it is.

    Args:
        module: of any framework, or a mixture. It is left as it is.

    Returns:
        The new tree. Its attribute `fuse_report` names every neuron layer and says what became of it.

    Raises:
        TypeError: not an `nn.Module`, or one already wrapped by `torch.compile` or for distributed training.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fuse: {type(module).__name__} is no torch.nn.Module")
    for path, child in module.named_modules():
        # By its name, as importing the compiler takes seconds: what it compiled calls the original, whatever is copied.
        if isinstance(child, nn.parallel.DistributedDataParallel) or type(child).__name__ == "OptimizedModule":
            raise TypeError(f"fuse: {path or 'the module'} is a {type(child).__name__}; fuse what it wraps, then wrap")
    tree = Tree()
    rows = []
    for path, child in module.named_modules():
        mixin, row = _choose(path, child)
        tree.plan(child, mixin)
        if row is not None:
            rows.append(row)
    fused = tree.build(module)
    for package, file in _RECIPES.items():
        if package in sys.modules:
            for shell in tree.shells.values():
                if package in _packages(shell):
                    importlib.import_module(file).adopt(shell)
    fused.__dict__["fuse_report"] = FuseReport(tuple(rows))
    return fused


def _packages(module: nn.Module) -> set[str]:
    return {cls.__module__.split(".")[0] for cls in type(module).__mro__}


def _choose(path: str, module: nn.Module) -> tuple[type[Twin] | None, FuseRow | None]:
    """The mixin for a module, and its row in the report if it is a neuron."""
    if isinstance(module, Twin):
        return None, FuseRow(path, describe(module), True, "already") if module.neuron else None
    if isinstance(module, Layer):
        return None, FuseRow(path, describe(module), False, "a native layer: unroll is its own, see tt.backend")
    packages = _packages(module)
    for package, file in _RECIPES.items():
        if package not in packages or package not in sys.modules:
            continue
        choice: type[Twin] | str | None = importlib.import_module(file).choose(module)
        if isinstance(choice, type) and not choice.neuron:
            return (None if "forward" in vars(module) else choice), None
        if isinstance(choice, type):
            refused, note = _probe(module, choice)
            row = FuseRow(path, describe(module), not refused, refused or note)
            return (None if refused else choice), row
        if choice is not None:
            return None, FuseRow(path, describe(module), False, choice)
        return None, None
    other = plain.choose(module)
    if other is None or _probe(module, other)[0]:
        return None, None
    return other, FuseRow(path, describe(module), True, _probe(module, other)[1])


def _probe(module: nn.Module, mixin: type[Twin]) -> tuple[str, str]:
    """Why a layer's step cannot be traced or rendered, or ""; and what is to be known of it if it can."""
    replaced = [name for name in ("forward", "step") if name in vars(module)]
    if replaced:
        return f"{replaced[0]} is replaced on this instance", ""
    try:
        recipe = mixin.recipe(module)  # type: ignore[arg-type]
        skip = recipe.sequencer().skip
        graphs = []
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        for shape in _SHAPES:
            ready = prepare(module, recipe.body, recipe.states, skip, torch.float32, shape, device)
            learned = [name for name in ready.prelude.names if ready.real[name].requires_grad]
            traced, names = traced_step(ready, learned, True, shape=shape)
            graphs.append((str(traced.forward), str(traced.vjp)))
            kept = tuple(name for name in names if name in learned)
            kernel_c.source(traced, Signature(tuple(recipe.states), names, kept), torch.float32)
    except Exception as error:  # whatever the framework's code raises on a small example
        return str(error) or type(error).__name__, ""
    if graphs[0] != graphs[1]:
        return "its step depends on the shape of the input", ""
    inexact = rounded(traced)
    rounding = f"its {' and '.join(inexact)} may round in another way than torch's, within 2 ulp" if inexact else ""
    return "", "; ".join(note for note in (mixin.note(module), rounding) if note)
