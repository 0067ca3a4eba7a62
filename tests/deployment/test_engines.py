import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from project.deployment.engines import (
    FP32,
    available,
    engine,
    engines,
    onnx_engine,
    openvino_engine,
    unavailable,
)
from project.deployment.export import export_onnx

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (2, 6, 6)
OPENVINO = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


def make_net() -> nn.Module:
    """In training mode, with running statistics that are not 0 and 1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))
    with torch.no_grad():
        net(3 * torch.randn(32, *SHAPE) + 1)
    return net


def check_engine(name: str) -> None:
    """The engine computes the net's logits at every batch size, and the net is left as it was."""
    net = make_net()
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    run = engine(name, net, SHAPE)
    for batch in (1, 3, 64):
        images = torch.randn(batch, *SHAPE)
        logits = run(images)
        assert net.training and net[1].training
        with torch.no_grad():
            expected = net.eval()(images)
        net.train()
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert not logits.requires_grad and type(logits) is Tensor
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert net[0].weight.is_contiguous()


@pytest.mark.parametrize("name", ["eager", "contiguous", "onnxruntime", pytest.param("openvino", marks=OPENVINO)])
def test_engine_computes_the_logits(name: str) -> None:
    check_engine(name)


@pytest.mark.parametrize("name", ["bf16", pytest.param("openvino-bf16", marks=OPENVINO)])
def test_bf16_computes_the_logits_to_two_digits(name: str) -> None:
    net, images = make_net(), torch.randn(5, *SHAPE)
    logits, expected = engine(name, net, SHAPE)(images), engine("eager", net, SHAPE)(images)
    assert logits.dtype == torch.float32 and net[0].weight.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.03, atol=0.03)
    if name == "bf16":  # OpenVINO takes fp32 where the processor has no products of bfloat16
        assert not torch.equal(logits, expected)


@pytest.mark.slow
def test_compiled_engine_computes_the_logits() -> None:
    check_engine("compiled")


def test_each_net_is_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations: list[int] = []
    compile: Callable[..., Any] = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compilations.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    nets = [nn.Sequential(nn.Conv2d(2, width, 3), nn.ReLU()) for width in range(1, 6)]
    runs = [engine("compiled", net, SHAPE) for net in nets]
    for batch in (1, 3):
        images = torch.randn(batch, *SHAPE)
        for net, run in zip(nets, runs, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(run(images), net(images))
    assert len(compilations) == 10  # torch.compile's limit is 8


def test_engine_does_not_follow_the_net() -> None:
    net, images = make_net(), torch.randn(1, *SHAPE)
    run = engine("eager", net, SHAPE)
    before = run(images)
    nn.init.zeros_(net[-1].weight)
    assert torch.equal(run(images), before)


def test_eager_convolves_channels_last_and_contiguous_does_not() -> None:
    layouts: list[bool] = []

    class Spy(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            layouts.append(input.is_contiguous(memory_format=torch.channels_last))
            layouts.append(self.weight.is_contiguous(memory_format=torch.channels_last))
            return super().forward(input)

    net = nn.Sequential(Spy(2, 4, 3))
    for name in ("eager", "contiguous"):
        engine(name, net, SHAPE)(torch.randn(2, *SHAPE))
    assert layouts == [True, True, False, False]


def test_onnxruntime_is_missed_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    assert list(engines(make_net(), SHAPE)) == ["eager", "contiguous", "compiled"]
    assert list(engines(make_net(), SHAPE, ["contiguous"])) == ["contiguous"]
    with pytest.raises(ValueError, match="onnxruntime cannot be imported: pip install"):
        engine("onnxruntime", make_net(), SHAPE)
    with pytest.raises(ValueError, match=r"'tensorrt'.*eager, contiguous, bf16, compiled, onnxruntime"):
        engine("tensorrt", make_net(), SHAPE)


def test_every_engine_is_there_or_says_why_not() -> None:
    assert set(available()) | set(unavailable()) >= {*FP32, "bf16", "openvino-bf16", "cuda", "cuda-compiled"}
    assert not set(available()) & set(unavailable())
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"'cuda', but torch finds no CUDA device, or choose eager"):
            engine("cuda", make_net(), SHAPE)


@pytest.mark.parametrize("run_file", [onnx_engine, pytest.param(openvino_engine, marks=OPENVINO)])
@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x08\x12\x07"])
def test_a_file_that_is_no_model_is_refused(run_file: Callable[[Path], Any], content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"model file is .*net\.onnx', but .* cannot load it: .*; export it again"):
        run_file(tmp_path / "net.onnx")


@pytest.mark.parametrize("run_file", [onnx_engine, pytest.param(openvino_engine, marks=OPENVINO)])
def test_a_file_of_two_outputs_is_refused(run_file: Callable[[Path], Any], tmp_path: Path) -> None:
    export_onnx(make_net(), tmp_path / "net.onnx", SHAPE)
    model = onnx.load(tmp_path / "net.onnx")
    model.graph.output.append(onnx.helper.make_tensor_value_info("again", onnx.TensorProto.FLOAT, None))
    model.graph.node.append(onnx.helper.make_node("Identity", ["logits"], ["again"]))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="1 inputs and 2 outputs"):
        run_file(tmp_path / "net.onnx")


@OPENVINO
def test_signals_are_handled_after_engines_of_openvino_are_gone(tmp_path: Path) -> None:
    """In a process of its own: it would be a segmentation fault."""
    export_onnx(make_net(), tmp_path / "net.onnx", SHAPE)
    code = """
import gc, os, pathlib, signal, sys
from project.deployment.engines import openvino_engine
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
first, second = (openvino_engine(pathlib.Path(sys.argv[1])) for _ in range(2))
del first; gc.collect()
del second; gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "net.onnx")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
