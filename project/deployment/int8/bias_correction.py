"""Empirical bias correction (Nagel et al. 2021, arXiv:2106.08295, sec. 3.3).

Rounding changes the mean of a layer's outputs: the errors of its weights do not cancel out where its inputs have a mean
other than 0, as after a ReLU. The bias takes this change back, channel by channel.

A correction changes the inputs of all later layers. So the layers are corrected one after the other. The quantized
model runs in parts, each of which ends at a layer. The values at the end of a part are kept with the correction added,
and the next part begins with them. Each node runs once, however many layers there are.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from project.deployment.int8.observers import Array
from project.deployment.int8.qdq import Layer
from project.deployment.int8.running import BATCH, batches_of, session_of

if TYPE_CHECKING:
    from onnx import ModelProto


def corrected(model: "ModelProto", quantized: "ModelProto", layers: Sequence[Layer], images: Array) -> "ModelProto":
    """A copy of the fp32 model with biases that compensate the mean error of each quantized layer's outputs.

    Args:
        model: model in fp32; it does not change.
        quantized: the quantized model, with the tensor names of ``model``.
        layers: quantized layers in the order in which they run; those without a bias are left out.
        images: normalised float32 images ``[N, C, H, W]`` on which the means are measured; at least one. The values
            between two parts are in memory for all of them.
    """
    layers = [layer for layer in layers if layer.bias is not None]
    exact, result, parts = _means(model, layers, images), copy.deepcopy(model), _Parts(quantized, images)
    for layer in layers:
        rough = parts.run_to(layer.output)
        change = (exact[layer.output] - _mean(rough)).astype(np.float32)
        for batch in rough:
            batch += change.reshape(1, -1, *[1] * (batch.ndim - 2))
        layer.add_to_bias_(result, change)
    return result


def _means(model: "ModelProto", layers: Sequence[Layer], images: Array) -> dict[str, Array]:
    """The mean of each channel of each layer's outputs, by the name of the output."""
    means: dict[str, list[tuple[Array, int]]] = {layer.output: [] for layer in layers}
    for batch in batches_of(model, list(means), images) if means else ():
        for name, value in batch.items():
            means[name].append((_mean([value]), len(value)))
    return {
        name: np.average([mean for mean, _ in parts], axis=0, weights=[count for _, count in parts])
        for name, parts in means.items()
    }


def _mean(batches: Sequence[Array]) -> Array:
    """The mean of each channel over all images and positions: ``[channels]``."""
    sums = [
        batch.sum(axis=tuple(axis for axis in range(batch.ndim) if axis != 1), dtype=np.float64) for batch in batches
    ]
    return np.sum(sums, axis=0) / sum(batch[:, 0].size for batch in batches)


class _Parts:
    """Runs a model's nodes in order, a part at a time, and keeps the values that later parts read.

    Args:
        model: model with one input.
        images: float32 images ``[N, C, H, W]``.
    """

    def __init__(self, model: "ModelProto", images: Array) -> None:
        self.model, self._next = model, 0
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.last_reader = {name: place for place, node in enumerate(model.graph.node) for name in node.input}
        (images_name,) = (value.name for value in model.graph.input)
        self.values = [{images_name: images[start : start + BATCH]} for start in range(0, len(images), BATCH)]

    def run_to(self, name: str) -> list[Array]:
        """Run up to the node that writes the named tensor, and return the tensor, one array for each batch.

        The next part reads these arrays: a change in place is a change of its inputs.
        """
        import onnx

        graph = self.model.graph
        end = next(place for place, node in enumerate(graph.node) if name in node.output) + 1
        nodes, self._next = list(graph.node[self._next : end]), end
        made = {output for node in nodes for output in node.output}
        read = {source for node in nodes for source in node.input if source}
        sources = sorted(read - made - self.constants.keys())
        wanted = sorted({output for output in made if self.last_reader.get(output, -1) >= end} | {name})
        part = onnx.ModelProto()
        part.CopyFrom(self.model)
        part.ClearField("graph")
        part.graph.name = "part"
        part.graph.node.extend(nodes)
        part.graph.initializer.extend(self.constants[source] for source in sorted(read & self.constants.keys()))
        kind = onnx.helper.np_dtype_to_tensor_dtype
        part.graph.input.extend(
            onnx.helper.make_tensor_value_info(source, kind(self.values[0][source].dtype), None) for source in sources
        )
        part.graph.output.extend(onnx.ValueInfoProto(name=output) for output in wanted)
        session = session_of(part)
        for values in self.values:
            results = session.run(wanted, {source: values[source] for source in sources})
            values.update(zip(wanted, results, strict=True))
            for source in [source for source in values if source != name and self.last_reader.get(source, -1) < end]:
                del values[source]
        return [values[name] for values in self.values]
