"""The forward pass and the three gradients of the online layers, against float64 NumPy worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tracetorch as tt
from tests import online_reference as reference

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, IN, OUT = 3, 40, 7, 5
GIVEN = ("weight", "bias", "trace_decay", "mem_decay", "threshold")


def make(kind="LIF", rule="average", seed=0, dtype=torch.float64, shared=False, **kwargs):
    g = torch.Generator().manual_seed(seed)

    def values(n, low, high):
        return (low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)).to(dtype)

    given = {"trace_decay": values(IN, 0.6, 0.97), "mem_decay": values(OUT, 0.5, 0.95)}
    if kind == "LIF":
        given["threshold"] = values(OUT, 0.5, 1.5)
    if shared:
        given = {name: float(value[0]) for name, value in given.items()}
        kwargs.update({f"{name}_rank": 0 for name in given})
    layer = getattr(tt.nn, kind)(IN, OUT, bias=True, rule=rule, **given, **kwargs).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(0.6 * torch.randn(OUT, IN, generator=g, dtype=torch.float64) + 0.15)
        layer.bias.copy_(0.1 * torch.randn(OUT, generator=g, dtype=torch.float64))
    return layer


def stimulus(seed=0, steps=T, batch=B, dtype=torch.float64):
    g = torch.Generator().manual_seed(100 + seed)
    return (torch.rand(batch, steps, IN, generator=g) < 0.35).to(dtype)


def signals(seed=0, steps=T, batch=B, dtype=torch.float64):
    return torch.randn(batch, steps, OUT, generator=torch.Generator().manual_seed(200 + seed), dtype=dtype)


def parameters(layer):
    names = [name for name in GIVEN if getattr(layer, name, None) is not None]
    values = {name: getattr(layer, name).detach().double().numpy() for name in names}
    sizes = {"trace_decay": layer.in_features, "mem_decay": layer.out_features, "threshold": layer.out_features}
    return {n: np.broadcast_to(v, sizes[n]).copy() if n in sizes else v for n, v in values.items()}


def by_value(layer):
    """The gradients of the layer's parameters, those of raw ones divided by the slope of their raw form."""
    found = {"weight": layer.weight.grad, "bias": layer.bias.grad}
    for part, name in (
        (layer.input_trace, "trace_decay"),
        (layer.membrane, "mem_decay"),
        (layer.membrane, "threshold"),
    ):
        if name not in part.raw_forms:
            continue
        raw = getattr(part, f"raw_{name}")
        value = part.value(name).detach()
        slope = value * (1 - value) if part.raw_forms[name] == "sigmoid" else -torch.expm1(-value)
        found[name] = None if raw.grad is None else raw.grad / slope
    return {name: None if grad is None else grad.numpy() for name, grad in found.items()}


def has_gradient(rule, name):
    """Whether a rule has a gradient for a parameter: the decay of the trace is learned by the average alone."""
    return rule == "average" or not name.endswith("trace_decay")


def assert_close(found, expected, tolerance=1e-10):
    assert found.shape == np.shape(expected)
    assert np.isfinite(found).all()
    size = np.abs(expected).max()
    assert size > 0
    assert np.abs(found - expected).max() <= tolerance * size, np.abs(found - expected).max() / size


def run(layer, x, signal, chunks=None):
    """One loss over all calls; returns outputs and the gradient of x. chunks 0: one step per call."""
    x = x.clone().requires_grad_()
    parts = [x] if chunks is None else x.unbind(1) if chunks == 0 else x.split(chunks, 1)
    outputs = [layer(part)[0] for part in parts]
    ys = torch.stack(outputs, 1) if chunks == 0 else torch.cat(outputs, 1)
    (ys * signal).sum().backward()
    return ys.detach(), x.grad


@pytest.mark.parametrize("rule", ["average", "ottt", "bptt"])
@pytest.mark.parametrize("kind", ["LIF", "LIS"])
def test_forward_is_that_of_the_equations(kind, rule):
    layer, x = make(kind, rule), stimulus()
    ys, states = layer(x)
    p = parameters(layer)
    outputs, _, _, mem = reference.forward(p, x.numpy())
    trace, _ = reference.traces(p["trace_decay"], x.numpy())
    if kind == "LIS":
        outputs = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
    else:
        assert 20 < outputs.sum() < 0.9 * outputs.size
    assert ys.shape == (B, T, OUT)
    np.testing.assert_allclose(ys.detach().numpy(), outputs, rtol=1e-12)
    np.testing.assert_allclose(states.membrane.detach().numpy(), mem, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(states.trace.numpy(), trace, rtol=1e-12)


def test_all_rules_spike_alike():
    """A rule changes the gradient alone."""
    x = stimulus()
    one, two, three = (make(rule=rule)(x)[0] for rule in ("average", "ottt", "bptt"))
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_average_against_numpy(seed, backend):
    layer, x, signal = make(seed=seed), stimulus(seed), signals(seed)
    with tt.backend(backend):
        _, passed = run(layer, x, signal)
    expected, _, _ = reference.average(parameters(layer), x.numpy(), signal.numpy())
    for name, found in by_value(layer).items():
        assert_close(found, expected[name])
    assert_close(passed.numpy(), expected["x"])


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("rule", ["ottt", "bptt"])
@pytest.mark.parametrize("seed", [0, 1])
def test_ottt_and_bptt_against_numpy(seed, rule, backend):
    layer, x, signal = make(rule=rule, seed=seed), stimulus(seed), signals(seed)
    with tt.backend(backend):
        _, passed = run(layer, x, signal)
    expected = getattr(reference, rule)(parameters(layer), x.numpy(), signal.numpy())
    found = by_value(layer)
    assert found.pop("trace_decay") is None
    for name, grad in found.items():
        assert_close(grad, expected[name])
    assert_close(passed.numpy(), expected["x"])


@pytest.mark.parametrize("rule", ["average", "ottt", "bptt"])
def test_the_read_out_against_numpy(rule):
    layer, x, signal = make("LIS", rule), stimulus(), signals()
    ys, passed = run(layer, x, signal)
    y, g = ys.numpy(), signal.numpy()
    at_membrane = y * (g - (y * g).sum(-1, keepdims=True))
    expected = getattr(reference, rule)(parameters(layer), x.numpy(), at_membrane)
    expected = expected[0] if rule == "average" else expected
    for name, found in by_value(layer).items():
        assert (found is not None) == has_gradient(rule, name), name
        if found is not None:
            assert_close(found, expected[name])
    assert_close(passed.numpy(), expected["x"])


@pytest.mark.parametrize("kind", ["LIF", "LIS"])
@pytest.mark.parametrize("chunks", [0, 1, 7])
@pytest.mark.parametrize("rule", ["average", "ottt", "bptt"])
def test_calls_in_chunks_and_in_steps_are_one_call(rule, chunks, kind):
    x, signal = stimulus(), signals()
    whole, parts = make(kind, rule), make(kind, rule)
    ys, passed = run(whole, x, signal)
    zs, cut = run(parts, x, signal, chunks)
    torch.testing.assert_close(ys, zs, rtol=1e-14, atol=0 if kind == "LIF" else 1e-15)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert (a.grad is not None) == (b.grad is not None) == has_gradient(rule, name), name
        if has_gradient(rule, name):
            assert_close(b.grad.numpy(), a.grad.numpy(), 1e-11)
    if rule == "average":  # each call spreads what comes through it, and the sums are the same
        passed, cut = passed.sum(1), cut.sum(1)
    assert_close(cut.numpy(), passed.numpy(), 1e-11)


@pytest.mark.parametrize("rule", ["average", "ottt", "bptt"])
def test_one_shared_value_for_all_neurons(rule):
    layer, x, signal = make(rule=rule, shared=True), stimulus(), signals()
    run(layer, x, signal, 7)
    expected = getattr(reference, rule)(parameters(layer), x.numpy(), signal.numpy())
    expected = expected[0] if rule == "average" else expected
    if rule == "ottt":
        assert layer.eligibility.by_weight.shape == (B, 1, IN)
    for name, found in by_value(layer).items():
        assert (found is not None) == has_gradient(rule, name), name
        if found is not None:
            total = expected[name] if name in ("weight", "bias") else np.asarray(expected[name].sum())
            assert_close(found, total)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(10, 60))
def test_every_rule_against_numpy_on_many_layers(seed):
    steps, batch = 1 + seed % 7 * 17, 1 + seed % 3
    for kind in ("LIF", "LIS"):
        for rule in ("average", "ottt", "bptt"):
            layer, x = make(kind, rule, seed, shared=seed % 5 == 0), stimulus(seed, steps, batch)
            signal = signals(seed, steps, batch)
            ys, passed = run(layer, x, signal, chunks=None if seed % 2 else 13)
            g = signal.numpy()
            if kind == "LIS":
                y = ys.numpy()
                g = y * (g - (y * g).sum(-1, keepdims=True))
            expected = getattr(reference, rule)(parameters(layer), x.numpy(), g)
            expected = expected[0] if rule == "average" else expected
            for name, found in by_value(layer).items():
                assert (found is not None) == has_gradient(rule, name), name
                if found is None:
                    continue
                wanted = expected[name] if found.ndim else np.asarray(expected[name].sum())
                if np.abs(expected[name]).max() > 1e-9:
                    assert_close(found, wanted, 1e-9)
                else:
                    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)
            if rule != "average" or seed % 2:
                assert_close(passed.numpy(), expected["x"], 1e-9)


def test_the_exact_rule_through_the_engine_is_autograd_through_the_eager_loop():
    x, signal = stimulus(), signals()
    for kind in ("LIF", "LIS"):
        layers = [make(kind, "bptt"), make(kind, "bptt")]
        found = []
        for layer, backend, chunks in zip(layers, ("cpu", "eager"), (None, 0), strict=True):
            with tt.backend(backend):
                found.append(run(layer, x, signal, chunks))
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
        for (name, a), b in zip(layers[0].named_parameters(), layers[1].parameters(), strict=True):
            assert (a.grad is not None) == (b.grad is not None) == has_gradient("bptt", name), name
            if has_gradient("bptt", name):
                assert_close(a.grad.numpy(), b.grad.numpy(), 1e-12)


def test_the_gradient_comes_from_the_trace_when_the_signal_arrives():
    """A kept output takes its signal later: the trace of then, and of the same stream."""
    layer, x, signal = make(), stimulus(), signals()
    early, _ = layer(x[:, :10])
    layer(x[:, 10:])
    layer.reset_states()
    layer(stimulus(5))  # another stream
    (early * signal[:, :10]).sum().backward()
    expected, _, _ = reference.average(parameters(layer), x.numpy(), signal[:, :10].numpy())
    for name, found in by_value(layer).items():
        assert_close(found, expected[name])


def test_a_signal_may_come_after_the_parameters_were_changed():
    layer, x, signal = make(), stimulus(), signals()
    ys, _ = layer(x)
    with torch.no_grad():
        layer.weight += 0.1
    (ys * signal).sum().backward()
    expected, _, _ = reference.average(parameters(layer), x.numpy(), signal.numpy())
    assert_close(layer.weight.grad.numpy(), expected["weight"])


@pytest.mark.parametrize("when", ["reset_states", "zero_states", "detach_states", "load_states"])
def test_another_stream_begins_where_the_states_were_set(when):
    layer, x, signal = make(), stimulus(), signals()
    ys, _ = layer(x)
    if when == "load_states":
        layer.load_states(_elsewhere(layer))
    else:
        getattr(layer, when)()
    layer(stimulus(9))
    (ys * signal).sum().backward()
    expected, _, _ = reference.average(parameters(layer), x.numpy(), signal.numpy())
    assert_close(layer.weight.grad.numpy(), expected["weight"])


def _elsewhere(layer):
    return {
        path: {name: None if state is None else torch.ones_like(state) for name, state in states.items()}
        for path, states in layer.save_states().items()
    }


@pytest.mark.parametrize("rule", ["average", "ottt", "bptt"])
def test_a_deep_network_passes_one_signal_down(rule):
    """Two layers: the second's gradient of its input is the first's signal."""
    first, second = make(rule=rule), tt.nn.LIF(OUT, 4, rule=rule).double()
    x, g = stimulus(), torch.randn(B, T, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    net = tt.nn.Sequential(first, second)
    ys, states = net(x)
    assert len(states) == 2
    (ys * g).sum().backward()
    p, q = parameters(first), parameters(second)
    hidden = reference.forward(p, x.numpy())[0]
    assert hidden.sum() > 20
    gradients = getattr(reference, rule)
    upper = gradients(q, hidden, g.numpy())
    upper = upper[0] if rule == "average" else upper
    lower = gradients(p, x.numpy(), upper["x"])
    lower = lower[0] if rule == "average" else lower
    assert_close(second.weight.grad.numpy(), upper["weight"])
    assert_close(first.weight.grad.numpy(), lower["weight"])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_spikes_of_any_dtype(dtype):
    layer = make(dtype=torch.float32)
    x = stimulus(dtype=torch.float32)
    ys, states = layer(x.to(dtype))
    layer.reset_states()
    assert torch.equal(ys, layer(x)[0])
    assert ys.dtype == states.trace.dtype == states.membrane.dtype == torch.float32


def test_float32_is_near_float64():
    x, signal = stimulus(), signals()
    for rule in ("average", "ottt", "bptt"):
        exact, single = make(rule=rule), make(rule=rule, dtype=torch.float32)
        ys, _ = run(exact, x, signal)
        zs, _ = run(single, x.float(), signal.float())
        assert torch.equal(ys.float(), zs)
        for (name, a), b in zip(exact.named_parameters(), single.parameters(), strict=True):
            assert (a.grad is not None) == (b.grad is not None) == has_gradient(rule, name), name
            if has_gradient(rule, name):
                assert_close(b.grad.double().numpy(), a.grad.numpy(), 2e-5)


def test_frozen_parameters_get_no_gradient_and_the_rest_the_same():
    x, signal = stimulus(), signals()
    for rule in ("average", "ottt", "bptt"):
        free = make(rule=rule)
        run(free, x, signal)
        fixed = {"learn_trace_decay": False, "learn_mem_decay": False, "learn_threshold": False}
        bound = make(rule=rule, **fixed)
        run(bound, x, signal)
        assert [name for name, _ in bound.named_parameters()] == ["weight", "bias"]
        assert_close(bound.weight.grad.numpy(), free.weight.grad.numpy(), 1e-12)
    still = make(learn_weight=False)
    run(still, x, signal)
    assert not any("weight" in name or "bias" in name for name, _ in still.named_parameters())
    assert "weight" in still.state_dict()
    assert still.membrane.raw_threshold.grad.abs().sum() > 0


def test_no_graph_where_nothing_learns():
    layer = make()
    with torch.no_grad():
        assert layer(stimulus())[0].grad_fn is None
    layer.requires_grad_(False)
    assert layer(stimulus())[0].grad_fn is None


@pytest.mark.parametrize("name", ["fast_sigmoid", "triangular", "single_exponential", "heaviside_window"])
def test_surrogates(name):
    """ottt against the sum over steps of what autograd gives for the slope alone."""
    x, signal = stimulus(), signals()
    for surrogate in (name, tt.functional.surrogates.Surrogate(name)):
        layer = make(rule="ottt", surrogate=surrogate, shared=True)
        run(layer, x, signal)
        kind, theta = tt.functional.surrogates.Surrogate(name), layer.threshold.detach()

        def slope(z, kind=kind, theta=theta):
            z = torch.as_tensor(z)
            return kind.vjp(torch.ones_like(z), z, theta).numpy()

        expected = reference.ottt(parameters(layer), x.numpy(), signal.numpy(), slope)
        assert_close(layer.weight.grad.numpy(), expected["weight"])
