"""What comes to a layer's `unroll` from outside: states, parameters, modes, hooks. Right, or refused; never misread."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

import tracetorch as tt
from tests.layer_cases import Mine, assert_bits, noise
from tests.test_engine_refusals import Step
from tracetorch.fused.layers import FuseError


def linear(x, mem):
    return x + mem


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize(("before", "now"), [(a, b) for a in DTYPES for b in DTYPES if a is not b])
def test_a_state_of_another_dtype_is_not_read_as_one_of_the_input_s(before, now):
    xs, found = noise(5, 3, 64), []
    for backend in ("eager", "auto"):
        layer = Step(linear)
        layer.mem = noise(3, 64).to(before)
        with tt.backend(backend), pytest.warns() if backend == "auto" else tt.backend(backend):
            found.append((layer.unroll(xs.to(now)), layer.mem))
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    layer.reset_states()
    layer.mem = noise(3, 64).to(before)
    with tt.backend("cpu"), pytest.raises(FuseError, match="the state mem is torch"):
        layer.unroll(xs.to(now))


class With(tt.snn.Layer):
    """mem' = mem / 2 + x * w."""

    def __init__(self, w, num_neurons=None, dim=-1, used=True):
        super().__init__(num_neurons, dim)
        self.define_state("mem")
        self.used = used
        if w.is_floating_point():
            self.w = nn.Parameter(w)
        else:
            self.register_buffer("w", w)

    def step(self, x, mem):
        mem = 0.5 * mem + (x * self.w if self.used else x)
        return mem, mem


def assert_alike(make, xs, time_dim=0):
    """The step loop's bits, and its gradients but for the order of sums."""
    found = []
    for backend in ("eager", "auto"):
        layer, given = make(), xs.clone().requires_grad_()
        with tt.backend(backend):
            ys = layer.unroll(given, time_dim)
        (ys.sum() + layer.mem.square().sum()).backward()
        found.append((ys, layer.mem, given.grad, *[p.grad for p in layer.parameters() if p.grad is not None]))
    for a, b in zip(found[0][:3], found[1][:3], strict=True):
        assert_bits(a, b)
    for a, b in zip(found[0][3:], found[1][3:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::tracetorch.fused.FuseWarning")
@pytest.mark.parametrize("w", [torch.tensor([1, 2, 3, 4]), torch.tensor(3), torch.tensor([True, False, True, True])])
@pytest.mark.parametrize("num_neurons", [None, 4])
def test_integers_are_not_read_as_floats(w, num_neurons):
    assert_alike(lambda: With(w, num_neurons), noise(5, 3, 4))


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (1, 3), (4, 1), (2, 4, 3)])
def test_a_parameter_of_several_dimensions_stands_as_in_the_step(shape, time_dim):
    # In the step the neurons, dimension 1, are last: w broadcasts against [B, rest, 3].
    rest = shape[-2] if shape[-2] > 1 else 4
    xs = noise(5, 2, 3, rest)
    w = noise(*shape, seed=1)
    assert_alike(lambda: With(w, 3, dim=1), xs if time_dim == 0 else xs.transpose(0, 1), time_dim)


def test_a_parameter_that_the_step_does_not_read_may_have_any_shape():
    with tt.backend("cpu"):
        With(noise(5, 7), used=False).unroll(noise(5, 3, 4))
    assert_alike(lambda: With(noise(5, 7), used=False), noise(5, 3, 4))


def test_one_parameter_under_two_names():
    class Twice(With):
        def __init__(self):
            super().__init__(noise(4))
            self.v = self.w

        def step(self, x, mem):
            mem = 0.5 * mem + x * self.w + self.v
            return mem, mem

    with tt.backend("cpu"):
        Twice().unroll(noise(5, 3, 4))
    assert_alike(Twice, noise(5, 3, 4))


class Grown(nn.Module):
    def forward(self, raw):
        return raw.repeat(2)

    def right_inverse(self, value):
        return value[:2].clone()


def test_a_raw_parameter_that_is_computed_from_one_of_another_shape():
    def make():
        layer = tt.snn.LIB(4, beta=0.9, quant_fn=tt.functional.round_ste())
        nn.utils.parametrize.register_parametrization(layer, "raw_beta", Grown(), unsafe=True)
        return layer

    with tt.backend("cpu"):
        ys = make().unroll(noise(5, 3, 4))
    assert ys.shape == (5, 3, 4)


class Counting(tt.snn.Layer):
    """A step that changes its layer: what it notes, counts or keeps."""

    def __init__(self, what):
        super().__init__()
        self.define_state("mem")
        self.what, self.seen, self.count, self.last, self.by_name = what, [], 0, None, {}

    def step(self, x, mem):
        if self.what == "list":
            self.seen.append(x)
        elif self.what == "count":
            self.count += 1
        elif self.what == "dict":
            self.by_name["x"] = x
        else:
            self.last = x
        return x * (1 + self.count), mem + x


@pytest.mark.filterwarnings("ignore::tracetorch.fused.FuseWarning")
@pytest.mark.parametrize("what", ["list", "count", "dict", "last"])
def test_a_step_that_changes_its_layer_runs_step_by_step_and_no_example_is_left_behind(what):
    xs = noise(5, 3, 4)
    layers, found = [], []
    for backend in ("eager", "auto"):
        layer = Counting(what)
        with tt.backend(backend):
            found.append([layer.unroll(xs) for _ in range(2)])
        layers.append(layer)
    for a, b in zip(*found, strict=True):
        assert_bits(a, b)
    assert [len(layer.seen) for layer in layers] == [10 if what == "list" else 0] * 2
    assert layers[0].count == layers[1].count
    assert layers[1].last is None or torch.equal(layers[1].last, xs[-1])
    assert all(torch.equal(x, xs[-1]) for x in layers[1].by_name.values())
    with tt.backend("cpu"), pytest.raises(tt.fused.GraphError, match=r"changes|depends"):
        Counting(what).unroll(xs)


def test_a_tangent_is_not_lost():
    xs, found = noise(5, 3, 4), []
    for backend in ("eager", "auto"):
        with forward_ad.dual_level(), torch.no_grad(), tt.backend(backend):
            ys = Step(linear).unroll(forward_ad.make_dual(xs, torch.ones_like(xs)))
            found.append(forward_ad.unpack_dual(ys).tangent.clone())
            with tt.backend("cpu"), pytest.raises(FuseError, match="forward-mode"):
                Step(linear).unroll(xs)
    assert_bits(*found)


def test_what_torch_traces_is_the_step_loop():
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = Mine(4).requires_grad_(False)

    def run(xs):
        layer.reset_states()
        return layer.unroll(xs)

    program = make_fx(run)(noise(5, 3, 4))
    xs = noise(5, 3, 4, seed=1)
    with tt.backend("eager"):
        assert_bits(program(xs), run(xs))


def test_a_fake_input_ends_in_no_abort():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert Step(linear).unroll(mode.from_tensor(noise(5, 3, 4))).shape == (5, 3, 4)
        assert Step(linear).unroll(noise(5, 3, 4)).shape == (5, 3, 4)
        with tt.backend("cpu"), pytest.raises(FuseError, match="dispatch modes"):
            Step(linear).unroll(noise(5, 3, 4))


def test_torch_func_is_refused_by_a_kernel_asked_for_by_name():
    def loss(xs):
        return Step(linear).unroll(xs).sum()

    with tt.backend("cpu"), pytest.raises(FuseError, match=r"torch\.func"):
        torch.func.grad(loss)(noise(5, 3, 4))


def test_a_hook_on_all_modules_sees_every_step():
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        Step(linear).unroll(noise(5, 3, 4))
        assert len(calls) == 5
        with tt.backend("cpu"), pytest.raises(FuseError, match="hook"):
            Step(linear).unroll(noise(5, 3, 4))
    finally:
        handle.remove()


HOOKS = {
    "another layout": (lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), lambda t: t),
    "an array": (lambda t: t.detach().numpy().copy(), torch.from_numpy),
}


@pytest.mark.parametrize("name", HOOKS)
def test_what_a_saved_tensor_hook_gives_back_is_read_as_it_is(name):
    found = []
    for hooked in (True, False):
        layer, xs = Mine(4), noise(40, 3, 4).requires_grad_()
        pack, unpack = HOOKS[name] if hooked else (lambda t: t, lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack), tt.backend("cpu"):
            ys = layer.unroll(xs)
        ys.sum().backward()
        found.append((xs.grad, layer.raw_beta.grad, layer.raw_gain.grad))
    for a, b in zip(*found, strict=True):
        assert_bits(a, b)


def test_another_dtype_from_a_saved_tensor_hook_is_refused():
    xs = noise(5, 3, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t), tt.backend("cpu"):
        ys = Mine(4).unroll(xs)
    with pytest.raises(RuntimeError, match=r"gave back .*float64"):
        ys.sum().backward()


def test_a_batch_of_gradients_is_refused_and_says_so():
    xs = noise(5, 3, 4).requires_grad_()
    ys = Mine(4).unroll(xs)
    with pytest.raises(RuntimeError, match="one gradient of its outputs at a time"):
        torch.autograd.grad(ys, xs, torch.stack([torch.ones_like(ys)] * 2), is_grads_batched=True)


@pytest.mark.parametrize(("shape", "time_dim"), [((0, 3, 4), 0), ((3, 0, 4), 1), ((0, 3, 2, 4), 0)])
def test_over_no_step_states_and_gradients_pass_through(shape, time_dim, poisoned):
    layer = Mine(4)
    element = (*shape[:time_dim], *shape[time_dim + 1 :])
    first = {name: noise(*element).requires_grad_() for name in layer.state_names}
    layer.load_states(first)
    with tt.backend("cpu"):
        assert layer.unroll(noise(*shape).requires_grad_(), time_dim).shape == shape
    for name, state in first.items():
        assert_bits(getattr(layer, name), state)
    (2 * layer.mem.sum()).backward()
    assert_bits(first["mem"].grad, torch.full(element, 2.0))
    assert layer.raw_beta.grad is None  # as in the step loop, where it meets nothing


def test_a_layer_without_a_state_over_no_step(poisoned):
    class Gain(tt.snn.Layer):
        def __init__(self):
            super().__init__()
            self.define_parameter("gain", 0.5, rank=0)

        def step(self, x):
            return (x * self.gain,)

    for shape, time_dim in (((0, 3, 4), 0), ((3, 0, 4), 1)):
        layer = Gain()
        with tt.backend("cpu"):
            layer.unroll(noise(*shape).requires_grad_(), time_dim).sum().backward()
        assert layer.raw_gain.grad is None


@pytest.mark.parametrize("backend", ["eager", "auto", "cpu"])
def test_several_outputs_over_no_step_are_several(backend):
    class Two(tt.snn.Layer):
        def __init__(self):
            super().__init__()
            self.define_outputs("a", "b")

        def step(self, x):
            return x, 2 * x

    with tt.backend(backend):
        ys = Two().unroll(torch.empty(0, 3, 4))
    assert isinstance(ys, tuple)
    assert [y.shape for y in ys] == [(0, 3, 4)] * 2


class Drawing(tt.snn.Layer):
    def __init__(self):
        super().__init__()
        self.define_state("mem")

    def step(self, x, mem):
        mem = 0.5 * mem + x
        return (torch.rand_like(mem) < mem).to(x.dtype) + torch.rand_like(x), mem


LAYOUTS = {
    "turned": (noise(5, 3, 4, 6).permute(0, 1, 3, 2), 0),
    "channels last": (noise(30, 3, 4, 6).to(memory_format=torch.channels_last).reshape(5, 6, 3, 4, 6), 0),
    "turned, [B, T, ...]": (noise(3, 5, 4, 6).transpose(2, 3), 1),
    "[B, T, ...] given as [T, B, ...]": (noise(3, 5, 4).transpose(0, 1), 0),
    "expanded": (noise(5, 1, 4).expand(5, 3, 4), 0),
    "every second": (noise(5, 3, 8)[..., ::2], 0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_numbers_are_drawn_in_the_order_of_the_input_s_memory(name):
    xs, time_dim = LAYOUTS[name]
    found = []
    for backend in ("eager", "cpu"):
        torch.manual_seed(0)
        with tt.backend(backend):
            found.append(Drawing().unroll(xs, time_dim))
    assert_bits(*found)
