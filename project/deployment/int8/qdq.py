"""The graph of a quantized ONNX model: which tensors become integers, and the nodes that express this.

In the QDQ form, which ONNX Runtime and OpenVINO both read, an integer tensor is a pair of nodes: ``QuantizeLinear``
after the operation that writes it, and ``DequantizeLinear`` before the operations that read it. If a runtime finds the
sequence dequantize, operation, quantize, it runs the operation on integers.

Four rules keep the graph fast and small:

- If an operation only moves values (max pooling, concatenation, reshaping), its inputs and its output share one scale,
  so that nothing is rescaled. The branches of an Inception block write with the scale of their concatenation.
- A ReLU whose output has zero point 0 is left out, because the quantization clips at 0 too. So is a ReLU6 whose scale
  ends at 6 or below.
- If only operations in floating point read a tensor, one of them an exponential such as the sigmoid of SiLU, the zero
  point is subtracted by a node of its own: ``scale * q + (-scale * zero_point)``. OpenVINO 2026.4 then computes the
  activation within the convolution. A zero point in ``DequantizeLinear`` hinders it, and EfficientNet-B0 takes twice as
  long.
- Equal scales and zero points are stored once. A zero point is always given: without it ONNX Runtime 1.32 pools in
  floating point.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from project.deployment.int8.observers import Array, Scale

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_MOVES = {"MaxPool", "Concat", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Relu"}
"""Operations whose output holds only values of their inputs (or 0, which every scale represents exactly)."""
_COMPUTES = {"AveragePool", "GlobalAveragePool", "ReduceMean", "Add", "Mul"}
"""Operations that have integer kernels and compute new values, so that their output has its own scale."""

_EXPONENTIALS = {"Sigmoid", "Gelu", "Erf", "Tanh", "Softplus", "Elu", "Swish", "Mish"}
"""Activations that compute in floating point and take long: those that compute an exponential."""

_NO_ARITHMETIC = (_MOVES - {"MaxPool", "Relu"}) | {
    "QuantizeLinear", "DequantizeLinear", "Shape", "Gather", "Slice", "Split", "Expand", "Tile", "Cast", "Constant",
    "ConstantOfShape", "Range", "Pad", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
"""Operations that move values or compute shapes."""
_SHAPE_INPUTS = {"Expand": 1, "Tile": 1, "Range": 0, "ConstantOfShape": 0}
"""Operations that take the shape of their output as an input: index of the first of these inputs."""


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer with a constant weight.

    Args:
        name: name of the PyTorch module, such as ``stem.0.conv``.
        input: name of the tensor that the layer reads.
        output: name of the tensor that the layer writes, before any activation.
        weight: name of the weight in the graph.
        bias: name of the bias in the graph; ``None`` if the layer has no bias.
        axis: axis of the weight that counts the output channels, 0 or 1.
    """

    name: str
    input: str
    output: str
    weight: str
    bias: str | None
    axis: int

    def rows(self, model: "ModelProto") -> Array:
        """The weight, with the output channels as the first axis."""
        return np.moveaxis(_constant(model.graph, self.weight), self.axis, 0)

    def bias_of(self, model: "ModelProto") -> Array:
        """The bias, one number for each output channel."""
        assert self.bias is not None
        return _constant(model.graph, self.bias)

    def is_linear(self, model: "ModelProto") -> bool:
        """Whether the layer is linear and no convolution."""
        return _constant(model.graph, self.weight).ndim == 2

    def add_to_bias_(self, model: "ModelProto", values: Array) -> None:
        """Add one number for each output channel to the bias in ``model``."""
        from onnx import numpy_helper

        assert self.bias is not None
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == self.bias)
        changed = (numpy_helper.to_array(tensor) + values).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))


@dataclass(frozen=True)
class Plan:
    """Which layers get integer weights, which activations become integers, and which of these share a scale.

    Args:
        layers: layers with integer weights, by the name of their output. A layer whose input becomes no integer
            computes in floating point.
        group_of: name of the group that shares a scale with a tensor, by the name of each tensor that becomes integers.
            A group is named after one of its tensors.
        sources_of: names of the tensors that together hold all values of a group, by the name of the group. The other
            tensors of the group are moved from these.
        activation_of: name of the output of the ReLU or ReLU6 behind a layer, by the layer's output; only if nothing
            else reads that output.
        most: largest value of each ReLU6 in ``activation_of``, by the name of its output.
        shifted: names of the integer tensors whose zero point is subtracted by a node of its own.
    """

    layers: dict[str, Layer]
    group_of: dict[str, str]
    sources_of: dict[str, tuple[str, ...]]
    activation_of: dict[str, str]
    most: dict[str, float]
    shifted: set[str] = field(default_factory=set)


def layers_of(model: "ModelProto") -> list[Layer]:
    """The convolutions and linear layers with constant weights, in the order in which they run."""
    constants = {tensor.name for tensor in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in constants:
            continue
        transposed = next((a.i for a in node.attribute if a.name == "transB"), 0)
        axis = 0 if node.op_type == "Conv" or transposed else 1
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in constants else None
        weight = node.input[1]
        name = weight.removesuffix(".weight") if weight.endswith(".weight") else node.output[0]
        layers.append(Layer(name, node.input[0], node.output[0], weight, bias, axis))
    return layers


def plan_of(model: "ModelProto", layers: Sequence[Layer], *, activations: bool) -> Plan:
    """The tensors that become integers if the weights of ``layers`` do.

    Without ``activations``, only the weights become integers.
    """
    by_output = weights = {layer.output: layer for layer in layers}
    if not activations:
        return Plan(by_output, {}, {}, {}, {})
    graph = model.graph
    if _has_computed_shape(graph):
        signed = _signed_conv_inputs(graph)
        by_output = {name: layer for name, layer in weights.items() if layer.input not in signed}
    outputs = {value.name for value in graph.output}
    activation_of = _fused_activations(graph, by_output, outputs)
    # From the front of the graph: a tensor can be integers if one of the layers writes it, or if its node has an
    # integer kernel and reads integers only.
    quantized = {layer.input for layer in by_output.values()}
    tensors, fused = _activations(graph), set(activation_of.values())
    for node in graph.node:
        (target, *_) = node.output
        sources = [name for name in node.input if name in tensors]
        if target in by_output:
            target = activation_of.get(target, target)
        elif target in fused or not _has_integer_kernel(graph, node) or not set(sources) <= quantized:
            continue
        if target not in outputs:
            quantized.add(target)
    quantized = _useful(graph, quantized, by_output, activation_of)
    # Each tensor starts as a group of its own. Operations that only move values join groups. A tensor that is moved
    # from other tensors of its group adds no values to those that the scale has to cover.
    group_of, moved = {name: name for name in quantized}, set()
    for node in graph.node:
        (target, *_) = node.output
        if node.op_type in _MOVES and target in quantized and target not in activation_of.values():
            _join_(group_of, node, target)
            inputs = [name for name in node.input if name in tensors]
            if inputs and all(name in group_of for name in inputs):
                moved.add(target)
    sources_of: dict[str, tuple[str, ...]] = {}
    for name in sorted(quantized - moved):
        sources_of[group_of[name]] = (*sources_of.get(group_of[name], ()), name)
    most = {node.output[0]: end for node in graph.node if (end := _end_of_clip(graph, node)) is not None}
    shifted = _before_exponentials(graph, quantized, by_output)
    return Plan(weights, group_of, sources_of, activation_of, most, shifted)


def _before_exponentials(graph: "GraphProto", quantized: set[str], by_output: Mapping[str, Layer]) -> set[str]:
    """The quantized tensors that only operations in floating point read, at least one of them an exponential."""
    tensors, readers = _activations(graph), _readers_of(graph)

    def in_floats(node: "NodeProto") -> bool:
        integers = {name for name in node.input if name in tensors} <= quantized
        return node.output[0] not in by_output and not (integers and _has_integer_kernel(graph, node))

    return {
        name
        for name in quantized & readers.keys()
        if all(in_floats(node) for node in readers[name])
        and any(node.op_type in _EXPONENTIALS for node in readers[name])
    }


def _readers_of(graph: "GraphProto") -> dict[str, list["NodeProto"]]:
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _has_computed_shape(graph: "GraphProto") -> bool:
    """Whether a node makes a tensor whose shape is computed from another shape, such as a class token for each image.

    In such a graph OpenVINO 2026.4 ignores the zero point of a convolution's input, and gives wrong results without a
    message. Matrix products are right.
    """
    constants = {tensor.name for tensor in graph.initializer}
    shapes = [
        name
        for node in graph.node
        if node.op_type in _SHAPE_INPUTS
        for name in node.input[_SHAPE_INPUTS[node.op_type] :]
    ]
    return not set(shapes) <= constants


def _signed_conv_inputs(graph: "GraphProto") -> set[str]:
    """The tensors that a convolution reads and that may hold negative values, so that their zero point may not be 0."""
    positive: set[str] = set()
    for node in graph.node:
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        moved = node.op_type in _MOVES | {"AveragePool", "GlobalAveragePool"} and set(sources) <= positive
        if moved or node.op_type in ("Relu", "Sigmoid", "HardSigmoid") or _end_of_clip(graph, node) is not None:
            positive.add(node.output[0])
    return {node.input[0] for node in graph.node if node.op_type == "Conv"} - positive


def _has_integer_kernel(graph: "GraphProto", node: "NodeProto") -> bool:
    """Whether runtimes compute or move integers at this node.

    A mean counts only if it is over height and width: OpenVINO 2026.4 gives wrong results for a quantized mean over
    tokens that follows a quantized addition.
    """
    if node.op_type == "ReduceMean":
        return len(node.input) > 1 and sorted(_constant(graph, node.input[1]).tolist()) in ([2, 3], [-2, -1])
    return node.op_type in _MOVES | _COMPUTES


def _useful(
    graph: "GraphProto", quantized: set[str], by_output: Mapping[str, Layer], activation_of: Mapping[str, str]
) -> set[str]:
    """The quantized tensors that a layer reads, directly or through other nodes, and those that convolutions write.

    Runtimes have no integer convolution that writes floats. To round any other tensor would cost time and accuracy and
    save nothing.
    """
    useful = {layer.input for layer in by_output.values()}
    for node in reversed(graph.node):  # from the back: what a useful tensor is computed from is useful too
        (output, *_) = node.output
        target = activation_of.get(output, output)
        if output in by_output:
            useful |= {target} if node.op_type == "Conv" else set()
        elif target in useful & quantized and _has_integer_kernel(graph, node):
            useful |= set(node.input)
    return useful & quantized


def _join_(group_of: dict[str, str], node: "NodeProto", target: str) -> None:
    """Give one scale to the tensors that a moving operation reads and writes."""
    sources = [name for name in node.input if name in group_of]
    if not sources:  # the input is floating point and becomes integers only after this operation
        return
    chief = group_of[target] if node.op_type == "Concat" else group_of[sources[0]]
    members = {group_of[name] for name in (*sources, target)}
    for name, group in group_of.items():
        if group in members:
            group_of[name] = chief


def _activations(graph: "GraphProto") -> set[str]:
    constants = {tensor.name for tensor in graph.initializer}
    made = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    return made - constants


def _fused_activations(graph: "GraphProto", by_output: Mapping[str, Layer], outputs: set[str]) -> dict[str, str]:
    """For each layer whose output is read by a ReLU or ReLU6 and nothing else: the output of this activation."""
    readers = _readers_of(graph)
    fused = {}
    for output in by_output:
        nodes = readers.get(output, [])
        if len(nodes) != 1 or output in outputs:
            continue
        if nodes[0].op_type == "Relu" or _end_of_clip(graph, nodes[0]) is not None:
            fused[output] = nodes[0].output[0]
    return fused


def _end_of_clip(graph: "GraphProto", node: "NodeProto") -> float | None:
    """The largest value that a ``Clip`` node lets pass, if its smallest is 0, such as 6 of ReLU6."""
    constants = {tensor.name for tensor in graph.initializer}
    if node.op_type != "Clip" or len(node.input) < 3 or not set(node.input[1:]) <= constants:
        return None
    low, high = (float(_constant(graph, name)) for name in node.input[1:])
    return high if low == 0 else None


def write_qdq(
    model: "ModelProto",
    plan: Plan,
    scales: Mapping[str, Scale],
    weights: Mapping[str, tuple[NDArray[np.int8], Array]],
    *,
    num_bits: Mapping[str, int],
) -> "ModelProto":
    """The model with integer weights and activations.

    Args:
        model: model in fp32; it does not change.
        plan: plan that :func:`plan_of` made for this model.
        scales: scale of each group of tensors, by the name of the group's tensor in ``plan.group_of``.
        weights: integers (output channels first) and scale of each channel, by the name of the layer.
        num_bits: number of bits of a weight, 8 or 4, by the name of the layer.
    """
    import onnx

    writer = _Writer(plan, scales, num_bits)
    for layer in plan.layers.values():
        writer.add_weight(layer, *weights[layer.name])
    for value in model.graph.input:
        if value.name in plan.group_of:
            writer.add_pair(value.name, value.name)
    for node in model.graph.node:
        writer.add(node)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.value_info[:]
    graph.node.extend(writer.nodes)
    read = {name for node in writer.nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *writer.tensors])
    if 4 in num_bits.values():
        _raise_opset_(result, 21)
    return result


class _Writer:
    """Collects the nodes and constants of the quantized graph.

    ``stands_for`` maps the name of each tensor that became integers to the dequantized tensor that is read instead.
    """

    def __init__(self, plan: Plan, scales: Mapping[str, Scale], num_bits: Mapping[str, int]) -> None:
        self.plan, self.scales, self.num_bits = plan, scales, num_bits
        self.nodes: list[NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []  # type: ignore[name-defined]  # noqa: F821
        self.stands_for: dict[str, str] = {}
        self.weight_of: dict[str, str] = {}
        """For each layer's output: the name of the dequantized weight."""
        self._constants: set[str] = set()
        self._dropped = {
            activation
            for activation in plan.activation_of.values()
            if activation in plan.group_of
            and self._clips(plan.group_of[activation], plan.most.get(activation, math.inf))
        }

    def _clips(self, group: str, most: float) -> bool:
        """Whether the quantization of a group cuts off all values below 0 and above ``most``."""
        scale = self.scales[group]
        return scale.zero_point == 0 and 255 * scale.scale <= most * (1 + 1e-6)

    def add(self, node: "NodeProto") -> None:
        """Copy one node of the model. It reads the dequantized tensors in place of those that became integers."""
        import onnx

        (output, *_) = node.output
        if output in self._dropped:
            return  # the quantization after its layer clips already
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.ClearField("name")
        copy.input[:] = [self.stands_for.get(name, name) for name in node.input]
        if output in self.weight_of:
            copy.input[1] = self.weight_of[output]
        self.nodes.append(copy)
        target = self.plan.activation_of.get(output, output)
        if target != output and target in self._dropped:
            self.add_pair(output, target)  # the ReLU is left out: its readers read the layer's quantized output
        elif output in self.plan.group_of:
            self.add_pair(output, output)

    def add_pair(self, made: str, name: str) -> None:
        """Quantize and dequantize the tensor ``made``. Readers of ``name`` get the dequantized tensor."""
        from onnx import helper

        scale = self.scales[self.plan.group_of[name]]
        constants = self._scale_of(self.plan.group_of[name])
        integers, back = f"{name}_q", f"{name}_dq"
        self.nodes.append(helper.make_node("QuantizeLinear", [made, *constants], [integers]))
        if name in self.plan.shifted and scale.zero_point:
            raw = f"{name}_raw"
            self.nodes.append(
                helper.make_node("DequantizeLinear", [integers, constants[0], self._zero_point(0)], [raw])
            )
            shift = self._constant(f"{name}_shift", np.float32(-scale.scale * scale.zero_point))
            self.nodes.append(helper.make_node("Add", [raw, shift], [back]))
        else:
            self.nodes.append(helper.make_node("DequantizeLinear", [integers, *constants], [back]))
        self.stands_for[name] = back

    def add_weight(self, layer: Layer, integers: NDArray[np.int8], steps: Array) -> None:
        """Store the layer's integers, scales and zero points.

        Each layer gets three tensors of its own, even if two layers share a weight, and the zero points have the shape
        of the scales. ONNX Runtime's precise mode (``session.x64quantprecision``) needs both: it makes signed weights
        unsigned, one layer at a time, and refuses a file in which two layers share a tensor that it replaces.
        """
        from onnx import TensorProto, helper, numpy_helper

        values = np.ascontiguousarray(np.moveaxis(integers, 0, layer.axis))
        if self.num_bits[layer.name] == 4:
            values = values.astype(helper.tensor_dtype_to_np_dtype(TensorProto.INT4))  # two values in a byte
        name = layer.weight if f"{layer.weight}_dq" not in self.weight_of.values() else f"{layer.weight}_{layer.output}"
        names = [f"{name}_q", f"{name}_s", f"z{len(self.tensors)}"]
        constants: tuple[NDArray[Any], ...] = (values, steps, np.zeros(len(steps), values.dtype))
        for constant, constant_name in zip(constants, names, strict=True):
            self.tensors.append(numpy_helper.from_array(constant, constant_name))
        self.nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}_dq"], axis=layer.axis))
        self.weight_of[layer.output] = f"{name}_dq"

    def _scale_of(self, group: str) -> list[str]:
        """Names of the group's scale and zero point."""
        scale = self.scales[group]
        return [self._constant(f"{group}_s", np.float32(scale.scale)), self._zero_point(scale.zero_point)]

    def _zero_point(self, value: int) -> str:
        return self._constant(f"zero_{value}", np.uint8(value))

    def _constant(self, name: str, value: np.generic) -> str:
        """The name of a constant. It is stored when it is needed for the first time."""
        from onnx import numpy_helper

        if name not in self._constants:
            self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
            self._constants.add(name)
        return name


def float_operations(model: "ModelProto") -> list[str]:
    """The operations of a quantized model that compute in floating point, such as ``19 HardSwish``; most first.

    An operation that has an integer kernel computes in integers if its inputs are dequantized and its output is
    quantized. Matrix products may have a floating point output. Operations that only move values, subtract a zero point
    or compute shapes are left out.
    """
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    makers |= {value.name: "" for value in model.graph.input}
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        sources = {makers[name] for name in node.input if name in makers}
        written = node.op_type in ("Gemm", "MatMul") or (
            node.op_type in _MOVES | _COMPUTES | {"Conv"} and readers.get(node.output[0]) == {"QuantizeLinear"}
        )
        if sources == {"DequantizeLinear"} and node.input[-1].endswith("_shift"):
            continue  # a zero point
        if node.op_type not in _NO_ARITHMETIC and not (written and sources == {"DequantizeLinear"}):
            counts[node.op_type] += 1
    return [f"{counts[kind]} {kind}" for kind in sorted(counts, key=lambda kind: (-counts[kind], kind))]


def with_outputs(model: "ModelProto", names: Sequence[str]) -> "ModelProto":
    """A copy of the model whose outputs are the named tensors."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.output[:]
    result.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return result


def _constant(graph: "GraphProto", name: str) -> Array:
    from onnx import numpy_helper

    return numpy_helper.to_array(next(tensor for tensor in graph.initializer if tensor.name == name))


def _raise_opset_(model: "ModelProto", version: int) -> None:
    """Set the opset to ``version`` if it is lower.

    Four-bit integers exist since opset 21. The model's other operations have not changed since their own opset.
    """
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = max(opset.version, version)
