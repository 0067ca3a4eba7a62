"""Low-rank layers in the middle of a training: factorise, then fine-tune what came out.

Denton et al. 2014 (arXiv:1404.0736), Jaderberg et al. 2014 (arXiv:1405.3866), Kim et al. 2016 (arXiv:1511.06530, sec.
3.3: fine-tuning); the mathematics is in :mod:`project.compression.low_rank.factorizer`.
"""

import logging
import shutil
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.checkpoint import BestAndLast
from project.callbacks.places import run_of
from project.compression.company import Company, check_company
from project.compression.low_rank.factorizer import Factorizer, load_
from project.compression.report import Step, report_steps
from project.data import ImageDataModule
from project.frame.paths import write_whole
from project.learning.checkpoints import write_fresh
from project.learning.classifier import Classifier, Phase
from project.metrics.complexity import count_macs

log = logging.getLogger(__name__)


class LowRank(Callback):
    """Factorises the net before the epoch ``begin_epoch`` and trains on until ``trainer.max_epochs``.

    The optimizer and the learning-rate schedule begin anew then, for the new parameters. The best epoch before is kept
    as ``checkpoints/level_0.ckpt``, the best one after as ``level_1.ckpt``; ``best.ckpt`` is the latter too, and a fit
    from it (``--ckpt_path``) trains the factorised net, with a fresh optimizer from epoch 0. A run that is stopped and
    resumed ends in the bits of one that was not. Pruning is for a run before or after this one.

    Args:
        begin_epoch: from 0; at 0 what is factorised is what the fit begins with (``--ckpt_path``).
        factorizer: which layers, of which kind and rank.
        finetune_lr: factor on the learning rate afterwards.
        report: write ``report.csv`` and ``report.md``: the net before and after, on validation and test images.
        latency: measure the speed of both for the report.

    Raises:
        ValueError: for a number out of its range.
    """

    stages = ("low rank", "smaller net")
    company = Company(
        never={
            "early stopping": "it would end the run before or after the factorisation: leave it out",
            "pruning": "its masks would be of layers that are gone: do one of them in a run of its own, and start the "
            "other one from its best.ckpt (--ckpt_path)",
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
            raise ValueError(f"begin_epoch is {begin_epoch}: choose 0 or more.")
        if finetune_lr <= 0:
            raise ValueError(f"finetune_lr is {finetune_lr}, but it multiplies the learning rate: choose about 0.1.")
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
        assert isinstance(pl_module, Classifier)
        self.begun = False
        pl_module.phase = self._phase(trainer)

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
        pl_module.operate_(surgery)
        load_(pl_module.net, weights)
        self.begun = True
        pl_module.phase = self._phase(trainer)
        trainer.strategy.setup_optimizers(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, BestAndLast):
                callback.forget_best()
        for name, kind in surgery.kinds.items():
            log.info("%-40s %-8s rank %s", name, kind, ", ".join(map(str, surgery.ranks[name])))
        after = count_macs(pl_module.net, pl_module.image_shape)
        log.info("factorised: %.2f times fewer multiply-accumulates, %d", before / after, after)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        run = run_of(trainer)
        if run is None or not self.begun or trainer.current_epoch < (trainer.max_epochs or 0):
            return
        dense, kept = run.level_checkpoint(0), run.level_checkpoint(1)
        source = run.best_or_last
        if not source.is_file():
            return
        write_whole(kept, lambda part: shutil.copyfile(source, part))
        write_fresh(pl_module, kept, run.best_checkpoint)
        if self.report and isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
            steps = [Step("dense", dense), Step("low_rank", run.best_checkpoint)]
            report_steps(trainer, pl_module, steps, measured=[step.name for step in steps] if self.latency else [])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, Classifier):
            pl_module.phase = None

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.begun = state_dict["begun"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The optimizer that is made next is that of the checkpoint's part of the run."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.training and state is not None and isinstance(pl_module, Classifier):
            self.begun = state["begun"]
            pl_module.phase = self._phase(trainer)

    def _phase(self, trainer: Trainer) -> Phase:
        if not self.begun:
            return Phase(max(self.begin_epoch, 1))
        return Phase((trainer.max_epochs or 0) - self.begin_epoch, lr_factor=self.finetune_lr)


def _keep_dense(trainer: Trainer) -> None:
    """The best checkpoint before, once: a resumed run may have written the next one's. A run that begins with the
    factorisation has none yet.
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
    if not isinstance(module, Classifier):
        raise ValueError(f"the model is a {type(module).__name__}, but what is factorised is a Classifier's net.")
    if trainer.world_size > 1:
        raise ValueError(
            f"there are {trainer.world_size} processes, but they would go on averaging gradients of the layers that "
            "are gone: factorise with trainer.devices: 1."
        )
    if num_images and not isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
        raise ValueError(f"num_images is {num_images}, but there is no ImageDataModule: give one, or set it to 0.")
    steps = trainer.max_steps > 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if trainer.max_epochs is None or trainer.max_epochs < 1 or steps:
        raise ValueError("the factorisation is at an epoch: set trainer.max_epochs, and leave max_steps out.")
    if begin_epoch >= trainer.max_epochs and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            f"begin_epoch is {begin_epoch}, but training ends after {trainer.max_epochs} epochs: begin before."
        )
