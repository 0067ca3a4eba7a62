"""Engines: ways to run a net. An engine is a function from images ``[N, C, H, W]`` to fp32 logits.

The images are fp32, contiguous and in the CPU's memory. The function returns when the logits are there.

These engines run a net on the CPU in fp32:

- ``eager``: plain PyTorch, with weights and images in channels-last order;
- ``contiguous``: the same in PyTorch's default order, which is a poor baseline for convolutions;
- ``compiled``: ``torch.compile``, channels-last;
- ``onnxruntime``: ONNX Runtime (https://onnxruntime.ai) on the file of :func:`project.deployment.export_onnx`;
- ``openvino``: OpenVINO (https://docs.openvino.ai) on the same file, set to compute in fp32.

These engines run it on the CPU in bfloat16 (8 bits of mantissa, so logits differ in the third digit):

- ``bf16``: ``eager`` with weights and activations in bfloat16. It is slow on processors that cannot multiply bfloat16.
  ``torch.autocast`` would keep fp32 weights and convert them at every call. That took 1.85 instead of 1.67 ms for one
  image and 12.6 instead of 12.5 ms for 64 (SmallInception of 400,186 parameters, 28x28, one core with AVX512-BF16);
- ``openvino-bf16``: OpenVINO, set to compute in bfloat16.

These engines run it on a GPU, channels-last. Their time includes the copies to the GPU and back. Convolutions follow
torch's settings (TF32 by default):

- ``cuda``, ``cuda-compiled``.

:func:`onnx_engine` and :func:`openvino_engine` run a model file, also a quantized one. The time of an engine includes
the conversion of the images to the order, type and device that it needs. All engines use ``torch.get_num_threads()``
threads. Set this number before you build the engines.
"""

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from project.deployment.onnx_file import Engine, check_one_and_one, export_onnx, onnx_engine, unreadable
from project.models.net_check import channels_last_

FP32 = ("eager", "contiguous", "compiled", "onnxruntime", "openvino")
"""Engines that compute in fp32 on the CPU. The fastest of them is the baseline of all speedups."""


def engine(name: str, net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    """An engine on a copy of the net in eval mode. The net itself does not change.

    Compiled engines take up to eight batch sizes. They compile at the first call of each size (seconds to a minute).

    Args:
        name: name of the engine, one of those above, such as ``onnxruntime``.
        net: module that takes images ``[N, C, H, W]``.
        image_shape: shape (C, H, W) of one image.

    Raises:
        ValueError: if the name is unknown, or the engine is not installed.
    """
    check_engine(name)
    return _ENGINES[name](net, image_shape)


def engines(net: nn.Module, image_shape: tuple[int, int, int], names: Sequence[str] | None = None) -> dict[str, Engine]:
    """Several engines of one net, by name.

    Args:
        net: module that takes images ``[N, C, H, W]``.
        image_shape: shape (C, H, W) of one image.
        names: names of the engines. ``None`` takes PyTorch's fp32 engines and, if it is installed, ONNX Runtime.

    Raises:
        ValueError: if a name is unknown, or an engine is not installed.
    """
    names = [name for name in FP32 if name != "openvino" and not why_missing(name)] if names is None else names
    return {name: engine(name, net, image_shape) for name in names}


def available() -> list[str]:
    """Names of all engines that work on this machine."""
    return [name for name in _ENGINES if not why_missing(name)]


def unavailable() -> dict[str, str]:
    """The reason why each other engine does not work on this machine, by name."""
    return {name: reason for name in _ENGINES if (reason := why_missing(name))}


def why_missing(name: str) -> str | None:
    """The reason why a known engine does not work on this machine, and the remedy; ``None`` if it works."""
    packages = _PACKAGES.get(name, ())
    missing = next((package for package in packages if importlib.util.find_spec(package) is None), None)
    if missing:
        return f"{missing} cannot be imported: pip install {' '.join(packages)}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def check_engine(name: str) -> None:
    """Refuse an engine that is unknown or does not work on this machine.

    Raises:
        ValueError: if the name is unknown, or the engine's package or device is missing.
    """
    if name not in _ENGINES:
        raise ValueError(f"engine is {name!r}: choose one of {', '.join(_ENGINES)}.")
    if missing := why_missing(name):
        raise ValueError(f"engine is {name!r}, but {missing}, or choose eager or compiled.")


def openvino_engine(path: Path, precision: str = "f32") -> Engine:
    """OpenVINO on an ONNX file with one input and one output, set up for the latency of single calls.

    Args:
        path: path of the ONNX file.
        precision: precision of the layers that the file does not quantize: ``f32`` or ``bf16``. OpenVINO's own default
            is bf16 if the processor can multiply it. The results then differ from those of the net in the file.

    Raises:
        ValueError: if OpenVINO cannot load the file, or the file has several inputs or outputs.
    """
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        model = _openvino_core().compile_model(str(path), "CPU", options)
    except Exception as error:
        raise unreadable(path, "OpenVINO") from error
    check_one_and_one(path, len(model.inputs), len(model.outputs))
    request = model.create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer({0: images.numpy()}, share_inputs=True)[0])

    return run


FILE_ENGINES: dict[str, Callable[[Path], Engine]] = {
    "onnxruntime": onnx_engine,
    "openvino": openvino_engine,
    "openvino-bf16": partial(openvino_engine, precision="bf16"),
}
"""Engines that run an ONNX file."""


def _eager(net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    return _torch_engine(_channels_last(net))


def _contiguous(net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    return _torch_engine(_copy(net, torch.contiguous_format))


def _compiled(net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    return _torch_engine(_compile(_channels_last(net)))


def _bf16(net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    return _torch_engine(_channels_last(net, dtype=torch.bfloat16))


def _cuda(net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    return _torch_engine(_there_and_back(_channels_last(net, "cuda")))


def _cuda_compiled(net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    return _torch_engine(_there_and_back(_compile(_channels_last(net, "cuda"))))


def _on_file(name: str, net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export_onnx(net, path, image_shape)
        return FILE_ENGINES[name](path)


_ENGINES: dict[str, Callable[[nn.Module, tuple[int, int, int]], Engine]] = {
    "eager": _eager,
    "contiguous": _contiguous,
    "bf16": _bf16,
    "compiled": _compiled,
    **{name: partial(_on_file, name) for name in FILE_ENGINES},
    "cuda": _cuda,
    "cuda-compiled": _cuda_compiled,
}
_EXPORTER = ("onnx", "onnxscript")
_PACKAGES = {
    "onnxruntime": ("onnxruntime", *_EXPORTER),
    "openvino": ("openvino", *_EXPORTER),
    "openvino-bf16": ("openvino", *_EXPORTER),
}


def _torch_engine(forward: Engine) -> Engine:
    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return forward(images)

    return run


def _channels_last(net: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> FunctionType:
    net = _copy(net, torch.channels_last, device, dtype)

    def forward(images: Tensor) -> Tensor:
        return net(images.to(dtype).contiguous(memory_format=torch.channels_last)).float()

    assert isinstance(forward, FunctionType)
    return forward


def _there_and_back(forward: Engine) -> Engine:
    """Copy the images to the GPU and the logits back. The copy back also waits until the logits are there."""
    return lambda images: forward(images.to("cuda")).to("cpu")


def _compile(forward: FunctionType) -> Engine:
    """``torch.compile`` of a copy of the function.

    PyTorch counts compilations for each code object. After eight it runs the function eagerly and only writes a log
    line. So every engine gets its own code object. ``fullgraph`` turns every part that would run eagerly into an error.
    """
    own = FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def _copy(
    net: nn.Module, memory_format: torch.memory_format, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    net = copy.deepcopy(net).eval().to(device, dtype)
    return channels_last_(net) if memory_format == torch.channels_last else net.to(memory_format=memory_format)


@cache
def _openvino_core() -> Any:
    """OpenVINO's ``Core``, one for the whole process.

    Each ``Core`` of OpenVINO 2026.4 installs a stack for signal handlers, and restores the previous stack when it is
    freed. If the ``Core`` of the previous stack was freed before, the memory of that stack is gone. The next signal
    that Python handles (the end of a child process, Ctrl-C) is then a segmentation fault.
    """
    import openvino

    return openvino.Core()
