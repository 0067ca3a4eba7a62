"""At the end of a run: the best net as a packed file, measured as what it is, a file that is read again.

Deep Compression (Han et al. 2016, arXiv:1510.00149, sec. 4); the format is :mod:`project.deployment.packed.packing`.
"""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from project.compression.after_fit import AfterFit
from project.compression.company import Company, check_company
from project.compression.report import Step, add_file_row, report_steps
from project.deployment.export import export_checkpoint, recipe_of
from project.deployment.model_file import ModelFile
from project.frame.paths import Run
from project.learning.classifier import Classifier


class Packing(AfterFit):
    """At the end of a fit writes ``model.packed`` of the best checkpoint into the run's folder, and its report row.

    The file's accuracy is that of the net which is read from it. A table of what each layer takes lies beside it. Give
    it after the callbacks that make the net small.

    Args:
        latency: measure the speed of the decoded net, which is a dense one again.

    Raises:
        ValueError: when it stands before a callback whose work it is to pack.
    """

    company = Company(
        never={"integer file": "integers with a scale per channel are an ONNX file's: leave one out"},
        after={"smaller net": "it packs what that one makes: give it after"},
    )

    def __init__(self, latency: bool = False) -> None:
        self.latency = latency

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_company(trainer.callbacks, self)  # type: ignore[attr-defined]

    def after_fit(self, trainer: Trainer, module: Classifier, run: Run, source: Path) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        exported = export_checkpoint(module, data, source, run.model_file("packed"), format="packed")
        if not run.report.is_file():
            report_steps(trainer, module, [Step("dense", source)], measured=[])
        file = ModelFile(exported.path, recipe_of(module, source).modules)
        add_file_row(trainer, module, Step("packed", source), file, latency=self.latency)
