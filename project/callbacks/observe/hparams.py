"""Shows hyperparameters and final metrics side by side in TensorBoard's HParams tab."""

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.clock import Clock
from project.callbacks.places import tensorboard
from project.metrics.complexity import count_macs, count_parameters

METRICS = ("val/accuracy", "val/loss", "test/accuracy", "test/loss", "fit_seconds")
"""Metric columns of the tab. The tab shows the last value of each scalar, so logged metrics need no second write."""

Plain = bool | int | float | str


class HParams(Callback):
    """Writes the run's hyperparameters when training starts, and the duration of the fit in seconds when it ends.

    Since they are written at the start, a run that fails is listed too. The hyperparameters are those of the classifier
    (``pl_module.hparams``, with flat names such as ``net.init_args.width``), the class names of net, data and
    optimizer, and learning rate, batch size, epochs, seed, number of parameters and multiply-accumulates.

    All values go into the run's own event file. TensorBoard keeps only the first declaration of a folder, so the logger
    itself must not write one: use ``TensorBoardLogger(default_hp_metric=False)``.

    Example::

        trainer:
          observe: false  # no pictures and no histograms
          callbacks+:
            - class_path: project.callbacks.HParams
    """

    def __init__(self) -> None:
        self._clock = Clock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = Clock()
        self._clock.start()
        if (writer := tensorboard(trainer)) is None:
            return
        from torch.utils.tensorboard.summary import hparams

        experiment, start, _ = hparams(hyperparameters(trainer, pl_module), dict.fromkeys(METRICS, 0.0))
        file_writer = writer._get_file_writer()
        file_writer.add_summary(experiment)
        file_writer.add_summary(start)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (writer := tensorboard(trainer)) is None:
            return
        from torch.utils.tensorboard.summary import hparams

        writer.add_scalar("fit_seconds", self._clock.seconds, trainer.global_step)
        writer._get_file_writer().add_summary(hparams({}, {})[2])  # the end; else the tab shows the run as running
        writer.flush()


def hyperparameters(trainer: Trainer, module: LightningModule) -> dict[str, Plain]:
    """All hyperparameters of a run, as a flat dictionary of plain values."""
    net = getattr(module, "net", module)
    image_shape: Any = getattr(module, "image_shape", None)
    values: dict[str, Any] = flatten(dict(module.hparams))
    values["net"] = type(net).__name__
    values["num_parameters"] = count_parameters(net)
    if image_shape:
        values["macs"] = count_macs(net, image_shape)
    if (datamodule := getattr(trainer, "datamodule", None)) is not None:
        values["data"] = type(datamodule).__name__
        values["batch_size"] = getattr(datamodule, "batch_size", None)
    if trainer.optimizers:
        optimizer = trainer.optimizers[0]
        group = optimizer.param_groups[0]
        values["optimizer"] = type(optimizer).__name__
        values["lr"] = float(group.get("max_lr", group.get("initial_lr", group["lr"])))
        values["weight_decay"] = group.get("weight_decay")
    values["max_epochs"] = trainer.max_epochs
    values["precision"] = str(trainer.precision)
    values["seed"] = int(os.environ.get("PL_GLOBAL_SEED", 0))
    values |= getattr(trainer, "searched", {})
    return {name: value for name, value in values.items() if value is not None}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Plain]:
    """Flatten nested dictionaries: ``{"net": {"width": 2}}`` becomes ``{"net.width": 2}``.

    Lists of up to 8 items become strings. Longer lists, such as class names, are left out.
    """
    flat: dict[str, Plain] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key.startswith("_"):  # added by jsonargparse
            continue
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[name] = value
        elif isinstance(value, list | tuple) and len(value) <= 8:
            flat[name] = str(value)
    return flat
