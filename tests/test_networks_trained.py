"""Whole networks trained on the digits for an epoch, converted, and trained for another in the target."""

from functools import partial

import pytest
import snntorch as snn
import torch
import torch.nn.functional as F

from tests.networks import CASES, FRAMEWORKS, STEPS, forget, make, own, sinabs_events, sinabs_mnist, tensors
from tracetorch import adapters

BATCH = 32


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return images, torch.from_numpy(data.target)


def rows_as_steps(x):
    """[B, 1, 8, 8] -> [T, B, 8]."""
    return x.squeeze(1).transpose(0, 1)


def repeated(x):
    """[B, ...] -> [T, B, ...]."""
    return x.expand(STEPS, *x.shape)


# A batch of digits [B, 1, 8, 8] as each network takes it.
TAKES = {
    "static": lambda x: x.flatten(1),
    "conv": lambda x: x,
    "hidden conv": repeated,
    "events": repeated,
    "regression": rows_as_steps,
    "recurrent": rows_as_steps,
    "one step": lambda x: repeated(x.flatten(1)),
    "skips": lambda x: repeated(x).transpose(0, 1),
    "sinabs mnist": lambda x: repeated(x).transpose(0, 1).flatten(0, 1),
    "sinabs events": lambda x: repeated(x).transpose(0, 1),
    "sinabs skips": lambda x: repeated(x.flatten(1)).transpose(0, 1),
    "sinabs recurrent": lambda x: rows_as_steps(x).transpose(0, 1),
}


def network(name):
    """The network for batches of this size, as `tests.networks` has it, and its time dimension."""
    net, _, time_dim = make(name)
    torch.manual_seed(0)
    if name == "sinabs mnist":
        net = sinabs_mnist(BATCH)
    if name == "sinabs events":
        net = sinabs_events(BATCH)
    if name == "recurrent":
        net.fc1 = torch.nn.Linear(8, 16)
    if name == "regression":  # not so near 0 that an epoch brings them there, where sinabs has no such reset
        net.lif.beta.data.mul_(0.7).add_(0.2)
    return net.train(), time_dim


def scores(name, y):
    """[B, classes] of what a network returns first."""
    if name == "sinabs mnist":
        return y.unflatten(0, (BATCH, -1)).sum(1)
    if y.ndim == 2:
        return y
    return y.sum(1) if name.startswith("sinabs") else y.sum(0)


def loss_of(name, y, labels):
    """Cross entropy of the counted spikes; of the regression, the distance of the mean membrane to the digit."""
    if name == "regression":
        return (y.mean(0).squeeze(1) - labels / 10).square().mean()
    return F.cross_entropy(scores(name, y), labels)


def epoch(name, run, parameters):
    """One epoch of training on what a network returns first; the losses."""
    images, labels = digits()
    optimizer = torch.optim.Adam(parameters, lr=1e-2 if name == "sinabs events" else 1e-3)
    losses = []
    for start in range(0, len(images) - BATCH + 1, BATCH):
        y = tensors(run(TAKES[name](images[start : start + BATCH])))[0]
        loss = loss_of(name, y, labels[start : start + BATCH])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(agreement, to):
    assert agreement.ok, agreement
    assert agreement.unexplained_mismatches == 0
    if to == "tracetorch":
        assert agreement.spike_mismatches == 0


@pytest.mark.sweep
@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_trained_before_and_after_on_the_digits(name, to):
    net, time_dim = network(name)
    before = epoch(name, partial(own, net, time_dim=time_dim), net.parameters())
    assert sum(before[-10:]) < sum(before[:10])
    x = TAKES[name](digits()[0][:BATCH])
    result = adapters.convert(net, to=to, sample=x, time_dim=time_dim)
    check(result.agreement, to)
    after = epoch(name, result.run, result.model.parameters())
    assert sum(after[-10:]) < sum(before[:10])
    check(result.verify(x, carry_back=True), to)


def test_a_decay_that_is_trained_to_zero_is_no_nan_in_sinabs():
    torch.manual_seed(0)
    lif = snn.Leaky(beta=torch.tensor([0.9, 0.1, 0.1]), learn_beta=True, init_hidden=True)
    x = torch.rand(20, 4, 3) * 2
    result = adapters.convert(torch.nn.Sequential(lif), to="sinabs", sample=x, time_dim=0, share_weights=True)
    with torch.no_grad():
        lif.beta.copy_(torch.tensor([0.9, 0.0, -0.5]))
    forget(lif)
    spikes, ours = torch.stack([lif(step) for step in x]), result.run(x)
    assert spikes[..., 1:].sum() > 20
    assert torch.equal(ours, spikes)
    theirs, found = (torch.autograd.grad(y.square().mean(), lif.beta, retain_graph=True)[0] for y in (spikes, ours))
    torch.testing.assert_close(found[[0, 2]], theirs[[0, 2]])
    assert found.isfinite().all()


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_running_statistics_that_the_target_trained_are_carried_back(to):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), snn.Leaky(0.8, init_hidden=True)).eval()
    x = torch.rand(STEPS, 8, 8) * 4
    result = adapters.convert(net, to=to, sample=x, time_dim=0)
    result.model.train()
    result.run(x * 3)
    result.model.eval()
    agreement = result.verify(x)
    assert not agreement.ok
    assert set(agreement.changed_parameters) == {"1.running_mean", "1.running_var"}
    before = net[1].running_var.clone()
    assert result.verify(x, carry_back=True).ok
    assert torch.equal(net[1].running_var, before)
