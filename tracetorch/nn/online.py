"""`Online`: the base of the layers that learn from a trace of their input, in memory that does not grow with time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tracetorch.core import recomputation
from tracetorch.core.layer import Layer
from tracetorch.core.model import Model
from tracetorch.nn.parts import Eligibility, InputTrace, LeakyMembrane, SpikingMembrane
from tracetorch.nn.rules import RULES, Latest


class OnlineStates(NamedTuple):
    """The states after a call.

    Attributes:
        trace: of the input, [B, in_features].
        membrane: after the reset, [B, out_features].
    """

    trace: Tensor
    membrane: Tensor


class Scratch:
    """What a layer keeps beside its states: the stream that its last outputs belong to, and which values are checked.

    No part of the layer's state: copied or pickled it is empty.
    """

    __slots__ = ("checked", "latest")

    def __init__(self) -> None:
        self.latest: Latest | None = None
        self.checked: tuple[tuple[int, int], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, ()

    def learned(self, signal: Tensor) -> None:
        """A hook of the outputs: after a backward the values are checked again.

        A fused optimizer (torch 2.6 to 2.13) changes parameters without a new `_version`.
        """
        self.checked = ()


class Online(Model):
    """Base of the online layers: a weight matrix, a trace of the input, a membrane, and the rule of the gradient.

    Attributes:
        weight: [out_features, in_features].
        bias: [out_features], or None.
        input_trace: the native layer that keeps the trace; its `trace_decay` is this layer's.
        membrane: the native layer that keeps the membrane; its `mem_decay`, and `threshold`, are this layer's.
        eligibility: what `rule="ottt"` carries from call to call.
    """

    weight: Tensor
    bias: Tensor | None
    membrane: LeakyMembrane | SpikingMembrane

    def __init__(
        self,
        in_features: int,
        out_features: int,
        input_trace: InputTrace,
        membrane: LeakyMembrane | SpikingMembrane,
        bias: bool,
        rule: str,
        learn_weight: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bound = 1 / math.sqrt(in_features)
        weight = torch.empty(out_features, in_features).uniform_(-bound, bound)
        shift = torch.empty(out_features).uniform_(-bound, bound) if bias else None
        for name, tensor in (("weight", weight), ("bias", shift)):
            if learn_weight and tensor is not None:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.input_trace, self.membrane, self.eligibility = input_trace, membrane, Eligibility()
        self.scratch = Scratch()
        self._set_rule(rule)

    # ---- what the layers differ in -------------------------------------------------------------------------------

    @staticmethod
    def respond(current: Tensor, *values: Tensor) -> Tensor:
        """What a constant current [B, out] gives in the long run; `values` are those of the membrane."""
        raise NotImplementedError

    def emit(self, values: Tensor) -> Tensor:
        """Under "ottt": the outputs for what the membrane's step puts out."""
        return values

    def after(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Under "ottt": the membrane after each step, and the spikes, if it has any."""
        return values, None

    def read_out(self, outputs: Tensor) -> Tensor:
        """The layer's outputs from the membrane's."""
        return outputs

    # ---- parameters ----------------------------------------------------------------------------------------------

    @property
    def rule(self) -> str:
        """Whose gradient backward gives: "average", "ottt" or "bptt"; setting it cuts the states from their graph."""
        return self._rule

    @rule.setter
    def rule(self, rule: str) -> None:
        self._set_rule(rule)
        self.detach_states()
        self.eligibility.reset_states()

    def _set_rule(self, rule: str) -> None:
        if rule not in RULES:
            raise ValueError(f"{type(self).__name__}: rule={rule!r} is not known; use one of {', '.join(RULES)}")
        self._rule = rule
        if isinstance(self.membrane, SpikingMembrane):
            self.membrane.emits = "distance" if rule == "ottt" else "spikes"

    @property
    def trace_decay(self) -> Tensor:
        """The decay of the input trace, [in_features] or []."""
        return self.input_trace.value("trace_decay")

    @property
    def mem_decay(self) -> Tensor:
        """The decay of the membrane, [out_features] or []."""
        return self.membrane.value("mem_decay")

    @property
    def parts(self) -> tuple[Layer, ...]:
        """The native layers that keep the states."""
        return self.input_trace, self.membrane, self.eligibility

    def membrane_values(self) -> list[Tensor]:
        """The values of the membrane's parameters, in the order of `respond`."""
        return [self.membrane.value(name) for name in self.membrane.raw_forms]

    def raw_values(self) -> list[tuple[Tensor, str]]:
        """Raw tensor and raw form of the trace's decay, then of the membrane's parameters; values where baked."""
        return [
            (part.baked[name], "value") if part.baked else (getattr(part, part.raw_attribute(name)), form)
            for part in (self.input_trace, self.membrane)
            for name, form in part.raw_forms.items()
        ]

    # ---- running -------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> tuple[Tensor, OnlineStates]:
        """A whole sequence, or one step; the states carry on from call to call until `reset_states`.

        Args:
            inputs: spikes, [B, T, in_features] or [B, in_features]: bool, integer, or of the weight's dtype.

        Returns:
            The outputs, [B, T, out_features] or [B, out_features], in the weight's dtype, and the states.

        Raises:
            TypeError: no tensor, or another floating point type.
            ValueError: another shape, device or batch size, or a parameter that is not finite.

        After an error the states are as before.
        """
        x = self._checked(inputs)
        recomputation.refuse(type(self).__name__)
        undo = self.mark()
        try:
            self._start(x)
            outputs = self.read_out(RULES[self._rule](self, x))
        except BaseException:
            undo()
            raise
        if outputs.requires_grad:
            outputs.register_hook(self.scratch.learned)
        return outputs, OnlineStates(self.input_trace.presynaptic, self.membrane.mem)

    def mark(self) -> Callable[[], None]:
        """What undoes the calls from here on: the states, and the trace that outputs of earlier calls learn from."""
        buffers = [(part._buffers, dict(part._buffers)) for part in self.parts]
        latest = self.scratch.latest
        held = None if latest is None else (latest.trace, latest.sensitivity)

        def undo() -> None:
            for now, before in buffers:
                now.update(before)
            self.scratch.latest = latest
            if latest is not None and held is not None:
                latest.trace, latest.sensitivity = held

        return undo

    def _start(self, x: Tensor) -> None:
        """Zeros for states that are not there yet."""
        for part, size in ((self.input_trace, self.in_features), (self.membrane, self.out_features)):
            for name in part.state_names:
                if part._buffers[name] is None:
                    part._buffers[name] = x.new_zeros(x.shape[0], size)

    def latest(self) -> Latest:
        """The stream that the states belong to: a new one after they were reset, loaded, detached or moved."""
        known, part = self.scratch.latest, self.input_trace
        if known is None or known.trace is not part.presynaptic:
            known = self.scratch.latest = Latest(part.presynaptic, part.sensitivity)
        return known

    def _checked(self, inputs: Tensor) -> Tensor:
        """The input in the weight's dtype. Raises what `forward` says."""
        name, weight = type(self).__name__, self.weight
        if not isinstance(inputs, Tensor):
            raise TypeError(f"{name}: the input is a {type(inputs).__name__}; give a tensor of spikes")
        if inputs.is_complex() or (inputs.is_floating_point() and inputs.dtype is not weight.dtype):
            raise TypeError(
                f"{name}: the input is {inputs.dtype}, weight is {weight.dtype}; convert one of them, or give bool or "
                "integer spikes"
            )
        if inputs.ndim not in (2, 3) or inputs.shape[-1] != self.in_features:
            raise ValueError(
                f"{name}: the input has shape {list(inputs.shape)}; give [B, T, {self.in_features}], or "
                f"[B, {self.in_features}] for one step (in_features={self.in_features})"
            )
        if inputs.device != weight.device:
            raise ValueError(f"{name}: the input is on {inputs.device}, weight on {weight.device}; move one of them")
        self._check_states(inputs.shape[0])
        self._check_values()
        return inputs.to(weight.dtype)

    def _check_states(self, batch: int) -> None:
        rows = ((self.input_trace, self.in_features), (self.membrane, self.out_features))
        for part, size in rows:
            for state in part.state_names:
                tensor = part._buffers[state]
                if tensor is not None and tensor.shape != (batch, size):
                    raise ValueError(
                        f"{type(self).__name__}: the state {state!r} has shape {list(tensor.shape)} from the last "
                        f"call, this input needs {[batch, size]}; call reset_states() before another batch size"
                    )

    def _check_values(self) -> None:
        """Looks at the parameters again once they were learned, or changed in place other than through `.data`."""
        tensors = [self.weight, self.bias, *(raw for raw, _ in self.raw_values())]
        versions = tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors if t is not None)
        if versions == self.scratch.checked:
            return
        for path, tensor in self.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{type(self).__name__}: {path} is not finite any more; load earlier parameters, and learn with a "
                    "smaller step"
                )
        self.scratch.checked = versions

    def extra_repr(self) -> str:
        bias = "" if self.bias is None else ", bias=True"
        return f"{self.in_features}, {self.out_features}, rule={self._rule!r}{bias}"
