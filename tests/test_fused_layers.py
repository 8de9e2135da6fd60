"""Native layers through the C kernel: they are their step loop, copy, fork and train; which backend runs is chosen."""

from __future__ import annotations

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits
from tests.engine_checks import check_chunks_compose, check_layer_unrolls, make_layer
from tracetorch.fused.kernel import Kernel

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize(("T", "B", "N"), [(1, 1, 1), (63, 2, 7), (5, 3, 513), (40, 1, 300)])
def test_layer_unrolls_through_the_kernel(time_dim, T, B, N):
    check_layer_unrolls("cpu", T, B, N, time_dim)


def test_feature_dimension_in_the_middle():
    eager = make_layer(6, dim=-3)
    fused = copy.deepcopy(eager)
    xs = torch.rand(20, 2, 6, 5, 4)
    with tt.backend("eager"):
        expected = eager.unroll(xs)
    with tt.backend("cpu"):
        given = fused.unroll(xs)
        by_batch = copy.deepcopy(make_layer(6, dim=-3)).unroll(xs.transpose(0, 1).contiguous(), 1)
    assert expected.sum() > 0
    assert_bits(given, expected)
    assert_bits(by_batch.transpose(0, 1), expected)


def test_chunks_compose_to_the_whole():
    check_chunks_compose("cpu", T=100, N=300, cut=37)


@pytest.mark.parametrize("shape", [(0, 2, 300), (4, 0, 300)])
def test_empty_sequences(shape):
    layer = make_layer()
    with tt.backend("cpu"):
        assert layer.unroll(torch.rand(shape)).shape == shape


def test_another_length_needs_no_other_kernel_and_a_changed_value_does():
    class Scaled(tt.snn.Layer):
        def __init__(self):
            super().__init__(4)
            self.define_state("mem")
            self.scale = 2.0

        def step(self, x, mem):
            mem = 0.5 * mem + self.scale * x
            return mem, mem

    layer = Scaled()
    with tt.backend("cpu"):
        for T in (1, 5, 50):
            layer.reset_states()
            layer.unroll(torch.ones(T, 2, 4))
        assert sum(isinstance(kernel, Kernel) for kernel in layer.kernels.values()) == 1
        layer.reset_states()
        layer.scale = 3.0
        assert float(layer.unroll(torch.ones(1, 1, 4)).max()) == 3.0


def test_a_layer_with_kernels_copies_and_pickles():
    layer = make_layer()
    with tt.backend("cpu"):
        layer.unroll(torch.rand(5, 2, 300))
        twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        expected = layer.unroll(torch.ones(5, 2, 300))
        for twin in twins:
            assert_bits(twin.unroll(torch.ones(5, 2, 300)), expected)


def test_source_is_deterministic_and_speaks_c():
    text = tt.fused.source(make_layer(), "cpu", backward=True)
    assert text == tt.fused.source(make_layer(), "cpu", backward=True)
    assert "void forward(" in text
    assert "void backward(" in text
    assert "void backward(" not in tt.fused.source(make_layer(), "cpu")
    with pytest.raises(ValueError, match="eager"):
        tt.fused.source(make_layer(), "eager")


def test_backends_are_chosen_or_refused():
    with pytest.raises(ValueError, match="cuda"), tt.backend("cuda"):
        pass
    layer = make_layer()
    with tt.backend("cpu"), pytest.raises(tt.fused.FuseError, match="complex64"):
        layer.unroll(torch.rand(3, 2, 300).to(torch.complex64))
    with tt.backend("cpu"), pytest.raises(tt.fused.FuseError, match=r"is torch\.float32"):
        layer.unroll(torch.rand(3, 2, 300).double())
    with tt.backend("cpu"), pytest.raises(ValueError, match="num_neurons=300"):
        layer.unroll(torch.rand(3, 2, 299))
    assert layer.mem is None


def _in_child(queue, layer, xs):
    with tt.backend("cpu"), torch.no_grad():
        queue.put(layer.unroll(xs).tolist())


def test_a_forked_child_runs_serially_and_does_not_hang():
    # Everything but the kernel is done before the fork: torch's own parallel regions do hang in a forked child.
    layer, xs = make_layer(600), torch.ones(20, 1, 600)
    with tt.backend("cpu"), torch.no_grad():
        expected = layer.unroll(xs).tolist()
    layer.reset_states()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, layer, xs), daemon=True)
    child.start()
    assert queue.get(timeout=20) == expected
    child.join(timeout=20)
    assert child.exitcode == 0


def test_training_through_the_kernel_learns():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 32), tt.snn.LIB(32, quant_fn=tt.functional.round_ste()), nn.Linear(32, 2))
    xs = torch.rand(25, 64, 10)
    target = (xs.mean(0)[:, 0] > 0.5).long()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        tt.reset_states(network)
        with tt.backend("cpu"):
            spikes = network[1].unroll(network[0](xs))
        loss = nn.functional.cross_entropy(network[2](spikes).mean(0), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
