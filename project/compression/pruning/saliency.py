"""Saliency: an estimate of how much the loss needs a weight or a whole unit. The least saliency is pruned first.

- ``magnitude``: Han et al. 2015 (arXiv:1506.02626, sec. 3). The score of a filter is its L1 norm, Li et al. 2017
  (arXiv:1608.08710, sec. 3.1), here divided by the number of weights, so that filters of different sizes compare.
- ``obd``: LeCun, Denker & Solla 1989, Optimal Brain Damage, eq. 5: ``h_kk w_k^2 / 2``. ``h_kk`` is the diagonal of the
  Gauss-Newton matrix: the mean of squared gradients of single images, with labels drawn from the net's own prediction
  (Martens 2020, arXiv:1412.1193, sec. 9.2). It needs no second derivative.
- ``gradient``: ``|w g|``, Blalock et al. 2020 (arXiv:2003.03033, sec. 7.2).
- ``random``: the control experiment.

For ``obd`` and ``gradient`` a unit has a gate of value 1 (Molchanov et al. 2019, arXiv:1906.10771, eq. 8 and sec. 3.3).
The gate multiplies the scale and shift of the unit's norm, or the unit's weights and bias if there is no norm. A gate
on weights and scale together would count the unit twice. The gradient of the gate is the sum of ``w g`` over the
parameters that it multiplies.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Criterion = Literal["magnitude", "obd", "gradient", "random"]
Parameters = Mapping[str, Tensor]

_CHUNK = 32  # number of images whose gradients are in memory at once


def saliency_of_weights(
    net: nn.Module, names: list[str], criterion: Criterion, images: Tensor | None, labels: Tensor | None, seed: int
) -> dict[str, Tensor]:
    """A score of 0 or more for every entry of each named parameter, in the parameter's shape.

    Args:
        net: a net that maps images ``[N, C, H, W]`` to logits ``[N, K]``. It runs in eval mode and is not changed.
        names: names of the parameters to score.
        criterion: the kind of score; ``magnitude`` and ``random`` need no images.
        images, labels: normalised images ``[N, C, H, W]`` and class numbers ``[N]`` that gradients are taken of.
        seed: seed of the random scores, and of the labels drawn for ``obd``; any int.
    """
    weights = {name: net.get_parameter(name).detach() for name in names}
    if criterion == "magnitude":
        return {name: weight.abs() for name, weight in weights.items()}
    if criterion == "random":
        return {name: _random(weight, seed, name) for name, weight in weights.items()}
    if criterion == "gradient":
        means = _mean_over_images(net, weights, images, labels, lambda gradients: gradients, seed=None)
        return {name: (weight * means[name]).abs() for name, weight in weights.items()}
    squares = _mean_over_images(
        net, weights, images, labels, lambda gradients: {name: g.square() for name, g in gradients.items()}, seed=seed
    )
    return {name: squares[name] * weight.square() / 2 for name, weight in weights.items()}


def saliency_of_units(
    net: nn.Module,
    units: Mapping[str, tuple[str, ...]],
    criterion: Criterion,
    images: Tensor | None,
    labels: Tensor | None,
    seed: int,
) -> dict[str, Tensor]:
    """A score of 0 or more for every unit of each layer, ``[num_units]``.

    Args:
        net: a net that maps images ``[N, C, H, W]`` to logits ``[N, K]``. It runs in eval mode and is not changed.
        units: names of the parameters whose first dimension is the layer's units, for each layer; the first is the
            layer's weight.
        criterion: the kind of score; ``magnitude`` and ``random`` need no images.
        images, labels: normalised images ``[N, C, H, W]`` and class numbers ``[N]`` that gradients are taken of.
        seed: seed of the random scores, and of the labels drawn for ``obd``; any int.
    """
    if criterion == "magnitude":
        return {layer: net.get_parameter(names[0]).detach().abs().flatten(1).mean(1) for layer, names in units.items()}
    if criterion == "random":
        return {
            layer: _random(net.get_parameter(names[0]).detach().flatten(1)[:, 0], seed, layer)
            for layer, names in units.items()
        }
    units = {layer: _gated(net, names) for layer, names in units.items()}
    weights = {name: net.get_parameter(name).detach() for names in units.values() for name in names}

    def gates(gradients: Parameters) -> dict[str, Tensor]:
        """From the gradients of single images ``[n, …]`` to the gradients of the units' gates ``[n, num_units]``."""
        return {
            layer: torch.stack([(gradients[name] * weights[name]).flatten(2).sum(2) if weights[name].dim() > 1
                                else gradients[name] * weights[name] for name in names]).sum(0)
            for layer, names in units.items()
        }  # fmt: skip

    if criterion == "gradient":
        return {
            layer: mean.abs() for layer, mean in _mean_over_images(net, weights, images, labels, gates, None).items()
        }
    squares = _mean_over_images(
        net, weights, images, labels, lambda g: {layer: gate.square() for layer, gate in gates(g).items()}, seed
    )
    return {layer: square / 2 for layer, square in squares.items()}


def _gated(net: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters that a unit's gate multiplies: the norms' if each layer has a norm, otherwise all."""
    owners = {name: net.get_submodule(name.rpartition(".")[0]) for name in names}
    layers = {owner for owner in owners.values() if isinstance(owner, nn.Conv2d | nn.Linear)}
    norms = set(owners.values()) - layers
    return names if len(norms) < len(layers) else tuple(name for name in names if owners[name] in norms)


def _mean_over_images(
    net: nn.Module,
    weights: Parameters,
    images: Tensor | None,
    labels: Tensor | None,
    per_image: Callable[[Parameters], Parameters],
    seed: int | None,
) -> dict[str, Tensor]:
    """The mean over all images of ``per_image(gradients)``, whose gradients have one row for each image.

    With a seed, the labels are drawn from the net's prediction; without one, the given labels are used.
    """
    if images is None or labels is None or not len(images):
        raise ValueError(
            "the criterion needs gradients, but there are no images and labels to take them of: give some, or choose "
            "the criterion magnitude."
        )
    training = {module: module.training for module in net.modules()}
    net.eval()
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    fixed = {name: tensor.detach() for name, tensor in state.items() if name not in weights}

    def loss(chosen: Parameters, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(net, {**fixed, **chosen}, (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    try:
        if seed is not None:
            labels = _labels_of_the_net(net, images, seed)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(images), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            gradients = vmap(grad(loss), in_dims=(None, 0, 0))(dict(weights), images[chunk], labels[chunk])
            for name, values in per_image(gradients).items():
                total = values.sum(0)
                sums[name] = sums[name] + total if name in sums else total
        return {name: total / len(images) for name, total in sums.items()}
    finally:
        for module, mode in training.items():
            module.training = mode


@torch.no_grad()
def _labels_of_the_net(net: nn.Module, images: Tensor, seed: int) -> Tensor:
    """One class number for each image, drawn from the net's softmax. A seed draws the same labels on every device."""
    probabilities = torch.cat([net(chunk).softmax(1) for chunk in images.split(256)]).cpu().double()
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(images.device)


def _random(like: Tensor, seed: int, name: str) -> Tensor:
    """Uniform random scores in [0, 1) that depend only on the seed and the name."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return torch.rand(like.shape, generator=generator).to(like.device)
