"""Hyperparameters beside final metrics, in TensorBoard's HParams tab."""

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.clock import Clock
from project.callbacks.places import tensorboard
from project.metrics.complexity import count_macs, count_parameters

METRICS = ("val/accuracy", "val/loss", "test/accuracy", "test/loss", "fit_seconds")
"""Columns of the tab. It shows each scalar's last value, so those that the module logs need not be written again."""

Plain = bool | int | float | str


class HParams(Callback):
    """Declares the run's hyperparameters when training starts, so that a run that fails is listed too, and its
    seconds at the end.

    They are the classifier's own (``pl_module.hparams``, flattened to ``net.init_args.width``), and what the other
    objects have: names of net, data, optimizer; learning rate, batch size, epochs, seed, parameters,
        multiply-accumulates.

    All goes into the run's own event file. TensorBoard keeps the first declaration in a folder, so the logger must
    not write one itself: ``TensorBoardLogger(default_hp_metric=False)``.
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
        writer._get_file_writer().add_summary(hparams({}, {})[2])  # the end: without it the run counts as going on
        writer.flush()


def hyperparameters(trainer: Trainer, module: LightningModule) -> dict[str, Plain]:
    """All that was chosen for a run, flat and plain."""
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
    """``{"net": {"width": 2}} -> {"net.width": 2}``; lists of up to 8 become strings, longer ones (class names) are
    left out.
    """
    flat: dict[str, Plain] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key.startswith("_"):  # jsonargparse's own
            continue
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[name] = value
        elif isinstance(value, list | tuple) and len(value) <= 8:
            flat[name] = str(value)
    return flat
