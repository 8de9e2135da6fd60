"""Layers of other frameworks as one of the 32: the table of docs/choosing-a-layer.md is what is measured."""

import re
from pathlib import Path

import pytest
import sinabs.layers as sl
import snntorch
import torch
from sinabs.activation import Gaussian, MaxSpike, MembraneReset, MembraneSubtract, SingleSpike
from torch import nn

import tracetorch as tt
from tracetorch import adapters, oracle
from tracetorch.adapters.registry import adapter_of
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional import surrogate_spike

PAGE = Path(__file__).parent.parent / "docs" / "choosing-a-layer.md"
ROW = re.compile(r"\| `(?P<code>[^`]+)` \| (?:no: `(?P<field>\w+)`|`(?P<name>\w+)`) \|")
ROWS = [match.groupdict() for match in map(ROW.match, PAGE.read_text(encoding="utf-8").splitlines()) if match]
NAMES = {
    "sl": sl,
    "snn": snntorch,
    **{cls.__name__: cls for cls in (Gaussian, MaxSpike, MembraneReset, MembraneSubtract, SingleSpike)},
}


def made(code):
    return eval(code, dict(NAMES))


def stimulus():
    return torch.randn(60, 3, 8, generator=torch.Generator().manual_seed(0)) + 0.3


def test_the_table_has_every_class():
    assert len(ROWS) == 24
    classes = {row["code"].split("(")[0] for row in ROWS}
    wanted = {"sl.ExpLeak", "sl.LIF", "sl.IAF", "sl.ALIF"}
    wanted |= {"snn.Leaky", "snn.Synaptic", "snn.Alpha", "snn.Lapicque", "snn.StateLeaky"}
    assert classes == wanted
    assert {row["name"] for row in ROWS if row["name"]} == {"LI", "LIEMA", "LIB"}


@pytest.mark.parametrize("row", [row for row in ROWS if row["field"]], ids=lambda row: row["code"])
def test_what_none_of_the_32_computes_is_refused(row):
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(adapters.spec(made(row["code"])), "tracetorch", stock=True)
    assert caught.value.field == row["field"]
    assert "SpecNeuron" in caught.value.remedy
    if row["field"] == "synapse" and "Alpha" not in row["code"]:
        assert "a factor for the weights before it" in str(caught.value)


@pytest.mark.parametrize("row", [row for row in ROWS if row["name"]], ids=lambda row: row["code"])
def test_what_one_of_the_32_computes_becomes_it(row):
    layer, xs = made(row["code"]), stimulus()
    spec = adapters.spec(layer)
    built = adapters.build(spec, "tracetorch", stock=True)
    assert type(built) is getattr(tt.snn, row["name"])
    x = xs.clone().requires_grad_()
    own = adapter_of(built)
    outputs, states = own.trace(built, x)
    arrays = {name: state.detach().numpy() for name, state in states.items()}
    seen = oracle.Recording(xs.numpy(), outputs.detach().numpy(), arrays, own.spec(built))
    judged = oracle.judge(spec, seen)
    assert judged.ok
    assert judged.spikes > 100 or spec.output == "membrane"
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(outputs, x, weights)
    assert oracle.gradient_error(gradient.numpy(), oracle.gradients(spec, seen, weights.numpy())["x"]) < 1e-5
    again = adapters.spec(built)
    assert again.differences(spec).keys() <= {"threshold_gradient", "dt", "time_unit"}


def test_the_current_of_a_synapse_is_a_factor_of_theirs():
    """What the refusal says: with 1 / (1-alpha) in the weights before it, an SLI is a Synaptic that never fires."""
    alpha, beta, xs = 0.75, 0.5, stimulus()
    source = snntorch.Synaptic(alpha, beta, threshold=1e9, init_hidden=True, reset_mechanism="none")
    native = tt.snn.SLI(8, alpha=alpha, beta=beta)
    _, states = adapter_of(source).trace(source, xs)
    torch.testing.assert_close(native.unroll(xs / (1 - alpha)), states["v_mem"], rtol=1e-4, atol=1e-4)


def test_a_sinabs_network_becomes_one_of_named_layers():
    torch.manual_seed(0)
    lif = sl.LIF(torch.linspace(3.0, 9.0, 8), spike_fn=SingleSpike, norm_input=False)
    net = nn.Sequential(nn.Linear(4, 8), lif, nn.Linear(8, 2), sl.ExpLeak(5.0))
    xs = 3 * stimulus()[..., :4].transpose(0, 1)
    result = tt.convert(net, to="tracetorch", sample=xs, stock=True)
    assert [row.target for row in result.report if row.neuron] == ["tracetorch.LIB", "tracetorch.LI"]
    assert all(row.forward in ("exact", "rounding") for row in result.report)
    assert result.agreement.ok
    assert result.report[1].gradient == "reparametrised"


@pytest.mark.parametrize("surrogate", ["piecewise_quadratic", "erf", "tanh", "atan"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_surrogate_of_any_framework_is_read_and_rebuilt(surrogate, strict):
    layer = tt.snn.LIT(8, spike_fn=surrogate_spike(surrogate, strict=strict))
    spec = adapters.spec(layer)
    assert spec.comparison == (">" if strict else ">=")
    assert NeuronSpec.from_json(spec.to_json()) == spec
    built = adapters.build(spec, "tracetorch", stock=True)
    assert adapters.spec(built) == spec
    assert built.spike_fn.strict is strict
    xs = stimulus()
    assert torch.equal(built.unroll(xs), layer.unroll(xs))
    assert torch.equal(adapter_of(layer).trace(tt.snn.SpecNeuron(spec), xs)[0], adapter_of(layer).trace(layer, xs)[0])


def test_strict_decides_a_tie():
    values = {"beta": 0.5, "threshold": 1.0, "threshold_rank": 0, "beta_rank": 0}
    for strict, spikes in ((True, [0.0, 1.0]), (False, [1.0, 1.0])):
        layer = tt.snn.LIB(2, spike_fn=surrogate_spike("atan", strict=strict), **values)
        with torch.no_grad():
            layer.raw_threshold.copy_(tt.snn.LIB(1).raw_threshold[0])
        theta = layer.threshold.item()
        above = torch.nextafter(torch.tensor(theta), torch.tensor(2.0)).item()
        assert layer(torch.tensor([[theta, above]])).tolist() == [spikes]
    assert repr(surrogate_spike("atan", strict=False)).endswith("strict=False)")
