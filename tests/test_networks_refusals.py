"""What a recorded network is refused for: each by name, with the place in its forward."""

import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from torch import nn

import tracetorch as tt
from tests.networks import StaticFullyConnected, excite, sample
from tests.networks_stepped import B, Base, Branches, Counts, CountsCalls, Depends, FeedsBack, T, UsesAStranger
from tracetorch import adapters
from tracetorch.core.graph import Graph, Loop, Node, Ref, State


class Swaps(Base):
    def step(self, t, x, mem1, mem2, last):
        spk, mem1, mem2 = super().step(t, x, mem1, mem2, last)
        return spk, mem2, mem1


class Clips(Base):
    def step(self, t, x, mem1, mem2, last):
        return super().step(t, x, mem1.clamp(max=0.5), mem2, last)


class Draws(Base):
    def step(self, t, x, mem1, mem2, last):
        return super().step(t, x + torch.rand_like(x), mem1, mem2, last)


class Writes(Base):
    def step(self, t, x, mem1, mem2, last):
        x[0] = 0.0
        return super().step(t, x, mem1, mem2, last)


class Starts(Base):
    def forward(self, x):
        mem1, spikes = torch.full((x.shape[1], 8), 0.5), []
        for t in range(x.shape[0]):
            spk, mem1 = self.lif1(self.fc1(x[t]), mem1)
            spikes.append(spk)
        return torch.stack(spikes)


# What is no graph, and why.
NO_GRAPH = {
    Branches: "looks at a tensor's value",
    Depends: "does not repeat the same step",
    Counts: "does not repeat the same step",
    CountsCalls: "does not repeat the same step",
    FeedsBack: "a value of the step before that is no neuron's own state",
    Swaps: "not the one that it gave in the step before",
    Clips: "a value of the step before that is no neuron's own state",
    Draws: "draws random numbers",
    Writes: "in place",
    UsesAStranger: "no parameter or buffer",
    Starts: "a state of the user's own",
}


# What not even running the forward as it stands carries, and why.
REFUSED = {
    Swaps: "changed between its calls",
    Clips: "changed between its calls",
    Starts: "changed between its calls",
    Draws: "draws random numbers",
    Writes: "cannot be run as it stands",
}


@pytest.mark.parametrize("to", ["tracetorch", "snntorch", "sinabs"])
@pytest.mark.parametrize("net", REFUSED, ids=lambda cls: cls.__name__)
def test_what_cannot_even_be_stepped_is_refused_by_name(net, to):
    with pytest.raises(adapters.ConversionError, match=REFUSED[net]) as caught:
        adapters.convert(net(), to=to, sample=sample(T, B, 8) * 2)
    check(caught.value, net)


@pytest.mark.parametrize("net", NO_GRAPH, ids=lambda cls: cls.__name__)
def test_a_target_that_runs_no_forward_refuses_all_of_them(net):
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.convert(net(), to="norse", sample=sample(T, B, 8) * 2)
    check(caught.value, net)


def check(error, net):
    assert NO_GRAPH[net] in str(error)
    assert error.field
    assert len(error.remedy) > 5


def test_the_line_is_named():
    with pytest.raises(adapters.ConversionError, match=r"line \d+ of step"):
        adapters.convert(Clips(), to="sinabs", sample=sample(T, B, 8))


def test_the_base_of_all_these_is_not_refused():
    result = adapters.convert(Base(), to="tracetorch", sample=sample(T, B, 8) * 2)
    assert result.agreement.ok
    assert result.agreement.spike_mismatches == 0


def test_a_batch_size_inside_is_said():
    class Fixed(StaticFullyConnected):
        def forward(self, x):
            return super().forward(x.view(4, -1))

    torch.manual_seed(0)
    result = adapters.convert(Fixed(), to="tracetorch", sample=sample(4, 64))
    assert "constant of the source" in str(result.report)


def test_hooks_are_refused_there_too():
    net = Base()
    net.fc1.register_forward_hook(lambda module, args, y: y * 2)
    with pytest.raises(adapters.ConversionError, match="hook"):
        adapters.convert(net, to="tracetorch", sample=sample(T, B, 8))


@pytest.mark.parametrize("outside", [nn.Identity, lambda: nn.Linear(4, 3)], ids=["alone", "inside"])
def test_a_pipeline_is_converted_stage_by_stage(outside):
    torch.manual_seed(0)
    first = nn.Sequential(excite(nn.Linear(8, 8)), snn.Leaky(0.9, init_hidden=True))
    second = nn.Sequential(excite(nn.Linear(8, 4), 20), sl.LIF(5.0))
    pipe, x = adapters.Pipeline(first, second), sample(T, B, 8) * 2
    with pytest.raises(adapters.ConversionError, match=r"stages\[1\]: Sequential") as caught:
        adapters.convert(pipe if outside is nn.Identity else nn.Sequential(pipe, outside()), to="tracetorch", sample=x)
    assert "pipe.stages[0].module" in caught.value.remedy
    # The remedy:
    hidden = adapters.Pipeline(first)(x).detach()
    made = [
        adapters.convert(pipe.stages[0].module, to="tracetorch", sample=x, time_dim=0).model,
        adapters.convert(pipe.stages[1].module, to="tracetorch", sample=hidden.transpose(0, 1)).model,
    ]
    with torch.no_grad():
        pipe.reset_states()
        expected = pipe(x)
        assert expected.any()
        torch.testing.assert_close(adapters.Pipeline(*made)(x), expected)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def relu(name="y", source="x"):
    return Node(name, "function", torch.relu, (Ref(source),))


@pytest.mark.parametrize(
    ("nodes", "output", "said"),
    [
        ([relu(), relu()], Ref("y"), "is taken"),
        ([relu(source="z")], Ref("y"), "no earlier node"),
        ([relu()], Ref("z"), "no earlier node"),
        ([relu()], State("y", "v_mem"), "no earlier node"),
        ([relu(name="a b")], Ref("a b"), "cannot be the name"),
        ([relu(name="import")], Ref("import"), "cannot be the name"),
        ([Node("y", "code", "x", ())], Ref("y"), "is not known"),
        ([Node("y", "tensor", "w")], Ref("y"), "no tensor"),
    ],
)
def test_a_graph_that_makes_no_sense(nodes, output, said):
    with pytest.raises(ValueError, match=said):
        Graph({}, nodes, output)


def test_a_loop_needs_a_length():
    step = Graph({}, [relu()], (Ref("y"),))
    with pytest.raises(ValueError, match="number of steps"):
        Loop(step, cuts=(None,))
    assert Loop(step, cuts=(None,), steps=3)(torch.ones(2))[0].shape == (3, 2)


@pytest.mark.parametrize(
    "node",
    [
        Node("y", "function", torch.load, (Ref("x"),)),
        Node("y", "function", getattr, (Ref("x"), "T")),
        Node("y", "method", "backward", (Ref("x"),)),
        Node("y", "method", "__reduce__", (Ref("x"),)),
        Node("y", "function", torch.relu, (Ref("x"), object())),
    ],
    ids=lambda node: getattr(node.target, "__name__", node.target),
)
def test_a_graph_that_a_file_cannot_hold(node, tmp_path):
    with pytest.raises(tt.FileError, match=r"its node 'y' calls .*cannot name|an argument of a node, <object"):
        tt.save(tmp_path / "net.tt", Graph({}, [node], Ref("y")))
    assert not (tmp_path / "net.tt").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"torch.relu"', b'"torch.load"'),
        (b'"torch.relu"', b'"os.system_"'),
        (b'{"ref":"x"}', b'{"ref":"q"}'),
        (b'"function"', b'"methodxx"'),
        (b'["y","func', b'["7","func'),
        (b'["x"]}', b'["8"]}'),
    ],
)
def test_a_file_that_names_other_calls(old, new, tmp_path):
    tt.save(tmp_path / "net.tt", Graph({}, [relu()], Ref("y")))
    import zipfile

    with zipfile.ZipFile(tmp_path / "net.tt") as archive:
        text = archive.read("network.json")
    assert old in text
    with zipfile.ZipFile(tmp_path / "bad.tt", "w") as archive:
        archive.writestr("network.json", text.replace(old, new, 1))
    with pytest.raises(
        tt.FileError, match=r"the node 'y' calls '(torch\.load|os\.system_)'|Graph cannot be built from"
    ):
        tt.load(tmp_path / "bad.tt")
