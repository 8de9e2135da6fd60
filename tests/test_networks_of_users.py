"""Networks as third parties write them (`tests/networks_of_users.py`), to every target: outputs and gradients."""

import pytest
import snntorch as snn
import torch
from torch import nn

from tests.networks import FRAMEWORKS, forget, sample, tensors
from tests.networks_of_users import CASES, KeepsItsState, TupleOfStates, make
from tracetorch import adapters


def source_outputs(net, x, time_dim):
    """What the source returns from its initial states."""
    forget(net)
    if time_dim is None:
        return tensors(net(x))
    states, series = (), []
    for step in x.unbind(time_dim):
        result = net(step, *states)
        states = (result[1],) if isinstance(net, TupleOfStates) else ()
        series.append(tensors(result))
    if isinstance(net, KeepsItsState):
        net.mem = None
    return [torch.stack(each, time_dim) for each in zip(*series, strict=True)]


def gradient(outputs, x):
    """Of the input, from fixed numbers at every output."""
    generator = torch.Generator().manual_seed(3)
    weighted = [(y * torch.rand(y.shape, generator=generator)).sum() for y in outputs if y.requires_grad]
    return torch.autograd.grad(sum(weighted), x)[0]


# Of sinabs; the others of snnTorch. Back into the source's own framework: in the sweep.
OF_SINABS = ("from an ANN", "repeats", "squeezed", "step by step")


def pairs():
    for name in CASES:
        for to in FRAMEWORKS:
            own = to == ("sinabs" if name in OF_SINABS else "snntorch")
            yield pytest.param(name, to, marks=[pytest.mark.sweep] if own else [], id=f"{name}-{to}")


@pytest.mark.parametrize(("name", "to"), list(pairs()))
def test_a_network_of_a_user(name, to):
    net, x, time_dim, stepped = make(name)
    result = adapters.convert(net, to=to, sample=x, time_dim=time_dim)
    assert result.agreement.ok, result.agreement
    assert result.stepped == stepped
    assert result.agreement.unexplained_mismatches == 0
    if to == "tracetorch":
        assert result.agreement.spike_mismatches == 0
    assert sum(row.spikes for row in result.report if row.neuron) > 50
    x = x.clone().requires_grad_()
    theirs, ours = source_outputs(net, x, time_dim), tensors(result.run(x))
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)
    expected = gradient(theirs, x)
    assert expected.any()
    assert float((gradient(ours, x) - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_a_neuron_that_is_not_known_is_refused_by_name(to):
    class Lstm(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = snn.SLSTM(8, 16)

        def forward(self, x):
            syn, mem = self.lstm.init_slstm()
            series = []
            for step in x:
                spk, syn, mem = self.lstm(step, syn, mem)
                series.append(spk)
            return torch.stack(series)

    with pytest.raises(adapters.ConversionError, match="SLSTM"):
        adapters.convert(Lstm(), to=to, sample=sample(12, 4, 8))
