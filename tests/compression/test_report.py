import csv
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from project.compression import report
from project.compression.report_rows import ReportRow, describe, read_report, to_markdown, weight_sparsity, write_report
from project.deployment.latency import Latency

COLUMNS = (
    "step,val_accuracy,test_accuracy,num_parameters,num_nonzero,sparsity,macs,file,file_bytes,engine,"
    "latency_ms_batch1,latency_ms_batch64,speedup_batch1,speedup_batch64"
)
SPREADS = "latency_ms_batch1_p05,latency_ms_batch1_p95,latency_ms_batch64_p05,latency_ms_batch64_p95"
FULL = ReportRow(
    'prune, "0.9" | ü',
    *(0.1 + 0.2, 1 / 3, 186_026, 20_000, 0.9, 12_345_678, "net.onnx", 748_845, "onnxruntime"),
    *(1.2345678, 123.456789, 1.05, 1.25, 1.2, 1.31, 120.0, 130.04),
)


def latency(median_ms: float) -> Latency:
    return Latency(median_ms, 0.9 * median_ms, 1.2 * median_ms, 50, 1)


def make_net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        net[0].weight.view(-1)[:18] = 0  # of 36
        net[3].weight.view(-1)[:17] = 0  # of 32
        net[3].weight.view(-1)[17] = -0.0
    return net


def test_columns_are_the_prescribed_ones() -> None:
    assert ",".join(field.name for field in fields(ReportRow)) == f"{COLUMNS},{SPREADS}"


def test_rows_read_equal_rows_written(tmp_path: Path) -> None:
    rows = [ReportRow("dense"), FULL, replace(FULL, step="", val_accuracy=0.0, macs=0, file=None)]
    write_report(rows, tmp_path / "run")
    assert read_report(tmp_path / "run" / "report.csv") == rows
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["report.csv", "report.md"]
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8") == to_markdown(rows)


def test_unknown_values_are_empty(tmp_path: Path) -> None:
    write_report([ReportRow("dense")], tmp_path)
    header, row = csv.reader((tmp_path / "report.csv").read_text().splitlines())
    assert row == ["dense"] + [""] * (len(header) - 1)
    assert "None" not in (tmp_path / "report.md").read_text()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val/accuracy\n1,0.5\n")
    with pytest.raises(ValueError, match=r"metrics\.csv.*columns"):
        read_report(tmp_path / "metrics.csv")


def test_failed_write_keeps_the_old_report(tmp_path: Path) -> None:
    write_report([FULL], tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write_report([FULL, object()], tmp_path)  # type: ignore[list-item]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_sparsity_counts_zeros_of_kernels_and_matrices() -> None:
    net = make_net()
    assert weight_sparsity(net) == pytest.approx((18 + 18) / (36 + 32))
    assert weight_sparsity(nn.BatchNorm2d(4)) == 0.0  # its zero shifts are no pruned weights
    net.append(nn.Linear(2, 16, bias=False))
    net[4].weight = nn.Parameter(net[3].weight.detach().t())
    tied = nn.ModuleList([net[3], net[3]])
    assert weight_sparsity(tied) == pytest.approx(18 / 32)


def test_described_is_what_can_be_counted(tmp_path: Path) -> None:
    (tmp_path / "net.bin").write_bytes(b"x" * 321)
    row = describe("prune", make_net(), (1, 4, 4), file=tmp_path / "net.bin", val_accuracy=0.5, test_accuracy=0.25)
    num_parameters = 36 + 4 + 8 + 32 + 2
    assert row == ReportRow(
        "prune",
        val_accuracy=0.5,
        test_accuracy=0.25,
        num_parameters=num_parameters,
        num_nonzero=num_parameters - 36 - 4,  # zeroed weights, and batch norm's shift
        sparsity=36 / 68,
        macs=4 * 36 + 32,
        file="net.bin",
        file_bytes=321,
    )


def test_speedup_is_over_the_best_dense_engine() -> None:
    reference = {
        ("eager", 1): latency(3.0),
        ("compiled", 1): latency(1.5),
        ("eager", 64): latency(20.0),
        ("compiled", 64): latency(30.0),
    }
    latencies = {("onnxruntime", 1): latency(1.0), ("eager", 1): latency(4.0), ("onnxruntime", 64): latency(40.0)}
    row = describe("thin", make_net(), (1, 4, 4), latencies=latencies, reference=reference)
    assert (row.engine, row.latency_ms_batch1, row.latency_ms_batch64) == ("onnxruntime", 1.0, 40.0)
    assert (row.speedup_batch1, row.speedup_batch64) == (1.5, 0.5)
    assert (row.latency_ms_batch1_p05, row.latency_ms_batch1_p95) == pytest.approx((0.9, 1.2))
    assert (row.latency_ms_batch64_p05, row.latency_ms_batch64_p95) == pytest.approx((36, 48))

    dense = describe("dense", make_net(), (1, 4, 4), latencies=reference, reference=reference)
    assert (dense.engine, dense.speedup_batch1, dense.speedup_batch64) == ("compiled, eager", 1.0, 1.0)
    only_one = describe("thin", make_net(), (1, 4, 4), latencies={("eager", 1): latency(1.0)})
    assert (only_one.engine, only_one.latency_ms_batch64, only_one.speedup_batch1) == ("eager", None, None)


def test_table_shows_the_spread() -> None:
    head, rule, row, *_ = to_markdown([FULL]).splitlines()
    assert head.count("|") == rule.count("|") == row.replace("\\|", "").count("|") == len(COLUMNS.split(",")) + 1
    for cell in ("0.3000", "0.3333", "186,026", "748,845", "1.23 (1.20-1.31)", "123 (120-130)", "1.05x", "1.25x"):
        assert f"| {cell} |" in row
    assert "0.0123 (0.0110-0.0150)" in to_markdown(
        [ReportRow("a", latency_ms_batch1=0.0123, latency_ms_batch1_p05=0.011, latency_ms_batch1_p95=0.015)]
    )


@pytest.mark.parametrize("latency", [False, True])
def test_engines_are_built_for_latencies_alone(latency: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To build ONNX Runtime's engine takes an export, of a deep net ten seconds or more."""
    built: list[nn.Module] = []
    net, module = make_net(), SimpleNamespace(image_shape=(1, 4, 4))
    trainer = SimpleNamespace(datamodule=None)
    monkeypatch.setattr(report, "run_of", lambda trainer: SimpleNamespace(report=tmp_path / "report.csv"))
    monkeypatch.setattr(report, "load_net", lambda module, path: net)
    monkeypatch.setattr(report, "_accuracy", lambda *args: 0.5)
    monkeypatch.setattr(report, "engines", lambda net, *args: built.append(net) or {})
    monkeypatch.setattr(report, "_beside_dense", lambda *args: ({}, {}))
    monkeypatch.setattr(report, "_publish", lambda trainer, rows, new: None)
    monkeypatch.setattr(report, "read_report", lambda path: [])
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes(b"1")
    report.add_step_row(trainer, module, report.Step("shared", checkpoint), latency=latency)  # type: ignore[arg-type]
    assert bool(built) == latency


@pytest.mark.parametrize(
    ("sparsity", "speedups", "said"),
    [
        (0.9, (1.02, 0.98), "90% of the weights are zero, but the speed is 1.02x at batch 1 and 0.98x at batch 64"),
        (0.5, (2.0, 1.09), "but the speed is 1.09x at batch 64: dense kernels"),
        (0.5, (1.1, None), None),
        (0.49, (1.0, 1.0), None),
        (0.9, (None, None), None),
        (None, (1.0, 1.0), None),
    ],
)
def test_zeros_that_buy_no_time_are_named(
    sparsity: float | None, speedups: tuple[float | None, float | None], said: str | None
) -> None:
    row = ReportRow("prune", sparsity=sparsity, speedup_batch1=speedups[0], speedup_batch64=speedups[1])
    remarks = to_markdown([ReportRow("dense"), row]).splitlines()[4:]
    assert len(remarks) == (2 if said else 0)
    if said:
        assert said in remarks[1] and remarks[1].startswith("prune: ")
