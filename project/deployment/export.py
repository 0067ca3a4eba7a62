"""A net as one file: ONNX (https://onnx.ai) in fp32 or int8, PyTorch's exported program, or packed; checked before it
is there.

Input ``images`` ``[batch, C, H, W]`` fp32, normalised as in training; output ``logits`` ``[batch, num_classes]``;
``batch`` is dynamic. The ONNX exporter's optimizer folds batch norm into the convolution before it (y = w x + b with
both scaled, so equal up to rounding) and leaves dropout out. In fp32 zeros take their four bytes like any other value.

The exporter notes for every value its shape and for every node the lines of source code it came from, with the paths
of the machine it ran on. No runtime needs either, so both are dropped: SmallInception for 28x28 images (186,026
parameters, 744,104 bytes at four bytes each) makes a file of 748,845 bytes instead of 836,491.
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

if TYPE_CHECKING:
    from project.deployment.int8.quantizer import QuantizedLayer, Quantizer

log = logging.getLogger(__name__)
_INT8 = "deployment.int8.quantizer"


Format = Literal["onnx", "onnx-int8", "pt2", "packed"]
TOLERANCE: dict[Format, float] = {"onnx": 1e-4, "onnx-int8": 0.25, "pt2": 1e-4, "packed": 1e-4}
"""Largest difference of a logit that passes as the same net, as a share of the largest logit."""
_REMEDY = dict.fromkeys(TOLERANCE, "raise --tolerance, or report a bug") | {
    "onnx-int8": "keep the most sensitive layers in fp32 (--quantizer.float_layers 2), train with "
    "project.callbacks.QuantizationAwareTraining, or raise --tolerance"
}


@dataclass(frozen=True)
class Exported:
    """What was written and how it compares with the net.

    Args:
        path: the file.
        difference: of any logit on the images compared, at most, over the largest logit.
        agreement: share of the images that get the same class.
        layers: of a quantized file: what became of each layer.
    """

    path: Path
    difference: float
    agreement: float
    layers: "tuple[QuantizedLayer, ...]" = ()


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
    """Write a model file that its own runtime has read again and that gives the net's logits.

    Args:
        net: takes normalised images ``[N, C, H, W]`` for every N; left as it was.
        path: of the file; at most 2 GB.
        metadata: goes into the file.
        images: ``[N, C, H, W]``, normalised: what file and net are compared on.
        format: onnx (fp32), onnx-int8, pt2 or packed.
        tolerance: largest difference of a logit, as a share of the largest; ``None`` is that of :data:`TOLERANCE`.
        calibration: normalised training images, of int8 alone.
        quantizer: likewise.
        fp32: an ONNX file of this net, to quantize; ``None`` makes one.
        recipe: how the net is built, of packed alone, whose table of layers is written beside it.

    Raises:
        ValueError: when the difference is above the tolerance; no file is left then, and an older one stays.
    """
    limit = _tolerance(net, format) if tolerance is None else tolerance
    if not limit >= 0:
        raise ValueError(f"tolerance is {tolerance}, but it is a share of the largest logit: choose 0 or more.")
    net = copy.deepcopy(net).eval().to("cpu", torch.float32)
    with torch.inference_mode():
        expected = net(images)
    layers: list[QuantizedLayer] = []
    found: list[Exported] = []
    write: Callable[[Path], object] = partial(_write_pt2, net, metadata)
    rows: list[Any] = []
    packed = needed(PACKED, "--format packed") if format == "packed" else None
    if packed is not None:
        if recipe is None:
            raise ValueError("there is no recipe, and a packed file needs one to build its net again: give the class.")
        packed.without_minus_zeros_(net)

        def write(part: Path) -> None:
            rows.extend(packed.write_packed(net, metadata, recipe, part))

    elif format != "pt2":
        import onnx

        model = to_onnx(net, metadata.image_shape) if fp32 is None else onnx.load(fp32)
        model.ClearField("metadata_props")
        if format == "onnx-int8":
            if calibration is None:
                raise ValueError("there are no calibration images, and int8 needs them: give training images.")
            int8 = needed(_INT8, "--format onnx-int8")
            model, layers = int8.quantize(model, calibration.contiguous().numpy(), quantizer or int8.Quantizer())
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
                f"the {format} file's logits differ from the net's by up to {difference:.2g} of the largest, more than "
                f"the tolerance {limit:g}, on this processor ({cpu_abilities()}), so it was not kept: "
                f"{_REMEDY[format]}."
            )
        found.append(Exported(Path(path), difference, agreement, tuple(layers)))

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
    """:func:`export` of a checkpoint's net, compared on the first test images, calibrated on training images.

    The arguments are those of :func:`export`, and:

    Args:
        module: the classifier, of the checkpoint's configuration.
        data: the data module.
        checkpoint: holds the weights.
        num_images: test images that file and net are compared on, 1 or more.
        compare_speed: time an int8 file beside the fp32 file and say which is faster on this processor.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}, but file and net are compared on them: choose about 256.")
    if format == "onnx-int8":
        quantizer = quantizer or needed(_INT8, "--format onnx-int8").Quantizer()
    net = load_net(module, checkpoint)
    recipe = recipe_of(module, checkpoint) if format == "packed" else None
    data.prepare_data()
    data.setup("test")
    if format == "onnx-int8":
        data.setup("validate")
    assert data.test_data is not None
    pixels, *_ = data.test_data.__getitems__(list(range(min(num_images, len(data.test_data)))))
    exported = export(
        net,
        path,
        Metadata(module.class_names, module.image_shape, module.mean, module.std),
        data.normalize(pixels.float().div_(255)),
        format=format,
        tolerance=tolerance,
        calibration=data.sample(quantizer.num_images)[0] if quantizer and format == "onnx-int8" else None,
        quantizer=quantizer,
        fp32=fp32,
        recipe=recipe,
    )
    log.info(
        "%s: %d bytes; on %d test images a logit differs by at most %.2g of the largest, %.1f %% get the same class",
        exported.path,
        exported.path.stat().st_size,
        len(pixels),
        exported.difference,
        100 * exported.agreement,
    )
    if compare_speed and format == "onnx-int8" and quantizer is not None and quantizer.activations:
        _tell_speed(net, exported.path, module.image_shape)
    if floats := [layer.name for layer in exported.layers if layer.num_bits == 32]:
        log.info("in fp32 stay %s", ", ".join(floats))
    return exported


def _tell_speed(net: nn.Module, int8: Path, image_shape: tuple[int, int, int]) -> None:
    """Say how long 64 images take in int8 and in fp32 on this processor, in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        fp32 = Path(folder) / "fp32.onnx"
        export_onnx(net, fp32, image_shape)
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
        log.warning("int8 is no faster than fp32 on this processor: it saves bytes alone")


def recipe_of(module: Classifier, checkpoint: Path) -> Recipe:
    """How a checkpoint's net is built, from the configuration that the command line built ``module`` with.

    Raises:
        ValueError: when the net was built in Python, and nothing says how.
    """
    net = module.hparams.get("net")
    if not isinstance(net, Mapping) or "class_path" not in net:
        raise ValueError(
            "the classifier's net was built in Python, and a packed file says in words how to build it: train it with "
            "project fit, or give project.deployment.export.export a Recipe."
        )
    return Recipe(net, torch.load(checkpoint, map_location="cpu", weights_only=True).get("surgeries", []))


def _tolerance(net: nn.Module, format: Format) -> float:
    """Where inputs are signs, sums in another order may end on the other side of 0, and a logit changes by a percent of
    the largest or more: such nets are compared as int8 ones are, and int8 ones of them by twice as much.
    """
    signs = any(getattr(module, "inputs_are_signs", False) for module in net.modules())
    return TOLERANCE["onnx-int8"] * (1 + (format == "onnx-int8")) if signs else TOLERANCE[format]


def _write_pt2(net: nn.Module, metadata: Metadata, path: Path) -> None:
    images = torch.zeros(2, *metadata.image_shape)
    net = net.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata.to_strings())})
