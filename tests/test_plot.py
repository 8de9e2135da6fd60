"""`tt.plot` draws what it is given, and needs matplotlib only then."""

from __future__ import annotations

import matplotlib
import pytest
import torch

import tracetorch as tt


@pytest.fixture(autouse=True)
def _closed():
    from matplotlib import pyplot

    with matplotlib.rc_context({"backend": "agg"}):
        yield
        pyplot.close("all")


def marks(collection):
    return sorted(map(tuple, collection.get_offsets().tolist()))


def test_a_raster_has_a_mark_for_each_event():
    spikes = torch.zeros(10, 3)
    spikes[2, 0] = spikes[5, 2] = 1.0
    spikes[7, 1] = -1.0
    ax = tt.plot.raster(spikes, title="events")
    positive, negative = ax.collections
    assert marks(positive) == [(2.0, 0.0), (5.0, 2.0)]
    assert marks(negative) == [(7.0, 1.0)]
    assert ax.get_title() == "events"
    assert len(tt.plot.raster(spikes[:, 0]).collections) == 2


def test_a_membrane_with_its_threshold_and_spikes():
    neuron = tt.nn.LIFNeuron()
    spikes, states = neuron.trace(torch.tensor([0.2, 0.35]).expand(40, 2))
    ax = tt.plot.membrane(states["potential"], 1.0, spikes)
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == states["potential"].T.tolist()
    assert set(ax.lines[2].get_ydata()) == {1.0}
    for n, collection in enumerate(ax.collections):
        assert [x for x, _ in marks(collection)] == torch.nonzero(spikes[:, n]).flatten().tolist()
    again = tt.plot.membrane(states["potential"][:, 0].requires_grad_(), ax=ax)
    assert again is ax


def test_overlays_are_named():
    traces = {"ours": torch.rand(9), "theirs": torch.rand(9)}
    ax = tt.plot.overlay(traces)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(traces)
    assert [line.get_ydata().tolist() for line in ax.lines] == [trace.tolist() for trace in traces.values()]


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match=r"raster: spikes has shape \[2, 3, 4\]"):
        tt.plot.raster(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"membrane: spikes \[5\].*one shape|membrane: spikes"):
        tt.plot.membrane(torch.ones(4), spikes=torch.ones(5))
    with pytest.raises(ValueError, match="empty"):
        tt.plot.overlay({})
    with pytest.raises(ValueError, match=r"'a' has shape \[2, 2\]"):
        tt.plot.overlay({"a": torch.ones(2, 2)})


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="extra `report`"):
        tt.plot.raster(torch.ones(3))
