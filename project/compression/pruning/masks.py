"""Masks: 0/1 tensors that multiply parameters, broadcast over a unit's weights, and what of a net they take."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from project.compression.thinning.dependency_graph import UnitGroup
from project.compression.thinning.thin import plan_thinning
from project.metrics.complexity import count_macs

Masks = dict[str, Tensor]
"""Name of a parameter -> its mask."""


@dataclass(frozen=True)
class Group:
    """What is pruned together: the scores of one layer's weights, or of one layer's units.

    Args:
        layer: name in ``net.named_modules()``.
        parameters: names of the parameters that the masks act on, the layer's weight first.
        coupled: other layers that share these units, as where a residual connection adds them up.
        readers: of units, the layers that read them -> inputs for each unit.
        units: of weights whose dead ends go with them, who reads the layer's units; none where that is not known.
    """

    layer: str
    parameters: tuple[str, ...]
    coupled: tuple[str, ...] = ()
    readers: Mapping[str, int] = field(default_factory=dict)
    units: UnitGroup | None = None


@torch.no_grad()
def apply_masks_(net: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Multiply each masked parameter by its mask."""
    if masks:
        torch._foreach_mul_([net.get_parameter(name) for name in masks], list(masks.values()))


def removed_units(groups: Iterable[Group], masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """For each layer, the numbers of the units whose masks are 0: what thinning removes."""
    return {
        layer: (masks[group.parameters[0]].flatten(1)[:, 0] == 0).nonzero().flatten().tolist()
        for group in groups
        if group.parameters[0] in masks
        for layer in (group.layer, *group.coupled)
    }


def thinned_macs(
    net: nn.Module, groups: Iterable[Group], masks: Mapping[str, Tensor], image_shape: tuple[int, int, int]
) -> int:
    """Multiply-accumulates for one image of ``net`` without the units that the masks take, counted as it runs."""
    small = deepcopy(net).cpu()
    plan_thinning(small, removed_units(groups, masks), image_shape).apply_(small)
    return count_macs(small, image_shape)


def sparsity(masks: Mapping[str, Tensor], net: nn.Module) -> float:
    """Share of zeros that the masks put into the weights they act on (parameters of more than one dimension)."""
    weights = [name for name in masks if net.get_parameter(name).dim() > 1]
    total = sum(net.get_parameter(name).numel() for name in weights)
    kept = sum(float(masks[name].expand_as(net.get_parameter(name)).sum(dtype=torch.float64)) for name in weights)
    return 1 - kept / total if total else 0.0
