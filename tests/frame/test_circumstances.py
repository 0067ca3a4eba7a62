"""Hostile circumstances: killed processes, folders that cannot be written, full disks, few file handles.

Each ends in one sentence and status 2, or goes on, and loses nothing that was there.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.slow import fast
from PIL import Image

from project.frame.paths import Run

OWN = """
import os
import signal
import subprocess

from lightning.pytorch import Callback
from project.data import Digits
from torch.utils.data import get_worker_info


class Dies(Digits):
    '''Its loader's process is killed at the batch with the number DIES_AT.'''

    def load_dataset(self, train):
        data = super().load_dataset(train)

        class Dying(type(data)):
            calls = 0

            def __getitems__(self, indices):
                self.calls += 1
                if get_worker_info() is not None and self.calls == int(os.environ["DIES_AT"]):
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__getitems__(indices)

        data.__class__ = Dying
        return data


class InSecondEpoch(Callback):
    '''Runs a command of the shell when the second epoch begins.'''

    def __init__(self, command: str):
        self.command = command

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            subprocess.run(self.command, shell=True, check=True)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the parts above."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here/own_circumstances.py").write_text(OWN)
    Image.new("L", (8, 8), 99).save(tmp_path / "here/photo.png")
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    sys.modules.pop("own_circumstances", None)


@pytest.fixture
def mounts():
    """Makes mounts, with the options of ``mount``, and takes them away after the test."""
    made: list[str] = []

    def mount(*options: str) -> None:
        if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("this test mounts a folder, which needs root")
        if "-o" not in options or "-t" in options:  # otherwise it changes a mount
            made.append(options[-1])

    yield mount
    for folder in reversed(made):
        while f" {folder} " in Path("/proc/mounts").read_text():  # a test may have mounted another folder over it
            subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def make_read_only(mounts):
    """Makes a folder read-only: root ignores permissions, so it gets a read-only mount."""

    def make(folder: Path) -> None:
        if os.geteuid():
            for path in (folder, *folder.rglob("*")):
                path.chmod(path.stat().st_mode & ~0o222)
            return
        mounts("--bind", str(folder), str(folder))
        mounts("-o", "remount,bind,ro", str(folder))

    return make


TRAINED: list[Path] = []


@pytest.fixture
def run(command, digits, logs, here, tmp_path_factory):
    """The copy of a run of an epoch."""
    if not TRAINED:
        status, _, err = command("fit", *digits, "--trainer.max_epochs=1", "--trainer.test_after_fit=false")
        assert status == 0, err
        TRAINED.append(tmp_path_factory.mktemp("trained") / "run")
        shutil.move(logs / "digits/version_0", TRAINED[0])
    shutil.copytree(TRAINED[0], logs / "digits/version_0")
    return Run.find(logs / "digits")


def refusal(done: tuple[int, str, str]) -> str:
    status, out, err = done
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out, (out, err)
    return err


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- a loader's process is killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [*(pytest.param(v, marks=pytest.mark.slow) for v in ("validate", "test")), "predict"])
def test_a_loaders_process_is_killed(verb, command, run, monkeypatch):
    monkeypatch.setenv("DIES_AT", "1")
    words = ["--run", str(run.folder), "--data=own_circumstances.Dies", "--data.num_workers=1"]
    before = content(run.folder)
    err = refusal(command(verb, *words))
    assert "a process that reads images was killed" in err and "data.num_workers" in err
    assert before.items() <= content(run.folder).items()


@pytest.mark.parametrize("batch", [3, 13])  # an epoch has 10 batches
def test_a_loaders_process_is_killed_in_a_fit(batch, command, digits, logs, here, monkeypatch):
    monkeypatch.setenv("DIES_AT", str(batch))
    words = [*digits, "--data=own_circumstances.Dies", "--data.num_workers=1", "--trainer.max_epochs=2"]
    assert "a process that reads images was killed" in refusal(command("fit", *words))
    if batch > 10:
        run = Run.find(logs / "digits")
        assert torch.load(run.last_checkpoint, weights_only=True)["epoch"] == 0
        status, _, err = command("fit", "--resume", str(run.folder), "--data.num_workers=0")
        assert status == 0, err


# -- folders that cannot be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["test", "validate", "benchmark"])
def test_the_figures_of_a_read_only_run_are_shown(verb, command, run, make_read_only):
    make_read_only(run.folder)
    words = ["--engines", "eager", "--rounds=1", "--memory=false"] if verb == "benchmark" else []
    status, out, err = command(verb, "--run", str(run.folder), *words)
    assert status == 0 and f"{run.folder} is read-only: nothing is saved in it." in out and not err, err
    assert {"test": "test/accuracy", "validate": "val/accuracy", "benchmark": "eager"}[verb] in out


@pytest.mark.parametrize(
    "words",
    fast([["predict", "--images", "photo.png"], ["predict"], ["export", "--format=packed", "--num_images=8"]]),
)
def test_the_files_of_a_read_only_run_go_elsewhere(words, command, run, make_read_only, here):
    make_read_only(run.folder)
    words += ["--run", str(run.folder)]
    err = refusal(command(*words))
    assert "cannot be written" in err and "give --output FILE" in err
    status, _, err = command(*words, "--output", "file.packed")
    assert status == 0 and (here / "file.packed").stat().st_size, err


def test_a_read_only_run_is_not_resumed(command, run, make_read_only):
    make_read_only(run.folder)
    before = content(run.folder)
    err = refusal(command("fit", "--resume", str(run.folder), "--trainer.max_epochs=2"))
    assert "copy the run's folder" in err and before == content(run.folder)


def test_a_read_only_folder_of_logs(command, digits, logs, make_read_only):
    logs.mkdir()
    make_read_only(logs)
    assert "choose another folder with --trainer.logs_dir" in refusal(command("fit", *digits))


@pytest.mark.parametrize("what", ["read-only", "gone", "full"])
def test_the_folder_of_logs_changes_amid_a_run(what, command, digits, logs, here, mounts):
    logs.mkdir()
    if what != "gone":
        mounts("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(logs))
    run = Run(logs / "digits/version_0")
    kept = here / "kept"
    change = {
        # Files that are open stay writable, as on a disk that the kernel makes read-only after an error.
        "read-only": f"cp -r {logs} {here}/copy && mount --bind {here}/copy {logs} && mount -o remount,bind,ro {logs}",
        "gone": f"mv {logs} {here}/moved",
        "full": f"cat /dev/zero > {logs}/zeros 2>/dev/null || true",
    }[what]
    shell = f"cp -r {run.folder} {kept} && {change}"
    callback = {"class_path": "own_circumstances.InSecondEpoch", "init_args": {"command": shell}}
    err = refusal(command("fit", *digits, f"--trainer.callbacks+={callback}", "--trainer.max_epochs=3"))
    assert {"read-only": "--trainer.logs_dir", "gone": "No such file", "full": "the disk is full"}[what] in err
    folder = here / "moved/digits/version_0" if what == "gone" else run.folder
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 0 or what == "full"  # a full disk may still take a small file
    assert (folder / "config.yaml").read_bytes() == (kept / "config.yaml").read_bytes()
    rows = (kept / "metrics.csv").read_text().splitlines()
    assert (folder / "metrics.csv").read_text().splitlines()[: len(rows)] == rows


# -- few file handles -------------------------------------------------------------------------------------------------


@pytest.fixture
def few_handles():
    """Leaves this process 24 file handles more than it has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/proc/self/fd").iterdir()]) + 24, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def photos(here):
    for part in ("train", "test"):
        for number in range(48):
            folder = here / "photos" / part / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (5 * number, 90, 120 * (number % 2))).save(folder / f"{number}.png")
    return "photos"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the file handles in /proc")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 16])
def test_few_file_handles(num_workers, command, logs, photos, few_handles):
    from conftest import ROOT

    words = ["--config", str(ROOT / "configs/image_folder.yaml"), f"--data.root={photos}", "--trainer.max_epochs=1"]
    words += ["--data.image_size=16", "--data.batch_size=8", "--data.val_fraction=0.25", "--trainer.observe=false"]
    began = time.monotonic()
    done = command("fit", *words, f"--data.num_workers={num_workers}")
    assert time.monotonic() - began < 60
    if num_workers == 1:
        assert done[0] == 0, done[2]
    else:
        err = refusal(done)
        assert "too many files are open" in err and "raise the limit (ulimit -n), or lower data.num_workers" in err
