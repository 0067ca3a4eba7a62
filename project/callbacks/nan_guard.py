"""Stops a run when its loss becomes NaN or infinite, before it wastes hours or overwrites its last good checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class StopOnNaN(Callback):
    """Raises an error that names the step of the first loss that is NaN or infinite.

    The losses stay on their device and are checked together, because reading every single loss would make an
    accelerator wait at every step. They are also checked before validation and before a checkpoint is written. With
    several processes the mean of their losses is checked, so that all of them stop.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.StopOnNaN
              init_args: {every_n_steps: 1}  # find the batch at once, in a slower training

    Args:
        every_n_steps: number of training batches from one check to the next, 1 or more.

    Raises:
        ValueError: if ``every_n_steps`` is below 1; during training, if a loss is not finite.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}, but it counts training batches: choose 1 or more.")
        self.every_n_steps = every_n_steps
        self._losses: list[Tensor] = []
        self._moments: list[tuple[int, int, int, Any]] = []  # epoch, batch, step, learning rate
        self._lr: Any = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._moments = [], []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # read here: at the end of the batch, step and learning rate are those of the next one
        self._step = trainer.global_step
        self._lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else float("nan")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        self._losses.append(loss)
        self._moments.append((trainer.current_epoch, batch_idx, self._step, self._lr))
        if len(self._losses) >= self.every_n_steps:
            self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        losses, moments = self._losses, self._moments
        self._losses, self._moments = [], []
        if not losses:
            return
        values = torch.stack([loss.detach().float().mean() for loss in losses])
        if trainer.world_size > 1:
            values = trainer.strategy.reduce(values, reduce_op="mean")
        finite = values.isfinite().tolist()
        if all(finite):
            return
        first = finite.index(False)
        epoch, batch, step, lr = moments[first]
        raise ValueError(
            f"the loss is {values[first].item()} at step {step} (epoch {epoch}, batch {batch}) "
            f"with learning rate {float(lr):.3g}: lower the learning rate, clip gradients "
            "(--trainer.gradient_clip_val 1), or check that batch for broken images."
        )
