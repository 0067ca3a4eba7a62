"""Write a net as an fp32 ONNX file (https://onnx.ai), and run ONNX files in ONNX Runtime (https://onnxruntime.ai)."""

import ast
import copy
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from project.frame.paths import write_whole

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

Engine = Callable[[Tensor], Tensor]
"""A function that runs a net: images ``[N, C, H, W]`` -> logits ``[N, num_classes]``."""


def export_onnx(
    net: nn.Module,
    path: str | os.PathLike[str],
    image_shape: tuple[int, int, int],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``net`` as an fp32 ONNX file that computes what the net computes in eval mode. The net does not change.

    Args:
        net: module that takes images ``[N, C, H, W]`` for every N.
        path: path of the file to write; a file holds at most 2 GB.
        image_shape: shape (C, H, W) of one image.
        metadata: keys and values for the file's ``metadata_props``; ``None`` writes none.
    """
    model = to_onnx(net, image_shape)
    note_(model, metadata or {})
    write_whole(Path(path), partial(write_onnx, model))


def to_onnx(net: nn.Module, image_shape: tuple[int, int, int]) -> "ModelProto":
    """The net as an fp32 ONNX model with a dynamic batch size, without the exporter's notes.

    What depends on weights alone, such as weight standardisation and weight normalisation, is computed once here and
    not at each run of the model. The exporter's optimizer does this only for small weights.
    """
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    net = copy.deepcopy(net).eval().to("cpu", torch.float32)
    images = torch.zeros(2, *image_shape)  # two images: the exporter would treat a batch size of 1 as a constant
    with torch.no_grad():
        net(images)  # if the net refuses the images, its own error is clearer than the exporter's
    try:
        program = _program_of(net, images)
    except torch.onnx.errors.OnnxExporterError:
        try:
            with PlainAttention():
                program = _program_of(net, images)
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(_why_not(net, error)) from error
    fold_constants(program.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
    remove_unused_nodes(program.model)
    if isinstance(program.model.graph.inputs[0].shape[0], int):  # type: ignore[index]
        raise ValueError(
            f"net is a {type(net).__name__}, which makes a number of the batch size, as len(images) does, so that its "
            "file would take this number of images only: write images.shape[0] in its forward."
        )
    model = program.model_proto
    _name_weights_(model.graph)
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    _strip_(model.graph)
    return model


def _why_not(net: nn.Module, error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(" .")
    return (
        f"net is a {type(net).__name__}, which PyTorch's exporter cannot write as ONNX ({reason}): change this part of "
        "its forward, or export with --format pt2 or packed."
    )


def _program_of(net: nn.Module, images: Tensor) -> torch.onnx.ONNXProgram:
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
    return program


class PlainAttention(TorchFunctionMode):
    """Attention is two products and a softmax.

    The exporter of PyTorch 2.14 knows no ``scaled_dot_product_attention`` with five dimensions, and mistakes the memory
    layout of its result if there is a mask.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = _attention if function is F.scaled_dot_product_attention else function
        return plain(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's ``scaled_dot_product_attention`` in eval mode, by its definition."""
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def _name_weights_(graph: "GraphProto") -> None:
    """Name each computed or transposed weight after its layer's module: ``blocks.0.mlp.fc1.weight``, not ``val_13``."""
    names = {tensor.name for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    for node in graph.node:
        scopes = next((note.value for note in node.metadata_props if note.key == "pkg.torch.onnx.name_scopes"), "[]")
        module = ast.literal_eval(scopes)[-2:-1]
        weight = node.input[1] if node.op_type in ("Conv", "Gemm", "MatMul") else ""
        if module and module[0] and weight in names and weight not in renamed and not weight.endswith(".weight"):
            name = f"{module[0]}.weight"
            renamed[weight] = name if name not in names else f"{module[0]}.{node.output[0]}.weight"
            names.add(renamed[weight])
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def note_(model: "ModelProto", strings: Mapping[str, str]) -> None:
    """Add keys and values to the model's ``metadata_props``."""
    for key, value in strings.items():
        model.metadata_props.add(key=key, value=value)


def _strip_(graph: "GraphProto") -> None:
    """Remove what no runtime needs: inner shapes, documentation and the exporter's notes."""
    graph.ClearField("value_info")
    for part in (graph, *graph.input, *graph.output, *graph.initializer, *graph.node):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def write_onnx(model: "ModelProto", path: Path) -> None:
    path.write_bytes(model.SerializeToString())


def onnx_engine(path: Path) -> Engine:
    """ONNX Runtime on a file with one input and one output.

    Args:
        path: path of the ONNX file.

    Raises:
        ValueError: if ONNX Runtime cannot load the file, or the file has several inputs or outputs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal errors only: other errors are raised as exceptions
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads leave the cores free after a run
    if _only_weights_are_integers(path):  # by default each run converts the weights to fp32; this option does it once
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        with redirect_stdout(None):  # it prints some errors, and raises them
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a dozen exception classes
        raise unreadable(path, "ONNX Runtime") from error
    check_one_and_one(path, len(session.get_inputs()), len(session.get_outputs()))
    images_name, logits_name = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([logits_name], {images_name: images.numpy()})[0])

    return run


def unreadable(path: Path, runtime: str) -> ValueError:
    """The error for a file that a runtime cannot load."""
    return ValueError(
        f"model file is {str(path)!r}, but {runtime} cannot load it: it is damaged or no ONNX model; export it again, "
        "or move it out of the run's folder."
    )


def _only_weights_are_integers(path: Path) -> bool:
    """Whether the file has integer weights and fp32 activations. It looks for the names of operations in the bytes of
    the file, which is faster than parsing it.
    """
    content = path.read_bytes()
    return b"DequantizeLinear" in content and b"QuantizeLinear" not in content


def check_one_and_one(path: Path, num_inputs: int, num_outputs: int) -> None:
    """Refuse a file that has not exactly one input and one output."""
    if (num_inputs, num_outputs) != (1, 1):
        raise ValueError(
            f"model file is {str(path)!r}, but it has {num_inputs} inputs and {num_outputs} outputs: give an image "
            "classifier with one of each, or move the file out of the run's folder."
        )
