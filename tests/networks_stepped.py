"""Networks whose forward branches, counts or reads what no graph holds, and the base of all these."""

import sinabs.layers as sl
import snntorch as snn
import torch
from torch import nn

from tests.networks import excite, sample

T, B = 10, 3


class Base(nn.Module):
    """Two layers; `step` is what each test changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.lif1 = excite(nn.Linear(8, 8)), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = excite(nn.Linear(8, 8)), snn.Leaky(beta=0.8)
        self.calls = 0
        self.hidden = torch.ones(8)

    def forward(self, x):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, last = [], torch.zeros(x.shape[1], 8)
        for t in range(x.shape[0]):
            last, mem1, mem2 = self.step(t, x[t], mem1, mem2, last)
            spikes.append(last)
        return torch.stack(spikes)

    def step(self, t, x, mem1, mem2, last):
        spk1, mem1 = self.lif1(self.fc1(x), mem1)
        spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
        return spk2, mem1, mem2


class Branches(Base):
    def step(self, t, x, mem1, mem2, last):
        if x.sum() > 0:
            x = x * 2
        return super().step(t, x, mem1, mem2, last)


class Depends(Base):
    def step(self, t, x, mem1, mem2, last):
        return super().step(t, x * 2 if t % 2 else x, mem1, mem2, last)


class Counts(Base):
    def step(self, t, x, mem1, mem2, last):
        return super().step(t, x * (1.0 + 0.1 * t), mem1, mem2, last)


class CountsCalls(Base):
    def step(self, t, x, mem1, mem2, last):
        self.calls += 1
        return super().step(t, x + 0.5 * self.calls, mem1, mem2, last)


class FeedsBack(Base):
    def step(self, t, x, mem1, mem2, last):
        return super().step(t, x + 0.1 * last, mem1, mem2, last)


class UsesTwice(Base):
    def step(self, t, x, mem1, mem2, last):
        spk1, mem1 = self.lif1(self.fc1(x), mem1)
        spk2, mem1 = self.lif1(self.fc2(spk1), mem1)
        return spk2, mem1, mem2


class UsesAStranger(Base):
    def step(self, t, x, mem1, mem2, last):
        return super().step(t, x * self.hidden, mem1, mem2, last)


def drive():
    return sample(T, B, 8) * 2


class Gated(nn.Module):
    """One step per call, hidden states, a branch; every second-order layer and a recurrent one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = excite(nn.Linear(8, 8))
        self.synaptic = snn.Synaptic(alpha=0.6, beta=0.9, init_hidden=True)
        self.recurrent = snn.RLeaky(beta=0.9, linear_features=8, init_hidden=True)
        self.out = snn.Leaky(0.8, init_hidden=True, output=True, learn_beta=True)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        x = self.synaptic(self.fc(x))
        x = self.recurrent(x * self.gain) + (0.5 if x.sum() > 10 else 0.0)
        return self.out(x)


class EveryConvention(nn.Module):
    """States by hand in each of snnTorch's orders, by place and by name, and parameters read off the layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.fc = nn.ModuleList([excite(nn.Linear(8, 8)) for _ in range(5)])
        self.alpha = snn.Alpha(alpha=0.9, beta=0.5)
        self.synaptic = snn.Synaptic(alpha=0.7, beta=0.9, learn_beta=True)
        self.lapicque = snn.Lapicque(beta=0.8)
        self.recurrent = snn.RSynaptic(alpha=0.5, beta=0.8, linear_features=8)
        self.out = snn.Leaky(torch.rand(8), learn_threshold=True, reset_mechanism="zero")

    def forward(self, x):
        exc, inh, mem1 = self.alpha.init_alpha()
        syn2, mem2 = self.synaptic.init_synaptic()
        mem3, (spk4, syn4, mem4) = self.lapicque.init_lapicque(), self.recurrent.init_rsynaptic()
        mem5, series = self.out.init_leaky(), []
        for t in range(len(x)):
            current = self.drop(self.norm(x[t]))
            spk, exc, inh, mem1 = self.alpha(self.fc[0](current) * 3, exc, inh, mem1)
            spk, syn2, mem2 = self.synaptic(self.fc[1](spk + current), syn2, mem2)
            if spk.sum() > 3:
                spk = spk * self.synaptic.beta
            spk, mem3 = self.lapicque(self.fc[2](spk + current), mem=mem3)
            spk4, syn4, mem4 = self.recurrent(self.fc[3](spk + current), spk4, syn4, mem4)
            spk, mem5 = self.out(self.fc[4](spk4) + current * self.out.threshold, mem5)
            series.append(spk + 0.1 * mem5)
        return torch.stack(series), {"first": mem1, "recurrent": mem4}


class SinabsBranches(nn.Module):
    """Whole sequences of sinabs, a `Squeeze` layer and a recurrent one, behind a branch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.lif1 = excite(nn.Linear(8, 8), 20), sl.LIF(6.0)
        self.fc2, self.lif2 = excite(nn.Linear(8, 8), 20), sl.IAFSqueeze(batch_size=B)
        self.lif3 = sl.LIFRecurrent(tau_mem=8.0, rec_connect=nn.Linear(8, 8), norm_input=False)

    def forward(self, x):
        x = self.lif1(self.fc1(x))
        if x.sum() > 3:
            x = x * 1.5
        x = self.lif2(self.fc2(x.flatten(0, 1))).unflatten(0, (B, -1))
        return self.lif3(x)


def check_twin(source, x, result):
    """Verified, and the same bits for the sample, another length and another batch size."""
    assert result.agreement.ok, result.agreement
    assert result.agreement.spike_mismatches == 0
    assert result.agreement.steps == T
    with torch.no_grad():
        assert torch.equal(source(x), result.run(x))
        longer = torch.cat([x, x[:3]]).repeat(1, 2, 1)
        assert torch.equal(source(longer), result.run(longer))


class ResetsItsLayers(Base):
    """It resets snnTorch's layers alone, from outside: a second call shows whether a target's layers hear it."""

    def __init__(self):
        super().__init__()
        self.lif3 = snn.Leaky(0.9, init_hidden=True)

    def forward(self, x):
        for module in self.modules():
            if isinstance(module, snn.Leaky):
                module.reset_mem()
        return torch.stack([self.step3(self.fc1(step) * (1 + 0.1 * t)) for t, step in enumerate(x)])

    def step3(self, x):
        return self.lif3(x)
