"""Runs that are killed at random moments and resumed end with the same bits; and a difference is seen."""

import json
from pathlib import Path

import pytest
import torch
from kill_and_resume import compare, main


def run(folder: Path, *, seconds: float = 1.0, steps: tuple[int, ...] = (1, 2), value: float = 0.0) -> Path:
    """A run's folder with one file of each kind."""
    (folder / "checkpoints").mkdir(parents=True)
    weights = torch.arange(3.0) + value
    content = {"state_dict": {"weight": weights}, "callbacks": {"Summary": {"fit_seconds": seconds}}}
    torch.save(content, folder / "checkpoints/last.ckpt")
    (folder / "metrics.csv").write_text("step\n" + "".join(f"{step}\n" for step in steps))
    (folder / "report.csv").write_text(f"step,latency_ms_batch1\ndense,{seconds}\n")
    (folder / "summary.json").write_text(json.dumps({"train_seconds": seconds, "test/accuracy": 0.5}))
    (folder / "model.packed").write_bytes(b"net" + bytes([int(value)]))
    return folder


def test_only_times_may_differ(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    assert compare(run(tmp_path / "slow", seconds=9.0), whole) == "same"
    found = compare(run(tmp_path / "twice", steps=(1, 1, 2)), whole)
    assert found.startswith("metrics.csv: it has 3 rows, not 2")
    found = compare(run(tmp_path / "other", value=1.0), whole)
    assert "checkpoints/last.ckpt: state_dict.weight has other values" in found and "model.packed" in found
    lacks = run(tmp_path / "lacks")
    (lacks / "model.packed").unlink()
    assert compare(lacks, whole) == "model.packed is missing"


def test_a_weight_that_is_zero_with_another_sign_differs(tmp_path: Path) -> None:
    runs = [run(tmp_path / name) for name in ("whole", "other")]
    for folder, zero in zip(runs, (0.0, -0.0), strict=True):
        torch.save({"state_dict": {"weight": torch.tensor([zero])}}, folder / "checkpoints/last.ckpt")
    assert "has other values" in compare(*runs)


@pytest.mark.slow
def test_twelve_kills(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--kills", "12"]) == 0, capfd.readouterr().out
    assert "12 kills" in capfd.readouterr().out
