"""Gradients of the loss for single images: of weights, and of the gates of units.

A unit has a gate of value 1 (Molchanov et al. 2019, arXiv:1906.10771, sec. 3.3). The gate multiplies the weights that
read the unit. If it is 0, the unit is gone, whatever activations, norms and depthwise convolutions lie between. A gate
on several parameters in a row would count the unit several times. Where all readers are plain layers that are called
once, a gate for each image multiplies their inputs instead. The derivative is the same, and one backward pass gives
those of a whole batch, which takes less time.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from project.compression.thinning.groups import Units

Parameters = Mapping[str, Tensor]
Gradients = Callable[[Tensor, Tensor], Parameters]
"""Gradients of the loss at images ``[N, C, H, W]`` and labels ``[N]``, by name, with one row for each image."""

_CHUNK = 32  # number of images whose gradients are in memory at once
_CHANNELS = {nn.Conv1d: 1, nn.Conv2d: 1, nn.Conv3d: 1, nn.Linear: -1}
"""Layers that can have a gate at their input, each with the dimension of the channels there."""


def mean_over_images(
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


def of_batch(net: nn.Module, weights: Parameters) -> Gradients:
    """Gradients of the named parameters, summed over the batch: there is one row for all images."""

    def gradients(images: Tensor, labels: Tensor) -> Parameters:
        chosen = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        loss = nn.functional.cross_entropy(functional_call(net, chosen, (images,)), labels, reduction="sum")
        found = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True, materialize_grads=True)
        return {name: each[None] for name, each in zip(chosen, found, strict=True)}

    return gradients


def by_image(
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


def of_gates_of_weights(net: nn.Module, units: Mapping[str, Units]) -> Gradients:
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

    return by_image(net, {layer: like.new_ones(each.num) for layer, each in units.items()}, gated)


def of_gates_at_inputs(net: nn.Module, units: Mapping[str, Units]) -> Gradients:
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


def readable_at_inputs(net: nn.Module, units: Mapping[str, Units], images: Tensor | None) -> set[str]:
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
