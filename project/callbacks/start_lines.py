"""Three lines at the start of a fit: its device, its data and its folder."""

import logging

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.places import run_of
from project.data import ImageDataModule
from project.frame.environment import cpu_model
from project.frame.paths import as_argument

log = logging.getLogger(__name__)


class StartLines(Callback):
    """Logs device and precision, number of images and classes, and the run's folder when a fit begins.

    Every run has this callback; a plain Lightning Trainer can take it as well.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from project.callbacks import StartLines
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[StartLines()])
        >>> any(isinstance(callback, StartLines) for callback in trainer.callbacks)
        True
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        log.info("device         %s", _device(trainer))
        data: object = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule) and data.train_data is not None:
            log.info("data           %s", _data(data, with_test=getattr(trainer, "test_after_fit", False)))
        if (run := run_of(trainer)) is not None:
            log.info("run            %s", as_argument(run.folder))


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        num_threads = torch.get_num_threads()
        name = f"{cpu_model() or 'CPU'}, {num_threads} thread{'s' if num_threads > 1 else ''}"
    else:
        name = str(device)
    processes = f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
    return f"{name}{processes}, precision {trainer.precision}"


def _data(data: ImageDataModule, *, with_test: bool) -> str:
    assert data.train_data is not None and data.val_data is not None
    parts = [f"{len(data.train_data)} training", f"{len(data.val_data)} validation"]
    if with_test:
        parts.append(f"{data.count_test_images()} test")
    counts = torch.bincount(data.train_data.labels, minlength=data.num_classes)
    rarest = int(counts.argmin())
    classes = f"{data.num_classes} classes, the rarest {data.class_names[rarest]!r} with {counts[rarest]} to train on"
    return f"{', '.join(parts)} images; {classes}"
