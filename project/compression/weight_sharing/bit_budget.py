"""How many bits each layer's shared weights get under a budget of bytes.

Each layer is shared alone with 1 to 8 bits; what that does to the net is measured, and what it costs is estimated by
entropies. Then bits are added where they help most per byte: the steps of a layer lie on the lower convex hull of its
points, so the greedy choice is that of a Lagrange multiplier (Shoham & Gersho 1988, Efficient bit allocation for an
arbitrary set of quantizers). That losses of layers add up is an approximation.

The loss is the divergence of the classes' probabilities from those of the net before, on training images: unlike a
difference of cross entropies, whose sign is chance for a net that has learned these images by heart, it is never below
0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from project.compression.weight_sharing.codebook import Codebook
from project.compression.weight_sharing.kmeans import Start

BITS = range(1, 9)


@dataclass(frozen=True)
class Option:
    """One width for one layer: what it costs and what it loses."""

    bits: int
    num_bytes: float
    loss: float


def estimated_bytes(centers: Tensor, index: Tensor) -> float:
    """Of one shared weight in a file: entropy of the kept weights' numbers, entropy of which are kept, two bytes for
    each value of the codebook. An entropy coder adds a little; positions that stick together cost less.
    """
    counts = torch.bincount(index.flatten().long(), minlength=len(centers)).double().cpu().numpy()
    zeros, kept = counts[0], counts[1:]
    bits = _entropy(kept) + _entropy(np.array([zeros, kept.sum()]))
    return bits / 8 + 2 * int((kept > 0).sum())


def choose_bits(options: Mapping[str, list[Option]], budget_bytes: float) -> dict[str, int]:
    """Bits by layer, of least total loss along the hulls, of at most so many bytes.

    Args:
        options: of each layer, in any order.
        budget_bytes: for all of them.

    Raises:
        ValueError: when the cheapest options together take more.
    """
    hulls = {layer: _hull(choices) for layer, choices in options.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].num_bytes for hull in hulls.values())
    if spent > budget_bytes:
        raise ValueError(
            f"budget_bytes is {budget_bytes:g}, but with one bit for each layer the shared weights take about "
            f"{spent:.0f}: allow more, or prune more."
        )
    steps = sorted(
        ((before.loss - after.loss) / (after.num_bytes - before.num_bytes), layer, number)
        for layer, hull in hulls.items()
        for number, (before, after) in enumerate(pairwise(hull), 1)
    )
    closed = set()  # a layer whose next step does not fit takes no later one
    for _, layer, number in reversed(steps):
        cost = hulls[layer][number].num_bytes - hulls[layer][number - 1].num_bytes
        if layer in closed or spent + cost > budget_bytes:
            closed.add(layer)
            continue
        at[layer], spent = number, spent + cost
    return {layer: hull[at[layer]].bits for layer, hull in hulls.items()}


@torch.no_grad()
def measure_options(
    net: nn.Module, weights: list[str], images: Tensor, start: Start = "optimal", seed: int = 0
) -> dict[str, list[Option]]:
    """Each of :data:`BITS` for each weight alone.

    Args:
        net: as it was afterwards; in eval mode.
        weights: names.
        images: ``[N, C, H, W]`` as the net takes them.
        start, seed: of k-means.
    """
    net.eval()
    expected = net(images).float().log_softmax(1)
    options: dict[str, list[Option]] = {}
    for name in weights:
        weight = net.get_parameter(name)
        kept, options[name] = weight.detach().clone(), []
        for bits in BITS:
            codebook = Codebook.of(net, {name: bits}, start, seed)
            codebook.write_(net)
            found = net(images).float().log_softmax(1)
            loss = nn.functional.kl_div(found, expected, reduction="batchmean", log_target=True)
            num_bytes = estimated_bytes(codebook.centers[name], codebook.index[name])
            options[name].append(Option(bits, num_bytes, max(float(loss), 0.0)))
            weight.copy_(kept)
    return options


def _hull(options: list[Option]) -> list[Option]:
    """The lower convex hull: ascending bytes, falling losses, each step worth less per byte than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.num_bytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: Option, after: Option) -> float:
    return (before.loss - after.loss) / (after.num_bytes - before.num_bytes)


def _entropy(counts: np.ndarray) -> float:
    """Bits for all of them together."""
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())
