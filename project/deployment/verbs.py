"""The verb ``export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl

from project.frame.paths import MODEL_FILES
from project.frame.rooms import optional
from project.frame.trainer import RunTrainer

if TYPE_CHECKING:
    from project.deployment.int8.quantizer import Quantizer
else:
    Quantizer = getattr(optional("deployment.int8.quantizer"), "Quantizer", dict)


class Verbs(RunTrainer):
    """Mixed into :class:`project.frame.verbs.Trainer`; the docstring of a method is the help of its verb."""

    needs_weights = True

    def export(
        self,
        model: "pl.LightningModule",
        datamodule: "pl.LightningDataModule",
        run: str | None = None,
        ckpt_path: str | None = None,
        format: Literal["onnx", "onnx-int8", "pt2", "packed"] = "onnx",
        output: str | None = None,
        tolerance: float | None = None,
        num_images: int = 256,
        quantizer: Quantizer | None = None,
    ) -> Any:
        """Write the net as one file that runs without this package, once it has been read again and compared.

        Args:
            model: the classifier.
            datamodule: the data: test images to compare on, training images to calibrate int8 with.
            run: a run's folder, for its configuration and best checkpoint.
            ckpt_path: checkpoint to export.
            format: onnx (fp32), onnx-int8 (quantized after training), pt2 (torch.export) or packed (fewest bytes, read
                by this package).
            output: the file; null is ``model.onnx``, ``model_int8.onnx``, ``model.pt2`` or ``model.packed`` in the
                run's folder, else in the working directory.
            tolerance: largest difference of a logit that is accepted, as a share of the largest logit; null is 1e-4,
                0.25 for int8.
            num_images: test images to compare file and net on.
            quantizer: of int8: what becomes integers, and how their scales are found.
        """
        from project.deployment.export import export_checkpoint

        path = self._weights_of(run, ckpt_path)
        target = Path(output) if output else self.run.model_file(format) if self.run else Path(MODEL_FILES[format])
        assert path is not None
        return export_checkpoint(
            model,  # type: ignore[arg-type]
            datamodule,  # type: ignore[arg-type]
            Path(path),
            target,
            format=format,
            tolerance=tolerance,
            num_images=num_images,
            quantizer=quantizer,
        )
