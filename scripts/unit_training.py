"""What the scripts that compare ways to remove units share: Fashion-MNIST in memory, a training loop, rows in CSV."""

import csv
import fcntl
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from project.data import FashionMNIST

SHAPE = (1, 28, 28)
WRAP: dict[str, Any] = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
"""Arguments of :func:`textwrap.wrap` for the pages."""


class Data:
    """Training and test images of Fashion-MNIST in memory, normalised.

    Args:
        num_images: number of training images, 1 or more, drawn at random but always the same ones.
        num_test: number of test images, 1 or more; ``None`` takes all.
    """

    def __init__(self, num_images: int, num_test: int | None = None) -> None:
        data = FashionMNIST()
        images, labels = data.load(train=False)
        self.test = _normalised(data, images[:num_test], labels[:num_test])
        images, labels = data.load(train=True)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:num_images]
        self.train = _normalised(data, images[chosen], labels[chosen])


def _normalised(data: FashionMNIST, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return data.normalize(images.float().div(255)), labels


def fit_(
    net: nn.Module,
    data: Data,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    seed: int,
    penalty: nn.Module | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """Train a net in place, with horizontal flips and a rate that rises in the first fifth and then falls to 0.

    Args:
        net: net that maps images ``[N, 1, 28, 28]`` to logits.
        data: the images.
        epochs: number of epochs, 1 or more.
        optimizer: optimizer of the net's parameters, with the largest rate.
        seed: seed of the batches and flips, any int.
        penalty: function of the net that is added to the loss.
        memory_format: order of the images' numbers in memory.
    """
    images, labels = data.train
    generator, batch = torch.Generator().manual_seed(seed), 128
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))
    )
    net.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator)[: steps // epochs * batch].split(batch):
            flipped = (torch.rand(batch, generator=generator) < 0.5)[:, None, None, None]
            taken = images[chosen]
            logits = net(torch.where(flipped, taken.flip(3), taken).contiguous(memory_format=memory_format))
            loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            if penalty is not None:
                loss = loss + penalty(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(net: nn.Module, data: Data) -> float:
    """Share of the test images whose class a net finds."""
    net.eval()
    hits = [(net(images).argmax(1) == labels).sum() for images, labels in _chunks(*data.test)]
    return float(sum(hits)) / len(data.test[1])


def _chunks(images: Tensor, labels: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(images.split(500), labels.split(500), strict=True)


def append_row(row: Any, path: Path) -> None:
    """Add a dataclass to a CSV file, whose first line names the fields. Other processes wait."""
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.writer(file, lineterminator="\n")
        if not path.stat().st_size:
            writer.writerow([each.name for each in fields(row)])
        writer.writerow([round(value, 4) if isinstance(value, float) else value for value in astuple(row)])
        file.flush()


def spread(values: Sequence[float], sign: str = "", digits: int = 2) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"
