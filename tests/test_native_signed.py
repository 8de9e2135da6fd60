"""Spikes of two signs, LIT and LITS: in specs, in every framework that can compute them, and judged with both signs."""

import copy
import importlib
import importlib.util
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tracetorch import adapters, cli, oracle
from tracetorch.adapters.base import parameters
from tracetorch.adapters.registry import adapter, adapter_of
from tracetorch.core.forms import check_form
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional import round_ste, surrogate_spike
from tracetorch.functional.surrogates import Surrogate

T, B, N = 40, 3, 5
NAMES = ("LIT", "SLIT", "LITS", "SLITS")
FIRES = {
    "hard": {"quant_fn": round_ste()},
    "smooth": {},
    "atan": {"spike_fn": surrogate_spike("atan", alpha=3.0)},
}
RAWS = {
    "mem_decay": "sigmoid",
    "syn_decay": "sigmoid",
    "threshold": "softplus",
    "neg_threshold": "softplus",
    "bias": "value",
    "spike_scale": "value",
    "neg_scale": "value",
}


def made(name, fires="hard", **options):
    """A layer with a value of its own for every neuron and parameter."""
    layer = getattr(tt.snn, name)(N, **{**FIRES[fires], **options})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return layer


def stimulus(seed=1):
    return torch.randn(T, B, N, generator=torch.Generator().manual_seed(seed)) * 1.2


def traced(layer, xs):
    """Outputs, states, and the gradients of the input and of what is trained, by the spec's names."""
    xs, own = xs.clone().requires_grad_(), adapter_of(layer)
    outputs, states = own.trace(layer, xs)
    named = {name: tensor for name, tensor in parameters(own, layer).items() if tensor.requires_grad}
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((outputs * weights).sum(), [xs, *named.values()])
    return outputs.detach(), states, dict(zip(["x", *named], found, strict=True)), weights


def recording(xs, outputs, states, spec):
    arrays = {name: state.detach().numpy() for name, state in states.items()}
    return oracle.Recording(xs.numpy(), outputs.numpy(), arrays, spec)


# ---- the spec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fires", FIRES)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_read_and_rebuilt(name, fires):
    layer, xs = made(name, fires), stimulus()
    spec = adapters.spec(layer)
    assert spec.signed
    assert spec.form == "tracetorch.LIT"
    assert spec.spike_count == ("smooth" if fires == "smooth" else "single")
    wanted = {"mem_decay", "threshold", "neg_threshold", "bias"} | ({"syn_decay"} if name[0] == "S" else set())
    wanted |= {"spike_scale", "neg_scale"} if name.endswith("S") else set()
    assert {n: p.raw for n, p in spec.parameters.items()} == {n: RAWS[n] for n in wanted}
    assert NeuronSpec.from_json(spec.to_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    outputs, states, grads, _ = traced(layer, xs)
    if fires != "smooth":
        assert all(((outputs.sign() == sign).sum() > 30) for sign in (-1, 0, 1))
    for built in (tt.snn.SpecNeuron(spec), adapters.build(spec, "tracetorch", stock=True)):
        assert adapters.spec(built) == spec
        mine, own, own_grads, _ = traced(built, xs)
        assert torch.equal(mine, outputs)
        assert all(torch.equal(own[n], states[n]) for n in states)
        assert torch.equal(own_grads["x"], grads["x"])
        for parameter in grads:
            torch.testing.assert_close(own_grads[parameter], grads[parameter], rtol=1e-4, atol=1e-4)
    assert type(built) is type(layer)


def test_the_kernel_of_a_spec_has_its_bits():
    """In float64 too, with the states and the gradients."""
    for dtype in (torch.float32, torch.float64):
        layer, xs = tt.snn.SpecNeuron(adapters.spec(made("SLITS", "atan").to(dtype))), stimulus().to(dtype)
        results = []
        for backend in ("eager", "cpu"):
            layer.reset_states()
            x = xs.clone().requires_grad_()
            with tt.backend(backend):
                outputs = layer.unroll(x)
            grads = torch.autograd.grad(outputs.square().sum(), [x, *layer.parameters()])
            results.append((outputs, layer.v_mem, layer.i_syn, grads))
        (ys, v, i, grads), (zs, w, j, others) = results
        assert torch.equal(ys, zs)
        assert torch.equal(v, w)
        assert torch.equal(i, j)
        assert torch.equal(grads[0], others[0])
        for a, b in zip(grads, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def signed(raw=1.0, **changes):
    """A spec of plain numbers: decay 1/2, thresholds 1 and 3/4."""
    values = {"mem_decay": 0.5, "threshold": 1.0, "neg_threshold": 0.75, **changes.pop("values", {})}
    values = {n: tt.Parameter(np.float32(raw) * np.asarray(v, np.float32)) for n, v in values.items() if v is not None}
    return NeuronSpec(
        **{
            "form": "tracetorch.LIT",
            "comparison": ">",
            "surrogate": Surrogate("atan"),
            "parameters": values,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spike_count": "multiple", "comparison": ">="}, "'neg_threshold' has no part"),
        ({"reset": "value", "values": {"reset_value": 0.0}}, "'neg_threshold' has no part"),
        ({"reset_amount": "value", "values": {"reset_amount": 0.5}}, "'neg_threshold' has no part"),
        ({"values": {"adapt_decay": 0.5, "adapt_scale": 0.5}}, "'neg_threshold' has no part"),
        ({"values": {"neg_threshold": None, "neg_scale": 0.5}}, "'neg_scale' has no part"),
    ],
)
def test_choices_without_equations_for_two_signs_are_refused(changes, said):
    with pytest.raises(SpecError, match=said):
        signed(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"values": {"neg_threshold": None}}, "neg_threshold"),
        ({"surrogate": Surrogate("single_exponential")}, "one number"),
        ({"spike_count": "smooth"}, "logistic"),
        ({"reset_gradient": "detached"}, "reset_gradient"),
        ({"form": "sinabs.LIF"}, "neg_threshold"),
        ({"form": "tracetorch.LIB"}, "neg_threshold"),
    ],
)
def test_forms_without_two_signs_refuse_them(changes, said):
    with pytest.raises(SpecError, match=said):
        check_form(signed(**changes))


def test_old_files_have_no_second_sign():
    layer = tt.snn.LIB(N, quant_fn=round_ste())
    data = adapters.spec(layer).to_dict()
    assert "neg_threshold" not in data["parameters"]
    assert not NeuronSpec.from_dict(data).signed


# ---- exact ties ------------------------------------------------------------------------------------------------------

# u: what the membrane is before its reset; spikes where it is above 1, or below -3/4.
TIES = {1.0: 0.0, 1.125: 1.0, 0.875: 0.0, -0.75: 0.0, -0.875: -1.0, -0.625: 0.0}


@pytest.mark.parametrize("to", ["tracetorch", "sinabs", "snntorch", "spikingjelly", "norse"])
@pytest.mark.parametrize("surrogate", [Surrogate("atan"), Surrogate("logistic")], ids=str)
def test_an_exact_tie_at_either_threshold_is_no_spike(surrogate, to):
    spec, xs = signed(surrogate=surrogate), torch.tensor(list(TIES)).expand(1, 2, -1).contiguous()
    layer = adapters.build(spec, to)
    outputs, states = adapter_of(layer).trace(layer, xs)
    assert outputs[0, 0].tolist() == list(TIES.values())
    reset = {1.0: 1.0, -1.0: -0.75, 0.0: 0.0}
    assert states["v_mem"][0, 0].tolist() == [u - reset[s] for u, s in TIES.items()]
    seen = recording(xs, outputs.detach(), states, adapter_of(layer).spec(layer))
    judged = oracle.judge(spec, seen)
    assert judged.ok
    assert judged.mismatches == 0
    # At a tie there is no rounding to explain the other decision.
    for place, (u, s) in enumerate(TIES.items()):
        other = outputs.detach().clone()
        other[0, 0, place] = {0.0: 1.0 if u > 0 else -1.0}.get(s, 0.0)
        moved = {"v_mem": states["v_mem"].detach().clone()}
        moved["v_mem"][0, 0, place] = u - reset[other[0, 0, place].item()]
        judged = oracle.judge(spec, recording(xs, other, moved, adapter_of(layer).spec(layer)))
        assert (judged.unexplained, judged.state_violations) == (1, 0), u


def test_spikes_that_look_alike_are_told_by_the_membrane():
    """With scales 1 and -1 both spikes are 1; with a scale of 0 none is seen."""
    xs = stimulus()
    for scales in ({"spike_scale": 1.0, "neg_scale": -1.0}, {"spike_scale": 0.0, "neg_scale": 2.0}):
        spec = signed(values=scales)
        layer = tt.snn.SpecNeuron(spec)
        outputs, states = adapter("tracetorch").trace(layer, xs)
        seen = recording(xs, outputs, states, spec)
        assert len(np.unique(seen.outputs)) == 2
        judged = oracle.judge(spec, seen)
        assert judged.ok
        assert judged.spikes > 60
        plain, _ = adapter("tracetorch").trace(tt.snn.SpecNeuron(signed()), xs)
        assert judged.spikes == plain.abs().sum()


# ---- the judge -------------------------------------------------------------------------------------------------------


def two_signs(spec, xs, *, inclusive=False, swapped=False, whole=False, forgets=False):
    """A plain loop over time in float32, with faults on order; outputs and membranes, [T, B, N]."""
    p = {name: parameter.value for name, parameter in spec.parameters.items()}
    v, outputs, membranes = np.zeros_like(xs[0]), [], []
    for x in xs:
        u = p["mem_decay"] * v + x
        pos = u >= p["threshold"] if inclusive else u > p["threshold"]
        neg = u < -p["neg_threshold"]
        taken = (p["neg_threshold"], p["threshold"]) if swapped else (p["threshold"], p["neg_threshold"])
        v = u - pos * taken[0] + (0 if forgets else neg * taken[1])
        v = np.where(pos | neg, np.float32(0), u) if whole else v
        outputs.append((pos * np.float32(1) - neg * np.float32(1)).astype(np.float32))
        membranes.append(v.astype(np.float32))
    return np.stack(outputs), np.stack(membranes)


@pytest.mark.parametrize(
    ("faults", "ok"),
    [({}, True), *(({name: True}, False) for name in ("inclusive", "swapped", "whole", "forgets"))],
    ids=str,
)
def test_the_judge_finds_what_is_wrong(faults, ok):
    spec = signed()
    xs = np.random.default_rng(0).integers(-12, 13, (T, B, N)).astype(np.float32) / 8
    outputs, membranes = two_signs(spec, xs, **faults)
    assert {-1.0, 0.0, 1.0} == set(np.unique(outputs))
    judged = oracle.judge(spec, oracle.Recording(xs, outputs, {"v_mem": membranes}, spec))
    assert judged.ok is ok
    assert judged.spikes == np.abs(outputs).sum() or not ok


@pytest.mark.parametrize("fires", FIRES)
@pytest.mark.parametrize("name", ["SLIT", "LITS"])
def test_gradients_are_those_of_the_equations(name, fires):
    layer, xs = made(name, fires), stimulus()
    outputs, states, grads, weights = traced(layer, xs)
    spec = adapters.spec(layer)
    truth = oracle.gradients(spec, recording(xs, outputs, states, spec), weights.numpy())
    assert truth.keys() == grads.keys() == {"x", *spec.parameters}
    for parameter, gradient in grads.items():
        assert oracle.gradient_error(gradient.numpy(), truth[parameter]) < 1e-5, parameter
    other = spec.replace(surrogate=Surrogate("sigmoid", {"slope": 3.0})) if fires != "smooth" else None
    if other is not None:
        wrong = oracle.gradients(other, recording(xs, outputs, states, spec), weights.numpy())
        assert oracle.gradient_error(grads["neg_threshold"].numpy(), wrong["neg_threshold"]) > 1e-3


def test_the_smooth_gradient_is_a_derivative():
    """Central differences of the float64 layer along a random direction of everything."""
    layer = made("SLITS", "smooth").double()
    xs = stimulus()[:12].double()
    outputs, states, _, _ = traced(layer, xs)
    spec = adapters.spec(layer)
    weights = np.random.default_rng(3).normal(size=xs.shape)
    truth = oracle.gradients(spec, recording(xs, outputs, states, spec), weights)
    rng = np.random.default_rng(4)
    for name, parameter in spec.parameters.items():
        direction, ends = rng.normal(size=parameter.value.shape), []
        for sign in (1e-6, -1e-6):
            moved = tt.Parameter(parameter.value + sign * direction, True, parameter.raw)
            other = tt.snn.SpecNeuron(spec.replace(parameters={**spec.parameters, name: moved}))
            ends.append(float((other.unroll(xs).detach().numpy() * weights).sum()))
        expected = (ends[0] - ends[1]) / 2e-6
        assert float((truth[name] * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reset_gradient": "detached"}, "reset_gradient='detached'"),
        ({"input_gain": "one_minus_decay"}, "input_gain='one_minus_decay'"),
        ({"values": {"leak": 0.5}}, "leak"),
    ],
)
def test_the_oracle_names_what_it_has_no_equations_for(changes, said):
    spec = signed(**changes)
    xs = stimulus().numpy()
    with pytest.raises(oracle.OracleError, match=said):
        oracle.judge(spec, oracle.Recording(xs, np.zeros_like(xs), {"v_mem": np.zeros_like(xs)}, spec))
    with pytest.raises(oracle.OracleError, match="neg_threshold"):
        oracle.equations(spec)


# ---- other frameworks ------------------------------------------------------------------------------------------------


INTO = [*((name, "hard") for name in (*NAMES, "LIB", "SLIB")), ("SLITS", "atan")]


@pytest.mark.parametrize(("name", "fires"), INTO)
@pytest.mark.parametrize("to", ["sinabs", "snntorch"])
def test_a_network_into_other_frameworks(to, name, fires):
    torch.manual_seed(0)
    source, xs = nn.Sequential(nn.Linear(4, N), made(name, fires)), 2 * stimulus()[..., :4]
    result = tt.convert(source, to=to, sample=xs, time_dim=0)
    row = result.report[1]
    assert (row.forward, row.gradient) in (("exact", "exact"), ("exact", "rounding"))
    assert row.gradient_error < 1e-5
    assert row.spike_mismatches == row.unexplained_mismatches == row.state_violations == 0
    outputs = result.run(xs)
    tt.reset_states(source)
    assert torch.equal(outputs, torch.stack([source(x) for x in xs]))
    assert set(outputs.sign().unique().tolist()) == ({0.0, 1.0} if "LIB" in name else {-1.0, 0.0, 1.0})
    # The raw numbers are the source's, and train as they do.
    layer = result.model[1]
    for own, raw in parameters(adapter(to), layer).items():
        theirs = parameters(adapter("tracetorch"), source[1])[own]
        assert torch.equal(raw, theirs)
        assert raw.requires_grad == theirs.requires_grad
    outputs.square().mean().backward()
    torch.optim.SGD(result.model.parameters(), 0.1).step()
    assert result.verify(xs, carry_back=True).ok
    trained = result.run(xs)
    adapter(to).reset(layer)  # a state on a graph is copied by no framework
    for twin in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        assert torch.equal(_again(twin, xs, to), trained)


def _again(model, xs, to):
    own = adapter(to)
    own.reset(model[1])
    if to == "sinabs":
        return model(xs.transpose(0, 1)).transpose(0, 1)
    return torch.stack([model(x) for x in xs])


@pytest.mark.parametrize("to", ["spikingjelly", "norse", "sinabs", "snntorch"])
@pytest.mark.parametrize("name", ["LIT", "SLITS"])
def test_a_layer_of_ours_and_back(to, name):
    layer, xs = made(name), stimulus()
    spec = adapters.spec(layer)
    built = adapters.build(spec, to)
    outputs, states, grads, weights = traced(built, xs)
    expected = adapter("tracetorch").trace(layer, xs)[0]
    assert torch.equal(outputs, expected)
    own = adapter_of(built).spec(built)
    seen = recording(xs, outputs, states, own)
    assert oracle.judge(spec, seen).ok
    truth = oracle.gradients(own, seen, weights.numpy())
    assert all(oracle.gradient_error(g.numpy(), truth[n]) < 1e-5 for n, g in grads.items())
    back = adapters.build(own, "tracetorch", stock=True)
    assert type(back) is type(layer)
    assert torch.equal(adapter("tracetorch").trace(back, xs)[0], expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("to", ["sinabs", "snntorch", "spikingjelly", "norse"])
def test_stock_parts_fire_one_sign(to, name):
    spec = adapters.spec(made(name, bias=0.0, learn_bias=False))
    assert "bias" in spec.parameters
    with pytest.raises(adapters.ConversionError, match=r"one sign|synapse") as caught:
        adapters.build(spec, to, stock=True)
    assert caught.value.field in ("neg_threshold", "synapse")
    assert "stock=False" in caught.value.remedy


def test_brainpy_has_one_threshold():
    spec = adapters.spec(made("LIT", bias=0.0, learn_bias=False))
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.build(spec, "brainpy")
    assert caught.value.field == "neg_threshold"
    assert "tracetorch" in caught.value.remedy


@pytest.mark.parametrize("to", ["sinabs", "snntorch"])
@pytest.mark.parametrize("name", ["LIT", "SLITS", "LIB"])
def test_smooth_spikes_need_a_layer_of_ours(name, to):
    source, xs = nn.Sequential(made(name, "smooth")), stimulus()
    [row] = tt.convert(source, to=to, sample=xs, time_dim=0).report
    assert row.forward == "exact"
    assert row.gradient in ("exact", "rounding")
    assert row.unexplained_mismatches == row.state_violations == 0
    with pytest.raises(adapters.ConversionError, match="whole spikes") as caught:
        tt.convert(source, to=to, sample=xs, time_dim=0, stock=True)
    assert (caught.value.field, caught.value.remedy) == ("spike_count", "stock=False")


@pytest.mark.parametrize("to", ["sinabs", "snntorch"])
def test_a_bias_needs_a_layer_of_ours(to):
    with pytest.raises(adapters.ConversionError, match="has none") as caught:
        adapters.build(adapters.spec(made("LIB")), to, stock=True)
    assert (caught.value.field, caught.value.remedy) == ("bias", "stock=False")


def test_sinabs_records_and_resets_a_synapse():
    layer = adapters.build(adapters.spec(made("SLITS")), "sinabs")
    layer.record_states = True
    xs = stimulus().transpose(0, 1)
    whole = layer(xs)
    assert set(layer.recordings) == {"i_syn", "v_mem"}
    assert torch.equal(layer.recordings["i_syn"][:, -1], layer.i_syn)
    layer.reset_states()
    assert not layer.i_syn.any()
    halves = torch.cat([layer(xs[:, :20]), layer(xs[:, 20:])], 1)
    assert torch.equal(halves, whole)


def test_snntorch_hands_its_states_out_and_in():
    layer = adapters.build(adapters.spec(made("SLIT")), "snntorch")
    xs = stimulus()
    hidden = torch.stack([layer(x) for x in xs])
    layer.init_hidden = False
    syn = mem = torch.zeros(B, N)
    shown = []
    for x in xs:
        spikes, syn, mem = layer(x, syn, mem)
        shown.append(spikes)
    assert torch.equal(torch.stack(shown), hidden)
    layer.init_hidden = True
    with pytest.raises(TypeError, match="init_hidden=True"):
        layer(xs[0], syn=syn)


FACTORY = """
import torch
from torch import nn
import tracetorch as tt

def build():
    torch.manual_seed(0)
    fires = {"quant_fn": tt.functional.round_ste()}
    return nn.Sequential(nn.Linear(4, 5), tt.snn.SLITS(5, neg_scale=0.5, **fires), tt.snn.LIB(5, bias=0.1, **fires))
"""


@pytest.mark.parametrize("to", ["sinabs", "snntorch"])
def test_the_command_writes_them(to, tmp_path, monkeypatch):
    name = f"signed_factory_{to}"
    (tmp_path / f"{name}.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    xs = 3 * stimulus()[..., :4]
    np.save("x.npy", xs.numpy())
    given = ["convert", f"{name}:build", "--to", to, "--sample", "x.npy", "--time-dim", "0", "--out", "made"]
    assert cli.main(given) == 0
    location = importlib.util.spec_from_file_location(f"written_{to}", tmp_path / "made" / "network.py")
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    again, source = module.load(), importlib.import_module(name).build()
    spikes = torch.stack([source[1](source[0](x)) for x in xs])
    assert set(spikes.sign().unique().tolist()) == {-1.0, 0.0, 1.0}
    tt.reset_states(source)
    with torch.no_grad():
        expected = torch.stack([source(x) for x in xs])
        assert expected.sum() > 20
        outputs = again(xs.transpose(0, 1)).transpose(0, 1) if to == "sinabs" else torch.stack([again(x) for x in xs])
    assert torch.equal(outputs, expected)
