"""The checkpoint of a net without its pruned units, made when a run ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from project.compression.pruning.masks import Masks, apply_masks_
from project.compression.thinning.thin import plan_thinning
from project.frame.paths import write_whole
from project.learning.checkpoints import fresh_checkpoint, load_with_weights
from project.learning.classifier import Classifier


def thin_checkpoint(
    module: Classifier, source: Path, target: Path, masks: Masks, removed: Mapping[str, Sequence[int]]
) -> None:
    """Write a checkpoint of the smaller net, to test, export or train on (with a fresh optimizer, from epoch 0).

    Args:
        module: whose structure fits the source after its surgeries; left as it was.
        source: a checkpoint of the masked net.
        target: is overwritten as a whole.
        masks: on the net's parameters, by name.
        removed: numbers of the units that go, by layer.
    """
    small, checkpoint = load_with_weights(module, source)
    apply_masks_(small.net, {name: mask.cpu() for name, mask in masks.items()})
    small.operate_(plan_thinning(small.net, removed, small.image_shape))
    write_whole(target, lambda part: torch.save(fresh_checkpoint(small, checkpoint), part))
