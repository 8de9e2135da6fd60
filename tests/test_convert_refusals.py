"""What `adapters.convert` refuses, and that it says which layer, which field, which value, and what would help."""

import subprocess
import sys

import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from torch import nn

from tracetorch import adapters

T, B = 60, 5


def leaky(**options):
    return snn.Leaky(**{"beta": 0.9, "init_hidden": True, **options})


def lif(**options):
    return sl.LIF(**{"tau_mem": 5.0, "spike_threshold": torch.tensor(1.0), "norm_input": False, **options})


def linear(inputs=8, outputs=8):
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)))
    return layer


def sample(*shape):
    return torch.rand(shape or (T, B, 8), generator=torch.Generator().manual_seed(1)) * 2


def refused(net, to="tracetorch", x=None, **options):
    if x is None:
        x = sample()
    options = {"time_dim": 0, **options}
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.convert(net, to=to, sample=x, **options)
    error = caught.value
    assert error.layer
    assert error.field
    assert len(error.remedy) > 3
    assert error.field in str(error)
    assert f"Remedy: {error.remedy}" in str(error)
    return error


# ---- what the target cannot express ----------------------------------------------------------------------------------


def test_snntorchs_residual_reset_to_sinabs():
    net = nn.Sequential(linear(), leaky(reset_delay=False))
    error = refused(net, "sinabs")
    assert (error.layer, error.field, error.value) == ("'1'", "reset_timing", "same_step_residual")
    assert "reset_delay=True" in error.remedy
    assert "allow_approximate=True" in error.remedy
    assert adapters.convert(net, to="tracetorch", sample=sample(), time_dim=0).agreement.ok


@pytest.mark.parametrize("stock", [False, True])
def test_allow_approximate_says_what_is_lost_and_measures_it(stock):
    net = nn.Sequential(linear(), leaky(reset_delay=False), linear(), leaky())
    result = adapters.convert(net, to="sinabs", sample=sample(), time_dim=0, allow_approximate=True, stock=stock)
    first, second = result.report[1], result.report[3]
    assert (first.forward, first.gradient) == ("approximate", "differs")
    assert "reset_timing: 'same_step_residual' is lost" in first.reason
    assert first.spike_mismatches > 0
    assert first.unexplained_mismatches + first.state_violations > 0
    assert f"{first.unexplained_mismatches} spikes and {first.state_violations} states outside" in first.reason
    assert first.first_violation is not None
    assert second.forward == "rounding", "judged on what it received"
    assert result.agreement.spike_mismatches >= first.spike_mismatches
    assert result.agreement.unexplained_mismatches == first.unexplained_mismatches
    assert not result.agreement.ok
    assert "DO NOT AGREE" in str(result.agreement)


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_input": True}, {"min_v_mem": -0.1}, {"reset_fn": activation.MembraneReset(0.1)}, {"tau_mem": 1.5}],
    ids=str,
)
def test_allow_approximate_gives_the_nearest_stock_layer_and_measures_it(options):
    net, x = nn.Sequential(linear(), lif(**options)), sample(B, T, 8) * 4 - 1
    result = adapters.convert(net, to="snntorch", sample=x, stock=True, allow_approximate=True)
    assert type(result.model[1]) is snn.Leaky
    row = result.report[1]
    assert (row.forward, row.gradient) == ("approximate", "differs")
    assert "is lost" in row.reason
    assert row.unexplained_mismatches + row.state_violations > 0
    assert not result.agreement.ok


def test_require_gradients_with_stock_parts():
    net = nn.Sequential(linear(), leaky())
    error = refused(net, "sinabs", stock=True, require_gradients=True)
    assert (error.layer, error.field, error.value) == ("'1'", "gradient", "differs")
    assert "the reset stays in the graph; the source detaches it" in str(error)
    assert "stock=False" in error.remedy
    assert adapters.convert(net, to="sinabs", sample=sample(), time_dim=0, require_gradients=True).agreement.ok


@pytest.mark.parametrize(
    ("options", "field"),
    [({"graded_spikes_factor": 0.5}, "spike_scale"), ({"beta": 0.0}, "mem_decay")],
)
def test_other_options_that_a_lif_has_not(options, field):
    error = refused(nn.Sequential(linear(), leaky(**options)), "sinabs")
    assert (error.layer, error.field) == ("'1'", field)


def test_a_synapse_to_snntorch():
    """A stock Synaptic adds its input after the decay; with stock=False a subclass of ours has sinabs's order."""
    net = nn.Sequential(linear(), lif(tau_syn=4.0))
    error = refused(net, "snntorch", sample(B, T, 8), time_dim=None, stock=True)
    assert (error.layer, error.field, error.value) == ("'1'", "synapse", "add_then_decay")
    assert error.remedy == "stock=False"


def test_stock_snntorch_for_what_only_sinabs_has():
    x = sample(B, T, 8)
    for options, field in (
        ({}, "spike_count"),
        ({"spike_fn": activation.SingleSpike}, "reset"),
        ({"spike_fn": activation.SingleSpike, "norm_input": True}, "input_gain"),
        ({"spike_fn": activation.SingleSpike, "min_v_mem": -1.0}, "clamp"),
    ):
        error = refused(nn.Sequential(linear(), lif(**options)), "snntorch", x, time_dim=None, stock=True)
        assert (error.layer, error.field) == ("'1'", field)
        assert "stock=False" in error.remedy


def test_the_membrane_of_a_reset_to_zero_is_lost_in_sinabs():
    net = nn.Sequential(linear(), leaky(reset_mechanism="zero", output=True))
    error = refused(net, "sinabs")
    assert (error.layer, error.field, error.value) == ("'1'", "output", True)
    assert adapters.convert(net, to="tracetorch", sample=sample(), time_dim=0).agreement.ok


@pytest.mark.parametrize("decay", [1.3, -0.2])
def test_a_decay_outside_0_to_1_to_snntorch(decay):
    layer = lif(train_alphas=True, spike_fn=activation.SingleSpike, reset_fn=activation.MembraneReset())
    with torch.no_grad():
        layer.alpha_mem.fill_(decay)
    error = refused(nn.Sequential(linear(), layer), "snntorch", sample(B, T, 8), time_dim=None)
    assert (error.layer, error.field) == ("'1'", "mem_decay")
    assert "clamps beta to [0, 1]" in str(error)


# ---- which framework -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch", "", "Sinabs", "lava"])
def test_an_unknown_framework(name):
    with pytest.raises(ValueError, match="is not known; known: tracetorch, snntorch, sinabs") as caught:
        adapters.convert(nn.Sequential(linear(), leaky()), to=name, sample=sample(), time_dim=0)
    assert repr(name) in str(caught.value)
    with pytest.raises(ValueError, match="is not known"):
        adapters.build(adapters.spec(leaky()), name)


@pytest.mark.parametrize("name", ["nir"])
def test_a_planned_framework(name):
    with pytest.raises(ValueError, match=f"{name}.*has no adapter in this version"):
        adapters.convert(nn.Sequential(linear(), leaky()), to=name, sample=sample(), time_dim=0)


CHILD = """
import sys
sys.modules["samna"] = None
sys.modules[{missing!r}] = None
import torch
from torch import nn
import tracetorch as tt
from tracetorch import adapters
if {missing!r} == "sinabs":
    import snntorch
    neuron, options = snntorch.Leaky(0.9, init_hidden=True), dict(time_dim=0)
else:
    import sinabs.layers
    neuron, options = sinabs.layers.LIF(5.0), dict()
net, x = nn.Sequential(nn.Linear(3, 3), neuron), torch.rand(4, 2, 3)
assert adapters.convert(net, to="tracetorch", sample=x, **options).agreement.ok
for call in (lambda: adapters.convert(net, to={missing!r}, sample=x, **options),
             lambda: adapters.build(adapters.spec(neuron), {missing!r})):
    try:
        call()
    except ImportError as error:
        assert "{missing} is not installed" in str(error), error
        assert "pip install -e '.[{missing}]'" in str(error), error
    else:
        raise SystemExit("no error")
"""


@pytest.mark.parametrize("missing", ["sinabs", "snntorch"])
def test_a_framework_that_is_not_installed(missing):
    code = CHILD.format(missing=missing)
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


# ---- which networks --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A network with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(linear(), leaky())

    def forward(self, x):
        return self.layers(x)


class OwnSequential(nn.Sequential):
    """May override forward."""


class Noise(nn.Module):
    """Unknown."""

    def forward(self, x):
        return x + torch.rand_like(x)


class OwnLinear(nn.Linear):
    """A subclass may compute anything."""


def test_a_network_with_a_forward_of_its_own_is_recorded():
    for net in (Net(), OwnSequential(linear(), leaky())):
        assert adapters.convert(net, to="tracetorch", sample=sample(), time_dim=0).agreement.ok


@pytest.mark.parametrize("module", [Noise(), nn.RNN(8, 8)])
def test_an_unknown_module(module):
    error = refused(nn.Sequential(linear(), nn.Sequential(module), leaky()))
    assert (error.layer, error.field) == ("'1.0'", "module")
    assert type(module).__name__ in error.value
    assert "Linear" in error.remedy


@pytest.mark.parametrize("module", [OwnLinear(8, 8), nn.Softmax(-1), OwnSequential(linear())])
def test_a_module_that_is_not_known_but_can_be_recorded(module):
    net = nn.Sequential(linear(), nn.Sequential(module), leaky())
    assert adapters.convert(net, to="tracetorch", sample=sample() * 4, time_dim=0).agreement.ok


def test_no_neuron_and_neurons_of_two_frameworks():
    error = refused(nn.Sequential(linear(), nn.ReLU()))
    assert (error.field, error.value) == ("framework", [])
    error = refused(nn.Sequential(linear(), leaky(), lif()))
    assert (error.field, error.value) == ("framework", ["sinabs", "snntorch"])
    assert "exactly one framework" in str(error)


@pytest.mark.parametrize("nested", [False, True])
def test_a_neuron_used_twice(nested):
    neuron = leaky()
    net = nn.Sequential(linear(), neuron, linear(), nn.Sequential(neuron) if nested else neuron)
    result = adapters.convert(net, to="sinabs", sample=sample(), time_dim=0)  # others: tests/test_networks_shared.py
    assert result.stepped
    assert result.agreement.ok
    assert "neuron used twice" in result.report.remarks[0]


@pytest.mark.parametrize("options", [{"init_hidden": False}, {"output": True}, {"output": 1}])
def test_a_tuple_in_the_middle(options):
    error = refused(nn.Sequential(linear(), leaky(**options), linear(), leaky()))
    assert error.layer == "'1'"
    assert error.field == next(iter(options))
    assert "init_hidden=True and output=False" in error.remedy
    error = refused(nn.Sequential(linear(), leaky(**options), nn.ReLU()))
    assert error.layer == "'1'"


def hook(place, kind):
    net = nn.Sequential(linear(), nn.Sequential(leaky()), sl.Repeat(nn.ReLU()))
    net = nn.Sequential(*list(net)[:2])
    module = {"network": net, "container": net[1], "neuron": net[1][0], "linear": net[0]}[place]
    if kind == "forward":
        module.register_forward_hook(lambda m, i, o: o * 1.0)
    elif kind == "forward pre":
        module.register_forward_pre_hook(lambda m, i: None)
    elif kind == "backward":
        module.register_full_backward_hook(lambda m, gi, go: tuple(g * 2 if g is not None else g for g in gi))
    elif kind == "backward pre":
        module.register_full_backward_pre_hook(lambda m, go: tuple(g * 2 for g in go))
    return net


@pytest.mark.parametrize("kind", ["forward", "forward pre"])
@pytest.mark.parametrize("place", ["network", "container", "neuron", "linear"])
def test_a_hook(place, kind):
    error = refused(hook(place, kind))
    assert error.field == "hooks"
    assert error.remedy == "remove it"
    assert error.layer == {"network": "''", "container": "'1'", "neuron": "'1.0'", "linear": "'0'"}[place]


@pytest.mark.parametrize("kind", ["backward", "backward pre"])
def test_a_backward_hook_on_a_neuron_is_no_silent_difference(kind):
    """It would change the source's gradients and not the target's."""
    error = refused(hook("neuron", kind))
    assert (error.layer, error.field, error.remedy) == ("'1.0'", "hooks", "remove it")


def test_a_gradient_hook_on_a_neurons_parameter_is_no_silent_difference():
    net = nn.Sequential(linear(), leaky(learn_beta=True))
    net[1].beta.register_hook(lambda gradient: gradient * 2)
    error = refused(net)
    assert (error.layer, error.field, error.remedy) == ("'1'", "hooks", "remove it")


def test_a_forward_of_its_own_on_the_network_or_a_layer():
    net = nn.Sequential(linear(), leaky())
    net.forward = lambda x: net[1](net[0](x) * 1.5)
    assert refused(net).field == "forward"
    net = nn.Sequential(linear(), leaky())
    old = net[1].forward
    net[1].forward = lambda x: old(x * 1.5)
    error = refused(net)
    assert error.layer == "'1'"
    assert "the source itself departs from its spec" in str(error)


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.BatchNorm1d(8)], ids=lambda m: type(m).__name__)
def test_a_module_in_training_mode_is_judged_in_evaluation_mode_and_said_to_be(module):
    net, x = nn.Sequential(linear(), module, leaky()), sample() * 3
    result = adapters.convert(net, to="tracetorch", sample=x, time_dim=0)
    assert result.agreement.ok
    assert "judged in evaluation mode" in result.report[1].reason
    assert module.training
    assert result.model[1].training
    outputs = []
    for model in (net, result.model):
        torch.manual_seed(3)
        outputs.append(torch.stack([model(step) for step in x]))
        net[2].mem = torch.zeros(0)
        result.reset()
    assert torch.equal(*outputs), "the same masks under the same seed, and the same statistics"
    assert "judged" not in adapters.convert(net.eval(), to="tracetorch", sample=x, time_dim=0).report[1].reason


def test_sinabs_modules_that_would_mix_time():
    for module in (nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.BatchNorm2d(2)):
        error = refused(nn.Sequential(module.eval(), lif()), "snntorch", sample(B, T, 2, 8, 8), time_dim=None)
        assert (error.layer, error.value) == ("'0'", type(module).__name__)
        assert "Repeat" in error.remedy


# ---- which samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda x: x.int(), lambda x: x > 0.5, lambda x: x.half(), lambda x: x.bfloat16()])
def test_a_sample_of_another_dtype(make):
    error = refused(nn.Sequential(linear(), leaky()), x=make(sample()))
    assert error.field == "sample"
    assert "float32 or float64" in str(error)


def test_a_sample_that_is_no_tensor():
    assert refused(nn.Sequential(linear(), leaky()), x=[[1.0]]).value == "list"
    assert refused(nn.Sequential(linear(), leaky()), x=sample().numpy()).value == "ndarray"


@pytest.mark.parametrize("shape", [(0, B, 8), (T, 0, 8)])
def test_an_empty_sample(shape):
    error = refused(nn.Sequential(linear(), leaky()), x=torch.zeros(shape))
    assert error.field == "sample"
    assert "proves nothing" in str(error)


@pytest.mark.parametrize("to", ["tracetorch", "sinabs", "snntorch"])
@pytest.mark.parametrize("width", [8, T])
def test_a_sample_without_a_batch_is_refused(to, width):
    """snnTorch takes [T, features] as well; [B, T, ...] of sinabs has no such thing."""
    error = refused(nn.Sequential(linear(width, width), leaky()), x=sample(T, width), to=to)
    assert (error.field, error.value) == ("sample", [T, width])
    assert error.remedy == "x.unsqueeze(1)"


@pytest.mark.parametrize("time_dim", [5, -4])
def test_a_time_dim_out_of_range(time_dim):
    error = refused(nn.Sequential(linear(), leaky()), time_dim=time_dim)
    assert (error.field, error.value) == ("time_dim", time_dim)


def test_a_time_dim_that_sinabs_has_not():
    error = refused(nn.Sequential(linear(), lif()), x=sample(B, T, 8), time_dim=0)
    assert (error.field, error.value) == ("time_dim", 0)
    assert "sinabs takes [B, T, ...]" in str(error)


def test_parameters_in_another_precision_than_the_sample():
    """torch promotes: a float64 beta for each neuron makes the membrane float64 under a float32 input."""
    net = nn.Sequential(linear(), leaky(beta=torch.linspace(0.5, 0.9, 8, dtype=torch.float64)))
    assert refused(net).layer == "'1'"


def test_a_shape_that_the_network_does_not_take_is_its_own_error():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        adapters.convert(nn.Sequential(linear(), leaky()), to="sinabs", sample=sample(T, B, 9), time_dim=0)


@pytest.mark.parametrize(("to", "held_at_1"), [("sinabs", "alpha_mem_calculated"), ("snntorch", "beta")])
def test_a_membrane_that_does_not_decay_has_a_decay_of_1(to, held_at_1):
    spec = adapters.spec(snn.Leaky(0.9, init_hidden=True))
    held = spec.replace(
        decay="none",
        parameters={name: p for name, p in spec.parameters.items() if name != "mem_decay"},
    )
    layer = adapters.build(held, to)
    assert getattr(layer, held_at_1) == 1
    assert not getattr(layer, held_at_1).requires_grad
