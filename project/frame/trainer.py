"""Lightning's Trainer plus one folder per run, default callbacks, a test after fit, and prediction on image files."""

import logging
import os
import shutil
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment

from project.callbacks.defaults import default_callbacks
from project.frame.logger import MetricsCSV
from project.frame.paths import Paths, Run
from project.frame.rooms import optional
from project.learning.checkpoints import check_checkpoint
from project.learning.classifier import Classifier
from project.learning.process import fastest_precision, tune_process
from project.learning.whole_batch import WholeBatch

log = logging.getLogger(__name__)

_RUN_FOLDER = "PROJECT_RUN_FOLDER"
"""Names the run's folder to the processes that Lightning starts."""


class RunTrainer(pl.Trainer):
    """Lightning's Trainer; every run is a folder, whichever loggers are on.

    Args:
        experiment: the run's folder is ``<logs>/<experiment>/version_N``; null is the first configuration file's name.
        logs_dir: folder of all runs; null takes ``PROJECT_LOGS_DIR``, else ``logs``.
        test_after_fit: end ``fit`` with a test of the best checkpoint.
        observe: TensorBoard pictures of the first batch, the graph, histograms, mistakes, confusion; hyperparameters.
        logger: null or true is TensorBoard; ``metrics.csv`` is always written.
        callbacks: added to the defaults; one of a default's class takes its place.
        enable_checkpointing: null and true keep the best and the last checkpoint.
        enable_progress_bar: null and true show a bar on a terminal, lines elsewhere.
        enable_model_summary: Lightning's table of layers.
        precision: as Lightning's; auto is bf16-mixed where the processor has products of bfloat16, else 32-true.
        accelerator: see Lightning.
        sync_batchnorm: layers see the batch of all processes: batch norm's statistics, dropout's draws. A fit in R
            processes is then that of one with R times the batch, up to rounding; see
            :mod:`project.learning.whole_batch`.
    """

    def __init__(
        self,
        *,
        experiment: str | None = None,
        logs_dir: str | None = None,
        test_after_fit: bool = True,
        observe: bool = True,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool = False,
        precision: str | int | None = None,
        accelerator: str | Accelerator = "auto",
        sync_batchnorm: bool = False,
        kernels: Literal["auto", "off"] | Literal[False] = "auto",
        **kwargs: Any,
    ) -> None:
        own = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
        # Lightning's own loggers would need a folder now; ours is made when a run begins.
        callbacks = default_callbacks(
            own,
            observe=observe,
            checkpoint=enable_checkpointing is not False and not kwargs.get("fast_dev_run"),
            progress=enable_progress_bar is not False,
        )
        if sync_batchnorm:
            plugins = kwargs.get("plugins") or []
            kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), WholeBatch()]
        super().__init__(
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=enable_checkpointing,
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=enable_model_summary,
            accelerator=accelerator,
            precision=fastest_precision(accelerator) if precision == "auto" else precision,  # type: ignore[arg-type]
            **kwargs,
        )
        environment = getattr(self.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            # Its checkpoints are amid an epoch, whose images would begin anew, and in the working directory:
            # scripts/train_slurm.sbatch puts the job back into the queue and goes on from the last epoch's.
            environment.auto_requeue = False
        self.sync_batchnorm = sync_batchnorm
        self.kernels = kernels or "off"  # YAML reads a bare off as false
        self.experiment = experiment
        self.logs_dir = logs_dir
        self.test_after_fit = test_after_fit
        self.run: Run | None = None
        self.origin: Run | None = None
        """The run whose checkpoint a fit goes on with."""
        self.configuration: dict[str, Any] | None = None
        """All of a run's values as in its config.yaml, where the command line has built the trainer to tune."""
        self.searched: dict[str, Any] = {}
        """Values that a study has chosen for this run."""
        self._wanted_loggers = logger
        self._csv: MetricsCSV | None = None
        checkpoints = [c for c in self.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        self._without_folder = [c for c in checkpoints if c.dirpath is None]
        tune_process()

    # -- verbs ---------------------------------------------------------------------------------------------------

    def fit(  # type: ignore[override]
        self,
        model: "pl.LightningModule",
        train_dataloaders: Any | None = None,
        val_dataloaders: Any | None = None,
        datamodule: "pl.LightningDataModule | None" = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        resume: str | None = None,
    ) -> None:
        """Train, then test the best checkpoint.

        Args:
            model: the classifier.
            train_dataloaders: images and labels; the data module's by default.
            val_dataloaders: likewise.
            datamodule: the data.
            ckpt_path: checkpoint to start from, with its optimizer and epoch.
            weights_only: load checkpoints of plain values alone; null is true.
            resume: a run's folder (or an experiment's, for its newest run) to go on with, in the same folder.
        """
        if isinstance(model, Classifier):
            model.check_fit(mixed=getattr(datamodule, "mix", None) is not None)
        new = resume is None
        if resume is not None:
            self.run = Run.find(resume)
            ckpt_path = ckpt_path or _last_checkpoint(self.run)
        checkpoint = check_checkpoint(ckpt_path)
        self.origin = None if ckpt_path is None else Run(Path(ckpt_path).resolve().parents[1]) if new else self.run
        if new and not self.fast_dev_run:  # type: ignore[attr-defined]
            self.run = self._new_run()
        self._open_loggers()
        if not new and self._csv is not None:
            self._csv.forget_after(-1 if checkpoint is None else checkpoint["global_step"] - 1)
        # Epoch means are logged whatever the interval: no advice is needed on small data sets.
        warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
        # A convolution of one channel has two layouts at once; its 72 gradients are no reason to look for one.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        try:
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
        except BaseException:
            self._discard_run(new)
            raise
        finally:
            os.environ.pop(_RUN_FOLDER, None)
        if self.test_after_fit and self.run is not None and self.state.finished:
            self._test_best(model, datamodule)

    def validate(  # type: ignore[override]
        self,
        model: "pl.LightningModule | None" = None,
        dataloaders: Any | None = None,
        ckpt_path: str | None = None,
        verbose: bool = True,
        datamodule: "pl.LightningDataModule | None" = None,
        weights_only: bool | None = None,
        run: str | None = None,
    ) -> Any:
        """Measure on the validation images.

        Args:
            model: the classifier.
            dataloaders: images and labels; the data module's by default.
            ckpt_path: checkpoint to measure.
            verbose: print the metrics.
            datamodule: the data.
            weights_only: load checkpoints of plain values alone; null is true.
            run: a run's folder, for its configuration and best checkpoint.
        """
        ckpt_path = self._weights_of(run, ckpt_path)
        return super().validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def test(  # type: ignore[override]
        self,
        model: "pl.LightningModule | None" = None,
        dataloaders: Any | None = None,
        ckpt_path: str | None = None,
        verbose: bool = True,
        datamodule: "pl.LightningDataModule | None" = None,
        weights_only: bool | None = None,
        run: str | None = None,
    ) -> Any:
        """Measure on the test images; accuracy per class, confusion matrix and worst mistakes go to the run's folder.

        Args:
            model: the classifier.
            dataloaders: images and labels; the data module's by default.
            ckpt_path: checkpoint to measure.
            verbose: print the metrics.
            datamodule: the data.
            weights_only: load checkpoints of plain values alone; null is true.
            run: a run's folder, for its configuration and best checkpoint.
        """
        ckpt_path = self._weights_of(run, ckpt_path)
        return super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def predict(  # type: ignore[override]
        self,
        model: "pl.LightningModule | None" = None,
        dataloaders: Any | None = None,
        datamodule: "pl.LightningDataModule | None" = None,
        return_predictions: bool | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        run: str | None = None,
        images: str | None = None,
        output: str | None = None,
    ) -> Any:
        """Classify images and write a CSV of class names and probabilities.

        Args:
            model: the classifier.
            dataloaders: images; the data module's test images by default.
            datamodule: the data.
            return_predictions: see Lightning.
            ckpt_path: checkpoint to predict with.
            weights_only: load checkpoints of plain values alone; null is true.
            run: a run's folder, for its configuration and best checkpoint.
            images: an image file, or a folder of them (searched through); null takes the test images.
            output: the CSV file; null is ``predictions.csv`` in the run's folder, else in the working directory.
        """
        from project.frame.prediction import image_loader, of_all_processes, write_predictions

        ckpt_path = self._weights_of(run, ckpt_path)
        names = None
        if images is not None:
            assert model is not None
            dataloaders, names = image_loader(images, model.image_shape)  # type: ignore[arg-type]
            datamodule = None
        predictions = super().predict(model, dataloaders, datamodule, True, ckpt_path, weights_only)
        probabilities = of_all_processes(torch.cat(predictions))  # type: ignore[arg-type]
        if self.is_global_zero:
            path = Path(output) if output else (self.run.predictions if self.run else Path("predictions.csv"))
            classes = self.lightning_module.class_names
            write_predictions(path, names, probabilities, classes)  # type: ignore[arg-type]
        return predictions

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's way into each of its verbs, in every process."""
        with self.own_kernels():
            return super()._run(*args, **kwargs)

    def own_kernels(self) -> AbstractContextManager[None]:
        """Within the context the C kernels of this process are switched as this trainer's ``kernels`` says."""
        room = optional("models.kernels")
        return nullcontext() if room is None else room.switched(self.kernels == "auto")

    # -- the run's folder ----------------------------------------------------------------------------------------

    def _new_run(self) -> Run:
        """A fresh folder from the first process. Those that it starts find it in the environment; where all are there
        (torchrun, SLURM, a second fit) it tells them.
        """
        if (folder := os.environ.pop(_RUN_FOLDER, None)) is not None:
            return Run(Path(folder))
        run = Paths(logs=self.logs_dir).new_run(self.experiment or "default") if self.global_rank == 0 else None
        environment = getattr(self.strategy, "cluster_environment", None)
        if self.world_size > 1 and environment is not None and environment.creates_processes_externally:
            self.strategy.setup_environment()
            run = self.strategy.broadcast(run)
        elif self.world_size > 1 and run is not None:
            os.environ[_RUN_FOLDER] = str(run.folder)
        assert run is not None
        return run

    def _open_loggers(self) -> None:
        """Point loggers and checkpoints at the run's folder."""
        if self.run is None:
            return
        folder = self.run.folder
        wanted = self._wanted_loggers
        loggers: list[Logger]
        if wanted is None or wanted is True:
            loggers = [TensorBoardLogger(save_dir=str(folder), name="", version="", default_hp_metric=False)]
        elif wanted is False:
            loggers = []
        else:
            loggers = [wanted] if isinstance(wanted, Logger) else list(wanted)
        self._csv = MetricsCSV(self.run.metrics)
        self.loggers = [*loggers, self._csv]
        for callback in self._without_folder:
            callback.dirpath = str(self.run.checkpoints)

    def _discard_run(self, new: bool) -> None:
        """A new run that failed before its first step leaves no folder behind."""
        if new and self.run is not None and self.is_global_zero and self.global_step == 0:
            for logger in self.loggers:
                logger.finalize("failed")
            shutil.rmtree(self.run.folder, ignore_errors=True)

    def _weights_of(self, run: str | None, ckpt_path: str | None) -> str | None:
        """The checkpoint to load: the given one, else the run's best."""
        if run is not None:
            self.run = Run.find(run)
            ckpt_path = ckpt_path or str(self.run.weights())
            self._open_loggers()
        # Measuring needs the weights alone, not the state of the callbacks that were there when they were trained.
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
        check_checkpoint(ckpt_path)
        return ckpt_path

    def _test_best(self, model: "pl.LightningModule", datamodule: "pl.LightningDataModule | None") -> None:
        assert self.run is not None
        self.strategy.barrier()  # the first process may still be writing the best checkpoint
        best = self.run.best_or_last
        self.test(model, datamodule=datamodule, ckpt_path=str(best) if best.is_file() else None, verbose=False)


def _last_checkpoint(run: Run) -> str | None:
    if run.last_checkpoint.is_file():
        return str(run.last_checkpoint)
    log.info("%s has no checkpoint yet: it starts from the beginning", run.folder)
    return None
