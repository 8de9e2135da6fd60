"""`Composed`: a layer from its parts. A row of parts gives the states, the parameters, the constructor and the step.

Traces, each `decay*trace + input`: the synapse `syn` (S), the recurrent trace `rec` (R) and the membrane `mem`, in this
order; dual layers (D) split each of them by sign. Then the output: one record of `OUTPUTS` for each family.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tracetorch.core.layer import Layer
from tracetorch.functional.spikes import sigmoid4x
from tracetorch.snn.docstrings import docstring

# What an output gives: the layer's output, and what its reset takes from the membrane, one amount after the other.
Fired = tuple[Tensor, tuple[Tensor, ...]]


class Slot(NamedTuple):
    """A parameter of a layer: its name, how it is constrained ("decay", "positive", "parameter"), its default."""

    name: str
    constraint: str
    default: float


class Output(NamedTuple):
    """A family: `fire(layer, mem) -> output, what the reset takes`; its parameters, in the order of the arguments."""

    fire: Callable[[Composed, Tensor], Fired]
    thresholds: tuple[Slot, ...] = ()
    scales: tuple[Slot, ...] = ()

    @property
    def fires(self) -> bool:
        """Whether the membrane is turned into spikes, by `spike_fn` and `quant_fn`."""
        return bool(self.thresholds)


def _membrane(layer: Composed, mem: Tensor) -> Fired:
    return mem, ()


def _binary(layer: Composed, mem: Tensor) -> Fired:
    threshold = layer.threshold
    s = layer.quant_fn(layer.spike_fn(mem - threshold + layer.bias))
    return s, (s * threshold,)


def _signed(layer: Composed, mem: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    pos_threshold, neg_threshold, bias = layer.pos_threshold, layer.neg_threshold, layer.bias
    p = layer.quant_fn(layer.spike_fn(mem - pos_threshold + bias))
    n = -layer.quant_fn(layer.spike_fn(-neg_threshold - mem - bias))
    return p, n, (p * pos_threshold, n * neg_threshold)


def _ternary(layer: Composed, mem: Tensor) -> Fired:
    p, n, taken = _signed(layer, mem)
    return p + n, taken


def _scaled(layer: Composed, mem: Tensor) -> Fired:
    p, n, taken = _signed(layer, mem)
    return p * layer.pos_scale + n * layer.neg_scale, taken


_BIAS = Slot("bias", "parameter", 0.0)
_THRESHOLDS = (Slot("pos_threshold", "positive", 1.0), Slot("neg_threshold", "positive", 1.0), _BIAS)
_SCALES = (Slot("pos_scale", "parameter", 1.0), Slot("neg_scale", "parameter", 1.0))
OUTPUTS: Mapping[str, Output] = MappingProxyType(
    {
        "LI": Output(_membrane),
        "LIB": Output(_binary, (Slot("threshold", "positive", 1.0), _BIAS)),
        "LIT": Output(_ternary, _THRESHOLDS),
        "LITS": Output(_scaled, _THRESHOLDS, _SCALES),
    }
)
_DECAYS = {"syn": ("alpha", 0.5), "mem": ("beta", 0.9), "rec": ("gamma", 0.9)}


@dataclass(frozen=True)
class Parts:
    """What a layer is made of.

    Attributes:
        family: a key of `OUTPUTS`.
        dual: every trace is a pair, `pos_` and `neg_`, with decays of its own.
        synapse: a trace of the input stands in its place.
        recurrent: a trace of the own output is added to the membrane's input.
        ema: the membrane is an exponential moving average.
    """

    family: str
    dual: bool = False
    synapse: bool = False
    recurrent: bool = False
    ema: bool = False

    @classmethod
    def of(cls, family: str, letters: str = "", ema: bool = False) -> Parts:
        """From a family and letters among D, S, R. Raises `ValueError` for others."""
        if family not in OUTPUTS or set(letters) - set("DSR") or len(set(letters)) != len(letters):
            raise ValueError(f"parts {letters!r} of family {family!r}: letters are D, S, R; families {list(OUTPUTS)}")
        return cls(family, "D" in letters, "S" in letters, "R" in letters, ema)

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """What stands before the names of traces, decays and recurrent weights."""
        return ("pos_", "neg_") if self.dual else ("",)

    @property
    def output(self) -> Output:
        """The family's record."""
        return OUTPUTS[self.family]

    @cached_property
    def states(self) -> tuple[str, ...]:
        """Names of the states, in the order in which `step` takes and returns them."""
        traces = ("mem", *(["syn"] if self.synapse else []), *(["rec"] if self.recurrent else []))
        names = [branch + trace for trace in traces for branch in self.branches]
        return (*names, "prev_output") if self.recurrent else tuple(names)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The parameters, in the order of the arguments."""
        traces = (*(["syn"] if self.synapse else []), "mem", *(["rec"] if self.recurrent else []))
        decays = [Slot(branch + _DECAYS[t][0], "decay", _DECAYS[t][1]) for t in traces for branch in self.branches]
        weights = [Slot(f"{branch}rec_weight", "parameter", 0.0) for branch in self.branches if self.recurrent]
        return (*decays, *self.output.thresholds, *self.output.scales, *weights)

    def signature(self) -> inspect.Signature:
        """The constructor's."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        empty = inspect.Parameter.empty
        rows: list[tuple[str, Any, Any]] = [("self", empty, empty), ("num_neurons", "int", empty)]
        rows += [(slot.name, "Value", slot.default) for slot in self.slots]
        rows += [("dim", "int", -1)]
        rows += [(f"{slot.name}_rank", "int", 1) for slot in self.slots]
        rows += [(f"learn_{slot.name}", "bool", True) for slot in self.slots]
        if self.output.fires:
            function = "Callable[[Tensor], Tensor]"
            rows += [("spike_fn", function, sigmoid4x), ("quant_fn", function, _IDENTITY)]
        return inspect.Signature(
            [inspect.Parameter(name, kind, default=default, annotation=note) for name, note, default in rows],
            return_annotation=None,
        )


# The default that a signature shows. No layer holds it: each gets an `nn.Identity()` of its own.
_IDENTITY = nn.Identity()
_DEFINE = {"decay": "define_decay", "positive": "define_positive", "parameter": "define_parameter"}


def _constructor(parts: Parts, owner: str) -> Callable[..., None]:
    signature = parts.signature()

    def __init__(self: Composed, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            names = ", ".join(list(signature.parameters)[1:])
            raise TypeError(f"{owner}: {error}; its arguments are {names}") from None
        bound.apply_defaults()
        self._assemble(parts, bound.arguments)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{owner}.__init__"
    __init__.__doc__ = f"See `{owner}`."
    return __init__


class Composed(Layer):
    """Base of the layers made of parts. A combination of your own is one line:

        class RLIEMA(Composed, family="LI", parts="R", ema=True): ...

    Class arguments: `family`, a key of `OUTPUTS`; `parts`, letters among D, S, R; `ema`. They give the class its
    constructor, signature and docstring. A subclass without them inherits them.
    """

    parts: ClassVar[Parts]
    spike_fn: Callable[[Tensor], Tensor]
    quant_fn: Callable[[Tensor], Tensor]

    def __init_subclass__(cls, family: str = "", parts: str = "", ema: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not family and (parts or ema):
            raise TypeError(f"{cls.__name__}: parts={parts!r}, ema={ema} need family=, one of {', '.join(OUTPUTS)}")
        if family and "__init__" in vars(cls):
            raise TypeError(f"{cls.__name__}: its parts make its __init__; write yours in a subclass of it")
        if family:
            cls.parts = Parts.of(family, parts, ema)
            cls.__init__ = _constructor(cls.parts, cls.__name__)  # type: ignore[method-assign]
            cls.__doc__ = docstring(cls.parts, cls.__doc__)

    def __init__(self, num_neurons: int, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} has no parts; give its class statement family= and parts=")

    def _assemble(self, parts: Parts, arguments: Mapping[str, Any]) -> None:
        """What the constructor does."""
        Layer.__init__(self, arguments["num_neurons"], arguments["dim"])
        for state in parts.states:
            self.define_state(state)
        for name, constraint, _ in parts.slots:
            define = getattr(self, _DEFINE[constraint])
            define(name, arguments[name], arguments[f"{name}_rank"], arguments[f"learn_{name}"])
        if parts.output.fires:
            quant_fn = arguments["quant_fn"]
            for name, example in (("spike_fn", "surrogate_spike('atan')"), ("quant_fn", "round_ste()")):
                if arguments[name] is not None and not callable(arguments[name]):
                    given = f"{type(self).__name__}: {name}={arguments[name]!r:.60}"
                    raise TypeError(f"{given} cannot be called; give a function, such as tt.functional.{example}")
            self.spike_fn = arguments["spike_fn"]
            self.quant_fn = nn.Identity() if quant_fn is None or quant_fn is _IDENTITY else quant_fn

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """x and states [..., num_neurons] -> output, new states, in the order of `state_names`."""
        parts = self.parts
        old = dict(zip(parts.states, states, strict=True))
        new: dict[str, Tensor] = {}
        if parts.synapse:
            x = self._trace("syn", "alpha", self._split(x), old, new, average=True)
        inputs = self._split(x)
        if parts.recurrent:
            rec = self._trace("rec", "gamma", self._split(old["prev_output"]), old, new, average=True)
            weights = [getattr(self, f"{branch}rec_weight") for branch in parts.branches]
            inputs = [x + w * r for x, w, r in zip(inputs, weights, self._split(rec), strict=True)]
        mem = self._trace("mem", "beta", inputs, old, new, average=parts.ema)
        output, taken = parts.output.fire(self, mem)
        for amount in taken:
            share = 0.5 * amount if parts.dual else amount
            for branch in parts.branches:
                new[f"{branch}mem"] = new[f"{branch}mem"] - share
        new["prev_output"] = output
        return (output, *(new[name] for name in parts.states))

    def _split(self, x: Tensor) -> list[Tensor]:
        """The parts of x that the branches take: x itself, or in a dual layer its two signs."""
        if not self.parts.dual:
            return [x]
        return [torch.where(x >= 0, x, 0.0), torch.where(x <= 0, x, 0.0)]

    def _trace(
        self,
        trace: str,
        decay: str,
        inputs: Sequence[Tensor],
        old: Mapping[str, Tensor],
        new: dict[str, Tensor],
        average: bool,
    ) -> Tensor:
        """`decay*trace + input` (`average`: `decay*trace + (1-decay)*input`) in each branch; returns their sum."""
        for branch, x in zip(self.parts.branches, inputs, strict=True):
            d = getattr(self, branch + decay)
            new[branch + trace] = d * old[branch + trace] + ((1 - d) * x if average else x)
        return new[f"pos_{trace}"] + new[f"neg_{trace}"] if self.parts.dual else new[trace]
