"""Masks: tensors of 0 and 1 that multiply parameters, and how much of a net they remove.

If single weights are pruned, a mask has the shape of its parameter. If units are pruned, a mask has one number for each
unit, ``[num_units, 1, ...]``, and is broadcast over the weights of the unit.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from project.compression.thinning.dependency_graph import UnitGroup
from project.compression.thinning.thin import plan_thinning
from project.metrics.complexity import count_macs

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
        2 ('2.weight', '2.bias') {'5': 16}
        5 ('5.weight', '5.bias') {'7': 1}

    Args:
        layer: the layer's name in ``net.named_modules()``.
        parameters: names of the parameters that are masked; the first is the layer's weight.
        coupled: names of other layers that have the same units, for example because a residual connection adds them
            together.
        readers: the layers that read the units, each with the number of its inputs that one unit fills (1, or several
            if a channel is flattened). Empty for groups of single weights.
        units: the layer's units and the inputs that read each of them, for groups of single weights that are pruned
            with their dead ends. ``None`` if dead ends are not pruned, or if the readers are not known.
    """

    layer: str
    parameters: tuple[str, ...]
    coupled: tuple[str, ...] = ()
    readers: Mapping[str, int] = field(default_factory=dict)
    units: UnitGroup | None = None


@torch.no_grad()
def apply_masks_(net: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Multiply each masked parameter by its mask, in place.

    Args:
        net: the net whose parameters are masked.
        masks: the mask of each pruned parameter, by the parameter's name.
    """
    if masks:
        torch._foreach_mul_([net.get_parameter(name) for name in masks], list(masks.values()))


def removed_units(groups: Iterable[Group], masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """For each layer, the numbers of the units whose mask is 0, which thinning removes.

    Args:
        groups: the groups of units that were pruned.
        masks: the mask of each pruned parameter, by the parameter's name.
    """
    return {
        layer: (masks[group.parameters[0]].flatten(1)[:, 0] == 0).nonzero().flatten().tolist()
        for group in groups
        if group.parameters[0] in masks
        for layer in (group.layer, *group.coupled)
    }


def thinned_macs(
    net: nn.Module, groups: Iterable[Group], masks: Mapping[str, Tensor], image_shape: tuple[int, int, int]
) -> int:
    """Multiply-accumulates for one image after the masked units are removed, counted while a thinned copy runs."""
    small = deepcopy(net).cpu()
    plan_thinning(small, removed_units(groups, masks), image_shape).apply_(small)
    return count_macs(small, image_shape)


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
