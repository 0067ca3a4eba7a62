"""After training: the best weights as an int8 file, measured as what it is, a file in the engine that will run it.

The mathematics and its sources are in :mod:`project.compression.quantization`; quantization-aware training (Jacob et
al. 2018, arXiv:1712.05877, sec. 3) in :mod:`project.compression.fake_quantization`.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.after_fit import AfterFit
from project.callbacks.checkpoint import forget_best
from project.callbacks.compression_report import Step, accuracy, add_file_row, report_steps
from project.callbacks.fastest_file import fastest_file, write_result
from project.compression.fake_quantization import FakeQuantization
from project.compression.quantization import Quantizer
from project.data import ImageDataModule
from project.export import TOLERANCE, Exported, export_checkpoint
from project.model_file import ModelFile
from project.models.classifier import Classifier
from project.paths import Run

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


class QuantizationAwareTraining(Callback):
    """Trains the last epochs with weights and activations rounded to few bits, so that the net gets used to it.

    Structure, checkpoints and keys stay those of the plain net: the rounding is in the forward pass alone, of training
    and, once ranges are known, of validation, so that ``best.ckpt`` is the best net of these epochs as it will be
    rounded. :class:`PostTrainingQuantization` after it writes the file, with a quantizer of as many bits. A fit that
    begins with a trained net (``--ckpt_path`` its ``best.ckpt``) and a larger ``trainer.max_epochs`` goes on in the
    schedule.

    Args:
        begin_epoch: the first epoch, from 0, that rounds, well after half of the training; null rounds from the fit's
            first one on, for a trained net.
        weight_bits: 2 to 8.
        activations: round the layers' inputs to eight bits too.
        reduce_range: round the weights as ``Quantizer.reduce_range`` does; choose the same value for both.

    Raises:
        ValueError: for numbers out of their range.
    """

    def __init__(
        self,
        begin_epoch: int | None = None,
        weight_bits: int = 8,
        activations: bool = True,
        reduce_range: bool = True,
    ) -> None:
        if begin_epoch is not None and begin_epoch < 0:
            raise ValueError(f"begin_epoch is {begin_epoch}: choose 0 or more, or null.")
        self.begin_epoch = begin_epoch
        self.fake = FakeQuantization(weight_bits, activations, reduce_range)
        self.begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.begun = False
        if trainer.max_epochs is not None and 0 < trainer.max_epochs <= (self.begin_epoch or 0):
            raise ValueError(
                f"begin_epoch is {self.begin_epoch}, but training ends after {trainer.max_epochs} epochs: begin before."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch >= (self.begin_epoch or 0) and not self.begun:  # else it is a run resumed after it
            self.begun = True
            forget_best(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._attach(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._attach(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between epochs the net is a plain one, which other callbacks may copy or prune."""
        self.fake.detach_()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.fake.detach_()

    def _attach(self, module: LightningModule) -> None:
        assert isinstance(module, Classifier)
        if self.begun:
            self.fake.attach_(module.net)

    def state_dict(self) -> dict[str, object]:
        return {"ranges": self.fake.ranges, "begun": self.begun}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.fake.ranges = dict(state_dict["ranges"])  # type: ignore[call-overload]
        self.begun = bool(state_dict["begun"])
