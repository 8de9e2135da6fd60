"""Any layer's sequence through its kernel: what is refused and why, what a plan serves, what requires a gradient."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tracetorch as tt
from tests.layer_cases import Scaled, assert_bits, noise
from tracetorch.fused import sequence
from tracetorch.fused.executor import FuseWarning
from tracetorch.fused.sequence import Sequencer, Unfused

STATES = ("a", "b")


class Two(nn.Module):
    """a' = w a + x, b' = b / 2 + v x; what it gives is a - b."""

    def __init__(self, w=0.75, v=0.5):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.as_tensor(w)), nn.Parameter(torch.as_tensor(v))
        self.a = self.b = None


def body(layer, x, states):
    a, b = layer.w * states["a"] + x, 0.5 * states["b"] + layer.v * x
    return a - b, a, b


def sequencer(step=body):
    return Sequencer(STATES, step, STATES)


def zeros(xs, time_dim=0):
    return {name: torch.zeros_like(xs.select(time_dim, 0)) for name in STATES}


def by_steps(layer, xs, first, step=body):
    """Outputs, and each state after every step."""
    found, states = [], first
    for x in xs:
        y, *new = step(layer, x, states)
        states = dict(zip(STATES, new, strict=True))
        found.append((y, *new))
    return [torch.stack(series) for series in zip(*found, strict=True)]


# ---- what is refused -------------------------------------------------------------------------------------------------


class Marked(torch.Tensor):
    pass


INPUTS = {
    "is a Marked": noise(5, 3, 4).as_subclass(Marked),
    "torch.sparse_coo": noise(5, 3, 4).to_sparse(),
    r"torch\.float16, not": noise(5, 3, 4).half(),
    "no time step, or no element": noise(5, 3, 0),
    r"the input has shape \[\]: no time step": torch.tensor(1.0),
    "there is no kernel of the backend": torch.empty(5, 3, 4, device="meta"),
}


@pytest.mark.parametrize("word", INPUTS)
def test_an_input_that_no_kernel_takes_is_refused(word):
    first = {name: torch.zeros(3, 4) for name in STATES}
    with tt.backend("cpu"), pytest.raises(Unfused, match=word):
        sequencer().run(Two(), INPUTS[word], 0, first)


def test_who_wants_to_see_every_operation_does():
    class Watching(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls):
            return False  # as the tracer: asked, torch imports its compiler

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    xs = noise(5, 3, 4)
    with Watching(), pytest.raises(Unfused, match="dispatch modes"):
        sequencer().run(Two(), xs, 0, zeros(xs))
    with tt.backend("eager"), pytest.raises(Unfused, match="'eager' is chosen"):
        sequencer().run(Two(), xs, 0, zeros(xs))


FIRST = {
    "is no dense tensor on cpu": torch.zeros(3, 4, device="meta"),
    "is no dense tensor": torch.zeros(3, 4).to_sparse(),
    "no dense": torch.zeros(3, 4).as_subclass(Marked),
    r"is torch\.float64, the input": torch.zeros(3, 4).double(),
    r"has shape \[1\], a step": torch.zeros(1),
    r"has shape \[3, 1\], a step": torch.zeros(3, 1),
}


@pytest.mark.parametrize("word", FIRST)
def test_a_state_that_no_kernel_takes_is_refused(word):
    with pytest.raises(Unfused, match=word):
        sequencer().run(Two(), noise(5, 3, 4), 0, {"a": torch.zeros(3, 4), "b": FIRST[word]})


WEIGHTS = {
    r"a parameter of torch\.float64 makes": noise(4).double(),
    "does not broadcast against a step": noise(5),
    "a parameter of shape": noise(2, 3, 4),
    "a parameter is on meta": torch.empty(4, device="meta"),
}


@pytest.mark.filterwarnings("ignore::tracetorch.fused.FuseWarning")
@pytest.mark.parametrize("word", WEIGHTS)
def test_a_parameter_that_no_kernel_takes_is_refused(word):
    layer, xs = Two(v=WEIGHTS[word]), noise(5, 3, 4)
    with pytest.raises(Unfused, match=word):
        sequencer().run(layer, xs, 0, zeros(xs))


@pytest.mark.filterwarnings("ignore::tracetorch.fused.FuseWarning")
def test_a_number_of_float64_makes_a_step_of_no_dimension_float64():
    layer = Two(v=torch.tensor(0.1, dtype=torch.float64))
    first = {name: torch.zeros(()) for name in STATES}
    with pytest.raises(Unfused, match="another type"):
        sequencer().run(layer, noise(5), 0, first)
    xs = noise(5, 3)
    assert_bits(sequencer().run(layer, xs, 0, zeros(xs)).outputs, by_steps(layer, xs, zeros(xs))[0])


DTYPES = {
    "the state b becomes torch.float32 from torch.float64": lambda x, states: (x, x, states["b"].float()),
    "exp computes in float32 on an input of float64": lambda x, states: (x, x, states["b"].float().exp().double()),
    "computes in torch.int64": lambda x, states: (x, x, ((x > 0).long() * 2).double()),
}


@pytest.mark.parametrize("word", DTYPES)
def test_a_dtype_that_no_kernel_has_is_refused_once(word):
    xs = noise(5, 3, 4).double()
    runs = sequencer(lambda layer, x, states: DTYPES[word](x, states))
    with pytest.raises(Unfused, match=word), pytest.warns(FuseWarning, match=word):
        runs.run(Two(), xs, 0, zeros(xs))
    with pytest.raises(Unfused, match=word):
        runs.run(Two(), xs, 0, zeros(xs))


def test_a_number_of_float64_that_meets_float32_is_refused():
    """Torch rounds the number first; a kernel of float64 has it whole."""
    layer, xs = Two(v=torch.tensor(0.1, dtype=torch.float64)), noise(5, 3, 4).double()
    runs = sequencer(lambda layer, x, states: ((x.float() * layer.v).double(), x, x))
    with pytest.raises(Unfused, match="mul computes in float32"), pytest.warns(FuseWarning):
        runs.run(layer, xs, 0, zeros(xs))
    layer.v.data = layer.v.data.float()
    ys = runs.run(layer, xs, 0, zeros(xs)).outputs
    assert_bits(ys, (xs.float() * layer.v).double())


def test_float64_inside_a_step_of_float32_is_refused():
    xs = noise(5, 3, 4)
    wide = sequencer(lambda layer, x, states: ((x.double() * 0.1).float(), x, states["b"]))
    with (
        pytest.raises(Unfused, match=r"computes in torch\.float64, the input is torch\.float32"),
        pytest.warns(FuseWarning),
    ):
        wide.run(Two(), xs, 0, zeros(xs))


# ---- what a plan serves ----------------------------------------------------------------------------------------------


def assert_run(runs, layer, xs, first):
    found = runs.run(layer, xs, 0, first, record=("b",))
    ys, a, b = by_steps(layer, xs, first)
    for given, expected in ((found.outputs, ys), (found.last["a"], a[-1]), (found.last["b"], b[-1])):
        assert_bits(given, expected)
    assert_bits(found.recorded["b"], b)
    assert list(found.recorded) == ["b"]


def test_one_sequencer_serves_every_dtype_and_changed_layer():
    runs, layer = sequencer(), Two(0.75, 0.5)
    for dtype in (torch.float32, torch.float64, torch.float32):
        layer.to(dtype)
        xs = noise(5, 3, 4).to(dtype)
        assert_run(runs, layer, xs, zeros(xs))
    runs, plain = sequencer(lambda layer, x, states: (0.5 * x, x, x)), Two()
    for dtype in (torch.float32, torch.float64):
        xs = noise(5, 3, 4).to(dtype)
        assert_bits(runs.run(plain, xs, 0, zeros(xs)).outputs, 0.5 * xs)
    xs = noise(5, 3, 4)
    runs = sequencer(lambda layer, x, states: (layer.number * x, x, x))
    for number in (0.5, 0.25):
        plain.number = number
        assert_bits(runs.run(plain, xs, 0, zeros(xs)).outputs, number * xs)


def test_a_state_of_no_dimension_is_that_of_every_neuron():
    layer, xs = Two(), noise(5, 3, 4)
    assert_run(sequencer(), layer, xs, {"a": torch.tensor(0.5), "b": torch.zeros(3, 4)})


def test_plans_of_a_value_that_changes_at_every_call_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(sequence, "_PLANS", 2)
    runs, layer, xs = sequencer(), Two(), noise(2, 1, 3)
    for number in range(4):
        layer.number = number
        runs.run(layer, xs, 0, zeros(xs))
    assert len(runs.plans) == 2


def test_a_copy_has_kernels_of_its_own():
    runs, layer, xs = sequencer(), Two(), noise(2, 1, 3)
    runs.run(layer, xs, 0, zeros(xs))
    for again in (copy.deepcopy(runs), pickle.loads(pickle.dumps(runs))):
        assert (again.states, again.body, again.skip) == (STATES, body, STATES)
        assert again.plans == {}
        assert again.latest is None
    assert len(runs.plans) == 1


def test_inference_mode_and_hooks_are_the_caller_s():
    """A kernel made within them serves afterwards, and a trace's tensors are none that the layer saves."""
    runs, layer, xs = sequencer(), Two(), noise(5, 3, 4)
    with torch.inference_mode():
        runs.run(layer, xs, 0, zeros(xs))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        ys = runs.run(layer, xs, 0, zeros(xs)).outputs
    first = list(packed)
    packed.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        runs.run(layer, xs, 0, zeros(xs))
    assert packed == first
    ys.sum().backward()
    assert layer.w.grad is not None


# ---- gradients -------------------------------------------------------------------------------------------------------

LEAVES = {
    "the input": lambda layer, xs, first: [xs],
    "a state": lambda layer, xs, first: [first["a"]],
    "one parameter": lambda layer, xs, first: [layer.w],
    "the other": lambda layer, xs, first: [layer.v],
    "all": lambda layer, xs, first: [xs, *first.values(), layer.w, layer.v],
}


def first_state(layer, x, states):
    """The same states, and an output that b does not reach."""
    _, a, b = body(layer, x, states)
    return 2 * a, a, b


@pytest.mark.parametrize("step", [body, first_state])
def test_what_wants_a_gradient_gets_its_own(step):
    """By one sequencer, one after the other: no kernel of the one serves the other."""
    runs, layer = sequencer(step), Two().requires_grad_(False)
    with torch.no_grad():
        runs.run(layer, noise(5, 3, 4), 0, zeros(noise(5, 3, 4)))
    every = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    for name in (*LEAVES, *reversed(LEAVES)):
        xs = noise(5, 3, 4)
        first = {"a": noise(3, 4, seed=1), "b": noise(3, 4, seed=2)}
        leaves = [leaf.requires_grad_() for leaf in LEAVES[name](layer, xs, first)]
        found = runs.run(layer, xs, 0, first, record=STATES)
        ys, a, b = by_steps(layer, xs, first, step)
        given = (found.outputs, found.last["a"], found.last["b"], found.recorded["a"], found.recorded["b"])
        wanted = (ys, a[-1], b[-1], a, b)
        assert [t.requires_grad for t in given] == [t.requires_grad for t in wanted], name
        live = [k for k, t in enumerate(wanted) if t.requires_grad]
        for k in live:
            pair = [torch.autograd.grad(t[k].square().sum(), leaves, **every) for t in (given, wanted)]
            for one, other in zip(*pair, strict=True):
                torch.testing.assert_close(one, other, msg=name)
        for leaf in leaves:
            leaf.requires_grad_(False)
        with torch.no_grad():
            assert not runs.run(layer, xs, 0, first).outputs.requires_grad


def test_a_parameter_of_which_the_gradient_alone_depends_is_given_to_the_kernel():
    runs = sequencer(lambda layer, x, states: (Scaled.apply(x, layer.w), *states.values()))
    layer, xs = Two(w=noise(4)).requires_grad_(False), noise(5, 3, 4).requires_grad_()
    runs.run(layer, xs, 0, zeros(xs)).outputs.sum().backward()
    assert_bits(xs.grad, layer.w.expand(5, 3, 4))


def test_a_whole_number_beside_a_learned_parameter_is_a_constant():
    layer, xs = Two(), noise(5, 3, 4)
    layer.register_buffer("count", torch.tensor(3))
    runs = sequencer(lambda layer, x, states: (x * layer.w * layer.count, x, x))
    found = runs.run(layer, xs, 0, zeros(xs)).outputs
    assert_bits(found, xs * layer.w * 3)
    found.sum().backward()
    torch.testing.assert_close(layer.w.grad, 3 * xs.sum())


def test_a_gradient_takes_several_steps_to_reach_an_output():
    runs = sequencer(lambda layer, x, states: (states["b"] + x, layer.w + states["a"], states["b"] + states["a"]))
    found = runs.run(Two(), noise(5, 3, 4), 0, zeros(noise(5, 3, 4)))
    assert all(tensor.requires_grad for tensor in (found.outputs, *found.last.values()))


def test_an_output_without_a_gradient_requires_none_beside_a_state_with_one():
    runs = sequencer(lambda layer, x, states: ((states["a"] > 0).to(x.dtype), layer.w * states["a"] + x, x))
    layer, xs = Two(), noise(5, 3, 4)
    found = runs.run(layer, xs, 0, zeros(xs))
    assert not found.outputs.requires_grad
    assert found.last["a"].requires_grad
    assert not found.last["b"].requires_grad


def test_a_source_is_read_without_a_call():
    layer = Two()
    for backend, word in (("cpu", "void forward"), ("triton", "def forward")):
        text = sequencer().source(layer, backend, torch.float32, True)
        assert word in text
        assert "backward" in text
        assert "d_given" in text
        assert "backward" not in sequencer().source(layer, backend, torch.float32, False)
