"""How often a run writes checkpoints, and so when a technique has to begin, to be in one of them."""

import math

from lightning.pytorch import Trainer

from project.callbacks.checkpoint import BestAndLast


def epochs_between_checkpoints(trainer: Trainer) -> int:
    """Number of epochs from one checkpoint to the next; 1 if the run writes none.

    Args:
        trainer: trainer of the run.
    """
    best = next((each for each in trainer.checkpoint_callbacks if isinstance(each, BestAndLast)), None)
    return 1 if best is None else math.lcm(best._every_n_epochs, trainer.check_val_every_n_epoch or 1)


def check_saved(trainer: Trainer, begin_epoch: int, given: str = "") -> None:
    """Check that a checkpoint is written after the technique has begun. Else an older net would be taken for its.

    Args:
        trainer: trainer of the run.
        begin_epoch: first epoch with the technique, 0 or more.
        given: the arguments that decide this epoch, as the error names them; empty if it is ``begin_epoch`` itself.

    Raises:
        ValueError: if the last checkpoint is older than that.
    """
    every = epochs_between_checkpoints(trainer)
    last = (trainer.max_epochs or 0) // every * every
    if 0 < last <= begin_epoch and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            f"{given or f'begin_epoch is {begin_epoch}'}, but the last checkpoint is written after epoch {last}: begin "
            "earlier, or write checkpoints more often (every_n_epochs, check_val_every_n_epoch)."
        )
