"""Best and last checkpoint, under names that do not change: ``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from project.paths import Run, write_whole


class BestAndLast(ModelCheckpoint):
    """Keeps the best epoch by ``monitor`` and the last one; without validation data, the last one alone.

    Args:
        monitor: logged metric; names that end in ``loss`` are to fall, all others to rise.
        every_n_epochs: how often checkpoints are written.
    """

    def __init__(self, monitor: str = "val/accuracy", every_n_epochs: int = 1) -> None:
        super().__init__(
            filename="best",
            monitor=monitor,
            mode="min" if monitor.endswith("loss") else "max",
            save_top_k=1,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            every_n_epochs=every_n_epochs,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with warnings.catch_warnings():  # a resumed run writes where it has written before
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a run whose folder was moved or named differently, the best score is still the best score."""
        best = Path(str(self.dirpath)) / Path(state_dict["best_model_path"]).name
        super().load_state_dict({**state_dict, "dirpath": self.dirpath, "best_model_path": str(best)})

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Lightning 2.6 writes the last checkpoint only in epochs that wrote another: every epoch counts as one."""
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        self._last_global_step_saved = trainer.global_step

    def forget_best(self) -> None:
        """What comes now is compared with nothing before it; ``best.ckpt`` stays until the next is saved."""
        self.best_model_score = self.current_score = None
        self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.best_k_models, self.kth_best_model_path, self.best_model_path = {}, "", ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation or not any(trainer.num_val_batches):
            self.monitor = None
        super().on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning 2.6 writes a last checkpoint of ``fast_dev_run`` too, into the working directory."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            super().on_train_end(trainer, pl_module)

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether ``current`` is at least as good as the best: of equal epochs the later one has learned for longer."""
        if current is not None and self.best_model_score is not None:
            better = current <= self.best_model_score if self.mode == "min" else current >= self.best_model_score
            return bool(trainer.strategy.reduce_boolean_decision(bool(better)))
        return super().check_monitor_top_k(trainer, current)


def forget_best(trainer: pl.Trainer) -> None:
    """A new level begins: see :meth:`BestAndLast.forget_best`."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, BestAndLast):
            callback.forget_best()


def keep_best_as(run: Run, level: int) -> None:
    """Copy the best checkpoint, else the last, to a level's name, once: a resumed run may already have begun the next
    level.
    """
    source = run.best_or_last
    kept = run.level_checkpoint(level)
    if source.is_file() and not kept.is_file():
        write_whole(kept, lambda part: shutil.copyfile(source, part))
