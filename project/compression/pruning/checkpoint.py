"""Write the checkpoint that a run with removed units ends with."""

from pathlib import Path

from project.learning.checkpoints import fresh_checkpoint, load_with_weights, save_checkpoint
from project.learning.classifier import Classifier


def keep_fresh(module: Classifier, source: Path, target: Path) -> None:
    """Copy a checkpoint without the state of its run. It can be trained again, with a new optimizer and from epoch 0.

    Args:
        module: classifier that can load ``source``; it is not changed.
        source: path of a checkpoint.
        target: path of the new checkpoint; an existing file is replaced as a whole.
    """
    small, checkpoint = load_with_weights(module, source)
    save_checkpoint(fresh_checkpoint(small, checkpoint), target)
