"""Small networks of snnTorch and of sinabs to convert, and how their users run them."""

import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from torch import nn

T, B = 60, 5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(inputs, outputs, seed=0, scale=3.0):
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator(seed)) * scale / inputs**0.5)
        layer.bias.copy_(torch.randn(outputs, generator=generator(seed + 1)) * 0.1)
    return layer


def snn_net(last=None, **options):
    """Two layers of Leaky; options go to both, `last` to the second."""
    first = snn.Leaky(**{"beta": torch.linspace(0.5, 0.95, 12), "init_hidden": True, **options})
    second = snn.Leaky(**{"beta": 0.8, "init_hidden": True, **options, **(last or {})})
    return nn.Sequential(linear(8, 12), first, linear(12, 4, 3), second)


def sinabs_net(**options):
    given = {"spike_fn": activation.SingleSpike, "norm_input": False, **options}
    scale = 12.0 if given["norm_input"] else 3.0
    first = sl.LIF(torch.linspace(2, 15, 12), spike_threshold=torch.tensor(1.0), **given)
    second = sl.LIF(6.0, spike_threshold=torch.tensor(1.0), **given)
    return nn.Sequential(linear(8, 12, scale=scale), first, linear(12, 4, 3, scale), second)


def sample(*shape, seed=7):
    return torch.rand(shape or (T, B, 8), generator=generator(seed))


def own_run(net, xs):
    """An snnTorch network over [T, B, ...] as its users run it: spikes, and membranes of the last layer if returned."""
    for layer in net.modules():
        if isinstance(layer, snn.Leaky):
            layer.mem = torch.zeros(0)
    results = [net(x) for x in xs]
    if isinstance(results[0], tuple):
        return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])
    return torch.stack(results)


def own_sinabs(net, xs):
    for layer in net.modules():
        if isinstance(layer, sl.StatefulLayer):
            layer.reset_states()
    return net(xs)
