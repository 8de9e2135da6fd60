"""What an error of the engine names: the layer in its network, its step, what is wrong, and the remedy."""

import re

import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.layer_cases import noise
from tracetorch.fused import GraphError
from tracetorch.fused.layers import FuseError


class Sorted(tt.snn.Layer):
    """A neuron whose step is not pointwise."""

    def __init__(self, num_neurons):
        super().__init__(num_neurons)
        self.define_state("mem")

    def step(self, x, mem):
        mem = 0.5 * mem + x
        return mem.sort()[0], mem


class Halved(Sorted):
    """One that has its step from its base."""


STEP = rf"Sorted\.step \(.*test_engine_named\.py, line {Sorted.step.__code__.co_firstlineno}\)"


@pytest.mark.parametrize("kind", [Sorted, Halved])
@pytest.mark.parametrize("many", [False, True])
def test_a_step_that_no_kernel_runs_is_named_with_its_layer(kind, many):
    net = tt.Sequential(nn.Linear(3, 5), tt.snn.LIB(5), nn.Linear(5, 6), kind(6), tt.snn.LI(6))
    run = (lambda: tt.unroll(net, noise(4, 2, 3))) if many else (lambda: net[3].unroll(noise(4, 2, 6)))
    with tt.backend("cpu"), pytest.raises(GraphError) as raised:
        run()
    words = rf"^{kind.__name__}\(6\): no kernel runs {STEP}: aten\.sort.*; or use tt\.backend\('auto'\)"
    assert re.search(words, str(raised.value)), raised.value
    assert str(net[3]) in str(raised.value)  # as the printed network has it


def test_so_is_that_of_a_step_that_changes_its_layer():
    class Counting(Sorted):
        calls = 0

        def step(self, x, mem):
            self.calls = self.calls + 1
            return x, mem

    with tt.backend("cpu"), pytest.raises(GraphError, match=r"^Counting\(6\): no kernel runs .*Counting\.step .*calls"):
        Counting(6).unroll(noise(4, 2, 6))


def test_so_is_that_of_a_source():
    with pytest.raises(GraphError, match=rf"^Sorted\(6\): no kernel runs {STEP}: aten\.sort"):
        tt.fused.source(Sorted(6), "cpu")


def test_a_layer_named_already_is_named_once():
    layer = tt.snn.LIB(3)
    layer.beta_of_old = torch.zeros(3, dtype=torch.complex64)
    with tt.backend("cpu"), pytest.raises(GraphError) as raised:
        layer.unroll(noise(4, 2, 3))
    assert str(raised.value).count("LIB") == 1 + str(raised.value).count("LIB.")
    assert "which no kernel reads" in str(raised.value)


def test_a_tensor_that_does_not_fit_a_step_is_named_with_its_shape_and_the_remedy():
    words = r"^Late: w does not broadcast against one step, \[3, 4\]: .* \[5, 7\]; give it one element.*'eager'\)$"

    class Late(tt.snn.Layer):
        """Reads its tensor in the backward pass alone."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(noise(5, 7))

        def step(self, x):
            return (x * self.w,)

    with tt.backend("cpu"), pytest.raises(FuseError, match=words):
        Late().unroll(noise(5, 3, 4))
