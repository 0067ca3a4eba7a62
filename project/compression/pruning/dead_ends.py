"""Dead ends: weights of a unit whose output no remaining weight reads.

Connectivity matters: neural network pruning through the lens of effective sparsity, Vysogorets & Kempe 2023
(arXiv:2107.02306, sec. 2): a weight that lies on no path from the input to the output is inactive. The more weights are
pruned, the more of the others are inactive.

Our deviation: here a weight is inactive only if nothing reads its unit. A unit that reads nothing itself stays, because
its bias still adds a constant to the layers after it. Units that a residual connection adds together stay if any of
them is read. :mod:`project.compression.thinning.dependency_graph` finds the weights that read a unit.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from project.compression.pruning.masks import Group, Masks
from project.compression.thinning.groups import Units


@torch.no_grad()
def without_dead_ends(net: nn.Module, groups: Iterable[Group], masks: Mapping[str, Tensor]) -> Masks:
    """Masks that also remove the dead ends, with their biases and norms. The masked net's outputs stay the same.

    Args:
        net: the net that the masks are for; only the names and shapes of its parameters matter.
        groups: groups of single weights, in any order. A group whose
            :attr:`~project.compression.pruning.masks.Group.units` is ``None`` has no dead ends.
        masks: the mask of each group's weight, in the shape of the weight.
    """
    masks = {name: mask.clone() for name, mask in masks.items()}
    parameters = dict(net.named_parameters())
    groups = [group for group in groups if group.units is not None]
    found = True
    while found:  # a dead unit reads nothing, so that the units it read may be dead ends in the next pass
        found = False
        for group in groups:
            assert group.units is not None
            unread = ~read_units(group.units, masks)
            for name, dim in group.units.slices:
                if (name, dim) not in group.units.read and name in parameters:
                    mask = masks.setdefault(name, torch.ones_like(parameters[name]))
                    indices = group.units.slices[name, dim].to(mask.device)[unread.to(mask.device)].flatten()
                    found |= bool(mask.index_select(dim, indices).any())
                    mask.index_fill_(dim, indices, 0)
    return masks


def read_units(units: Units, masks: Mapping[str, Tensor]) -> Tensor:
    """For each unit, whether a remaining weight reads it, or a norm's statistic, ``[num]`` on the CPU.

    Args:
        units: the units of a layer.
        masks: the mask of each pruned weight, by its name; a layer without a mask reads all its inputs.
    """
    read = torch.full((units.num,), units.values < math.inf)
    for name, dim in units.read:
        if (mask := masks.get(name)) is None:  # this layer is not pruned and reads all its inputs
            return torch.ones(units.num, dtype=torch.bool)
        along = mask.movedim(dim, 0).flatten(1).any(1).cpu()  # does any weight that is left read this input?
        read |= along[units.slices[name, dim]].any(1)
    return read
