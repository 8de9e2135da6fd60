"""`tt.fuse`: a module tree whose elementwise neurons run whole sequences through one kernel."""

from __future__ import annotations

import copy
import importlib
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracetorch.adapters.base import describe
from tracetorch.adapters.fusing import plain
from tracetorch.adapters.fusing.twin import OWN, Twin, twin_class
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
# What a copy begins without: kernels, the report, and what `Module.compile` made, which calls the original.
_LEFT_OUT = frozenset({*OWN, "_compiled_call_impl"})
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
    tree = _Tree()
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


class _Tree:
    """Copies a tree of modules: new modules, the same tensors, attributes that refer to modules made to follow."""

    def __init__(self) -> None:
        self.shells: dict[int, nn.Module] = {}
        self.originals: dict[int, nn.Module] = {}
        self.copies: dict[int, Any] = {}
        self.alive: list[Any] = []

    def plan(self, module: nn.Module, mixin: type[Twin] | None) -> None:
        """Make the new object, still empty."""
        self.originals[id(module)] = module
        if isinstance(module, torch.jit.ScriptModule):
            self.shells[id(module)] = module
            return
        cls = type(module) if mixin is None else twin_class(mixin, type(module))
        self.shells[id(module)] = object.__new__(cls)

    def build(self, root: nn.Module) -> nn.Module:
        """Fill all of them; returns the copy of `root`."""
        for key, shell in self.shells.items():
            original = self.originals[key]
            if shell is not original:
                # A native layer's copy begins without kernels and with states of its own.
                found = original.__getstate__() if isinstance(original, Layer) else vars(original)
                shell.__dict__.update({k: self.copied(v) for k, v in found.items() if k not in _LEFT_OUT})
        return self.shells[id(root)]

    def copied(self, value: Any, depth: int = 0) -> Any:
        """An attribute's value: containers anew, what refers to a module of the tree made to refer to its copy."""
        if id(value) in self.shells:
            return self.shells[id(value)]
        if isinstance(value, (Tensor, nn.Module, type, str, int, float)) or value is None or depth > 6:
            return value
        if id(value) in self.copies:
            return self.copies[id(value)]
        result = self._copied(value, depth)
        self.alive.append(value)
        self.copies[id(value)] = result
        return result

    def _copied(self, value: Any, depth: int) -> Any:
        twin: Any
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.copied(value.__self__, depth + 1))
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, partial):
            inner = [self.copied(part, depth + 1) for part in (value.func, value.args, value.keywords)]
            return partial(inner[0], *inner[1], **inner[2])
        if type(value) in (dict, OrderedDict, defaultdict):
            twin = copy.copy(value)
            twin.clear()
            for key, item in value.items():
                twin[self.shells.get(id(key), key)] = self.copied(item, depth + 1)
            return twin
        if type(value) in (list, deque, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            items = [self.copied(item, depth + 1) for item in value]
            if isinstance(value, tuple):
                same = all(a is b for a, b in zip(items, value, strict=True))
                return value if same else type(value)(*items) if hasattr(value, "_fields") else tuple(items)
            twin = copy.copy(value)
            twin.clear()
            twin.extend(items)
            return twin
        if type(value) in (set, frozenset):
            return type(value)(self.shells.get(id(item), item) for item in value)
        if isinstance(value, weakref.ref):
            return weakref.ref(self.shells[id(value())]) if id(value()) in self.shells else value
        if isinstance(value, RemovableHandle):
            return self._handle(value)
        return self._object(value, depth)

    def _handle(self, handle: RemovableHandle) -> RemovableHandle:
        """What removes a hook of the tree removes the copy's instead: lazy modules and Norse's networks keep such."""
        hooks, number, extra = handle.__getstate__()
        if not any(hooks is own for module in self.originals.values() for own in vars(module).values()):
            return handle
        twin = copy.copy(handle)
        twin.__setstate__((self.copied(hooks), number, self.copied(extra)))
        return twin

    def _function(self, function: types.FunctionType, depth: int) -> Any:
        """A function whose closure or defaults refer to a module of the tree refers to its copy instead."""
        if not self._refers(function):
            return function

        def followed(value: Any) -> Any:
            return self.copied(value, depth + 1) if self._refers(value) else value

        cells = []
        for cell in function.__closure__ or ():
            old = _content(cell)
            new = followed(old)
            cells.append(cell if new is old else types.CellType(new))
        defaults = followed(function.__defaults__)
        twin = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, defaults, tuple(cells) or None
        )
        twin.__kwdefaults__ = followed(function.__kwdefaults__)
        twin.__dict__.update(function.__dict__)
        return twin

    def _object(self, value: Any, depth: int) -> Any:
        """Any other object is shared, unless one of its attributes refers to a module of the tree."""
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict) or not any(self._refers(item) for item in attributes.values()):
            return value
        twin = copy.copy(value)
        self.copies[id(value)] = twin
        twin.__dict__.update({name: self.copied(item, depth + 1) for name, item in attributes.items()})
        return twin

    def _refers(self, value: Any, depth: int = 0) -> bool:
        """Whether a module of the tree is within reach of a value."""
        if id(value) in self.shells:
            return True
        if depth > 4:
            return False
        inner: Iterable[Any] = ()
        if isinstance(value, types.MethodType):
            inner = (value.__self__,)
        elif isinstance(value, types.FunctionType):
            cells = [_content(cell) for cell in value.__closure__ or ()]
            inner = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        elif isinstance(value, partial):
            inner = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, Mapping):
            inner = (*value.keys(), *value.values())
        elif isinstance(value, weakref.ref):
            inner = (value(),)
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            inner = value
        return any(self._refers(item, depth + 1) for item in inner)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None
