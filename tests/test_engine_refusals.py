"""What a user may write into a step that no kernel computes: refused by name, and run as the step loop runs it."""

import random
import re
import warnings

import numpy as np
import pytest
import torch

import tracetorch as tt
from tests.layer_cases import assert_bits, noise
from tracetorch.fused import FuseWarning, GraphError


class Step(tt.snn.Layer):
    """A layer of one state, mem' = mem / 2 + x, whose output is a function of x and mem."""

    def __init__(self, output, states=None):
        super().__init__()
        self.define_state("mem")
        self.output, self.states = output, states or (lambda x, mem: 0.5 * mem + x)

    def step(self, x, mem):
        return self.output(x, mem), self.states(x, mem)


def both(make, xs, seed=0):
    """Outputs and last states by the step loop and by "auto", and what "auto" warned of."""
    found = []
    for backend in ("eager", "auto"):
        layer = make()
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        with warnings.catch_warnings(record=True) as caught, tt.backend(backend):
            warnings.simplefilter("always")
            found.append((layer.unroll(xs), layer.mem))
    return found, [str(each.message) for each in caught if each.category is FuseWarning]


def assert_the_step_loop_runs(make, xs, word):
    (loop, auto), said = both(make, xs)
    for a, b in zip(loop, auto, strict=True):
        assert_bits(a, b)
    assert len(said) == 1, said
    assert re.search(word, said[0])
    with tt.backend("cpu"), pytest.raises(GraphError, match=word):
        make().unroll(xs)


VALUES = {
    "numpy": lambda x, mem: torch.from_numpy(np.tanh(x.detach().numpy())),
    "__array__": lambda x, mem: torch.tensor(np.asarray(mem.detach()) * 2) + x,
    "tolist": lambda x, mem: torch.tensor(x.tolist()),
    "data_ptr": lambda x, mem: x + 0 * x.data_ptr(),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_leaves_torch_is_no_constant(name):
    # The tracer of operations sees none here, and would take the example's value for a constant of the step.
    assert_the_step_loop_runs(lambda: Step(VALUES[name]), noise(4, 2, 3), name)


def test_a_value_that_leaves_torch_in_a_custom_function_is_no_constant():
    class Outside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.from_numpy(np.sign(x.numpy()))

        @staticmethod
        def backward(ctx, grad):
            return grad

    assert_the_step_loop_runs(lambda: Step(lambda x, mem: Outside.apply(mem + x)), noise(4, 2, 3), "numpy")


SHAPES = {
    "a view of one shape": lambda x, mem: x.view(2, 4).clone(),
    "two halves": lambda x, mem: x.unflatten(-1, (2, 2)).flatten(-2),
    "another neuron": lambda x, mem: x * mem[0, 3],
    "a product": lambda x, mem: x @ torch.eye(4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_that_needs_its_shape_runs_step_by_step(name):
    assert_the_step_loop_runs(lambda: Step(SHAPES[name]), noise(4, 2, 4), "small example|pointwise|takes apart")


def test_an_error_of_the_step_itself_is_the_user_s_to_see():
    layer = Step(lambda x, mem: x.squeeze(7))
    with pytest.warns(FuseWarning, match="IndexError"), pytest.raises(IndexError):
        layer.unroll(noise(4, 2, 3))


CHANCE = {
    "Python": (lambda x, mem: x * float(random.random() > 0.5), "Python"),
    "NumPy": (lambda x, mem: x * float(np.random.rand() > 0.5), "NumPy"),
    "torch, one number": (lambda x, mem: x * (torch.rand(1) > 0.5), "draws random numbers"),
    "torch, in place": (lambda x, mem: x * torch.empty(1).uniform_().round(), "draws random numbers"),
    "torch, an integer": (lambda x, mem: x * torch.randint(0, 2, (1,)), "draws random numbers"),
}


@pytest.mark.parametrize("name", CHANCE)
def test_a_coin_that_falls_alike_at_two_examples_is_still_a_coin(name):
    output, word = CHANCE[name]
    for seed in range(4):
        (loop, auto), said = both(lambda: Step(output), noise(4, 2, 3), seed)
        assert_bits(loop[0], auto[0])
        assert word in said[0]


def test_looking_for_a_kernel_leaves_every_generator_as_it_was():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()
    with tt.backend("cpu"), pytest.raises(GraphError):
        Step(lambda x, mem: x * random.random() * np.random.rand()).unroll(noise(4, 2, 3))
    after = random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()
    assert before[0] == after[0]
    assert before[1][1] == after[1][1]
    assert torch.equal(before[2], after[2])
    assert (before[1][0] == after[1][0]).all()


INTEGERS = {
    "torch.int64": lambda x, mem: (mem > 0.3) * 2 * x,
    "torch.int32": lambda x, mem: (mem > 0.3).int() * x,
    "torch.float16": lambda x, mem: mem.half().to(x.dtype),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_arithmetic_in_another_dtype_is_refused_by_it(name):
    assert_the_step_loop_runs(lambda: Step(INTEGERS[name]), noise(4, 2, 3), name)


def test_what_rounds_otherwise_in_float32_among_float64_is_refused():
    xs = noise(4, 2, 3).double()
    assert_the_step_loop_runs(lambda: Step(lambda x, mem: mem.float().exp().double()), xs, "computes in float32")


CHANGES = {"bool": lambda x, mem: mem + x > 0.5, "float64": lambda x, mem: (0.5 * mem + x).double()}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_changes_its_dtype_is_refused(name):
    assert_the_step_loop_runs(
        lambda: Step(lambda x, mem: x + mem, CHANGES[name]), noise(4, 2, 3), "the state mem becomes"
    )


SINGLE = {
    "product": lambda x, mem: mem.float() * 0.1,
    "sum": lambda x, mem: x.float() + mem.float(),
    "difference": lambda x, mem: x.float() - 0.3,
    "quotient": lambda x, mem: x.float() / mem.float(),
    "quotient of a number": lambda x, mem: 0.7 / mem.float(),
    "third of a magnitude": lambda x, mem: mem.float().abs() / 3,
    "several": lambda x, mem: (x.float() * mem.float() - 0.1) / 3 * x,
}


@pytest.mark.parametrize("name", SINGLE)
def test_float32_among_float64_is_rounded_as_in_torch(name):
    """In float64 first, which changes nothing of these (double rounding from 53 bits to 24)."""
    xs = noise(50, 3, 64).double() * 1.1
    kernel_is_the_step_loop(lambda x, mem: SINGLE[name](x, mem).double(), xs)


def kernel_is_the_step_loop(output, xs=None):
    xs = noise(5, 3, 16) if xs is None else xs
    (loop, auto), said = both(lambda: Step(output), xs)
    assert not said
    for a, b in zip(loop, auto, strict=True):
        assert_bits(a, b)


def test_a_sum_of_truth_values_is_an_or_and_a_product_an_and():
    kernel_is_the_step_loop(lambda x, mem: ((mem > 0.3) + (x > 0.3)).to(x.dtype) + 2.0 * ((mem > 0) * (x > 0)))


def test_a_difference_scaled_by_a_negative_number():
    kernel_is_the_step_loop(lambda x, mem: torch.sub(mem, x, alpha=-2.5))


def test_anomaly_detection_is_about_the_data():
    # It looks for NaN by operations of its own, which are no part of the step.
    xs = noise(4, 2, 3).requires_grad_()
    with torch.autograd.set_detect_anomaly(True), tt.backend("cpu"):
        Step(lambda x, mem: torch.tanh(mem + x)).unroll(xs).sum().backward()
    assert bool(xs.grad.isfinite().all())


def test_a_power_of_one_and_a_half_has_torch_s_infinities_and_is_within_two_ulp():
    xs = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-39, 3e38, -1.0, 0.5, 1.5, 2.5, 88.8]).repeat(
        3, 2, 1
    )
    (loop, auto), said = both(lambda: Step(lambda x, mem: x**1.5), xs)
    assert not said
    assert torch.equal(loop[0].isnan(), auto[0].isnan())
    assert torch.equal(loop[0].isinf(), auto[0].isinf())
    finite = loop[0].isfinite()
    ulp = torch.nextafter(loop[0].abs(), torch.tensor(torch.inf)) - loop[0].abs()
    assert bool(((loop[0] - auto[0]).abs() <= 2 * ulp)[finite].all())
