"""What JAX keeps of a stage's numbers between calls: never behind what torch has, however it was written."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("brainpy")

import brainstate
import jax.numpy as jnp

import tracetorch as tt
from tests.bits import assert_bits
from tests.pipeline_cases import lif, stimulus
from tests.test_jax_stage import aligned
from tracetorch.adapters import JaxStage
from tracetorch.adapters.jax import bridge as jax_bridge
from tracetorch.adapters.jax.mirror import Mirror


def small():
    return torch.linspace(-1.0, 1.0, 12)


def large():
    """JAX can alias it."""
    return aligned(64, 64)


def odd():
    """Large, and at an address that JAX copies from."""
    return aligned(65, 64).reshape(-1)[1:4097].requires_grad_(False)


def strided():
    return aligned(64, 128)[:, ::2]


KINDS = [small, large, odd, strided]


def numbers(mirror, tensor):
    (array,) = mirror.arrays([tensor])
    return np.array(array)


@pytest.mark.parametrize("make", KINDS)
def test_nothing_is_made_anew_where_nothing_was_written(make):
    mirror, tensor = Mirror(), make()
    (first,) = mirror.arrays([tensor])
    (second,) = mirror.arrays([tensor])
    assert first is second
    assert np.array_equal(np.asarray(first), tensor.numpy())


def _optimizer(p):
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.5).step()
    return p


def _load(p):
    holder = nn.Module()
    holder.p = p
    holder.load_state_dict({"p": torch.full_like(p, 3.0)})
    return holder.p


def _replaced_data(p):
    p.data = p.data * 2
    return p


def _transposed_data(p):
    p.data = p.data.flip(0) if p.ndim == 1 else p.data.T
    return p


def _through_data(p):
    p.data.mul_(-2.0)
    return p


def _one_number(p):
    p.data.reshape(-1)[-1:].add_(1.0) if p.is_contiguous() else p.data[-1, -1].add_(1.0)
    return p


WRITES = [
    *(_optimizer, _load, _replaced_data, _transposed_data, _through_data, _one_number),
    lambda p: nn.Parameter(p.detach() + 1),
    lambda p: p.detach().numpy().__imul__(3.0) is None or p,
]
NAMES = ["optimizer", "load", "data", "transposed", "through-data", "one-number", "another", "numpy"]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("write", WRITES, ids=NAMES)
def test_every_write_is_seen(make, write):
    mirror, parameter = Mirror(), nn.Parameter(make())
    before = numbers(mirror, parameter)
    written = write(parameter)
    assert np.array_equal(numbers(mirror, written), written.detach().numpy())
    assert not np.array_equal(before, written.detach().numpy()), "the test wrote nothing"


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("number", [-0.0, float("nan")])
def test_numbers_that_compare_oddly_are_seen_too(make, number):
    mirror, tensor = Mirror(), make().zero_()
    numbers(mirror, tensor)
    tensor.data.fill_(number)
    found = numbers(mirror, tensor)
    assert np.array_equal(np.isnan(found), np.isnan(tensor.numpy()))
    assert np.array_equal(np.signbit(found), np.signbit(tensor.numpy()))
    (one,), (other,) = mirror.arrays([tensor]), mirror.arrays([tensor])
    assert one is other, "a NaN is itself"


def test_only_what_jax_cannot_alias_is_copied():
    mirror = Mirror()
    tensors = [large(), odd(), small()]
    arrays = mirror.arrays(tensors)
    assert [jax_bridge.aliases(t, a) for t, a in zip(tensors, arrays, strict=True)] == [True, False, False]


def test_a_tensor_made_in_inference_mode_has_no_version():
    with torch.inference_mode():
        tensor = small()
    mirror = Mirror()
    numbers(mirror, tensor)
    with torch.inference_mode():
        tensor.mul_(2.0)
    assert np.array_equal(numbers(mirror, tensor), tensor.numpy())


def test_memory_of_another_dtype_is_another():
    mirror, tensor = Mirror(), torch.zeros(6)
    numbers(mirror, tensor)
    tensor.data = torch.zeros(6).view(2, 3)
    assert numbers(mirror, tensor).shape == (2, 3)


def test_a_result_that_is_a_kept_number_is_the_callers_own():
    """What JAX has kept must not be written by who gets a result."""
    program, mirror, tensor = jax_bridge.Program(lambda a: (a, a + 1)), Mirror(), odd()
    kept = mirror.arrays([tensor])
    program._run = lambda a: (a, a + 1)  # hands its argument through, as JAX may
    first, _ = program.run(tensor, kept=kept)
    first.zero_()
    assert tensor.any()
    assert np.array_equal(np.asarray(mirror.arrays([tensor])[0]), tensor.numpy())


class Scaled(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = brainstate.ParamState(jnp.arange(1.0, 6.0))

    def update(self, x):
        return x * self.weight.value


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("write", WRITES[:6], ids=NAMES[:6])
def test_the_next_call_computes_with_what_was_written(write, grad):
    stage, xs = JaxStage(Scaled()), stimulus()
    with torch.set_grad_enabled(grad):
        stage(xs)
        write(stage.weight)
        assert_bits(stage(xs).detach(), xs * stage.weight.detach())


def test_backward_is_of_the_numbers_of_its_forward():
    stage, xs = JaxStage(Scaled()), stimulus().requires_grad_()
    ys = stage(xs)
    with torch.no_grad():
        stage.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_copies_have_arrays_of_their_own():
    stage, xs = JaxStage(lif(), dt=1.0, learn=["R"]), stimulus(steps=40)
    expected = stage(xs)
    for twin in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        with torch.no_grad():
            twin.R.mul_(3.0)
        for each in (stage, twin):
            tt.reset_states(each)
        assert_bits(stage(xs), expected)
        assert twin(xs).sum() > expected.sum()


def test_moved_to_another_dtype_and_back():
    stage, xs = JaxStage(lif(), dt=1.0), stimulus(steps=40)
    expected = stage(xs)
    stage.double().float()
    tt.reset_states(stage)
    assert_bits(stage(xs), expected)
