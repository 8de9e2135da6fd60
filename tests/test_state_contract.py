"""The state contract of native layers, and of whatever holds them: eight points; reaching layers; baked parameters."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits
from tests.native_cases import make, stimulus
from tracetorch.functional import round_ste

LAYERS = ("LI", "DSLIEMA", "LIB", "RLIB", "DLIT", "DSRLITS")
T, B, N = 12, 3, 5


class Net(tt.Model):
    """Native layers as submodules, in a list, in a dict in a tuple, and in a module that is in a list."""

    def __init__(self, name="LIB"):
        super().__init__()
        self.enter = nn.Linear(N, N)
        self.first = make(name, dtype=torch.float32)
        self.hidden = [make(name, dtype=torch.float32, seed=1), nn.Sequential(make("LI", dtype=torch.float32))]
        self.named = ({"out": make("LI", dtype=torch.float32, seed=2)},)

    def forward(self, x):
        x = self.hidden[0](self.first(self.enter(x)))
        return self.named[0]["out"](self.hidden[1](x))


def bare(name):
    return lambda: make(name, dtype=torch.float32)


SUBJECTS = {
    **{name: bare(name) for name in LAYERS},
    "Sequential": lambda: tt.Sequential(nn.Linear(N, N), make("RLIB", dtype=torch.float32), nn.Linear(N, N)),
    "nn.Sequential": lambda: nn.Sequential(nn.Sequential(make("DLIT", dtype=torch.float32)), nn.Linear(N, N)),
    "Net": Net,
}
PATHS = ["first", "hidden.0", "hidden.1.0", "named.0.out"]


@pytest.fixture(params=SUBJECTS)
def model(request):
    torch.manual_seed(0)
    return SUBJECTS[request.param]()


def inputs(batch=B, seed=0, steps=T):
    return stimulus(steps, batch, N, seed=seed, dtype=torch.float32)


def loop(model, xs):
    return torch.stack([model(x) for x in xs])


def flat(model):
    return {f"{p}.{n}": s for p, states in tt.save_states(model).items() for n, s in states.items()}


def assert_states_equal(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    assert a
    for name in a:
        assert_bits(a[name], b[name])


# ---- the eight points ------------------------------------------------------------------------------------------------


def test_1_deepcopy_in_the_middle_of_a_sequence(model):
    xs = inputs()
    loop(model, xs[:5])
    other = copy.deepcopy(model)
    assert_states_equal(other, model)
    assert_bits(loop(other, xs[5:]), loop(model, xs[5:]))
    assert_states_equal(other, model)


def test_2_pickle_and_torch_save_in_the_middle_of_a_sequence(model):
    xs = inputs()
    loop(model, xs[:5])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    rest = loop(model, xs[5:])
    for other in others:
        assert_bits(loop(other, xs[5:]), rest)
        assert_states_equal(other, model)


def test_3_another_batch_size_is_refused_before_a_reset_and_right_after_it(model):
    model(inputs()[0])
    kept = flat(model)
    with pytest.raises(ValueError, match=r"shape \[3, 5\] from the last call.*\[7, 5\].*reset_states"):
        model(inputs(7)[0])
    with pytest.raises(ValueError, match="reset_states"):
        tt.unroll(model, inputs(1))
    assert all(value is kept[name] for name, value in flat(model).items()), "a refused input changes no state"
    tt.reset_states(model)
    xs = inputs(7)
    found = loop(model, xs)
    fresh = copy.deepcopy(model)
    tt.reset_states(fresh)
    assert_bits(loop(fresh, xs), found)


def test_4_state_dict_into_a_fresh_model(model):
    xs = inputs()
    loop(model, xs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    fresh = copy.deepcopy(model)
    tt.reset_states(fresh)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    assert not any(name.rpartition(".")[2] in ("mem", "rec", "syn", "prev_output") for name in model.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert all(state is None for state in flat(fresh).values())
    tt.reset_states(model)
    assert_bits(loop(fresh, xs), loop(model, xs))


def test_5_two_instances_never_touch_each_other(model):
    other = copy.deepcopy(model)
    xs, others = inputs(), inputs(2, seed=5)
    alone = loop(copy.deepcopy(model), xs)
    found = []
    for x, y in zip(xs, others, strict=True):
        found.append(model(x))
        other(y)
    assert_bits(torch.stack(found), alone)
    tt.reset_states(other)
    assert all(state is not None for state in flat(model).values())
    for (_, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()


def test_6_double_and_to_device():
    for name in LAYERS:
        layer = make(name, dtype=torch.float32)
        loop(layer, inputs())
        values = {state: tensor.double() for state, tensor in layer.save_states().items()}
        layer.double()
        for state, value in values.items():
            assert_bits(getattr(layer, state), value)
        assert layer(inputs()[0].double()).dtype == torch.float64
        layer.to("meta")
        assert all(state.device.type == "meta" for state in layer.save_states().values())
        assert layer(inputs()[0].double().to("meta")).device.type == "meta"
    model = tt.Sequential(nn.Linear(N, N), make("DSRLITS", dtype=torch.float32))
    model(inputs()[0])
    model.double()
    assert model(inputs()[0].double()).dtype == torch.float64
    model.half()
    assert all(state.dtype is torch.float16 for state in flat(model).values())


def test_7_checkpointing_gives_the_right_gradients(model):
    xs, gradients = inputs(), []
    for way in (lambda part: loop(model, part), lambda part: tt.checkpoint(Looped(model), part)):
        tt.reset_states(model)
        model.zero_grad()
        ys = torch.cat([way(part) for part in xs.split(4)])
        ys.square().sum().backward()
        gradients.append([ys.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) > 1
    for a, b in zip(*gradients, strict=True):
        assert_bits(a, b)


class Looped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, xs):
        return loop(self.model, xs)


@pytest.mark.parametrize("way", ["loop", "unroll", "cpu", "steps"])
def test_8_a_second_backward_says_what_to_do(model, way):
    xs = inputs()

    def run(part):
        if way == "cpu":
            with tt.backend("cpu"):
                return tt.unroll(model, part)
        return tt.unroll(model, part) if way == "unroll" else loop(model, part)

    first, second = (xs[:1], xs[1:2]) if way == "steps" else (xs[:5], xs[5:])
    run(first).sum().backward()
    loss = run(second).sum()
    with pytest.raises(RuntimeError, match=r"the state '\w+' of an earlier call.*detach_states\(\)"):
        loss.backward()
    tt.reset_states(model)
    run(first).sum().backward()
    tt.detach_states(model)
    run(second).sum().backward()
    tt.detach_states(model)
    run(second).sum().backward()
    tt.reset_states(model)
    run(first).sum().backward(retain_graph=True)
    run(second).sum().backward()
    tt.reset_states(model)
    run(first).sum().backward()
    with torch.no_grad():
        run(second)
    run(second).sum().backward()


def test_following_a_backward_keeps_nothing_alive():
    layer = make("DSRLITS", dtype=torch.float32)
    xs = inputs().requires_grad_()
    ys = loop(layer, xs)
    ys.sum().backward()
    layer(xs[0])
    dead = weakref.ref(layer)
    del layer
    gc.collect()
    assert dead() is None
    assert ys.requires_grad


# ---- reaching layers -------------------------------------------------------------------------------------------------


def test_layers_in_lists_and_dicts_are_reached():
    net, xs = Net(), inputs()
    whole = loop(net, xs)
    assert list(tt.save_states(net)) == PATHS
    saved = net.save_states()
    assert all(state is not None and state.requires_grad for state in flat(net).values())
    net.detach_states()
    assert not any(state.requires_grad for state in flat(net).values())
    net.zero_states()
    assert all(state.shape == (B, N) and not state.any() for state in flat(net).values())
    assert_bits(loop(net, xs), whole)
    net.load_states(saved)
    assert all(state is saved[path][name] for path in PATHS for name, state in tt.save_states(net)[path].items())
    net.reset_states()
    assert all(state is None for state in flat(net).values())
    assert_bits(loop(net, xs), whole)
    with pytest.raises(ValueError, match=r"named\.0\.out"):
        net.load_states({path: saved[path] for path in PATHS[:-1]})
    net.load_states({"first": saved["first"], "nobody": {}}, strict=False)
    tt.zero_states(net)
    assert not net.first.mem.any()


def test_no_layer_outside_the_model_is_reached():
    outer = Net()
    inner = nn.Sequential(make("LIB", dtype=torch.float32))
    outer.inner = inner
    inner.owners = [outer]  # a reference back
    inner.__dict__["friend"] = outer.first  # not a child, and no container
    inner.again = [inner[0], inner]
    inner.loops = []
    inner.loops.append(inner.loops)
    assert list(tt.save_states(inner)) == ["0"]
    assert list(tt.save_states(outer)) == ["first", "inner.0", *PATHS[1:]]
    loop(outer, inputs())
    inner(inputs()[0])
    tt.reset_states(inner)
    assert inner[0].mem is None
    assert all(state is not None for name, state in flat(outer).items() if "inner" not in name)
    stranger = make("LIB", dtype=torch.float32)
    stranger(inputs()[0])
    tt.reset_states(outer)
    assert stranger.mem is not None


# ---- baked parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_baked_parameters_compute_the_same_and_come_back(model, backend):
    xs = inputs()

    def run():
        tt.reset_states(model)
        with tt.backend(backend):
            return tt.unroll(model, xs)

    before, weights = run(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tt.TTcompile(model)
    assert_bits(run(), before)
    layers = [m for m in model.modules() if isinstance(m, tt.Layer)]
    assert all(not layer.value(name).requires_grad for layer in layers for name in layer.raw_forms)
    assert all(layer.value(n) is layer.value(n) for layer in layers for n in layer.raw_forms), "computed once"
    assert model.state_dict().keys() == weights.keys()
    assert_bits(copy.deepcopy(model)(xs[0]), model(xs[0]))
    tt.TTdecompile(model)
    after = run()
    assert_bits(after, before)
    after.sum().backward()
    assert all(parameter.grad is not None for layer in layers for parameter in layer.parameters())
    for name, tensor in model.state_dict().items():
        assert_bits(tensor, weights[name])


def test_what_is_baked_follows_loading_and_moving():
    layer, other = make("DSRLITS", dtype=torch.float32), make("DSRLITS", dtype=torch.float32, seed=4)
    layer.TTcompile()
    layer.load_state_dict(other.state_dict())
    assert_bits(layer.unroll(inputs()), other.unroll(inputs()))
    layer.double()
    other.double()
    layer.reset_states()
    other.reset_states()
    assert layer.pos_beta.dtype == torch.float64
    assert_bits(layer.unroll(inputs().double()), other.unroll(inputs().double()))
    net = Net()
    net.TTcompile()
    assert net.hidden[0].baked
    net.TTdecompile()
    assert not net.hidden[0].baked


def test_a_network_that_ran_a_kernel_is_saved(tmp_path):
    net = tt.Sequential(nn.Linear(N, N), tt.snn.LIB(N, quant_fn=round_ste()))
    with tt.backend("cpu"):
        tt.unroll(net, inputs()).sum().backward()
    tt.save(tmp_path / "net.tt", net)
    net.reset_states()
    assert_bits(loop(tt.load(tmp_path / "net.tt"), inputs()), loop(net, inputs()))
