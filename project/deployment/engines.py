"""Engines: ways to run a net, each a function of images ``[N, C, H, W]`` (fp32, contiguous, on the processor) to fp32
logits that returns when the logits are there.

Of a net, on the processor, in fp32:

- ``eager``: PyTorch as it runs, weights and images in channels-last order;
- ``contiguous``: the same in PyTorch's default order; a poor baseline for convolutions;
- ``compiled``: ``torch.compile``, channels-last;
- ``onnxruntime``: ONNX Runtime (https://onnxruntime.ai) on the file of :func:`project.deployment.export.export_onnx`;
- ``openvino``: OpenVINO (https://docs.openvino.ai) on the same file, told to compute in fp32.

With rounding to bfloat16 (8 bits of mantissa, so logits differ in the third digit):

- ``bf16``: ``eager`` with weights and activations in bfloat16. ``torch.autocast`` keeps fp32 weights and turns them at
  every call, which took 1.85 instead of 1.67 ms for one image and 12.6 instead of 12.5 ms for 64 (SmallInception of
  400,186 parameters, 28x28, one core with AVX512-BF16). Slow on processors without products of bfloat16;
- ``openvino-bf16``: OpenVINO, told to compute in bfloat16.

On a GPU, channels-last, the way there and back included; convolutions as torch's settings have them (TF32 by default):

- ``cuda``, ``cuda-compiled``.

:func:`onnx_engine` and :func:`openvino_engine` run a model file, quantized ones too. Turning the images into the
order, type and place an engine wants counts as the engine's time. All engines use ``torch.get_num_threads()`` threads;
set them before building the engines.
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

FP32 = ("eager", "contiguous", "compiled", "onnxruntime", "openvino")
"""Engines that compute in fp32 on the processor: the best of them is what others are compared with."""


def engine(name: str, net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    """An engine on a copy of the net in eval mode; the net itself is left as it is.

    The compiled ones take up to eight batch sizes and compile for each at its first call (seconds to a minute).

    Args:
        name: of those above.
        net: takes images ``[N, C, H, W]``.
        image_shape: (C, H, W).

    Raises:
        ValueError: for an unknown name, and for an engine that is not installed.
    """
    check_engine(name)
    return _ENGINES[name](net, image_shape)


def engines(net: nn.Module, image_shape: tuple[int, int, int], names: Sequence[str] | None = None) -> dict[str, Engine]:
    """Engines by name; ``None`` builds those in fp32 of torch and, where it is installed, ONNX Runtime. Arguments and
    errors as of :func:`engine`.
    """
    names = [name for name in FP32 if name != "openvino" and not why_missing(name)] if names is None else names
    return {name: engine(name, net, image_shape) for name in names}


def available() -> list[str]:
    """Names of all engines that can be used here."""
    return [name for name in _ENGINES if not why_missing(name)]


def unavailable() -> dict[str, str]:
    """Why the other engines cannot be used here, by name."""
    return {name: reason for name in _ENGINES if (reason := why_missing(name))}


def why_missing(name: str) -> str | None:
    """Why a known engine cannot be used here, and what to do; ``None`` when it can."""
    packages = _PACKAGES.get(name, ())
    missing = next((package for package in packages if importlib.util.find_spec(package) is None), None)
    if missing:
        return f"{missing} cannot be imported: pip install {' '.join(packages)}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def check_engine(name: str) -> None:
    """Refuse an unknown engine and one that cannot be used here.

    Raises:
        ValueError: for either.
    """
    if name not in _ENGINES:
        raise ValueError(f"engine is {name!r}, but there are only these: {', '.join(_ENGINES)}.")
    if missing := why_missing(name):
        raise ValueError(f"engine is {name!r}, but {missing}, or choose eager or compiled.")


def openvino_engine(path: Path, precision: str = "f32") -> Engine:
    """OpenVINO on an ONNX file with one input and one output, set up for the latency of single calls.

    Args:
        path: of the file.
        precision: what layers that the file does not quantize compute in: ``f32`` or ``bf16``. OpenVINO's own choice is
            bf16 where the processor has such products, which is another net than the one in the file.

    Raises:
        ValueError: when it cannot load the file.
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
    """Fetching the logits also waits until they are there."""
    return lambda images: forward(images.to("cuda")).to("cpu")


def _compile(forward: FunctionType) -> Engine:
    """``torch.compile`` counts compilations per code object and, past eight, runs eagerly with no more than a log line.
    So every engine has a code object of its own; and fullgraph makes an error of what would run eagerly.
    """
    own = FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def _copy(
    net: nn.Module, memory_format: torch.memory_format, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    return copy.deepcopy(net).eval().to(device, dtype).to(memory_format=memory_format)


@cache
def _openvino_core() -> Any:
    """One for the process. Each core of OpenVINO 2026.4 gives the process another stack for signal handlers and, freed,
    puts back the one before: where that one's core was freed first, its memory is gone, and the next signal that Python
    handles (a child's end, Ctrl-C) is a segmentation fault.
    """
    import openvino

    return openvino.Core()
