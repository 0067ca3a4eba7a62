"""The Trainer from Python: its run folder, its loggers and callbacks, several processes, and what it imports."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from project.callbacks import BestAndLast, StopOnNaN, TestReport, WriteSummary
from project.data import Digits
from project.frame.verbs import Trainer
from project.learning.checkpoints import check_checkpoint
from project.models import Classifier, SmallInception

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "max_epochs": 1,
    "limit_train_batches": 2,
    "observe": False,
}


def classifier() -> Classifier:
    return Classifier(SmallInception(10, (1, 8, 8), width=0.25), 10, (1, 8, 8))


def test_a_callback_of_a_defaults_class_takes_its_place():
    own = [StopOnNaN(every_n_steps=7), ModelCheckpoint(monitor="val/loss")]
    trainer = Trainer(callbacks=own, **{**QUIET, "observe": True})
    assert [c for c in trainer.callbacks if isinstance(c, StopOnNaN)] == own[:1]
    assert isinstance(trainer.callbacks[-1], BestAndLast)  # it follows the user's own, so it comes after it
    own = [BestAndLast(monitor="val/loss"), ModelCheckpoint(monitor="val/accuracy")]
    assert Trainer(callbacks=own, **QUIET).checkpoint_callbacks == own[::-1]
    assert sum(isinstance(c, TestReport) for c in trainer.callbacks) == 1
    assert sum(isinstance(c, WriteSummary) for c in Trainer(**QUIET).callbacks) == 1


def test_two_fits_two_folders_and_ones_own_logger(logs, tmp_path):
    for _ in range(2):
        own = CSVLogger(str(tmp_path / "own"))
        trainer = Trainer(experiment="e", logger=own, test_after_fit=False, **QUIET)
        trainer.fit(classifier(), datamodule=Digits(batch_size=64))
    assert sorted(folder.name for folder in (logs / "e").iterdir()) == ["version_0", "version_1"]
    assert (logs / "e/version_1/metrics.csv").is_file() and list((tmp_path / "own").rglob("metrics.csv"))


def test_without_validation_images_the_last_epoch_is_kept_and_tested(logs):
    trainer = Trainer(experiment="all", **QUIET)
    trainer.fit(classifier(), datamodule=Digits(batch_size=64, val_fraction=0))
    assert trainer.run is not None and trainer.run.last_checkpoint.is_file()
    assert "test/accuracy" in json.loads(trainer.run.summary.read_text())


def test_fast_dev_run_writes_nothing(logs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False).fit(
        classifier(), datamodule=Digits(batch_size=64)
    )
    assert not logs.exists()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_run_resumed_before_its_first_checkpoint_logs_nothing_twice(logs):
    def fit(**options):
        trainer = Trainer(experiment="e", test_after_fit=False, num_sanity_val_steps=0, **QUIET)
        trainer.fit(classifier(), datamodule=Digits(batch_size=64), **options)
        trainer.run.config.touch()  # what the command line writes, and a resume looks for
        with trainer.run.metrics.open() as file:
            return trainer.run, [row["step"] for row in csv.DictReader(file)]

    run, steps = fit()
    shutil.rmtree(run.checkpoints)
    assert steps and fit(resume=str(run.folder)) == (run, steps)


def test_predictions_after_a_fit_lie_in_the_runs_folder(logs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, data = classifier(), Digits(batch_size=64)
    trainer = Trainer(experiment="e", test_after_fit=False, **QUIET)
    trainer.fit(model, datamodule=data)
    trainer.predict(model, datamodule=data)
    assert trainer.run is not None and trainer.run.predictions.is_file() and not Path("predictions.csv").exists()


def test_check_checkpoint(tmp_path):
    assert check_checkpoint(None) is None
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for path, message in ((tmp_path / "no.ckpt", "no such file"), (tmp_path / "empty.ckpt", "not a checkpoint")):
        with pytest.raises(ValueError, match=message):
            check_checkpoint(path)


def test_fast_dev_run_with_a_checkpoint_of_its_own_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(callbacks=[BestAndLast()], fast_dev_run=True, **QUIET)
    trainer.fit(classifier(), datamodule=Digits(batch_size=64, seed=0))
    assert trainer.global_step == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_share_one_run_folder(logs):
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]
    command = [sys.executable, "-m", "project", "fit", "--config", str(ROOT / "configs/digits.yaml"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [folder.name for folder in (logs / "digits").iterdir()] == ["version_0"]
    summary = json.loads((logs / "digits/version_0/summary.json").read_text())
    assert 0 < summary["test/accuracy"] <= 1
    assert done.stdout.count("test accuracy") == 1


@pytest.mark.slow
def test_the_command_line_imports_late_what_a_verb_does_not_need():
    heavy = "('sklearn', 'onnx', 'tensorboard', 'torch.utils.tensorboard', 'PIL.Image')"

    def loaded(module: str) -> str:
        code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert loaded("project.frame.cli") == loaded("lightning.pytorch.cli")


def test_precision_auto_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def precision_with(avx512_bf16: bool) -> str:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        return str(Trainer(precision="auto", accelerator="cpu", observe=False).precision)

    assert precision_with(True) == "bf16-mixed"
    assert precision_with(False) == "32-true"
