"""After training: the best weights as an int8 file, measured as what it is, a file in the engine that will run it.

The mathematics and its sources are in :mod:`project.deployment.int8.quantizer`; quantization-aware training (Jacob et
al. 2018, arXiv:1712.05877, sec. 3) in :mod:`project.compression.qat.fake_quantization`.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer

from project.compression.after_fit import AfterFit
from project.compression.report import Step, accuracy, add_file_row, report_steps
from project.data import ImageDataModule
from project.deployment.export import TOLERANCE, Exported, export_checkpoint
from project.deployment.fastest_file import fastest_file, write_result
from project.deployment.int8.quantizer import Quantizer
from project.deployment.model_file import ModelFile
from project.frame.paths import Run
from project.learning.classifier import Classifier

log = logging.getLogger(__name__)


class PostTrainingQuantization(AfterFit):
    """At the end of a fit writes ``model.onnx`` and ``model_int8.onnx`` of the best checkpoint into the run's folder.

    The int8 file's accuracy on validation and test images and its speed, both in ONNX Runtime, are a row of the run's
    report, whose other rows (of pruning before it) stay. Where the file loses more than ``max_drop`` on the validation
    images, the layers that alone change the outputs most stay fp32, twice as many at each try.

    At the end both files are timed in each engine that is installed (ONNX Runtime, OpenVINO). ``result.json`` and the
    report name the fastest of those that lose no more than ``max_drop``. That may be the fp32 file where the processor
    has no VNNI.

    Args:
        quantizer: what becomes integers, and how their scales are found.
        max_drop: validation accuracy that int8 may lose, as a fraction: 0.002 is 0.2 points.
        latency: measure the speed, for the report and to choose the result.

    Raises:
        ValueError: for a negative drop.
    """

    stages = ("integer file",)

    def __init__(self, quantizer: Quantizer | None = None, max_drop: float = 0.002, latency: bool = True) -> None:
        if max_drop < 0:
            raise ValueError(f"max_drop is {max_drop}, but it is what may be lost: choose 0 or more.")
        self.quantizer = quantizer or Quantizer()
        self.max_drop = max_drop
        self.latency = latency

    def after_fit(self, trainer: Trainer, module: Classifier, run: Run, source: Path) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        export_checkpoint(module, data, source, run.model_file("onnx"))
        exported, drop = self._quantize(run, module, data, source)
        accurate = [run.model_file("onnx"), *([exported.path] if drop <= self.max_drop else [])]
        if self.latency and self.quantizer.activations:
            result = fastest_file(accurate, module.image_shape)
            write_result(run, result)
            log.info(result.sentence())
        else:
            run.result.unlink(missing_ok=True)  # of an earlier fit in this folder
        if not run.report.is_file():
            report_steps(trainer, module, [Step("dense", source)], measured=["dense"] if self.latency else [])
        kept = sum(layer.num_bits == 32 for layer in exported.layers)
        name = "int8" if self.quantizer.activations else f"{self.quantizer.weight_bits}-bit weights"
        name = f"{name}, {kept} layers fp32" if kept else name
        add_file_row(trainer, module, Step(name, source), ModelFile(exported.path), latency=self.latency)

    def _quantize(self, run: Run, module: Classifier, data: ImageDataModule, source: Path) -> tuple[Exported, float]:
        """Export, with more layers in fp32 as long as too much is lost; and the validation accuracy that is lost."""
        quantizer, fp32, target = self.quantizer, run.model_file("onnx"), run.model_file("onnx-int8")
        wanted = accuracy(ModelFile(fp32).logits, data, "val")
        while True:
            exported = export_checkpoint(
                module,
                data,
                source,
                target,
                format="onnx-int8",
                quantizer=quantizer,
                fp32=fp32,
                tolerance=math.inf,  # the accuracy decides here
                compare_speed=False,
            )
            reached = accuracy(ModelFile(target).logits, data, "val")
            drop = 0.0 if wanted is None or reached is None else wanted - reached
            if drop <= self.max_drop:
                if exported.difference > TOLERANCE["onnx-int8"]:
                    log.warning(
                        "a logit of the int8 file differs by up to %.2g of the largest from fp32's, more than the %g "
                        "that project export accepts; %.1f %% of the images get the same class, and the accuracy holds",
                        exported.difference,
                        TOLERANCE["onnx-int8"],
                        100 * exported.agreement,
                    )
                return exported, drop
            more = max(1, 2 * quantizer.float_layers)
            points = 100 * drop
            if more >= len(exported.layers) // 2:
                log.warning(
                    "int8 loses %.2f points on the validation images, more than max_drop %g: fine-tune it with "
                    "project.callbacks.QuantizationAwareTraining, as in configs/compression/qat.yaml, --ckpt_path %s",
                    points,
                    self.max_drop,
                    source,
                )
                return exported, drop
            log.info("int8 loses %.2f points on the validation images: %d layers stay fp32", points, more)
            quantizer = replace(quantizer, float_layers=more)
