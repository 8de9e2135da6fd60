"""Native layers, models and their states: `Layer`, `LI`, `LIB`, `Model`, `Sequential`, `unroll`, state functions."""

import copy
import io
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tests import naive
from tracetorch.functional.surrogates import Surrogate
from tracetorch.fused.graph import GraphError


def hard(num_neurons, **options):
    return tt.snn.LIB(num_neurons, quant_fn=tt.functional.round_ste(), **options)


def noise(*shape, seed=0, mean=0.4, deviation=0.8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * deviation + mean


def assert_bits(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    assert a.dtype == b.dtype
    assert a.numel()
    assert a.detach().contiguous().numpy().tobytes() == b.detach().contiguous().numpy().tobytes()


class Mine(tt.snn.Layer):
    """A user's own neuron, as the design shows it: two states, one decay, one plain parameter."""

    def __init__(self, num_neurons, beta=0.9, dim=-1):
        super().__init__(num_neurons, dim)
        self.define_state("mem")
        self.define_state("slow")
        self.define_decay("beta", beta, rank=1, learnable=True)
        self.define_parameter("gain", 0.5, rank=0)

    def step(self, x, mem, slow):
        mem = self.beta * mem + x
        slow = 0.5 * slow + self.gain * mem
        return torch.tanh(mem - slow), mem, slow


LAYERS = {
    "LI": lambda n, **o: tt.snn.LI(n, **o),
    "LIB": lambda n, **o: tt.snn.LIB(n, **o),
    "LIB hard": hard,
    "Mine": lambda n, **o: Mine(n, **o),
}
SMOOTH = ("LIB", "Mine")  # with a sigmoid whose value is passed on


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


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_states_carry_on_until_they_are_reset(name):
    layer = LAYERS[name](3)
    xs = noise(20, 2, 3)
    assert all(state is None for state in layer.save_states().values())
    whole = layer.unroll(xs)
    layer.reset_states()
    assert all(state is None for state in layer.save_states().values())
    parts = torch.cat([layer.unroll(xs[:7]), layer.unroll(xs[7:8]), layer.unroll(xs[8:])])
    assert_bits(parts, whole)
    assert not torch.equal(layer.unroll(xs), whole), "without a reset another sequence goes on from here"
    layer.zero_states()
    assert all((state == 0).all() and state.shape == (2, 3) for state in layer.save_states().values())
    assert_bits(layer.unroll(xs), whole)


@pytest.mark.parametrize("name", LAYERS)
def test_states_are_no_part_of_the_state_dict(name):
    layer = LAYERS[name](3)
    before = set(layer.state_dict())
    layer(noise(2, 3))
    assert set(layer.state_dict()) == before
    assert not before & set(layer.save_states())
    other = LAYERS[name](3)
    other(noise(7, 3))
    other.load_state_dict(layer.state_dict())
    assert next(iter(other.save_states().values())).shape == (7, 3), "loading weights leaves the states alone"


def test_states_follow_to():
    layer = Mine(3)
    layer(noise(2, 3))
    layer.double()
    assert layer.mem.dtype == layer.slow.dtype == torch.float64
    assert layer(noise(2, 3).double()).dtype == torch.float64


def test_detached_states_cut_the_graph():
    layer = tt.snn.LIB(3)
    x = noise(2, 3).requires_grad_()
    layer(x)
    assert layer.mem.requires_grad
    value = layer.mem.clone()
    layer.detach_states()
    assert not layer.mem.requires_grad
    assert_bits(layer.mem, value)
    layer(noise(2, 3)).sum().backward()
    assert x.grad is None
    fresh = tt.snn.LIB(3)
    fresh.detach_states()
    assert fresh.mem is None


def test_truncated_backpropagation():
    """Two chunks with a detach between: each backward ends at the cut."""
    layer, xs = tt.snn.LIB(3), noise(20, 2, 3)
    gradients = []
    for chunk in xs.split(10):
        layer.zero_grad()
        layer.unroll(chunk).sum().backward()
        gradients.append(layer.raw_beta.grad.clone())
        layer.detach_states()
    layer.zero_grad()
    layer.reset_states()
    layer.unroll(xs).sum().backward()
    assert not torch.allclose(sum(gradients), layer.raw_beta.grad, rtol=1e-3), "the cut has an effect"


def test_saved_states_continue_where_they_were_saved():
    layer, xs = Mine(3), noise(20, 2, 3)
    layer.unroll(xs[:10])
    saved = layer.save_states()
    assert list(saved) == ["mem", "slow"]
    rest = layer.unroll(xs[10:])
    layer.load_states(saved)
    assert_bits(layer.unroll(xs[10:]), rest)
    other = copy.deepcopy(layer)
    other.reset_states()
    other.load_states(saved)
    assert_bits(other.unroll(xs[10:]), rest)


def test_states_of_another_layer_are_refused():
    layer = Mine(3)
    layer(noise(2, 3))
    kept = layer.save_states()
    for bad in ({}, {"mem": None}, {**kept, "third": None}):
        with pytest.raises(ValueError, match=r"Mine: states .*'mem', 'slow'"):
            layer.load_states(bad)
    assert layer.mem is kept["mem"], "and nothing was changed"
    layer.load_states({"slow": None, "third": None}, strict=False)
    assert layer.mem is kept["mem"]
    assert layer.slow is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_in_the_middle_of_a_sequence(name, duplicate):
    """The state hangs on a graph; the copy gets its value, and the original keeps its graph."""
    layer, xs = LAYERS[name](3), noise(20, 2, 3)
    first = layer.unroll(xs[:10])
    other = duplicate(layer)
    states = other.save_states()
    assert set(states) == set(layer.save_states())
    for state, value in states.items():
        mine = getattr(layer, state)
        assert mine.requires_grad
        assert not value.requires_grad
        assert value.data_ptr() != mine.data_ptr()
        assert_bits(value, mine)
    assert_bits(other.unroll(xs[10:]), layer.unroll(xs[10:]))
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()
    first.sum().backward()
    assert all(parameter.grad is None for parameter in other.parameters())
    assert any(parameter.grad.any() for parameter in layer.parameters())


def test_a_copy_of_a_spec_neuron_in_the_middle_of_a_sequence():
    spec = naive.lif_spec(np.float32(5.0), np.float32(1.0), syn=np.float32(3.0), dtype=np.float32, raw="exp_tau")
    layer, xs = tt.snn.SpecNeuron(spec), noise(20, 2, 3) * 4
    layer.unroll(xs[:10])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            saved = layer.save_states()
            assert_bits(other.unroll(xs[10:]), layer.unroll(xs[10:]))
            layer.load_states(saved)
        assert other.spec == layer.spec


def test_torch_save_of_a_model_in_the_middle_of_a_sequence():
    model, xs = tt.Sequential(nn.Linear(4, 3), hard(3)), noise(20, 2, 4)
    tt.unroll(model, xs[:10], fold="exact")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert_bits(tt.unroll(other, xs[10:], fold="exact"), tt.unroll(model, xs[10:], fold="exact"))


# ---- unroll ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 7), (63, 1, 7), (5, 2, 513), (20, 3, 1)])
@pytest.mark.parametrize("name", LAYERS)
def test_unroll_is_stepping(name, shape, time_dim):
    """Bit for bit, outputs and states, with both orders of the dimensions; through a kernel, a sigmoid is rounding."""
    a, xs = LAYERS[name](shape[-1]), noise(*shape)
    b, c = copy.deepcopy(a), copy.deepcopy(a)
    stepped = torch.stack([a(x) for x in xs])
    given = xs if time_dim == 0 else xs.transpose(0, 1)
    with tt.backend("eager"):
        unrolled = b.unroll(given, time_dim=time_dim)
    fused = c.unroll(given, time_dim=time_dim)
    assert unrolled.shape == fused.shape == given.shape
    assert_bits(unrolled if time_dim == 0 else unrolled.transpose(0, 1), stepped)
    alike = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6) if name in SMOOTH else assert_bits
    alike(fused if time_dim == 0 else fused.transpose(0, 1), stepped)
    for state in a.save_states():
        assert_bits(getattr(a, state), getattr(b, state))
        alike(getattr(a, state), getattr(c, state))
    if name == "LIB hard" and xs.numel() > 100:
        assert 0 < stepped.sum() < stepped.numel()


def test_unroll_over_no_step_changes_nothing():
    layer = hard(3)
    layer(noise(2, 3))
    state = layer.mem
    assert layer.unroll(torch.ones(0, 2, 3)).shape == (0, 2, 3)
    assert layer.unroll(torch.ones(2, 0, 3), time_dim=1).shape == (2, 0, 3)
    assert layer.mem is state


def test_a_batch_of_no_sample():
    layer = hard(3)
    assert layer.unroll(torch.ones(4, 0, 3)).shape == (4, 0, 3)
    assert layer.mem.shape == (0, 3)


def test_trace_records_the_states_after_every_step():
    layer, xs = Mine(3), noise(20, 2, 3)
    outputs, states = layer.trace(xs)
    assert list(states) == ["mem", "slow"]
    layer.reset_states()
    for t, x in enumerate(xs):
        assert_bits(layer(x), outputs[t])
        assert_bits(layer.mem, states["mem"][t])
        assert_bits(layer.slow, states["slow"][t])
    layer.reset_states()
    outputs, states = layer.trace(xs.transpose(0, 1), time_dim=1, states=("slow",))
    assert set(states) == {"slow"}
    assert states["slow"].shape == (2, 20, 3)
    assert_bits(states["slow"][:, -1], layer.slow)


def test_gradients_of_unroll_are_those_of_stepping():
    a, xs = tt.snn.LIB(7), noise(63, 2, 7)
    b = copy.deepcopy(a)
    inputs = [xs.clone().requires_grad_() for _ in range(2)]
    torch.stack([a(x) for x in inputs[0]]).square().sum().backward()
    b.unroll(inputs[1]).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-7)
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("time_dim", [0, 1])
def test_unroll_of_a_model(time_dim):
    torch.manual_seed(0)
    model = tt.Sequential(nn.Linear(4, 6), hard(6), nn.Sequential(nn.Linear(6, 3), tt.snn.LI(3)))
    xs = noise(25, 2, 4)
    stepped = torch.stack([model(x) for x in xs])
    model.reset_states()
    given = xs if time_dim == 0 else xs.transpose(0, 1)
    found = tt.unroll(model, given, time_dim=time_dim, fold="exact")
    assert found.shape == ((25, 2, 3) if time_dim == 0 else (2, 25, 3))
    assert_bits(found if time_dim == 0 else found.transpose(0, 1), stepped)


def test_unroll_of_a_model_names_what_it_cannot_do():
    model = tt.Sequential(nn.Linear(4, 3), hard(3))
    with pytest.raises(ValueError, match="fold='sideways'"):
        tt.unroll(model, noise(5, 2, 4), fold="sideways")
    with pytest.raises(ValueError, match="no time step"):
        tt.unroll(model, noise(0, 2, 4))
    with pytest.raises(ValueError, match="no time step"):
        tt.unroll(model, noise(2, 0, 4), time_dim=1)


# ---- the feature dimension -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "shape"), [(-3, (2, 7, 4, 5)), (1, (2, 7, 4, 5)), (-1, (2, 3, 7)), (-2, (2, 7, 3))])
@pytest.mark.parametrize("name", LAYERS)
def test_neurons_at_another_dimension(name, dim, shape):
    """Feature maps [B, C, H, W] with one neuron a channel: the same as with the channels last."""
    beta = torch.linspace(0.3, 0.95, 7)
    layer, last = LAYERS[name](7, beta=beta, dim=dim), LAYERS[name](7, beta=beta)
    xs = noise(20, *shape)
    place = dim if dim < 0 else dim + 1
    outputs = layer.unroll(xs)
    assert outputs.shape == xs.shape
    assert_bits(outputs.movedim(place, -1), last.unroll(xs.movedim(place, -1)))
    for state in layer.save_states():
        assert getattr(layer, state).shape == shape
        assert_bits(getattr(layer, state).movedim(dim, -1), getattr(last, state))
    outputs.sum().backward()
    assert all((parameter.grad != 0).any() for parameter in layer.parameters())


def test_a_single_sample_without_a_batch():
    layer, batched = hard(7), hard(7)
    xs = noise(30, 7)
    outputs = layer.unroll(xs)
    assert_bits(outputs, batched.unroll(xs[:, None])[:, 0])
    assert layer.mem.shape == (7,)
    assert outputs.sum() > 5


# ---- LIB is its equation ---------------------------------------------------------------------------------------------

BETA, THRESHOLD, BIAS = [0.5, 0.8, 0.95], [0.6, 1.0, 1.4], [0.2, 0.0, -0.3]


def double_lib(quantized):
    def array(values):
        return torch.tensor(values, dtype=torch.float64)

    return tt.snn.LIB(
        3,
        beta=array(BETA),
        threshold=array(THRESHOLD),
        bias=array(BIAS),
        quant_fn=tt.functional.round_ste() if quantized else None,
    )


@pytest.mark.parametrize("quantized", [True, False])
def test_lib_is_its_equation(quantized):
    layer, xs = double_lib(quantized), noise(60, 2, 3).double()
    outputs, states = layer.trace(xs)
    truth, mems = naive.columns(
        lambda x, beta, theta, bias: naive.tracetorch_lib(x, beta, theta, bias, hard=quantized),
        xs.numpy(),
        {"beta": BETA, "theta": THRESHOLD, "bias": BIAS},
    )
    np.testing.assert_allclose(outputs.detach().numpy(), truth, rtol=0, atol=1e-12)
    np.testing.assert_allclose(states["mem"].detach().numpy(), mems, rtol=0, atol=1e-12)
    if quantized:
        assert set(np.unique(truth)) == {0.0, 1.0}
        assert 30 < truth.sum() < truth.size - 30
    else:
        assert ((truth > 0.01) & (truth < 0.99)).sum() > 100


@pytest.mark.parametrize("quantized", [True, False])
def test_the_gradients_of_lib_are_the_derivatives_of_its_equation(quantized):
    layer, xs = double_lib(quantized), noise(40, 2, 3).double().requires_grad_()
    weights = noise(40, 2, 3, seed=1, mean=0).double()
    (layer.unroll(xs) * weights).sum().backward()
    numbers = {
        "beta": layer.raw_beta.detach().numpy(),
        "theta": layer.raw_threshold.detach().numpy(),
        "bias": layer.raw_bias.detach().numpy(),
    }

    def loop(x, beta, theta, bias):
        return naive.tracetorch_lib(x, naive.sigmoid(beta), naive.softplus(theta), bias, hard=quantized)

    for own, parameter in (("beta", layer.raw_beta), ("theta", layer.raw_threshold), ("bias", layer.raw_bias)):
        moved, _ = naive.columns(loop, xs.detach().numpy(), numbers, {own: 1.0})
        truth = (weights.numpy() * moved).sum((0, 1))
        np.testing.assert_allclose(parameter.grad.numpy(), truth, rtol=1e-9, atol=1e-11)
        assert np.abs(truth).max() > 0.1
    direction = noise(40, 2, 3, seed=2).double().numpy()
    moved, _ = naive.columns(loop, xs.detach().numpy(), numbers, {"x": direction})
    found = (xs.grad.numpy() * direction).sum(0)
    np.testing.assert_allclose(found, (weights.numpy() * moved).sum(0), rtol=1e-9, atol=1e-11)
    if quantized:
        return
    h = 1e-6  # without the quantizer the whole map is smooth

    def loss(x):
        return (weights.numpy() * naive.columns(loop, x, numbers)[0]).sum(0)

    x = xs.detach().numpy()
    slope = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    np.testing.assert_allclose(found, slope, rtol=1e-6, atol=1e-7)


def test_li_is_its_equation():
    layer, xs = tt.snn.LI(3, beta=torch.tensor(BETA, dtype=torch.float64)), noise(60, 2, 3).double()
    (truth,) = naive.columns(naive.leaky_integrator, xs.numpy(), {"decay": BETA})
    np.testing.assert_allclose(layer.unroll(xs).detach().numpy(), truth, rtol=0, atol=1e-12)
    np.testing.assert_allclose(layer.mem.detach().numpy(), truth[-1], rtol=0, atol=1e-12)


def test_a_hard_lib_spikes_above_its_threshold_and_not_at_it():
    """sigmoid(0) = 1/2 rounds to 0: a strict comparison, on exact ties."""
    layer = hard(3, beta=0.5, threshold=1.0)
    threshold = layer.threshold.detach()
    below = torch.nextafter(threshold, torch.tensor(0.0))
    for x, spike in ((threshold, 0.0), (below, 0.0), (threshold + 1e-6, 1.0), (threshold + 5, 1.0), (-threshold, 0.0)):
        layer.reset_states()
        assert (layer(x[None]) == spike).all(), x


def test_the_quantizer_rounds_to_even_and_passes_the_gradient():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 0.49, 0.51], requires_grad=True)
    y = tt.functional.round_ste()(x)
    assert y.tolist() == [-2.0, 0.0, 0.0, 2.0, 2.0, 0.0, 1.0]
    y.backward(torch.arange(7.0))
    assert x.grad.tolist() == list(range(7))
    y = tt.functional.round_ste(0.25)(torch.tensor([0.1, 0.13, 0.3, -0.4]))
    assert y.tolist() == [0.0, 0.25, 0.25, -0.5]


def test_heaviside_and_count():
    surrogate, one = Surrogate("straight_through"), torch.tensor(1.0)
    z = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 1.0, float("nan"), float("inf")], requires_grad=True)
    assert tt.functional.heaviside(z, one, surrogate).tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert tt.functional.heaviside(z, one, surrogate, strict=False).tolist() == [0, 1, 1, 1, 1, 0, 1]
    tt.functional.heaviside(z, one, surrogate).backward(torch.arange(7.0))
    assert z.grad.tolist() == list(range(7))
    v, theta = torch.tensor([-3.0, 0.0, 0.4, 0.5, 1.2, 1.5, 9.9]), torch.tensor(0.5)
    assert tt.functional.spike_count(v, theta, v - theta, surrogate).tolist() == [0, 0, 0, 1, 2, 3, 19]
    assert tt.functional.spike_count(v, theta, v - theta, surrogate, 2).tolist() == [0, 0, 0, 1, 2, 2, 2]


def test_time_constants():
    alpha = tt.functional.tau_to_alpha(10.0)
    assert alpha.item() == pytest.approx(np.exp(-0.1), rel=1e-6)
    assert tt.functional.tau_to_alpha(10.0, dt=0.5).item() == pytest.approx(np.exp(-0.05), rel=1e-6)
    tau = torch.tensor([0.5, 3.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(tt.functional.alpha_to_tau(tt.functional.tau_to_alpha(tau)), tau)
    torch.testing.assert_close(tt.functional.alpha_to_tau(tt.functional.tau_to_alpha(tau, 0.1), 0.1), tau)


# ---- a user's own layer ----------------------------------------------------------------------------------------------


class Beta(tt.snn.Layer):
    """`Mine` of DESIGN.md, with its one state."""

    def __init__(self, num_neurons, beta=0.9, dim=-1):
        super().__init__(num_neurons, dim)
        self.define_state("mem")
        self.define_decay("beta", beta, rank=1, learnable=True)

    def step(self, x, mem):
        mem = self.beta * mem + x
        return mem, mem


def test_a_user_s_layer():
    xs = noise(30, 2, 5)
    mine, stock = Beta(5, 0.8), tt.snn.LI(5, 0.8)
    assert_bits(mine.unroll(xs), stock.unroll(xs))
    mine.unroll(xs).sum().backward()
    assert (mine.raw_beta.grad != 0).all()
    model = tt.Sequential(nn.Linear(5, 5), mine)
    model.reset_states()
    assert mine.mem is None


def test_a_user_s_layer_of_any_shape_and_with_every_kind_of_parameter():
    class Free(tt.snn.Layer):
        def __init__(self):
            super().__init__()
            self.define_state("v")
            self.define_positive("scale", 2.0, learnable=False)
            self.define_parameter("shift", -1.0)

        def step(self, x, v):
            v = torch.maximum(v, x * self.scale + self.shift)
            return v * 2, v

    layer = Free()
    outputs = layer.unroll(noise(9, 2, 3, 4))
    assert outputs.shape == (9, 2, 3, 4)
    assert (outputs[1:] >= outputs[:-1]).all()
    assert layer.raw_shift.shape == ()
    assert [name for name, _ in layer.named_parameters()] == ["raw_shift"]
    with pytest.raises(ValueError, match="Free: the state 'v'"):
        layer(noise(2, 3))


def test_a_state_cannot_be_declared_twice():
    """The second would silently take the place of the first in every step."""
    layer = tt.snn.Layer(3)
    layer.define_state("mem")
    with pytest.raises((ValueError, KeyError), match="mem"):
        layer.define_state("mem")


# ---- models ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """No `tt.Model`: native layers at several depths, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 3), hard(3))
        self.blocks = nn.ModuleDict({"a": tt.snn.LI(3), "b": nn.ModuleList([Mine(3)])})
        self.again = self.blocks["a"]

    def forward(self, x):
        return self.blocks["b"][0](self.blocks["a"](self.first(x)))


class Ours(tt.Model, Net):
    pass


@pytest.mark.parametrize("cls", [Net, Ours])
def test_the_state_functions_reach_every_native_layer(cls):
    torch.manual_seed(0)
    net, xs = cls(), noise(20, 2, 4)
    paths = {"first.1": ["mem"], "blocks.a": ["mem"], "blocks.b.0": ["mem", "slow"]}
    whole = tt.unroll(net, xs, fold="exact")
    saved = tt.save_states(net)
    assert {path: list(states) for path, states in saved.items()} == paths
    assert all(state.requires_grad for states in saved.values() for state in states.values())
    tt.detach_states(net)
    detached = tt.save_states(net)
    assert not any(state.requires_grad for states in detached.values() for state in states.values())
    tt.reset_states(net)
    assert all(state is None for states in tt.save_states(net).values() for state in states.values())
    assert_bits(tt.unroll(net, xs, fold="exact"), whole)
    tt.reset_states(net)
    tt.unroll(net, xs[:9], fold="exact")
    middle = tt.save_states(net)
    rest = tt.unroll(net, xs[9:], fold="exact")
    assert_bits(rest, whole[9:])
    tt.load_states(net, middle)
    assert_bits(tt.unroll(net, xs[9:], fold="exact"), rest)


def test_a_model_has_them_as_methods():
    torch.manual_seed(0)
    for net in (Ours(), tt.Sequential(nn.Linear(4, 3), nn.Sequential(hard(3), Mine(3)))):
        xs = noise(20, 2, 4)
        whole = tt.unroll(net, xs, fold="exact")
        saved = net.save_states()
        assert saved.keys() == tt.save_states(net).keys()
        net.zero_states()
        for states in net.save_states().values():
            assert all((state == 0).all() for state in states.values())
        net.load_states(saved)
        net.detach_states()
        assert not any(s.requires_grad for states in net.save_states().values() for s in states.values())
        net.reset_states()
        assert all(s is None for states in net.save_states().values() for s in states.values())
        assert_bits(tt.unroll(net, xs, fold="exact"), whole)


def test_loading_is_strict_and_all_or_nothing():
    net = Ours()
    net(noise(2, 4))
    saved = tt.save_states(net)
    kept = {path: dict(states) for path, states in saved.items()}
    reset = {path: dict.fromkeys(states) for path, states in saved.items()}
    for bad, named in (
        ({path: reset[path] for path in ("first.1", "blocks.a")}, r"blocks\.b\.0"),
        ({**reset, "other": {}}, "other"),
        ({**reset, "blocks.b.0": {"mem": None}}, "Mine"),
        ({**reset, "blocks.b.0": {"mem": None, "slow": None, "third": None}}, "third"),
        ({}, "blocks"),
    ):
        with pytest.raises(ValueError, match=named):
            tt.load_states(net, bad)
        now = tt.save_states(net)
        assert all(now[path][name] is kept[path][name] for path in kept for name in kept[path]), "nothing was changed"
    tt.load_states(net, {"first.1": {"mem": None}, "other": {}}, strict=False)
    assert net.first[1].mem is None
    assert net.blocks["a"].mem is kept["blocks.a"]["mem"]


def test_a_module_without_native_layers_has_no_states():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    tt.reset_states(net)
    tt.detach_states(net)
    assert tt.save_states(net) == {}
    tt.load_states(net, {})


def test_a_bare_layer_is_a_module_too():
    layer = hard(3)
    layer(noise(2, 3))
    saved = tt.save_states(layer)
    assert list(saved) == [""]
    tt.reset_states(layer)
    assert layer.mem is None
    tt.load_states(layer, saved)
    assert layer.mem is saved[""]["mem"]


def test_copies_of_a_model_do_not_share_states():
    net = Ours()
    net(noise(2, 4))
    other = copy.deepcopy(net)
    other.reset_states()
    assert net.first[1].mem is not None
    assert other.again is other.blocks["a"], "a layer used twice is one layer in the copy"


def test_training_changes_the_raw_values_and_the_values_with_them():
    torch.manual_seed(0)
    layer = hard(3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    beta, threshold = layer.beta.detach().clone(), layer.threshold.detach().clone()
    for _ in range(3):
        layer.reset_states()
        optimizer.zero_grad()
        layer.unroll(noise(30, 4, 3)).mean().backward()
        optimizer.step()
    assert (layer.beta != beta).all()
    assert (layer.threshold != threshold).all()
    assert torch.equal(layer.beta, torch.sigmoid(layer.raw_beta))


# ---- several inputs and outputs --------------------------------------------------------------------------------------


class Gated(tt.snn.Layer):
    """A neuron with a gate beside its input; it shows its membrane beside its spikes."""

    def __init__(self, num_neurons=5, dim=-1):
        super().__init__(num_neurons, dim)
        self.define_state("mem")
        self.define_decay("beta", 0.9)
        self.define_outputs("spikes", "membrane")

    def step(self, x, gate, mem):
        mem = mem * self.beta + x * gate
        spikes = tt.functional.heaviside(mem - 1, torch.ones(()), tt.functional.Surrogate("atan"))
        return spikes, mem, mem - spikes.detach()


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("dim", [-1, 1])
def test_a_step_of_several_inputs_and_outputs_is_fused_bit_for_bit(time_dim, dim):
    torch.manual_seed(0)
    shape = [3, 5, 4] if dim == 1 else [3, 4, 5]
    shape.insert(time_dim, 37)
    x, gate = (torch.randn(shape).requires_grad_() for _ in range(2))
    weights = [torch.randn(shape) for _ in range(2)]
    found = {}
    for backend in ("eager", "cpu"):
        layer = Gated(dim=dim)
        with tt.backend(backend):
            spikes, membrane = layer.unroll((x, gate), time_dim)
        loss = (spikes * weights[0] + membrane * weights[1]).sum()
        found[backend] = [spikes, membrane, layer.mem, *torch.autograd.grad(loss, [x, gate])]
        assert spikes.sum() > 10
    for a, b in zip(found["eager"], found["cpu"], strict=True):
        assert torch.equal(a, b)


def test_a_call_of_several_inputs_and_outputs_is_a_step_of_the_sequence():
    torch.manual_seed(0)
    layer, other = Gated(), Gated()
    x, gate = torch.randn(11, 2, 5), torch.randn(11, 2, 5)
    with tt.backend("cpu"), torch.no_grad():
        spikes, membrane = layer.unroll((x, gate))
    for t in range(11):
        now = other(x[t], gate[t])
        assert isinstance(now, tuple)
        assert torch.equal(now[0], spikes[t])
        assert torch.equal(now[1], membrane[t])


def test_several_inputs_that_do_not_fit_are_refused():
    layer, x = Gated(), torch.zeros(3, 2, 5)
    with pytest.raises(TypeError, match=r"Gated: 1 inputs given, its step takes 2: x, gate"):
        layer(x[0])
    with pytest.raises(ValueError, match=r"Gated: the input gate has shape \[5\], x has \[2, 5\]"):
        layer(x[0], x[0, 0])
    with tt.backend("cpu"):
        with pytest.raises(tt.fused.FuseError, match="Gated: 1 input sequences, but its step takes 2: x, gate"):
            layer.unroll(x)
        with pytest.raises(tt.fused.FuseError, match=r"the input gate is torch\.float64"):
            layer.unroll((x, x.double()))
    with tt.backend("eager"), pytest.raises(ValueError, match="of different lengths"):
        layer.unroll((x, x[:2]))
    assert layer.mem is None
    with pytest.raises(ValueError, match="give at least one name"):
        layer.define_outputs()


# Words of C and Python, and what the kernels' own variables and arguments are called.
_NAMES = ("n", "m", "e", "b", "t", "T", "B", "N", "at", "job", "place", "start", "put", "memcpy", "int", "y", "d_y")
_NAMES += ("in_x", "first_mem", "s_mem", "v0", "stream", "by_t", "tl", "live", "out", "d_in_x", "x_row")


@pytest.mark.parametrize("name", _NAMES)
def test_a_parameter_may_have_any_name(name):
    class Named(tt.snn.Layer):
        def __init__(self):
            super().__init__(3)
            self.define_state("mem")
            self.define_decay(name, 0.7)

        def step(self, x, mem):
            mem = mem * getattr(self, name) + x
            return mem, mem

    torch.manual_seed(0)
    xs, results = torch.randn(4, 2, 3), []
    for backend in ("eager", "cpu"):
        layer = Named()
        with tt.backend(backend):
            ys = layer.unroll(xs)
        ys.sum().backward()
        results.append((ys, getattr(layer, f"raw_{name}").grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ["step", "unroll", "float", "training", "dim", "input_names"])
def test_a_parameter_may_not_take_the_name_of_something_else(name):
    layer = tt.snn.Layer(3)
    with pytest.raises(ValueError, match=f"Layer: {name}: the layer has something else of this name"):
        layer.define_decay(name, 0.7)
    assert not list(layer.parameters())


# ---- random numbers --------------------------------------------------------------------------------------------------


class Noisy(tt.snn.Layer):
    """Two draws a step, which the step loop takes in turn."""

    def __init__(self, num_neurons=5, dim=-1):
        super().__init__(num_neurons, dim)
        self.define_state("mem")
        self.define_decay("beta", 0.9)

    def step(self, x, mem):
        mem = mem * self.beta + torch.where(torch.rand_like(x) < 0.3, x, x * 0.5)
        return mem - torch.rand_like(mem), mem


class Chance(Noisy):
    """A spike with a probability that the membrane decides, and one with a given probability."""

    def step(self, x, mem):
        mem = mem * self.beta + x
        spikes = torch.bernoulli(mem.clamp(0, 1).detach())
        return spikes + torch.bernoulli(torch.full_like(x, 0.25)), mem * (1 - spikes)


RANDOM = {
    "LIT": lambda dim: tt.snn.LIT(5, dim=dim, quant_fn=tt.functional.stochastic_round_ste()),
    "DSRLITS": lambda dim: tt.snn.DSRLITS(5, dim=dim, quant_fn=tt.functional.stochastic_round_ste(0.5)),
    "two draws": lambda dim: Noisy(dim=dim),
    "LIB": lambda dim: tt.snn.LIB(5, dim=dim, quant_fn=tt.functional.probabilistic_ste()),
    "a chance": lambda dim: Chance(dim=dim),
}


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_those_of_the_step_loop(name, dim, time_dim):
    shape = [3, 5, 4] if dim == 1 else [3, 4, 5]
    shape.insert(time_dim, 37)
    xs, results = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2, []
    for backend in ("eager", "cpu", "cpu"):
        torch.manual_seed(5)
        layer, x = RANDOM[name](dim), xs.clone().requires_grad_()
        with tt.backend(backend):
            ys = layer.unroll(x, time_dim)
        (gradient,) = torch.autograd.grad(ys.pow(2).sum() + getattr(layer, layer.state_names[-1]).sum(), x)
        results.append((ys, gradient, torch.get_rng_state()))
    (eager, slope, state), (first, ours, after), (again, _, _) = results
    assert torch.equal(after, state)
    assert torch.equal(first, again)
    exact = name not in ("DSRLITS", "LIB")  # these have a sigmoid in the step
    assert torch.equal(first, eager) if exact else torch.allclose(first, eager, atol=1e-6)
    assert float((ours - slope).abs().max()) <= 1e-5 * float(slope.abs().max())
    torch.manual_seed(6)
    with tt.backend("cpu"):
        assert not torch.equal(RANDOM[name](dim).unroll(xs, time_dim), first)


def test_a_probability_that_is_none_gives_nan_in_a_kernel():
    class Wrong(Noisy):
        def step(self, x, mem):
            return torch.bernoulli(x), mem

    layer, xs = Wrong(), torch.tensor([0.0, 1.0, 1.5, -0.25, torch.nan]).expand(2, 1, 5)
    with tt.backend("cpu"):
        assert layer.unroll(xs)[0, 0, :2].tolist() == [0, 1]
        assert layer.unroll(xs)[..., 2:].isnan().all()
    with tt.backend("eager"), pytest.raises(RuntimeError, match="p_in"):
        layer.unroll(xs)


def test_building_a_kernel_draws_nothing():
    layer = Noisy()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    tt.fused.source(layer, "cpu", backward=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_of_half_precision_are_drawn_by_the_step_loop():
    layer, xs = Noisy(), torch.randn(3, 2, 5).bfloat16()
    layer.bfloat16()
    with tt.backend("cpu"), pytest.raises(tt.fused.FuseError, match=r"random numbers of torch\.bfloat16"):
        layer.unroll(xs)
    assert layer.mem is None


@pytest.mark.parametrize(
    "draw", [torch.randn_like, lambda x: torch.rand(x.shape), lambda x: torch.rand_like(x, dtype=torch.float64).float()]
)
def test_other_random_numbers_are_drawn_by_the_step_loop(draw):
    class Other(Noisy):
        def step(self, x, mem):
            return x + draw(x), mem

    with tt.backend("cpu"), pytest.raises(GraphError, match=r"rand|constant"):
        Other().unroll(torch.randn(3, 2, 5))
