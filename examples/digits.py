"""Train a native network on the scikit-learn digits with `tt.unroll`, in ten seconds: `python examples/digits.py`."""

from __future__ import annotations

import logging

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tracetorch as tt

STEPS, BATCH = 16, 64


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels in [0, 1] and labels: 1,347 images to train on, 450 to test."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[450:], order[:450]
    return images[train], labels[train], images[test], labels[test]


def network() -> tt.Sequential:
    """A layer of hard spikes and a read-out of membranes."""
    return tt.Sequential(
        nn.Linear(64, 128),
        tt.snn.LIB(128, beta=0.8, quant_fn=tt.functional.round_ste()),
        nn.Linear(128, 10),
        tt.snn.LI(10, beta=0.9),
    )


def scores(net: tt.Sequential, images: Tensor, fold: str) -> Tensor:
    """The mean membrane of the read-out while the image is shown for `STEPS` steps; "loop" steps by hand."""
    net.reset_states()
    xs = images.expand(STEPS, *images.shape)
    ys = torch.stack([net(x) for x in xs]) if fold == "loop" else tt.unroll(net, xs, fold=fold)
    return ys.mean(0)


def train(fold: str = "fast", epochs: int = 12, seed: int = 0) -> tuple[float, list[float]]:
    """Returns the accuracy on the test images, and the loss of every batch."""
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = data()
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    losses = []
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = nn.functional.cross_entropy(scores(net, images[batch], fold), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    with torch.no_grad():
        accuracy = (scores(net, test_images, fold).argmax(1) == test_labels).float().mean()
    return float(accuracy), losses


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    accuracy, losses = train()
    logging.info("loss %.3f -> %.3f, accuracy on unseen digits %.1f %%", losses[0], losses[-1], 100 * accuracy)
