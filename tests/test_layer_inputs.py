"""Steps of several inputs and outputs, of any names, and of random numbers."""

import pytest
import torch

import tracetorch as tt
from tracetorch.fused.graph import GraphError

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


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_time_dimension_that_the_input_has_not_is_refused(backend):
    with tt.backend(backend), pytest.raises(ValueError, match=r"LIB: time_dim=3 is out of range .* \[4, 2, 3\]"):
        tt.snn.LIB(3).unroll(torch.ones(4, 2, 3), time_dim=3)


class Bare(tt.snn.Layer):
    """A step that forgets the tuple."""

    def step(self, x):
        return 2 * x


def test_a_step_that_returns_no_tuple_is_told_so():
    with pytest.raises(TypeError, match=r"step returned Tensor; expected a tuple of the output alone"):
        Bare()(torch.ones(2, 3))
    with tt.backend("cpu"), pytest.raises(tt.fused.GraphError, match="a tensor, expected a tuple of 1: output"):
        Bare().unroll(torch.ones(4, 2, 3))
