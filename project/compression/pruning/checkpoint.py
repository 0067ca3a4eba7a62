"""Write the checkpoint of the smaller net, without its pruned units, at the end of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from project.compression.pruning.masks import Masks, apply_masks_
from project.compression.thinning.thin import plan_thinning
from project.learning.checkpoints import fresh_checkpoint, load_with_weights, save_checkpoint
from project.learning.classifier import Classifier


def thin_checkpoint(
    module: Classifier, source: Path, target: Path, masks: Masks, removed: Mapping[str, Sequence[int]]
) -> None:
    """Write a checkpoint of the smaller net. It can be tested, exported or trained (new optimizer, from epoch 0).

    Args:
        module: a classifier that can load ``source`` after the surgeries stored in it; it is not changed.
        source: path of a checkpoint of the masked net.
        target: path of the new checkpoint; an existing file is replaced as a whole.
        masks: the mask of each pruned parameter, by the parameter's name.
        removed: the numbers of the units to remove, by layer name.
    """
    small, checkpoint = load_with_weights(module, source)
    apply_masks_(small.net, {name: mask.cpu() for name, mask in masks.items()})
    small.operate_(plan_thinning(small.net, removed, small.image_shape))
    save_checkpoint(fresh_checkpoint(small, checkpoint), target)
