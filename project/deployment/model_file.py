"""A deployed model: one file that classifies images, with neither the configuration nor the checkpoint that made it.

``.onnx`` runs in ONNX Runtime, ``.pt2`` (torch.export) and ``.packed`` (:mod:`project.deployment.packed.file`) in
PyTorch. Beside the weights a file holds what is needed to use it: names of the classes, shape of the images, and mean
and standard deviation of their normalisation.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from project.data import ImageDataModule
from project.deployment.metadata import Metadata
from project.deployment.onnx_file import onnx_engine
from project.deployment.recipe import UntrustedError
from project.frame.paths import write_whole
from project.frame.prediction import image_loader, write_predictions
from project.frame.rooms import MissingRoomError, needed

log = logging.getLogger(__name__)

PACKED = "deployment.packed.file"
"""The optional module that reads and writes packed files."""
_BATCH = 256


class ModelFile:
    """A model file, opened to be run.

    Args:
        path: ends in ``.onnx``, ``.pt2`` or ``.packed``.
        trust: of a packed file: packages whose classes its net may be made of, besides this package's.

    Raises:
        ValueError: when there is no such file, its ending is another, it is damaged, it was not made by ``project
            export`` (no class names), or the package that runs it is missing.
    """

    def __init__(self, path: str | os.PathLike[str], trust: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.trust = tuple(trust)
        self.net: nn.Module | None = None
        if not self.path.is_file():
            raise ValueError(f"model is {str(path)!r}, but there is no such file: project export writes one.")
        openers = {".onnx": _open_onnx, ".pt2": _open_pt2, ".packed": self._open_packed}
        if self.path.suffix not in openers:
            raise ValueError(f"model is {str(path)!r}, but a model file ends in {' or '.join(openers)}.")
        try:
            self.logits, strings = openers[self.path.suffix](self.path)
        except ImportError as error:
            raise ValueError(f"model is {str(path)!r}, which needs {error.name}: pip install {error.name}.") from None
        except MissingRoomError:
            raise
        except UntrustedError as error:
            raise ValueError(f"model is {str(path)!r}, but {error}.") from None
        except Exception as error:  # each runtime has kinds of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(f"model is {str(path)!r}, but the file is damaged or no model ({reason}).") from None
        try:
            self.metadata = Metadata.from_strings(strings)
        except (KeyError, ValueError, TypeError):
            raise ValueError(
                f"model is {str(path)!r}, but it does not say its classes and normalisation: write it with project "
                "export."
            ) from None

    logits: Callable[[Tensor], Tensor]
    """Normalised images ``[N, C, H, W]`` float32 -> ``[N, K]``."""
    net: nn.Module | None
    """Of a packed file."""

    def probabilities(self, pixels: Tensor) -> Tensor:
        """uint8 images ``[N, C, H, W]`` -> ``[N, K]``.

        Raises:
            ValueError: for images of another shape.
        """
        if tuple(pixels.shape[1:]) != self.metadata.image_shape:
            raise ValueError(
                f"images are {list(pixels.shape)}, but {self.path.name} takes [N, "
                f"{', '.join(map(str, self.metadata.image_shape))}]: resize or convert them."
            )
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.metadata.mean, self.metadata.std))
        return self.logits(((pixels.float() / 255 - mean) / std).contiguous()).softmax(1)

    def _open_packed(self, path: Path) -> "Opened":
        net, metadata = needed(PACKED, "a .packed file").open_packed(path, self.trust)
        self.net = net.to(memory_format=torch.channels_last)

        def run(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return net(images.contiguous(memory_format=torch.channels_last))

        return run, metadata.to_strings()


def predict(model: str, images: str, output: str = "predictions.csv", trust: str = "") -> Tensor:
    """Classify image files with a model file and write a CSV of class names and probabilities.

    Args:
        model: the file, as ``project export`` wrote it.
        images: an image file, or a folder of them (searched through).
        output: the CSV file.
        trust: of a packed file: a package of your own whose classes its net is made of; several with commas.
    """
    file = ModelFile(model, trust.split(","))
    loader, names = image_loader(images, file.metadata.image_shape, _BATCH)
    probabilities = torch.cat([file.probabilities(batch[0]) for batch in loader])
    write_predictions(Path(output), names, probabilities, file.metadata.class_names)
    return probabilities


def test(model: str, data: ImageDataModule, trust: str = "") -> float:
    """Measure a model file's accuracy on the test images.

    Args:
        model: the file, as ``project export`` wrote it.
        data: whose test images; ``--config FILE`` takes it from a configuration, such as a run's ``config.yaml``.
        trust: of a packed file: a package of your own whose classes its net is made of; several with commas.

    Raises:
        ValueError: when the data are not of the classes and shape that the file was made for.
    """
    file = ModelFile(model, trust.split(","))
    wanted, found = (file.metadata.class_names, file.metadata.image_shape), (data.class_names, data.image_shape)
    if wanted != (tuple(found[0]), tuple(found[1])):
        raise ValueError(
            f"{file.path.name} tells {len(wanted[0])} classes ({', '.join(wanted[0][:3])}, …) apart on images of "
            f"{'x'.join(map(str, wanted[1]))}, and the data have {len(found[0])} ({', '.join(found[0][:3])}, …) on "
            f"{'x'.join(map(str, found[1]))}: choose the data that it was trained on."
        )
    data.prepare_data()
    data.setup("test")
    right, count = 0, 0
    for pixels, labels, _ in data.test_dataloader():
        for part, wanted_part in zip(pixels.split(_BATCH), labels.split(_BATCH), strict=True):
            right += int((file.probabilities(part).argmax(1) == wanted_part).sum())
            count += len(part)
    log.info("test accuracy  %.2f %% of %d images", 100 * right / count, count)
    log.info("file           %s, %d bytes", file.path, file.path.stat().st_size)
    return right / count


def unpack(model: str, output: str = "net.pt", trust: str = "") -> None:
    """Write the weights of a packed file as a plain state dict, for ``torch.load(FILE, weights_only=True)``.

    Args:
        model: the file, as ``project export --format packed`` wrote it.
        output: the state dict's file.
        trust: a package of your own whose classes the net is made of; several with commas.
    """
    file = ModelFile(model, trust.split(","))
    if file.net is None:
        raise ValueError(f"model is {model!r}, but only packed files are unpacked: this one is read by its runtime.")
    state_dict = {name: tensor.contiguous() for name, tensor in file.net.state_dict().items()}
    write_whole(Path(output), lambda part: torch.save(state_dict, part))
    log.info("%d tensors, %d bytes: %s", len(state_dict), Path(output).stat().st_size, output)


Opened = tuple[Callable[[Tensor], Tensor], Mapping[str, str]]


def _open_onnx(path: Path) -> Opened:
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session_options.log_severity_level = 4
    session_options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
    return onnx_engine(path), session.get_modelmeta().custom_metadata_map


def _open_pt2(path: Path) -> Opened:
    extra: dict[str, Any] = {"metadata.json": ""}
    logger = logging.getLogger("torch.export")
    logger.disabled, before = True, logger.disabled  # a damaged file is answered with one sentence, not with a trace
    try:
        net = torch.export.load(path, extra_files=extra).module()
    finally:
        logger.disabled = before

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return net(images)

    return run, json.loads(extra["metadata.json"] or "{}")
