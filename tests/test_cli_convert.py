"""`tracetorch convert`: a network of the user's, from the shell, to files that rebuild it."""

import importlib.util
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.torch
import snntorch as snn
import torch
from torch import nn

from tracetorch import cli

FACTORY = """
import snntorch as snn
import torch
import torch.nn.functional as F
from torch import nn

def build():
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(6, 8), nn.Linear(8, 4)
    with torch.no_grad():
        fc1.weight.mul_(4), fc2.weight.mul_(4)
    return nn.Sequential(fc1, snn.Leaky(0.9, init_hidden=True, learn_beta=True), fc2, snn.Leaky(0.8, init_hidden=True))

def constant():
    fc1, _, fc2, _ = build()
    return nn.Sequential(fc1, snn.Leaky(0.9, init_hidden=True), fc2, snn.Leaky(0.8, init_hidden=True))

class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = build()

    def forward(self, x):
        snn.utils.reset(self.layers)
        return torch.stack([self.layers(step) for step in x])

class Branches(Loop):
    def forward(self, x):
        steps, mem = [], self.layers[1].reset_mem()
        for step in x:
            steps.append(self.layers(step * 2 if step.sum() > 8 else step))
        return torch.stack(steps)

class Functions(nn.Module):
    # Functions in the forward: elementwise, of the shape of the batch, of several values, of a parameter, of a split.
    def __init__(self):
        super().__init__()
        self.layers, self.gain = build(), nn.Parameter(torch.tensor(0.5))
        self.layers[1].init_hidden = self.layers[3].init_hidden = True

    def forward(self, x):
        snn.utils.reset(self.layers)
        series = []
        for step in x:
            hidden = self.layers[1](self.layers[0](F.relu(step * 4 - 0.1)))
            left, right = torch.chunk(hidden * self.gain, 2, 1)
            joined = 2 * torch.cat([F.max_pool1d(left, 1), right + F.softmax(left, 1)], 1).view(x.size(1), -1)
            series.append(self.layers[3](self.layers[2](joined)))
        return torch.stack(series)

def refused():
    return nn.Sequential(nn.Linear(6, 4), snn.Leaky(0.9, init_hidden=True, reset_delay=False))

def number():
    return 3

def broken():
    raise RuntimeError("no data here")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a module of a name of its own, a sample and weights."""
    name = f"nets_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent(FACTORY).replace("import torch\n", "import snntorch.utils\nimport torch\n", 1)
    )
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((20, 3, 6), dtype=np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path, name
    sys.modules.pop(name, None)


def convert(place, factory="build", to="sinabs", *more):
    folder, name = place
    command = [
        "convert",
        f"{name}:{factory}",
        "--to",
        to,
        "--sample",
        str(folder / "x.npy"),
        "--out",
        str(folder / "out"),
    ]
    return cli.main([*command, *more])


def load(folder):
    spec = importlib.util.spec_from_file_location("network", folder / "out" / "network.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


def source(folder, name):
    return importlib.import_module(name).build(), torch.from_numpy(np.load(folder / "x.npy"))


@pytest.mark.parametrize("to", ["tracetorch", "snntorch", "sinabs"])
def test_the_files_rebuild_the_network(place, to, capsys):
    folder, name = place
    assert convert(place, "build", to, "--time-dim", "0") == 0
    assert "0 unexplained" in capsys.readouterr().out
    names = {"weights.safetensors", "network.py", "report.txt", "report.json", "report.html"}
    names |= {"network.tt"} if to == "tracetorch" else set()
    assert {path.name for path in (folder / "out").iterdir()} == names
    net, x = source(folder, name)
    model = load(folder)
    with torch.no_grad():
        expected = torch.stack([net(step) for step in x])
        found = model(x.transpose(0, 1)).transpose(0, 1) if to == "sinabs" else torch.stack([model(step) for step in x])
    assert torch.equal(found, expected)
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["ok"] is True
    assert [row["name"] for row in report["layers"]] == ["0", "1", "2", "3"]


def test_the_files_rebuild_the_stages_of_brainpy(place):
    pytest.importorskip("brainpy_state")
    folder, name = place
    assert convert(place, "constant", "brainpy", "--time-dim", "0") == 0
    net, x = importlib.import_module(name).constant(), torch.from_numpy(np.load(folder / "x.npy"))
    with torch.no_grad():
        expected = torch.stack([net(step) for step in x])
        found = load(folder)(x.transpose(0, 1)).transpose(0, 1)
    assert expected.any()
    assert torch.equal(found, expected)


def test_a_network_with_a_loop_and_a_file_that_needs_only_its_target(place):
    folder, name = place
    assert convert(place, "Loop", "snntorch") == 0
    text = (folder / "out" / "network.py").read_text()
    assert "tracetorch" not in text
    code = "import sys; sys.modules['tracetorch'] = None; import network, torch; "
    code += "print(network.load()(torch.zeros(2, 3, 6)).shape)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "out", capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "[2, 3, 4]" in run.stdout
    net = importlib.import_module(name).Loop()
    x = torch.from_numpy(np.load(folder / "x.npy"))
    with torch.no_grad():
        assert torch.equal(load(folder)(x), net(x))


@pytest.mark.parametrize("to", ["snntorch", "sinabs"])
def test_functions_in_the_forward_are_written_into_the_file(place, to):
    folder, name = place
    assert convert(place, "Functions", to) == 0
    net = importlib.import_module(name).Functions()
    for x in (
        torch.from_numpy(np.load(folder / "x.npy")),
        torch.rand(9, 4, 6, generator=torch.Generator().manual_seed(1)),
    ):
        model, theirs = load(folder), net(x)
        ours = model(x) if to == "snntorch" else model(x.transpose(0, 1)).transpose(0, 1)
        assert theirs.any()
        assert torch.equal(ours, theirs)
    model.state_dict()  # its parameter is one that trains
    ours.sum().backward()
    gains = [p for p in model.parameters() if p.shape == () and p == 0.5 and p.requires_grad and p.grad is not None]
    assert gains


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_weights_are_loaded(place, kind):
    folder, name = place
    net, x = source(folder, name)
    state = {key: value * 1.25 if key.endswith("weight") else value for key, value in net.state_dict().items()}
    path = folder / f"w.{kind}"
    if kind == "pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, str(path))
    assert convert(place, "build", "snntorch", "--time-dim", "0", "--weights", str(path)) == 0
    model = load(folder)
    net.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(torch.stack([model(s) for s in x]), torch.stack([net(s) for s in x]))


class Evil:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_is_unpickled(place, capsys):
    folder, _ = place
    torch.save({"0.weight": Evil(str(folder / "evil"))}, folder / "w.pt")
    assert convert(place, "build", "sinabs", "--time-dim", "0", "--weights", str(folder / "w.pt")) == 2
    assert "cannot be read as weights" in capsys.readouterr().err
    np.save(folder / "x.npy", np.array([Evil(str(folder / "evil"))], dtype=object), allow_pickle=True)
    assert convert(place, "build", "sinabs", "--time-dim", "0") == 2
    assert not (folder / "evil").exists()


@pytest.mark.parametrize(
    ("factory", "more", "said"),
    [
        ("missing", (), "cannot be imported from here"),
        ("number", (), "must return a torch.nn.Module"),
        ("broken", (), "and raised RuntimeError: no data here"),
        ("build", ("--weights", "missing.safetensors"), "cannot be read as weights"),
    ],
)
def test_what_cannot_be_used_is_said(place, factory, more, said, capsys):
    assert convert(place, factory, "sinabs", "--time-dim", "0", *more) == 2
    assert said in capsys.readouterr().err


def test_a_refusal_and_a_folder_that_is_there(place, capsys):
    folder, _ = place
    assert convert(place, "refused", "sinabs", "--time-dim", "0") == 1
    assert "refused: layer" in capsys.readouterr().err
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("kept")
    assert convert(place, "build", "sinabs", "--time-dim", "0") == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in (folder / "out").iterdir()] == ["mine.txt"]


def test_the_help_says_that_a_factory_is_run(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "run only code that you trust" in text
    assert "nothing is unpickled" in text


def test_names_of_layers_are_escaped():
    net = nn.Sequential()
    net.add_module('a"); import os; ("', nn.Linear(6, 4))
    net.add_module("lif", snn.Leaky(0.9, init_hidden=True))
    from tracetorch.adapters.networks import rebuild

    text = rebuild.source(net)
    scope = {}
    exec(compile(text, "network.py", "exec"), scope)
    assert "os" not in scope
    assert list(scope["build"]()._modules) == ['a"); import os; ("', "lif"]


@pytest.mark.parametrize("to", ["tracetorch", "snntorch", "sinabs"])
def test_a_network_that_is_code_is_refused_before_anything_is_written(place, to, capsys):
    folder, _ = place
    assert convert(place, "Branches", to) == 1
    said = capsys.readouterr().err
    assert "the network's own code" in said
    assert f"tt.convert(net, '{to}', sample)" in said
    assert "__bool__ at line" in said
    assert sorted(path.suffix for path in folder.iterdir() if path.is_file()) == [".npy", ".py"]
    assert not (folder / "out").exists()
