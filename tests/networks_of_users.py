"""Networks as third parties write them: habits of snnTorch's and sinabs's users, each in a network of its own."""

import itertools

import sinabs
import sinabs.from_torch
import sinabs.layers as sl
import snntorch as snn
import snntorch.utils
import torch
import torch.nn.functional as F
from torch import nn

from tests.networks import excite, sample


class Population(nn.Module):
    """A static image, several output neurons for each class, their counts summed."""

    def __init__(self, steps=10):
        super().__init__()
        grad = snn.surrogate.fast_sigmoid(slope=25)
        self.steps = steps
        self.fc1, self.lif1 = excite(nn.Linear(64, 32)), snn.Leaky(beta=0.9, spike_grad=grad)
        self.fc2, self.lif2 = excite(nn.Linear(32, 50)), snn.Leaky(beta=0.9, spike_grad=grad, output=True)

    def forward(self, data):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        recorded = []
        x = data.view(data.size(0), -1)
        for _ in range(self.steps):
            spk, mem1 = self.lif1(self.fc1(x), mem1)
            spk, mem2 = self.lif2(self.fc2(spk), mem2)
            recorded.append(spk)
        counts = torch.stack(recorded).sum(0)
        return counts.view(-1, 10, 5).sum(2), counts


class WritesClasses(Population):
    """The same, each class written into a tensor."""

    def forward(self, data):
        counts = super().forward(data)[1]
        out = torch.zeros(counts.shape[0], 10)
        for k in range(10):
            out[:, k] = counts[:, 5 * k : 5 * k + 5].sum(1)
        return out


class Block(nn.Module):
    """A residual block that changes a list of membranes."""

    def __init__(self, channels, beta=0.8):
        super().__init__()
        self.conv1 = excite(nn.Conv2d(channels, channels, 3, padding=1, bias=False), 2)
        self.bn1, self.lif1 = nn.BatchNorm2d(channels), snn.Leaky(beta)
        self.conv2 = excite(nn.Conv2d(channels, channels, 3, padding=1, bias=False), 2)
        self.bn2, self.lif2 = nn.BatchNorm2d(channels), snn.Leaky(beta)

    def start(self):
        return [self.lif1.init_leaky(), self.lif2.init_leaky()]

    def forward(self, x, mems):
        out, mems[0] = self.lif1(self.bn1(self.conv1(x)), mems[0])
        out, mems[1] = self.lif2(self.bn2(self.conv2(out)) + x, mems[1])
        return out, mems


class Residual(nn.Module):
    """Convolutions, batch norm, dropout, skip connections, [B, T, ...] permuted, blocks in a ModuleList."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(excite(nn.Conv2d(1, 4, 3, padding=1)), nn.BatchNorm2d(4))
        self.lif0, self.blocks = snn.Leaky(0.8, learn_beta=True), nn.ModuleList([Block(4), Block(4)])
        self.drop, self.pool = nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2)
        self.fc, self.lif = excite(nn.Linear(16, 10)), snn.Leaky(0.9)

    def forward(self, x):
        mem0, mem, mems = self.lif0.init_leaky(), self.lif.init_leaky(), [block.start() for block in self.blocks]
        spk_rec, mem_rec = [], []
        for step in x.permute(1, 0, 2, 3, 4):
            spk, mem0 = self.lif0(self.stem(step), mem0)
            for k, block in enumerate(self.blocks):
                spk, mems[k] = block(spk, mems[k])
            spk = F.avg_pool2d(spk, 2) if spk.shape[-1] > 4 else spk
            spk, mem = self.lif(self.fc(self.drop(self.pool(spk).flatten(1))), mem)
            spk_rec.append(spk)
            mem_rec.append(mem)
        return torch.stack(spk_rec, dim=0), torch.stack(mem_rec, dim=0)


class AutoEncoder(nn.Module):
    """Hidden states, membranes passed on between the parts, transposed convolutions; the last membrane is the image."""

    def __init__(self, steps=8):
        super().__init__()
        hidden = {"beta": 0.9, "init_hidden": True, "threshold": 0.5}
        self.steps = steps
        self.encoder = nn.Sequential(
            excite(nn.Conv2d(1, 4, 3, padding=1, stride=2)),
            nn.BatchNorm2d(4),
            snn.Leaky(**hidden),
            nn.Flatten(1, 3),
            excite(nn.Linear(64, 12)),
            snn.Leaky(**hidden, output=True),
        )
        self.latent = nn.Sequential(excite(nn.Linear(12, 64)), snn.Leaky(**hidden, output=True))
        self.decoder = nn.Sequential(*self.layers(hidden))

    def layers(self, hidden):
        last = {**hidden, "threshold": 20000, "reset_mechanism": "none"}
        return [
            nn.Unflatten(1, (4, 4, 4)),
            snn.Leaky(**hidden),
            excite(nn.ConvTranspose2d(4, 4, 3, padding=1, stride=2, output_padding=1)),
            nn.BatchNorm2d(4),
            snn.Leaky(**hidden),
            excite(nn.Conv2d(4, 1, 3, padding=1)),
            nn.Sigmoid(),
            snn.Leaky(**last, output=True),
        ]

    def forward(self, x):
        snn.utils.reset(self.encoder)
        snn.utils.reset(self.latent)
        snn.utils.reset(self.decoder)
        recorded = []
        for _ in range(self.steps):
            spk, _ = self.encoder(x)
            _, mem = self.latent(spk)
            _, image = self.decoder(mem)
            recorded.append(image)
        return torch.stack(recorded, dim=4)[:, :, :, :, -1]


class Upsampling(AutoEncoder):
    """The same with upsampling, by a module and by a function."""

    def layers(self, hidden):
        first, neuron, _, _, _, conv, _, readout = super().layers(hidden)
        return [first, neuron, nn.Upsample(scale_factor=2), Interpolates(), conv, readout]


class Interpolates(nn.Module):
    """A function as a module of the user's own."""

    def forward(self, x):
        return F.interpolate(x[:, :, ::2, ::2], scale_factor=2, mode="nearest")


class TruncatedRecurrence(nn.Module):
    """A recurrent layer, backpropagation truncated every four steps, the membrane of a readout out."""

    def __init__(self):
        super().__init__()
        self.fc1, self.rlif = excite(nn.Linear(8, 16)), snn.RLeaky(beta=0.9, linear_features=16)
        self.fc2, self.out = excite(nn.Linear(16, 4)), snn.Leaky(0.9, reset_mechanism="none")

    def forward(self, x):
        (spk, mem), out, recorded = self.rlif.init_rleaky(), self.out.init_leaky(), []
        for t in range(x.size(0)):
            if t % 4 == 0 and t > 0:
                spk, mem, out = spk.detach(), mem.detach(), out.detach()
            spk, mem = self.rlif(self.fc1(x[t]), spk, mem)
            _, out = self.out(self.fc2(spk), out)
            recorded.append(out)
        return torch.stack(recorded)


class Allocates(nn.Module):
    """Spikes written into a tensor made before the loop, and a running sum."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif = excite(nn.Linear(8, 16)), snn.Leaky(0.9)

    def forward(self, x):
        mem, recorded, total = self.lif.reset_mem(), torch.zeros(x.size(0), x.size(1), 16), 0
        for t in range(x.size(0)):
            spk, mem = self.lif(self.fc1(x[t]), mem)
            recorded[t] = spk
            total = total + spk
        return recorded, total / x.size(0)


class ListsOfStates(nn.Module):
    """Layers and their states in lists; the last states are returned."""

    def __init__(self, sizes=(8, 16, 12, 10)):
        super().__init__()
        self.fcs = nn.ModuleList([excite(nn.Linear(a, b)) for a, b in itertools.pairwise(sizes)])
        self.lifs = nn.ModuleList([snn.Synaptic(alpha=0.7, beta=0.8) for _ in sizes[1:]])

    def forward(self, x):
        states, outs = [lif.init_synaptic() for lif in self.lifs], []
        for value in x.unbind(0):
            for k, (fc, lif) in enumerate(zip(self.fcs, self.lifs, strict=True)):
                value, *states[k] = lif(fc(value), *states[k])
            outs.append(value)
        return torch.stack(outs), [state[-1] for state in states]


class EveryState(nn.Module):
    """Currents and membranes out, of a recurrent layer too, stacked, unstacked, the last and the largest."""

    def __init__(self):
        super().__init__()
        self.fc, self.first = excite(nn.Linear(8, 8)), snn.Synaptic(0.7, 0.8)
        self.second = snn.RSynaptic(0.7, 0.8, linear_features=8)

    def forward(self, x):
        (syn1, mem1), (spk2, syn2, mem2) = self.first.init_synaptic(), self.second.init_rsynaptic()
        spikes, currents, membranes = [], [], []
        for step in x:
            spk, syn1, mem1 = self.first(self.fc(step), syn1, mem1)
            spk2, syn2, mem2 = self.second(spk, spk2, syn2, mem2)
            spikes.append(spk2)
            currents.append(syn1)
            membranes.append(torch.cat([mem1, syn2, mem2], 1))
        return spikes, torch.stack(currents), torch.stack(membranes).max(0)[0], mem1, syn2


class KeepsItsState(nn.Module):
    """One step per call, the membrane kept as an attribute of the network."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif, self.mem = excite(nn.Linear(8, 16)), snn.Leaky(0.9), None

    def forward(self, x):
        if self.mem is None:
            self.mem = self.lif.init_leaky()
        spk, self.mem = self.lif(self.fc1(x), self.mem)
        return spk


class TupleOfStates(nn.Module):
    """One step per call, the states handed in and out as a tuple."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif1, self.lif2 = excite(nn.Linear(8, 8)), snn.Leaky(0.8), snn.Leaky(0.7)

    def forward(self, x, states=None):
        mem1, mem2 = (None, None) if states is None else states
        spk, mem1 = self.lif1(self.fc(x), mem1)
        spk, mem2 = self.lif2(spk * 2, mem2)
        return spk, (mem1, mem2)


class Tied(nn.Module):
    """One matrix used twice, norms, a module that trains and has no name here, a number of steps as an argument."""

    def __init__(self):
        super().__init__()
        self.fc, self.layer, self.group, self.act = (
            excite(nn.Linear(8, 8)), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.PReLU(),
        )  # fmt: skip
        self.lif1, self.lif2 = snn.Leaky(0.8, init_hidden=True), snn.Leaky(0.7, init_hidden=True)

    def forward(self, x, num_steps=9):
        snn.utils.reset(self)
        steps = range(num_steps)
        return torch.stack(
            [self.lif2(self.act(self.group(self.fc(self.lif1(self.layer(self.fc(x))))))) for _ in steps], 1
        )


class Attention(nn.Module):
    """Spikes as queries, einsum, softmax, a buffer as a scale."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.lif, self.out = excite(nn.Linear(8, 8)), nn.Linear(8, 8), snn.Leaky(0.8), snn.Leaky(0.8)
        self.register_buffer("scale", torch.tensor(0.3))

    def forward(self, x):
        mem, out, recorded = self.lif.init_leaky(), self.out.init_leaky(), []
        for step in x:
            spk, mem = self.lif(self.q(step), mem)
            scores = torch.softmax(torch.einsum("bi,bj->bij", spk, self.k(step)) * self.scale, -1)
            spk, out = self.out((scores @ spk.unsqueeze(-1)).squeeze(-1) * 3, out)
            recorded.append(spk)
        return torch.stack(recorded)


class Frozen(nn.Module):
    """A part of the forward without gradients."""

    def __init__(self):
        super().__init__()
        self.fc, self.fc2, self.lif = excite(nn.Linear(8, 8)), excite(nn.Linear(8, 8)), snn.Leaky(0.8)

    def forward(self, x):
        mem, recorded = self.lif.init_leaky(), []
        for step in x:
            with torch.no_grad():
                hidden = self.fc(step)
            spk, mem = self.lif(self.fc2(hidden) + step, mem)
            recorded.append(spk)
        return torch.stack(recorded)


# ---- sinabs ----------------------------------------------------------------------------------------------------------


def from_an_ann():
    """What sinabs makes of a trained network of ReLUs."""
    ann = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 10, bias=False),
        nn.ReLU(),
    )
    for module in ann:
        if hasattr(module, "weight"):
            excite(module)
    return sinabs.from_torch.from_model(ann, input_shape=(1, 8, 8), batch_size=4, add_spiking_output=False)


class Repeats(nn.Module):
    """Several modules in one `Repeat`, a reset in the forward, the largest membrane."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            sl.Repeat(nn.Sequential(excite(nn.Conv2d(2, 4, 3, padding=1), 10), nn.BatchNorm2d(4))),
            sl.LIF(tau_mem=10.0),
            sl.Repeat(nn.AvgPool2d(2)),
            sl.Repeat(nn.Dropout2d(0.3)),
            nn.Flatten(2),
            excite(nn.Linear(64, 10), 10),
            sl.ExpLeak(tau_mem=20.0),
        )

    def forward(self, x):
        sinabs.reset_states(self)
        return self.net(x).max(1)[0]


class Squeezed(nn.Module):
    """A residual network of `Squeeze` layers, folded and unfolded by hand, cropped."""

    def __init__(self, batch=4):
        super().__init__()
        options = {"batch_size": batch, "min_v_mem": -1.0}
        self.conv1, self.spike1 = excite(nn.Conv2d(2, 4, 3, padding=1)), sl.IAFSqueeze(**options)
        self.conv2 = excite(nn.Conv2d(4, 4, 3, padding=1))
        self.spike2 = sl.IAFSqueeze(**options, spike_fn=sinabs.activation.SingleSpike)
        self.merge, self.crop, self.pool = sl.Merge(), sl.Cropping2dLayer(((1, 1), (1, 1))), sl.SumPool2d(2)
        self.fc, self.spike3 = excite(nn.Linear(36, 10)), sl.IAFSqueeze(batch_size=batch)

    def forward(self, x):
        batch, steps = x.shape[:2]
        first = self.spike1(self.conv1(x.reshape(batch * steps, *x.shape[2:])))
        second = self.spike2(self.conv2(first))
        pooled = self.pool(self.crop(self.merge(first, second))).flatten(1)
        return self.spike3(self.fc(pooled)).reshape(batch, steps, -1).mean(1)


class StepByStep(nn.Module):
    """Layers of sinabs called once a step by a loop of the user's."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif = excite(nn.Linear(8, 8), 15), sl.LIF(6.0)

    def forward(self, x):
        return torch.stack([self.lif(self.fc(x[:, t]).unsqueeze(1)).squeeze(1) for t in range(x.shape[1])], 1)


# name -> (network, sample, time_dim, whether it is stepped)
CASES = {
    "population": (Population, sample(4, 1, 8, 8), None, False),
    "writes classes": (WritesClasses, sample(4, 1, 8, 8), None, True),
    "residual": (Residual, sample(4, 8, 1, 8, 8), None, False),
    "autoencoder": (AutoEncoder, sample(4, 1, 8, 8), None, False),
    "upsampling": (Upsampling, sample(4, 1, 8, 8), None, False),
    "truncated recurrence": (TruncatedRecurrence, sample(12, 4, 8), None, True),
    "allocates": (Allocates, sample(12, 4, 8) * 2, None, True),
    "lists of states": (ListsOfStates, sample(12, 4, 8) * 2, None, False),
    "every state": (EveryState, sample(12, 4, 8) * 2, None, False),
    "keeps its state": (KeepsItsState, sample(12, 4, 8) * 2, 0, True),
    "tuple of states": (TupleOfStates, sample(12, 4, 8) * 2, 0, False),
    "tied": (Tied, sample(4, 8) * 2, None, False),
    "attention": (Attention, sample(12, 4, 8) * 2, None, False),
    "frozen": (Frozen, sample(12, 4, 8) * 2, None, True),
    "from an ANN": (from_an_ann, sample(32, 1, 8, 8), None, False),
    "repeats": (Repeats, sample(4, 8, 2, 8, 8), None, False),
    "squeezed": (Squeezed, sample(4, 8, 2, 8, 8), None, False),
    "step by step": (StepByStep, sample(4, 12, 8) * 2, None, True),
}


def make(name):
    """A network in evaluation mode, its sample, time dimension, and whether it is stepped; the same every time."""
    torch.manual_seed(0)
    network, x, time_dim, stepped = CASES[name]
    return network().eval(), x, time_dim, stepped
