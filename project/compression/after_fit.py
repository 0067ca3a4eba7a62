"""Base class of callbacks that process the best checkpoint after ``fit`` ends."""

import logging
from abc import abstractmethod
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from project.callbacks.places import run_of
from project.data import ImageDataModule
from project.frame.paths import Run
from project.learning.classifier import Classifier

log = logging.getLogger(__name__)


class AfterFit(Callback):
    """Calls :meth:`after_fit` once when a fit has reached its end and has left a checkpoint.

    Nothing happens after ``fast_dev_run``, and nothing in a run that was stopped and can be resumed.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before the first step, that the model is a ``Classifier`` and the data an ``ImageDataModule``.

        Raises:
            ValueError: if one of them is not.
        """
        if stage != "fit":
            return
        name = type(self).__name__
        if not isinstance(pl_module, Classifier):
            raise ValueError(f"the model is a {type(pl_module).__name__}, but {name} needs a Classifier.")
        if not isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
            raise ValueError(f"{name} needs the run's images, but the data are no ImageDataModule: fit with one.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        run = run_of(trainer)
        if run is None or not is_complete(trainer):
            return  # fast_dev_run, or a run that was stopped and can be resumed
        if not run.best_or_last.is_file():
            log.warning("%s found no checkpoint: set trainer.enable_checkpointing: true", type(self).__name__)
            return
        self.after_fit(trainer, pl_module, run, run.best_or_last)

    @abstractmethod
    def after_fit(self, trainer: Trainer, module: Classifier, run: Run, source: Path) -> None:
        """Process a checkpoint, and add a row to the report of the run.

        Args:
            trainer: trainer whose fit has ended, with an ``ImageDataModule``.
            module: classifier of the run; it must not be changed.
            run: folder of the run, for the results.
            source: checkpoint to process: the best one of the run, or the last one if there is no best.
        """


def is_complete(trainer: Trainer) -> bool:
    """Whether a fit is complete: it has reached its last epoch or step, or EarlyStopping has ended it.

    A fit that a time limit or a signal has ended is not complete: it can be resumed.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, EarlyStopping) and callback.stopping_reason.value for callback in callbacks):
        return True
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch
