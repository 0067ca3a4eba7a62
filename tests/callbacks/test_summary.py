import json
import time

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from project.callbacks import WriteSummary
from project.callbacks.clock import Clock
from project.frame.paths import write_whole


class Slow(Callback):
    """Takes its time in training batches and in validation."""

    def on_train_batch_end(self, *_):
        time.sleep(0.01)

    def on_validation_batch_end(self, *_):
        time.sleep(0.3)


def test_summary_holds_metrics_times_and_size_and_test_merges(tiny):
    trainer, model = tiny.trainer([WriteSummary(), Slow()]), tiny.classifier()
    trainer.fit(model, tiny.data())
    summary = json.loads(tiny.run.summary.read_text())
    assert summary["val/accuracy"] == trainer.callback_metrics["val/accuracy"].item()
    assert summary["num_epochs"] == 2 and summary["num_steps"] == 12
    assert summary["num_parameters"] == sum(p.numel() for p in model.net.parameters())
    assert 0.12 <= summary["train_seconds"] <= summary["fit_seconds"] - 0.6
    assert summary["images_per_second"] == pytest.approx(192 / summary["train_seconds"], rel=0.01)
    trainer.test(model, tiny.data(), verbose=False)
    merged = json.loads(tiny.run.summary.read_text())
    assert merged["test/accuracy"] == trainer.callback_metrics["test/accuracy"].item()
    assert {name: value for name, value in merged.items() if not name.startswith("test/")} == summary
    assert sorted(path.name for path in tiny.run.folder.iterdir()) == ["environment.json", "summary.json"]


def test_test_alone_writes_its_metrics(tiny):
    tiny.trainer([WriteSummary()]).test(tiny.classifier(), tiny.data(), verbose=False)
    assert all(name.startswith("test/") for name in json.loads(tiny.run.summary.read_text()))


def test_seconds_add_up_over_a_resume_and_test_of_an_old_checkpoint_keeps_them(tiny, tmp_path):
    def make(epochs):
        checkpoint = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}", save_top_k=-1)
        return tiny.trainer([WriteSummary(), Slow(), checkpoint], enable_checkpointing=True, max_epochs=epochs)

    make(2).fit(tiny.classifier(), tiny.data())
    first = json.loads(tiny.run.summary.read_text())
    old = tmp_path / "checkpoints" / "epoch=0.ckpt"
    trainer, model = make(4), tiny.classifier()
    trainer.fit(model, tiny.data(), ckpt_path=tmp_path / "checkpoints" / "epoch=1.ckpt")
    second = json.loads(tiny.run.summary.read_text())
    assert second["num_epochs"] == 4 and second["best_checkpoint"] == "epoch=3.ckpt"
    assert first["train_seconds"] + 0.12 <= second["train_seconds"]
    assert second["images_per_second"] == pytest.approx(384 / second["train_seconds"], rel=0.01)
    trainer.test(model, tiny.data(), ckpt_path=old, verbose=False)
    third = json.loads(tiny.run.summary.read_text())
    assert third["train_seconds"] == second["train_seconds"]


def test_clock_stands_still_while_paused_or_never_started():
    clock = Clock(5.0)
    clock.pause()
    clock.resume()
    time.sleep(0.01)
    assert clock.seconds == 5.0
    clock.start()
    time.sleep(0.01)
    clock.pause()
    seconds = clock.seconds
    time.sleep(0.02)
    assert clock.seconds == seconds >= 5.01
    clock.resume()
    time.sleep(0.01)
    clock.stop()
    assert seconds + 0.01 <= clock.seconds


def test_a_file_is_never_half_written(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def fail(part):
        part.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
