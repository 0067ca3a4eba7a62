"""Winograd's algorithm after training, for those 3x3 convolutions of the best net that it makes faster here.

Lavin & Gray 2016 (arXiv:1509.09308); the mathematics is in :mod:`project.compression.winograd.convolution`, the choice
in :mod:`project.compression.winograd.choice`.
"""

import logging
import shutil
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer

from project.callbacks.places import run_of
from project.compression.after_fit import AfterFit
from project.compression.company import Company, check_company
from project.compression.report import Step, add_step_row, report_steps
from project.compression.winograd.choice import Algorithm, WinogradChooser, WinogradPlan
from project.compression.winograd.convolution import WinogradConv2d
from project.frame.paths import Run, write_whole
from project.learning.checkpoints import fresh_checkpoint, save_checkpoint, with_weights
from project.learning.classifier import Classifier
from project.models.kernels.build import library
from project.models.net_check import channels_last_

log = logging.getLogger(__name__)


class WinogradConvolutions(AfterFit):
    """Replaces those 3x3 convolutions of the best checkpoint that Winograd's algorithm makes faster, after training.

    The times are measured on this machine's processor. ``best.ckpt`` is written again with the replaced layers; the
    weights do not change. The net with direct convolutions is kept as ``checkpoints/level_0.ckpt``, unless another
    callback has left a file there. Layers, times and errors are logged, and the net, run by PyTorch, gets a row in the
    report of the run. Exported files hold ordinary convolutions: the engine that runs a file chooses the algorithm.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.WinogradConvolutions
              init_args: {algorithm: auto, batch_size: 64}

    Args:
        algorithm: ``auto``, ``f2`` or ``f4``; see :class:`project.compression.winograd.choice.WinogradChooser`.
        batch_size: number of images in the timed batch, 1 or more.
        rounds: largest number of timed rounds for each layer, 1 or more.
        include: regular expressions; a layer may be replaced if one is found in its name (``re.search``). None means
            all layers.
        exclude: regular expressions; a layer stays a direct convolution if one is found in its name. None excludes no
            layer.
        report: whether to add a row to ``report.csv`` and ``report.md``.
        latency: whether to measure the latency for this row.

    Raises:
        ValueError: if the algorithm is unknown, or if a number is below 1.
    """

    company = Company(after={"smaller net": "Winograd times the net that the other makes: put Winograd after it"})

    def __init__(
        self,
        algorithm: Algorithm = "auto",
        batch_size: int = 64,
        rounds: int = 20,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        report: bool = True,
        latency: bool = True,
    ) -> None:
        self.chooser = WinogradChooser(algorithm, batch_size, rounds, include=include or [], exclude=exclude or [])
        self.report, self.latency = report, latency

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        assert isinstance(pl_module, Classifier)
        self.chooser.layers(pl_module.net)
        if self.chooser.algorithm != "auto" and library(torch.float32) is None:
            raise ValueError(
                f"algorithm is {self.chooser.algorithm!r}, but there is no kernel for it: install a C compiler and "
                "switch the kernels on (trainer.kernels: auto, and PROJECT_KERNELS not 0), or choose auto, which then "
                "keeps all direct convolutions."
            )
        check_company(trainer.callbacks, self)  # type: ignore[attr-defined]

    def after_fit(self, trainer: Trainer, module: Classifier, run: Run, source: Path) -> None:
        """Choose the layers, write ``best.ckpt`` with them and add the row of the report.

        Args:
            trainer: trainer whose fit has ended, with an ``ImageDataModule``.
            module: classifier of the run; it is not changed.
            run: folder of the run, where the checkpoints and the report are written.
            source: checkpoint to start from, the best one of the run.
        """
        dense = run.level_checkpoint(0)
        images = trainer.datamodule.sample(self.chooser.batch_size)[0]  # type: ignore[attr-defined]
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        best = with_weights(module, checkpoint)
        try:
            plan = _plan(self.chooser, best, images)
        except ValueError as error:  # another callback, such as LowRank, has left no 3x3 convolution
            log.warning("%s", error)
            return
        if not dense.is_file():
            write_whole(dense, lambda part: shutil.copyfile(source, part))
        if plan.surgery.tiles or any(isinstance(layer, WinogradConv2d) for layer in best.net.modules()):
            best.operate_(plan.surgery)
            save_checkpoint(fresh_checkpoint(best, checkpoint), run.best_checkpoint)
        if self.report:
            self._report(trainer, module, dense, run.best_or_last, changed=bool(plan.surgery.tiles))

    def _report(self, trainer: Trainer, module: Classifier, dense: Path, best: Path, *, changed: bool) -> None:
        """Add the row of the report.

        If layers were replaced, only eager PyTorch is timed, since other engines choose their own algorithm.
        """
        run = run_of(trainer)
        assert run is not None
        if not run.report.is_file():
            report_steps(trainer, module, [Step("dense", dense)], measured=["dense"] if self.latency else [])
        names = ["eager"] if changed else None
        add_step_row(trainer, module, Step("winograd", best), latency=self.latency, names=names)


def _plan(chooser: WinogradChooser, module: Classifier, images: torch.Tensor) -> WinogradPlan:
    """Choose the layers in the memory format that the net runs in, and log the result."""
    order = torch.channels_last if module.channels_last else torch.contiguous_format
    net = channels_last_(module.net) if module.channels_last else module.net.to(memory_format=order)
    plan = chooser.plan(net, images.contiguous(memory_format=order))
    log.info(
        "winograd: lower quartile of the times; speedup, of the factor of saved multiplications; error relative to "
        "direct convolution"
    )
    for row in plan.rows:
        log.info("%s", row)
    if not plan.surgery.tiles:
        log.info("winograd: none of %d layers is replaced", len(plan.rows))
        return plan
    log.info(
        "winograd: %d of %d layers replaced; a batch of %d images takes %.2f instead of %.2f ms (%.2fx)",
        len(plan.surgery.tiles),
        len(plan.rows),
        len(images),
        plan.ms,
        plan.direct_ms,
        plan.direct_ms / plan.ms,
    )
    return plan
