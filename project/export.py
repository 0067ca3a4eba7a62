"""A net as an ONNX file (https://onnx.ai): one file that runtimes on servers, phones and browsers read.

Input ``images`` ``[batch, C, H, W]`` fp32, normalised as in training; output ``logits`` ``[batch, num_classes]``;
``batch`` is dynamic. The exporter's optimizer folds batch norm into the convolution before it (y = w x + b with both
scaled, so equal up to rounding) and leaves dropout out. Weights lie inside the file as dense fp32: zeros take their
four bytes like any other value.

The exporter notes for every value its shape and for every node the lines of source code it came from, with the paths
of the machine it ran on. No runtime needs either, so both are dropped: SmallInception for 28x28 images (186,026
parameters, 744,104 bytes at four bytes each) makes a file of 748,845 bytes instead of 836,491.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from project.paths import write_whole

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto


def export_onnx(
    net: nn.Module,
    path: str | os.PathLike[str],
    image_shape: tuple[int, int, int],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``net`` as an fp32 ONNX file, as it computes in eval mode; the net is left as it was.

    Args:
        net: takes images ``[N, C, H, W]`` for every N.
        path: of the file; at most 2 GB.
        image_shape: (C, H, W).
        metadata: keys and values for the file's ``metadata_props``, such as class names or the normalisation.
    """
    model = _to_onnx(net, image_shape)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    write_whole(Path(path), lambda part: part.write_bytes(model.SerializeToString()))


def _to_onnx(net: nn.Module, image_shape: tuple[int, int, int]) -> "ModelProto":
    net = copy.deepcopy(net).eval().to("cpu", torch.float32)
    images = torch.zeros(2, *image_shape)  # two: the exporter would take a batch of one for a constant
    with torch.no_grad():
        net(images)  # where the net refuses the images, its own error says more than the exporter's
    program = torch.onnx.export(
        net,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    model = program.model_proto
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    _strip_(model.graph)
    return model


def _strip_(graph: "GraphProto") -> None:
    """Drop what is neither computed nor needed to compute: inner shapes, documentation, the exporter's notes."""
    graph.ClearField("value_info")
    for part in (graph, *graph.input, *graph.output, *graph.initializer, *graph.node):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
