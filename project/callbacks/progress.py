"""Progress as one plain line for each epoch, for a log file or a scheduler's output.

On a terminal :mod:`project.callbacks.observe.progress_bars` draws bars instead.
"""

import logging
import os
import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from project.callbacks.clock import Clock
from project.frame.rooms import optional

log = logging.getLogger(__name__)


class ProgressLines(ProgressBar):
    """Logs ``epoch 3/20: train/loss 0.4012, val/accuracy 0.9011, … (12.1 s, 4512 images/s)`` after each epoch.

    Seconds and images per second count training only, without validation. The line is written when all metrics of the
    epoch are known, which is just before the next epoch.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.ProgressLines  # lines also on a terminal
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._clock = Clock()
        self._num_images = 0
        self._epoch: int | None = None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_line(trainer)
        self._epoch, self._num_images = trainer.current_epoch, 0
        self._clock = Clock()
        self._clock.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._num_images += len(batch[0]) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_line(trainer)

    def _write_line(self, trainer: Trainer) -> None:
        epoch, self._epoch = self._epoch, None
        if epoch is None or not self._enabled or not trainer.is_global_zero:
            return
        seconds = self._clock.seconds
        of_all = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        values = ", ".join(f"{name} {value.item():.4f}" for name, value in _metrics(trainer))
        speed = self._num_images / seconds if seconds else 0.0
        log.info("epoch %d%s: %s (%.1f s, %.0f images/s)", epoch + 1, of_all, values, seconds, speed)


def _metrics(trainer: Trainer) -> list[tuple[str, Any]]:
    """Metrics named ``train/…`` and ``val/…``, training before validation, the loss before other metrics.

    Test metrics and metrics of a single step are left out.
    """
    metrics = [(name, value) for name, value in trainer.callback_metrics.items() if name.startswith(("train/", "val/"))]
    return sorted(metrics, key=lambda metric: (metric[0].split("/")[0], not metric[0].endswith("/loss"), metric[0]))


def default_progress_bar() -> ProgressBar:
    """The progress display that suits the output.

    It is ``ProgressBars`` of ``project/callbacks/observe`` on a terminal that can move its cursor, else
    :class:`ProgressLines`.
    """
    bars = optional("callbacks.observe.progress_bars")
    if bars is not None and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return bars.ProgressBars()
    return ProgressLines()
