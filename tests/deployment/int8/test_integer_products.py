"""A quantized file means the same on every processor and in every engine, and what it means is exact arithmetic.

Processors without VNNI add two products of bytes in 16 bits and saturate. They are simulated here
(:mod:`helpers.saturating`), so that a machine of either kind guards both.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.int8_nets import IMAGE_SHAPE, NETS, small_images, small_net
from helpers.saturating import run_exactly, run_saturating, saturating_product
from helpers.slow import fast
from torch import nn

from project.deployment.engines import onnx_engine, openvino_engine
from project.deployment.int8.quantizer import Quantizer, quantize
from project.deployment.onnx_file import to_onnx

FAST = {"linear", "inception", "depthwise", "one layer twice", "attention of torch", "class token", "odd rows", "split"}
EVERY = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NETS]
KINDS = {
    "int8": Quantizer(),
    "weights of 8 bits": Quantizer(activations=False),
    "weights of 4 bits": Quantizer(activations=False, weight_bits=4),
}
LIMIT = 0.03
"""Of the largest logit. Engines round a product's sum to eight bits by other formulas than the definition's: where a
sum lies between two integers, they may choose the other one."""


@cache
def net_as_onnx(name: str) -> onnx.ModelProto:
    return to_onnx(small_net(name, small_images(256)), IMAGE_SHAPE)


def quantized(name: str, quantizer: Quantizer) -> onnx.ModelProto:
    return quantize(net_as_onnx(name), small_images(256).numpy(), quantizer)[0]


def run(model: onnx.ModelProto, images: np.ndarray, *, optimized: bool, precise: bool = False) -> np.ndarray:
    """ONNX Runtime's output, with all of its optimisations or with none, in its precise mode or not."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def difference(rough: np.ndarray, exact: np.ndarray) -> float:
    """Largest difference of any logit over the largest logit."""
    return float(np.abs(rough - exact).max() / np.abs(exact).max())


def test_the_simulated_instruction_saturates_as_the_real_one_does() -> None:
    a = np.array([[255, 255, 255, 255, 10]], np.uint8)
    b = np.array([[127], [127], [-127], [-127], [3]], np.int8)
    assert saturating_product(a, b).item() == (2**15 - 1) - 2**15 + 30
    assert saturating_product(a, b // 2).item() == int(a[0].astype(int) @ (b // 2).astype(int)[:, 0])


@pytest.mark.parametrize("name", fast(EVERY, 2))
def test_every_engine_gives_the_exact_answer_on_every_processor(name: str, tmp_path: Path) -> None:
    images = small_images(16, seed=2).numpy()
    for kind, quantizer in KINDS.items():
        model = quantized(name, quantizer)
        onnx.checker.check_model(model, full_check=True)
        exact = run_exactly(model, images)
        path = tmp_path / f"{kind}.onnx"
        onnx.save(model, path)
        answers = {
            "without VNNI": run_saturating(model, images),
            "optimized": run(model, images, optimized=True),
            "as it stands": run(model, images, optimized=False),
            "precise": run(model, images, optimized=True, precise=True),
            "precise, as it stands": run(model, images, optimized=False, precise=True),
            "our engine": onnx_engine(path)(torch.from_numpy(images)).numpy(),
        }
        differences = {engine: difference(answer, exact) for engine, answer in answers.items()}
        assert max(differences.values()) < LIMIT, (kind, differences)


@pytest.mark.parametrize("name", fast(EVERY, 2))
def test_openvino_gives_the_exact_answer(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    images = small_images(16, seed=2).numpy()
    for kind, quantizer in KINDS.items():
        path = tmp_path / f"{kind}.onnx"
        model = quantized(name, quantizer)
        onnx.save(model, path)
        answer = openvino_engine(path)(torch.from_numpy(images)).numpy()
        assert difference(answer, run_exactly(model, images)) < LIMIT, kind


@pytest.mark.slow
def test_openvino_without_vnni_gives_the_exact_answer(tmp_path: Path) -> None:
    """Its kernels for AVX-512 without VNNI run on newer processors, too, when the process begins with this limit."""
    pytest.importorskip("openvino")
    images = small_images(16, seed=2).numpy()
    np.save(tmp_path / "images.npy", images)
    for name in FAST:
        for reduce_range in (True, False):
            model = quantized(name, Quantizer(reduce_range=reduce_range))
            onnx.save(model, tmp_path / f"{name}, {reduce_range}.onnx")
            np.save(tmp_path / f"{name}, {reduce_range}.npy", run_exactly(model, images))
    script = (
        "import sys, pathlib, numpy, torch\n"
        "from project.deployment.engines import openvino_engine\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "images = torch.from_numpy(numpy.load(folder / 'images.npy'))\n"
        "for path in sorted(folder.glob('*.onnx')):\n"
        "    exact = numpy.load(path.with_suffix('.npy'))\n"
        "    error = abs(openvino_engine(path)(images).numpy() - exact).max() / abs(exact).max()\n"
        "    print(path.stem.rpartition(', ')[2], error)\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    errors: dict[str, list[float]] = {"True": [], "False": []}
    for line in done.stdout.splitlines():
        reduced, error = line.split()
        errors[reduced].append(float(error))
    assert max(errors["True"]) < LIMIT
    if "avx512" in torch.backends.cpu.get_cpu_capability().lower():
        assert max(errors["False"]) > 0.1  # so the limit is obeyed: these kernels do saturate


@pytest.mark.parametrize("name", fast(["linear", "inception", *sorted(FAST - {"linear", "inception"})], 2))
def test_eight_full_bits_are_wrong_without_vnni(name: str) -> None:
    """The control: with all eight bits each of these nets is wrong there, so the tests above do see saturation."""
    images = small_images(16, seed=2).numpy()
    errors = {}
    for reduce_range in (False, True):
        model = quantized(name, Quantizer(reduce_range=reduce_range))
        errors[reduce_range] = difference(run_saturating(model, images), run_exactly(model, images))
    assert errors[False] > max(0.005, 5 * errors[True])


@pytest.mark.parametrize("dead", [1, 4, 8])
def test_an_emptied_filter_keeps_its_bias(dead: int, tmp_path: Path) -> None:
    """Pruning empties filters whose bias stays: an empty row's scale must not be so small that its bias, an integer
    of 32 bits, overflows.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 256, 10))
    with torch.no_grad():
        net[0].weight[:dead] = 0  # type: ignore[index]
        net[0].bias[:dead] = torch.linspace(0.5, 3, dead)  # type: ignore[index]
        net[0].weight[dead] *= 1e-6  # type: ignore[index]
    images = small_images(64).numpy()
    model, _ = quantize(to_onnx(net, IMAGE_SHAPE), images, Quantizer())
    exact = run_exactly(model, images)
    with torch.no_grad():
        assert difference(exact, net(torch.from_numpy(images)).numpy()) < 0.02
    for precise in (False, True):
        assert difference(run(model, images, optimized=True, precise=precise), exact) < 0.01
