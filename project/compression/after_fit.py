"""What callbacks have in common that make something of the best checkpoint when a fit is over."""

import logging
from abc import abstractmethod
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.places import is_complete, run_of
from project.data import ImageDataModule
from project.frame.paths import Run
from project.learning.classifier import Classifier

log = logging.getLogger(__name__)


class AfterFit(Callback):
    """Calls :meth:`after_fit` once, on the first process, when a fit has ended for good and left a checkpoint."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before the first step, a model or data that nothing can be made and measured of."""
        if stage != "fit":
            return
        name = type(self).__name__
        if not isinstance(pl_module, Classifier):
            raise ValueError(f"the model is a {type(pl_module).__name__}, but {name} takes a Classifier's net.")
        if not isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
            raise ValueError(f"{name} needs the run's images beside its net: fit with an ImageDataModule.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        run = run_of(trainer)
        if run is None or not is_complete(trainer):
            return  # fast_dev_run, or a run that is to be resumed
        if not run.best_or_last.is_file():
            log.warning("%s found no checkpoint: switch trainer.enable_checkpointing on", type(self).__name__)
            return
        self.after_fit(trainer, pl_module, run, run.best_or_last)

    @abstractmethod
    def after_fit(self, trainer: Trainer, module: Classifier, run: Run, source: Path) -> None:
        """Make of the checkpoint ``source`` what is to be made, and its row of the run's report."""
