"""Chooses the number of bits of each layer's shared weights, for a given budget of bytes.

First, the weights of one layer at a time are shared with 1 to 8 bits. The loss of each choice is measured, and its size
is estimated by the entropy. Then bits are added where they reduce the loss most per byte. Only the points on the lower
convex hull of a layer's (bytes, loss) points are used, so the greedy choice equals that of a Lagrange multiplier
(Shoham & Gersho 1988, Efficient bit allocation for an arbitrary set of quantizers). One assumption is an approximation:
that the losses of the layers add up.

The loss is the Kullback-Leibler divergence of the class probabilities from those of the original net, on training
images. It is never below 0. A difference of cross entropies would be worse: the sign of that difference is random if
the net has memorised these images.
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
    """One number of bits for one layer, with its size and its loss.

    Args:
        bits: number of bits of the layer, 1 to 8.
        num_bytes: estimated size of the layer's shared weights in a file, in bytes; 0 or more.
        loss: divergence of the net's outputs that the sharing of this layer causes, in nats; 0 or more.
    """

    bits: int
    num_bytes: float
    loss: float


def estimated_bytes(centers: Tensor, index: Tensor) -> float:
    """The estimated size of one shared weight tensor in a file, in bytes.

    It is the sum of three parts: the entropy of the indices of the nonzero weights, the entropy of the zero/nonzero
    mask, and two bytes for each value of the codebook. A real entropy coder needs slightly more. It needs less for the
    mask if the zeros are clustered.

    Args:
        centers: shared values ``[1 + k]``; the first one is 0.
        index: number of the shared value of each weight, of any shape; 0 to k.
    """
    counts = torch.bincount(index.flatten().long(), minlength=len(centers)).double().cpu().numpy()
    zeros, kept = counts[0], counts[1:]
    bits = _entropy(kept) + _entropy(np.array([zeros, kept.sum()]))
    return bits / 8 + 2 * int((kept > 0).sum())


def choose_bits(options: Mapping[str, list[Option]], budget_bytes: float) -> dict[str, int]:
    """The number of bits of each layer that gives the least total loss within the budget.

    Only options on the convex hull of a layer are considered.

    Args:
        options: options to choose from, in any order, by the layer's name.
        budget_bytes: largest total size of all layers, in bytes; above 0.

    Raises:
        ValueError: if even the smallest options together exceed the budget.
    """
    hulls = {layer: _hull(choices) for layer, choices in options.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].num_bytes for hull in hulls.values())
    if spent > budget_bytes:
        raise ValueError(
            f"budget_bytes is {budget_bytes:g}, but with one bit for each layer the shared weights take about "
            f"{spent:.0f} bytes: choose a larger budget, or prune more weights."
        )
    steps = sorted(
        ((before.loss - after.loss) / (after.num_bytes - before.num_bytes), layer, number)
        for layer, hull in hulls.items()
        for number, (before, after) in enumerate(pairwise(hull), 1)
    )
    closed = set()  # layers with a step that did not fit: their later steps build on it, so they are skipped
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
    """The size and the loss of each number of bits in :data:`BITS`, for each weight tensor alone.

    Args:
        net: net to measure. Its weights are restored afterwards; it is left in eval mode.
        weights: names of the weight parameters, such as ``fc.weight``.
        images: training images ``[N, C, H, W]``, normalised as the net expects them.
        start: first centers of k-means; see :func:`project.compression.weight_sharing.kmeans.kmeans`.
        seed: seed of the k-means start ``random``; any int of 0 or more.
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
    """The options on the lower convex hull, by rising size.

    Along the hull the loss falls, and each step gains less per byte than the step before it.
    """
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
    """The entropy of all symbols together, in bits; ``counts`` says how often each symbol occurs."""
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())
