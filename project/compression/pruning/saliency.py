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

For ``obd``, ``taylor`` and ``gradient`` a unit has a gate of value 1 (Molchanov et al. 2019, sec. 3.3). The gate
multiplies the weights that read the unit. If it is 0, the unit is gone, whatever activations, norms and depthwise
convolutions lie between. A gate on several parameters in a row would count the unit several times. Where all readers
are plain layers that are called once, a gate for each image multiplies their inputs instead. The derivative is the
same, and one backward pass gives those of a whole batch, in half of the time (small Inception, 512 images).

A unit's score adds up over all layers that share or read it. A weight that both makes and reads it counts once.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from project.compression.plain_layers import name_layers
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
Parameters = Mapping[str, Tensor]
Gradients = Callable[[Tensor, Tensor], Parameters]
"""Gradients of the loss at images ``[N, C, H, W]`` and labels ``[N]``, by name, with one row for each image."""

FOR_UNITS: tuple[Criterion, ...] = ("l2", "geometric_median", "norm_scale", "gradient_sum")
"""Criteria that have no meaning for single weights."""
OF_IMAGES: tuple[Criterion, ...] = ("obd", "taylor", "gradient", "gradient_sum")
"""Criteria that take gradients of images."""
OF_ONE_LAYER: tuple[Criterion, ...] = ("magnitude", "l2", "geometric_median")
"""Criteria whose scores of units depend on the scale of the layer's weights, so that they compare within a layer."""

_CHUNK = 32  # number of images whose gradients are in memory at once
_CHANNELS = {nn.Conv1d: 1, nn.Conv2d: 1, nn.Conv3d: 1, nn.Linear: -1}
"""Layers that can have a gate at their input, each with the dimension of the channels there."""


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
        means = _mean_over_images(net, _of_batch(net, weights), images, labels)
        return {name: (weight * means[name]).abs() for name, weight in weights.items()}
    gradients = _by_image(net, weights)
    squares = _mean_over_images(net, gradients, images, labels, squared=True, seed=seed if criterion == "obd" else None)
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
        means = _mean_over_images(net, _of_batch(net, weights), images, labels)
        products = {name: (weight * means[name]).abs() for name, weight in weights.items()}
        return {layer: _sums(each, products) for layer, each in units.items()}
    if criterion == "random":
        like = next(net.parameters())
        return {layer: _random(like.new_ones(each.num), seed, layer) for layer, each in units.items()}
    at_inputs = _readable_at_inputs(net, units, images)
    scores: dict[str, Tensor] = {}
    for names, gates in ((at_inputs, _of_gates_at_inputs), (units.keys() - at_inputs, _of_gates_of_weights)):
        if names:
            gradients = gates(net, {layer: each for layer, each in units.items() if layer in names})
            drawn = seed if criterion == "obd" else None
            scores |= _mean_over_images(net, gradients, images, labels, squared=criterion != "gradient", seed=drawn)
    half = 0.5 if criterion == "obd" else 1.0
    return {layer: half * scores[layer].abs() for layer in units}


# -- of the weights alone --------------------------------------------------------------------------------------------


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


def _norm_scales(net: nn.Module, units: Mapping[str, Units]) -> dict[str, Tensor]:
    """The sum of the absolute scales of each unit's norms."""
    scales = {name: scale.detach().abs() for name, scale in norm_scales(net).items()}
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
    return {layer: _sums(each, scales) for layer, each in units.items()}


def _random(like: Tensor, seed: int, name: str) -> Tensor:
    """Uniform random scores in [0, 1) that depend only on the seed and the name."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return torch.rand(like.shape, generator=generator).to(like.device)


# -- with gradients --------------------------------------------------------------------------------------------------


def _mean_over_images(
    net: nn.Module,
    gradients: Gradients,
    images: Tensor | None,
    labels: Tensor | None,
    *,
    squared: bool = False,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """The mean over all images of the gradients or of their squares.

    With a seed, the labels are drawn from the net's prediction. Without one, the given labels are used.
    """
    if images is None or labels is None or not len(images):
        raise ValueError(
            "the criterion needs gradients, but there are no images and labels to take them of: give some, or choose "
            "the criterion magnitude."
        )
    with _evaluated(net):
        if seed is not None:
            labels = _labels_of_the_net(net, images, seed)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(images), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            for name, rows in gradients(images[chunk], labels[chunk]).items():
                total = (rows.square() if squared else rows).sum(0)
                sums[name] = sums[name] + total if name in sums else total
    return {name: total / len(images) for name, total in sums.items()}


@contextmanager
def _evaluated(net: nn.Module) -> Iterator[None]:
    """The net in eval mode and not compiled, and gradients on, whatever the caller has set."""
    training = {module: module.training for module in net.modules()}
    compiled, net._compiled_call_impl = net._compiled_call_impl, None
    net.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        net._compiled_call_impl = compiled
        for module, mode in training.items():
            module.training = mode


def _of_batch(net: nn.Module, weights: Parameters) -> Gradients:
    """Gradients of the named parameters, summed over the batch: there is one row for all images."""

    def gradients(images: Tensor, labels: Tensor) -> Parameters:
        chosen = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        loss = nn.functional.cross_entropy(functional_call(net, chosen, (images,)), labels, reduction="sum")
        found = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True, materialize_grads=True)
        return {name: each[None] for name, each in zip(chosen, found, strict=True)}

    return gradients


def _by_image(
    net: nn.Module, weights: Parameters, parameters_of: Callable[[Parameters], Parameters] = lambda weights: weights
) -> Gradients:
    """Gradients of the weights, from which ``parameters_of`` makes parameters of the net, for each image."""
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    fixed = {name: tensor.detach() for name, tensor in state.items() if name not in weights}

    def loss(chosen: Parameters, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(net, {**fixed, **parameters_of(chosen)}, (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    def gradients(images: Tensor, labels: Tensor) -> Parameters:
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the other kernels of attention
            return vmap(grad(loss), in_dims=(None, 0, 0))(dict(weights), images, labels)

    return gradients


def _of_gates_of_weights(net: nn.Module, units: Mapping[str, Units]) -> Gradients:
    """Gradients of gates that multiply the weights that read each unit, or its own weights if nothing reads it."""
    named = {name: parameter.detach() for name, parameter in net.named_parameters()}
    like = next(iter(named.values()))

    def gated(gates: Parameters) -> dict[str, Tensor]:
        """The parameters that the gates multiply."""
        parameters: dict[str, Tensor] = {}
        for layer, each in units.items():
            for name, dim in each.read or each.slices:
                parameter = parameters.get(name, named.get(name))
                if parameter is not None:
                    factors = _factors(gates[layer][None], each.slices[name, dim], parameter.shape[dim])
                    factors = factors.view([-1 if each == dim else 1 for each in range(parameter.dim())])
                    parameters[name] = parameter * factors
        return parameters

    return _by_image(net, {layer: like.new_ones(each.num) for layer, each in units.items()}, gated)


def _of_gates_at_inputs(net: nn.Module, units: Mapping[str, Units]) -> Gradients:
    """Gradients of gates that multiply each unit in the inputs of its readers, one gate for each image."""
    reads: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    for layer, each in units.items():
        for name, dim in each.read:
            reads[name.rpartition(".")[0]].append((layer, each.slices[name, dim]))

    def gradients(images: Tensor, labels: Tensor) -> Parameters:
        gates = {layer: images.new_ones(len(images), each.num).requires_grad_() for layer, each in units.items()}

        def multiply(module: nn.Module, args: tuple[Tensor, ...], *, read: list[tuple[str, Tensor]]) -> Any:
            x = args[0].movedim(_CHANNELS[type(module)], -1)
            factors = [_factors(gates[layer], indices, x.shape[-1]) for layer, indices in read]
            x = x * torch.stack(factors).prod(0).view(len(x), *[1] * (x.dim() - 2), -1)
            return (x.movedim(-1, _CHANNELS[type(module)]), *args[1:])

        hooks = [
            net.get_submodule(name).register_forward_pre_hook(partial(multiply, read=read))
            for name, read in reads.items()
        ]
        try:
            loss = nn.functional.cross_entropy(net(images), labels, reduction="sum")
        finally:
            for hook in hooks:
                hook.remove()
        return dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))

    return gradients


def _factors(gates: Tensor, indices: Tensor, size: int) -> Tensor:
    """Gates ``[N, num_units]`` as factors ``[N, size]``: 1 but at the indices of each unit ``[num_units, k]``."""
    indices = indices.to(gates.device)
    more = (gates - 1).repeat_interleave(indices.shape[1], 1)
    return gates.new_ones(1, size).expand(len(gates), -1).index_add(1, indices.flatten(), more)


def _readable_at_inputs(net: nn.Module, units: Mapping[str, Units], images: Tensor | None) -> set[str]:
    """The groups whose units are read by plain layers alone that are called once, with a row for each image.

    The net runs with two numbers of images, which tell the rows from another dimension of the same size.
    """
    if images is None or not len(images):
        return set()
    rows: dict[str, list[int]] = defaultdict(list)
    uses = Counter(id(weight) for _, weight in net.named_parameters(remove_duplicate=False))
    hooks = []
    for name, module in net.named_modules():
        if type(module) in _CHANNELS and getattr(module, "groups", 1) == 1 and uses[id(module.weight)] == 1:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: rows[f"{name}.weight"].append(len(args[0]) if args else 0)
                )
            )
    try:
        with _evaluated(net), torch.no_grad():
            for number in (2, 3):
                net(images[:1].expand(number, *images.shape[1:]))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        layer
        for layer, each in units.items()
        if each.read and all(dim == 1 and rows[name] == [2, 3] for name, dim in each.read)
    }


@torch.no_grad()
def _labels_of_the_net(net: nn.Module, images: Tensor, seed: int) -> Tensor:
    """One class number for each image, drawn from the net's softmax. A seed draws the same labels on every device."""
    probabilities = torch.cat([net(chunk).softmax(1) for chunk in images.split(256)]).cpu().double()
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(images.device)
