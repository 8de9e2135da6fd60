"""What a rule keeps: saved tensors and graph nodes do not grow with time, under "bptt" they do."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import tracetorch as tt

IN, OUT = 6, 8


def network(rule, layers=2):
    torch.manual_seed(0)
    made = [tt.nn.LIF(IN, OUT, bias=True, rule=rule), tt.nn.LIS(OUT, 3, rule=rule)]
    return tt.nn.Sequential(*made[:layers])


class Saved:
    """Counts the bytes that autograd holds saved, and their peak."""

    def __init__(self):
        self.now = self.peak = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def pack(self, tensor):
        held = _Held(tensor)
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self.free, size)
        return held

    def free(self, size):
        self.now -= size

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


class _Held:
    def __init__(self, tensor):
        self.tensor = tensor.detach()


def nodes(tensor):
    waiting, seen = [tensor.grad_fn], {tensor.grad_fn}
    while waiting:
        for child, _ in waiting.pop().next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return len(seen)


def streamed(rule, steps, chunk, each=False, layers=2):
    """A stream in calls of `chunk` steps (0: one step per call); one signal at the end, or with `each` one per call.

    Returns the peak of saved bytes, the nodes of the last graph, and the bytes that the states take.
    """
    net = network(rule, layers)
    g = torch.Generator().manual_seed(1)
    total = None
    with Saved() as saved:
        for _ in range(steps // max(chunk, 1)):
            x = torch.rand(1, *([chunk] if chunk else []), IN, generator=g) < 0.4
            ys, _ = net(x)
            last = ys[:, -1] if chunk else ys
            total = last.detach() if total is None else total + last.detach()
            if each:
                last[0, 1].backward()
                net.detach_states()
        mean = total / (steps // max(chunk, 1))
        out = last + (mean - last).detach()  # the value of the mean, with the gradient of the last call
        count = nodes(out)
        if not each:
            out[0, 1].backward()
    assert all(p.grad is not None for p in net[0].parameters() if rule == "average")
    gc.collect()
    kept = sum(
        s.numel() * s.element_size() for states in net.save_states().values() for s in states.values() if s is not None
    )
    return saved.peak, count, kept


@pytest.mark.parametrize(("chunk", "layers"), [(0, 1), (50, 2)])
def test_average_keeps_nothing_per_step_before_one_signal(chunk, layers):
    """20,000 steps, each a call of its own, are as 100."""
    assert streamed("average", 100, chunk, layers=layers) == streamed("average", 20_000, chunk, layers=layers)


def test_ottt_keeps_nothing_of_earlier_calls():
    assert streamed("ottt", 20, 0, each=True) == streamed("ottt", 200, 0, each=True)
    assert streamed("ottt", 200, 50) == streamed("ottt", 2000, 50)


def test_bptt_grows_beside_it():
    (short, few, _), (long, many, _) = streamed("bptt", 30, 0), streamed("bptt", 300, 0)
    assert long > 9 * short
    assert many > 8 * few
    (short, few, _), (long, many, _) = streamed("bptt", 300, 50), streamed("bptt", 3000, 50)
    assert long > 9 * short
    assert many > 8 * few


def test_one_call_of_a_whole_sequence_saves_nothing_that_grows():
    found = []
    for steps in (100, 20_000):
        layer = network("average")[0]
        with Saved() as saved:
            ys, _ = layer(torch.rand(1, steps, IN) < 0.4)
            assert saved.now == 0
            ys.sum().backward()
        found.append((saved.peak, nodes(ys)))
    assert found[0] == found[1]
    assert found[0][1] < 12


def test_a_sum_of_all_outputs_keeps_no_tensor_of_the_layer():
    """The user's own sum has a node per call; the layer adds nothing to it, and the gradient is that of one call."""
    x = torch.rand(1, 100, IN, generator=torch.Generator().manual_seed(2)) < 0.4
    layer, other = network("average")[0], network("average")[0]
    with Saved() as saved:
        total = sum(layer(x[:, k])[0] for k in range(100))
        assert saved.now == 0
        total.sum().backward()
    other(x)[0].sum().backward()
    torch.testing.assert_close(layer.weight.grad, other.weight.grad, rtol=2e-4, atol=1e-4)


def test_nothing_keeps_a_layer_or_its_outputs_alive():
    for rule in ("average", "ottt", "bptt"):
        layer = network(rule)[0]
        ys, states = layer(torch.rand(1, 20, IN) < 0.4)
        ys.sum().backward()
        old, gone = weakref.ref(ys), weakref.ref(layer)
        del ys, states
        if rule != "bptt":
            assert old() is None
        del layer
        gc.collect()
        assert gone() is None
