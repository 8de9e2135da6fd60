"""Networks as their frameworks' users write them, rewritten from the descriptions of the frameworks' tutorials."""

import sinabs.layers as sl
import snntorch as snn
import snntorch.utils
import torch
import torch.nn.functional as F
from sinabs.network import Network
from torch import nn

STEPS = 12


def excite(module, scale=4.0):
    """Weights large enough that a random network fires."""
    with torch.no_grad():
        module.weight.mul_(scale)
    return module


class StaticFullyConnected(nn.Module):
    """snnTorch's tutorial 5: a static image given to every step, membranes by hand, spikes and membranes out."""

    def __init__(self, inputs=64, hidden=24, outputs=10, beta=0.95):
        super().__init__()
        self.fc1 = excite(nn.Linear(inputs, hidden))
        self.lif1 = snn.Leaky(beta=beta)
        self.fc2 = excite(nn.Linear(hidden, outputs))
        self.lif2 = snn.Leaky(beta=beta)

    def forward(self, x):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk2_rec, mem2_rec = [], []
        for _ in range(STEPS):
            cur1 = self.fc1(x)
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


class Convolutional(nn.Module):
    """snnTorch's tutorial 6 as a class: one image over several steps, pooled currents, `view` with the batch size."""

    def __init__(self, beta=0.8):
        super().__init__()
        self.conv1 = excite(nn.Conv2d(1, 4, 3))
        self.lif1 = snn.Leaky(beta=beta, spike_grad=snn.surrogate.fast_sigmoid(slope=25))
        self.conv2 = excite(nn.Conv2d(4, 6, 2))
        self.lif2 = snn.Leaky(beta=beta, spike_grad=snn.surrogate.fast_sigmoid(slope=25))
        self.fc1 = excite(nn.Linear(6, 10))
        self.lif3 = snn.Leaky(beta=beta, spike_grad=snn.surrogate.fast_sigmoid(slope=25))

    def forward(self, x):
        mem1, mem2, mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.reset_mem()
        spikes, membranes = [], []
        for _ in range(STEPS):
            cur1 = F.max_pool2d(self.conv1(x), 2)
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = F.max_pool2d(self.conv2(spk1), 2)
            spk2, mem2 = self.lif2(cur2, mem2)
            cur3 = self.fc1(spk2.view(x.size(0), -1))
            spk3, mem3 = self.lif3(cur3, mem3)
            spikes.append(spk3)
            membranes.append(mem3)
        return torch.stack(spikes), torch.stack(membranes)


def hidden_convolutional(beta=0.8):
    """snnTorch's tutorials 6 and 7 as an `nn.Sequential` with hidden states, called once per step."""
    grad = snn.surrogate.fast_sigmoid(slope=25)
    return nn.Sequential(
        excite(nn.Conv2d(1, 4, 3)),
        nn.MaxPool2d(2),
        snn.Leaky(beta=beta, spike_grad=grad, init_hidden=True),
        nn.Flatten(),
        excite(nn.Linear(36, 10)),
        snn.Leaky(beta=beta, spike_grad=grad, init_hidden=True, output=True),
    )


class EventConvolutional(nn.Module):
    """snnTorch's tutorial 7, events [T, B, C, H, W], the loop inside, hidden states, only spikes out."""

    def __init__(self, beta=0.7):
        super().__init__()
        self.features = nn.Sequential(
            excite(nn.Conv2d(1, 4, 3)), nn.MaxPool2d(2), snn.Leaky(beta=beta, init_hidden=True), nn.Flatten()
        )
        self.classify = nn.Sequential(excite(nn.Linear(36, 10)), snn.Leaky(beta=beta, init_hidden=True, output=True))

    def forward(self, data):
        snn.utils.reset(self.features)
        snn.utils.reset(self.classify)
        spk_rec = []
        for step in range(data.size(0)):
            spk_out, _ = self.classify(self.features(data[step]))
            spk_rec.append(spk_out)
        return torch.stack(spk_rec)


class Regression(nn.Module):
    """snnTorch's regression example: [T, B, 1] in, the membrane of a neuron without reset out, batch norm between."""

    def __init__(self, inputs=8, hidden=16):
        super().__init__()
        self.hidden = excite(nn.Linear(inputs, hidden))
        self.norm = nn.BatchNorm1d(hidden)
        self.lif = snn.Leaky(beta=torch.rand(hidden), learn_beta=True, threshold=0.5)
        self.to_output = nn.Linear(hidden, 1)
        self.readout = snn.Leaky(beta=torch.rand(1), learn_beta=True, reset_mechanism="none")

    def forward(self, x):
        mem, out = self.lif.init_leaky(), self.readout.init_leaky()
        recorded = []
        for step in x:
            spk, mem = self.lif(self.norm(self.hidden(step)), mem)
            _, out = self.readout(self.to_output(spk), out)
            recorded.append(out)
        return torch.stack(recorded, dim=0)


class RecurrentClassifier(nn.Module):
    """snnTorch's recurrent example: an RLeaky with all-to-all weights, an RSynaptic behind it, states by hand."""

    def __init__(self, inputs=8, hidden=16, outputs=10):
        super().__init__()
        self.fc1 = excite(nn.Linear(inputs, hidden))
        self.rlif1 = snn.RLeaky(beta=0.9, linear_features=hidden)
        self.fc2 = excite(nn.Linear(hidden, outputs))
        self.rlif2 = snn.RSynaptic(alpha=0.5, beta=0.8, linear_features=outputs)

    def forward(self, x):
        spk1, mem1 = self.rlif1.init_rleaky()
        spk2, syn2, mem2 = self.rlif2.init_rsynaptic()
        spikes, membranes = [], []
        for step in range(x.size(0)):
            spk1, mem1 = self.rlif1(self.fc1(x[step]), spk1, mem1)
            spk2, syn2, mem2 = self.rlif2(self.fc2(spk1), spk2, syn2, mem2)
            spikes.append(spk2)
            membranes.append(mem2)
        return torch.stack(spikes), torch.stack(membranes)


class OneStep(nn.Module):
    """A module whose forward is one step, membranes handed in and out."""

    def __init__(self, inputs=64, hidden=16, outputs=10):
        super().__init__()
        self.fc1, self.lif1 = excite(nn.Linear(inputs, hidden)), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = excite(nn.Linear(hidden, outputs)), snn.Leaky(beta=0.8, learn_beta=True)

    def forward(self, x, mem1=None, mem2=None):
        spk1, mem1 = self.lif1(self.fc1(x), mem1)
        spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
        return spk2, mem1, mem2


class Skips(nn.Module):
    """Skip connections, two outputs in a dict, a parameter of its own, batch first, the loop inside."""

    def __init__(self, inputs=64, hidden=16):
        super().__init__()
        self.fc1, self.lif1 = excite(nn.Linear(inputs, hidden)), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = excite(nn.Linear(hidden, hidden)), snn.Leaky(beta=0.8)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.fc3, self.lif3 = excite(nn.Linear(2 * hidden, 10)), snn.Leaky(beta=0.7, init_hidden=True)

    def forward(self, x):
        x = x.flatten(2)
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        self.lif3.reset_mem()
        spikes, hidden = [], []
        for t in range(x.shape[1]):
            spk1, mem1 = self.lif1(self.fc1(x[:, t]), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1) + self.gain * spk1, mem2)
            spikes.append(self.lif3(self.fc3(torch.cat([spk1, spk2], dim=1))))
            hidden.append(spk2)
        return {"rate": torch.stack(spikes, dim=1).mean(1), "hidden": torch.stack(hidden, dim=1)}


# ---- sinabs ----------------------------------------------------------------------------------------------------------


def sinabs_mnist(batch=4):
    """sinabs's MNIST network: convolutions and average pooling, `Squeeze` layers that hold the batch size."""
    options = {"batch_size": batch, "min_v_mem": -1.0}
    return Network(
        spiking_model=nn.Sequential(
            excite(nn.Conv2d(1, 4, 3, bias=False)),
            sl.IAFSqueeze(**options),
            nn.AvgPool2d(2, 2),
            nn.Dropout2d(0.5),
            nn.Flatten(),
            excite(nn.Linear(36, 10, bias=False), 2),
            sl.IAFSqueeze(**options),
        ).eval()
    )


def sinabs_events(batch=4):
    """sinabs's style for event cameras: time folded into the batch for convolutions, sum pooling, batch norm."""
    return nn.Sequential(
        sl.FlattenTime(),
        excite(nn.Conv2d(1, 4, 3)),
        nn.BatchNorm2d(4),
        sl.UnflattenTime(batch_size=batch),
        sl.LIF(tau_mem=10.0, norm_input=False),
        sl.FlattenTime(),
        sl.SumPool2d(2),
        nn.Flatten(),
        excite(nn.Linear(36, 10)),
        sl.UnflattenTime(batch_size=batch),
        sl.LIF(tau_mem=8.0, norm_input=False),
    ).eval()


class SinabsSkips(nn.Module):
    """A sinabs network with a forward of its own: a merge, a readout without spikes, sums over time."""

    def __init__(self, inputs=64):
        super().__init__()
        self.fc1, self.lif1 = excite(nn.Linear(inputs, 16), 20), sl.LIF(6.0)
        self.fc2, self.lif2 = excite(nn.Linear(16, 16), 20), sl.LIF(6.0, tau_syn=3.0)
        self.merge = sl.Merge()
        self.fc3, self.readout = nn.Linear(16, 10), sl.ExpLeak(5.0)

    def forward(self, x):
        first = self.lif1(self.fc1(x.flatten(2)))
        second = self.lif2(self.fc2(first))
        return self.readout(self.fc3(self.merge(first, second))).mean(1), second.sum(1), first


def sinabs_recurrent(inputs=8, hidden=16):
    """Recurrent layers of sinabs in a row."""
    return nn.Sequential(
        excite(nn.Linear(inputs, hidden), 20),
        sl.LIFRecurrent(tau_mem=8.0, rec_connect=nn.Linear(hidden, hidden)),
        excite(nn.Linear(hidden, 10)),
        sl.IAFRecurrent(rec_connect=nn.Linear(10, 10, bias=False)),
    )


def sample(*shape, seed=7):
    """Uniform numbers."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# name -> (network, sample, time_dim)
CASES = {
    "static": lambda: (StaticFullyConnected(), sample(4, 64), None),
    "conv": lambda: (Convolutional(), sample(4, 1, 8, 8), None),
    "hidden conv": lambda: (hidden_convolutional(), sample(STEPS, 4, 1, 8, 8), 0),
    "events": lambda: (EventConvolutional(), sample(STEPS, 4, 1, 8, 8), None),
    "regression": lambda: (Regression().eval(), sample(STEPS, 4, 8), None),
    "recurrent": lambda: (RecurrentClassifier(), sample(STEPS, 4, 8), None),
    "one step": lambda: (OneStep(), sample(STEPS, 4, 64), 0),
    "skips": lambda: (Skips(), sample(4, STEPS, 1, 8, 8), None),
    "sinabs mnist": lambda: (sinabs_mnist(), sample(4 * STEPS, 1, 8, 8), None),
    "sinabs events": lambda: (sinabs_events(), sample(4, STEPS, 1, 8, 8), None),
    "sinabs skips": lambda: (SinabsSkips(), sample(4, STEPS, 64), None),
    "sinabs recurrent": lambda: (sinabs_recurrent(), sample(4, STEPS, 8), None),
}
FRAMEWORKS = ("tracetorch", "snntorch", "sinabs")


def make(name):
    """A network, its sample and time dimension, the same every time."""
    torch.manual_seed(0)
    return CASES[name]()


def tensors(value):
    """The tensors of what a network returns, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in tensors(item)]


def forget(net):
    """The hidden states of a network's neurons, gone."""
    for module in net.modules():
        if isinstance(module, snn.SpikingNeuron):
            for name in ("mem", "syn", "spk"):
                if hasattr(module, name):
                    setattr(module, name, torch.zeros(0))
        elif isinstance(module, sl.StatefulLayer):
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, torch.zeros(0, dtype=buffer.dtype))


def own(net, x, time_dim):
    """What a source returns from its initial states, over its sequence: each tensor in turn."""
    forget(net)
    if time_dim is None:
        return tensors(net(x))
    states, series = (), []
    for step in x.unbind(time_dim):
        result = tensors(net(step, *states))
        series.append(result)
        states = tuple(result[1:]) if isinstance(net, OneStep) else ()
    return [torch.stack(each, time_dim) for each in zip(*series, strict=True)]
