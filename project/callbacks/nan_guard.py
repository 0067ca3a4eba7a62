"""Stop a run whose loss is no number any more, before it burns hours or overwrites its last good checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class StopOnNaN(Callback):
    """Raises at the first loss that is NaN or infinite, naming its step.

    The losses are kept on their device and looked at together, since reading each one would make an accelerator wait at
    every step. They are also looked at before validation and before a checkpoint is written. Several processes look at
    the means of theirs, so that all of them end.

    Args:
        every_n_steps: training batches between looks, 1 or more.

    Raises:
        ValueError: for a number below 1; during training, for a loss that is not finite.
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
        # read here: at the batch's end the schedule has moved on and the step is counted
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
            "(--trainer.gradient_clip_val 1), or look at that batch for broken images."
        )
