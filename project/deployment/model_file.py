"""A deployed model: one file that classifies images. It needs neither the configuration nor the checkpoint of its run.

A ``.onnx`` file runs in ONNX Runtime. A ``.pt2`` file (torch.export) and a ``.packed`` file
(:mod:`project.deployment.packed.file`) run in PyTorch. Beside the weights, each file holds the names of the classes,
the shape of the images, and the mean and standard deviation of their normalisation.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from project.data import ImageDataModule
from project.deployment.metadata import Metadata
from project.deployment.onnx_file import onnx_engine
from project.deployment.recipe import UntrustedError
from project.frame.paths import writable, write_whole
from project.frame.prediction import image_loader, mark_unreadable_, write_predictions
from project.frame.rooms import MissingRoomError, needed
from project.models.net_check import channels_last_

log = logging.getLogger(__name__)

PACKED = "deployment.packed.file"
"""The optional module that reads and writes packed files."""
_BATCH = 256
"""Images that a file classifies in one call."""


class ModelFile:
    """A model file that is open and ready to classify images.

    Example::

        >>> import torch
        >>> from project.deployment import Metadata, ModelFile
        >>> from project.deployment.export import export
        >>> from project.models import SmallInception
        >>> metadata = Metadata(("cat", "dog"), (1, 8, 8), mean=(0.5,), std=(0.25,))
        >>> net = SmallInception(num_classes=2, image_shape=(1, 8, 8))
        >>> _ = export(net, "model.pt2", metadata, torch.randn(4, 1, 8, 8), format="pt2")
        >>> pixels = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
        >>> ModelFile("model.pt2").probabilities(pixels).shape
        torch.Size([3, 2])

    Args:
        path: path of the file; the name ends in ``.onnx``, ``.pt2`` or ``.packed``.
        trust: names of packages whose classes the net of a packed file may use. The classes of this package are
            always allowed.

    Raises:
        ValueError: if the file does not exist, has another ending, is damaged, was not made by ``project export`` (it
            has no class names), or needs a package that is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], trust: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.trust = tuple(trust)
        self.net: nn.Module | None = None
        if not self.path.is_file():
            raise ValueError(
                f"model is {str(path)!r}, but there is no such file: give the path of a file that project export wrote."
            )
        openers = {".onnx": _open_onnx, ".pt2": _open_pt2, ".packed": self._open_packed}
        if self.path.suffix not in openers:
            raise ValueError(
                f"model is {str(path)!r}, but the name of a model file ends in {' or '.join(openers)}: give such a "
                "file."
            )
        try:
            self.logits, strings = openers[self.path.suffix](self.path)
        except ImportError as error:
            raise ValueError(f"model is {str(path)!r}, which needs {error.name}: pip install {error.name}.") from None
        except MissingRoomError:
            raise
        except UntrustedError as error:
            raise ValueError(f"model is {str(path)!r}, but {' '.join(str(error).split())[:400]}.") from None
        except Exception as error:  # each runtime raises its own classes of exceptions
            raise self._damaged(error) from None
        try:
            self.metadata = Metadata.from_strings(strings)
        except (KeyError, ValueError, TypeError):
            raise ValueError(
                f"model is {str(path)!r}, but the file does not hold its class names and normalisation: write it with "
                "project export."
            ) from None

    logits: Callable[[Tensor], Tensor]
    """Runs the model: normalised float32 images ``[N, C, H, W]`` -> logits ``[N, num_classes]``."""
    net: nn.Module | None
    """The net of a packed file; ``None`` for the other formats."""

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Normalise the images, run the model and apply softmax.

        Args:
            pixels: uint8 images ``[N, C, H, W]`` with values from 0 to 255, of the shape that the model was trained on.

        Returns:
            Probabilities ``[N, num_classes]``; each row adds up to 1.

        Raises:
            ValueError: if the images have another shape than the model's, or if the model cannot run: its file is
                damaged, or holds another net than its metadata say.
        """
        if tuple(pixels.shape[1:]) != self.metadata.image_shape:
            raise ValueError(
                f"images are {list(pixels.shape)}, but {self.path.name} takes [N, "
                f"{', '.join(map(str, self.metadata.image_shape))}]: resize or convert them."
            )
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.metadata.mean, self.metadata.std))
        try:
            logits = self.logits(((pixels.float() / 255 - mean) / std).contiguous())
        except Exception as error:  # each runtime raises its own classes of exceptions
            raise self._damaged(error) from error
        wanted = (len(pixels), len(self.metadata.class_names))
        if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted or not logits.is_floating_point():
            raise self._damaged(f"it does not give {wanted[1]} logits for each image")
        return logits.float().softmax(1)

    def _damaged(self, reason: object) -> ValueError:
        """The error for a file that cannot be opened or run."""
        lines = " ".join((str(reason).strip().splitlines() or [type(reason).__name__])[0].split())
        return ValueError(
            f"model is {str(self.path)!r}, but the file is damaged or no model ({lines[:200]}): write it again with "
            "project export."
        )

    def _open_packed(self, path: Path) -> "Opened":
        net, metadata = needed(PACKED, "a .packed file").open_packed(path, self.trust)
        self.net = channels_last_(net)

        def run(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return net(images.contiguous(memory_format=torch.channels_last))

        return run, metadata.to_strings()


def predict(model: str, images: str, output: str = "predictions.csv", trust: str = "") -> Tensor:
    """Classify image files with a model file, and write a CSV file of class names and probabilities.

    Args:
        model: path of the model file that ``project export`` wrote.
        images: path of an image file, or of a folder that is searched for images, subfolders included.
        output: path of the CSV file to write.
        trust: names of your own packages whose classes the net of a packed file uses, with commas between them.

    Returns:
        Probabilities ``[num_images, num_classes]``, in the order of the CSV file.
    """
    path = writable(Path(output))
    file = ModelFile(model, trust.split(","))
    loader, names = image_loader(images, file.metadata.image_shape, _BATCH)
    probabilities = torch.cat([file.probabilities(batch[0]) for batch in loader])
    mark_unreadable_(probabilities, loader)
    write_predictions(path, names, probabilities, file.metadata.class_names)
    return probabilities


def test(model: str, data: ImageDataModule, trust: str = "") -> float:
    """Measure a model file's accuracy on the test images.

    Args:
        model: path of the model file that ``project export`` wrote.
        data: data module that gives the test images. ``--config FILE`` takes it from a configuration, such as a run's
            ``config.yaml``.
        trust: names of your own packages whose classes the net of a packed file uses, with commas between them.

    Returns:
        Accuracy, a fraction from 0 to 1.

    Raises:
        ValueError: if the data have other classes or another image shape than the model.
    """
    file = ModelFile(model, trust.split(","))
    wanted, found = (file.metadata.class_names, file.metadata.image_shape), (data.class_names, data.image_shape)
    if wanted != (tuple(found[0]), tuple(found[1])):
        raise ValueError(
            f"{file.path.name} was made for {len(wanted[0])} classes ({', '.join(wanted[0][:3])}, …) and images of "
            f"{'x'.join(map(str, wanted[1]))}, but the data have {len(found[0])} classes ({', '.join(found[0][:3])}, "
            f"…) and images of {'x'.join(map(str, found[1]))}: choose the data that the model was trained on."
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
    """Write the weights of a packed file as a plain state dict. ``torch.load(FILE, weights_only=True)`` reads it.

    Args:
        model: path of the packed file that ``project export --format packed`` wrote.
        output: path of the state dict to write.
        trust: names of your own packages whose classes the net uses, with commas between them.

    Raises:
        ValueError: if the file is no packed file.
    """
    path = writable(Path(output))
    file = ModelFile(model, trust.split(","))
    if file.net is None:
        raise ValueError(f"model is {model!r}, but only packed files can be unpacked: give a file ending in .packed.")
    state_dict = {name: tensor.contiguous() for name, tensor in file.net.state_dict().items()}
    write_whole(path, lambda part: torch.save(state_dict, part))
    log.info("%d tensors, %d bytes: %s", len(state_dict), path.stat().st_size, output)


Opened = tuple[Callable[[Tensor], Tensor], Mapping[str, str]]


def _open_onnx(path: Path) -> Opened:
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session_options.log_severity_level = 4
    session_options.intra_op_num_threads = 1
    with redirect_stdout(None):  # it prints some errors, and raises them
        session = onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
    return onnx_engine(path), session.get_modelmeta().custom_metadata_map


def _open_pt2(path: Path) -> Opened:
    extra: dict[str, Any] = {"metadata.json": ""}
    logger = logging.getLogger("torch.export")
    # For a damaged file torch logs a long trace. Our error is one sentence, so this logger is off meanwhile.
    logger.disabled, before = True, logger.disabled
    try:
        net = torch.export.load(path, extra_files=extra).module()
    finally:
        logger.disabled = before

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return net(images)

    return run, json.loads(extra["metadata.json"] or "{}")
