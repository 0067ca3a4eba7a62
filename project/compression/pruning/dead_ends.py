"""Weights that lead nowhere: their unit is read by no weight that is left.

Connectivity matters: neural network pruning through the lens of effective sparsity, Vysogorets & Kempe 2023
(arXiv:2107.02306, sec. 2): a weight on no path from the input to the output is inactive, and the more is pruned, the
more are. Our deviation: only what nothing reads is inactive here. A unit that reads nothing still adds a constant, its
bias passed on, and stays; so do units that a residual connection adds up, if any of them is read. Which weights read a
unit is found by :mod:`project.compression.thinning.dependency_graph`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from project.compression.pruning.masks import Group, Masks


@torch.no_grad()
def without_dead_ends(net: nn.Module, groups: Iterable[Group], masks: Mapping[str, Tensor]) -> Masks:
    """Masks that take the dead ends as well, with their biases and norms: the masked net's outputs stay the same.

    Args:
        net: whose parameters the masks are for; only shapes and names matter.
        groups: of single weights, in any order, with :attr:`~project.compression.pruning.masks.Group.units`.
        masks: of the groups' weights, in their shapes.
    """
    masks = {name: mask.clone() for name, mask in masks.items()}
    groups = [group for group in groups if group.units is not None]
    found = True
    while found:  # what fed a unit is a dead end without it
        found = False
        for group in groups:
            unread = ~_read(group, masks)
            for name in group.parameters:
                mask = masks.setdefault(name, torch.ones_like(net.get_parameter(name)))
                found |= bool(mask[unread].any())
                mask[unread] = 0
    return masks


def _read(group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """Of each unit, whether a weight reads it, ``[num]``."""
    assert group.units is not None
    device = masks[group.parameters[0]].device
    read = torch.zeros(group.units.num, dtype=torch.bool, device=device)
    for reader, pairs in group.units.inputs.items():
        units, inputs = torch.tensor(pairs, device=device).T
        if (mask := masks.get(f"{reader}.weight")) is None:
            read[units] = True
        else:
            read[units[mask.transpose(0, 1).flatten(1).any(1)[inputs]]] = True
    return read
