"""Half of the units of nets of torchvision and timm: the law, reload, a training step, a second round, all files."""

from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import torch
import units_of_nets
from any_net_cells import Cell
from helpers.nets import choose
from units_files import CHECKS, SameDropout
from units_of_nets import Row

from project.compression import to_plain
from project.compression.thinning.units import plan_thinning, units_of
from project.deployment.export import export
from project.deployment.metadata import Metadata
from project.deployment.recipe import Recipe

LEFT = {
    "shufflenet_v2_x1_0": 0.44,
    "ghostnet_050": 0.32,
    "res2net50_26w_4s": 0.27,
    "coat_lite_tiny": 0.36,
    "convnextv2_atto": 0.29,
    "beit_base_patch16_224": 0.27,
}
"""The largest share of the multiply-accumulates that may be left. docs/unit_removal.md has 60 nets."""

FILES: dict[str, dict[str, Any]] = {
    "torchvision.models.MobileNetV2": {"num_classes": 10, "width_mult": 0.5},
    "torchvision.models.VisionTransformer": {
        "image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64,
        "num_classes": 10,
    },
    "timm.models.convnext.ConvNeXt": {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48], "num_classes": 10},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT)
def test_half_of_the_units_of_a_common_net(name: str) -> None:
    pytest.importorskip("timm")
    fast = torch.backends.mha.get_fastpath_enabled()
    units_of_nets.begin_process()
    row = units_of_nets.look(name, peer=False)
    torch.backends.mha.set_fastpath_enabled(fast)
    assert not row.failure
    assert {cell.name: (cell.status, cell.text) for cell in row.checks if cell.status != "works"} == {}
    assert [cell.name for cell in row.checks] == list(CHECKS)
    assert row.macs <= LEFT[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_thinned_nets_go_into_all_files(name: str, tmp_path: Path) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    recipe = Recipe({"class_path": name, "init_args": FILES[name]})
    net = locate(name)(**FILES[name]).eval()  # type: ignore[operator]
    plan = plan_thinning(net, choose(units_of(net, (3, 32, 32)), 0.5), (3, 32, 32))
    plan.apply_(net)
    metadata = Metadata(tuple("abcdefghij"), (3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    images = torch.randn(32, 3, 32, 32)
    exported = export(net, tmp_path / "net.onnx", metadata, images)
    assert exported.difference <= 1e-4
    int8 = export(net, tmp_path / "int8.onnx", metadata, images, format="onnx-int8", calibration=images, tolerance=0.5,
                  fp32=exported.path)  # fmt: skip
    assert len(int8.layers) > 5
    thinned = Recipe(recipe.net, [to_plain(plan)])
    assert export(net, tmp_path / "net.packed", metadata, images, format="packed", recipe=thinned).difference <= 1e-5


def test_a_row_tells_what_fails_and_what_is_refused() -> None:
    cells = [Cell("same", "works", "2e-7"), Cell("onnx", "failed", "no"), Cell("int8", "refused", "fc is | odd")]
    row = Row("net", 0.5, 0.25, "0.6 (0.3)", [*cells, Cell("packed", "works", "8 bytes")], {"conv": "it is odd"})
    assert row.line() == (
        "| net | 0.50 (0.25) | 0.6 (0.3) | 2e-7 | **not ONNX**, int8 refused: fc is / odd, packed | conv: it is odd |"
    )
    assert "ONNX failed: no (0 s)" in row.log()
    assert "| **1e-3 of the largest** |" in Row("net", checks=[Cell("same", "failed", "1e-3 of the largest")]).line()


def test_a_row_that_is_kept_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, made = Row("net", checks=[Cell("same", "works", "2e-7", 1.5, 100.0)], stays={"conv": "it is odd"}), []
    monkeypatch.setattr(units_of_nets, "look", lambda name: made.append(name) or row)
    for _ in range(2):
        assert units_of_nets.kept_row("net", tmp_path / "rows") == row
    assert made == ["net"]
    units_of_nets.kept_row("net", None)
    assert made == ["net", "net"]


def test_dropout_draws_one_number_for_each_image() -> None:
    dropout = torch.nn.Dropout(0.5)
    with SameDropout():
        dropped, kept = dropout(torch.ones(64, 3, 5)), dropout.eval()(torch.ones(64, 3, 5))
    assert (dropped == dropped[:, :1, :1]).all() and set(dropped.unique().tolist()) == {0, 2} and (kept == 1).all()


def test_the_page_is_of_the_script() -> None:
    """It has a row for each net, and no check has failed."""
    page = Path(units_of_nets.PAGE)
    if not page.is_file():
        pytest.skip("this fork has left out the room, and the page with it")
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [*units_of_nets.TORCHVISION, *units_of_nets.TIMM]
    assert not [row for row in rows if "**" in row or "fails: " in row]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["resnet19"], "nets has resnet19, which is none of: resnet18,"), (["--workers", "0"], "--workers is 0: give 1")],
)
def test_a_mistake_is_answered_in_a_sentence(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["units_of_nets.py", *words])
    with pytest.raises(SystemExit):
        units_of_nets.main()
    assert sentence in capsys.readouterr().err
