"""Constrained parameters of native layers, and what a layer refuses."""

import numpy as np
import pytest
import torch

import tracetorch as tt
from tests.bits import assert_bits
from tests.layer_cases import Mine, hard, noise

# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, 2.0, "3"])
@pytest.mark.parametrize("cls", [tt.snn.LI, tt.snn.LIB, Mine])
def test_a_number_of_neurons(cls, bad):
    with pytest.raises(ValueError, match=rf"{cls.__name__}: num_neurons .*{bad!r}"):
        cls(bad)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("beta", bad) for bad in (0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), 0.99999999999)),
        *(("threshold", bad) for bad in (0.0, -1.0, float("nan"), float("inf"))),
        *(("bias", bad) for bad in (float("nan"), float("inf"), -float("inf"))),
    ],
)
def test_values_out_of_range_are_named(name, bad):
    with pytest.raises(ValueError, match=rf"LIB: {name} must be .*{bad!r}"):
        tt.snn.LIB(3, **{name: bad})
    with pytest.raises(ValueError, match=f"LIB: {name} must be"):
        tt.snn.LIB(3, **{name: [0.5, bad, 0.5]})
    with pytest.raises(ValueError, match=f"LIB: {name} must be"):
        tt.snn.LIB(3, **{name: torch.tensor(bad)})


@pytest.mark.parametrize("name", ["beta", "threshold", "bias"])
@pytest.mark.parametrize("shape", [(2,), (4,), (1, 3), (3, 1), (0,)])
def test_values_of_another_shape_are_named(name, shape):
    with pytest.raises(ValueError, match=rf"LIB: {name} has shape \[{', '.join(map(str, shape))}\]"):
        tt.snn.LIB(3, **{name: torch.full(shape, 0.5)})


@pytest.mark.parametrize("name", ["beta", "threshold", "bias"])
@pytest.mark.parametrize("rank", [2, -1, None, "1"])
def test_another_rank_is_named(name, rank):
    with pytest.raises(ValueError, match=rf"{name}_rank={rank!r}"):
        tt.snn.LIB(3, **{f"{name}_rank": rank})


@pytest.mark.parametrize("name", ["beta", "threshold", "bias"])
def test_a_shared_value_given_per_neuron_is_refused(name):
    """rank=0 means one value for all; a list of them would be trained apart."""
    with pytest.raises(ValueError, match=name):
        tt.snn.LIB(3, **{name: [0.3, 0.4, 0.5], f"{name}_rank": 0})


@pytest.mark.parametrize("step_size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_size_of_the_quantizer(step_size):
    with pytest.raises(ValueError, match=f"step_size .*{step_size!r}"):
        tt.functional.round_ste(step_size)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_an_input_of_integers_is_refused(dtype):
    with pytest.raises(TypeError, match=f"LIB: .*{dtype}"):
        hard(3)(torch.ones(2, 3).to(dtype))


def test_an_input_of_another_size_is_refused():
    layer = hard(3)
    for shape in ((2, 4), (4,), (3, 1), (2, 3, 5)):
        with pytest.raises(ValueError, match=rf"LIB: .*size {shape[-1]} at dim=-1.*num_neurons=3"):
            layer(torch.ones(shape))
    assert layer.mem is None, "a refused input leaves no state"
    with pytest.raises(ValueError, match="dim=-3"):
        hard(3, dim=-3)(torch.ones(2, 3))
    with pytest.raises(ValueError, match="dim=2"):
        hard(3, dim=2)(torch.ones(2, 3))


def test_another_batch_size_is_refused_until_the_states_are_reset():
    layer = hard(3)
    first = layer(torch.ones(2, 3))
    for shape in ((4, 3), (1, 3), (3,), (2, 2, 3)):
        with pytest.raises(ValueError, match=r"LIB: the state 'mem' has shape \[2, 3\].*reset_states"):
            layer(torch.ones(shape))
    layer.reset_states()
    assert layer(torch.ones(4, 3)).shape == (4, 3)
    layer.reset_states()
    assert_bits(layer(torch.ones(2, 3)), first)


def test_a_step_is_to_be_written():
    with pytest.raises(NotImplementedError, match="Layer must define step"):
        tt.snn.Layer(3)(torch.ones(2, 3))


class Wrong(tt.snn.Layer):
    def __init__(self, results):
        super().__init__(3)
        self.define_state("mem")
        self.results = results

    def step(self, x, mem):
        return self.results(x)


@pytest.mark.parametrize(
    "results",
    [
        lambda x: (x,),
        lambda x: (x, x, x),
        lambda x: (),
        lambda x: x,
        lambda x: torch.stack([x, x]),
        lambda x: [x],
        lambda x: None,
    ],
    ids=["output only", "one too many", "nothing", "a tensor", "a tensor of two", "a short list", "None"],
)
def test_a_step_that_does_not_return_its_states_is_refused(results):
    """A bare tensor with as many rows as there should be results must not pass for them."""
    layer = Wrong(results)
    with pytest.raises(TypeError, match=r"Wrong\.step"):
        layer(torch.ones(2, 3))
    assert layer.mem is None


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_values_come_back_as_given():
    layer = tt.snn.LIB(3, beta=[0.3, 0.9, 0.999], threshold=[1e-3, 1.0, 50.0], bias=[-1.0, 0.0, 2.0])
    torch.testing.assert_close(layer.beta, torch.tensor([0.3, 0.9, 0.999]), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.threshold, torch.tensor([1e-3, 1.0, 50.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.bias, torch.tensor([-1.0, 0.0, 2.0]), rtol=0, atol=0)
    assert {name for name, _ in layer.named_parameters()} == {"raw_beta", "raw_threshold", "raw_bias"}


def test_the_raw_value_of_beta_is_its_logit_and_of_the_threshold_its_inverse_softplus():
    layer = tt.snn.LIB(1, beta=0.8, threshold=1.5)
    assert layer.raw_beta.item() == pytest.approx(np.log(0.8 / 0.2), rel=1e-6)
    assert layer.raw_threshold.item() == pytest.approx(np.log(np.expm1(1.5)), rel=1e-6)
    for raw in (-80.0, -5.0, 5.0):
        with torch.no_grad():
            layer.raw_beta.fill_(raw)
            layer.raw_threshold.fill_(raw)
        assert 0 < layer.beta.item() < 1, "whatever an optimizer does, the values stay in their range"
        assert layer.threshold.item() > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_rank(rank):
    layer = tt.snn.LIB(5, beta_rank=rank, threshold_rank=rank, bias_rank=rank)
    shape = (5,) if rank else ()
    assert [parameter.shape for parameter in layer.parameters()] == [shape] * 3
    xs = noise(20, 2, 5)
    layer.unroll(xs).sum().backward()
    assert all(p.grad.shape == shape and (p.grad != 0).all() for p in layer.parameters())


def test_ranks_compute_the_same():
    xs = noise(30, 2, 5)
    a, b = (hard(5, beta_rank=r, threshold_rank=r, bias_rank=r) for r in (0, 1))
    outputs = a.unroll(xs), b.unroll(xs)
    assert_bits(*outputs)
    assert outputs[0].sum() > 10
    for output in outputs:
        output.sum().backward()
    for one, many in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one.grad, many.grad.sum(), rtol=1e-5, atol=1e-6)


def test_what_is_not_learned_is_a_buffer():
    for name in ("beta", "threshold", "bias"):
        layer = tt.snn.LIB(3, **{f"learn_{name}": False})
        raw = f"raw_{name}"
        assert raw not in dict(layer.named_parameters())
        assert raw in dict(layer.named_buffers())
        assert raw in layer.state_dict(), "it is part of the model all the same"
        assert len(list(layer.parameters())) == 2
        layer(noise(2, 3)).sum().backward()
        assert not getattr(layer, name).requires_grad
    layer = tt.snn.LI(3, learn_beta=False)
    assert not list(layer.parameters())
    assert not layer(noise(2, 3)).requires_grad


def test_the_caller_s_tensor_is_not_aliased():
    beta, bias = torch.full((3,), 0.5), torch.zeros(3)
    layer = tt.snn.LIB(3, beta=beta, bias=bias)
    beta.fill_(0.9)
    bias.fill_(7.0)
    assert (layer.beta == 0.5).all()
    assert (layer.bias == 0.0).all()
    with torch.no_grad():
        layer.raw_bias.fill_(3.0)
    assert (bias == 7.0).all()


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = hard(3).nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_precision_of_the_input_is_kept(dtype):
    layer = tt.snn.LIB(3).to(dtype)
    assert layer(noise(2, 3).to(dtype)).dtype == dtype
    assert layer.mem.dtype == dtype
    assert tt.snn.LIB(3, beta=torch.tensor(0.9, dtype=dtype)).raw_beta.dtype == dtype
