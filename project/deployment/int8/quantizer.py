"""Post-training quantization of an ONNX model to eight bits, or of its weights alone to four.

Jacob et al. 2018 (arXiv:1712.05877): integers for weights and activations. Krishnamoorthi 2018 (arXiv:1806.08342, sec.
3): a symmetric scale for each output channel of a weight, and one scale with a zero point for each activation. Nagel et
al. 2021 (arXiv:2106.08295): ranges (sec. 3.1) and empirical bias correction (sec. 3.3). The result is an ordinary ONNX
model with ``QuantizeLinear`` and ``DequantizeLinear`` around each operation. Runtimes run it with integer kernels.
:mod:`project.deployment.int8.qdq` writes it.

It works on the exported graph and not on the PyTorch module. So every net that can be exported can be quantized, also a
thinned or factorised one, and the graph that is calibrated and corrected is the one that will run. Batch norm is
already folded in this graph.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from project.deployment.int8.bias_correction import corrected
from project.deployment.int8.observers import Array, Method, Observer, Scale, round_weight
from project.deployment.int8.qdq import Layer, Plan, layers_of, plan_of, write_qdq
from project.deployment.int8.qdq import float_operations as float_operations  # export lists them
from project.deployment.int8.running import batches_of, values_of

if TYPE_CHECKING:
    from onnx import ModelProto

_FEW = 128
"""Number of images for what keeps values of all images in memory, or runs the model once for each layer, by default."""


@dataclass(frozen=True)
class Quantizer:
    """Settings of post-training quantization: which layers become integers, and how their scales are found.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.PostTrainingQuantization
              init_args:
                quantizer: {observer: percentile, percentile: 99.9, last_layer: false}

    Args:
        observer: method that chooses the ranges of activations: min-max, mean-min-max, percentile or mse
            (:mod:`project.deployment.int8.observers`).
        percentile: share of the values that ``observer: percentile`` keeps, in percent; above 50 and up to 100.
        weight_observer: method that chooses the range of each channel's weights: min-max or mse.
        weight_bits: number of bits of a weight: 8, or 4 with ``activations: false``.
        activations: whether activations become integers too. Without them the weights are stored as integers and the
            net computes in fp32: the file is smaller but not faster.
        reduce_range: whether to choose eight-bit weights with which the sums of products cannot overflow on any
            processor. False keeps one more bit of the largest weights. That is correct on processors with VNNI and on
            ARM, and wrong on x86 processors without VNNI. Without ``activations`` it has no effect.
        bias_correction: whether to correct each layer's bias by the mean error of its outputs, layer after layer.
            True measures the errors on all calibration images, ``None`` on 128 of them. ``None`` corrects nothing if
            the net was trained with rounded weights.
        eight_bit_share: share of the weights that get eight bits if ``weight_bits`` is 4, from 0 to 1. The layers that
            change the outputs most for each weight come first, such as the first layer of a net. ``None`` is 0.1, or 0
            if the net was trained with rounded weights.
        num_images: number of calibration images, taken from the training set without augmentation; 1 or more.
        exclude: regular expressions; a layer whose whole name matches one stays in fp32.
        first_layer: whether to quantize the first layer; false keeps it in fp32.
        last_layer: whether to quantize the last layer; false keeps it in fp32.
        float_layers: number of layers that stay in fp32 (mixed precision), 0 or more. They are the layers that change
            the outputs most when they alone are quantized.

    Raises:
        ValueError: if a number is outside its range, or ``weight_bits`` is 4 with activations.
    """

    observer: Method = "mse"
    percentile: float = 99.99
    weight_observer: Method = "min-max"
    weight_bits: int = 8
    activations: bool = True
    reduce_range: bool = True
    bias_correction: bool | None = None
    eight_bit_share: float | None = None
    num_images: int = 512
    exclude: list[str] = field(default_factory=list)
    first_layer: bool = True
    last_layer: bool = True
    float_layers: int = 0

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8):
            raise ValueError(f"weight_bits is {self.weight_bits}: choose 8 or 4.")
        if self.weight_bits == 4 and self.activations:
            raise ValueError("weight_bits is 4, but activations need 8: set activations to false, or choose 8.")
        if not 50 < self.percentile <= 100:
            raise ValueError(
                f"percentile is {self.percentile:g}: choose a number above 50 and up to 100, such as 99.99."
            )
        if self.eight_bit_share is not None and not 0 <= self.eight_bit_share <= 1:
            raise ValueError(f"eight_bit_share is {self.eight_bit_share:g}: choose a number from 0 to 1, such as 0.1.")
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}: choose 1 or more, such as 512; ranges need images.")
        if self.float_layers < 0:
            raise ValueError(f"float_layers is {self.float_layers}: choose 0 or more.")

    @property
    def corrects_bias(self) -> bool:
        """Whether biases are corrected: as ``bias_correction`` says, or by default."""
        return self.bias_correction is not False

    def after_training(self) -> "Quantizer":
        """These settings for a net that was trained with rounded weights: by default they round as the training did."""
        return replace(self, bias_correction=bool(self.bias_correction), eight_bit_share=self.eight_bit_share or 0.0)


@dataclass(frozen=True)
class QuantizedLayer:
    """The precision that a layer got.

    Example::

        >>> from project.compression import QuantizedLayer
        >>> layers = [QuantizedLayer("stem.0.conv", 8), QuantizedLayer("head", 32)]
        >>> [layer.name for layer in layers if layer.num_bits == 32]
        ['head']

    Args:
        name: name of the layer's PyTorch module.
        num_bits: number of bits of its weights: 8, 4, or 32 if the layer stays in fp32.
        loss: mean squared change of the net's outputs when this layer alone is quantized, divided by the variance of
            the outputs; 0 or more. ``None`` if it was not measured.
    """

    name: str
    num_bits: int
    loss: float | None = None


def quantize(model: "ModelProto", images: Array, quantizer: Quantizer) -> tuple["ModelProto", list[QuantizedLayer]]:
    """A quantized copy of ``model``, and the precision of each layer.

    Args:
        model: fp32 model with one input ``[N, C, H, W]`` and one output.
        images: normalised float32 images ``[N, C, H, W]`` on which ranges and errors are measured; at least one.
        quantizer: settings: which layers become integers, and how their scales are found.

    Raises:
        ValueError: if there are no images, an image is not finite, or no layer is left to quantize.
    """
    if len(images) == 0:
        raise ValueError("there are no calibration images, but the ranges are measured on them: give a few hundred.")
    if not np.isfinite(images).all():
        raise ValueError("the calibration images hold NaN or infinity: check the data and their normalisation.")
    layers = layers_of(model)
    wanted = _wanted(layers, quantizer)
    losses: dict[str, float] = {}
    if quantizer.float_layers:  # mixed precision: the most sensitive layers stay in fp32
        losses = sensitivity(model, images, quantizer, wanted)
        worst = sorted(wanted, key=lambda layer: losses[layer.name], reverse=True)[: quantizer.float_layers]
        wanted = [layer for layer in wanted if layer not in worst]
    if not wanted:
        raise ValueError("no layer is left to quantize: exclude fewer layers, or choose fewer float_layers.")
    plan = plan_of(model, wanted, activations=quantizer.activations)
    scales = _scales_of(plan, _calibrate(model, [plan], images, quantizer))
    bits, measured = _bits_of(model, images, quantizer, wanted)
    quantized = _quantize_layers(model, images, quantizer, bits, wanted, plan, scales)
    losses = measured | losses
    return quantized, [QuantizedLayer(layer.name, bits.get(layer.name, 32), losses.get(layer.name)) for layer in layers]


def _bits_of(
    model: "ModelProto", images: Array, quantizer: Quantizer, layers: Sequence[Layer]
) -> tuple[dict[str, int], dict[str, float]]:
    """The number of bits of each layer's weights, and the loss of each layer if it was measured."""
    bits = dict.fromkeys((layer.name for layer in layers), quantizer.weight_bits)
    if quantizer.weight_bits == 8:
        return bits, {}
    sizes = {layer.name: layer.rows(model).size for layer in layers}
    # OpenVINO 2026.4 reads the second and all later rows wrongly if each row has an odd number of four-bit weights.
    bits |= {layer.name: 8 for layer in layers if layer.is_linear(model) and layer.rows(model).shape[1] % 2}
    room = (0.1 if quantizer.eight_bit_share is None else quantizer.eight_bit_share) * sum(sizes.values())
    if min(sizes.values()) > room:
        return bits, {}
    losses = sensitivity(model, images[:_FEW], quantizer, layers)
    for name in sorted(losses, key=lambda name: losses[name] / sizes[name], reverse=True):
        if bits[name] == 4 and sizes[name] <= room:
            bits[name] = 8
            room -= sizes[name]
    return bits, losses


def sensitivity(
    model: "ModelProto", images: Array, quantizer: Quantizer, layers: Sequence[Layer] | None = None
) -> dict[str, float]:
    """For each layer: the mean squared change of the outputs when it alone is quantized, divided by their variance.

    It follows the debugging of single layers in Nagel et al. 2021 (arXiv:2106.08295, sec. 3.6), with the error measured
    at the net's outputs.
    """
    layers = layers_of(model) if layers is None else layers
    alone = replace(quantizer, bias_correction=False, float_layers=0)
    (output,) = (value.name for value in model.graph.output)
    exact = values_of(model, output, images)
    plans = [plan_of(model, [layer], activations=quantizer.activations) for layer in layers]
    found = _calibrate(model, plans, images, quantizer)
    losses = {}
    for layer, plan in zip(layers, plans, strict=True):
        scales = _scales_of(plan, found)
        bits = {layer.name: quantizer.weight_bits}
        rough = values_of(_quantize_layers(model, images, alone, bits, [layer], plan, scales), output, images)
        losses[layer.name] = float(((rough - exact) ** 2).mean() / exact.var())
    return losses


def _wanted(layers: Sequence[Layer], quantizer: Quantizer) -> list[Layer]:
    """The layers that the settings allow to quantize."""
    if not layers:
        raise ValueError(
            "the model has no convolution or linear layer with a constant weight, so nothing can be quantized: export "
            "it as fp32."
        )
    for pattern in quantizer.exclude:
        if not any(re.fullmatch(pattern, layer.name) for layer in layers):
            names = [layer.name for layer in layers]
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise ValueError(
                f"exclude holds {pattern!r}, which matches none of the {len(names)} layers: choose from names such as "
                f"{', '.join(near)}."
            )
    left_out = {layers[0].name} if not quantizer.first_layer else set()
    left_out |= {layers[-1].name} if not quantizer.last_layer else set()
    left_out |= {layer.name for layer in layers for p in quantizer.exclude if re.fullmatch(p, layer.name)}
    return [layer for layer in layers if layer.name not in left_out]


def _quantize_layers(
    model: "ModelProto",
    images: Array,
    quantizer: Quantizer,
    bits: Mapping[str, int],
    layers: Sequence[Layer],
    plan: Plan,
    scales: Mapping[str, Scale],
) -> "ModelProto":
    weights = {layer.name: _integers_of(model, layer, quantizer, bits[layer.name], plan, scales) for layer in layers}

    quantized = write_qdq(model, plan, scales, weights, num_bits=bits)
    if not quantizer.corrects_bias:
        return quantized
    model = corrected(model, quantized, layers, images if quantizer.bias_correction else images[:_FEW])
    return write_qdq(model, plan, scales, weights, num_bits=bits)


def _integers_of(
    model: "ModelProto", layer: Layer, quantizer: Quantizer, num_bits: int, plan: Plan, scales: Mapping[str, Scale]
) -> tuple[NDArray[np.int8], Array]:
    """A layer's integer weight, output channels first, and the scale of each channel.

    A runtime stores the bias as a 32-bit integer; its scale is the weight's scale times the input's. A filter that
    pruning has emptied would get a scale near 0, and its bias would not fit. So each scale is at least as large as the
    bias needs.
    """
    smallest = None
    if layer.bias is not None and (group := plan.group_of.get(layer.input)) is not None:
        # |bias| / (scale of the weight * scale of the input) <= 2**30
        smallest = torch.from_numpy(np.abs(layer.bias_of(model)) / np.float32(scales[group].scale * 2**30))
    integers, steps = round_weight(
        torch.from_numpy(layer.rows(model).copy()),
        num_bits,
        quantizer.weight_observer,
        reduce_range=quantizer.reduce_range and quantizer.activations,
        smallest=smallest,
    )
    return integers.numpy(), steps.numpy()


_Sources = tuple[str, ...]
"""Names of the tensors that together hold all values of a group."""


def _calibrate(
    model: "ModelProto", plans: Sequence[Plan], images: Array, quantizer: Quantizer
) -> dict[_Sources, Scale]:
    """The scale of each group of tensors, from all values that the group holds on the images."""
    groups = sorted({sources for plan in plans for sources in plan.sources_of.values()})
    names = sorted({name for sources in groups for name in sources})
    if not names:  # only the weights become integers
        return {}
    observers = {sources: Observer() for sources in groups}

    def together(values: Mapping[str, Array], sources: _Sources) -> Array:
        return np.concatenate([values[name].reshape(len(values[name]), -1) for name in sources], axis=1)

    for values in batches_of(model, names, images):  # first pass: the extremes
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise ValueError(
                    f"the net's tensor {name} is not finite on the calibration images: its weights are damaged, so "
                    "export another checkpoint."
                )
        for sources, observer in observers.items():
            observer.see_range(together(values, sources))
    if quantizer.observer in ("percentile", "mse"):  # second pass: histograms between the extremes
        for values in batches_of(model, names, images):
            for sources, observer in observers.items():
                observer.count(together(values, sources))
    return {group: observer.scale(quantizer.observer, quantizer.percentile) for group, observer in observers.items()}


def _scales_of(plan: Plan, found: Mapping[_Sources, Scale]) -> dict[str, Scale]:
    """The scale of each group of a plan, by the name of the group."""
    return {group: found[sources] for group, sources in plan.sources_of.items()}
