"""Dead ends: weights of a unit whose output no remaining weight reads.

Connectivity matters: neural network pruning through the lens of effective sparsity, Vysogorets & Kempe 2023
(arXiv:2107.02306, sec. 2): a weight that lies on no path from the input to the output is inactive. The more weights are
pruned, the more of the others are inactive.

Our deviation: here a weight is inactive only if nothing reads its unit. A unit that reads nothing itself stays, because
its bias still adds a constant to the layers after it. Units that a residual connection adds together stay if any of
them is read. :mod:`project.compression.thinning.dependency_graph` finds the weights that read a unit.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from project.compression.pruning.masks import Group, Masks


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
    groups = [group for group in groups if group.units is not None]
    found = True
    while found:  # a dead unit reads nothing, so that the units it read may be dead ends in the next pass
        found = False
        for group in groups:
            unread = ~read_units(group, masks, masks[group.parameters[0]].device)
            for name in group.parameters:
                mask = masks.setdefault(name, torch.ones_like(net.get_parameter(name)))
                found |= bool(mask[unread].any())
                mask[unread] = 0
    return masks


def read_units(group: Group, masks: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """For each unit of the group, whether a remaining weight reads it, ``[num]``.

    Args:
        group: a group whose units are known.
        masks: the mask of each pruned weight, by its name; a layer without a mask reads all its inputs.
        device: the device of the masks.
    """
    assert group.units is not None
    read = torch.zeros(group.units.num, dtype=torch.bool, device=device)
    for reader, pairs in group.units.inputs.items():
        units, inputs = torch.tensor(pairs, device=device).T
        if (mask := masks.get(f"{reader}.weight")) is None:  # this layer is not pruned and reads all its inputs
            read[units] = True
        else:  # [out, in, ...] -> [in]: does any weight that is left read this input?
            read[units[mask.transpose(0, 1).flatten(1).any(1)[inputs]]] = True
    return read
