"""snnTorch: its layers over whole sequences that hold a matrix, as the matrix and the neurons (snntorch 1.0.0)."""

from __future__ import annotations

from typing import Any, cast

import snntorch
from torch import Tensor, nn

from tracetorch.adapters.base import original, readable
from tracetorch.adapters.snntorch.parallel import ParallelNeuron
from tracetorch.adapters.snntorch.read import state_leaky
from tracetorch.core.spec import NeuronSpec, SpecError


def input_matrix(layer: Any) -> tuple[nn.Linear, Tensor | None]:
    """Of a `LeakyParallel` the input's matrix, with weight and bias shared, and the second bias of its `nn.RNN`."""
    rnn = layer.rnn
    linear = nn.Linear(rnn.input_size, rnn.hidden_size, bias=rnn.bias, device="meta")
    linear.weight = rnn.weight_ih_l0
    if not rnn.bias:
        return linear, None
    linear.bias = rnn.bias_ih_l0
    return linear, cast(Tensor, rnn.bias_hh_l0)


def parts(layer: nn.Module) -> tuple[nn.Linear, NeuronSpec]:
    """A `snntorch.LinearLeaky` or `LeakyParallel` as its matrix and the spec of the neurons behind it.

    The matrix of a `LinearLeaky` is the layer's own module, with weights shared. That of a `LeakyParallel` shares the
    weight; its bias is the sum of the two of the layer's `nn.RNN`, each of which has its gradient.

    Raises:
        SpecError: another class, a `LeakyParallel` whose hidden matrix is not diagonal, or what `spec` refuses in a
            `StateLeaky`.
    """
    cls, source = original(layer), layer
    if cls is snntorch.LeakyParallel:
        linear, second = input_matrix(source)
        if second is not None:
            trained = linear.bias.requires_grad or second.requires_grad
            linear.bias = nn.Parameter((linear.bias + second).detach(), trained)
        return linear, ParallelNeuron(source).spec
    if cls is not snntorch.LinearLeaky:
        raise SpecError(f"{cls.__module__}.{cls.__qualname__}: only LinearLeaky and LeakyParallel have parts")
    names = (("mem_decay", "tau", "exp_tau"), ("threshold", "threshold", "value"))
    values = {name: readable(layer, own, raw) for name, own, raw in names}
    return cast(nn.Linear, source.linear), state_leaky(source, values)
