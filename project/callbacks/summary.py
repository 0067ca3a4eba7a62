"""Writes ``environment.json`` at the start of a run and ``summary.json`` at its end."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from project.callbacks.checkpoint import BestAndLast
from project.callbacks.clock import Clock
from project.callbacks.continuing import is_of_another_run
from project.callbacks.places import run_of
from project.frame.environment import changes, describe_environment, describe_kernels
from project.frame.paths import Run, write_whole
from project.metrics.complexity import count_parameters

log = logging.getLogger(__name__)


class WriteSummary(Callback):
    """Writes a run's final metrics and durations into ``summary.json`` in its folder; a later test adds its metrics.

    ``train_seconds`` is the time of the training epochs without validation, ``fit_seconds`` the time from the start of
    ``fit`` to its end. If a run is resumed, both include the time before. ``images_per_second`` is the number of
    training images divided by ``train_seconds``. Every run has this callback.

    Example::

        >>> from project.callbacks import WriteSummary, default_callbacks
        >>> callbacks = default_callbacks(observe=False, progress=False)
        >>> any(isinstance(callback, WriteSummary) for callback in callbacks)
        True
    """

    def __init__(self) -> None:
        self._train, self._fit = Clock(), Clock()
        self._num_images = 0
        self._environment: dict[str, Any] = {}
        self._now = self._environment
        self._has_trained = False
        self._before: dict[str, float] = {}  # metrics at the checkpoint that a resumed run continues

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._train, self._fit, self._num_images = Clock(), Clock(), 0
        self._has_trained, self._before = False, {}
        if (run := run_of(trainer)) is not None:
            self._describe(trainer, run)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit.start()
        if is_of_another_run(trainer):
            self._before = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train.start()  # a run that is resumed within an epoch does not start this epoch again

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._num_images += len(batch[0]) * trainer.world_size
        if not self._has_trained:
            self._has_trained = True
            self._write_environment(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train.resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train.stop()
        self._describe_kernels(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train.stop()
        self._fit.stop()
        if self._has_trained:
            self._describe_kernels(trainer)
        if (run := run_of(trainer)) is not None:
            # A resume that had nothing to train has measured nothing itself.
            before = self._before if self._has_trained else read_summary(run.summary) | self._before
            _write_json(run.summary, before | _metrics(trainer) | self._measured(trainer, pl_module))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (run := run_of(trainer)) is not None:
            metrics = {name: value for name, value in _metrics(trainer).items() if name.startswith("test/")}
            _write_json(run.summary, read_summary(run.summary) | metrics)

    def state_dict(self) -> dict[str, Any]:
        seconds = {"train_seconds": self._train.seconds, "fit_seconds": self._fit.seconds}
        return {**seconds, "num_images": self._num_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train, self._fit = Clock(state_dict["train_seconds"]), Clock(state_dict["fit_seconds"])
        self._num_images = state_dict["num_images"]
        self._before = state_dict.get("metrics", {})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"][self.state_key]["metrics"] = self._before | _metrics(trainer)

    def _describe(self, trainer: Trainer, run: Run) -> None:
        """Write ``environment.json``. If the fit goes on with a checkpoint, say what changes the bits since then.

        The file of a resumed run changes after the first step: a resume that fails leaves it as it is.
        """
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._environment = self._now = describe_environment() | {"device": name, "precision": str(trainer.precision)}
        origin: Run | None = getattr(trainer, "origin", None)
        if origin is not None and origin.environment.is_file():
            was = json.loads(origin.environment.read_text(encoding="utf-8"))
            if found := changes(was, self._now):
                log.warning("This resume cannot end in the bits of a run that never stopped: %s.", "; ".join(found))
            if origin == run:
                self._environment = was | {"resumes": [*was.get("resumes", []), self._now]}
        if not run.environment.is_file():
            _write_json(run.environment, self._environment)

    def _describe_kernels(self, trainer: Trainer) -> None:
        """Which kernels have run is known once the first epoch has ended."""
        if (kernels := describe_kernels()) != self._now.get("kernels"):
            self._now["kernels"] = kernels
            self._write_environment(trainer)

    def _write_environment(self, trainer: Trainer) -> None:
        if (run := run_of(trainer)) is not None:
            _write_json(run.environment, self._environment)

    def _measured(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        net = getattr(module, "net", module)
        checkpoints = trainer.checkpoint_callbacks
        checkpoint = next((c for c in checkpoints if isinstance(c, BestAndLast)), trainer.checkpoint_callback)
        best: str = getattr(checkpoint, "best_model_path", "")
        score: Tensor | None = getattr(checkpoint, "best_model_score", None)
        seconds = self._train.seconds
        return {
            "num_epochs": trainer.current_epoch,
            "num_steps": trainer.global_step,
            "train_seconds": round(seconds, 3),
            "fit_seconds": round(self._fit.seconds, 3),
            "images_per_second": round(self._num_images / seconds, 1) if seconds else None,
            "precision": trainer.precision,
            "num_parameters": count_parameters(net),
            "best_checkpoint": Path(best).name or None,
            "monitor": getattr(checkpoint, "monitor", None),
            "best_score": None if score is None else score.item(),
        }


def read_summary(path: Path) -> dict[str, Any]:
    """The content of a run's ``summary.json``; empty if the run has not ended."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _metrics(trainer: Trainer) -> dict[str, float]:
    """The last values that the module has logged under names such as ``val/loss``."""
    return {name: value.item() for name, value in sorted(trainer.callback_metrics.items()) if "/" in name}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))
