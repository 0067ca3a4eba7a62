"""Only one process at a time trains a run."""

import errno
import fcntl
import os
import platform
import subprocess
import sys
import time

import pytest
from lightning.pytorch import Callback

from project.frame import lock
from project.frame.errors import sentence
from project.frame.verbs import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
HOLD = """
import os, sys, time
from pathlib import Path
from project.frame.lock import held
with held(Path(sys.argv[1])):
    worker = os.fork()  # as a loader's worker, which ends some time after its process was killed
    if worker:
        sys.stdout.write(f"{os.getpid()}\\n"); sys.stdout.flush()
        time.sleep(60)
    time.sleep(float(sys.argv[2]))
    os._exit(0)
"""


@pytest.fixture
def holder(tmp_path):
    """``holder(folder, seconds)``: a process that holds a folder's lock, as its worker does for that time."""
    started = []

    def start(folder, seconds=0.0):
        command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert int(started[-1].stdout.readline()) == started[-1].pid
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


OPTIONS = {"accelerator": "cpu", "enable_progress_bar": False, "observe": False, "logger": False}


def test_a_second_process_is_refused_and_learns_who_holds_the_run(tiny, logs, holder, monkeypatch):
    def fit(epochs, resume=None):
        trainer = Trainer(logs_dir=str(logs), max_epochs=epochs, test_after_fit=False, **OPTIONS)
        trainer.fit(tiny.classifier(), datamodule=tiny.data(), resume=resume and str(resume))
        return trainer.run

    run = fit(1)
    run.config.touch()
    process = holder(run.folder)
    monkeypatch.setattr(lock, "PATIENCE_S", 0.2)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(ValueError, match=f"process {process.pid} on {platform.node()}: .* start a new run") as refused:
        fit(2, run.folder)
    assert sentence(refused.value) == str(refused.value)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    process.kill()
    process.wait()
    fit(2, run.folder)
    fit(3, run.folder)
    assert (run.folder / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"


def test_the_lock_of_a_killed_process_is_free_when_its_workers_have_ended(tmp_path, holder):
    process = holder(tmp_path, seconds=1.0)
    process.kill()
    process.wait()
    began = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - began < 5
    with lock.held(tmp_path):
        pass


def test_a_new_run_is_locked_until_its_test_has_ended(tiny, logs, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 0)
    tried = []

    class Second(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            with pytest.raises(ValueError, match=f"trained by process {os.getpid()} "), lock.held(trainer.run.folder):
                pass
            tried.append("fit")

        def on_test_start(self, trainer, pl_module):
            with pytest.raises(ValueError, match="is being trained"), lock.held(trainer.run.folder):
                pass
            tried.append("test")

    trainer = Trainer(logs_dir=str(logs), callbacks=[Second()], max_epochs=1, **OPTIONS)
    trainer.fit(tiny.classifier(), datamodule=tiny.data())
    assert tried == ["fit", "test"]
    with lock.held(trainer.run.folder):
        pass


def test_where_files_cannot_be_locked_the_fit_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.held(tmp_path):
        pass
    assert "cannot be locked" in caplog.text and "No locks available" in caplog.text
