"""The script that compares unit pruning with Torch-Pruning: a run, the verdicts, and the page."""

import math
from pathlib import Path

import compare_unit_pruners as script
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--nets", "inception", "--seeds", "0", "--net-shares", "0.5", "--images", "128", "--epochs", "1"]
TINY += ["--finetune", "1", "--gradient-images", "8", "--steps", "1", "--rounds", "1"]


class Noise:
    """Random images in the place of Fashion-MNIST."""

    def __init__(self, num_images: int, num_test: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.train, self.test = (
            (torch.randn(count, *script.SHAPE, generator=generator), torch.arange(count) % 10)
            for count in (num_images, 100)
        )


def small() -> nn.Module:
    """Two convolutions and a classifier."""
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Options, with a small net, noise, and a folder of logs of one's own."""
    monkeypatch.setattr(script, "Data", Noise)
    monkeypatch.setitem(script.NETS, "inception", ("small", small, script.sgd))
    monkeypatch.setenv("PROJECT_LOGS_DIR", str(tmp_path))
    return script.parser().parse_args(TINY)


def test_a_row_is_measured_once_and_its_latency_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "export_onnx", lambda net, path, shape: torch.save(net, path))
    monkeypatch.setattr(script, "onnx_engine", lambda path: torch.load(path, weights_only=False))
    tiny.arms, rows, times = ["taylor", "obd"], tmp_path / "rows.csv", tmp_path / "times.csv"
    script.measure(tiny, "inception", 0, rows)
    script.measure_latency(tiny, "inception", times)
    found, taken = script.rows_of(tiny, rows), script.times_of(tiny, times)
    assert [row.arm for row in found] == tiny.arms and all(0.3 < row.macs <= 0.5 for row in found)
    assert [(each.arm, each.batch) for each in taken] == [(arm, b) for arm in ("dense", *tiny.arms) for b in (1, 64)]
    assert taken[0].ratio == 1 and taken[0].deviation == 0
    monkeypatch.setattr(script, "train_", lambda *_: pytest.fail("it trains again"))
    monkeypatch.setattr(script.latency, "measure", lambda *_: pytest.fail("it measures again"))
    script.measure(tiny, "inception", 0, rows)
    script.measure_latency(tiny, "inception", times)
    assert script.rows_of(tiny, rows) == found and script.times_of(tiny, times) == taken


@pytest.mark.parametrize("arm", ["tp_magnitude", "tp_taylor"])
def test_torch_pruning_stops_at_the_budget(tiny, arm):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install torch-pruning")
    net = small().eval()
    thin = script.theirs(net, arm, 0.5, tiny, Noise(128, 100))
    left = script.count_macs(thin, script.SHAPE) / script.count_macs(net, script.SHAPE)
    assert 0.3 < left <= 0.5
    assert thin[0].out_channels % script.ROUND_TO == 0


def test_a_failure_of_the_peer_is_a_row(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "theirs", lambda *_: 1 / 0)
    monkeypatch.setattr(script, "export_onnx", lambda *_: None)
    tiny.arms = ["tp_taylor"]
    script.measure(tiny, "inception", 0, tmp_path / "rows.csv")
    (row,) = script.rows_of(tiny, tmp_path / "rows.csv")
    assert row.failure == "ZeroDivisionError: division by zero" and math.isnan(row.after)


def test_the_verdict_asks_for_more_than_one_standard_deviation():
    assert script.verdict([0.90, 0.92], [0.88, 0.90]) == "better"
    assert script.verdict([0.88, 0.90], [0.90, 0.92]) == "worse"
    assert script.verdict([0.90, 0.92], [0.90, 0.91]) == "within one standard deviation"
    assert script.verdict([0.9], []) == "alone" and script.verdict([], [0.9]) == "fails"


def made_up(name: str = "vit") -> list[script.Row]:
    """Two seeds: taylor 90 and 92 %, obd one point more, Torch-Pruning two less and a failure."""
    rows = []
    for seed, after in enumerate((0.90, 0.92)):
        key = ("setting", name, 0.5)
        rows += [
            script.Row(*key, arm, seed, 0.49, 0.4, 0.93, after + gain, 10.0)
            for arm, gain in (("taylor", 0.0), ("obd", 0.01), ("tp_magnitude", -0.02))
        ]
        rows.append(script.Row(*key, "tp_taylor", seed, math.nan, math.nan, 0.93, math.nan, 1.0, "ValueError: no"))
    return rows


def test_the_page_names_the_best_of_each_side():
    times = [script.Time("setting", "vit", share, arm, batch, 2.0 * ratio, ratio, 0.01 * share)
             for share, arm, ratio in ((0.0, "dense", 1.0), (0.5, "obd", 0.6)) for batch in (1, 64)]  # fmt: skip
    page = script.to_markdown(
        made_up(), times, script.parser().parse_args([]), "python scripts/compare_unit_pruners.py"
    )
    title = script.NETS["vit"][0]
    assert f"| {title} | 50 % | 92.00 ± 1.41 (obd) | 89.00 ± 1.41 (GroupMagnitudeImportance(p=2)) | better |" in page
    assert "| ours, `obd` | **92.00 ± 1.41** | 49.0 ± 0.0 % | 40.0 ± 0.0 % | 0.60 ± 0.01 | 0.60 ± 0.01 |" in page
    assert "| dense | 93.00 ± 0.00 | 100 % | 100 % | 2.00 ms | 2.00 ms |" in page
    assert "`GroupTaylorImportance()` | fails: ValueError: no |" in page
    assert "at 1 of 1 points" in " ".join(page.split())
    assert max(len(line) for line in page.splitlines() if "|" not in line) <= 120


def test_the_page_is_of_the_script():
    """The rows of the CSV file give the table of verdicts that the page has."""
    page = ROOT / "docs/unit_pruners.md"
    if not page.is_file():
        pytest.skip("the page is not made yet: python scripts/compare_unit_pruners.py --jobs 2")
    args = script.parser().parse_args([])
    rows, times = (read(args, page.with_name(name)) for read, name in (
        (script.rows_of, "unit_pruners.csv"), (script.times_of, "unit_pruners_latency.csv")))  # fmt: skip
    assert len(rows) == len(script.NETS) * len(script.ARMS) * len(args.net_shares) * len(args.seeds)
    tables = [[line for line in text.splitlines() if line.startswith("|")] for text in (
        page.read_text(), script.to_markdown(rows, times, args, ""))]  # fmt: skip
    assert tables[0] == tables[1]
