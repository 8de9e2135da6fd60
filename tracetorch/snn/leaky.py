"""The first native layers: `LI` (a leaky integrator) and `LIB` (with one threshold)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tracetorch.core.layer import Layer, Value
from tracetorch.functional.spikes import sigmoid4x


class LI(Layer):
    """Leaky integrator: `mem = beta*mem + x`; the output is the membrane. For read-outs.

    Args:
        num_neurons: size of the input at `dim`.
        beta: decay of the membrane in one step, in (0, 1); a scalar, or one per neuron.
        dim: the feature dimension of the input.
        beta_rank: 0 for one shared value, 1 for one per neuron.
        learn_beta: whether `raw_beta` is a parameter (else a buffer). `beta = sigmoid(raw_beta)`.

    Raises:
        ValueError: a value out of its range or of the wrong shape.
    """

    mem: Tensor | None
    beta: Tensor

    def __init__(
        self, num_neurons: int, beta: Value = 0.9, dim: int = -1, beta_rank: int = 1, learn_beta: bool = True
    ) -> None:
        super().__init__(num_neurons, dim)
        self.define_state("mem")
        self.define_decay("beta", beta, beta_rank, learn_beta)

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """x, mem [..., num_neurons] -> output, mem."""
        (mem,) = states
        mem = self.beta * mem + x
        return mem, mem


class LIB(Layer):
    """Leaky integrator with one threshold, reset by subtraction in the same step, gradient attached:

        mem = beta*mem + x
        s = quant_fn(spike_fn(mem - threshold + bias))
        mem = mem - s*threshold

    The output is `s`: smooth with the default `quant_fn`, a spike with `tt.functional.round_ste()`.

    Args:
        num_neurons: size of the input at `dim`.
        beta: decay of the membrane in one step, in (0, 1); a scalar, or one per neuron.
        threshold: above 0; a scalar, or one per neuron.
        bias: added to the membrane in the spike test only.
        dim: the feature dimension of the input.
        beta_rank, threshold_rank, bias_rank: 0 for one shared value, 1 for one per neuron.
        learn_beta, learn_threshold, learn_bias: whether the raw value is a parameter (else a buffer).
        spike_fn: from `mem - threshold + bias` to a spike's size, elementwise, differentiable.
        quant_fn: what makes it discrete.

    Raises:
        ValueError: a value out of its range or of the wrong shape.
    """

    mem: Tensor | None
    beta: Tensor
    threshold: Tensor
    bias: Tensor

    def __init__(
        self,
        num_neurons: int,
        beta: Value = 0.9,
        threshold: Value = 1.0,
        bias: Value = 0.0,
        dim: int = -1,
        beta_rank: int = 1,
        threshold_rank: int = 1,
        bias_rank: int = 1,
        learn_beta: bool = True,
        learn_threshold: bool = True,
        learn_bias: bool = True,
        spike_fn: Callable[[Tensor], Tensor] = sigmoid4x,
        quant_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(num_neurons, dim)
        self.define_state("mem")
        self.define_decay("beta", beta, beta_rank, learn_beta)
        self.define_positive("threshold", threshold, threshold_rank, learn_threshold)
        self.define_parameter("bias", bias, bias_rank, learn_bias)
        self.spike_fn = spike_fn
        self.quant_fn = nn.Identity() if quant_fn is None else quant_fn

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """x, mem [..., num_neurons] -> spikes, mem."""
        (mem,) = states
        threshold = self.threshold
        mem = self.beta * mem + x
        s = self.quant_fn(self.spike_fn(mem - threshold + self.bias))
        return s, mem - s * threshold
