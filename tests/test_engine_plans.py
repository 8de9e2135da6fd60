"""What was found out of one call of a layer's `unroll` serves the next call of its kind, and no other."""

import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.layer_cases import Mine, Scaled, assert_bits, noise
from tests.test_engine_calls import With, linear
from tests.test_engine_refusals import Step
from tests.test_layer_inputs import Chance, Gated
from tracetorch.fused.layers import FuseError


def refused(layer, xs, word, time_dim=0):
    with tt.backend("cpu"), pytest.raises(FuseError, match=word):
        layer.unroll(xs, time_dim)


# ---- one call after another ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_layer_without_parameters_takes_one_dtype_after_the_other(dtypes):
    layer = Step(linear)
    for dtype in dtypes:
        xs, found = noise(5, 3, 4).to(dtype), []
        for backend in ("eager", "cpu"):
            layer.reset_states()
            with tt.backend(backend):
                found.append(layer.unroll(xs))
        assert_bits(*found)


def test_one_shape_is_read_along_either_dimension():
    layers, xs = (Mine(4), Mine(4)), noise(5, 3, 4)
    for time_dim in (0, 1):
        found = []
        for layer, backend in zip(layers, ("eager", "cpu"), strict=True):
            layer.reset_states()
            with tt.backend(backend), torch.no_grad():
                found.append((layer.unroll(xs, time_dim), layer.unroll(xs, time_dim), layer.mem))
        for a, b in zip(*(each[2:] for each in found), strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b)


def test_a_call_without_gradients_makes_no_kernel_for_one_with_them():
    layer, xs = Step(linear), noise(5, 3, 4)
    with tt.backend("cpu"):
        with torch.no_grad():
            layer.unroll(xs)
        layer.reset_states()
        layer.unroll(given := xs.clone().requires_grad_()).sum().backward()
    later = torch.arange(4, -1, -1.0)[:, None, None]
    assert_bits(given.grad, (3 - 2 * 0.5**later).expand(5, 3, 4))


def test_values_taken_instead_of_parameters_are_looked_at_again():
    layer = tt.snn.LI(4)
    with tt.backend("cpu"):
        layer.unroll(noise(5, 3, 4))
    layer.TTcompile()
    layer.baked["beta"] = layer.baked["beta"].double()
    refused(layer, noise(5, 3, 4), r"beta is torch\.float64")


def test_a_layer_is_itself_again_after_its_kernel_was_made():
    layer, xs = Mine(4), noise(5, 3, 4)
    with tt.backend("cpu"):
        layer.unroll(xs)
    assert not layer.overrides
    assert layer.value("gain") is layer.raw_gain


# ---- parameters and states that no kernel takes ----------------------------------------------------------------------


def test_parameters_elsewhere_or_of_another_dtype_are_refused():
    refused(With(torch.empty(4, device="meta")), noise(5, 3, 4), "w is on meta, the input on cpu")
    refused(With(noise(4).double()), noise(5, 3, 4).bfloat16(), r"w is torch\.float64, the input torch\.bfloat16")


def test_a_state_elsewhere_is_no_state_of_zero():
    """Memory at address 0 is what a kernel takes for zero."""
    layer = Step(linear)
    layer.mem = torch.empty(3, 4, device="meta")
    refused(layer, noise(5, 3, 4), "the state mem is torch.float32 on meta")


def test_a_state_that_is_more_than_its_memory_is_refused():
    class Marked(torch.Tensor):
        pass

    layer = Step(linear)
    layer.mem = noise(3, 4).as_subclass(Marked)
    refused(layer, noise(5, 3, 4), "the state mem is")


def test_a_state_alone_may_want_a_gradient():
    layer, mem = Step(linear), noise(3, 4).requires_grad_()
    layer.mem = mem
    with tt.backend("cpu"):
        layer.unroll(noise(5, 3, 4)).sum().backward()
    assert_bits(mem.grad, torch.full((3, 4), sum(0.5**k for k in range(5))))


def test_a_state_of_the_input_s_half_precision_beside_parameters_of_float32():
    found = []
    for backend in ("eager", "cpu"):
        layer = With(noise(4))
        layer.mem = noise(3, 4, seed=1).bfloat16()
        with tt.backend(backend), torch.no_grad():
            found.append(layer.unroll(noise(5, 3, 4).bfloat16()))
    assert found[0].dtype is found[1].dtype is torch.float32
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


def test_a_parameter_of_which_the_gradient_alone_depends_has_to_fit():
    class Late(With):
        def step(self, x, mem):
            mem = 0.5 * mem + Scaled.apply(x, self.w)
            return mem, mem

    refused(Late(noise(5, 7)), noise(5, 3, 4).requires_grad_(), "w does not broadcast")


def test_one_buffer_under_two_names():
    class Twice(With):
        def __init__(self):
            super().__init__(noise(4))
            del self.w
            self.register_buffer("w", noise(4))
            self.register_buffer("v", self.w)

        def step(self, x, mem):
            mem = 0.5 * mem + x * self.w + self.v
            return mem, mem

    found = []
    for backend in ("eager", "cpu"):
        with tt.backend(backend):
            found.append(Twice().unroll(noise(5, 3, 4)))
    assert_bits(*found)


def test_a_buffer_that_is_not_dense_is_refused():
    layer = Step(linear)
    layer.register_buffer("odd", torch.eye(3).to_sparse())
    with tt.backend("cpu"), pytest.raises((FuseError, tt.fused.GraphError), match="which no kernel reads"):
        layer.unroll(noise(5, 3, 4))


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_a_third_dimension_is_no_time_of_a_kernel():
    refused(Step(linear), noise(2, 3, 5, 4), "time_dim=2", 2)


def test_several_inputs_of_different_shapes_are_refused():
    x = noise(5, 3, 5)
    refused(Gated(), (x, x[:, :1]), r"the input gate is torch\.float32 \[5, 1, 5\]")


class Doubled(torch.Tensor):
    """A tensor whose every product is twice as large."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result.as_subclass(torch.Tensor) if func is torch.Tensor.mul else result


def test_every_one_of_several_inputs_has_to_be_its_memory():
    x, gate = noise(5, 3, 5), noise(5, 3, 5, seed=1)
    refused(Gated(), (x, gate.as_subclass(Doubled)), "tensor subclasses")
    found = []
    for backend in ("eager", "auto"):
        with tt.backend(backend):
            found.append(Gated().unroll((x, gate.as_subclass(Doubled)))[1].as_subclass(torch.Tensor))
    assert_bits(*found)


@pytest.mark.parametrize("dim", [-1, 0])
def test_random_numbers_of_a_step_of_one_dimension(dim):
    found = []
    for backend in ("eager", "cpu"):
        torch.manual_seed(0)
        with tt.backend(backend):
            found.append(Chance(dim=dim).unroll(noise(7, 5)))
    assert_bits(*found)


# ---- who wants every call --------------------------------------------------------------------------------------------

HOOKS = {
    "forward_pre": lambda module, note: module.register_forward_pre_hook(lambda *_: note()),
    "forward": lambda module, note: module.register_forward_hook(lambda *_: note()),
    "full_backward_pre": lambda module, note: module.register_full_backward_pre_hook(lambda *_: note()),
    "full_backward": lambda module, note: module.register_full_backward_hook(lambda *_: note()),
}
GLOBAL = {
    name: getattr(nn.modules.module, f"register_module_{name}_hook")
    for name in ("forward_pre", "forward", "full_backward_pre", "full_backward")
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_of_any_kind_sees_every_step(name):
    for everywhere in (False, True):
        layer, calls, xs = Step(linear), [], noise(5, 3, 4).requires_grad_()

        def note(calls=calls):
            calls.append(1)

        handle = GLOBAL[name](lambda *_, note=note: note()) if everywhere else HOOKS[name](layer, note)
        try:
            refused(layer, xs, "hook")
            layer.unroll(xs).sum().backward()
        finally:
            handle.remove()
        assert len(calls) == 5


def test_a_forward_put_in_the_place_of_its_own_is_called_every_step():
    layer, calls = Step(linear), []
    own = layer.forward
    layer.forward = lambda x: (calls.append(1), own(x))[1]
    refused(layer, noise(5, 3, 4), "its forward is its own")
    layer.unroll(noise(5, 3, 4))
    assert len(calls) == 5


# ---- steps that change their layer -----------------------------------------------------------------------------------


class Careless(tt.snn.Layer):
    def __init__(self, change):
        super().__init__()
        self.define_state("mem")
        self.change, self.seen, self.spare = change, [1, 2, 3, 4, 5], None
        self.w = nn.Parameter(torch.ones(()))
        self.register_buffer("kept", torch.ones(()))

    def step(self, x, mem):
        self.change(self)
        return x * self.w * self.kept, mem + x


CHANGES = {
    "a parameter": lambda layer: setattr(layer, "w", nn.Parameter(layer.w.detach())),
    "a buffer": lambda layer: setattr(layer, "kept", layer.kept + 1),
    "an attribute that goes": lambda layer: layer.__dict__.pop("spare", None),
    "a new attribute": lambda layer: setattr(layer, "another", 1),
    "a list that grows": lambda layer: layer.seen.append(1),
    "a list that shrinks": lambda layer: layer.seen and layer.seen.pop(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_that_changes_its_layer_is_refused_and_the_layer_as_it_was(name):
    layer = Careless(CHANGES[name])
    before = dict(vars(layer)), dict(layer._parameters), dict(layer._buffers), list(layer.seen)
    with tt.backend("cpu"), pytest.raises(tt.fused.GraphError, match=r"the step changes .* of its layer|declare it"):
        layer.unroll(noise(5, 3, 4))
    after = dict(vars(layer)), dict(layer._parameters), dict(layer._buffers), list(layer.seen)
    for old, new in zip(before[:3], after[:3], strict=True):
        assert old.keys() == new.keys()
        assert all(new[key] is old[key] for key in old)
    assert after[3] == before[3]


@pytest.mark.filterwarnings("ignore::tracetorch.fused.FuseWarning")
def test_a_buffer_that_counts_is_counted():
    found = []
    for backend in ("eager", "auto"):
        layer = Careless(CHANGES["a buffer"])
        with tt.backend(backend):
            found.append((layer.unroll(noise(5, 3, 4)), layer.kept))
    assert float(found[1][1]) == 6.0
    for a, b in zip(*found, strict=True):
        assert_bits(a, b)


def test_a_module_under_two_names_keeps_its_parameter():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.75))

    class Shared(tt.snn.Layer):
        def __init__(self):
            super().__init__()
            self.define_state("mem")
            self.one = self.other = Gain()

        def step(self, x, mem):
            mem = self.one.w * mem + x * self.other.w
            return mem, mem

    found = []
    for backend in ("eager", "cpu"):
        layer = Shared()
        own = layer.one.w
        with tt.backend(backend):
            ys = layer.unroll(noise(5, 3, 4))
        ys.sum().backward()
        assert layer.one.w is own
        found.append((ys, own.grad))
    assert_bits(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_sparse_state_is_refused():
    layer = Step(linear)
    layer.mem = torch.zeros(3, 4).to_sparse()
    refused(layer, noise(5, 3, 4), "the state mem is")
