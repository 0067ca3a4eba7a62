"""At the end of a run: write the best net as a packed file, read this file again and measure it.

Deep Compression (Han et al. 2016, arXiv:1510.00149, sec. 4). The format is :mod:`project.deployment.packed.packing`.
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
    """At the end of a fit, write ``model.packed`` of the best checkpoint into the run's folder, and add its report row.

    The accuracy in the report is that of the net that is read from the file. A table beside the file lists the bytes of
    each layer. This callback has to stand after the callbacks that make the net small.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.WeightSharing
            - class_path: project.callbacks.Packing
              init_args: {latency: true}

    Args:
        latency: whether to measure the speed of the net that is read from the file. It is a dense net again.

    Raises:
        ValueError: if it stands before a callback that makes the net small, or beside one that writes an integer file.
    """

    company = Company(
        never={"integer file": "only an ONNX file stores integers with a scale per channel: leave one of them out"},
        after={"smaller net": "it packs the net that the other makes: give it after the other"},
    )

    def __init__(self, latency: bool = False) -> None:
        self.latency = latency

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_company(trainer.callbacks, self)  # type: ignore[attr-defined]

    def after_fit(self, trainer: Trainer, module: Classifier, run: Run, source: Path) -> None:
        """Write the packed file and add its row to the report.

        Args:
            trainer: trainer that ran the fit; its data module gives the images.
            module: classifier that was trained.
            run: run whose folder the file is written to.
            source: path of the checkpoint to pack.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        exported = export_checkpoint(module, data, source, run.model_file("packed"), format="packed")
        if not run.report.is_file():
            report_steps(trainer, module, [Step("dense", source)], measured=[])
        file = ModelFile(exported.path, recipe_of(module, source).modules)
        add_file_row(trainer, module, Step("packed", source), file, latency=self.latency)
