"""Checks before the first step of a pruning run: they find what would otherwise fail in its last round."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from project.compression.pruning.masks import Group
from project.compression.pruning.pruner import Pruner
from project.compression.pruning.saliency import check_norm_scales
from project.compression.pruning.schedules import Gradual, Rounds
from project.compression.saved_epochs import epochs_between_checkpoints
from project.data import ImageDataModule
from project.learning.classifier import Classifier


def check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Check that the run trains a Classifier for a number of epochs.

    Raises:
        ValueError: if the model is no Classifier, if ``max_epochs`` is missing, or if ``max_steps`` is set.
    """
    if not isinstance(module, Classifier):
        raise ValueError(
            f"the model is a {type(module).__name__}, but IterativeMagnitudePruning prunes the net of a Classifier: "
            "use project.learning.Classifier or a subclass."
        )
    steps = trainer.max_steps > 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if trainer.max_epochs is None or trainer.max_epochs < 1 or steps:
        raise ValueError(
            f"max_epochs is {trainer.max_epochs} and max_steps is {trainer.max_steps}, but pruning counts its rounds "
            "in epochs: set trainer.max_epochs, and leave max_steps out."
        )


def check_end(schedule: Rounds | Gradual, pruner: Pruner, groups: Sequence[Group], module: Classifier) -> None:
    """Check that the criterion can score the layers, and that they can lose the share that the schedule ends with.

    Raises:
        ValueError: if units have no norm but the criterion is ``norm_scale``, or if ``keep`` and ``round_to``, or one
            weight a layer, are more than the schedule leaves.
    """
    if pruner.criterion == "norm_scale":
        check_norm_scales(module.net, {group.layer: group.units for group in groups if group.units is not None})
    if pruner.scope != "global":
        return
    end = schedule.final if isinstance(schedule, Gradual) else schedule.level(-1)
    most = pruner.most(module.net, list(groups), module.image_shape)
    if end > most + 1e-9:
        rest = "at least one weight a layer" if pruner.structure == "weights" else f"round_to {pruner.round_to}"
        raise ValueError(
            f"the schedule ends with {100 * end:.6g} % of the {pruner.counted} gone, but with keep {pruner.keep:g} and "
            f"{rest} the layers to prune can lose {100 * most:.6g} % at most: prune less, choose a smaller keep or "
            "round_to, or include more layers."
        )


def check_run(
    trainer: Trainer, schedule: Rounds | Gradual, pruner: Pruner, dense_epochs: int, round_epochs: int
) -> None:
    """Check that there are images for the gradients, and that every level will have a checkpoint.

    Args:
        dense_epochs: number of epochs of the dense training.
        round_epochs: number of epochs of a round.

    Raises:
        ValueError: if there are no images but the criterion needs them, or if a level would have no checkpoint.
    """
    if pruner.needs_images and not isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
        raise ValueError(
            f"criterion is {pruner.criterion!r}, which needs training images for its gradients, but there is no "
            "ImageDataModule: give one, or choose the criterion magnitude."
        )
    every = epochs_between_checkpoints(trainer)
    last = dense_epochs // every * every  # the last epoch after which a checkpoint is written
    if isinstance(schedule, Gradual):
        if schedule.end_epoch >= last:
            raise ValueError(
                f"end_epoch is {schedule.end_epoch}, but the last checkpoint is written after epoch {last}: choose a "
                "smaller end_epoch, so that the pruned net is trained before it is saved."
            )
    elif min(dense_epochs, round_epochs) < every:
        raise ValueError(
            f"a checkpoint is written every {every} epochs, but a round has {round_epochs} and the dense training "
            f"{dense_epochs}: write checkpoints more often (every_n_epochs, check_val_every_n_epoch), or train longer."
        )
