"""Learn the scikit-learn digits online, one image at a time, one step per call: `python examples/online_digits.py`.

Each image is a stream of random spikes. The network keeps traces and membranes and nothing else of the stream; when it
ends, one learning signal comes in. No image is kept either: the next one meets the network as the last one left it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import tracetorch as tt

STEPS, HIDDEN = 25, 128
RATES = {"average": 1e-3, "ottt": 1e-3, "bptt": 1e-3}  # learning rates


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels in [0, 1] and labels: 1,347 images to train on, 450 to test."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[450:], order[:450]
    return images[train], labels[train], images[test], labels[test]


def network(rule: str) -> tt.nn.Sequential:
    """A layer of spikes and a read-out."""
    return tt.nn.Sequential(
        tt.nn.LIF(64, HIDDEN, bias=True, rule=rule),
        tt.nn.LIS(HIDDEN, 10, mem_decay=0.95, rule=rule),
    )


def show(net: tt.nn.Sequential, image: Tensor) -> Tensor:
    """Show images [B, 64] as random spikes, one step per call; returns the read-out after the last step, [B, 10]."""
    net.reset_states()
    for _ in range(STEPS):
        outputs, _ = net(torch.rand_like(image) < image)
    return outputs


@torch.no_grad()
def accuracy(net: tt.nn.Sequential, images: Tensor, labels: Tensor) -> float:
    """The share of images that the read-out names rightly."""
    return float((show(net, images).argmax(1) == labels).float().mean())


def learn(rule: str = "average", passes: int = 3, every: int = 200, seed: int = 0) -> Iterator[tuple[int, float]]:
    """Yields how many images were seen, and the accuracy on the test images then."""
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = data()
    net = network(rule)
    optimizer = torch.optim.Adam(net.parameters(), RATES[rule])
    seen = 0
    for _ in range(passes):
        for k in torch.randperm(len(images)).tolist():
            likelihood = show(net, images[k : k + 1])[0, labels[k]]
            optimizer.zero_grad()
            (-torch.log(likelihood.clamp(min=1e-6))).backward()
            optimizer.step()
            seen += 1
            if seen % every == 0:
                yield seen, accuracy(net, test_images, test_labels)
    if seen % every:
        yield seen, accuracy(net, test_images, test_labels)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for seen, found in learn():
        logging.info("%5d images seen, accuracy on unseen digits %.1f %%", seen, 100 * found)
