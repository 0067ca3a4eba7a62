"""At the end of a run: the best net as a packed file, measured as what it is, a file that is read again.

Deep Compression (Han et al. 2016, arXiv:1510.00149, sec. 4); the format is :mod:`project.compression.packing`.
"""

import logging

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.compression_report import Step, add_file_row, report_steps
from project.callbacks.low_rank import LowRank
from project.callbacks.places import is_complete, run_of
from project.callbacks.pruning import IterativeMagnitudePruning
from project.callbacks.quantization import PostTrainingQuantization
from project.callbacks.ternary import TernaryWeights
from project.callbacks.weight_sharing import WeightSharing
from project.data import ImageDataModule
from project.export import export_checkpoint, recipe_of
from project.model_file import ModelFile
from project.models.classifier import Classifier

log = logging.getLogger(__name__)

_SMALLER = (IterativeMagnitudePruning, LowRank, WeightSharing, TernaryWeights)


class Packing(Callback):
    """At the end of a fit writes ``model.packed`` of the best checkpoint into the run's folder, and its report row.

    The file's accuracy is that of the net which is read from it. A table of what each layer takes lies beside it. Give
    it after the callbacks that make the net small.

    Args:
        latency: measure the speed of the decoded net, which is a dense one again.

    Raises:
        ValueError: when it stands before a callback whose work it is to pack.
    """

    def __init__(self, latency: bool = False) -> None:
        self.latency = latency

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Classifier):
            raise ValueError(f"the model is a {type(pl_module).__name__}, but what is packed is a Classifier's net.")
        if not isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
            raise ValueError("a packed file is compared with its net on test images: fit with an ImageDataModule.")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, PostTrainingQuantization):
                raise ValueError(
                    "callbacks hold Packing and PostTrainingQuantization, but integers with a scale per channel are an "
                    "ONNX file's: leave one out."
                )
        for later in callbacks[callbacks.index(self) + 1 :]:
            if isinstance(later, _SMALLER):
                raise ValueError(
                    f"Packing stands before {type(later).__name__}, whose work it is to pack: give it after."
                )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        run, data = run_of(trainer), trainer.datamodule  # type: ignore[attr-defined]
        if run is None or not is_complete(trainer):
            return  # fast_dev_run, or a run that is to be resumed
        source = run.best_or_last
        if not source.is_file():
            log.warning("there is no checkpoint to pack: switch trainer.enable_checkpointing on")
            return
        exported = export_checkpoint(pl_module, data, source, run.model_file("packed"), format="packed")
        if not run.report.is_file():
            report_steps(trainer, pl_module, [Step("dense", source)], measured=[])
        file = ModelFile(exported.path, recipe_of(pl_module, source).modules)
        add_file_row(trainer, pl_module, Step("packed", source), file, latency=self.latency)
