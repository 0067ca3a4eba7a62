"""The last weight of a layer is never pruned, so that no layer is emptied, however small it is.

It is the layer's best weight. If dead ends are pruned too, it is the best of those units that the last weights of the
next layers read, so that it is no dead end itself. Only where they read no unit of the layer, such as in a branch that
is one of many, the layer may be a dead end as a whole.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from project.compression.pruning.dead_ends import read_units
from project.compression.pruning.masks import Group, Masks

log = logging.getLogger(__name__)


def last_weights(groups: Sequence[Group], scores: Mapping[str, Tensor], left: Mapping[str, Tensor]) -> Masks:
    """A mask for each layer, of bools, that has the one weight that is never pruned.

    Args:
        groups: groups of single weights, in the order of the net.
        scores: the score of each weight, by layer, in the shape of the weight.
        left: the weights that the rounds before have left, by layer, as bools in the shape of the weight.
    """
    last: Masks = {}
    read: Masks = {}  # the same by the weight's name, but nothing of layers that are dead ends as a whole
    for group in reversed(groups):  # readers first
        score, candidates = scores[group.layer], left[group.layer]
        alive: Tensor | bool = True
        if group.units is not None:
            rows = torch.ones(len(score), dtype=torch.bool)  # a unit may be several rows, as in a group of a norm
            rows[group.units.slices[f"{group.layer}.weight", 0]] = read_units(group.units, read)[:, None]
            alive = rows.to(score.device).view(-1, *[1] * (score.dim() - 1))
        if dead := not (candidates & alive).any():
            alive = True
        score = score.masked_fill(~(candidates & alive), -1)  # no score is below 0
        best = score.numel() - 1 - score.flatten().flip(0).argmax()  # of equal weights the last, as a ranking keeps it
        mask = torch.zeros_like(score, dtype=torch.bool).flatten()
        mask[best] = True
        last[group.layer] = mask.view(score.shape) & candidates
        read[group.parameters[0]] = last[group.layer] & (not dead)
    return dict(reversed(last.items()))


def keep_last_weights_(masks: Masks, last: Masks, left: Mapping[str, Tensor], remedy: str) -> None:
    """Give layers that are dead ends as a whole their last weight, and warn once of each layer that has no other.

    Args:
        masks: the new mask of each weight, by the weight's name; it is changed in place.
        last: the last weight of each layer, as :func:`last_weights` returns it.
        left: the weights that the rounds before have left, by layer, as bools in the shape of the weight.
        remedy: a change of the settings that leaves more of these layers.
    """
    for layer, best in last.items():
        mask = masks[f"{layer}.weight"]
        if not mask.any():
            mask.copy_(best)
        if mask.sum() == 1 < left[layer].sum():
            message = (
                "%s has one weight left, which is never pruned: to keep more of this layer, %s, or add it to exclude."
            )
            log.warning(message, layer, remedy)
