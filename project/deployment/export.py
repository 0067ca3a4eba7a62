"""Export a net as one file: ONNX (https://onnx.ai) in fp32 or int8, PyTorch's exported program, or packed.

The input ``images`` is ``[batch, C, H, W]`` fp32, normalised as in training. The output ``logits`` is
``[batch, num_classes]``. ``batch`` is dynamic. The file is first written under another name, read by its own runtime
and compared with the net. It gets its name only if it passes.

The optimizer of the ONNX exporter folds batch norm into the convolution before it (it scales w and b of y = w x + b, so
the result is equal up to rounding) and leaves dropout out. In fp32 a zero takes four bytes, as any other value does.

The exporter notes the shape of every value. For every node it also notes the lines of source code, with paths of the
machine that it ran on. No runtime needs these notes, so they are removed. The file of SmallInception for 28x28 images
(186,026 parameters, 744,104 bytes at four bytes each) then has 748,845 bytes instead of 836,491.
"""

import copy
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from project.data import ImageDataModule
from project.deployment.latency import measure
from project.deployment.metadata import Metadata
from project.deployment.model_file import PACKED, ModelFile
from project.deployment.onnx_file import export_onnx, note_, onnx_engine, to_onnx, write_onnx
from project.deployment.recipe import Recipe
from project.frame.environment import cpu_abilities
from project.frame.paths import write_whole
from project.frame.rooms import needed
from project.learning.checkpoints import load_net
from project.learning.classifier import Classifier
from project.metrics.complexity import count_parameters
from project.models.net_check import channels_last_

if TYPE_CHECKING:
    from project.deployment.int8.quantizer import QuantizedLayer, Quantizer

log = logging.getLogger(__name__)
_INT8 = "deployment.int8.quantizer"


Format = Literal["onnx", "onnx-int8", "pt2", "packed"]
TOLERANCE: dict[Format, float] = {"onnx": 1e-4, "onnx-int8": 0.25, "pt2": 1e-4, "packed": 1e-4}
"""Largest difference between a logit of the file and of the net that is accepted, as a share of the largest logit."""
_REMEDY = dict.fromkeys(TOLERANCE, "raise --tolerance, or report a bug") | {
    "onnx-int8": "keep the most sensitive layers in fp32 (--quantizer.float_layers 2), train with "
    "project.callbacks.QuantizationAwareTraining, or raise --tolerance"
}


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how its outputs compare with those of the net.

    Example::

        >>> import torch
        >>> from project.deployment import Metadata
        >>> from project.deployment.export import export
        >>> from project.models import SmallInception
        >>> net = SmallInception(num_classes=2, image_shape=(1, 8, 8))
        >>> metadata = Metadata(("cat", "dog"), (1, 8, 8), mean=(0.5,), std=(0.25,))
        >>> exported = export(net, "model.pt2", metadata, torch.randn(4, 1, 8, 8), format="pt2")
        >>> exported.path.name, exported.agreement
        ('model.pt2', 1.0)

    Args:
        path: path of the file.
        difference: largest difference between a logit of the file and of the net, divided by the largest logit; 0 or
            more.
        agreement: share of the compared images to which file and net give the same class, from 0 to 1.
        layers: number of bits and loss of each layer of an int8 file; empty for the other formats.
        float_operations: operations of an int8 file that compute in fp32, such as ``19 HardSwish``. It is empty for the
            other formats, and if only the weights are integers.
    """

    path: Path
    difference: float
    agreement: float
    layers: "tuple[QuantizedLayer, ...]" = ()
    float_operations: tuple[str, ...] = ()


def export(
    net: nn.Module,
    path: str | os.PathLike[str],
    metadata: Metadata,
    images: Tensor,
    *,
    format: Format = "onnx",
    tolerance: float | None = None,
    calibration: Tensor | None = None,
    quantizer: "Quantizer | None" = None,
    fp32: Path | None = None,
    recipe: Recipe | None = None,
) -> Exported:
    """Write a model file, read it with its own runtime, and check that it gives the net's logits.

    Args:
        net: module that takes normalised images ``[N, C, H, W]`` for every N. It does not change.
        path: path of the file to write; a file holds at most 2 GB.
        metadata: class names, image shape and normalisation, which are written into the file.
        images: normalised images ``[N, C, H, W]`` on which file and net are compared.
        format: format of the file: onnx (fp32), onnx-int8, pt2 or packed.
        tolerance: largest accepted difference of a logit, as a share of the largest logit; 0 or more. ``None`` takes
            the value of :data:`TOLERANCE`.
        calibration: normalised training images ``[N, C, H, W]``, which onnx-int8 finds the ranges of activations with.
        quantizer: settings of onnx-int8; ``None`` takes the defaults.
        fp32: path of an fp32 ONNX file of this net to start from; ``None`` exports the net.
        recipe: description of how to build the net; packed needs it. A packed file also gets a table of its layers.

    Raises:
        ValueError: if the difference is above the tolerance, or the format lacks an argument that it needs. No file is
            written then, and an older file stays.
    """
    limit = _tolerance(net, format) if tolerance is None else tolerance
    if not limit >= 0:
        raise ValueError(f"tolerance is {tolerance}: choose 0 or more; it is a share of the largest logit.")
    net = copy.deepcopy(net).eval().to("cpu", torch.float32)
    # the net runs as its file does, because nets with norms of few values magnify the rounding of another order
    order = torch.channels_last if format == "packed" else torch.contiguous_format
    net = channels_last_(net) if format == "packed" else net.to(memory_format=order)
    with torch.inference_mode():
        expected = torch.cat([net(batch.contiguous(memory_format=order)) for batch in images.split(64)])
    layers: list[QuantizedLayer] = []
    floats: list[str] = []
    found: list[Exported] = []
    write: Callable[[Path], object] = partial(_write_pt2, net, metadata)
    rows: list[Any] = []
    packed = needed(PACKED, "--format packed") if format == "packed" else None
    if packed is not None:
        if recipe is None:
            raise ValueError(
                "recipe is None: there is no recipe, but a packed file needs one to build its net again: give a "
                "Recipe with the net's class."
            )
        packed.without_minus_zeros_(net)

        def write(part: Path) -> None:
            rows.extend(packed.write_packed(net, metadata, recipe, part))

    elif format != "pt2":
        import onnx

        model = to_onnx(net, metadata.image_shape) if fp32 is None else onnx.load(fp32)
        model.ClearField("metadata_props")
        if format == "onnx-int8":
            if calibration is None:
                raise ValueError(
                    "calibration is None, but onnx-int8 needs images to find its ranges: give training images."
                )
            int8 = needed(_INT8, "--format onnx-int8")
            quantizer = quantizer or int8.Quantizer()
            model, layers = int8.quantize(model, calibration.contiguous().numpy(), quantizer)
            floats = int8.float_operations(model) if quantizer.activations else []
        note_(model, metadata.to_strings())
        write = partial(write_onnx, model)

    def write_and_check(part: Path) -> None:
        write(part)
        file = ModelFile(part, () if recipe is None else recipe.modules)
        logits = torch.cat([file.logits(batch.contiguous()) for batch in images.split(64)])
        difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        agreement = float((logits.argmax(1) == expected.argmax(1)).float().mean())
        if not difference <= limit:
            raise ValueError(
                f"the {format} file of {type(net).__name__} was not kept, because its logits differ from the net's by "
                f"up to {difference:.2g} of the largest logit on this processor ({cpu_abilities()}), more than the "
                f"tolerance {limit:g}: {_REMEDY[format]}."
            )
        found.append(Exported(Path(path), difference, agreement, tuple(layers), tuple(floats)))

    write_whole(Path(path), write_and_check)
    if packed is not None:
        log.info("%s", packed.write_table(rows, Path(path), count_parameters(net)))
    return found[0]


def export_checkpoint(
    module: Classifier,
    data: ImageDataModule,
    checkpoint: Path,
    path: Path,
    *,
    format: Format = "onnx",
    tolerance: float | None = None,
    num_images: int = 256,
    quantizer: "Quantizer | None" = None,
    fp32: Path | None = None,
    compare_speed: bool = True,
) -> Exported:
    """Export the net of a checkpoint with :func:`export`.

    File and net are compared on the first test images. Int8 is calibrated on training images.

    Args:
        module: classifier built from the configuration of the checkpoint.
        data: data module that gives the test images and the training images.
        checkpoint: path of the checkpoint that holds the weights.
        path: path of the file to write; a file holds at most 2 GB.
        format: format of the file: onnx (fp32), onnx-int8, pt2 or packed.
        tolerance: largest accepted difference of a logit, as a share of the largest logit; 0 or more. ``None`` takes
            the value of :data:`TOLERANCE`.
        num_images: number of test images on which file and net are compared; 1 or more.
        quantizer: settings of onnx-int8; ``None`` takes the defaults.
        fp32: path of an fp32 ONNX file of this net to start from; ``None`` exports the net.
        compare_speed: whether to time an int8 file against the fp32 file and log which one is faster on this processor.

    Raises:
        ValueError: if the difference is above the tolerance, a number is outside its range, or a packed file was asked
            of a net that was built in Python.
    """
    if num_images < 1:
        raise ValueError(
            f"num_images is {num_images}, but file and net are compared on these images: choose 1 or more, such as 256."
        )
    if format == "onnx-int8":
        quantizer = quantizer or needed(_INT8, "--format onnx-int8").Quantizer()
    net = load_net(module, checkpoint)
    recipe = recipe_of(module, checkpoint) if format == "packed" else None
    data.prepare_data()
    data.setup("test")
    assert data.test_data is not None
    kind = "test" if len(data.test_data) else "training"
    if format == "onnx-int8" or kind == "training":
        data.setup("validate")
    if kind == "test":
        pixels, *_ = data.test_data.__getitems__(list(range(min(num_images, len(data.test_data)))))
        images = data.normalize(pixels.float().div_(255))
    else:
        images, _ = data.sample(num_images)
    with tempfile.TemporaryDirectory() as folder:
        if format == "onnx-int8" and fp32 is None:  # once, for the int8 file and for the comparison of speeds
            fp32 = Path(folder) / "fp32.onnx"
            export_onnx(net, fp32, module.image_shape)
        exported = export(
            net,
            path,
            Metadata(module.class_names, module.image_shape, module.mean, module.std),
            images,
            format=format,
            tolerance=tolerance,
            calibration=data.sample(quantizer.num_images)[0] if quantizer and format == "onnx-int8" else None,
            quantizer=quantizer,
            fp32=fp32,
            recipe=recipe,
        )
        log.info(
            "%s: %d bytes; on %d %s images a logit differs by at most %.2g of the largest, and %.1f %% of the images "
            "get the same class",
            exported.path,
            exported.path.stat().st_size,
            len(images),
            kind,
            exported.difference,
            100 * exported.agreement,
        )
        if compare_speed and fp32 is not None and quantizer is not None and quantizer.activations:
            _tell_speed(fp32, exported.path, module.image_shape)
    if floats := [layer.name for layer in exported.layers if layer.num_bits == 32]:
        log.info("these layers stay in fp32: %s", ", ".join(floats))
    if exported.float_operations:
        log.info("these operations compute in fp32: %s", ", ".join(exported.float_operations))
    return exported


def _tell_speed(fp32: Path, int8: Path, image_shape: tuple[int, int, int]) -> None:
    """Log how long 64 images take in int8 and in fp32 on this processor, in ONNX Runtime."""
    engines = {"int8": onnx_engine(int8), "fp32": onnx_engine(fp32)}
    times = measure(engines, image_shape, batch_sizes=(64,), rounds=30, budget_s=2)
    fast, slow = times["int8", 64].median_ms, times["fp32", 64].median_ms
    log.info(
        "64 images take %.3g ms in int8 and %.3g ms in fp32 (ONNX Runtime, %s, %d threads)",
        fast,
        slow,
        cpu_abilities(),
        torch.get_num_threads(),
    )
    if slow < 1.05 * fast:
        log.warning("int8 is no faster than fp32 on this processor; it only saves bytes")


def recipe_of(module: Classifier, checkpoint: Path) -> Recipe:
    """How to build a checkpoint's net, from the configuration that the command line built ``module`` with.

    Raises:
        ValueError: if the net was built in Python, so that no configuration describes it.
    """
    net = module.hparams.get("net")
    if not isinstance(net, Mapping) or "class_path" not in net:
        raise ValueError(
            "the classifier's net was built in Python, but a packed file needs a description of how to build it: train "
            "it with project fit, or give project.deployment.export.export a Recipe."
        )
    return Recipe(net, torch.load(checkpoint, map_location="cpu", weights_only=True).get("surgeries", []))


def _tolerance(net: nn.Module, format: Format) -> float:
    """The default tolerance. Nets with layers whose inputs are signs get a larger one.

    A runtime may add numbers in another order, and a sum near 0 may then have another sign. A logit changes by one
    percent of the largest logit or more. So these nets get the tolerance of int8, and twice that in int8.
    """
    signs = any(getattr(module, "inputs_are_signs", False) for module in net.modules())
    return TOLERANCE["onnx-int8"] * (1 + (format == "onnx-int8")) if signs else TOLERANCE[format]


def _write_pt2(net: nn.Module, metadata: Metadata, path: Path) -> None:
    images = torch.zeros(2, *metadata.image_shape)
    with torch.no_grad():
        program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata.to_strings())})
