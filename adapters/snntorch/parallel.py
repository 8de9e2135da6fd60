"""snnTorch: the neurons of a `LeakyParallel`, apart from its matrix (snntorch 1.0.0)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracetorch.adapters.base import readable
from tracetorch.adapters.snntorch.surrogates import without_reset
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError


class ParallelNeuron(nn.Module):
    """The neurons of a `LeakyParallel`, u = relu(D u + x), on the sum x of what its matrix and its two biases give.

    It holds the layer, not as a child, and computes with that layer's own tensors, by the kernel of `nn.RNN`. To be
    run and read; it is no layer of a network.
    """

    threshold: Tensor
    graded_spikes_factor: Tensor
    # parameter of the spec -> the attribute that it is a part of, and that tensor of its value
    inside: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {"mem_decay": ("weight_hh_l0", torch.diag)}

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, threshold=layer.threshold, graded_spikes_factor=layer.graded_spikes_factor)
        self.train(layer.training)

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        """xs: [T, B, N] -> spikes and membranes, likewise; from the membrane 0."""
        layer: Any = self.__dict__["layer"]
        hidden: Tensor = layer.rnn.weight_hh_l0
        first = torch.zeros((1, xs.shape[1], len(hidden)), dtype=xs.dtype, device=xs.device)
        weights = [torch.eye(len(hidden), dtype=xs.dtype, device=xs.device), hidden]
        mem, _ = torch.rnn_relu(xs, first, weights, False, 1, 0.0, self.training, False, False)
        return layer.spike_grad(mem - layer.threshold) * layer.graded_spikes_factor, mem

    @property
    def weight_hh_l0(self) -> Tensor:
        """The layer's hidden matrix, diagonal."""
        hidden: Tensor = self.__dict__["layer"].rnn.weight_hh_l0
        return hidden

    @property
    def spec(self) -> NeuronSpec:
        """With the decays of D.

        Quirk of snntorch 1.0.0: a beta per neuron is ignored, and the diagonal of the random D stays.

        Raises:
            SpecError: D is not diagonal, or the layer's surrogate is not known.
        """
        layer: Any = self.__dict__["layer"]
        rnn, hidden = layer.rnn, layer.rnn.weight_hh_l0
        if bool((hidden - torch.diag(torch.diagonal(hidden))).any()):
            raise SpecError(
                "weight_hh_enable=True: the hidden matrix is not diagonal, so each membrane reaches all others in the "
                "next step, and no neuron is left; use weight_hh_enable=False"
            )
        if rnn.num_layers != 1 or rnn.nonlinearity != "relu" or rnn.bidirectional:
            raise SpecError(f"rnn={rnn}: only the nn.RNN that LeakyParallel makes can be read")
        decay = torch.diagonal(hidden.detach()).cpu().numpy().copy()
        return NeuronSpec(
            form="snntorch.LeakyParallel",
            clamp="before_spikes",
            **without_reset(layer),
            parameters={
                "mem_decay": Parameter(decay, hidden.requires_grad),
                "threshold": readable(layer, "threshold"),
                "spike_scale": readable(layer, "graded_spikes_factor"),
                "min_v_mem": Parameter(np.zeros((), dtype=decay.dtype)),
            },
        )
