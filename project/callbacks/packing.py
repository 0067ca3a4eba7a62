"""At the end of a run: the best net as a packed file, measured as what it is, a file that is read again.

Deep Compression (Han et al. 2016, arXiv:1510.00149, sec. 4); the format is :mod:`project.compression.packing`.
"""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.compression_report import Step, add_file_row, report_steps
from project.callbacks.deployed_file import DeployedFile
from project.callbacks.low_rank import LowRank
from project.callbacks.pruning import IterativeMagnitudePruning
from project.callbacks.quantization import PostTrainingQuantization
from project.callbacks.ternary import TernaryWeights
from project.callbacks.weight_sharing import WeightSharing
from project.export import export_checkpoint, recipe_of
from project.model_file import ModelFile
from project.models.classifier import Classifier
from project.paths import Run

_SMALLER = (IterativeMagnitudePruning, LowRank, WeightSharing, TernaryWeights)


class Packing(DeployedFile):
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
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
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

    def write(self, trainer: Trainer, module: Classifier, run: Run, source: Path) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        exported = export_checkpoint(module, data, source, run.model_file("packed"), format="packed")
        if not run.report.is_file():
            report_steps(trainer, module, [Step("dense", source)], measured=[])
        file = ModelFile(exported.path, recipe_of(module, source).modules)
        add_file_row(trainer, module, Step("packed", source), file, latency=self.latency)
