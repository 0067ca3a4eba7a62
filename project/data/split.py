"""A validation split that keeps the proportions of the classes. It depends on the seed alone."""

import torch
from torch import Tensor

from project.data.random import SPLIT, BatchRandom


def stratified_split(labels: Tensor, val_fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split images into training and validation, class by class.

    Of each class the share ``val_fraction``, rounded down, goes to validation. The images that are then missing from
    ``round(N * val_fraction)`` come from the classes with the largest remainders. Every class keeps at least one image
    for training. The choice is a hash of (seed, index of the image), so it is the same on every machine and with every
    version of the packages.

    Args:
        labels: labels of the images, ``[N]`` integers.
        val_fraction: share of the images that goes to validation, in [0, 1).
        seed: seed of the split; any int.

    Returns:
        Training and validation indices, each sorted, int64.

    Raises:
        ValueError: if ``val_fraction`` is outside [0, 1).
    """
    check_fraction("val_fraction", val_fraction)
    _, which, counts = labels.unique(return_inverse=True, return_counts=True)
    shares = _largest_remainder(counts.tolist(), val_fraction)
    order = BatchRandom(seed, 0, torch.arange(len(labels)), SPLIT).permutation()
    order = order[which[order].argsort(stable=True)]  # class by class, random within a class
    starts = (counts.cumsum(0) - counts).tolist()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for start, share in zip(starts, shares, strict=True):
        held_out[order[start : start + share]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def check_fraction(name: str, value: float) -> None:
    """Raise a ``ValueError`` if a share leaves nothing for training."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}, but a held-out share lies in [0, 1): 0 holds nothing out, 0.1 a tenth.")


def _largest_remainder(counts: list[int], fraction: float) -> list[int]:
    """The number of held-out images of each class, by the largest remainder method."""
    quotas = [count * fraction for count in counts]
    shares = [int(quota) for quota in quotas]
    missing = round(sum(counts) * fraction) - sum(shares)
    by_remainder = sorted(range(len(counts)), key=lambda k: (shares[k] - quotas[k], k))
    for k in by_remainder[:missing]:
        shares[k] += 1
    return [min(share, count - 1) for share, count in zip(shares, counts, strict=True)]
