"""Shows a training batch: the images after augmentation and mixing, as the net receives them, and their labels."""

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from project.callbacks.places import run_of, show_figure, tensorboard
from project.data import ImageDataModule

log = logging.getLogger(__name__)

_FLAT = 16 / 255  # 12-bit colours that are read as 16-bit ones span less


class LookAtBatch(Callback):
    """Draws the first training batch before the first step.

    The picture goes to TensorBoard, and to ``training_batch.png`` in the run's folder. If some of 64 training images,
    spread over the set, have nearly one colour, a warning says how many: their files may have been read wrongly.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.LookAtBatch
              init_args: {num_images: 64}

    Args:
        num_images: number of images of the batch to draw, 1 or more.

    Raises:
        ValueError: if ``num_images`` is below 1.
    """

    def __init__(self, num_images: int = 32) -> None:
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}, but it counts the images to draw: choose 1 or more.")
        self.num_images = num_images

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        data = getattr(trainer, "datamodule", None)
        if trainer.global_step or not isinstance(data, ImageDataModule):
            return
        images = denormalize(data.sample(64)[0].cpu(), data).flatten(1)
        flat = int((images.amax(dim=1) - images.amin(dim=1) < _FLAT).sum()) if len(images) else 0
        if flat:
            log.warning(
                "%d of %d training images have nearly one colour: see in training_batch.png whether they are right",
                flat,
                len(images),
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step or batch_idx or not len(batch[0]):  # a resumed run already has its picture
            return
        if tensorboard(trainer) is None and run_of(trainer) is None:
            return
        from project.callbacks.observe.plots import plot_images

        images, targets = (tensor[: self.num_images].detach().cpu() for tensor in batch[:2])
        titles = describe_targets(targets, pl_module.class_names)
        figure = plot_images(denormalize(images, pl_module), titles, heading="first training batch, augmented")
        show_figure(trainer, "training_batch", figure)


def denormalize(images: Tensor, module: Any) -> Tensor:
    """Turn normalised images ``[N, C, H, W]`` into pixels in [0, 1], with the classifier's ``mean`` and ``std``."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (module.mean, module.std))
    return images.float() * std + mean


def describe_targets(targets: Tensor, class_names: tuple[str, ...]) -> list[str]:
    """The class name of each target. A mixed target gives the two classes with the largest shares, and these shares."""
    if targets.dim() == 1:
        return [class_names[label] for label in targets.tolist()]
    shares, classes = targets.topk(min(2, targets.shape[1]), dim=1)
    return [
        "\n".join(f"{class_names[c]} {s:.0%}" for s, c in zip(*pair, strict=True) if s > 0.005)
        if pair[0][0] < 0.995
        else class_names[pair[1][0]]
        for pair in zip(shares.tolist(), classes.tolist(), strict=True)
    ]
