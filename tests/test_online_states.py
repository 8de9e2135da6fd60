"""The state contract of the online layers, what they refuse, and how they sit among other modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tracetorch as tt

B, T, IN, HIDDEN, OUT = 3, 12, 6, 7, 4
RULES = ("average", "ottt", "bptt")


def layer(rule="average", **kwargs):
    torch.manual_seed(0)
    made = tt.nn.LIF(IN, HIDDEN, bias=True, rule=rule, **kwargs)
    with torch.no_grad():
        made.weight += 0.2
    return made


def network(rule="average"):
    return tt.nn.Sequential(layer(rule), nn.Linear(HIDDEN, HIDDEN), tt.nn.LIS(HIDDEN, OUT, rule=rule))


SUBJECTS = {**{rule: (lambda rule=rule: layer(rule)) for rule in RULES}, **{f"net-{r}": r for r in RULES}}


@pytest.fixture(params=SUBJECTS)
def model(request):
    torch.manual_seed(0)
    made = SUBJECTS[request.param]
    return network(made) if isinstance(made, str) else made()


def inputs(batch=B, seed=0, steps=T):
    return torch.rand(batch, steps, IN, generator=torch.Generator().manual_seed(seed)) < 0.5


def flat(model):
    return {f"{p}.{n}": s for p, states in tt.save_states(model).items() for n, s in states.items()}


def assert_same_states(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    assert any(value is not None for value in a.values())
    for name in a:
        assert (a[name] is None) == (b[name] is None)
        assert a[name] is None or torch.equal(a[name], b[name]), name


def test_the_example_of_the_docs():
    lif = tt.nn.LIF(10, 5)
    outputs, states = lif(torch.rand(1, 50, 10) > 0.8)
    assert outputs.shape == (1, 50, 5)
    assert states.trace.shape == (1, 10)
    assert states.membrane.shape == (1, 5)
    assert outputs.dtype == torch.float32
    assert set(outputs.unique().tolist()) <= {0.0, 1.0}
    one, _ = lif(torch.rand(1, 10) > 0.8)
    assert one.shape == (1, 5)


def test_what_is_learnable_and_how_it_is_constrained():
    lif = tt.nn.LIF(4, 3, trace_decay=0.7, mem_decay=[0.1, 0.5, 0.9], threshold=2.0)
    assert lif.weight.shape == (3, 4)
    assert lif.bias is None
    torch.testing.assert_close(lif.trace_decay, torch.full((4,), 0.7))
    torch.testing.assert_close(lif.mem_decay, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(lif.threshold, torch.full((3,), 2.0))
    with torch.no_grad():
        for name, parameter in lif.named_parameters():
            if "raw" in name:
                parameter.fill_(-9.0)
    assert ((lif.trace_decay > 0) & (lif.trace_decay < 1)).all()
    assert ((lif.mem_decay > 0) & (lif.mem_decay < 1)).all()
    assert (lif.threshold > 0).all()
    assert "rule='average'" in repr(lif)


def test_chunks_and_steps_are_the_whole(model):
    xs = inputs()
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    whole, _ = model(xs)
    parts = torch.cat([other(part)[0] for part in xs.split(5, 1)], 1)
    steps = torch.stack([third(x)[0] for x in xs.unbind(1)], 1)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-6)
    for name, state in flat(model).items():
        torch.testing.assert_close(flat(third)[name], state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(flat(other)[name], state, rtol=1e-4, atol=1e-5)


def test_copies_in_the_middle_of_a_stream(model):
    xs = inputs()
    model(xs[:, :5])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    rest, _ = model(xs[:, 5:])
    rest.sum().backward()
    for other in others:
        again, _ = other(xs[:, 5:])
        assert torch.equal(again, rest)
        assert_same_states(other, model)
        again.sum().backward()
        for a, b in zip(other.parameters(), model.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.data_ptr() != b.data_ptr()


def test_state_dict_holds_no_states(model):
    xs = inputs()
    model(xs)
    names = set(model.state_dict())
    assert not any(name.split(".")[-1] in ("presynaptic", "sensitivity", "mem", "by_weight") for name in names)
    fresh = copy.deepcopy(model)
    tt.reset_states(fresh)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(0.1)
    fresh.load_state_dict(model.state_dict())
    model.reset_states()
    assert torch.equal(fresh(xs)[0], model(xs)[0])


def test_reset_zero_save_and_load(model):
    xs = inputs()
    first, _ = model(xs)
    saved = model.save_states()
    second, _ = model(xs)
    model.load_states(saved)
    assert torch.equal(model(xs)[0], second)
    model.reset_states()
    assert all(state is None for state in flat(model).values())
    assert torch.equal(model(xs)[0], first)
    model.zero_states()
    assert not any(state.any() for state in flat(model).values() if state is not None)
    assert torch.equal(model(xs)[0], first)
    model.detach_states()
    assert not any(state.requires_grad for state in flat(model).values() if state is not None)


def test_another_batch_size_is_refused_and_changes_nothing(model):
    model(inputs())
    kept = flat(model)
    for wrong in (inputs(7), inputs(7)[:, 0]):
        with pytest.raises(ValueError, match=r"shape \[3, 6\] from the last.*\[7, 6\].*reset_states"):
            model(wrong)
    assert all(value is kept[name] for name, value in flat(model).items())
    tt.reset_states(model)
    model(inputs(7))


def test_dtype_and_device_moves(model):
    model(inputs())
    before = {name: None if state is None else state.double() for name, state in flat(model).items()}
    model.double()
    for name, state in flat(model).items():
        assert (state is None) == (before[name] is None), name
        assert state is None or torch.equal(state, before[name]), name
    ys, _ = model(inputs())
    assert ys.dtype == torch.float64
    ys.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float64 for p in model.parameters())
    model.to("meta")
    assert all(state is None or state.device.type == "meta" for state in flat(model).values())


@pytest.mark.parametrize("rule", RULES)
def test_wrong_inputs_are_refused_and_change_nothing(rule):
    lif = layer(rule)
    lif(inputs())
    kept = flat(lif)
    x = inputs()
    cases = [
        ("hello", TypeError, "the input is a str; give a tensor"),
        (x.double(), TypeError, "the input is torch.float64, weight is torch.float32"),
        (x.half(), TypeError, "float16"),
        (x.to(torch.complex64), TypeError, "complex64"),
        (x[..., :4], ValueError, r"shape \[3, 12, 4\]; give \[B, T, 6\].*in_features=6"),
        (x[0, 0], ValueError, r"shape \[6\]"),
        (x[None], ValueError, r"shape \[1, 3, 12, 6\]"),
        (x.to("meta"), ValueError, "on meta, weight on cpu"),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=f"LIF: .*{message}"):
            lif(wrong)
        assert all(value is kept[name] for name, value in flat(lif).items())


@pytest.mark.parametrize("name", ["weight", "bias", "input_trace.raw_trace_decay", "membrane.raw_threshold"])
def test_parameters_that_became_nan_are_refused(name):
    lif = layer()
    lif(inputs())
    kept = flat(lif)
    with torch.no_grad():
        lif.get_parameter(name).view(-1)[0] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"LIF: {name} is not finite any more; load earlier"):
            lif(inputs())
    assert all(value is kept[name] for name, value in flat(lif).items())
    with torch.no_grad():
        lif.get_parameter(name).view(-1)[0] = 0.5
    lif(inputs())


def test_wrong_arguments():
    for key, value, words in (
        ("in_features", 0, "in_features must be an integer of at least 1, not 0"),
        ("out_features", 2.5, "out_features must be"),
        ("trace_decay", 1.0, r"trace_decay must be in \(0, 1\)"),
        ("mem_decay", float("nan"), "mem_decay must be in"),
        ("mem_decay", [0.5, 0.5], r"mem_decay has shape \[2\]"),
        ("threshold", -1.0, "threshold must be finite and above 0"),
        ("threshold", float("inf"), "threshold must be"),
        ("rule", "backprop", "LIF: rule='backprop' is not known; use one of average, ottt, bptt"),
        ("surrogate", "sharp", "surrogate 'sharp' is not known"),
        ("trace_decay_rank", 2, "must be 0"),
    ):
        with pytest.raises(ValueError, match=words):
            tt.nn.LIF(**{"in_features": 4, "out_features": 3, key: value})
    lif = layer()
    with pytest.raises(ValueError, match="not known"):
        lif.rule = "none"
    assert lif.rule == "average"


def test_an_error_in_a_later_layer_leaves_the_earlier_ones_as_they_were():
    for net in (network(), tt.nn.Sequential(layer(), tt.nn.LIF(HIDDEN + 1, 2))):
        if isinstance(net[1], nn.Linear):
            net(inputs())
            with torch.no_grad():
                net[2].weight[0, 0] = torch.inf
        kept = flat(net)
        with pytest.raises(ValueError, match=r"not finite|in_features=8"):
            net(inputs())
        assert all(value is kept[name] for name, value in flat(net).items())


def test_an_interruption_leaves_the_states_as_they_were(monkeypatch):
    for rule in RULES:
        lif = layer(rule)
        lif(inputs())
        kept = flat(lif)

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(lif.input_trace), "unroll", stop)
            with pytest.raises(KeyboardInterrupt):
                lif(inputs())
        assert all(value is kept[name] for name, value in flat(lif).items())


def test_the_rule_can_be_changed_in_the_middle():
    xs = inputs()
    whole, _ = layer()(xs)
    lif = layer("bptt")
    found = []
    for rule, part in zip(("bptt", "ottt", "average"), xs.split(4, 1), strict=True):
        lif.rule = rule
        found.append(lif(part)[0])
        assert lif.membrane.emits == ("distance" if rule == "ottt" else "spikes")
    assert torch.equal(torch.cat(found, 1), whole)
    torch.cat(found, 1).sum().backward()


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_sequence_and_an_empty_batch(rule):
    lif = layer(rule)
    ys, states = lif(inputs(steps=0))
    assert ys.shape == (B, 0, HIDDEN)
    assert not states.trace.any()
    if rule == "average":
        ys.sum().backward()
        assert not lif.weight.grad.any()
    lif.reset_states()
    assert lif(inputs(batch=0))[0].shape == (0, T, HIDDEN)
    lif.reset_states()
    lif(inputs())
    kept = flat(lif)
    lif(inputs(steps=0))
    for name, state in flat(lif).items():
        assert (state is None) == (kept[name] is None), name
        assert state is None or torch.equal(state, kept[name]), name


class Mine(nn.Module):
    """An ordinary module of torch around the layers."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(IN, 8)
        self.lif = tt.nn.LIF(8, HIDDEN, bias=True)
        self.drop = nn.Dropout(0.2)
        self.out = tt.nn.LIS(HIDDEN, OUT)

    def forward(self, x):
        spikes, _ = self.lif((self.enter(x) > 0).float())
        return self.out(self.drop(spikes))[0]


def test_inside_an_ordinary_module_with_an_ordinary_optimizer():
    torch.manual_seed(0)
    net = Mine()
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    losses = []
    for _ in range(60):
        tt.reset_states(net)
        p = net(inputs().float())[:, -1]
        loss = nn.functional.nll_loss(p.clamp(min=1e-6).log(), torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert list(tt.save_states(net)) == [f"{name}.{part}" for name in ("lif", "out") for part in PARTS]


PARTS = ("input_trace", "membrane", "eligibility")


@pytest.mark.parametrize("rule", RULES)
def test_gradients_reach_the_input_and_other_modules(rule):
    lif = layer(rule)
    before = nn.Linear(IN, IN)
    x = inputs().float().requires_grad_()
    lif(before(x))[0].sum().backward()
    assert before.weight.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_native_layers_and_nested_chains():
    net = tt.nn.Sequential(nn.Linear(IN, 5), tt.snn.LIB(5), tt.nn.Sequential(tt.nn.LIF(5, 4), tt.nn.LIS(4, 2)))
    ys, states = net(inputs().float())
    assert ys.shape == (B, T, 2)
    assert len(states) == 2
    tt.reset_states(net)
    steps = torch.stack([net(x)[0] for x in inputs().float().unbind(1)], 1)
    torch.testing.assert_close(steps, ys, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="GRU returns tuple, not a tensor"):
        tt.nn.Sequential(nn.GRU(IN, 3, batch_first=True))(inputs().float())


@pytest.mark.parametrize("rule", RULES)
def test_baked_parameters_compute_the_same(rule):
    lif, xs = layer(rule), inputs()
    before, _ = lif(xs)
    lif.reset_states()
    tt.TTcompile(lif)
    after, _ = lif(xs)
    assert torch.equal(before, after)
    after.sum().backward()
    assert lif.weight.grad is not None
    assert lif.membrane.raw_mem_decay.grad is None
    tt.TTdecompile(lif)
    lif(xs)


@pytest.mark.parametrize("rule", RULES)
def test_saved_and_loaded(rule, tmp_path):
    net = network(rule)
    net(inputs())[0].sum().backward()
    state = torch.get_rng_state()
    kept = flat(net)
    tt.save(tmp_path / "net.tt", net)
    again = tt.load(tmp_path / "net.tt")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value is kept[name] for name, value in flat(net).items())
    assert [layer.rule for layer in (again[0], again[2])] == [rule, rule]
    net.reset_states()
    (a, _), (b, _) = net(inputs()), again(inputs())
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    assert again[0].weight.grad is not None


def test_parts_that_do_not_belong_together_are_not_saved(tmp_path):
    other, wrong = layer(), layer()
    other.membrane = tt.nn.LIS(IN, HIDDEN).membrane
    wrong.input_trace = tt.nn.LIF(IN + 1, HIDDEN).input_trace
    odd = layer()
    odd.note = "mine"
    for net, words in ((other, "its children must be"), (wrong, "have other sizes"), (odd, "attribute 'note'")):
        with pytest.raises(tt.FileError, match=words):
            tt.save(tmp_path / "net.tt", net)
    assert not list(tmp_path.iterdir())


def test_checkpointing():
    net, xs = network("bptt"), inputs()
    net(xs)[0].square().sum().backward()
    expected = net[0].weight.grad.clone()
    net.reset_states()
    net.zero_grad()
    ys = tt.checkpoint(Plain(net), xs)
    ys.square().sum().backward()
    torch.testing.assert_close(net[0].weight.grad, expected)
    tt.reset_states(net)
    for rule in RULES:
        with pytest.raises(RuntimeError, match=r"tracetorch\.checkpoint"):
            torch.utils.checkpoint.checkpoint(Plain(network(rule)), xs, use_reentrant=False)


class Plain(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


def test_a_second_backward_through_time_says_what_to_do():
    lif = layer("bptt")
    lif(inputs())[0].sum().backward()
    with pytest.raises(RuntimeError, match=r"state 'mem' of an earlier call.*detach_states\(\)"):
        lif(inputs())[0].sum().backward()
    for rule in ("average", "ottt"):
        lif = layer(rule)
        for _ in range(3):
            lif(inputs())[0].sum().backward()


@pytest.mark.parametrize("rule", RULES)
def test_inputs_of_any_strides(rule):
    x = inputs(steps=1)
    still = x.expand(B, T, IN)
    swapped = inputs().transpose(0, 1).contiguous().transpose(0, 1)
    for xs in (still, swapped, inputs().float()[..., ::2].repeat_interleave(2, -1)):
        one, other = layer(rule), layer(rule)
        a, b = one(xs)[0], other(xs.contiguous().clone())[0]
        assert torch.equal(a, b)
        a.sum().backward()
        b.sum().backward()
        assert torch.equal(one.weight.grad, other.weight.grad)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("rule", RULES)
def test_every_part_has_kernels_for_both_devices(rule, backend):
    for net in (layer(rule), tt.nn.LIS(IN, OUT, rule=rule)):
        for part in (net.input_trace, net.membrane):
            assert len(tt.fused.source(part, backend, backward=True)) > 500
