"""A forward that is no plain graph is run step by step by `tt.unroll`, which says so once and leaves nothing behind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.bits import assert_bits
from tests.unroll_models import B, Net, Scale, T, hard, loop
from tracetorch.core.program import NotPlain, program
from tracetorch.functional import stochastic_round_ste

pytestmark = pytest.mark.usefixtures("one_thread")


class Branching(Net):
    def forward(self, x):
        h = super().forward(x)
        return h if h.sum() > 0 else -h


class Remembering(Net):
    def forward(self, x):
        self.last = self.enter(x.flatten(1))
        return self.read(self.leave(self.last))


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return super().forward(x)


class Reading(Net):
    """Gives a state where there is one, as after the first step."""

    def forward(self, x):
        h = super().forward(x)
        return h if self.blocks[0].neuron.mem is None else h + self.blocks[0].neuron.mem.mean()


class InPlace(Net):
    def forward(self, x):
        return super().forward(x).add_(1)


class Twice(Net):
    def forward(self, x):
        return self.read(self.read(self.leave(self.enter(x.flatten(1)))))


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.blocks[1].register_forward_hook(lambda module, inputs, output: output * 2)


class TwoRandom(Net):
    def forward(self, x):
        return self.read(self.leave(nn.functional.dropout(torch.randn_like(self.enter(x.flatten(1))), 0.5)))


class Keyword(Net):
    def forward(self, x, scale=2.0):
        return super().forward(x) * scale


ODD = [Branching, Remembering, Counting, Reading, InPlace, Twice, Hooked, TwoRandom, Keyword]


@pytest.mark.parametrize("cls", ODD)
def test_what_is_no_plain_graph_runs_step_by_step_and_says_so_once(cls):
    torch.manual_seed(0)
    model, xs = cls(), torch.randn(T, B, 1, 7)
    with torch.no_grad():
        model(xs[0])
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        stepped = loop(twin, xs)
        attributes = {name: type(value) for name, value in vars(model).items()}
        torch.manual_seed(1)
        with pytest.warns(tt.UnrollWarning, match=f"runs {cls.__name__} step by step: "):
            found = tt.unroll(model, xs, fold="exact")
        assert_bits(found, stepped)
        for path, states in tt.save_states(twin).items():
            for state, value in states.items():
                assert value is None or value.isfinite().all()
                if value is not None:
                    assert_bits(tt.save_states(model)[path][state], value)
        assert {name: type(value) for name, value in vars(model).items()} == attributes, "tracing left nothing behind"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tt.unroll(model, xs, fold="exact")
        if cls is Counting:
            assert len(model.seen) == 1 + 2 * T
            assert not any(isinstance(x, torch.fx.Proxy) for x in model.seen)


def test_inplace_modules_and_shared_neurons_are_no_plain_graph():
    neuron, xs = hard(7), torch.randn(T, B, 7)
    for model, word in (
        (nn.Sequential(tt.snn.LI(7), nn.ReLU(inplace=True)), "inplace"),
        (nn.Sequential(neuron, nn.Linear(7, 7), neuron), "twice"),
        (nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 7), nn.Dropout(0.5)), "random"),
        (nn.Sequential(Scale(), tt.snn.LIB(7, quant_fn=stochastic_round_ste())), "random"),
    ):
        torch.manual_seed(1)
        with torch.no_grad():
            stepped = loop(copy.deepcopy(model), xs)
            torch.manual_seed(1)
            with pytest.warns(tt.UnrollWarning, match=word):
                assert_bits(tt.unroll(model, xs, fold="exact"), stepped)


def test_the_program_of_a_forward():
    calls = program(Net()).calls
    modules = [type(call.target).__name__ for call in calls if isinstance(call.target, nn.Module)]
    assert modules == ["Linear", "Linear", "LIB", "Linear", "LIB", "LayerNorm", "Linear", "LI"]
    with pytest.raises(NotPlain, match="empty"):
        program(nn.Sequential())
    net = Net()
    before = {name: id(value) for name, value in vars(net).items()}
    program(net)
    assert {name: id(value) for name, value in vars(net).items()} == before
    assert net.read.mem is None
