"""The engine under `torch.compile`, `torch.export`, gradcheck, autocast and DDP; and what "auto" chooses."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import tracetorch as tt
from tracetorch.fused import executor
from tracetorch.fused.kernel import Kernel

T, B = 9, 3


class Net(tt.Model):
    """[T, B, 5] -> [T, B, 4], its neurons unrolled."""

    def __init__(self, quant_fn=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.neuron = nn.Linear(5, 6), tt.snn.LIB(6, quant_fn=quant_fn)
        self.second, self.read_out = nn.Linear(6, 4), tt.snn.LI(4)

    def forward(self, xs):
        return self.read_out.unroll(self.second(self.neuron.unroll(self.first(xs))))


def sample(steps=T):
    return torch.rand(steps, B, 5, generator=torch.Generator().manual_seed(1)) * 3


def results(net, run, steps=T):
    """Two chunks, states carried on: outputs, last states, and all gradients."""
    net.reset_states()
    net.zero_grad()
    chunks = [chunk.clone().requires_grad_() for chunk in sample(2 * steps).split(steps)]
    ys = torch.cat([run(chunk) for chunk in chunks])
    states = [state.detach().clone() for layer in net.save_states().values() for state in layer.values()]
    (ys * torch.linspace(-1, 1, ys.numel()).view_as(ys)).sum().backward()
    return [ys.detach(), *states, *(chunk.grad for chunk in chunks), *(p.grad.clone() for p in net.parameters())]


def compiled(net):
    torch._dynamo.reset()
    return torch.compile(net, fullgraph=True, backend="aot_eager")


# ---- torch.compile ---------------------------------------------------------------------------------------------------


# torch 2.13.0 itself looks at `.grad` of a state that the first chunk computed.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_without_a_graph_break_it_computes_the_same():
    net = Net(tt.functional.round_ste())
    plain = results(net, net)
    assert plain[0].abs().sum() > 0
    run = compiled(net)
    for a, b in zip(results(net, run), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_compiled_program_calls_the_operation_and_takes_other_lengths():
    net, seen = Net(), []

    def backend(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    run = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    for steps in (5, 7, 11):
        net.reset_states()
        ys = run(sample(steps))
        net.reset_states()
        assert torch.equal(ys, net(sample(steps)))
    assert all(sum("tracetorch.scan" in target for target in targets) == 2 for targets in seen)
    assert len(seen) <= 2


def test_a_layer_that_no_kernel_runs_is_compiled_as_its_step_loop():
    class Mean(tt.snn.Layer):
        def __init__(self):
            super().__init__(4)
            self.define_state("mem")

        def step(self, x, mem):
            mem = 0.5 * mem + x - x.mean(-1, keepdim=True)
            return mem, mem

    layer, xs = Mean(), torch.rand(3, 2, 4)
    torch._dynamo.reset()
    ys = torch.compile(layer.unroll, fullgraph=True, backend="aot_eager")(xs)
    layer.reset_states()
    with tt.backend("eager"):
        assert torch.equal(ys, layer.unroll(xs))


def test_exported_it_computes_the_same():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(tt.functional.round_ste())

        def forward(self, xs):
            self.net.reset_states()
            ys = self.net(xs)
            self.net.reset_states()
            return ys

    module = Whole().eval()
    with torch.no_grad():
        program = torch.export.export(module, (sample(),))
        assert torch.equal(program.module()(sample()), module(sample()))
    assert "tracetorch.scan" in str(program.graph)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_gradcheck_of_a_smooth_step_in_float64(name):
    layer = tt.snn.LIB(3, beta=torch.tensor([0.5, 0.7, 0.9])).double()
    parameters = [layer.raw_beta, layer.raw_threshold, layer.raw_bias]

    def run(xs, mem, *_):
        layer.mem = mem
        with tt.backend(name):
            return layer.unroll(xs), layer.mem

    xs = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    mem = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (xs, mem, *parameters))


def test_a_second_derivative_is_refused():
    layer, xs = tt.snn.LI(3), torch.rand(4, 2, 3, requires_grad=True)
    with tt.backend("cpu"):
        (grad,) = torch.autograd.grad(layer.unroll(xs).square().sum(), xs, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


# ---- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_carried_as_float32_inside_a_sequence(dtype):
    layer = tt.snn.LI(5, beta=torch.tensor([0.3, 0.5, 0.7, 0.9, 0.99]))
    half = tt.snn.LI(5, beta=torch.tensor([0.3, 0.5, 0.7, 0.9, 0.99])).to(dtype)
    xs = (torch.randn(50, 2, 5)).to(dtype)
    layer.raw_beta.data.copy_(half.raw_beta)
    with tt.backend("cpu"):
        ys = half.unroll(xs)
    # The same decay as the half-precision layer has it, everything else in float32.
    layer.TTcompile()
    layer.baked["beta"] = half.beta.detach().float()
    with tt.backend("eager"):
        expected = layer.unroll(xs.float())
    assert ys.dtype is dtype
    assert half.mem.dtype is dtype
    assert torch.equal(ys, expected.to(dtype))


def test_under_autocast_a_network_trains():
    net = Net(tt.functional.round_ste())
    with torch.autocast("cpu", torch.bfloat16):
        ys = net(sample())
        with tt.backend("eager"):
            net.reset_states()
            expected = net(sample())
    assert ys.dtype is expected.dtype
    assert (ys - expected).abs().max() <= 0.05 * expected.abs().max()
    ys.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# ---- DDP -------------------------------------------------------------------------------------------------------------

DDP = """
import os, sys, torch, torch.distributed as dist, tracetorch as tt
sys.path.insert(0, {tests!r})
from test_compile import Net, sample
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
net = Net(tt.functional.round_ste())
model = torch.nn.parallel.DistributedDataParallel(net)
xs = torch.cat([sample(), sample() + 1], 1)
model(xs[:, rank * 3 : rank * 3 + 3]).mean().backward()
if rank == 0:
    torch.save([p.grad for p in net.parameters()], {out!r})
dist.barrier()
del model
dist.destroy_process_group()
sys.stderr.flush()
os._exit(0)  # torch 2.13's gloo threads may abort an orderly end, after all that is tested here
"""


def test_under_ddp_the_gradients_are_the_mean_over_the_ranks(tmp_path):
    code = DDP.format(tests=os.path.dirname(__file__), store=tmp_path / "store", out=str(tmp_path / "grads"))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for process in started:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    net = Net(tt.functional.round_ste())
    net(torch.cat([sample(), sample() + 1], 1)).mean().backward()
    for grad, parameter in zip(torch.load(tmp_path / "grads"), net.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-7)


# ---- "auto" ----------------------------------------------------------------------------------------------------------


def test_auto_runs_the_kernel_and_says_once_where_it_cannot():
    layer, xs = tt.snn.LI(4), torch.rand(5, 2, 4)
    ys = layer.unroll(xs)
    assert sum(isinstance(found, Kernel) for found in layer.kernels.values()) == 1
    layer.reset_states()
    with tt.backend("eager"):
        assert torch.equal(ys, layer.unroll(xs))

    class Sorted(tt.snn.Layer):
        def __init__(self):
            super().__init__(4)
            self.define_state("mem")

        def step(self, x, mem):
            mem = mem + x.sort().values
            return mem, mem

    odd = Sorted()
    with pytest.warns(tt.fused.FuseWarning, match=r"Sorted runs step by step: .*sort"):
        first = odd.unroll(xs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd.reset_states()
        assert torch.equal(odd.unroll(xs), first)
    with pytest.raises(tt.fused.GraphError, match="sort"), tt.backend("cpu"):
        odd.unroll(xs)


def test_auto_without_a_compiler_runs_the_step_loop_and_says_so_once(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    executor._cpu.cache_clear()
    layer, xs = tt.snn.LI(4), torch.rand(5, 2, 4)
    with pytest.warns(tt.fused.FuseWarning, match="no C compiler found"):
        layer.unroll(xs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.unroll(xs)
    executor._cpu.cache_clear()


def test_a_replaced_function_is_a_new_kernel():
    """Also where the new function stands at the old one's address."""
    layer, xs = tt.snn.LIB(4), torch.rand(5, 2, 4)
    for k in range(1, 6):
        layer.reset_states()
        layer.spike_fn = eval(f"lambda x: x * {k}")
        ys = layer.unroll(xs)
        layer.reset_states()
        with tt.backend("eager"):
            assert torch.equal(ys, layer.unroll(xs)), k


def test_torch_func_and_subclasses_get_the_step_loop():
    layer, xs = tt.snn.LI(4), torch.rand(5, 2, 4)
    expected = layer.unroll(xs)

    def run(xs):
        layer.reset_states()
        return layer.unroll(xs)

    batched = torch.func.vmap(run, in_dims=1, out_dims=1)(xs[:, :, None])
    assert torch.equal(batched[:, :, 0], expected)
    layer.reset_states()


def test_hooks_and_a_forward_of_one_s_own_see_every_step():
    class Noisy(tt.snn.LI):
        def forward(self, x):
            return super().forward(x + 1)

    xs, seen = torch.rand(5, 2, 4), []
    hooked, noisy, plain = tt.snn.LI(4), Noisy(4), tt.snn.LI(4)
    hooked.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(hooked.unroll(xs), plain.unroll(xs))
    assert len(seen) == 5
    plain.reset_states()
    assert torch.equal(noisy.unroll(xs), plain.unroll(xs + 1))
    inside, calls = tt.snn.LIB(4), []
    inside.quant_fn.register_forward_hook(lambda module, args, output: calls.append(output))
    inside.unroll(xs)
    assert len(calls) == 5
    for layer, reason in ((hooked, "hook"), (inside, "hook"), (noisy, "forward is its own")):
        with pytest.raises(tt.fused.FuseError, match=reason), tt.backend("cpu"):
            layer.unroll(xs)


def test_a_step_that_reads_its_input_s_size_runs_step_by_step():
    """Traced on an example, the size would be the example's."""

    class Share(tt.snn.Layer):
        def __init__(self):
            super().__init__(4)
            self.define_state("mem")

        def step(self, x, mem):
            mem = 0.5 * mem + x / x.shape[-1]
            return mem, mem

    layer, xs = Share(), torch.rand(5, 2, 4)
    with pytest.warns(tt.fused.FuseWarning, match="depends on the shape"):
        ys = layer.unroll(xs)
    layer.reset_states()
    with tt.backend("eager"):
        assert torch.equal(ys, layer.unroll(xs))
    with pytest.raises(tt.fused.GraphError, match="depends on the shape"), tt.backend("cpu"):
        layer.unroll(xs)
