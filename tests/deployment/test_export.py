import random
import re
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from project.data import Digits
from project.deployment.export import export_onnx
from project.deployment.latency import Latency
from project.deployment.onnx_file import PlainAttention, onnx_engine
from project.models import Classifier, SmallInception

SHAPE = (1, 8, 8)


class Depthwise(nn.Module):
    """Depthwise convolution with batch norm before it, group norm, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(1), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(4, 8)
        )
        self.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(8 * 4 * 4, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images).flatten(1))


@pytest.fixture(scope="module")
def images() -> Tensor:
    pixels, _ = Digits().load(train=False)
    return (pixels.float() / 255 - Digits.mean[0]) / Digits.std[0]


def make(cls: type[nn.Module], images: Tensor) -> nn.Module:
    """A net with running statistics of real images, channels-last, with modules in different modes."""
    torch.manual_seed(0)
    net = SmallInception(10, SHAPE, stem=(16,), stages=((64,),)) if cls is SmallInception else cls()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        for batch in images.split(120):
            net(batch)
    net.to(memory_format=torch.channels_last)
    next(net.children()).eval()
    return net


@pytest.fixture(scope="module", params=[SmallInception, Depthwise])
def exported(
    request: pytest.FixtureRequest, images: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Path]:
    net = make(request.param, images)
    path = tmp_path_factory.mktemp("onnx") / "made" / "net.onnx"
    export_onnx(net, path, SHAPE, metadata={"classes": "0,1,2,3,4,5,6,7,8,9", "task": "Ziffern größer 0"})
    return net, path


def test_file_computes_what_the_net_computes(exported: tuple[nn.Module, Path], images: Tensor) -> None:
    net, path = exported
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    modes = [module.training for module in net.modules()]
    for batch in (1, 3, 64):
        with torch.no_grad():
            expected = net.eval()(images[-batch:])
        (logits,) = session.run(["logits"], {"images": images[-batch:].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.1
    for module, training in zip(net.modules(), modes, strict=True):
        module.training = training


def test_file_is_valid_and_stands_alone(exported: tuple[nn.Module, Path]) -> None:
    _, path = exported
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    (batch, *shape) = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param and [side.dim_value for side in shape] == list(SHAPE)
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "classes": "0,1,2,3,4,5,6,7,8,9",
        "task": "Ziffern größer 0",
    }


def test_file_holds_weights_and_little_else(exported: tuple[nn.Module, Path]) -> None:
    net, path = exported
    model = onnx.load(path)
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    assert weights <= 4 * num_parameters + 200  # batch norm is folded, but for the one that comes before a convolution
    assert path.stat().st_size - weights < 220 * len(model.graph.node) + 500
    assert b"project.models" not in path.read_bytes() and b".py" not in path.read_bytes()


def test_batch_norm_is_folded_into_the_convolution_before_it(exported: tuple[nn.Module, Path]) -> None:
    net, path = exported
    operations = [node.op_type for node in onnx.load(path).graph.node]
    assert operations.count("Conv") == sum(isinstance(module, nn.Conv2d) for module in net.modules())
    assert operations.count("BatchNormalization") == (0 if isinstance(net, SmallInception) else 1)
    assert "Dropout" not in operations


def test_net_is_left_as_it_was_and_nothing_is_said(
    images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = make(Depthwise, images)
    net.fc[1].weight.requires_grad_(False)

    def state() -> list[object]:
        tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        return [
            [(name, id(tensor), tensor.stride(), tensor.requires_grad) for name, tensor in tensors.items()],
            [(module.training, len(module._forward_hooks)) for module in net.modules()],
            [torch.get_rng_state().tolist(), random.getstate()],
        ]

    before, values = state(), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    export_onnx(net, tmp_path / "net.onnx", SHAPE)
    assert state() == before
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, values[name]), name
    assert capfd.readouterr() == ("", "")


def test_other_types_are_written_as_fp32(images: Tensor, tmp_path: Path) -> None:
    class Linear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.flatten(1))

    export_onnx(Linear(64, 10, dtype=torch.bfloat16), tmp_path / "net.onnx", SHAPE)
    model = onnx.load(tmp_path / "net.onnx")
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {
        onnx.TensorProto.FLOAT
    }


def test_a_failed_export_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_text("old")
    with pytest.raises(ValueError, match="takes"):
        export_onnx(SmallInception(10, SHAPE), tmp_path / "net.onnx", (3, 8, 8))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("net.onnx", "old")]


def test_int8_exports_the_net_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The int8 file and the comparison of its speed begin with one fp32 file."""
    from project.deployment import export, onnx_file

    module = Classifier(make(Depthwise, torch.zeros(2, *SHAPE)), 10, SHAPE)
    calls: list[nn.Module] = []
    to_onnx = onnx_file.to_onnx
    for place in (export, onnx_file):
        monkeypatch.setattr(place, "to_onnx", lambda net, shape: calls.append(net) or to_onnx(net, shape))
    monkeypatch.setattr(export, "load_net", lambda module, path: module.net)
    times = {("int8", 64): Latency(1, 1, 1, 1, 1), ("fp32", 64): Latency(2, 2, 2, 1, 1)}
    monkeypatch.setattr(export, "measure", lambda *args, **options: times)
    target = tmp_path / "model_int8.onnx"
    options = {"format": "onnx-int8", "num_images": 4, "tolerance": 10.0}
    export.export_checkpoint(module, Digits(), tmp_path / "best.ckpt", target, **options)  # type: ignore[arg-type]
    assert len(calls) == 1 and target.is_file()


class WindowAttention(nn.Module):
    """Attention within four groups of rows: its queries have five dimensions, which torch's exporter cannot write."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Conv2d(1, 12, 1), nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        windows = self.qkv(images).flatten(2).unflatten(2, (4, 16)).unflatten(1, (3, 2, 2))  # [N, 3, 2, 2, 4, 16]
        query, key, value = windows.permute(1, 0, 4, 2, 5, 3).unbind(0)  # [N, 4 windows, 2 heads, 16 pixels, 2]
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.fc(attended.transpose(2, 3).flatten(3).mean((1, 2)))


@pytest.mark.slow
def test_attention_with_five_dimensions_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, images = WindowAttention().eval(), torch.randn(3, 1, 8, 8)
    export_onnx(net, tmp_path / "net.onnx", (1, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(onnx_engine(tmp_path / "net.onnx")(images), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": torch.randn(4, 5, 6)},
        {"attn_mask": torch.randn(5, 6) > -1},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
)
def test_plain_attention_is_torchs(options: dict[str, Any]) -> None:
    heads = 2 if options.get("enable_gqa") else 4
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, heads, 6, 8), torch.randn(2, heads, 6, 7)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, **options)
    with PlainAttention():
        found = nn.functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected)


class Counts(nn.Module):
    """Makes a number of the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.reshape(len(images), 64))


class Reads(Counts):
    """Goes another way for dark images."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if float(images.max()) > 0 else -images)


@pytest.mark.parametrize(
    ("net", "sentence"),
    [
        (Counts, "net is a Counts, which makes a number of the batch size, as len(images) does"),
        (Reads, "net is a Reads, which PyTorch's exporter cannot write as ONNX (Could not guard on data-dependent"),
    ],
)
def test_a_net_that_no_file_can_hold_is_refused_in_a_sentence(net: type, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}") as caught:
        export_onnx(net(), tmp_path / "net.onnx", SHAPE)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
