"""Checkpoints and metrics stay whole on a full disk and after a kill; a damaged checkpoint is set aside."""

import csv
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from project.callbacks import BestAndLast
from project.data import Digits
from project.frame.errors import sentence
from project.frame.logger import MetricsCSV
from project.frame.paths import Run, write_whole
from project.frame.verbs import Trainer
from project.learning.checkpoints import WholeFiles
from project.models import Classifier, LeNet300100

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def fit(logs: Path, epochs: int, callbacks: list[Any] | None = None, **options: object) -> Run:
    """A fit of a small net; a run that is continued needs no configuration here."""
    seed_everything(0, verbose=False)
    if callbacks is None:  # the first epoch stays the best
        callbacks = [BestAndLast(monitor="val/loss")]
        callbacks[0].mode = "max"
    names = {"logger", "accumulate_grad_batches", "val_check_interval", "plugins"}
    trainer = Trainer(
        accelerator="cpu",
        experiment="run",
        logs_dir=str(logs),
        callbacks=callbacks,
        enable_progress_bar=False,
        observe=False,
        max_epochs=epochs,
        limit_train_batches=4,
        test_after_fit=False,
        log_every_n_steps=1,
        **{"logger": False, **{name: options.pop(name) for name in names & options.keys()}},  # type: ignore[arg-type]
    )
    trainer.fit(Classifier(LeNet300100(10, (1, 8, 8)), 10, (1, 8, 8)), datamodule=Digits(batch_size=64), **options)
    assert trainer.run is not None
    trainer.run.config.touch()
    return trainer.run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return torch.load(run.last_checkpoint, weights_only=True)["state_dict"]


def same(first: Run, second: Run) -> bool:
    return all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def rows(run: Run) -> list[dict[str, str]]:
    return list(csv.DictReader(run.metrics.read_text().splitlines()))


# -- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("a small file system needs root, who may mount one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int) -> Path:
    """A file that leaves so many bytes of the file system free."""
    file = folder / "filler"
    free = shutil.disk_usage(folder).free
    file.write_bytes(bytes(free - left))
    return file


def test_on_a_full_disk_the_older_checkpoint_stays_and_the_run_goes_on(small_disk, finished):
    run = fit(small_disk, 2)
    before = {path.name: path.read_bytes() for path in run.checkpoints.iterdir()}
    filler = fill(small_disk, left=300_000)
    with pytest.raises(OSError, match="No space left") as full:
        fit(small_disk, 3, resume=str(run.folder))
    text = str(sentence(full.value))
    assert "the disk is full" in text and str(run.last_checkpoint) in text and "--resume" in text
    assert {path.name: path.read_bytes() for path in run.checkpoints.iterdir()} == before
    filler.unlink()
    fit(small_disk, 3, resume=str(run.folder))
    assert same(run, finished[1]) and rows(run) == rows(finished[1])


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    flush, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("flush") or flush(handle))
    monkeypatch.setattr(Path, "replace", lambda *args: done.append("rename") or rename(*args))
    write_whole(tmp_path / "file", lambda part: part.write_text("new"))
    assert done == ["flush", "rename", "flush"] and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("write", ["text", "torch"])
def test_what_does_not_fit_leaves_the_older_file(write, small_disk):
    path = small_disk / "file.pt"
    path.write_text("old")
    fill(small_disk, left=100_000)
    writers = {
        "text": lambda part: part.write_text("new" * 100_000),
        "torch": lambda part: torch.save(torch.zeros(100_000), part),  # raises a RuntimeError
    }
    with pytest.raises(OSError, match=r"No space left on device.*file\.pt"):
        write_whole(path, writers[write])
    assert path.read_text() == "old" and len(list(small_disk.iterdir())) == 2


def test_checkpoints_never_lie_in_the_folder_for_temporary_files(logs, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(logs / "missing"))
    run = fit(logs, 1)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_plugin_of_ones_own_still_writes_the_checkpoints():
    class Own(TorchCheckpointIO):
        pass

    def writer(*plugins):
        return Trainer(accelerator="cpu", plugins=list(plugins), enable_progress_bar=False).strategy.checkpoint_io

    assert type(writer()) is WholeFiles
    assert type(writer(own := Own())) is Own and writer(own) is own
    assert type(writer(wrapper := AsyncCheckpointIO())) is AsyncCheckpointIO
    assert type(wrapper.checkpoint_io) is WholeFiles


# -- damaged checkpoints ----------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4  # a bit of a weight
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Run, Run]:
    """A run of two epochs, with a checkpoint at the end of each, and one of three epochs."""
    logs = tmp_path_factory.mktemp("finished")
    return fit(logs, 2), fit(logs, 3)


@pytest.mark.parametrize("damage", [cut, zero, flip, Path.unlink])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(damage, finished, logs, caplog):
    run, whole = Run(logs / "version_0"), finished[1]
    shutil.copytree(finished[0].folder, run.folder)
    (run.checkpoints / f".1.{run.last_checkpoint.name}").touch()  # a killed process has left it
    damage(run.last_checkpoint)
    fit(logs, 3, resume=str(run.folder))
    assert same(run, whole)
    aside = run.checkpoints / "last.ckpt.damaged"
    names = {"best.ckpt", "last.ckpt", *([aside.name] if damage is not Path.unlink else [])}
    assert {path.name for path in run.checkpoints.iterdir()} == names
    assert ("is damaged and was renamed to last.ckpt.damaged" in caplog.text) == aside.exists()
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(whole)]


def test_without_a_whole_checkpoint_the_run_begins_again(finished, logs, caplog):
    run = Run(logs / "version_0")
    shutil.copytree(finished[0].folder, run.folder)
    cut(run.last_checkpoint)
    zero(run.best_checkpoint)
    fit(logs, 3, resume=str(run.folder))
    assert same(run, finished[1]) and rows(run) == rows(finished[1])


def test_what_ends_a_compression_is_not_what_a_run_goes_on_with(finished, logs):
    """Its optimizer is new, and it has no place in the training."""
    run = Run(logs / "version_0")
    shutil.copytree(finished[0].folder, run.folder)
    checkpoint = torch.load(run.best_checkpoint, weights_only=True)
    del checkpoint["loops"]
    torch.save(checkpoint | {"global_step": 100}, run.level_checkpoint(1))
    cut(run.last_checkpoint)
    fit(logs, 3, resume=str(run.folder))
    assert same(run, finished[1])


# -- metrics ----------------------------------------------------------------------------------------------------------

Killed = type("Killed", (BaseException,), {})


@pytest.mark.parametrize(
    ("after", "number"), [(MetricsCSV.log_metrics, 1), (MetricsCSV.log_metrics, 3), (WholeFiles.save_checkpoint, 4)]
)
def test_each_step_stands_once_however_the_run_was_killed(after, number, finished, logs, monkeypatch):
    """After the row of a validation, and between the last checkpoint of an epoch and the next one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    calls = []

    def killed(*args, **kwargs):
        after(*args, **kwargs)
        calls.append(1)
        if len(calls) == number:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(WholeFiles if after is WholeFiles.save_checkpoint else MetricsCSV, after.__name__, killed)
        fit(logs, 3, logger=True)
    run = Run(logs / "run/version_0")
    run.config.touch()
    time.sleep(1)  # TensorBoard orders the files by the second in which they begin; a new process begins later
    fit(logs, 3, logger=True, resume=str(run.folder))
    assert same(run, finished[1])
    assert Counter(map(str, rows(run))) == Counter(map(str, rows(finished[1])))
    events = EventAccumulator(str(run.folder))
    events.Reload()
    for name in ("val/loss", "train/loss"):
        steps = [event.step for event in events.Scalars(name)]
        assert steps == sorted({*steps}) and {3, 7} <= {*steps} <= {3, 7, 11}, name  # a kill may lose the newest


def test_a_row_that_a_full_disk_has_cut_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCSV(path).log_metrics({"val/loss": 0.5}, 7)
    MetricsCSV(path).log_metrics({"val/loss": 0.25}, 15)
    path.write_bytes(path.read_bytes()[:-7])  # 15 has become 1
    again = MetricsCSV(path)
    assert again.rows == [{"step": "7", "val/loss": "0.5"}]
    again.log_metrics({"val/loss": 0.125}, 23)
    assert path.read_text().split() == ["step,val/loss", "7,0.5", "23,0.125"]


def test_the_last_batch_of_an_epoch_has_no_checkpoint_of_its_own(logs):
    """A user's callback saves after each second step, also after the last one of an epoch. There is a best one too."""
    run = fit(logs, 2, [ModelCheckpoint(every_n_train_steps=2, save_last=True)])
    assert run.best_checkpoint.is_file()
    progress = torch.load(run.last_checkpoint, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]
    assert progress["current"]["processed"] == 2
