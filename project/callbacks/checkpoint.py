"""Saves the best and the last checkpoint under fixed names: ``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``."""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from project.callbacks.continuing import is_of_another_run
from project.frame.logger import log_epoch
from project.frame.paths import Run, write_whole


class BestAndLast(ModelCheckpoint):
    """Keeps a checkpoint of the best epoch and of the last epoch; without validation data, of the last epoch only.

    The best epoch is the one with the best value of ``monitor``. If two epochs are equally good, the later one counts
    as the best.

    If the run has another ``ModelCheckpoint`` that has a ``monitor`` and keeps files, that callback decides which
    epoch is the best: ``best.ckpt`` is then a copy of its ``best_model_path``, and ``monitor`` here is ignored.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.BestAndLast
              init_args: {monitor: val/loss, every_n_epochs: 5}

    Args:
        monitor: name of the logged metric that decides which epoch is the best. A metric whose name ends in ``loss``
            is better when it is lower, every other metric when it is higher.
        every_n_epochs: number of epochs from one checkpoint to the next, 1 or more.
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
        self.followed: ModelCheckpoint | None = None
        """The user's checkpoint callback that decides which epoch is the best; ``None`` if this callback decides."""
        self._copied: tuple[Path, int] | None = None
        self._asked_by: list[ModelCheckpoint] = []  # callbacks that write last.ckpt too
        self._asked_at = 0  # step of the last checkpoint within an epoch

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with warnings.catch_warnings():  # a resumed run writes into the folder that it already has
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        others = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c is not self]
        for other in others:
            _check_filename(other, str(self.dirpath))
            if other.dirpath == self.dirpath and other.CHECKPOINT_NAME_LAST == self.CHECKPOINT_NAME_LAST:
                # This callback writes last.ckpt, whole, whenever the other would.
                self._asked_by += [other] if other.save_last and other not in self._asked_by else []
                other.save_last = None
        self.followed = next((c for c in others if c.monitor is not None and c.save_top_k != 0), None)
        if self.followed is not None:
            self.monitor, self.mode, self.save_top_k = self.followed.monitor, self.followed.mode, 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct the paths if the run's folder was moved, so that its best score stays valid.

        The best score of another run is dropped, and a state that names files elsewhere.
        """
        states = checkpoint.get("callbacks", {})
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.state_key in states:
                folder = Path(str(callback.dirpath))
                moved = _in_folder(states[callback.state_key], folder)
                is_foreign = is_of_another_run(trainer) or not _is_inside(moved, folder)
                states[callback.state_key] = {} if is_foreign else moved

    def state_dict(self) -> dict[str, Any]:
        """The state, which is the same whether the run was stopped between the best and the last checkpoint or not."""
        return super().state_dict() | {"last_model_path": str(Path(str(self.dirpath)) / "last.ckpt")}

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Let the last checkpoint be written in every epoch.

        Lightning 2.6 writes it only in an epoch that also wrote another checkpoint. Setting the saved step makes every
        epoch such an epoch.
        """
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        self._last_global_step_saved = trainer.global_step

    def forget_best(self) -> None:
        """Forget the best score so far. ``best.ckpt`` stays on disk until the next checkpoint replaces it."""
        _forget_best(self)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Write the last checkpoint, unless it is that of this step already.

        Args:
            trainer: trainer whose state is written.
        """
        if trainer.global_step and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.followed is None and (not trainer.enable_validation or not any(trainer.num_val_batches)):
            self.monitor = None
        if self.followed is not None:  # a resumed run may already have this copy
            best, named = _version(str(self._best)), _version(self.followed.best_model_path)
            self._copied = named if best and named and best[1] >= named[1] else None
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Write the last checkpoint within an epoch, if a callback with ``save_last`` has just saved there.

        After the last batch it waits for the end of the epoch: a resume would leave out its validation.
        """
        super().on_train_batch_end(trainer, *args)
        step = trainer.global_step
        if self._is_due(trainer) and trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            return
        if self._asked_at != step and any(other._last_global_step_saved == step for other in self._asked_by):
            self._asked_at = step
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._follow(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.current_score = state_dict.get("current_score")  # Lightning 2.6 forgets it

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log_epoch(trainer)
        super().on_train_epoch_end(trainer, pl_module)
        if self._is_due(trainer) and not trainer.fast_dev_run and not self._should_save_on_train_epoch_end(trainer):  # type: ignore[attr-defined]
            # Lightning 2.6 saves after validation only, if that is not at the end of every epoch.
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._follow(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last checkpoint, but not after ``fast_dev_run``.

        Lightning 2.6 would write it into the working directory then.
        """
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            super().on_train_end(trainer, pl_module)
            self.save_now(trainer)  # between two epochs of every_n_epochs
            self._follow(trainer)

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether ``current`` is at least as good as the best score so far.

        Of two equally good epochs the later one is kept, since it has trained for longer.
        """
        if current is not None and self.best_model_score is not None:
            better = current <= self.best_model_score if self.mode == "min" else current >= self.best_model_score
            return bool(trainer.strategy.reduce_boolean_decision(bool(better)))
        return super().check_monitor_top_k(trainer, current)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether the end of this epoch has a checkpoint."""
        return (trainer.current_epoch + 1) % self._every_n_epochs == 0

    @property
    def _best(self) -> Path:
        return Path(str(self.dirpath)) / "best.ckpt"

    def _follow(self, trainer: pl.Trainer) -> None:
        """Copy the file that the followed callback names as its best to ``best.ckpt``.

        Until that callback names a file, the last checkpoint is copied.
        """
        if self.followed is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        version = _version(self.followed.best_model_path or self.last_model_path)
        if version is None or version == self._copied:
            return
        source, self._copied = version[0], version
        if trainer.is_global_zero and source != self._best:
            write_whole(self._best, lambda part: shutil.copyfile(source, part))
        self.best_model_path, self.best_model_score = str(self._best), self.followed.best_model_score


def forget_best(trainer: pl.Trainer) -> None:
    """Start a new level: the checkpoints from now on are not compared with earlier ones.

    This resets :class:`BestAndLast` and the callback that it follows, if there is one.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, BestAndLast):
            callback.forget_best()
            if callback.followed is not None:
                if callback.followed.save_top_k > 0:
                    for path in callback.followed.best_k_models:
                        trainer.strategy.remove_checkpoint(path)
                _forget_best(callback.followed)


def keep_best_as(run: Run, level: int) -> None:
    """Copy the best checkpoint, or the last one if there is no best, to ``level_<level>.ckpt``.

    An existing file is kept: a resumed run may already have begun the next level, and its best checkpoint is then
    one of that level.
    """
    source = run.best_or_last
    kept = run.level_checkpoint(level)
    if source.is_file() and not kept.is_file():
        write_whole(kept, lambda part: shutil.copyfile(source, part))


def _forget_best(callback: ModelCheckpoint) -> None:
    callback.best_model_score = callback.current_score = None
    callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
    callback.best_k_models, callback.kth_best_model_path, callback.best_model_path = {}, "", ""


def _version(path: str) -> tuple[Path, int] | None:
    """The file and its time of modification, which tells two files of the same name apart; ``None`` without a file."""
    return (Path(path), Path(path).stat().st_mtime_ns) if path and Path(path).is_file() else None


def _in_folder(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state of a checkpoint callback, with its paths moved to ``folder``; empty if the best file is not there."""
    before = Path(str(state["dirpath"]))

    def moved(path: str) -> str:
        inside = Path(path).is_relative_to(before)
        return str(folder / Path(path).relative_to(before)) if path and inside else path

    if before == folder:
        return state
    paths = {key: moved(state[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
    best = Path(paths["best_model_path"])
    if not best.is_file() or not best.is_relative_to(folder):
        return {}
    models = {moved(path): score for path, score in state["best_k_models"].items()}
    return {**state, **paths, "dirpath": str(folder), "best_k_models": models}


def _is_inside(state: dict[str, Any], folder: Path) -> bool:
    """Whether all files of a state are below ``folder``. The callback deletes them when it has better ones."""
    keys = ("best_model_path", "kth_best_model_path", "last_model_path")
    paths = [*(state.get(key) for key in keys), *state.get("best_k_models", ())]
    return all(Path(path).resolve().is_relative_to(folder.resolve()) for path in paths if path)


def _check_filename(callback: ModelCheckpoint, folder: str) -> None:
    name = callback.filename or ""
    taken = re.fullmatch(r"last|level_\d+", name) or (name == "best" and callback.save_top_k != 1)
    if taken and callback.dirpath == folder:
        raise ValueError(
            f"filename of {type(callback).__name__} is {name!r}, but the run itself writes checkpoints/{name}.ckpt: "
            "choose another filename, such as '{epoch}'."
        )
