"""Lightning's Trainer plus one folder per run, default callbacks, a test after fit, and prediction on image files."""

import copy
import logging
import os
import shutil
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.utilities import _reset_progress
from lightning.pytorch.plugins.environments import SLURMEnvironment

from project.callbacks.continuing import nothing_to_train
from project.callbacks.defaults import default_callbacks
from project.frame.lock import held
from project.frame.logger import MetricsCSV
from project.frame.paths import Paths, Run, writable
from project.frame.rooms import optional
from project.learning.checkpoints import WholeFiles, check_checkpoint, newest_whole, take_weights_
from project.learning.classifier import Classifier
from project.learning.process import fastest_precision, tune_process
from project.learning.whole_batch import WholeBatch

log = logging.getLogger(__name__)

_RUN_FOLDER = "PROJECT_RUN_FOLDER"
"""The environment variable that tells the run's folder to the processes that Lightning starts."""


class RunTrainer(pl.Trainer):
    """Lightning's Trainer. Each run has a folder of its own, with any loggers and without any.

    Example::

        >>> from project.frame import RunTrainer
        >>> trainer = RunTrainer(experiment="digits", max_epochs=3, kernels="off", enable_progress_bar=False)
        >>> trainer.max_epochs, trainer.kernels
        (3, 'off')

    Args:
        experiment: name of the folder that holds the run's folder, as in ``<logs>/<experiment>/version_N``; null takes
            the name of the first configuration file.
        logs_dir: folder of all runs; null takes ``PROJECT_LOGS_DIR``, or ``logs`` if that is not set.
        test_after_fit: whether ``fit`` ends with a test of the best checkpoint.
        observe: whether TensorBoard gets pictures of the first batch, the graph, histograms of the weights, the
            mistakes, the confusion matrix, and the hyperparameters.
        logger: loggers beside ``metrics.csv``, which is always written; null or true is TensorBoard.
        callbacks: callbacks that are added to the default ones; a callback of a default's class replaces that default.
        enable_checkpointing: whether the best and the last checkpoint are kept; null is true.
        enable_progress_bar: whether progress is shown, as a bar on a terminal and as lines elsewhere; null is true.
        enable_model_summary: whether Lightning prints its table of layers.
        precision: number formats of the training, such as 32-true or bf16-mixed; null is 32-true. ``auto`` is
            bf16-mixed if the processor has instructions for products of bfloat16, otherwise 32-true.
        accelerator: kind of device to train on, such as cpu, gpu or mps; auto takes the best one of this machine.
        sync_batchnorm: whether layers see the batch of all processes, for the statistics of batch norm and for the
            random numbers of dropout. A fit in R processes then equals, up to rounding, a fit in one process with R
            times the batch size; see :mod:`project.learning.whole_batch`.
        kernels: auto lets the C kernels of ``project/models/kernels`` run if they can be built; off uses PyTorch's own
            operators in all verbs of this trainer. The environment variable ``PROJECT_KERNELS=0`` is stronger.
        kwargs: further arguments of Lightning's Trainer, such as ``max_epochs``.
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
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            if kwargs.get(name) == 0:
                raise ValueError(f"{name} is 0: choose 1 or more.")
        own = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
        # Lightning's own loggers would need a folder now. The folder of a run is made when the run begins.
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
        written = self.strategy.checkpoint_io
        written = getattr(written, "checkpoint_io", written)  # a plugin may be wrapped around it
        if type(written) is TorchCheckpointIO:
            written.__class__ = WholeFiles
        environment = getattr(self.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            # Lightning's requeue saves in the working directory. scripts/train_slurm.sbatch requeues the job instead.
            environment.auto_requeue = False
        self.sync_batchnorm = sync_batchnorm
        self.kernels = kernels or "off"  # YAML reads a bare off as false
        self.experiment = experiment
        self.logs_dir = logs_dir
        self.test_after_fit = test_after_fit
        self.run: Run | None = None
        self.origin: Run | None = None
        """The run whose checkpoint the last fit has continued; ``None`` without one."""
        self.configuration: dict[str, Any] | None = None
        """All values of a run, as in its config.yaml. Only the command line of the verbs that need them sets them."""
        self.searched: dict[str, Any] = {}
        """The values that a study has chosen for this run."""
        self._wanted_loggers = logger
        self._csv: MetricsCSV | None = None
        checkpoints = self.checkpoint_callbacks
        self._without_folder = [c for c in checkpoints if isinstance(c, ModelCheckpoint) and c.dirpath is None]
        counting = ModelCheckpoint | EarlyStopping | Timer
        self._as_made = [(c, copy.deepcopy(vars(c))) for c in self.callbacks if isinstance(c, counting)]  # type: ignore[attr-defined]
        self._has_begun = False
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
        weights: str | None = None,
    ) -> None:
        """Train, then test the best checkpoint.

        Each call is a run of its own, with its own folder: a second fit begins at epoch 0, with a new optimizer and the
        weights that the model has.

        Args:
            model: classifier that is trained.
            train_dataloaders: loader of training images and labels; null takes that of the data module.
            val_dataloaders: loader of validation images and labels; null takes that of the data module.
            datamodule: data module with the images.
            ckpt_path: checkpoint to start from, with the state of its optimizer and its epoch.
            weights_only: whether checkpoints may hold plain values only; null is true.
            resume: folder of the run to continue, in the same folder; for the folder of an experiment, its newest run.
            weights: checkpoint to take the weights from, and nothing else: optimizer, schedule and epochs begin anew.
        """
        if weights is not None:
            if other := "ckpt_path" if ckpt_path else resume and "resume":
                raise ValueError(f"weights and {other} are both given: a run begins with one of them, leave one out.")
            take_weights_(model, weights)
        if isinstance(model, Classifier):
            model.check_fit(mixed=getattr(datamodule, "mix", None) is not None)
        checkpoint = check_checkpoint(ckpt_path)
        if resume is not None:
            self.run = Run.find(resume)
            writable(self.run.metrics, "copy the run's folder, and resume the copy.")
        else:
            self._check_trains(new=ckpt_path is None)
            self.run = self.run if self.fast_dev_run else self._new_run()  # type: ignore[attr-defined]
        data = train_dataloaders, val_dataloaders, datamodule
        with held(self.run.folder) if self.run is not None and self.global_rank == 0 else nullcontext():
            if self.run is not None and resume is not None and ckpt_path is None:
                ckpt_path = newest_whole(self.run.checkpoints, alone=self.global_rank == 0)
                checkpoint = check_checkpoint(ckpt_path)
            self._fit(model, data, ckpt_path, checkpoint, weights_only, resume is None)

    def _fit(
        self,
        model: Any,
        data: tuple[Any, Any, Any],
        ckpt_path: str | None,
        checkpoint: dict[str, Any] | None,
        weights_only: bool | None,
        new: bool,
    ) -> None:
        if not new:
            self._check_trains(new=checkpoint is None)
        self.origin = None if ckpt_path is None else Run(Path(ckpt_path).resolve().parent.parent) if new else self.run
        self._forget_last_fit()
        # Within a step of the optimizer, metrics have the number of this step.
        step = 0 if checkpoint is None else checkpoint["global_step"] + ("gradients" in checkpoint)
        self._open_loggers(None if new else step)
        events = set(self._event_files())
        if not new and self._csv is not None:
            self._csv.forget_after(step - 1)
        # Means of epochs are logged at any interval, so this warning about small data sets is not needed.
        warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
        # A weight with one input channel fits two memory layouts at once, so this warning means nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        try:
            super().fit(model, *data, ckpt_path, weights_only)
        except BaseException as error:
            self._discard_run(new, failed=isinstance(error, Exception))
            for path in () if self._has_begun else set(self._event_files()) - events:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.environ.pop(_RUN_FOLDER, None)
        if self.test_after_fit and self.run is not None and self.state.finished:
            self._test_best(model, data[-1])

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
        """Measure accuracy and loss on the validation images.

        Args:
            model: classifier that is measured.
            dataloaders: loader of images and labels; null takes that of the data module.
            ckpt_path: checkpoint whose weights are measured.
            verbose: whether the metrics are printed.
            datamodule: data module with the images.
            weights_only: whether checkpoints may hold plain values only; null is true.
            run: folder of a run; its configuration and best checkpoint are taken.
        """
        return super().validate(model, dataloaders, self._weights_of(run, ckpt_path), verbose, datamodule, weights_only)

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
        """Measure on the test images. Accuracy per class, confusion matrix and mistakes go to the run's folder.

        Args:
            model: classifier that is measured.
            dataloaders: loader of images and labels; null takes that of the data module.
            ckpt_path: checkpoint whose weights are measured.
            verbose: whether the metrics are printed.
            datamodule: data module with the images.
            weights_only: whether checkpoints may hold plain values only; null is true.
            run: folder of a run; its configuration and best checkpoint are taken.
        """
        return super().test(model, dataloaders, self._weights_of(run, ckpt_path), verbose, datamodule, weights_only)

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
            model: classifier that makes the predictions.
            dataloaders: loader of images; null takes the test images of the data module.
            datamodule: data module with the images.
            return_predictions: argument of Lightning that is not used, because predictions are always returned.
            ckpt_path: checkpoint whose weights predict.
            weights_only: whether checkpoints may hold plain values only; null is true.
            run: folder of a run; its configuration and best checkpoint are taken.
            images: path of an image file, or of a folder that is searched with its subfolders; null takes the test
                images.
            output: path of the CSV file; null is ``predictions.csv`` in the run's folder, or in the working directory
                if there is no run.
        """
        from project.frame.prediction import image_loader, mark_unreadable_, of_all_processes, write_predictions

        folder = self.run if run is None else Run.find(run)
        path = writable(Path(output) if output else folder.predictions if folder else Path("predictions.csv"))
        ckpt_path = self._weights_of(run, ckpt_path)
        names = None
        if images is not None:
            assert model is not None
            dataloaders, names = image_loader(images, model.image_shape)  # type: ignore[arg-type]
            datamodule = None
        predictions = super().predict(model, dataloaders, datamodule, True, ckpt_path, weights_only)
        part = torch.cat(predictions)  # type: ignore[arg-type]
        if images is not None:
            predictions = [mark_unreadable_(part, dataloaders, self.global_rank, self.world_size)]
        probabilities = of_all_processes(part)
        if self.is_global_zero:
            classes = self.lightning_module.class_names
            write_predictions(path, names, probabilities, classes)  # type: ignore[arg-type]
        return predictions

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning calls this for each of its verbs, in each process."""
        with self.own_kernels():
            result = super()._run(*args, **kwargs)
        if self.state.fn == "fit" and kwargs.get("ckpt_path") is None and self.global_step == 0:
            raise ValueError("the run ended before its first step: raise trainer.max_time, or give it more images.")
        return result

    def _run_stage(self) -> Any:
        """Lightning calls this after a checkpoint is restored, and before the first step."""
        self._has_begun = True
        progress = self.fit_loop.epoch_progress.current
        if progress.ready == progress.processed > progress.completed:  # type: ignore[attr-defined] # an epoch's end
            # If max_steps is set, Lightning 2.6 would add an epoch without a batch.
            _Loop.restarting.fset(self.fit_loop, False)  # type: ignore[attr-defined]
        if self.state.fn == "fit" and (reason := nothing_to_train(self)) is not None:
            log.info("Nothing to train: %s.", reason)
            progress.completed = progress.processed  # type: ignore[attr-defined] # as after the last epoch
            self.should_stop = True
        return super()._run_stage()

    def own_kernels(self) -> AbstractContextManager[None]:
        """A context in which the C kernels of this process are on or off, as this trainer's ``kernels`` says."""
        room = optional("models.kernels")
        return nullcontext() if room is None else room.switched(self.kernels == "auto")

    # -- the run's folder ----------------------------------------------------------------------------------------

    def _new_run(self) -> Run:
        """A new folder, which the first process makes.

        The processes that it starts later read the folder's name in the environment. If all processes are there already
        (torchrun, SLURM, a second fit), the first one sends the name to the others.
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

    def _open_loggers(self, first_step: int | None = None) -> None:
        """Let loggers and checkpoints write to the run's folder. In TensorBoard a resume replaces the old values."""
        if self.run is None:
            return
        folder = self.run.folder
        wanted = self._wanted_loggers
        loggers: list[Logger]
        if wanted is None or wanted is True:
            options: dict[str, Any] = {"default_hp_metric": False, "purge_step": first_step}
            loggers = [TensorBoardLogger(save_dir=str(folder), name="", version="", **options)]
        elif wanted is False:
            loggers = []
        else:
            loggers = [wanted] if isinstance(wanted, Logger) else list(wanted)
        self._csv = MetricsCSV(self.run.metrics)
        self.loggers = [*loggers, self._csv]
        for callback in self._without_folder:
            callback.dirpath = str(self.run.checkpoints)

    def _check_trains(self, new: bool) -> None:
        """Refuse a fit without a step; with a checkpoint, only one without images of which the epochs are not done."""
        limits = {"max_epochs": self.max_epochs, "max_steps": self.max_steps} if new else {}
        limits["limit_train_batches"] = self.limit_train_batches  # type: ignore[assignment]
        for name in (name for name, value in limits.items() if value == 0):
            raise ValueError(f"trainer.{name} is 0, so nothing would be trained: choose 1 or more.")

    def _forget_last_fit(self) -> None:
        """Let a further fit begin with epoch 0, and without the best checkpoint of the fit before."""
        if self._has_begun:
            _reset_progress(self.fit_loop)
            self.fit_loop.epoch_loop._batches_that_stepped = 0
            for callback, values in self._as_made:
                vars(callback).update(copy.deepcopy(values))
        self._has_begun = False

    def _event_files(self) -> Iterable[Path]:
        return self.run.folder.glob("events.out.tfevents.*") if self.run is not None and self.is_global_zero else ()

    def _discard_run(self, new: bool, failed: bool) -> None:
        """Delete the folder of a new run that ended before its first step, or ``failed`` without a checkpoint."""
        if not new or self.run is None or not self.is_global_zero:
            return
        if self.global_step == 0 or (failed and not any(self.run.checkpoints.glob("*.ckpt"))):
            for logger in self.loggers:
                with suppress(OSError):  # TensorBoard's, where nothing can be written
                    logger.finalize("failed")
            shutil.rmtree(self.run.folder, ignore_errors=True)

    def _weights_of(self, run: str | None, ckpt_path: str | None) -> str | None:
        """The checkpoint to load: ``ckpt_path`` if it is given, otherwise the best one of the run."""
        if run is not None:
            self.run = Run.find(run)
            ckpt_path = ckpt_path or str(self.run.weights())
            if not os.access(self.run.folder, os.W_OK):
                log.warning("%s is read-only: nothing is saved in it.", self.run.folder)
                self.run = None
            self._open_loggers()
        # Only the weights are needed here, not the state of the callbacks of the training.
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
        check_checkpoint(ckpt_path)
        return ckpt_path

    def _test_best(self, model: "pl.LightningModule", datamodule: "pl.LightningDataModule | None") -> None:
        assert self.run is not None
        self.strategy.barrier()  # the first process may still be writing the best checkpoint
        best = self.run.best_or_last
        if not getattr(datamodule, "count_test_images", lambda: 1)():
            log.info("There are no test images, so that nothing is tested")
            return
        self.test(model, datamodule=datamodule, ckpt_path=str(best) if best.is_file() else None, verbose=False)
