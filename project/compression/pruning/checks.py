"""What would go wrong in a pruning run's last round is refused before its first step."""

import math
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from project.callbacks.checkpoint import BestAndLast
from project.compression.pruning.masks import Group
from project.compression.pruning.pruner import Pruner
from project.compression.pruning.schedules import Gradual, Rounds
from project.data import ImageDataModule
from project.learning.classifier import Classifier


def check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Rounds are counted in epochs, of a Classifier, and nothing else ends the run.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(module, Classifier):
        raise ValueError(f"the model is a {type(module).__name__}, but pruning works on a Classifier's net.")
    if any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "callbacks hold EarlyStopping, which would end the run in whichever round it is in: leave it out (the "
            "best epoch of each level is kept anyway), or stop the dense training by a smaller max_epochs."
        )
    steps = trainer.max_steps > 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if trainer.max_epochs is None or trainer.max_epochs < 1 or steps:
        raise ValueError("pruning counts its rounds in epochs: set trainer.max_epochs, and leave max_steps out.")


def check_end(schedule: Rounds | Gradual, pruner: Pruner, groups: Sequence[Group], module: Classifier) -> None:
    """The included layers can lose what the schedule ends with.

    Raises:
        ValueError: otherwise.
    """
    if pruner.scope != "global":
        return
    end = schedule.final if isinstance(schedule, Gradual) else schedule.level(-1)
    most = pruner.most(module.net, list(groups), module.image_shape)
    if end > most + 1e-9:
        raise ValueError(
            f"the schedule ends with {100 * end:.4g} % of the {pruner.counted} gone, but with keep {pruner.keep:g} and "
            f"round_to {pruner.round_to} the included layers can lose {100 * most:.4g} % at most: prune less, choose "
            "a smaller keep or round_to, or include more layers."
        )


def check_run(
    trainer: Trainer, schedule: Rounds | Gradual, pruner: Pruner, dense_epochs: int, round_epochs: int
) -> None:
    """There are images where gradients are taken, and a checkpoint of every level.

    Args:
        dense_epochs, round_epochs: lengths of the dense training and of a round.

    Raises:
        ValueError: otherwise.
    """
    if pruner.needs_images and not isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
        raise ValueError(
            f"criterion is {pruner.criterion!r}, which takes gradients of training images, but there is no "
            "ImageDataModule: give one, or choose the criterion magnitude."
        )
    best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLast)), None)
    every = 1 if best is None else math.lcm(best._every_n_epochs, trainer.check_val_every_n_epoch or 1)
    last = dense_epochs // every * every
    if isinstance(schedule, Gradual):
        if schedule.end_epoch >= last:
            raise ValueError(
                f"end_epoch is {schedule.end_epoch}, but the last checkpoint is written after epoch {last}: end the "
                "pruning before, so that the net can heal."
            )
    elif min(dense_epochs, round_epochs) < every:
        raise ValueError(
            f"checkpoints are written every {every} epochs, but a round lasts {round_epochs} and the dense training "
            f"{dense_epochs}: write them more often, or train each for longer."
        )
