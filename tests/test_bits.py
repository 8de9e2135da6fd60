"""The comparison that all tests of bits rest on rejects what it has to."""

from __future__ import annotations

import pytest
import torch

from tests.bits import assert_bits

ONE = torch.tensor([1.0, 0.0, float("nan")])
OTHERS = {
    "a value": torch.tensor([1.0 + 2**-23, 0.0, float("nan")]),
    "a zero's sign": torch.tensor([1.0, -0.0, float("nan")]),
    "a NaN": torch.tensor([1.0, 0.0, 2.0]),
    "the dtype": ONE.double(),
    "the shape": ONE[None],
    "a number that would be repeated": ONE[:1],
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_tensor_is_rejected(what):
    for pair in ((ONE, OTHERS[what]), (OTHERS[what], ONE)):
        with pytest.raises(AssertionError):
            assert_bits(*pair)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_no_value_is_no_equality(shape):
    with pytest.raises(AssertionError, match="no value"):
        assert_bits(torch.zeros(shape), torch.zeros(shape))


def test_the_message_names_what_differs_and_how_much_of_it():
    with pytest.raises(AssertionError, match="the membrane: 2 of 3 values differ"):
        assert_bits(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0]), "the membrane")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_equal_tensors_pass_whatever_their_layout(shape, dtype):
    a = torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
    assert_bits(a, a.clone())
    across = a.movedim(0, -1) if shape else a
    assert_bits(across, across.contiguous())
