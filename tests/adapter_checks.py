"""What the tests of several adapters ask of a layer: its bits, copies, refusals, and a verdict on what it computes."""

import copy
import io
import operator

import numpy as np
import pytest
import torch
from torch import nn

from tests.bits import assert_bits
from tracetorch import adapters, oracle
from tracetorch.adapters.registry import adapter_of
from tracetorch.core.spec import SpecError


def bits(tensor):
    """Dtype, shape and bytes: NaN equals itself, -0.0 is not 0.0."""
    return str(tensor.dtype), list(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def gradients(layer, xs, outputs, seed=9):
    """Of the input and of all that is trained, by name, from a fixed random gradient of the output; 0 if unused."""
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed), dtype=outputs.dtype)
    named = {"x": xs} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if not outputs.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in named.items()}
    found = torch.autograd.grad((outputs * weights).sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(named.items(), found, strict=True)}


def inputs(dtype=torch.float32, steps=50):
    """[steps, 3, 5], mostly positive."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(steps, 3, 5, generator=generator) * 2.6 - 0.6).to(dtype)


def slope(ys, wanted):
    """The gradient of ys along weights from -1 to 1, and the weights."""
    weights = torch.linspace(-1, 1, ys.numel(), dtype=ys.dtype).reshape(ys.shape)
    return torch.autograd.grad(ys, wanted, weights)[0], weights


def by_deepcopy(layer):
    return copy.deepcopy(layer)


def by_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_refused(layer, words):
    """The layer cannot be read, and the error says all of these words."""
    with pytest.raises(SpecError) as caught:
        adapters.spec(layer)
    for word in words:
        assert word in str(caught.value)


def refused_in_a_network(layer, features, to, **how):
    """The error of converting the layer behind a Linear of 4 to `features`: it has its layer, a field and a remedy."""
    net = nn.Sequential(nn.Linear(4, features), layer)
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.convert(net, to=to, **how)
    error = caught.value
    assert error.layer == "'1'"
    assert error.field
    assert error.remedy
    assert "Remedy: " in str(error)
    return error


def recorded(xs, outputs, states, spec):
    """Tensors as the recording of a layer that stores its states as the spec says."""
    arrays = {name: state.detach().numpy() for name, state in states.items()}
    return oracle.Recording(xs.detach().numpy(), outputs.detach().numpy(), arrays, spec)


def assert_judged(spec, layer, xs):
    """The oracle accepts what the layer computes of xs [T, ...] as the spec's; returns the layer's outputs."""
    outputs, states = adapter_of(layer).trace(layer, xs)
    verdict = oracle.judge(spec, recorded(xs, outputs, states, adapters.spec(layer)))
    assert verdict.ok, verdict
    return outputs


def traced(layer, xs):
    """From the initial state: outputs, states, gradients of x and of what is trained, by the spec's names; weights.

    The gradients are those of the outputs' sum with the weights.
    """
    own = adapter_of(layer)
    xs = xs.detach().clone().requires_grad_()
    tensors = {name: operator.attrgetter(attribute)(layer) for name, attribute in own.attributes(layer).items()}
    trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    outputs, states = own.trace(layer, xs)
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal(outputs.shape).astype(np.float32))
    (outputs * weights).sum().backward()
    return outputs, states, {"x": xs.grad, **{name: tensor.grad for name, tensor in trained.items()}}, weights


def assert_native_is_the_same(layer, xs):
    """The native layer of its spec has its bits, and the oracle agrees on spikes, states and all gradients.

    Returns:
        Outputs and the oracle's verdict.
    """
    spec = adapters.spec(layer)
    outputs, states, grads, weights = traced(layer, xs)
    same, kept, slopes, _ = traced(adapters.build(spec, "tracetorch"), xs)
    assert_bits(outputs, same)
    for state in spec.states:
        assert_bits(states[state], kept[state], state)
    assert_bits(grads["x"], slopes["x"], "the gradient of x")
    if spec.output == "spikes":
        assert 10 < (outputs != 0).sum() < outputs.numel() - 10
    recording = recorded(xs, outputs, states, spec)
    verdict = oracle.judge(spec, recording)
    assert verdict.ok, verdict
    truth = oracle.gradients(spec, recording, weights.numpy())
    assert set(grads) == set(slopes)
    for name, gradient in grads.items():
        tolerance = 1e-5 if name == "x" else 1e-4  # a parameter's is a sum over all elements
        assert oracle.gradient_error(gradient.numpy(), truth[name]) < tolerance, name
        assert oracle.gradient_error(slopes[name].numpy(), truth[name]) < tolerance, name
    return outputs, verdict
