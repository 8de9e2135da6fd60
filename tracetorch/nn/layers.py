"""`LIF` and `LIS`: spiking neurons and a softmax read-out that learn online from a trace of their input."""

from __future__ import annotations

import torch
from torch import Tensor

from tracetorch.core.layer import Value
from tracetorch.functional.surrogates import Surrogate
from tracetorch.nn.online import Online
from tracetorch.nn.parts import InputTrace, LeakyMembrane, SpikingMembrane
from tracetorch.nn.rate import open_decay, stationary_rate


class LIF(Online):
    """Leaky integrate-and-fire neurons with their weights, which learn online from a trace of their input.

    In each step, from the input i [B, in_features], with d the decay of the trace and d_m that of the membrane:

        t = t*d + i
        m = m*d_m + i W^T (+ bias)
        a spike where m > threshold, and then m -= threshold

    What backward gives is the rule's:

    - "average": at any time, after any number of calls, with nothing kept per step. The gradient of the stationary
      firing rate (`stationary_rate`) of I = i_avg W^T (+ bias), i_avg = t*(1 - d), with the trace and the parameters as
      they are when backward runs, for the output's gradient summed over time. Each step of a call passes 1/T of its
      input's gradient down.
    - "ottt": a gradient for each step from that step's outputs (Xiao et al., Online Training Through Time, 2022),
      through the surrogate, to the inputs of the same step, and to the parameters by traces that decay with d_m; resets
      are taken as constant. Nothing is kept of earlier calls but the traces.
    - "bptt": exact, through time and resets, with the surrogate for the spikes; the memory grows with the steps, until
      `detach_states` or `reset_states`.

    Args:
        in_features, out_features: sizes.
        trace_decay: d, a number or [in_features], in (0, 1). It does not act on the output; it learns under "average".
        mem_decay: d_m, a number or [out_features], in (0, 1).
        threshold: a number or [out_features], above 0.
        bias: whether a bias is added to the current.
        rule: "average", "ottt" or "bptt".
        surrogate: the slope of a spike under "ottt" and "bptt", a `Surrogate` or its name; None: "atan".
        learn_weight, learn_trace_decay, learn_mem_decay, learn_threshold: parameters, or constants in `state_dict`;
            the bias goes with the weight.
        trace_decay_rank, mem_decay_rank, threshold_rank: 0 for one shared value, 1 for one per feature.

    Raises:
        ValueError: a size below 1, a value out of its range or NaN, an unknown rule or surrogate.
    """

    membrane: SpikingMembrane

    def __init__(
        self,
        in_features: int,
        out_features: int,
        trace_decay: Value = 0.9,
        mem_decay: Value = 0.9,
        threshold: Value = 1.0,
        bias: bool = False,
        rule: str = "average",
        surrogate: Surrogate | str | None = None,
        learn_weight: bool = True,
        learn_trace_decay: bool = True,
        learn_mem_decay: bool = True,
        learn_threshold: bool = True,
        trace_decay_rank: int = 1,
        mem_decay_rank: int = 1,
        threshold_rank: int = 1,
    ) -> None:
        _check_sizes("LIF", in_features, out_features)
        made = surrogate if isinstance(surrogate, Surrogate) else Surrogate(surrogate or "atan")
        trace = InputTrace(in_features, trace_decay, trace_decay_rank, learn_trace_decay)
        membrane = SpikingMembrane(
            out_features,
            mem_decay,
            threshold,
            made.name,
            made.parameters,
            mem_decay_rank=mem_decay_rank,
            threshold_rank=threshold_rank,
            learn_mem_decay=learn_mem_decay,
            learn_threshold=learn_threshold,
        )
        super().__init__(in_features, out_features, trace, membrane, bias, rule, learn_weight)

    @property
    def threshold(self) -> Tensor:
        """The threshold, [out_features] or []."""
        return self.membrane.value("threshold")

    @staticmethod
    def respond(current: Tensor, *values: Tensor) -> Tensor:
        """The stationary firing rate."""
        mem_decay, threshold = values
        return stationary_rate(current, mem_decay, threshold)

    def emit(self, values: Tensor) -> Tensor:
        """Spikes where the distance to the threshold is above 0."""
        threshold = self.threshold.detach()
        return self.membrane.spikes(values, threshold, values.detach() + threshold)

    def after(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """The membrane after its reset, and the spikes: u - threshold where it spiked, else u."""
        fired = values > 0
        return torch.where(fired, values, values + self.threshold), fired.to(values.dtype)


class LIS(Online):
    """The read-out: a leaky integral of the weighted input, and its softmax over the features (classes).

        t = t*d + i
        m = m*d_m + i W^T (+ bias)
        output = softmax(m)

    The rules are those of `LIF`, with the membrane in place of the spike; under "average" its stationary value is
    I/(1 - d_m). The softmax is an ordinary function of the membrane in each step; backward goes through it first.

    Args:
        in_features, out_features: sizes; one output per class.
        trace_decay: d, a number or [in_features], in (0, 1).
        mem_decay: d_m, a number or [out_features], in (0, 1).
        bias: whether a bias is added to the current.
        rule: "average", "ottt" or "bptt".
        learn_weight, learn_trace_decay, learn_mem_decay: parameters, or constants in `state_dict`; the bias goes with
            the weight.
        trace_decay_rank, mem_decay_rank: 0 for one shared value, 1 for one per feature.

    Raises:
        ValueError: a size below 1, a value out of its range or NaN, an unknown rule.
    """

    membrane: LeakyMembrane

    def __init__(
        self,
        in_features: int,
        out_features: int,
        trace_decay: Value = 0.9,
        mem_decay: Value = 0.9,
        bias: bool = False,
        rule: str = "average",
        learn_weight: bool = True,
        learn_trace_decay: bool = True,
        learn_mem_decay: bool = True,
        trace_decay_rank: int = 1,
        mem_decay_rank: int = 1,
    ) -> None:
        _check_sizes("LIS", in_features, out_features)
        trace = InputTrace(in_features, trace_decay, trace_decay_rank, learn_trace_decay)
        membrane = LeakyMembrane(out_features, mem_decay, mem_decay_rank, learn_mem_decay)
        super().__init__(in_features, out_features, trace, membrane, bias, rule, learn_weight)

    @staticmethod
    def respond(current: Tensor, *values: Tensor) -> Tensor:
        """The stationary membrane."""
        return current / (1 - open_decay(values[0]))

    def read_out(self, outputs: Tensor) -> Tensor:
        """The softmax over the last dimension."""
        return torch.softmax(outputs, -1)


def _check_sizes(name: str, in_features: int, out_features: int) -> None:
    for what, size in (("in_features", in_features), ("out_features", out_features)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: {what} must be an integer of at least 1, not {size!r}")
