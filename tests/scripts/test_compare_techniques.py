"""``scripts/compare_techniques.py`` on digits, in miniature: every technique has a row, and nothing is run twice."""

import csv
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, command: Any) -> ModuleType:
    """The script, whose commands run in this process."""
    spec = importlib.util.spec_from_file_location("compare_techniques", ROOT / "scripts/compare_techniques.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run_verb(*arguments: Any) -> None:
        status, _, errors = command(*arguments)
        assert status == 0, errors

    monkeypatch.setattr(module, "run_verb", run_verb)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return module


@pytest.mark.slow
def test_every_technique_has_a_row(
    script: ModuleType, tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    config["trainer"] |= {"max_epochs": 8, "limit_train_batches": 3, "accelerator": "cpu"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--seeds", "1", "--rounds", "2", "--finetune_epochs", "1"]
    monkeypatch.setattr("sys.argv", ["compare", *arguments, "--output", str(tmp_path)])
    script.main()
    with (tmp_path / "techniques.csv").open(newline="") as file:
        rows = {row["technique"]: row for row in csv.DictReader(file)}
    known = {n: t for n, t in script.TECHNIQUES.items() if (ROOT / f"configs/compression/{t.fragment}.yaml").is_file()}
    assert list(rows) == ["dense", *known]
    dense = rows["dense"]
    for name in ("weights pruned", "weights shared", "ternary", "binary", "XNOR"):
        assert rows[name]["macs"] == dense["macs"]
        assert int(rows[name]["packed_bytes"]) < 0.4 * int(dense["packed_bytes"]), name
    for name in ("units pruned", "low rank"):
        assert int(rows[name]["macs"]) < 0.6 * int(dense["macs"])
        assert int(rows[name]["onnx_bytes"]) < int(dense["onnx_bytes"]), name
    assert int(rows["weights pruned"]["num_nonzero"]) < 0.2 * int(dense["num_nonzero"])
    assert not rows["int8"]["packed_bytes"] and int(rows["int8"]["onnx_bytes"]) < 0.5 * int(dense["onnx_bytes"])
    assert float(dense["speedup_batch64"]) == 1 and all(float(row["latency_ms_batch1"]) > 0 for row in rows.values())
    text = (tmp_path / "techniques.md").read_text()
    assert all(f"| {name} |" in text for name in rows) and "--seeds 1" in text
    assert (tmp_path / "techniques_bytes.png").stat().st_size and (tmp_path / "techniques_latency.png").stat().st_size

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"{arguments} is run again")

    monkeypatch.setattr(script, "run_verb", refuse)
    monkeypatch.setattr("sys.argv", ["compare", *arguments, "--output", str(tmp_path)])
    (tmp_path / "techniques.csv").unlink()
    script.main()
    with (tmp_path / "techniques.csv").open(newline="") as file:
        assert {row["technique"]: row for row in csv.DictReader(file)} == rows


def test_what_does_not_fit_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["compare", "--seeds", "0", "1", "--dense", "logs/fashion_mnist/version_0"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--dense names 1 runs, --seeds 2: give one for each" in capsys.readouterr().err
