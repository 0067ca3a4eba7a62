"""Tensors that share a scale: it covers the values of all of them."""

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.int8_nets import IMAGE_SHAPE, NETS, small_images, small_net
from helpers.slow import fast
from onnx import numpy_helper

from project.deployment.int8.qdq import with_outputs
from project.deployment.int8.quantizer import Quantizer, quantize
from project.deployment.onnx_file import to_onnx


def outputs_of(model: onnx.ModelProto, names: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(
        with_outputs(model, names).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


FAST = {"pool into a concatenation", "signed values", "inception"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in NETS])
def test_no_tensor_is_clipped(name: str) -> None:
    """With ``min-max`` each quantized tensor lies within its scale on the calibration images, to half a step.

    Only a ReLU or ReLU6 that the quantization has taken over cuts off values, those below 0.
    """
    images = small_images(64)
    model = to_onnx(small_net(name, images), IMAGE_SHAPE)
    quantized, _ = quantize(model, images.numpy(), Quantizer(observer="min-max"))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    pairs = {
        node.input[0]: (float(constants[node.input[1]]), int(constants[node.input[2]]))
        for node in quantized.graph.node
        if node.op_type == "QuantizeLinear"
    }
    rectified = {node.input[0] for node in model.graph.node if node.op_type in ("Relu", "Clip")}
    made = {value for node in model.graph.node for value in node.output}
    values = outputs_of(model, sorted(made & set(pairs)), images.numpy())
    for tensor, value in values.items():
        scale, zero_point = pairs[tensor]
        assert value.max() <= (255 - zero_point + 0.51) * scale, tensor
        if tensor not in rectified:
            assert value.min() >= (-zero_point - 0.51) * scale, tensor


@pytest.mark.parametrize("name", fast(sorted(FAST)))
def test_eight_bits_suffice_where_branches_meet(name: str) -> None:
    images = small_images(256)
    model = to_onnx(small_net(name, images), IMAGE_SHAPE)
    quantized, _ = quantize(model, images.numpy(), Quantizer())
    (logits,) = (value.name for value in model.graph.output)
    exact, rough = (outputs_of(each, [logits], images.numpy())[logits] for each in (model, quantized))
    assert np.abs(rough - exact).max() <= 0.06 * np.abs(exact).max()
