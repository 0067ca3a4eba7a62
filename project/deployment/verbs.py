"""The verb ``export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl

from project.frame.paths import MODEL_FILES, Run, writable
from project.frame.rooms import optional
from project.frame.trainer import RunTrainer

if TYPE_CHECKING:
    from project.deployment.int8.quantizer import Quantizer
else:
    Quantizer = getattr(optional("deployment.int8.quantizer"), "Quantizer", dict)


class Verbs(RunTrainer):
    """Part of :class:`project.frame.verbs.Trainer`. The docstring of a method is the help of its verb."""

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
        """Write the net as one model file, read it again, and compare it with the net.

        Args:
            model: classifier whose net is exported.
            datamodule: data module that gives the test images to compare on and the training images to calibrate int8.
            run: folder of a run; its configuration and its best checkpoint are used.
            ckpt_path: path of the checkpoint to export.
            format: format of the file: onnx (fp32), onnx-int8 (quantized after training), pt2 (torch.export) or packed
                (fewest bytes, only this package reads it).
            output: path of the file; null takes ``model.onnx``, ``model_int8.onnx``, ``model.pt2`` or ``model.packed``
                in the run's folder or, without a run, in the working directory.
            tolerance: largest accepted difference of a logit, as a share of the largest logit; 0 or more. null takes
                1e-4, or 0.25 for int8.
            num_images: number of test images on which file and net are compared; 1 or more.
            quantizer: settings of int8: which layers become integers, and how their scales are found.
        """
        from project.deployment.export import export_checkpoint

        target = Path(output) if output else Run.find(run).model_file(format) if run else Path(MODEL_FILES[format])
        writable(target)
        if target.suffix != (suffix := Path(MODEL_FILES[format]).suffix):
            raise ValueError(f"output is {output!r}, but files of format {format} end in {suffix}: rename it.")
        path = self._weights_of(run, ckpt_path)
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
