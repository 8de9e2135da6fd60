"""`tt.save` and `tt.load`: the network that comes back is the same.

What is refused, by either: test_storage_refusals.py and test_storage_hostile.py."""

import json
import operator
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tracetorch.core.graph import Node, Ref, Size, State
from tracetorch.core.storable import CLASSES
from tracetorch.nn.parts import Eligibility, InputTrace, LeakyMembrane, SpikingMembrane
from tracetorch.snn.leaky import LAYERS
from tracetorch.snn.recurrent import Recurrent

GOLDEN = pathlib.Path(__file__).parent / "data" / "network_v1.tt"


# ---- what "the same" means -------------------------------------------------------------------------------------------


def bits(tensor):
    """Dtype, shape, strides and bytes. Not `torch.equal`, for which NaN differs and -0.0 is 0.0."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return str(tensor.dtype), list(tensor.shape), list(tensor.stride()), raw


def described(net):
    """Everything that must come back, sharing included: equal for equal networks and for no others."""
    numbers = {}

    def number(thing):
        return numbers.setdefault(id(thing), len(numbers))

    rows = []
    for path, module in net.named_modules(remove_duplicate=False):
        arguments = module.extra_repr().replace("[", "(").replace("]", ")")  # a list comes back as a tuple
        rows.append((path, type(module), module.training, arguments, number(module)))
        if isinstance(module, tt.snn.LIB):
            rows.append(module.spike_fn)
        if isinstance(module, tt.snn.SpecNeuron):
            rows.append({name: value for name, value in module._choices.to_dict().items() if name != "parameters"})
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, tensor in sorted(tensors.items()):
                if name in module._non_persistent_buffers_set:
                    continue
                row = None if tensor is None else (bits(tensor), tensor.requires_grad, number(tensor), type(tensor))
                rows.append((path, kind, name, row))
    return rows


def round_trip(net, tmp_path):
    """Saved and loaded; checked to be the same, and to give the same file again."""
    tt.save(tmp_path / "net.tt", net)
    loaded = tt.load(tmp_path / "net.tt")
    assert described(loaded) == described(net)
    tt.save(tmp_path / "again.tt", loaded)
    assert (tmp_path / "again.tt").read_bytes() == (tmp_path / "net.tt").read_bytes()
    return loaded


def leaky_spec(beta=0.9, threshold=1.0, reset="subtract", timing="next_step_after_decay", learnable=True):
    number = lambda value, learn, raw="value": tt.Parameter(np.array(value, np.float32), learn, raw)  # noqa: E731
    parameters = {"mem_decay": number(beta, learnable, "clamped"), "threshold": number(threshold, learnable)}
    gradient = "attached" if timing == "same_step_residual" else "detached"
    if reset == "value":
        parameters["reset_value"] = number(0.0, False)
    return tt.NeuronSpec(
        "snntorch.Leaky",
        comparison=">",
        reset=reset,
        reset_timing=timing,
        reset_gradient=gradient,
        surrogate=tt.functional.Surrogate("atan"),
        parameters={**parameters, "spike_scale": number(1.0, False)},
    )


def lif_spec(tau=8.0, threshold=1.0, count="single", reset="subtract", gain="one_minus_decay", clamp=False):
    number = lambda value, learn, raw="value": tt.Parameter(np.array(value, np.float32), learn, raw)  # noqa: E731
    parameters = {"mem_decay": number(tau, True, "exp_tau"), "threshold": number(threshold, False)}
    if reset in ("add_value", "value"):
        parameters["reset_value"] = number(0.25 if reset == "add_value" else 0.0, False)
    if clamp:
        parameters["min_v_mem"] = number(-1.0, False)
    return tt.NeuronSpec(
        "sinabs.LIF",
        spike_count=count,
        max_spikes=3 if count == "limited" else None,
        reset=reset,
        reset_gradient="detached" if reset == "add_value" else "attached",
        input_gain=gain,
        clamp="after_reset" if clamp else "none",
        surrogate=tt.functional.Surrogate("single_exponential"),
        parameters=parameters,
    )


LIB = tt.snn.LIB(4, quant_fn=tt.functional.round_ste(0.5), dim=1, beta_rank=0, learn_bias=False)
X1, X2, X3 = (2, 4, 9), (2, 4, 9, 9), (2, 4, 7, 7, 7)

# One of every class of the table, with arguments that are not the defaults, and the shape of an input to try it on.
GRAPH = tt.Graph(
    {"block.neuron": tt.snn.SpecNeuron(leaky_spec([0.5] * 9))},
    [
        Node("scaled", "method", "mul", (Ref("x"), 3.0)),
        Node("spikes", "module", "block.neuron", (Ref("scaled"),)),
        Node("part", "function", operator.getitem, (Ref("spikes"), (slice(None), slice(1, None, 2)))),
        Node("flat", "method", "reshape", (Ref("part"), Size(0), -1), {}),
        Node("most", "function", torch.nn.functional.pad, (Ref("flat"), (0, 1)), {"value": float("-inf")}),
    ],
    (Ref("most"), State("spikes", "v_mem")),
)
EXAMPLES = {
    "torch.nn.Sequential": (nn.Sequential(nn.Tanh(), nn.Sequential()), X1),
    "tracetorch.Sequential": (tt.Sequential(nn.Sequential(nn.Tanh())), X1),
    "tracetorch.functional.round_ste": (tt.functional.round_ste(0.3), X1),
    "tracetorch.functional.stochastic_round_ste": (tt.functional.stochastic_round_ste(0.3), X1),
    "tracetorch.functional.probabilistic_ste": (nn.Sequential(nn.Sigmoid(), tt.functional.probabilistic_ste()), X1),
    "tracetorch.functional.surrogate_spike": (
        tt.functional.surrogate_spike("gaussian", threshold=0.5, strict=False, sigma=0.25),
        X1,
    ),
    **{f"tracetorch.snn.{cls.__name__}": (cls(4, dim=1), X1) for cls in LAYERS},
    "tracetorch.snn.LI": (tt.snn.LI(4, beta=[0.1, 0.2, 0.3, 0.4], dim=1, learn_beta=False), X1),
    "tracetorch.snn.LIB": (LIB, X1),
    "tracetorch.snn.SpecNeuron": (tt.snn.SpecNeuron(leaky_spec([0.5] * 9)), X1),
    "tracetorch.Graph": (GRAPH, X1),
    "tracetorch.Loop": (tt.Loop(tt.Graph({}, GRAPH.nodes[:1], (Ref("scaled"),)), (None,), steps=3), X1),
    "tracetorch.snn.Recurrent": (Recurrent(tt.snn.SpecNeuron(leaky_spec([0.5] * 9)), nn.Linear(9, 9), True), X1),
    "tracetorch.nn.LIF": (tt.nn.LIF(9, 3, bias=True, rule="ottt", surrogate="triangular", threshold_rank=0), X1),
    "tracetorch.nn.LIS": (tt.nn.LIS(9, 3, rule="bptt", learn_weight=False), X1),
    "tracetorch.nn.Sequential": (tt.nn.Sequential(tt.nn.LIF(9, 5), tt.nn.Sequential(tt.nn.LIS(5, 3))), X1),
    "tracetorch.nn.parts.InputTrace": (InputTrace(9, 0.7, learn_trace_decay=False), X1),
    "tracetorch.nn.parts.LeakyMembrane": (LeakyMembrane(9, [0.1] * 9), X1),
    "tracetorch.nn.parts.SpikingMembrane": (SpikingMembrane(9, 0.7, 0.5, "sigmoid", (("slope", 2.0),), "distance"), X1),
    "tracetorch.nn.parts.Eligibility": (Eligibility(), X1),
    "torch.nn.Linear": (nn.Linear(9, 3, bias=False), X1),
    "torch.nn.Flatten": (nn.Flatten(0, 1), X1),
    "torch.nn.Unflatten": (nn.Unflatten(1, [2, 2]), X1),
    "torch.nn.LeakyReLU": (nn.LeakyReLU(0.1), X1),
    "torch.nn.ELU": (nn.ELU(0.5), X1),
    "torch.nn.CELU": (nn.CELU(0.5), X1),
    "torch.nn.Hardtanh": (nn.Hardtanh(-0.5, 0.25), X1),
    "torch.nn.PReLU": (nn.PReLU(4, 0.1), X1),
    "torch.nn.GELU": (nn.GELU("tanh"), X1),
    "torch.nn.Softplus": (nn.Softplus(2, 3.5), X1),
    "torch.nn.Softmax": (nn.Softmax(1), X1),
    "torch.nn.LogSoftmax": (nn.LogSoftmax(-1), X1),
    "torch.nn.LayerNorm": (nn.LayerNorm([4, 9], 1e-3, bias=False), X1),
    "torch.nn.GroupNorm": (nn.GroupNorm(2, 4, 1e-3), X1),
    "torch.nn.Upsample": (nn.Upsample(scale_factor=(1.5, 2), mode="bilinear", align_corners=True), X2),
    **{f"torch.nn.{n}": (getattr(nn, n)(inplace=False), X1) for n in ("ReLU", "ReLU6", "SELU", "SiLU", "Mish")},
    **{f"torch.nn.{n}": (getattr(nn, n)(inplace=True), X1) for n in ("Hardswish", "Hardsigmoid")},
    **{f"torch.nn.{n}": (getattr(nn, n)(), X1) for n in ("Identity", "Sigmoid", "Tanh", "Softsign", "LogSigmoid")},
    **{f"torch.nn.{n}": (getattr(nn, n)(0.3), X1) for n in ("Dropout", "AlphaDropout", "FeatureAlphaDropout")},
}
for n, x in ((1, X1), (2, X2), (3, X3)):
    many = (2, 1, 2)[:n]
    kinds = {
        "Conv": ((4, 6, many), {"stride": 2, "padding": "valid" if n == 1 else 1, "groups": 2, "bias": n == 2}),
        "ConvTranspose": ((4, 6, many), {"stride": 2, "output_padding": 1, "groups": 2}),
        "MaxPool": ((list(many) if n > 1 else 2,), {"stride": 1, "ceil_mode": True}),
        "AvgPool": ((2,), {"padding": 1, "count_include_pad": False, **({"divisor_override": 3} if n > 1 else {})}),
        "AdaptiveAvgPool": (((2, 3, None)[:n],), {}),
        "AdaptiveMaxPool": ((2,), {"return_indices": n == 2}),
        "LPPool": ((2.0, 2), {"ceil_mode": True}),
        "Dropout": ((0.25,), {}),
        "BatchNorm": ((4,), {"eps": 1e-3, "momentum": None, "affine": n != 2, "track_running_stats": n != 3}),
        "InstanceNorm": ((4,), {"affine": n == 1, "track_running_stats": n == 2}),
        "ZeroPad": ((tuple(range(2 * n)),), {}),
    }
    EXAMPLES |= {f"torch.nn.{k}{n}d": (getattr(nn, f"{k}{n}d")(*a, **kw), x) for k, (a, kw) in kinds.items()}


def test_every_class_of_the_table_has_an_example():
    assert set(EXAMPLES) == set(CLASSES)


def leaves(output):
    """The tensors of an output, in tuples in any nesting."""
    return [tensor for part in output for tensor in leaves(part)] if isinstance(output, tuple) else [output]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_comes_back(name, tmp_path):
    net, shape = EXAMPLES[name]
    loaded = round_trip(net, tmp_path)
    outputs = []
    for module in (net, loaded):
        torch.manual_seed(3)
        output = module(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        outputs.append(list(map(bits, leaves(output))))
    assert outputs[0] == outputs[1]
    tt.reset_states(net)


# ---- whole networks --------------------------------------------------------------------------------------------------


def random_network(seed):
    """A network of one to three blocks on [B, 2, 8, 8], with inputs strong enough for spikes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    resets = [("none", "next_step_after_decay"), ("subtract", "same_step_residual"), ("value", "same_step_residual")]
    resets += [("subtract", "next_step_after_decay"), ("value", "next_step_before_decay")]

    def neuron(n):
        beta, threshold = rng.uniform(0.5, 0.99), rng.uniform(0.1, 0.4, (n, 1, 1) if rng.random() < 0.5 else ())
        reset, timing = resets[rng.integers(len(resets))]
        lif_reset = str(rng.choice(["subtract", "none", "add_value", "value"]))
        choices = (
            leaky_spec(beta, threshold, reset, timing),
            lif_spec(
                rng.uniform(2, 9), threshold, str(rng.choice(["single", "multiple", "limited"])), lif_reset, "one"
            ),
            lif_spec(5.0, threshold, clamp=True),
        )
        return tt.snn.SpecNeuron(choices[rng.integers(len(choices))])

    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 0.3)
    pools = (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4), nn.Upsample((4, 4)))
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm, neuron(4), pools[rng.integers(len(pools))])
    bias = float(rng.uniform(0.0, 0.3))
    lib = tt.snn.LIB(5, 0.8, 0.2, bias, quant_fn=tt.functional.round_ste(), learn_threshold=bool(rng.random() < 0.5))
    head = (nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 5), lib, nn.Linear(5, 3), tt.snn.LI(3, 0.9))
    return tt.Sequential(body, *head).eval() if rng.random() < 0.5 else nn.Sequential(body, nn.Sequential(*head)).eval()


@pytest.mark.parametrize("seed", range(12))
def test_a_random_network_computes_the_same(seed, tmp_path):
    net = random_network(seed)
    xs = 2 * torch.rand(20, 3, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    loaded = round_trip(net, tmp_path)
    traces = []
    for module in (net, loaded):
        spikes = {}
        for path, layer in module.named_modules():
            if isinstance(layer, (tt.snn.SpecNeuron, tt.snn.LIB)):
                spikes[path] = []
                layer.register_forward_hook(lambda _m, _i, output, kept=spikes[path]: kept.append(output.detach()))
        output = tt.unroll(module, xs)
        output.sum().backward()
        states = tt.save_states(module)
        assert len(spikes) == 2
        for steps in spikes.values():
            assert len(steps) == 20
            assert any(bool(step.any()) for step in steps), "no spike: nothing is proved"
        gradients = [bits(p.grad) for p in module.parameters() if p.grad is not None]
        assert gradients
        flat = [bits(state) for layer in states.values() for state in layer.values()]
        traces.append((bits(output), [bits(s) for steps in spikes.values() for s in steps], flat, gradients))
    assert traces[0] == traces[1]


def test_present_values_of_a_trained_spec_are_saved(tmp_path):
    layer = tt.snn.SpecNeuron(leaky_spec(0.9, 0.3))
    before = layer.spec
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    layer.unroll(torch.rand(5, 2, 3)).sum().backward()
    optimizer.step()
    loaded = round_trip(layer, tmp_path)
    assert loaded.spec == layer.spec
    assert loaded.spec != before


def test_states_are_not_saved(tmp_path):
    net = tt.Sequential(tt.snn.LI(3))
    net(torch.ones(2, 3))
    loaded = round_trip(net, tmp_path)
    assert loaded[0].mem is None
    assert loaded(torch.ones(5, 3)).shape == (5, 3)


def test_flags_dtypes_and_odd_bits_come_back(tmp_path):
    net = tt.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).half(), nn.Linear(2, 2).bfloat16())
    net.append(tt.snn.SpecNeuron(leaky_spec()).bfloat16())
    net.append(nn.BatchNorm1d(2).eval())
    net[0].weight.requires_grad_(False)
    net[4].threshold.requires_grad_(False)
    odd = torch.tensor(
        [0x7F800001, -0x3FFFFF, -(2**31), 1], dtype=torch.int32
    )  # signalling and quiet NaN, -0.0, denormal
    net[0].weight.data = odd.view(torch.float32).reshape(2, 2).clone()
    net[3].bias.data = torch.tensor([0x7F81, -0x8000], dtype=torch.int16).view(torch.bfloat16)
    loaded = round_trip(net, tmp_path)
    assert loaded[0].weight.view(torch.int32).flatten().tolist() == odd.tolist()
    assert [m.training for m in loaded] == [True] * 5 + [False]


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "bool"])
def test_integers_and_bools_come_back(dtype, tmp_path):
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.tensor([[0, 1, 1], [1, 0, 100]]).to(getattr(torch, dtype)), requires_grad=False)
    assert round_trip(layer, tmp_path).weight.dtype == getattr(torch, dtype)


def test_sharing_comes_back(tmp_path):
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.Sequential(shared, nn.Tanh()), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    net[2].weight = shared.weight
    net[4].running_mean = net[3].running_mean
    loaded = round_trip(net, tmp_path)
    assert loaded[0] is loaded[1][0]
    assert loaded[2].weight is loaded[0].weight
    assert loaded[2].bias is not loaded[0].bias
    assert loaded[4].running_mean is loaded[3].running_mean
    with zipfile.ZipFile(tmp_path / "net.tt") as archive:
        assert len(archive.namelist()) == 1 + len({id(t) for t in (*net.parameters(), *net.buffers())})


@pytest.mark.parametrize(
    ("weight", "strides"),
    [(torch.rand(3, 2).T, (1, 2)), (torch.rand(1, 2).expand(2, 2), (2, 1)), (torch.rand(2, 6)[:, ::2], (3, 1))],
)
def test_the_order_in_memory_comes_back(weight, strides, tmp_path):
    """Results can depend on it. What overlaps or has gaps comes back contiguous."""
    layer = nn.Linear(*weight.shape[::-1])
    layer.weight = nn.Parameter(weight)
    tt.save(tmp_path / "net.tt", layer)
    loaded = tt.load(tmp_path / "net.tt")
    assert loaded.weight.stride() == strides
    assert torch.equal(loaded.weight, layer.weight)
    round_trip(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), tmp_path)


def test_odd_arguments_and_empty_tensors(tmp_path):
    assert round_trip(nn.Linear(np.int64(2), 3), tmp_path).in_features == 2
    layer = nn.Linear(1, 3)
    layer.in_features, layer.weight = 0, nn.Parameter(torch.empty(3, 0))
    assert round_trip(layer, tmp_path).weight.shape == (3, 0)


def test_load_leaves_the_random_state_alone(tmp_path):
    tt.save(tmp_path / "net.tt", random_network(0))
    state = torch.get_rng_state()
    tt.load(os.fspath(tmp_path / "net.tt"))
    assert torch.equal(state, torch.get_rng_state())


def test_a_removed_hook_and_compile_do_not_hinder(tmp_path):
    net = nn.Sequential(nn.Tanh())
    net.register_full_backward_hook(lambda *args: None).remove()
    net.compile(backend="eager")
    tt.save(tmp_path / "net.tt", net)
    assert type(tt.load(tmp_path / "net.tt")) is nn.Sequential


# ---- the file --------------------------------------------------------------------------------------------------------


def golden_network():
    net = tt.Sequential(nn.Linear(2, 3), tt.snn.SpecNeuron(leaky_spec([0.5, 0.75, 0.875])), nn.Linear(3, 3, bias=False))
    net.append(tt.snn.LIB(3, quant_fn=tt.functional.round_ste())).append(tt.snn.LI(3, beta_rank=0)).append(net[0])
    for i, tensor in enumerate(net.parameters()):  # without exp and log, whose last bit depends on the machine
        tensor.data = (torch.arange(tensor.numel(), dtype=tensor.dtype).reshape(tensor.shape) - 1 - i) / 8
    net[2].bfloat16().eval()
    net[0].bias.requires_grad_(False)
    return net


def test_golden_bytes(tmp_path):
    """A file of version 1 loads for ever, and is still written byte for byte. (Made once, by `tt.save`.)"""
    tt.save(tmp_path / "net.tt", golden_network())
    assert (tmp_path / "net.tt").read_bytes() == GOLDEN.read_bytes()
    assert described(tt.load(GOLDEN)) == described(golden_network())


def test_numpy_reads_the_arrays(tmp_path):
    net = golden_network()
    tt.save(tmp_path / "net.tt", net)
    with np.load(tmp_path / "net.tt", allow_pickle=False) as archive:
        topology = json.loads(archive["network.json"])
        number = topology["modules"][topology["modules"][-1]["children"][0][1]]["tensors"]["weight"]
        assert archive[f"tensor_{number}"].dtype == np.float32
        assert (archive[f"tensor_{number}"] == net[0].weight.detach().numpy()).all()
    with zipfile.ZipFile(tmp_path / "net.tt") as archive:
        assert all(i.compress_type == 0 and i.date_time == (1980, 1, 1, 0, 0, 0) for i in archive.infolist())


def test_no_framework_is_needed(tmp_path):
    net, x = tt.Sequential(nn.Linear(4, 4), tt.snn.SpecNeuron(leaky_spec(threshold=0.1))), torch.rand(20, 2, 4)
    tt.save(tmp_path / "net.tt", net)
    torch.save({"x": x}, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "for name in ('snntorch', 'sinabs', 'samna', 'norse', 'spikingjelly', 'nir'): sys.modules[name] = None\n"
        "import tracetorch as tt\n"
        "y = tt.unroll(tt.load(sys.argv[1]), torch.load(sys.argv[2])['x'])\n"
        "torch.save(y.detach(), sys.argv[3])"
    )
    paths = [os.fspath(tmp_path / name) for name in ("net.tt", "x.pt", "y.pt")]
    root = os.fspath(pathlib.Path(tt.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, *paths], check=True, env={**os.environ, "PYTHONPATH": root})
    y = tt.unroll(net, x).detach()
    assert y.any()
    assert bits(torch.load(tmp_path / "y.pt")) == bits(y)
