"""What users meet first: results of the form they expect, helpers of the frameworks, errors that name the way out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sinabs
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs.activation import SingleSpike
from sinabs.network import Network
from torch import Tensor, nn

import tracetorch as tt
from tracetorch import adapters, conformance
from tracetorch.functional.surrogates import Surrogate

STEPS, BATCH = 12, 3


class Looped(nn.Module):
    """A loop over time inside forward, with one output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(8, 4), snn.Synaptic(0.7, 0.8)

    def forward(self, x: Tensor) -> Tensor:
        syn, mem = self.lif.init_synaptic()
        spikes = []
        for step in x:
            spk, syn, mem = self.lif(self.fc(step), syn, mem)
            spikes.append(spk)
        return torch.stack(spikes)


class TwoOutputs(Looped):
    """The same, its membranes beside its spikes."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        syn, mem = self.lif.init_synaptic()
        series = []
        for step in x:
            spk, syn, mem = self.lif(self.fc(step), syn, mem)
            series.append((spk, mem))
        spikes, membranes = zip(*series, strict=True)
        return torch.stack(spikes), torch.stack(membranes)


class OneStep(nn.Module):
    """One step per call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(8, 4), snn.Leaky(0.9, init_hidden=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sample() -> Tensor:
    return 4 * torch.rand(STEPS, BATCH, 8)


def test_a_loop_with_one_output_is_a_sinabs_model_with_one_output() -> None:
    net, x = Looped(), sample()
    result = tt.convert(net, to="sinabs", sample=x)
    expected = net(x)
    assert expected.any()
    assert torch.equal(result.run(x), expected)
    sinabs.reset_states(result.model)
    assert torch.equal(result.model(x.transpose(0, 1)).transpose(0, 1), expected)
    sinabs.reset_states(result.model)
    assert torch.equal(Network(spiking_model=result.model)(x.transpose(0, 1)).transpose(0, 1), expected)
    back = tt.convert(result.model, to="snntorch", sample=x.transpose(0, 1).contiguous())
    assert torch.equal(back.run(x.transpose(0, 1)).transpose(0, 1), expected)


def test_a_loop_with_two_outputs_is_a_sinabs_model_with_two() -> None:
    net, x = TwoOutputs(), sample()
    result = tt.convert(net, to="sinabs", sample=x)
    spikes, membranes = result.run(x)
    assert torch.equal(spikes, net(x)[0])
    assert torch.allclose(membranes, net(x)[1], atol=1e-5)
    assert [type(y) for y in result.model(x.transpose(0, 1))] == [Tensor, Tensor]


@pytest.mark.parametrize(
    "layer",
    [
        snn.Leaky(0.9, learn_beta=True),
        snn.Leaky(0.9, reset_mechanism="zero"),
        snn.Synaptic(0.7, 0.8),
        snn.Lapicque(beta=0.9),
        snn.StateLeaky(0.9, 8),
        tt.snn.LIB(8, quant_fn=tt.functional.round_ste()),
        tt.snn.SLITS(8, quant_fn=tt.functional.round_ste()),
    ],
    ids=["leaky", "zero", "synaptic", "lapicque", "state-leaky", "LIB", "SLITS"],
)
def test_sinabs_resets_what_it_trained(layer: nn.Module) -> None:
    """`sinabs.reset_states` detaches in place, which no view of another tensor allows."""
    model = nn.Sequential(nn.Linear(8, 8), adapters.build(adapters.spec(layer), "sinabs"))
    x = sample().transpose(0, 1)
    first = model(x)
    assert first.any()
    first.sum().backward()
    sinabs.reset_states(model)
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("to", ["spikingjelly", "norse"])
@pytest.mark.parametrize(("net", "time_dim"), [(Looped, None), (OneStep, 0)], ids=["loop", "step"])
def test_a_target_without_networks_says_so(net: type[nn.Module], time_dim: int | None, to: str) -> None:
    pytest.importorskip(to)
    if net is Looped:
        source = nn.Sequential(nn.Linear(8, 4), sl.IAFSqueeze(batch_size=BATCH, spike_fn=SingleSpike))
        x = sample().transpose(0, 1).flatten(0, 1)
    else:
        source, x = net(), sample()
    with pytest.raises(adapters.ConversionError, match=r"^the network: network=.*layers one by one") as caught:
        tt.convert(source, to=to, sample=x, time_dim=time_dim)
    assert caught.value.layer == "''"


# ---- a subject of one's own ------------------------------------------------------------------------------------------


class Tiny:
    """A subject that reads every field of what it is given, and is silent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.given: list[dict[str, Any]] = []

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "framework": "tiny", "version": "1"}

    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        self.given.append(spec)
        if spec["inhibition"] != "none":
            raise conformance.Unsupported("inhibition", spec["inhibition"], "neurons are alone")
        return {"gradients": "none"}

    def run(self, x: Any, calls: Any, grad_output: Any) -> dict[str, Any]:
        return {"outputs": np.zeros_like(x)}


def test_a_subject_is_given_every_field() -> None:
    subject = Tiny("tiny")
    results = conformance.run([subject], ["comparison.strict", "inhibition.winner"])
    names = {field.name for field in dataclasses.fields(tt.NeuronSpec)}
    assert subject.given
    assert all(set(spec) == names | {"version"} for spec in subject.given)
    assert all(tt.NeuronSpec.from_dict(spec) for spec in subject.given)
    assert {row.verdict for row in results.rows if row.requirement == "inhibition.winner"} == {"unsupported"}


def test_bisect_is_not_content_with_nothing() -> None:
    pair = Tiny("a"), Tiny("b")
    assert conformance.bisect(*pair, ["comparison.strict"]) is None
    with pytest.raises(conformance.SubjectError, match=r"a and b share none of the \d+ cases? asked; .*: the first: "):
        conformance.bisect(*pair, ["inhibition.winner"])
    with pytest.raises(ValueError, match=r"^cases=\[\]: no case"):
        conformance.bisect(*pair, [])


# ---- what is not installed -------------------------------------------------------------------------------------------

EXTRAS = """
import sys
absent = ("sinabs", "snntorch", "spikingjelly", "norse", "brainpy", "brainpy_state", "brainstate", "braintools",
          "brainunit", "saiunit", "jax", "matplotlib", "safetensors", "triton")
sys.modules.update(dict.fromkeys(absent))  # each import of them is a ModuleNotFoundError
import torch
import tracetorch as tt

net = torch.nn.Sequential(torch.nn.Linear(8, 4), tt.snn.LIB(4, quant_fn=tt.functional.round_ste()))
x = torch.rand(5, 2, 8)
from tracetorch.cli.convert import _safetensors
tries = {
    **{to: lambda to=to: tt.convert(net, to=to, sample=x, time_dim=0)
       for to in ("sinabs", "snntorch", "spikingjelly", "norse", "brainpy")},
    **{f"adapters.{name}": lambda name=name: getattr(tt.adapters, name)
       for name in ("sinabs", "snntorch", "spikingjelly", "norse", "brainpy", "JaxStage", "to_brainstate")},
    **{f"subject.{name}": lambda name=name: tt.conformance.subject(name)
       for name in ("sinabs", "snntorch-adapted", "spikingjelly", "norse", "brainpy", "brainpy-adapted")},
    "raster": lambda: tt.plot.raster(x[:, 0]),
    "command": _safetensors,
}
for name, tried in tries.items():
    try:
        tried()
    except Exception as error:
        print(name, "|", type(error).__name__, "|", error)
    else:
        print(name, "| nothing |")
tt.save("net.tt", tt.convert(net, to="tracetorch", sample=x, time_dim=0).model)
assert torch.equal(tt.unroll(tt.load("net.tt"), x), tt.unroll(net, x))
"""


def test_what_is_missing_is_named_by_its_extra(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", EXTRAS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    jax = dict.fromkeys(("adapters.JaxStage", "adapters.to_brainstate"), "brainpy")
    jax |= {"command": "convert", "raster": "report"}
    for name, text in said.items():
        extra = jax.get(name, name.split(".")[-1].removesuffix("-adapted"))
        kind = "_Unusable" if name == "command" else "ImportError"
        assert text.startswith(kind), (name, text)
        assert f"[{extra}]" in text or f"the extra `{extra}`" in text, (name, text)
    assert len(said) == 20


# ---- what is no network, or no sample --------------------------------------------------------------------------------


def test_what_is_no_network_or_no_sample_is_named() -> None:
    net, x = nn.Sequential(nn.Linear(8, 4), snn.Leaky(0.9, init_hidden=True)), sample()
    with pytest.raises(TypeError, match=r"net is str; give a torch\.nn\.Module"):
        tt.convert("net", to="sinabs", sample=x)
    with pytest.raises(TypeError, match=r"spec is Linear; give a NeuronSpec, such as adapters\.spec\(layer\)"):
        adapters.build(net[0], "sinabs")
    with pytest.raises(adapters.ConversionError, match=r"Remedy: torch.as_tensor\(x, dtype=torch.float32\)"):
        tt.convert(net, to="sinabs", sample=x.numpy(), time_dim=0)
    with pytest.raises(adapters.ConversionError, match="Remedy: neurons of one of these: tracetorch, "):
        tt.convert(nn.Sequential(nn.Linear(8, 4)), to="sinabs", sample=x, time_dim=0)
    with pytest.raises(adapters.SeamError, match=r"ndarray.*torch.as_tensor\(x, dtype=torch.float32\)"):
        adapters.Pipeline(net)(x.numpy())
    with pytest.raises(adapters.ConversionError, match=r"Pipeline.*convert each stage, .*stages\[0\]\.module"):
        tt.convert(adapters.Pipeline(net), to="sinabs", sample=x, time_dim=0)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("to", adapters.FRAMEWORKS)
def test_a_spec_of_spikes_without_a_surrogate_is_refused_by_it(to: str, stock: bool) -> None:
    pytest.importorskip("brainpy_state" if to == "brainpy" else to)
    spec = adapters.spec(snn.Leaky(0.9, reset_mechanism="zero"))
    with pytest.raises(adapters.ConversionError, match=r"surrogate=None: .*Surrogate\('zero'\)") as caught:
        adapters.build(spec.replace(surrogate=None), to, stock)
    assert caught.value.field == "surrogate"


def test_what_the_remedy_names_is_a_surrogate_without_a_gradient() -> None:
    spec = adapters.spec(snn.Leaky(0.9, reset_mechanism="zero")).replace(surrogate=Surrogate("zero"))
    x = sample().requires_grad_()
    y = adapters.build(spec, "tracetorch").unroll(x)
    y.sum().backward()
    assert y.any()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_sequence_without_its_time_dim_is_one_step_and_said_to_be() -> None:
    net, x = nn.Sequential(nn.Linear(8, 4), snn.Leaky(0.9, init_hidden=True)), sample()
    results = [tt.convert(net, to="sinabs", sample=x, time_dim=dim) for dim in (None, 0)]
    assert [len(result.report.remarks) for result in results] == [1, 0]
    remark = results[0].report.remarks[0]
    assert remark.startswith("one step was judged")
    assert remark in str(results[0].agreement), "what the command prints and writes"
    assert remark in str(results[0].verify(x))
    assert "one step" not in str(results[1].verify(x))
    looped = tt.convert(Looped(), to="sinabs", sample=x[:1])  # a sequence, of one step
    assert not any("one step was judged" in remark for remark in looped.report.remarks)


def test_modules_are_found_by_their_names() -> None:
    """`import tracetorch as tt` reaches all of it; the adapter of a framework too."""
    code = (
        "import tracetorch as tt; print(tt.adapters.snntorch.parts.__name__, tt.conformance.VERDICTS, "
        "tt.oracle.__name__, tt.adapters.FRAMEWORKS)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("parts ")


def test_the_summary_says_how_far_states_were_compared() -> None:
    """Behind the first spike that differs, states of a neuron differ by whole thresholds: they are not counted."""
    net = nn.Sequential(nn.Linear(8, 16), snn.Leaky(0.9, init_hidden=True, reset_delay=False))
    lossy = tt.convert(net, to="sinabs", sample=sample(), time_dim=0, allow_approximate=True).agreement
    assert lossy.spike_mismatches
    assert lossy.max_state_difference < 1e-3
    assert "up to a neuron's first of these; gradient" in str(lossy)
    same = tt.convert(net, to="tracetorch", sample=sample(), time_dim=0).agreement
    assert "first of these" not in str(same)


@pytest.mark.parametrize("name", ["spike_fn", "quant_fn"])
def test_what_is_no_function_is_refused_at_once(name: str) -> None:
    arguments: dict[str, Any] = {name: 3}
    with pytest.raises(TypeError, match=rf"^LIB: {name}=3 cannot be called; give a function, such as tt\.functional\."):
        tt.snn.LIB(4, **arguments)
