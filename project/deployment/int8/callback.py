"""After training: write the best weights as an int8 file, and measure this file in the engine that will run it.

The mathematics and its sources are in :mod:`project.deployment.int8.quantizer`. Quantization-aware training (Jacob et
al. 2018, arXiv:1712.05877, sec. 3) is in :mod:`project.compression.qat.fake_quantization`.
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
    """At the end of a fit, write ``model.onnx`` and ``model_int8.onnx`` of the best checkpoint into the run's folder.

    The run's report gets a row with the int8 file's accuracy on validation and test images and its speed, both in ONNX
    Runtime. Rows of earlier steps, such as pruning, stay. If the file loses more than ``max_drop`` on the validation
    images, it is written again with some layers in fp32: first the layer that changes the outputs most when it alone is
    quantized, then twice as many layers at each try, but always fewer than half of the layers.

    At the end both files are timed in each engine that is installed (ONNX Runtime, OpenVINO). ``result.json`` and the
    report name the fastest file that loses no more than ``max_drop``. On a processor without VNNI, that may be the fp32
    file.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.PostTrainingQuantization
              init_args:
                quantizer: {observer: percentile, percentile: 99.9}
                max_drop: 0.002

    Args:
        quantizer: settings of the quantization: which layers become integers, and how their scales are found. ``None``
            takes the defaults.
        max_drop: validation accuracy that int8 may lose, as a fraction; 0 or more. 0.002 means 0.2 percentage points.
        latency: whether to measure the speed, for the report and to choose the result.

    Raises:
        ValueError: if ``max_drop`` is negative.
    """

    stages = ("integer file",)

    def __init__(self, quantizer: Quantizer | None = None, max_drop: float = 0.002, latency: bool = True) -> None:
        if max_drop < 0:
            raise ValueError(f"max_drop is {max_drop}: choose 0 or more; it is the accuracy that int8 may lose.")
        self.quantizer = quantizer or Quantizer()
        self.max_drop = max_drop
        self.latency = latency

    def after_fit(self, trainer: Trainer, module: Classifier, run: Run, source: Path) -> None:
        """Export the checkpoint as fp32 and int8, choose the fastest accurate file, and add the report's row.

        Args:
            trainer: trainer that ran the fit; its data module gives the images.
            module: classifier that was trained.
            run: run whose folder the files are written to.
            source: path of the checkpoint to export.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        if any("integer training" in getattr(callback, "stages", ()) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self.quantizer = self.quantizer.after_training()
        export_checkpoint(module, data, source, run.model_file("onnx"))
        exported, drop = self._quantize(run, module, data, source)
        accurate = [run.model_file("onnx"), *([exported.path] if drop <= self.max_drop else [])]
        if self.latency and self.quantizer.activations:
            result = fastest_file(accurate, module.image_shape)
            write_result(run, result)
            log.info(result.sentence())
        else:
            run.result.unlink(missing_ok=True)  # an earlier fit in this folder may have left one
        if not run.report.is_file():
            report_steps(trainer, module, [Step("dense", source)], measured=["dense"] if self.latency else [])
        kept = sum(layer.num_bits == 32 for layer in exported.layers)
        name = "int8" if self.quantizer.activations else f"{self.quantizer.weight_bits}-bit weights"
        name = f"{name}, {kept} layers fp32" if kept else name
        add_file_row(trainer, module, Step(name, source), ModelFile(exported.path), latency=self.latency)

    def _quantize(self, run: Run, module: Classifier, data: ImageDataModule, source: Path) -> tuple[Exported, float]:
        """Export with more and more layers in fp32 until the accuracy holds.

        Returns:
            The last export, and the validation accuracy that it loses, as a fraction.
        """
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
                tolerance=math.inf,  # the validation accuracy decides here, not the logits
                compare_speed=False,
            )
            reached = accuracy(ModelFile(target).logits, data, "val")
            drop = 0.0 if wanted is None or reached is None else wanted - reached
            if drop <= self.max_drop:
                if exported.difference > TOLERANCE["onnx-int8"]:
                    log.warning(
                        "a logit of the int8 file differs from fp32's by up to %.2g of the largest logit, more than "
                        "the %g that project export accepts; but %.1f %% of the images get the same class, and the "
                        "accuracy holds",
                        exported.difference,
                        TOLERANCE["onnx-int8"],
                        100 * exported.agreement,
                    )
                return exported, drop
            more = max(1, 2 * quantizer.float_layers)
            points = 100 * drop
            if more >= len(exported.layers) // 2:
                log.warning(
                    "int8 loses %.2f points on the validation images, more than max_drop %g allows: fine-tune the net "
                    "with project.callbacks.QuantizationAwareTraining, as in configs/compression/qat.yaml, and "
                    "--ckpt_path %s",
                    points,
                    self.max_drop,
                    source,
                )
                return exported, drop
            log.info("int8 loses %.2f points on the validation images: next try with %d layers in fp32", points, more)
            quantizer = replace(quantizer, float_layers=more)
