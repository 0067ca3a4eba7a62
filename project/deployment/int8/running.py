"""Run an ONNX model to calibrate or correct it: all tensors can be read, since the session fuses no operations."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from project.deployment.int8.observers import Array
from project.deployment.int8.qdq import with_outputs

if TYPE_CHECKING:
    from onnx import ModelProto

BATCH = 32
"""Number of images in one call."""


def session_of(model: "ModelProto") -> Any:
    """A session that runs the model's nodes one by one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def batches_of(model: "ModelProto", names: Sequence[str], images: Array) -> Iterator[dict[str, Array]]:
    """The values of the named tensors, batch after batch."""
    session = session_of(with_outputs(model, names))
    (images_name,) = (value.name for value in session.get_inputs())
    for start in range(0, len(images), BATCH):
        values = session.run(list(names), {images_name: images[start : start + BATCH]})
        yield dict(zip(names, values, strict=True))


def values_of(model: "ModelProto", name: str, images: Array) -> Array:
    """The values of the named tensor for all images."""
    return np.concatenate([batch[name] for batch in batches_of(model, [name], images)])
