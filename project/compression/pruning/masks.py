"""Masks: tensors of 0 and 1 that multiply parameters, and how much of a net they remove.

If single weights are pruned, a mask has the shape of its parameter. If units are pruned, a mask is broadcast to the
shape of its parameter: it has a size of 1 in each dimension that loses nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from project.compression.thinning.groups import Units

Masks = dict[str, Tensor]
"""The mask of each parameter, by the parameter's name in ``net.named_parameters()``."""


@dataclass(frozen=True)
class Group:
    """The weights, or the units, of one layer, which are scored together.

    Example::

        >>> from torch import nn
        >>> from project.compression import Pruner
        >>> net = nn.Sequential(
        ...     *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.Conv2d(6, 8, 5), nn.ReLU()),
        ...     *(nn.Flatten(), nn.Linear(8 * 4 * 4, 20), nn.ReLU(), nn.Linear(20, 10)),
        ... )
        >>> for group in Pruner("units").groups(net, image_shape=(1, 12, 12)):
        ...     print(group.layer, group.parameters, group.readers)
        0 ('0.weight', '0.bias', '2.weight') {'2': 1}
        2 ('2.weight', '2.bias', '5.weight') {'5': 16}
        5 ('5.weight', '5.bias', '7.weight') {'7': 1}

    Args:
        layer: the layer's name in ``net.named_modules()``.
        parameters: names of the parameters that are masked; the first is the layer's weight. For units, they include
            the weights that read the units.
        units: the layer's units. ``None`` for groups of single weights that are pruned without their dead ends, and if
            the units are not known.
    """

    layer: str
    parameters: tuple[str, ...]
    units: Units | None = None

    @property
    def coupled(self) -> tuple[str, ...]:
        """Names of other layers that have the same units, for example because a residual connection adds them."""
        return () if self.units is None else self.units.coupled

    @property
    def readers(self) -> Mapping[str, int]:
        """The layers that read the units, each with the number of its inputs that one unit fills."""
        return {} if self.units is None else self.units.readers


@torch.no_grad()
def apply_masks_(net: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Multiply each masked parameter by its mask, in place.

    Args:
        net: the net whose parameters are masked.
        masks: the mask of each pruned parameter, by the parameter's name.
    """
    if masks:
        torch._foreach_mul_([net.get_parameter(name) for name in masks], list(masks.values()))


def unit_masks(net: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> Masks:
    """The masks that set everything that belongs to the removed units to zero.

    Args:
        net: net that the groups belong to; only the shapes and types of its parameters matter.
        groups: groups of units that are pruned.
        kept: whether each unit stays, bools ``[num_units]``, by the name of the group.
    """
    masks: Masks = {}
    parameters = dict(net.named_parameters())
    for group in groups:
        assert group.units is not None
        gone = (~kept[group.layer]).nonzero().flatten().cpu()
        for (name, dim), indices in group.units.slices.items():
            if (parameter := parameters.get(name)) is not None:
                along = parameter.new_ones(parameter.shape[dim])
                along[indices[gone].flatten().to(along.device)] = 0
                along = along.view([-1 if each == dim else 1 for each in range(parameter.dim())])
                masks[name] = masks[name] * along if name in masks else along
    return masks


def units_left(group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """Whether the masks keep each unit of a group, bools ``[num_units]``.

    Args:
        group: a group of units.
        masks: the mask of each pruned parameter, by its name; a parameter without a mask keeps all.
    """
    assert group.units is not None
    (name, dim), indices = next(iter(group.units.slices.items()))
    if name not in masks:
        return torch.ones(group.units.num, dtype=torch.bool)
    along = masks[name].movedim(dim, 0).flatten(1).any(1)
    return along[indices[:, 0].to(along.device)]


def removed_units(groups: Iterable[Group], masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """For each layer, the numbers of the outputs whose mask is 0, which thinning removes.

    Args:
        groups: the groups of units that were pruned.
        masks: the mask of each pruned parameter, by the parameter's name.
    """
    removed: dict[str, list[int]] = {}
    for group in groups:
        assert group.units is not None
        gone = group.units.outputs((~units_left(group, masks)).nonzero().flatten().tolist())
        layer = group.units.layers[0]
        removed[layer] = sorted([*removed.get(layer, []), *gone])
    return removed


def sparsity(masks: Mapping[str, Tensor], net: nn.Module) -> float:
    """Share of the masked weights that the masks set to zero. Biases, and parameters without a mask, are not counted.

    Args:
        masks: the mask of each pruned parameter, by the parameter's name.
        net: the net that the masks are for.
    """
    weights = [name for name in masks if net.get_parameter(name).dim() > 1]
    total = sum(net.get_parameter(name).numel() for name in weights)
    kept = sum(float(masks[name].expand_as(net.get_parameter(name)).sum(dtype=torch.float64)) for name in weights)
    return 1 - kept / total if total else 0.0
