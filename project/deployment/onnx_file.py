"""An ONNX file (https://onnx.ai): written from a net in fp32, and run by ONNX Runtime (https://onnxruntime.ai)."""

import copy
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from project.frame.paths import write_whole

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

Engine = Callable[[Tensor], Tensor]
"""Images ``[N, C, H, W]`` -> logits ``[N, num_classes]``."""


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
        metadata: keys and values for the file's ``metadata_props``.
    """
    model = to_onnx(net, image_shape)
    note_(model, metadata or {})
    write_whole(Path(path), partial(write_onnx, model))


def to_onnx(net: nn.Module, image_shape: tuple[int, int, int]) -> "ModelProto":
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


def note_(model: "ModelProto", strings: Mapping[str, str]) -> None:
    for key, value in strings.items():
        model.metadata_props.add(key=key, value=value)


def _strip_(graph: "GraphProto") -> None:
    """Drop what is neither computed nor needed to compute: inner shapes, documentation, the exporter's notes."""
    graph.ClearField("value_info")
    for part in (graph, *graph.input, *graph.output, *graph.initializer, *graph.node):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def write_onnx(model: "ModelProto", path: Path) -> None:
    path.write_bytes(model.SerializeToString())


def onnx_engine(path: Path) -> Engine:
    """ONNX Runtime on a file with one input and one output.

    Raises:
        ValueError: when it cannot load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal ones only: the others are raised
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a run, leave the cores to others
    if _only_weights_are_integers(path):  # by default they are turned into fp32 in every run, not once
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a dozen kinds of its own
        raise unreadable(path, "ONNX Runtime") from error
    check_one_and_one(path, len(session.get_inputs()), len(session.get_outputs()))
    images_name, logits_name = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([logits_name], {images_name: images.numpy()})[0])

    return run


def unreadable(path: Path, runtime: str) -> ValueError:
    return ValueError(
        f"model file is {str(path)!r}, but {runtime} cannot load it: it is damaged or no ONNX model; export it again, "
        "or move it out of the run's folder."
    )


def _only_weights_are_integers(path: Path) -> bool:
    """By the names of the operations in the file, which is faster than parsing it."""
    content = path.read_bytes()
    return b"DequantizeLinear" in content and b"QuantizeLinear" not in content


def check_one_and_one(path: Path, num_inputs: int, num_outputs: int) -> None:
    if (num_inputs, num_outputs) != (1, 1):
        raise ValueError(
            f"model file is {str(path)!r}, but it has {num_inputs} inputs and {num_outputs} outputs: an image "
            "classifier's has one of each."
        )
