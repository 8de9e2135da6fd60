"""Networks as people train them: over processes, compiled for any length, with shared parameters, copied on the way."""

import copy
import multiprocessing
import os
import tempfile
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tracetorch as tt
from tests.layer_cases import assert_bits, noise

QUANT = tt.functional.round_ste()


class Net(nn.Module):
    """[T, B, 5] -> [T, B, 4]; its last layer only where asked for."""

    def __init__(self, beside=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.neuron = nn.Linear(5, 6), tt.snn.LIB(6, quant_fn=QUANT)
        self.second, self.read_out = nn.Linear(6, 4), tt.snn.LI(4)
        self.beside = tt.snn.LIB(4, quant_fn=QUANT) if beside else None

    def forward(self, xs, beside=False):
        tt.reset_states(self)
        ys = self.read_out.unroll(self.second(self.neuron.unroll(self.first(xs))))
        return ys + self.beside.unroll(ys) if beside and self.beside is not None else ys


def sample(seed, steps=7, batch=4):
    return torch.rand(steps, batch, 5, generator=torch.Generator().manual_seed(seed)) * 3


def gradients(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def alone(seeds, beside, uses):
    """The gradients of one process's part, summed over its inputs."""
    net = Net(beside)
    for seed, use in zip(seeds, uses, strict=True):
        net(sample(seed), use).mean().backward()
    return gradients(net)


def assert_mean(found, *parts):
    for name, mean, *each in zip([n for n, _ in Net(True).named_parameters()], found, *parts, strict=False):
        known = [torch.zeros_like(mean) if g is None else g for g in each] if mean is not None else []
        assert mean is not None or all(g is None for g in each), name
        if mean is not None:
            torch.testing.assert_close(mean, sum(known) / len(known), rtol=1e-5, atol=1e-6, msg=name)


# ---- over processes --------------------------------------------------------------------------------------------------

MODES = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "find unused": {"find_unused_parameters": True},
}


def _modes(rank):
    """Three steps in every mode; what is unused is unused in every process."""
    for name, mode in MODES.items():
        beside = name in ("static graph", "find unused")
        net = Net(beside)
        model = nn.parallel.DistributedDataParallel(net, **mode)
        for turn in range(3):
            net.zero_grad()
            model(sample(10 * turn + rank)).mean().backward()
            assert_mean(gradients(net), *(alone([10 * turn + r], beside, [False]) for r in range(2)))


def _accumulated(rank):
    net = Net()
    model = nn.parallel.DistributedDataParallel(net)
    for _ in range(2):
        net.zero_grad()
        with model.no_sync():
            model(sample(rank)).mean().backward()
            model(sample(2 + rank)).mean().backward()
        model(sample(4 + rank)).mean().backward()
        assert_mean(gradients(net), *(alone([r, 2 + r, 4 + r], False, [False] * 3) for r in range(2)))


def _uneven(rank):
    """A layer that one process uses, and the other does not."""
    net = Net(True)
    model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    for _ in range(2):
        net.zero_grad()
        model(sample(rank), rank == 0).mean().backward()
        assert_mean(gradients(net), *(alone([r], True, [r == 0]) for r in range(2)))


def _process(rank, store, said):
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        _modes(rank), _accumulated(rank), _uneven(rank)
        said.put("")
        torch.distributed.barrier()
    except BaseException as error:
        said.put(repr(error))
    said.close(), said.join_thread()
    time.sleep(0.5)
    os._exit(0)  # torch 2.13's gloo threads may abort an orderly end, after all that is tested here


@pytest.mark.sweep
def test_under_ddp_in_all_its_modes_the_gradients_are_the_mean_over_the_processes():
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=_process, args=(rank, f"{folder}/store", said)) for rank in range(2)]
        for process in started:
            process.start()
        assert [said.get(timeout=240) for _ in started] == ["", ""]
        for process in started:
            process.join(60)


class Encoded(Dataset):
    """Its items are what a layer makes of an input: workers get the layer pickled, or by a fork."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 4

    def __getitem__(self, place):
        self.layer.reset_states()
        with torch.no_grad(), tt.backend("cpu"):
            return self.layer.unroll(sample(place, 20, 200))


@pytest.mark.sweep
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_data_loader_s_workers_run_layers(method):
    layer = tt.snn.LIB(5, quant_fn=QUANT)
    layer.unroll(sample(0))
    items = Encoded(layer)
    found = list(DataLoader(items, batch_size=None, num_workers=2, multiprocessing_context=method))
    assert len(found) == 4
    for place, item in enumerate(found):
        assert_bits(item, items[place])


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.sweep
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_for_any_length_the_gradients_are_the_same(backend):
    torch._dynamo.reset()
    net = Net()
    run = torch.compile(net, dynamic=True, backend=backend, fullgraph=True)
    for steps, batch in ((5, 3), (7, 3), (1, 3), (64, 2), (65, 2), (33, 1), (2, 7), (5, 3)):
        found = []
        for forward in (run, net):
            xs = sample(1, steps, batch).requires_grad_()
            net.zero_grad()
            ys = forward(xs)
            ys.square().sum().backward()
            found.append([ys, xs.grad, *gradients(net)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_a_model_resets_its_own_states():
    """The search for layers goes through containers, and not through the engine's, which grow while torch compiles."""
    torch._dynamo.reset()
    net, xs = Net(), sample(0).requires_grad_()
    ys = torch.compile(net, dynamic=True, fullgraph=True, backend="aot_eager")(xs)
    assert_bits(ys, net(xs))


# ---- shared, copied, long --------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A parametrization that puts one parameter in the place of several layers' own."""

    def __init__(self, parameter):
        super().__init__()
        self.parameter = parameter

    def forward(self, raw):
        return 0 * raw + self.parameter


def test_a_parameter_that_layers_share_by_parametrization_is_trained_as_one():
    found = []
    for backend in ("eager", "cpu"):
        parameter = nn.Parameter(torch.full((4,), 1.5))
        layers = [tt.snn.LIB(4, quant_fn=QUANT) for _ in range(2)]
        for layer in layers:
            nn.utils.parametrize.register_parametrization(layer, "raw_beta", Shared(parameter), unsafe=True)
        optimizer = torch.optim.SGD([parameter], lr=0.01)
        with tt.backend(backend):
            for _ in range(3):
                tt.reset_states(nn.ModuleList(layers))
                optimizer.zero_grad()
                layers[1].unroll(layers[0].unroll(noise(9, 3, 4))).sum().backward()
                optimizer.step()
        assert layers[0].parametrizations.raw_beta.original.grad.abs().sum() == 0
        found.append((parameter.detach(), parameter.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert found[0][1].abs().sum() > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_copy_made_without_gradients_goes_on_alone_and_is_trained(fused):
    xs = noise(6, 2, 4)
    if fused:
        layer = tt.fuse(pytest.importorskip("snntorch").Leaky(0.9, learn_beta=True, init_hidden=True))
    else:
        layer = tt.snn.LIB(4, quant_fn=QUANT)
    with torch.no_grad(), tt.backend("cpu"):
        layer.unroll(xs, 0)
        twin = copy.deepcopy(layer)
        assert_bits(twin.unroll(xs, 0), layer.unroll(xs, 0))
    with tt.backend("cpu"):
        twin.unroll(xs, 0).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in layer.parameters())


def test_a_million_steps_and_back():
    """By chunks, the same, but for the parameters' gradients, which are sums."""
    xs, found = torch.rand(1_000_000, 1, 4, generator=torch.Generator().manual_seed(0)), []
    for length in (1_000_000, 370_001):
        torch.manual_seed(0)
        layer, given = tt.snn.LIB(4, quant_fn=QUANT), xs.clone().requires_grad_()
        with tt.backend("cpu"):
            ys = torch.cat([layer.unroll(part) for part in given.split(length)])
        ys.sum().backward()
        found.append((ys.detach(), given.grad, layer.mem.detach()))
    for a, b in zip(*found, strict=True):
        assert_bits(a, b)
    assert found[0][0].sum() > 1000
