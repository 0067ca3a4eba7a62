"""Factorise the net's layers at an epoch of the training, then fine-tune the factorised net.

Denton et al. 2014 (arXiv:1404.0736), Jaderberg et al. 2014 (arXiv:1405.3866), Kim et al. 2016 (arXiv:1511.06530, sec.
3.3: fine-tuning). The mathematics is in :mod:`project.compression.low_rank.factorizer`.
"""

import logging
import shutil
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.checkpoint import forget_best
from project.callbacks.places import run_of
from project.compression.company import Company, check_company
from project.compression.low_rank.factorizer import Factorizer, load_
from project.compression.report import Step, report_steps
from project.compression.saved_epochs import check_saved
from project.data import ImageDataModule
from project.frame.paths import write_whole
from project.learning.checkpoints import fresh_checkpoint, load_with_weights, read_checkpoint, save_checkpoint
from project.learning.classifier import Classifier, Phase
from project.metrics.complexity import count_macs

log = logging.getLogger(__name__)


class LowRank(Callback):
    """Factorises the net before an epoch of the training, and trains the result until ``trainer.max_epochs``.

    After the factorisation the net has new parameters, and the optimizer and the learning-rate schedule begin anew. The
    best epoch before the factorisation is kept as ``checkpoints/level_0.ckpt``, and the best epoch after it as
    ``level_1.ckpt`` and as ``best.ckpt``. A fit from ``best.ckpt`` (``--ckpt_path``) trains the factorised net with a
    new optimizer from epoch 0. A run that is stopped and resumed ends in the same bits as a run that was not stopped.
    A run cannot both prune and factorise: use two runs, one after the other.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.LowRank
              init_args: {begin_epoch: 20, finetune_lr: 0.3}

    Args:
        begin_epoch: number of the epoch before which the net is factorised, from 0 to below ``trainer.max_epochs``. At
            0, the weights that the fit starts from (``--ckpt_path``) are factorised.
        factorizer: the choice of layers, kinds of factors and ranks; null is ``Factorizer()``, half of the net's
            multiply-accumulates.
        finetune_lr: factor on the learning rate after the factorisation, above 0.
        report: whether ``report.csv`` and ``report.md`` are written, with accuracy and size of the net before and after
            the factorisation.
        latency: whether the report has the latency of both nets.

    Raises:
        ValueError: if a number is outside its range.
    """

    stages = ("low rank", "smaller net")
    company = Company(
        never={
            "early stopping": "it could end the run before or after the factorisation: leave EarlyStopping out",
            "averaged weights": "Lightning's average does not follow the factorisation: use project.callbacks.EMA",
            "pruning": "the pruning's masks would belong to layers that are gone: do the first of the two in a run of "
            "its own, and start the second from best.ckpt of that run (--ckpt_path)",
        }
    )

    def __init__(
        self,
        begin_epoch: int,
        factorizer: Factorizer | None = None,
        finetune_lr: float = 0.1,
        report: bool = True,
        latency: bool = True,
    ) -> None:
        if begin_epoch < 0:
            raise ValueError(f"begin_epoch is {begin_epoch}, but epochs are counted from 0: choose 0 or more.")
        if finetune_lr <= 0:
            raise ValueError(
                f"finetune_lr is {finetune_lr}, but it multiplies the learning rate: choose a number above 0, such as "
                "0.1."
            )
        self.begin_epoch = begin_epoch
        self.factorizer = factorizer or Factorizer()
        self.finetune_lr = finetune_lr
        self.report, self.latency = report, latency
        self.begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_company(trainer.callbacks, self)  # type: ignore[attr-defined]
        _check(trainer, pl_module, self.begin_epoch, self.factorizer.num_images)
        check_saved(trainer, self.begin_epoch)
        assert isinstance(pl_module, Classifier)
        self.begun = False
        pl_module.phase = self._phase(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the net that will be factorised; a checkpoint may have changed its structure after ``setup``."""
        assert isinstance(pl_module, Classifier)
        if not self.begun:
            self.factorizer.check(pl_module.net, pl_module.image_shape)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.begun or trainer.current_epoch != self.begin_epoch or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, Classifier)
        _keep_dense(trainer)
        before = count_macs(pl_module.net, pl_module.image_shape)
        images = None
        if self.factorizer.num_images:
            images = trainer.datamodule.sample(self.factorizer.num_images)[0]  # type: ignore[attr-defined]
        surgery, weights = self.factorizer.plan(pl_module.net, pl_module.image_shape, images)
        pl_module.operate_(surgery)  # thin layers with factors of the weight; the planned factors replace these next
        load_(pl_module.net, weights)
        self.begun = True
        pl_module.phase = self._phase(trainer)
        trainer.strategy.setup_optimizers(trainer)
        forget_best(trainer)
        for name, kind in surgery.kinds.items():
            log.info("%-40s %-8s rank %s", name, kind, ", ".join(map(str, surgery.ranks[name])))
        after = count_macs(pl_module.net, pl_module.image_shape)
        log.info("factorised: %d multiply-accumulates, %.2f times fewer than before", after, before / after)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        run = run_of(trainer)
        if run is None or not self.begun or trainer.current_epoch < (trainer.max_epochs or 0):
            return
        dense, kept = run.level_checkpoint(0), run.level_checkpoint(1)
        source = run.best_or_last
        if not source.is_file():
            return
        if not kept.is_file() or "loops" in read_checkpoint(source, "meta"):  # else killed after the next lines
            write_whole(kept, lambda part: shutil.copyfile(source, part))
        same, checkpoint = load_with_weights(pl_module, kept)
        save_checkpoint(fresh_checkpoint(same, checkpoint), run.best_checkpoint)
        if self.report and isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
            steps = [Step("dense", dense), Step("low_rank", run.best_checkpoint)]
            report_steps(trainer, pl_module, steps, measured=[step.name for step in steps] if self.latency else [])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, Classifier):
            pl_module.phase = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do what ``teardown`` does, which Lightning does not call after an error."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.begun = state_dict["begun"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the phase of the checkpoint's part of the run, before the optimizer of a resumed run is made."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.training and state is not None and isinstance(pl_module, Classifier):
            self.begun = state["begun"]
            pl_module.phase = self._phase(trainer)

    def _phase(self, trainer: Trainer) -> Phase:
        """The part of the run before or after the factorisation, for the optimizer and the schedule."""
        if not self.begun:
            return Phase(max(self.begin_epoch, 1))
        return Phase((trainer.max_epochs or 0) - self.begin_epoch, lr_factor=self.finetune_lr)


def _keep_dense(trainer: Trainer) -> None:
    """Copy the best checkpoint before the factorisation to ``level_0.ckpt``, if this file does not exist yet.

    In a resumed run ``best.ckpt`` may already be the factorised net's. A run that begins with the factorisation has no
    ``best.ckpt`` yet, and saves a new checkpoint.
    """
    run = run_of(trainer)
    if run is None or run.level_checkpoint(0).is_file() or not trainer.checkpoint_callbacks:
        return
    source = run.best_or_last
    if source.is_file():
        write_whole(run.level_checkpoint(0), lambda part: shutil.copyfile(source, part))
    else:
        write_whole(run.level_checkpoint(0), trainer.save_checkpoint)


def _check(trainer: Trainer, module: LightningModule, begin_epoch: int, num_images: int) -> None:
    """Check that the run can be factorised at this epoch.

    Raises:
        ValueError: if the model is no Classifier, if the run has several processes, if there are no images but the
            factorizer needs them, or if the run is not counted in epochs or ends before ``begin_epoch``.
    """
    if not isinstance(module, Classifier):
        raise ValueError(
            f"the model is a {type(module).__name__}, but LowRank factorises the net of a Classifier: use "
            "project.learning.Classifier or a subclass."
        )
    if trainer.world_size > 1:
        raise ValueError(
            f"there are {trainer.world_size} processes, but after the factorisation they would still average gradients "
            "of the layers that are gone: set trainer.devices: 1."
        )
    if num_images and not isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
        raise ValueError(
            f"num_images is {num_images}, but there is no ImageDataModule to take images from: give one, or set "
            "num_images to 0."
        )
    steps = trainer.max_steps > 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if trainer.max_epochs is None or trainer.max_epochs < 1 or steps:
        raise ValueError(
            f"max_epochs is {trainer.max_epochs} and max_steps is {trainer.max_steps}, but LowRank counts epochs: set "
            "trainer.max_epochs, and leave max_steps out."
        )
    if begin_epoch >= trainer.max_epochs and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            f"begin_epoch is {begin_epoch}, but training ends after {trainer.max_epochs} epochs: choose a smaller "
            "begin_epoch."
        )
