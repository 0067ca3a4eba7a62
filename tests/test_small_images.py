"""Fragments of ``configs/nets`` learn small images in a few epochs, where the net's own settings stay at chance."""

import json
import runpy
from pathlib import Path

import pytest

from project.frame.paths import Run
from project.frame.rooms import optional

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_mobilenet_v3_learns_colour_digits(command, logs, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["colour_digits.py", "--folder", str(tmp_path / "digits")])
    runpy.run_path(str(ROOT / "scripts/colour_digits.py"), run_name="__main__")
    assert len(list((tmp_path / "digits").glob("digit */*.png"))) == 1797
    accuracies = []
    for name, net in (("fragment", []), ("own", ["--model.net=torchvision.models.mobilenet_v3_small"])):
        fragments = ["--config", str(ROOT / "configs/nets/mobilenet_v3.yaml")] if name == "fragment" else net
        short = ["--trainer.max_epochs=5", f"--trainer.experiment={name}", "--trainer.enable_progress_bar=false"]
        data = ["--data.root", str(tmp_path / "digits")]
        status, out, err = command(
            "fit", "--config", str(ROOT / "configs/colour_digits.yaml"), *fragments, *data, *short
        )
        assert status == 0, err
        warns = name == "own" and optional("callbacks.observe") is not None
        assert ("momentum 0.01, and the run has" in out + err) == warns
        accuracies.append(json.loads(Run.find(logs / name).summary.read_text())["test/accuracy"])
    assert accuracies[0] > 0.6 and accuracies[1] < 0.3, accuracies
