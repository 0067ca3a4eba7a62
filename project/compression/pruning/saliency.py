"""Saliency: an estimate of how much the loss needs a weight or a whole unit. The least saliency is pruned first.

- ``magnitude``: Han et al. 2015 (arXiv:1506.02626, sec. 3). The score of a filter is its L1 norm, Li et al. 2017
  (arXiv:1608.08710, sec. 3.1). The score of a unit is the mean over all weights that make it or read it, in all layers
  that share it (DepGraph, Fang et al. 2023, arXiv:2301.12900, sec. 3.3), so that units of different sizes compare.
- ``obd``: LeCun, Denker & Solla 1989, Optimal Brain Damage, eq. 5: ``h_kk w_k^2 / 2``. ``h_kk`` is the diagonal of the
  Gauss-Newton matrix: the mean of squared gradients of single images, with labels drawn from the net's own prediction
  (Martens 2020, arXiv:1412.1193, sec. 9.2). It needs no second derivative.
- ``gradient``: ``|w g|``, Blalock et al. 2020 (arXiv:2003.03033, sec. 7.2).
- ``random``: the control experiment.

For ``obd`` and ``gradient`` a unit has a gate of value 1 (Molchanov et al. 2019, arXiv:1906.10771, eq. 8 and sec. 3.3).
The gate multiplies the weights that read the unit. If it is 0, the unit is gone, whatever activations, norms and
depthwise convolutions lie between. A gate on several parameters in a row would count the unit several times.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from project.compression.thinning.units import Units

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
        criterion: the kind of score; ``magnitude`` and ``random`` need no images.
        images, labels: normalised images ``[N, C, H, W]`` and class numbers ``[N]`` that gradients are taken of.
        seed: seed of the random scores, and of the labels drawn for ``obd``; any int.
    """
    if criterion == "magnitude":
        return {layer: _mean_magnitude(net, each) for layer, each in units.items()}
    like = next(net.parameters()).detach()
    gates = {layer: like.new_ones(each.num) for layer, each in units.items()}
    if criterion == "random":
        return {layer: _random(gate, seed, layer) for layer, gate in gates.items()}

    def gated(gates: Parameters) -> dict[str, Tensor]:
        """The parameters that the gates multiply."""
        parameters: dict[str, Tensor] = {}
        for layer, each in units.items():
            for name, dim in each.read or each.slices:
                parameter = parameters.get(name, named.get(name))
                if parameter is not None:
                    indices = each.slices[name, dim].to(like.device)
                    factors = like.new_ones(parameter.shape[dim]).index_add(
                        0, indices.flatten(), (gates[layer] - 1).repeat_interleave(indices.shape[1])
                    )
                    factors = factors.view([-1 if each == dim else 1 for each in range(parameter.dim())])
                    parameters[name] = parameter * factors
        return parameters

    named = {name: parameter.detach() for name, parameter in net.named_parameters()}
    if criterion == "gradient":
        means = _mean_over_images(net, gates, images, labels, lambda gradients: gradients, None, gated)
        return {layer: mean.abs() for layer, mean in means.items()}
    squares = _mean_over_images(
        net, gates, images, labels, lambda g: {layer: gate.square() for layer, gate in g.items()}, seed, gated
    )
    return {layer: square / 2 for layer, square in squares.items()}


def _mean_magnitude(net: nn.Module, units: Units) -> Tensor:
    """The mean of the absolute weights that make or read each unit, ``[num_units]``."""
    parameters = dict(net.named_parameters())
    total, count = torch.zeros(units.num), 0
    for (name, dim), indices in units.slices.items():
        if name in parameters and parameters[name].dim() > 1:
            weights = parameters[name].detach().abs().movedim(dim, 0).flatten(1)
            total = total.to(weights.device) + weights.sum(1)[indices.to(weights.device)].sum(1)
            count += indices.shape[1] * weights.shape[1]
    return total / max(count, 1)


def _mean_over_images(
    net: nn.Module,
    weights: Parameters,
    images: Tensor | None,
    labels: Tensor | None,
    per_image: Callable[[Parameters], Parameters],
    seed: int | None,
    parameters_of: Callable[[Parameters], Parameters] = lambda weights: weights,
) -> dict[str, Tensor]:
    """The mean over all images of ``per_image(gradients)``, whose gradients have one row for each image.

    The gradients are those of ``weights``, from which ``parameters_of`` makes parameters of the net. With a seed, the
    labels are drawn from the net's prediction; without one, the given labels are used.
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
        logits = functional_call(net, {**fixed, **parameters_of(chosen)}, (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    try:
        if seed is not None:
            labels = _labels_of_the_net(net, images, seed)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(images), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the other kernels of attention
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
