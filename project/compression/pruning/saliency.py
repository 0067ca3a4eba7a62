"""Saliency: an estimate of how much the loss needs a weight or a whole unit. The least saliency is pruned first.

Criteria of the weights alone:

- ``magnitude``: Han et al. 2015 (arXiv:1506.02626, sec. 3). The score of a filter is its L1 norm, Li et al. 2017
  (arXiv:1608.08710, sec. 3.1). The score of a unit is the mean over all weights that make it or read it, in all layers
  that share it (DepGraph, Fang et al. 2023, arXiv:2301.12900, sec. 3.3), so that units of different sizes compare.
- ``l2``: the Euclidean norm of the same weights (He et al. 2018, arXiv:1808.06866, sec. 3.2). Units only.
- ``lamp``: Lee et al. 2021 (arXiv:2010.07611): the square of a weight, as a share of the squares of its layer that are
  not smaller. For a unit: the square of ``l2``, as a share of those of its group. It compares between layers.
- ``geometric_median``: He et al. 2019 (arXiv:1811.00250): the sum of the distances between the weights of a unit and
  those of every other unit of its group. A unit near the others can be replaced by them. Units only.
- ``norm_scale``: Liu et al. 2017, Network Slimming (arXiv:1708.06519): the absolute scale of the unit's norms.
  :class:`project.compression.NormScaleL1` is the penalty that trains for it. Units only.

Criteria that take gradients of images:

- ``obd``: LeCun, Denker & Solla 1989, Optimal Brain Damage, eq. 5: ``h_kk w_k^2 / 2``. ``h_kk`` is the diagonal of the
  Gauss-Newton matrix: the mean of squared gradients of single images, with labels drawn from the net's own prediction
  (Martens 2020, arXiv:1412.1193, sec. 9.2). It needs no second derivative.
- ``taylor``: the mean over images of ``(w g)^2``, Molchanov et al. 2019 (arXiv:1906.10771, eq. 8). The gradients are
  those of single images and of the true labels; the paper takes those of batches.
- ``gradient``: ``|w g|`` with the mean gradient over all images, Blalock et al. 2020 (arXiv:2003.03033, sec. 7.2).
- ``gradient_sum``: the sum of ``|w g|`` over all weights that make or read a unit. Units only.

``random`` is the control experiment.

For ``obd``, ``taylor`` and ``gradient`` a unit has a gate: :mod:`project.compression.pruning.gradients`.

A unit's score adds up over all layers that share or read it. A weight that both makes and reads it counts once.
"""

import zlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from project.compression.plain_layers import name_layers
from project.compression.pruning.gradients import (
    Parameters,
    by_image,
    mean_over_images,
    of_batch,
    of_gates_at_inputs,
    of_gates_of_weights,
    readable_at_inputs,
)
from project.compression.pruning.norm_scales import norm_scales
from project.compression.thinning.groups import Units

Criterion = Literal[
    "magnitude",
    "l2",
    "lamp",
    "geometric_median",
    "norm_scale",
    "obd",
    "taylor",
    "gradient",
    "gradient_sum",
    "random",
]
FOR_UNITS: tuple[Criterion, ...] = ("l2", "geometric_median", "norm_scale", "gradient_sum")
"""Criteria that have no meaning for single weights."""
OF_IMAGES: tuple[Criterion, ...] = ("obd", "taylor", "gradient", "gradient_sum")
"""Criteria that take gradients of images."""
OF_ONE_LAYER: tuple[Criterion, ...] = ("magnitude", "l2", "geometric_median")
"""Criteria whose scores of units depend on the scale of the layer's weights, so that they compare within a layer."""


def saliency_of_weights(
    net: nn.Module, names: list[str], criterion: Criterion, images: Tensor | None, labels: Tensor | None, seed: int
) -> dict[str, Tensor]:
    """A score of 0 or more for every entry of each named parameter, in the parameter's shape.

    Args:
        net: a net that maps images ``[N, C, H, W]`` to logits ``[N, K]``. It runs in eval mode and is not changed.
        names: names of the parameters to score.
        criterion: the kind of score, but none of :data:`FOR_UNITS`; only those of :data:`OF_IMAGES` need images.
        images, labels: normalised images ``[N, C, H, W]`` and class numbers ``[N]`` that gradients are taken of.
        seed: seed of the random scores, and of the labels drawn for ``obd``; any int.
    """
    weights = {name: net.get_parameter(name).detach() for name in names}
    if criterion == "magnitude":
        return {name: weight.abs() for name, weight in weights.items()}
    if criterion == "lamp":
        return {name: _lamp(weight.square()) for name, weight in weights.items()}
    if criterion == "random":
        return {name: _random(weight, seed, name) for name, weight in weights.items()}
    if criterion == "gradient":
        means = mean_over_images(net, of_batch(net, weights), images, labels)
        return {name: (weight * means[name]).abs() for name, weight in weights.items()}
    gradients = by_image(net, weights)
    squares = mean_over_images(net, gradients, images, labels, squared=True, seed=seed if criterion == "obd" else None)
    half = 0.5 if criterion == "obd" else 1.0
    return {name: half * squares[name] * weight.square() for name, weight in weights.items()}


def saliency_of_units(
    net: nn.Module,
    units: Mapping[str, Units],
    criterion: Criterion,
    images: Tensor | None,
    labels: Tensor | None,
    seed: int,
) -> dict[str, Tensor]:
    """A score of 0 or more for every unit of each layer, ``[num_units]``.

    Args:
        net: a net that maps images ``[N, C, H, W]`` to logits ``[N, K]``. It runs in eval mode and is not changed.
        units: the units of each layer.
        criterion: the kind of score; only those of :data:`OF_IMAGES` need images.
        images, labels: normalised images ``[N, C, H, W]`` and class numbers ``[N]`` that gradients are taken of.
        seed: seed of the random scores, and of the labels drawn for ``obd``; any int.

    Raises:
        ValueError: if there are no images but the criterion needs them, or if units have no norm but the criterion is
            ``norm_scale``.
    """
    weights = {name: weight.detach() for name, weight in net.named_parameters() if weight.dim() > 1}
    if criterion == "magnitude":
        size = {name: weight.abs() for name, weight in weights.items()}
        ones = {name: weight.new_ones(1).expand_as(weight) for name, weight in weights.items()}
        return {layer: _sums(each, size) / _sums(each, ones).clamp(min=1) for layer, each in units.items()}
    if criterion in ("l2", "lamp"):
        squares = {name: weight.square() for name, weight in weights.items()}
        sums = {layer: _sums(each, squares) for layer, each in units.items()}
        return {layer: each.sqrt() if criterion == "l2" else _lamp(each) for layer, each in sums.items()}
    if criterion == "geometric_median":
        return {layer: _distances(each, weights) for layer, each in units.items()}
    if criterion == "norm_scale":
        return _norm_scales(net, units)
    if criterion == "gradient_sum":
        means = mean_over_images(net, of_batch(net, weights), images, labels)
        products = {name: (weight * means[name]).abs() for name, weight in weights.items()}
        return {layer: _sums(each, products) for layer, each in units.items()}
    if criterion == "random":
        like = next(net.parameters())
        return {layer: _random(like.new_ones(each.num), seed, layer) for layer, each in units.items()}
    at_inputs = readable_at_inputs(net, units, images)
    scores: dict[str, Tensor] = {}
    for names, gates in ((at_inputs, of_gates_at_inputs), (units.keys() - at_inputs, of_gates_of_weights)):
        if names:
            gradients = gates(net, {layer: each for layer, each in units.items() if layer in names})
            drawn = seed if criterion == "obd" else None
            scores |= mean_over_images(net, gradients, images, labels, squared=criterion != "gradient", seed=drawn)
    half = 0.5 if criterion == "obd" else 1.0
    return {layer: half * scores[layer].abs() for layer in units}


def _sums(units: Units, values: Parameters) -> Tensor:
    """The sum of the values of all entries of each unit, ``[num_units]``.

    Parameters without values count 0. An entry in two slices of a unit counts once.
    """
    total = next(iter(values.values())).new_zeros(units.num)
    taken: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for (name, dim), indices in units.slices.items():
        if name in values:
            value, index = values[name], indices.to(total.device)
            total = total + value.movedim(dim, 0).reshape(value.shape[dim], -1).sum(1)[index].sum(1)
            for other, others in taken[name]:
                both = value.movedim((other, dim), (0, 1)).reshape(value.shape[other], value.shape[dim], -1).sum(2)
                total = total - both[others[:, :, None], index[:, None, :]].sum((1, 2))
            taken[name].append((dim, index))
    return total


def _lamp(squares: Tensor) -> Tensor:
    """Each square as a share of all squares that are not smaller; of equal ones the first counts as the smallest."""
    ascending, order = squares.flatten().double().sort(stable=True)
    not_smaller = ascending.flip(0).cumsum(0).flip(0)
    shares = torch.zeros_like(ascending)
    shares[order] = ascending / not_smaller.clamp(min=torch.finfo(ascending.dtype).tiny)
    return shares.view(squares.shape).to(squares.dtype)


def _distances(units: Units, weights: Parameters) -> Tensor:
    """The sum of the distances of each unit to the others, ``[num_units]``, over all layers that make or read it."""
    total = next(iter(weights.values())).new_zeros(units.num)
    for (name, dim), indices in units.slices.items():
        if name in weights:
            rows = weights[name].movedim(dim, 0)[indices.to(total.device)].flatten(1)
            total = total + torch.cdist(rows, rows).sum(1)
    return total


def check_norm_scales(net: nn.Module, units: Mapping[str, Units]) -> None:
    """Check that each layer's units have a norm with scales.

    Args:
        net: net with the units; it is not changed.
        units: the units of each layer, by its name.

    Raises:
        ValueError: if a layer has no such norm.
    """
    scales = norm_scales(net)
    without = {
        layer: "no norm scales its units"
        for layer, each in units.items()
        if not any(name in scales for name, _ in each.slices)
    }
    if without:
        raise ValueError(
            f"criterion is norm_scale, but it cannot score {name_layers(without)}: exclude these layers, or choose "
            "another criterion, such as obd."
        )


def _norm_scales(net: nn.Module, units: Mapping[str, Units]) -> dict[str, Tensor]:
    """The sum of the absolute scales of each unit's norms."""
    check_norm_scales(net, units)
    scales = {name: scale.detach().abs() for name, scale in norm_scales(net).items()}
    return {layer: _sums(each, scales) for layer, each in units.items()}


def _random(like: Tensor, seed: int, name: str) -> Tensor:
    """Uniform random scores in [0, 1) that depend only on the seed and the name."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return torch.rand(like.shape, generator=generator).to(like.device)
