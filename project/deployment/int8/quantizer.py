"""Post-training quantization of an ONNX model to eight bits (or fewer, of the weights alone).

Jacob et al. 2018 (arXiv:1712.05877): integers for weights and activations. Krishnamoorthi 2018 (arXiv:1806.08342, sec.
3): a scale per output channel of a weight, symmetric; one per activation, with a zero point. Nagel et al. 2021
(arXiv:2106.08295): bias correction (sec. 3.3, empirical), ranges (sec. 3.1). The result is an ordinary ONNX model with
``QuantizeLinear`` and ``DequantizeLinear`` around each operation, from which runtimes make integer kernels:
:mod:`project.deployment.int8.qdq` writes it.

It works on the exported graph and not on the module, so that every net that exports can be quantized, thinned or
factorised ones too, and what is calibrated and corrected is what will run. Batch norm is folded already there.
"""

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from project.deployment.int8.observers import Array, Method, Observer, Scale, round_weight
from project.deployment.int8.qdq import Layer, Plan, layers_of, plan_of, with_outputs, write_qdq

if TYPE_CHECKING:
    from onnx import ModelProto

_BATCH = 32


@dataclass(frozen=True)
class Quantizer:
    """What becomes integers, and how their scales are found.

    Args:
        observer: ranges of activations: min-max, mean-min-max, percentile or mse
            (:mod:`project.deployment.int8.observers`).
        percentile: share of the values that ``percentile`` keeps, in percent.
        weight_observer: ranges of each channel's weights: min-max or mse.
        weight_bits: 8, or 4 with ``activations: false``.
        activations: false stores the weights as integers and computes in fp32: smaller, not faster.
        reduce_range: true chooses eight-bit weights with which the sums of products cannot overflow on any processor.
            False keeps one more bit of the largest weights, which is right on processors with VNNI and on ARM, and
            wrong on x86 processors without VNNI. Without ``activations`` it has no effect.
        bias_correction: add to each layer's bias the mean error of its outputs, layer after layer; for four bits.
        num_images: calibration images, from the training set, without augmentation.
        exclude: regular expressions; layers whose whole name matches one stay fp32.
        first_layer, last_layer: false keeps the first or the last layer in fp32.
        float_layers: so many layers, those that alone change the outputs most, stay fp32 (mixed precision).

    Raises:
        ValueError: for numbers outside their range, and for four bits with activations.
    """

    observer: Method = "mse"
    percentile: float = 99.99
    weight_observer: Method = "min-max"
    weight_bits: int = 8
    activations: bool = True
    reduce_range: bool = True
    bias_correction: bool = False
    num_images: int = 512
    exclude: list[str] = field(default_factory=list)
    first_layer: bool = True
    last_layer: bool = True
    float_layers: int = 0

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8):
            raise ValueError(f"weight_bits is {self.weight_bits}: choose 8 or 4.")
        if self.weight_bits == 4 and self.activations:
            raise ValueError("weight_bits is 4, which is for weights alone: set activations to false, or choose 8.")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile:g}: choose above 50, up to 100, such as 99.99.")
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}, but no image means no range: choose about 512.")
        if self.float_layers < 0:
            raise ValueError(f"float_layers is {self.float_layers}, but it is a count: choose 0 or more.")


@dataclass(frozen=True)
class QuantizedLayer:
    """What became of a layer; ``loss`` is the mean squared change of the outputs when it alone is quantized, over their
    variance, and ``None`` where that was not asked for.
    """

    name: str
    num_bits: int
    loss: float | None = None


def quantize(model: "ModelProto", images: Array, quantizer: Quantizer) -> tuple["ModelProto", list[QuantizedLayer]]:
    """A quantized copy of ``model``, and what became of each layer.

    Args:
        model: fp32, one input ``[N, C, H, W]`` and one output.
        images: ``[N, C, H, W]`` float32, as the net takes them: what ranges and errors are measured on.
        quantizer: what and how.

    Raises:
        ValueError: without images, when an image is not finite, or when no layer is left to quantize.
    """
    if len(images) == 0:
        raise ValueError("there are no calibration images, and without them no range is known: give some hundred.")
    if not np.isfinite(images).all():
        raise ValueError("the calibration images hold NaN or infinity: look at the data and their normalisation.")
    layers = layers_of(model)
    wanted = _wanted(layers, quantizer)
    losses: dict[str, float] = {}
    if quantizer.float_layers:
        losses = sensitivity(model, images, quantizer, wanted)
        worst = sorted(wanted, key=lambda layer: losses[layer.name], reverse=True)[: quantizer.float_layers]
        wanted = [layer for layer in wanted if layer not in worst]
    if not wanted:
        raise ValueError("no layer is left to quantize: exclude fewer, or choose fewer float_layers.")
    plan = plan_of(model, wanted, activations=quantizer.activations)
    scales = _calibrate(model, set(plan.group_of.values()), images, quantizer)
    quantized = _quantize_layers(model, images, quantizer, wanted, plan, scales)
    chosen = {layer.name for layer in wanted}
    bits = [quantizer.weight_bits if layer.name in chosen else 32 for layer in layers]
    rows = [QuantizedLayer(layer.name, b, losses.get(layer.name)) for layer, b in zip(layers, bits, strict=True)]
    return quantized, rows


def sensitivity(
    model: "ModelProto", images: Array, quantizer: Quantizer, layers: Sequence[Layer] | None = None
) -> dict[str, float]:
    """For each layer the mean squared change of the outputs when it alone is quantized, over the outputs' variance.

    Nagel et al. 2021 (arXiv:2106.08295, sec. 3.6: debugging, layer by layer) with the error measured at the end.
    """
    layers = layers_of(model) if layers is None else layers
    alone = replace(quantizer, bias_correction=False, float_layers=0)
    (output,) = (value.name for value in model.graph.output)
    exact = _run(model, [output], images)[output]
    plans = [plan_of(model, [layer], activations=quantizer.activations) for layer in layers]
    scales = _calibrate(model, {name for plan in plans for name in plan.group_of.values()}, images, quantizer)
    losses = {}
    for layer, plan in zip(layers, plans, strict=True):
        rough = _run(_quantize_layers(model, images, alone, [layer], plan, scales), [output], images)[output]
        losses[layer.name] = float(((rough - exact) ** 2).mean() / exact.var())
    return losses


def _wanted(layers: Sequence[Layer], quantizer: Quantizer) -> list[Layer]:
    if not layers:
        raise ValueError("the model has no convolution or linear layer with a constant weight to quantize.")
    for pattern in quantizer.exclude:
        if not any(re.fullmatch(pattern, layer.name) for layer in layers):
            names = [layer.name for layer in layers]
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise ValueError(
                f"exclude holds {pattern!r}, which is none of the {len(names)} layers' names: they are like "
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
    layers: Sequence[Layer],
    plan: Plan,
    scales: Mapping[str, Scale],
) -> "ModelProto":
    weights = {layer.name: _integers_of(model, layer, quantizer, plan, scales) for layer in layers}

    def written(source: "ModelProto") -> "ModelProto":
        return write_qdq(source, plan, scales, weights, num_bits=quantizer.weight_bits)

    return written(_corrected(model, written, layers, images)) if quantizer.bias_correction else written(model)


def _integers_of(
    model: "ModelProto", layer: Layer, quantizer: Quantizer, plan: Plan, scales: Mapping[str, Scale]
) -> tuple[NDArray[np.int8], Array]:
    """A layer's integer weight, output channels first, and the scale of each channel.

    A runtime stores the bias as a 32-bit integer with the scale of the weight times that of the input. A filter that
    pruning has emptied needs no scale of its own, but its bias must still fit: no scale is smaller than that.
    """
    smallest = None
    if layer.bias is not None and (group := plan.group_of.get(layer.input)) is not None:
        smallest = torch.from_numpy(np.abs(layer.bias_of(model)) / np.float32(scales[group].scale * 2**30))
    integers, steps = round_weight(
        torch.from_numpy(layer.rows(model).copy()),
        quantizer.weight_bits,
        quantizer.weight_observer,
        reduce_range=quantizer.reduce_range and quantizer.activations,
        smallest=smallest,
    )
    return integers.numpy(), steps.numpy()


def _calibrate(model: "ModelProto", chiefs: set[str], images: Array, quantizer: Quantizer) -> dict[str, Scale]:
    """The scale of each group of tensors, from the values of its chief, the tensor that holds all of them."""
    names = sorted(chiefs)
    if not names:  # weights alone
        return {}
    observers = {name: Observer() for name in names}
    for values in _batches(model, names, images):
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise ValueError(f"the net's {name} is not finite on the calibration images: its weights are damaged.")
            observers[name].see_range(value)
    if quantizer.observer in ("percentile", "mse"):
        for values in _batches(model, names, images):
            for name, value in values.items():
                observers[name].count(value)
    return {name: observer.scale(quantizer.observer, quantizer.percentile) for name, observer in observers.items()}


def _corrected(
    model: "ModelProto", written: Callable[["ModelProto"], "ModelProto"], layers: Sequence[Layer], images: Array
) -> "ModelProto":
    """A copy of the fp32 model whose biases make up for the mean error of each quantized layer's outputs.

    One layer after the other, since each correction changes what the next one sees: as many runs as layers.
    """
    corrected = copy.deepcopy(model)
    outputs = [layer.output for layer in layers]
    exact = {name: _channel_means(value) for name, value in _run(model, outputs, images).items()}
    for layer in layers:
        if layer.bias is None:
            continue
        rough = _run(written(corrected), [layer.output], images)[layer.output]
        layer.add_to_bias_(corrected, exact[layer.output] - _channel_means(rough))
    return corrected


def _channel_means(x: Array) -> Array:
    return x.mean(axis=tuple(axis for axis in range(x.ndim) if axis != 1))


def _run(model: "ModelProto", names: Sequence[str], images: Array) -> dict[str, Array]:
    batches = list(_batches(model, names, images))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in names}


def _batches(model: "ModelProto", names: Sequence[str], images: Array) -> Iterator[dict[str, Array]]:
    """The named tensors' values, batch after batch, computed as the graph says (nothing fused)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        with_outputs(model, names).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (images_name,) = (value.name for value in session.get_inputs())
    for start in range(0, len(images), _BATCH):
        values = session.run(list(names), {images_name: images[start : start + _BATCH]})
        yield dict(zip(names, values, strict=True))
