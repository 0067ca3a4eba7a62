"""After training: the best net's 3x3 convolutions by Winograd's algorithm, where that is faster here.

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
from project.learning.checkpoints import fresh_checkpoint, with_weights
from project.learning.classifier import Classifier
from project.models.kernels.build import library

log = logging.getLogger(__name__)


class WinogradConvolutions(AfterFit):
    """At the end of a fit times the best checkpoint's 3x3 convolutions on this machine's processor and, where
    Winograd's algorithm wins, writes the checkpoint with it in their place; the weights are the same.

    The net before is kept as ``checkpoints/level_0.ckpt``, unless another step has left one there. Layers, times and
    errors are logged; the net is a row of the run's report, as PyTorch runs it. Exported files hold plain convolutions,
    whose algorithm is their engine's choice.

    Args:
        algorithm: ``auto``, ``f2`` or ``f4``; see :class:`project.compression.winograd.choice.WinogradChooser`.
        batch_size: images that the net is to be fast at.
        rounds: of measurements of each layer, at most.
        include: regular expressions on names of layers; without any, all are.
        exclude: likewise, what stays direct.
        report: add a row to ``report.csv`` and ``report.md``.
        latency: measure the speed for it.

    Raises:
        ValueError: for an unknown algorithm and counts below 1.
    """

    company = Company(after={"smaller net": "it times the net that that one makes: give it after"})

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
                "keeps direct convolution."
            )
        check_company(trainer.callbacks, self)  # type: ignore[attr-defined]

    def after_fit(self, trainer: Trainer, module: Classifier, run: Run, source: Path) -> None:
        dense = run.level_checkpoint(0)
        images = trainer.datamodule.sample(self.chooser.batch_size)[0]  # type: ignore[attr-defined]
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        best = with_weights(module, checkpoint)
        try:
            plan = _plan(self.chooser, best, images)
        except ValueError as error:  # another step has left no such layer
            log.warning("%s", error)
            return
        if not dense.is_file():
            write_whole(dense, lambda part: shutil.copyfile(source, part))
        if plan.surgery.tiles or any(isinstance(layer, WinogradConv2d) for layer in best.net.modules()):
            best.operate_(plan.surgery)
            write_whole(run.best_checkpoint, lambda part: torch.save(fresh_checkpoint(best, checkpoint), part))
        if self.report:
            self._report(trainer, module, dense, run.best_or_last, changed=bool(plan.surgery.tiles))

    def _report(self, trainer: Trainer, module: Classifier, dense: Path, best: Path, *, changed: bool) -> None:
        """The other engines choose their own algorithm: where layers were changed, the row is that of eager PyTorch."""
        run = run_of(trainer)
        assert run is not None
        if not run.report.is_file():
            report_steps(trainer, module, [Step("dense", dense)], measured=["dense"] if self.latency else [])
        names = ["eager"] if changed else None
        add_step_row(trainer, module, Step("winograd", best), latency=self.latency, names=names)


def _plan(chooser: WinogradChooser, module: Classifier, images: torch.Tensor) -> WinogradPlan:
    """The choice for the net as it runs, and in words."""
    order = torch.channels_last if module.channels_last else torch.contiguous_format
    plan = chooser.plan(module.net.to(memory_format=order), images.contiguous(memory_format=order))
    log.info("lower quartiles; gains, of how many times fewer multiplications; errors over direct convolution's")
    for row in plan.rows:
        log.info("%s", row)
    if not plan.surgery.tiles:
        log.info("winograd: of %d layers none is kept", len(plan.rows))
        return plan
    log.info(
        "winograd: %d of %d layers; a batch of %d takes %.2f instead of %.2f ms (%.2fx)",
        len(plan.surgery.tiles),
        len(plan.rows),
        len(images),
        plan.ms,
        plan.direct_ms,
        plan.direct_ms / plan.ms,
    )
    return plan
